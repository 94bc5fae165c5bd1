# SPDX-License-Identifier: Apache-2.0
"""The logits ops under opcheck, torch.compile and torch.func."""

import pytest
import torch
from conftest import FAST
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")
every_backend = pytest.mark.parametrize("backend", FAST)


def pair(*shape, dtype=torch.float32):
    return (torch.randn(*shape, dtype=dtype).requires_grad_() for _ in range(2))


def mixed(R=6, C=9):
    return (
        *pair(R, C), torch.randint(C, (R,)), torch.randint(C, (R,)), torch.rand(R), torch.randn(R, C), torch.randperm(R)
    )  # fmt: skip


CALLS = {
    "kl": lambda s, t, a, b, lam, c, p, be: kd.distillation_kl(s, t, tau=3.0, backend=be),
    "kl rows": lambda s, t, a, b, lam, c, p, be: kd.distillation_kl(s, t, reduction="none", backend=be).sum(),
    "mixed": lambda s, t, a, b, lam, c, p, be: kd.mixed_distillation(s, t, a, b, lam, tau=3.0, alpha=0.4, backend=be),
    "mixed number": lambda s, t, a, b, lam, c, p, be: kd.mixed_distillation(
        s, t, a, b, 0.3, tau=3.0, alpha=0.4, backend=be
    ),
    "mixed clean": lambda s, t, a, b, lam, c, p, be: kd.mixed_distillation(
        s, t, a, b, lam, tau=3.0, alpha=0.4, mix=(0.2, 0.3, 0.5), teacher_clean=c, permutation=p, backend=be
    ),
}


@every_backend
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("form", ["kl", "mixed", "clean"])
def test_opcheck(form, permuted, backend):
    s, t, a, b, lam, c, p = mixed()
    s, t, c = (x.detach() for x in (s, t, c))
    if permuted:
        s, t, c = (x.mT.contiguous().mT for x in (s, t, c))
    extras = {"kl": (None,) * 5, "mixed": (a, b, lam, None, None), "clean": (a, b, lam, c, p)}[form]
    mix = [0.2, 0.3, 0.5] if form == "clean" else [1.0, 0.0, 0.0]
    how = (3.0, 1.0 if form == "kl" else 0.4, *mix, 1.0, form != "kl", "mean", backend, 3 if form == "kl" else 1)
    torch.library.opcheck(torch.ops.kdkernels.logits_fwd, (s, t, *extras, *how))
    _, statistics = torch.ops.kdkernels.logits_fwd(s, t, *extras, *how)
    torch.library.opcheck(torch.ops.kdkernels.logits_bwd, (torch.tensor(1.5), s, t, *extras, statistics, *how))
    torch.library.opcheck(torch.ops.kdkernels.mixup_rows, (s, lam, 1 - lam, p, backend))


@every_backend
@pytest.mark.parametrize("name", CALLS)
def test_a_call_compiles_to_one_graph_with_the_same_value_and_gradient(name, backend):
    arguments = mixed()
    f = lambda *a: CALLS[name](*a, backend)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    want, got = f(*arguments), compiled(*arguments)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(value, arguments[0])[0] for value in (got, want))
    torch.testing.assert_close(*gradients)


@every_backend
def test_another_batch_does_not_compile_again_once_shapes_are_dynamic(backend):
    counter = CompileCounterWithBackend("aot_eager")
    f = lambda *a: CALLS["mixed clean"](*a, backend)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for R, C in ((6, 9), (11, 9), (8, 20)):
        arguments = mixed(R, C)
        torch.testing.assert_close(compiled(*arguments), f(*arguments))
    assert counter.frame_count == 1


@every_backend
def test_vmap_is_one_row_at_a_time(backend):
    student, teacher = (t.detach() for t in pair(5, 4, 9))
    f = lambda s, t: kd.distillation_kl(s, t, backend=backend)  # noqa: E731
    together = torch.func.vmap(f)(student, teacher)
    torch.testing.assert_close(together, torch.stack([f(s, t) for s, t in zip(student, teacher, strict=True)]))


@every_backend
def test_grad_of_torch_func_is_autograds(backend):
    student, teacher = pair(4, 9)
    f = lambda s: kd.distillation_kl(s, teacher.detach(), backend=backend)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(f)(student.detach()), torch.autograd.grad(f(student), student)[0])


def test_a_whole_training_step_compiles():
    model = torch.nn.Linear(5, 9)
    loss = kd.losses.STKDLoss()
    lam = torch.tensor(0.3)

    def step(x, labels, teacher):
        batch = kd.mixup(x, labels, lam=lam)
        return loss(model(batch.x), teacher, batch)

    x, labels, teacher = torch.randn(8, 5), torch.randint(9, (8,)), torch.randn(8, 9)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, labels, teacher).backward()
    assert model.weight.grad.isfinite().all() and model.weight.grad.abs().max() > 0
