# SPDX-License-Identifier: Apache-2.0
"""The compiled row kernels: the same bits for any number of threads, every width, refusals that say why."""

import math

import pytest
import torch
from conftest import needs_native

import kdkernels as kd
from kdkernels import native
from kdkernels.logits.op import DIVERGENCES, any_divergence, measure_of
from kdkernels.registry import OPS

pytestmark = needs_native(*OPS["distillation_kl"].native)


def both_gradients(student, teacher, tau, backend):
    sides = [t.detach().clone().requires_grad_() for t in (student, teacher)]
    rows = kd.distillation_kl(*sides, tau=tau, reduction="none", backend=backend)
    return rows.detach(), *torch.autograd.grad(rows.sum(), sides)


def test_the_bits_do_not_depend_on_the_number_of_threads(same_bits):
    student, teacher = (4 * torch.randn(301, 1037) for _ in range(2))
    same_bits(lambda: both_gradients(student, teacher, 4.0, "cpp"))


# the tail of a vector, of a block of 512 summed in float32, and of the padding; a power of two squares its exponentials
@pytest.mark.parametrize("C", [1, 2, 15, 16, 17, 511, 512, 513, 1000, 2049])
@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0, 8.0, 16.0, 3.0])
def test_every_width_and_temperature_is_float64s_to_a_few_eps(C, tau):
    student, teacher = (4 * torch.randn(5, C) for _ in range(2))
    exact = both_gradients(student.double(), teacher.double(), tau, "reference")
    value, *gradients = both_gradients(student, teacher, tau, "cpp")
    eps = torch.finfo(torch.float32).eps
    assert ((value - exact[0]).abs() <= 32 * eps * tau**2 * (1 + 20 / tau)).all()
    for got, want in zip(gradients, exact[1:], strict=True):
        assert (got - want).abs().max() <= 32 * eps * max(tau, want.abs().max().item())


def test_its_exponential_and_its_logarithm_are_right_over_their_whole_range():
    """A row of two classes d apart: p = 1 / (1 + exp(d)), from the gradient of the hard term; log q from a mixture."""
    d = torch.linspace(0, 100, 4001)
    logits = torch.stack([torch.zeros_like(d), -d], 1).requires_grad_()
    first = torch.zeros(len(d), dtype=torch.long)
    how = {"tau": 1.0, "alpha": 0.0, "reduction": "sum", "backend": "cpp"}
    value = kd.mixed_distillation(logits, logits.detach(), first, first, 1.0, **how)
    (grad,) = torch.autograd.grad(value, logits)
    p = 1 / (1 + d.double().exp())
    inside = d < 86  # below, probabilities are 0
    torch.testing.assert_close(grad[inside, 1].double(), p[inside], rtol=5e-7, atol=0)
    assert (grad[d > 88, 1] == 0).all()
    soft = {"tau": 1.0, "alpha": 1.0, "mix": (0.5, 0.0, 0.5), "reduction": "none"}
    uniform = torch.zeros_like(logits.detach())
    rows = kd.mixed_distillation(uniform, logits.detach(), first, first, 1.0, backend="cpp", **soft)
    exact = kd.mixed_distillation(uniform.double(), logits.detach().double(), first, first, 1.0, **soft)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-6, atol=1e-7)


def test_float64_runs_in_pytorch_with_the_same_answer():
    student, teacher = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    for got, want in zip(
        both_gradients(student, teacher, 2.0, "cpp"), both_gradients(student, teacher, 2.0, "torch"), strict=True
    ):
        assert got.equal(want)


def arguments(student, teacher, labels=None, lam=None, order=None, clean=None):
    return student, teacher, labels, labels, lam, clean, order, 4.0, 0.5, 1.0, 0.0, 0.0, 1.0, True


@pytest.mark.parametrize(
    "given, message",
    [
        ({"student": torch.zeros(3, 5).double()}, "student is Double: pass float32, float16 or bfloat16"),
        ({"teacher": torch.zeros(3, 4)}, r"teacher must be CPU logits \[3, 5\] with dense rows"),
        ({"student": torch.zeros(5, 3).mT}, r"student must be CPU logits \[3, 5\] with dense rows"),
        ({"labels": torch.tensor([0, 1, 5])}, "labels holds 5: give 0 to 4"),
        ({"labels": torch.tensor([0, 1])}, r"labels must be a contiguous Long \[3\]"),
        ({"lam": torch.zeros(3)}, r"lam must be a contiguous Double \[3\]"),
        ({"order": torch.tensor([0, 1, -1])}, "order holds -1: give 0 to 2"),
    ],
)
def test_the_operator_refuses_what_it_cannot_read(given, message):
    given = {"student": torch.zeros(3, 5), "teacher": torch.zeros(3, 5), "labels": torch.zeros(3).long(), **given}
    with pytest.raises(ValueError, match=message):
        torch.ops.kdkernels.logits_rows(*arguments(**given))


def test_mixing_refuses_an_index_that_is_no_row():
    with pytest.raises(ValueError, match="index holds 3: give 0 to 2"):
        torch.ops.kdkernels.mix_rows(torch.zeros(3, 4), *[torch.ones(3).double()] * 2, torch.tensor([0, 1, 3]))


# ---- one number, through operators of fewer arguments


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_the_reduced_divergence_is_that_of_its_rows(reduction, dtypes):
    student, teacher = (torch.randn(7, 21).to(dtype) for dtype in dtypes)
    student[2, 3] = teacher[2, 3] = -math.inf
    each, ours = (student.clone().requires_grad_() for _ in range(2))
    rows = kd.distillation_kl(each, teacher, tau=3.0, reduction="none", backend="cpp")
    want = rows.double().mean() if reduction == "mean" else rows.double().sum()
    got = kd.distillation_kl(ours, teacher, tau=3.0, reduction=reduction, backend="cpp")
    assert type(got.grad_fn).__name__ == "DivergenceBackward" and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(2.5 * got, ours, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(2.5 * want, each)[0], rtol=2e-6, atol=1e-8)
    (again,) = torch.autograd.grad(got, ours, create_graph=True)
    with pytest.raises(RuntimeError, match="pass backend='reference'"):
        again.sum().backward()


def test_the_reduced_divergence_refuses_what_it_cannot_read():
    z = torch.randn(3, 4)
    statistics = torch.ops.kdkernels.kl_rows(z, z, None, 4.0, True)[1]
    with pytest.raises(ValueError, match="teacher must be CPU logits"):
        torch.ops.kdkernels.kl_rows(z, z[:2], None, 4.0, True)
    with pytest.raises(ValueError, match="grad must be one float32 number"):
        torch.ops.kdkernels.kl_rows_backward(torch.ones(2), z, z, None, statistics, 4.0, True)
    with pytest.raises(ValueError, match="statistics must be what logits_rows gave"):
        torch.ops.kdkernels.kl_rows_backward(torch.ones(()), z, z, None, statistics[:4], 4.0, True)
    for weight in (torch.ones(2), torch.ones((), dtype=torch.float64)):
        with pytest.raises(ValueError, match="weight must be one float32 number"):
            torch.ops.kdkernels.kl_rows(z, z, weight, 4.0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of the loss and its weight
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_weight_of_the_loss_is_multiplied_in_the_compiled_call(dtype, divergence):
    student, teacher = torch.randn(2, 9, 5).unbind()
    student.requires_grad_()
    loss = kd.losses.KDLoss(divergence=divergence, weight=0.75, backend="cpp").to(dtype)
    total, parts = loss(student, teacher, return_parts=True)
    direct = divergence == "forward"
    assert (type(total.grad_fn).__name__ == "DivergenceBackward") == direct and parts["kd"].equal(total)
    pair = (student, teacher) if divergence == "forward" else (teacher, student)
    want = 0.75 * kd.distillation_kl(*pair, backend="reference")
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(*(torch.autograd.grad(3 * v, student)[0] for v in (total, want)))
    total = loss(student, teacher)
    loss.weight.fill_(2.0)
    if direct and dtype == torch.float32:  # as PyTorch's own product does
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    torch.testing.assert_close(loss(student, teacher), want * (2 / 0.75))


# ---- every other divergence


@pytest.mark.parametrize("C", [1, 2, 15, 17, 511, 512, 513, 1025, 2049])  # around vectors and blocks
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_width_of_every_divergence_is_float64s(name, C):
    student, teacher = (4 * torch.randn(5, C) for _ in range(2))
    found, exact = [], []
    for out, dtype, backend in ((found, torch.float32, "cpp"), (exact, torch.float64, "reference")):
        leaf = student.to(dtype).requires_grad_()
        value = any_divergence(leaf, teacher.to(dtype), measure_of(name, 2.0, 0.3), None, "sum", backend)
        out += [value.detach(), torch.autograd.grad(value, leaf)[0]]
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=1e-9)
    assert (found[1] - exact[1]).abs().max() <= 2e-6 * max(1, exact[1].abs().max())


def test_a_block_that_a_side_excludes_comes_before_those_it_has():
    student, teacher = (torch.randn(2, 1300) for _ in range(2))
    student[0, :600], teacher[1, :1100] = -math.inf, -math.inf
    args = measure_of("jsd", 1.0), None, "none"
    got, want = (any_divergence(student.to(d), teacher.to(d), *args, b) for d, b in
                 ((torch.float32, "cpp"), (torch.float64, "reference")))  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"student": torch.zeros(3, 5).double()}, "divergence_rows: student is Double: pass float32, float16 or"),
        ({"teacher": torch.zeros(3, 4)}, r"divergence_rows: teacher must be CPU logits \[3, 5\] with dense rows"),
        ({"taus": torch.ones(2)}, r"divergence_rows: taus must be float32 \[3\]"),
        ({"weights": torch.ones(3).double()}, r"divergence_rows: weights must be float32 \[3\]"),
    ],
)
def test_the_rows_of_a_divergence_refuse_what_they_cannot_read(given, message):
    names = {"student": torch.zeros(3, 5), "teacher": torch.zeros(3, 5), "taus": None, "weights": None}
    numbers = 1.0, 0.5, 0.5, 0.5, 1.0, True, True
    with pytest.raises(ValueError, match=message):
        torch.ops.kdkernels.divergence_rows(*{**names, **given}.values(), *numbers)
    with pytest.raises(ValueError, match=r"statistics must be what divergence_rows gave, float32 \[7, 3\]"):
        z = torch.zeros(3, 5)
        torch.ops.kdkernels.divergence_rows_backward(torch.ones(3), z, z, None, torch.ones(6, 3), *numbers[:4])


@pytest.mark.skipif(native.lack("cpu", ("half_product",)) is not None, reason="not built")
@pytest.mark.parametrize("rows, width, classes", [(1, 1, 1), (5, 7, 33), (13, 32, 31), (12, 96, 200), (25, 70, 64)])
def test_a_product_of_bfloat16_has_a_float32_result(rows, width, classes):
    """Rows and classes beside whole blocks of 12 and 32, a width beside pairs and squares of them; views."""
    a, b = torch.randn(rows, width + 3).bfloat16()[:, :width], torch.randn(classes, width).bfloat16()
    around = torch.full((rows, classes + 5), 9.0)
    out = around[:, :classes]
    if not torch.ops.kdkernels.half_product(a, b, out):
        pytest.skip("the CPU has no products of bfloat16")
    want = a.double() @ b.double().T
    assert (out.double() - want).norm() <= 4e-7 * want.norm() and (around[:, classes:] == 9).all()
