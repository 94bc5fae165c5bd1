# SPDX-License-Identifier: Apache-2.0
"""The logits ops against what people write by hand, and what must hold for any rows."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS

import kdkernels as kd
from kdkernels.registry import OPS

EVERY = [b for b in BACKENDS if (b if isinstance(b, str) else b.values[0]) in OPS["distillation_kl"].backends]
every_backend = pytest.mark.parametrize("backend", EVERY)


def logits(*shape, scale=3.0, dtype=torch.float64):
    student, teacher = (scale * torch.randn(*shape, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def mixed(R=9, C=7, dtype=torch.float64):
    """Arguments of mixed_distillation and the keywords of the clean target."""
    student, teacher = logits(R, C, dtype=dtype)
    a, b = torch.randint(C, (R,)), torch.randint(C, (R,))
    clean = {"teacher_clean": torch.randn(R, C, dtype=dtype), "permutation": torch.randperm(R)}
    return (student, teacher.detach(), a, b, torch.rand(R, dtype=dtype)), clean


@every_backend
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0, 3.3])
def test_distillation_kl_is_what_scripts_write_with_kl_div(tau, backend):
    student, teacher = logits(9, 37)
    script = F.kl_div(F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1), reduction="batchmean") * tau**2
    value = kd.distillation_kl(student, teacher, tau=tau, backend=backend)
    torch.testing.assert_close(value, script, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(value, (student, teacher)), torch.autograd.grad(script, (student, teacher)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@every_backend
@pytest.mark.parametrize("apart, digits", [(3.0, 2e-6), (0.1, 1e-5), (1e-3, 1e-3)])
@pytest.mark.parametrize("tau", [1.0, 100.0, 1e4])
def test_a_small_divergence_keeps_its_digits_at_every_temperature(tau, apart, digits, backend):
    student = torch.randn(6, 50)
    teacher = student + apart * torch.randn(6, 50)
    log_p, log_q = ((side.double() / tau).log_softmax(1) for side in (student, teacher))
    w = log_p - log_q  # sum q (exp(w) - 1) is 0: with it float64 has digits left at the smallest
    exact = tau**2 * (log_q.exp() * (w.expm1() - w)).sum(1)
    if backend == "reference":  # in float32 it rounds each logarithm
        student, teacher = student.double(), teacher.double()
    digits = 2e-7 if backend == "torch" else digits  # short rows in float64, rounded once
    value = kd.distillation_kl(student, teacher, tau=tau, reduction="none", backend=backend)
    torch.testing.assert_close(value.double(), exact, rtol=digits, atol=0)
    assert (kd.distillation_kl(student, student, tau=tau, reduction="none", backend=backend) == 0).all()


@every_backend
def test_logits_without_their_last_position_are_read_where_they_are(backend):
    def sides(B, T, C):
        wide = [torch.full((B, T, C + 3), math.nan) for _ in range(2)]
        for side in wide:
            side[:, :-1, :C] = torch.randn(B, T - 1, C)
        return [side[:, :-1, :C].requires_grad_() for side in wide]

    def gradients(pair, reduction="none"):
        value = kd.distillation_kl(*pair, tau=2.0, reduction=reduction, backend=backend)
        return value.detach(), *torch.autograd.grad(value.sum(), pair)

    for shape in ((3, 5, 7), (2, 90, 1000), (70, 2, 1000)):  # a chunk ends inside a sample, or takes several
        pair = sides(*shape)
        dense = [side.detach().contiguous().requires_grad_() for side in pair]
        one = [dense[0], pair[1]]
        expected = gradients(dense)
        torch.testing.assert_close([gradients(pair), gradients(one)], [expected, expected], rtol=0, atol=0)
    if backend != "reference":
        student, teacher = sides(4, 129, 4000)
        teacher.requires_grad_(False)
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(kd.distillation_kl(student, teacher, backend=backend), student)
        assert peak(profile) < 1.3 * student.numel() * 4  # the gradient, and what a chunk needs


def peak(profile) -> int:
    """The most bytes allocated at once."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes))


@every_backend
def test_mixed_distillation_is_cross_entropy_of_soft_labels_plus_kl_div(backend):
    (student, teacher, a, b, lam), clean = mixed()
    k1, k2, k3 = mix = (0.5, 0.3, 0.2)
    label = lam[:, None] * F.one_hot(a, 7) + (1 - lam)[:, None] * F.one_hot(b, 7)
    p = F.softmax(clean["teacher_clean"] / 4, 1)
    q = k1 * F.softmax(teacher / 4, 1) + k3 * label
    q = q + k2 * (lam[:, None] * p + (1 - lam)[:, None] * p[clean["permutation"]])
    soft = F.kl_div(F.log_softmax(student / 4, 1), q, reduction="batchmean") * 16
    script = 0.3 * F.cross_entropy(student, label) + 0.7 * soft
    value = kd.mixed_distillation(student, teacher, a, b, lam, tau=4.0, alpha=0.7, mix=mix, backend=backend, **clean)
    torch.testing.assert_close(value, script, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(v, student)[0] for v in (value, script))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@every_backend
def test_the_kl_is_positive_and_zero_only_for_equal_softmaxes(backend):
    student, teacher = logits(40, 11)
    rows = kd.distillation_kl(student, teacher, reduction="none", backend=backend)
    assert (rows > 0).all()
    shifted = kd.distillation_kl(teacher + 5 * torch.randn(40, 1), teacher, reduction="none", backend=backend)
    assert shifted.abs().max() < 1e-12


@every_backend
def test_neither_a_shift_of_a_row_nor_the_order_of_the_classes_changes_the_value(backend):
    student, teacher = logits(9, 37)
    value = kd.distillation_kl(student, teacher, backend=backend)
    order = torch.randperm(37)
    moved = kd.distillation_kl(student[:, order] + 300, teacher[:, order] - 1000, backend=backend)
    torch.testing.assert_close(moved, value, rtol=1e-10, atol=0)


@every_backend
def test_each_gradient_row_sums_to_zero(backend):
    student, teacher = logits(9, 37)
    for grad in torch.autograd.grad(kd.distillation_kl(student, teacher, backend=backend), (student, teacher)):
        assert grad.abs().max() > 1e-3 and grad.sum(-1).abs().max() < 1e-14


@every_backend
def test_a_row_gives_its_own_value_whatever_stands_beside_it(backend):
    student, teacher = (t.detach() for t in logits(9, 37))
    rows = kd.distillation_kl(student, teacher, reduction="none", backend=backend)
    student, beside = student.clone(), teacher.clone()
    student[4, 3], beside[7, 30] = math.nan, math.inf
    student.requires_grad_(), beside.requires_grad_()
    found = kd.distillation_kl(student, beside, reduction="none", backend=backend)
    assert found.isnan().nonzero().flatten().tolist() == [4, 7]
    fine = [0, 1, 2, 3, 5, 6, 8]
    assert found[fine].equal(rows[fine])
    for grad in torch.autograd.grad(found.sum(), (student, beside)):
        assert grad[[4, 7]].isnan().all() and grad[fine].isfinite().all()


@pytest.mark.parametrize("backend", EVERY[1:])  # the reference is plain autograd: 0 times NaN is NaN
def test_a_row_with_upstream_zero_gets_gradient_zero_even_where_it_is_nan(backend):
    student, teacher = (t.detach() for t in logits(5, 7))
    student[2, 3], teacher[3, 1] = math.nan, math.nan
    student.requires_grad_(), teacher.requires_grad_()
    rows = kd.distillation_kl(student, teacher, reduction="none", backend=backend)
    upstream = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for grad in torch.autograd.grad(rows, (student, teacher), upstream):
        assert (grad[2:4] == 0).all() and grad.isfinite().all() and (grad[[0, 1, 4]] != 0).all()


@every_backend
def test_a_class_closed_on_both_sides_is_as_if_it_were_not_there(backend):
    student, teacher = logits(9, 6)
    gap = torch.full((9, 1), -math.inf, dtype=torch.float64)
    closed = [torch.cat([t.detach()[:, :3], gap, t.detach()[:, 3:]], 1).requires_grad_() for t in (student, teacher)]
    value, want = (kd.distillation_kl(*pair, backend=backend) for pair in (closed, (student, teacher)))
    torch.testing.assert_close(value, want, rtol=1e-13, atol=0)
    keep = [0, 1, 2, 4, 5, 6]
    pairs = zip(torch.autograd.grad(value, closed), torch.autograd.grad(want, (student, teacher)), strict=True)
    for got, plain in pairs:
        torch.testing.assert_close(got[:, keep], plain, rtol=1e-11, atol=1e-15)
        assert (got[:, 3] == 0).all()


@every_backend
def test_a_class_that_only_the_student_closes_is_infinitely_far_with_a_finite_gradient(backend):
    student, teacher = (t.detach() for t in logits(2, 5))
    student[0, 1] = -math.inf
    student.requires_grad_()
    rows = kd.distillation_kl(student, teacher, reduction="none", backend=backend)
    assert rows[0] == math.inf and rows[1].isfinite()
    (grad,) = torch.autograd.grad(rows.sum(), student)
    torch.testing.assert_close(grad[0, 1], -4.0 * (teacher[0] / 4).softmax(-1)[1])
    assert grad.isfinite().all()


@every_backend
def test_a_label_without_weight_may_be_closed_and_one_with_weight_is_infinitely_far(backend):
    student = torch.randn(3, 5, dtype=torch.float64)
    student[:, 2] = -math.inf
    a, b = torch.tensor([0, 2, 0]), torch.tensor([2, 0, 2])
    lam = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    how = {"tau": 2.0, "alpha": 0.0, "reduction": "none", "backend": backend}
    rows = kd.mixed_distillation(student, torch.randn(3, 5).double(), a, b, lam, **how)
    torch.testing.assert_close(rows[:2], -student.log_softmax(-1)[:2, 0])
    assert rows[2] == math.inf


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_ten_thousand_keep_value_and_gradient(dtype, backend):
    student, teacher = ((1e4 * torch.randn(5, 37)).to(dtype).requires_grad_() for _ in range(2))
    true = [t.detach().double().requires_grad_() for t in (student, teacher)]
    value, want = kd.distillation_kl(student, teacher, backend=backend), kd.distillation_kl(*true, backend="reference")
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    got, of_teacher = torch.autograd.grad(value, (student, teacher))
    (grad,) = torch.autograd.grad(want, true[0])
    assert got.dtype == dtype and of_teacher.isfinite().all()
    torch.testing.assert_close(got.double(), grad, rtol=1e-2, atol=1e-6)


@every_backend
def test_a_tenth_of_a_million_classes_in_bfloat16(backend):
    student, teacher = ((4 * torch.randn(3, 131072)).bfloat16().requires_grad_() for _ in range(2))
    true = [t.detach().double().requires_grad_() for t in (student, teacher)]
    value, want = kd.distillation_kl(student, teacher, backend=backend), kd.distillation_kl(*true, backend="reference")
    torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=0)
    (got,), (grad,) = (torch.autograd.grad(v, s) for v, s in ((value, student), (want, true[0])))
    assert (got.double() - grad).norm() < 3e-3 * grad.norm()


@every_backend
def test_a_mixture_of_equal_teachers_is_that_teacher(backend):
    (student, teacher, a, b, lam), _ = mixed()
    how = {"tau": 4.0, "alpha": 0.6, "backend": backend}
    plain = kd.mixed_distillation(student, teacher, a, b, lam, **how)
    same = {"teacher_clean": teacher, "permutation": torch.arange(9)}
    for mix in ((0, 1, 0), (0.3, 0.7, 0)):
        torch.testing.assert_close(
            kd.mixed_distillation(student, teacher, a, b, lam, mix=mix, **same, **how), plain, rtol=1e-12, atol=0
        )


@every_backend
def test_a_term_without_weight_is_not_read(backend):
    (student, teacher, a, b, lam), _ = mixed()
    broken = torch.full_like(teacher, math.nan)
    how = {"tau": 4.0, "backend": backend}
    hard = kd.mixed_distillation(student, broken, a, b, lam, alpha=0.0, **how)
    hard.backward()
    assert hard.isfinite() and student.grad.isfinite().all()
    soft = kd.mixed_distillation(student, teacher, a, b, lam, alpha=1.0, **how)
    torch.testing.assert_close(soft, kd.distillation_kl(student, teacher, tau=4.0, backend=backend))


@every_backend
def test_a_number_a_scalar_and_a_share_for_each_row_are_one_lambda(backend):
    (student, teacher, a, b, _), clean = mixed()
    how = {"tau": 4.0, "alpha": 0.5, "mix": (0.2, 0.4, 0.4), "backend": backend, **clean}
    number = kd.mixed_distillation(student, teacher, a, b, 0.25, **how)
    for lam in (torch.tensor(0.25), torch.full((9,), 0.25, dtype=torch.float64)):
        assert kd.mixed_distillation(student, teacher, a, b, lam, **how).equal(number)


@every_backend
def test_swapping_the_labels_is_swapping_the_shares(backend):
    (student, teacher, a, b, lam), _ = mixed()
    how = {"tau": 4.0, "alpha": 0.5, "mix": (0.5, 0, 0.5), "backend": backend}
    one, other = (kd.mixed_distillation(student, teacher, *t, **how) for t in ((a, b, lam), (b, a, 1 - lam)))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_what_is_saved_for_backward_is_a_few_numbers_a_row():
    student, teacher = (torch.randn(64, 1000, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kd.distillation_kl(student, teacher.detach())
    own = [t for t in saved if t is not None and t.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert own and sum(t.numel() for t in own) <= 5 * 64
