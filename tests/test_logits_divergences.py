# SPDX-License-Identifier: Apache-2.0
"""The divergences of rows of logits: the papers' formulas, what must hold for any rows, gradients made forward."""

import math

import pytest
import torch
from conftest import FAST

import kdkernels as kd
from kdkernels.logits.op import DIVERGENCES, any_divergence, measure_of

every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
fast = pytest.mark.parametrize("backend", FAST)
SMOOTH = [name for name in DIVERGENCES if name != "tvd"]


def sides(*shape, apart=3.0, dtype=torch.float64):
    student = 3 * torch.randn(shape, dtype=dtype)
    return student.requires_grad_(), (student.detach() + apart * torch.randn(shape, dtype=dtype)).requires_grad_()


def of_rows(student, teacher, name, backend, tau=1.0, **how):
    return any_divergence(student, teacher, measure_of(name, tau, **how), None, "none", backend)


def gkd(student, teacher, tau, beta):
    """D_JSD(beta)(P || Q) = beta D_KL(P || M) + (1 - beta) D_KL(Q || M), M = beta P + (1 - beta) Q, P the teacher."""
    P, Q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    M = beta * P + (1 - beta) * Q
    return beta * (P * (P / M).log()).sum(-1) + (1 - beta) * (Q * (Q / M).log()).sum(-1)


@every_backend
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_generalized_jsd_is_that_of_gkd_times_tau_squared(tau, beta, backend):
    pair = sides(9, 37)
    want = tau**2 * gkd(*pair, tau, beta).mean()
    got = kd.generalized_jsd(*pair, tau=tau, beta=beta, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, pair), torch.autograd.grad(want, pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def exactly(student, teacher, name, beta=0.5, skew=0.1):
    """Value of each row and the student's gradient in float64, from w = log(p / q), small ones to all digits."""
    b, u, v = DIVERGENCES[name](beta, skew)
    z, y = student.detach().double(), teacher.detach().double()
    log_q, w = y.log_softmax(-1), z - y
    w = w - (log_q.exp() * (w - w[:, :1]).expm1()).sum(-1, keepdim=True).log1p() - w[:, :1]
    q, p = log_q.exp(), (log_q + w).exp()
    over_q = ((1 - b) * w.expm1()).log1p() if b < 1 else torch.zeros_like(w)  # log m / q
    over_p = over_q - w if b > 0 else torch.zeros_like(w)
    value = (u * q * (over_q.expm1() - over_q) + v * p * (over_p.expm1() - over_p)).sum(-1)
    m = b * q + (1 - b) * p
    slope = -v * over_p - (1 - b) * (u * (1 - b) - v * b) * (-q * w.expm1() / m)
    return value, p * (slope - (p * slope).sum(-1, keepdim=True))


@fast
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])  # 1e-2: a divergence of 5e-5
@pytest.mark.parametrize("C", [50, 5000])
def test_a_small_divergence_and_its_gradient_keep_their_digits(C, apart, name, backend):
    student, teacher = sides(6, C, apart=apart, dtype=torch.float32)
    value, gradient = exactly(student, teacher, name)
    got = of_rows(student, teacher, name, backend)
    torch.testing.assert_close(got.double(), value, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(got.sum(), student)
    assert ((found - gradient).norm(dim=-1) <= 1e-5 * gradient.norm(dim=-1)).all()


@fast
def test_total_variation_keeps_its_digits(backend):
    """Not all beside a teacher this near: a class whose sign rounding decides is off by 4e-8 of 1, the row by 1e-6."""
    student, teacher = sides(6, 500, apart=1e-3, dtype=torch.float32)
    p, q = (side.detach().double().softmax(-1) for side in (student, teacher))
    want = (p - q).abs().sum(-1) / 2
    torch.testing.assert_close(of_rows(student, teacher, "tvd", backend).double(), want, rtol=2e-6, atol=0)


@every_backend
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_equal_logits_have_exactly_no_divergence_and_no_gradient(tau, name, backend):
    student = (5 * torch.randn(4, 333)).requires_grad_()
    value = of_rows(student, student.detach().clone(), name, backend, tau)
    assert (value == 0).all()
    assert (torch.autograd.grad(value.sum(), student)[0].abs() < 1e-7).all()


@every_backend
@pytest.mark.parametrize("beta", [1e-3, 0.3, 0.5, 0.999])
def test_it_lies_between_0_and_the_entropy_of_the_coin_beta(beta, backend):
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    for apart in (0.0, 1e-6, 1.0, 300.0):
        student, teacher = sides(50, 31, apart=apart, dtype=torch.float32)
        rows = kd.generalized_jsd(student, teacher, tau=1.0, beta=beta, reduction="none", backend=backend)
        assert (rows >= -1e-7).all() and (rows <= bound * (1 + 1e-6)).all()


@every_backend
@pytest.mark.parametrize("name, mirrored", [("jsd", "jsd"), ("skew", "skew_reverse"), ("forward", "reverse")])
def test_swapped_sides_are_the_mirrored_divergence(name, mirrored, backend):
    student, teacher = sides(5, 20)
    a = of_rows(student, teacher, name, backend, beta=0.3)
    b = of_rows(teacher, student, mirrored, backend, beta=0.7)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for x, y in zip(*(torch.autograd.grad(v.sum(), (student, teacher)) for v in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-13)


@every_backend
def test_a_tensor_of_temperatures_is_the_numbers_of_its_rows(backend):
    student, teacher = sides(2, 3, 11)
    taus = torch.tensor([[0.5, 1.0, 2.0], [3.0, 7.0, 1.5]])
    rows = kd.generalized_jsd(student, teacher, tau=taus, beta=0.2, reduction="none", backend=backend)
    how = {"beta": 0.2, "reduction": "none", "backend": backend}
    each = [
        kd.generalized_jsd(student[i, j], teacher[i, j], tau=taus[i, j].item(), **how) for i in (0, 1) for j in range(3)
    ]
    torch.testing.assert_close(rows, torch.stack(each).reshape(2, 3))
    one = kd.generalized_jsd(student, teacher, tau=torch.tensor(2.0), backend=backend)
    torch.testing.assert_close(one, kd.generalized_jsd(student, teacher, tau=2.0, backend=backend))


@every_backend
@pytest.mark.parametrize("name", ["jsd", "skew", "skew_reverse", "tvd"])
def test_classes_that_a_side_excludes_leave_value_and_gradients_finite(name, backend):
    student, teacher = (side.detach() for side in sides(4, 9))
    student[:, :3], teacher[:, 2:5] = -math.inf, -math.inf
    pair = student.requires_grad_(), teacher.requires_grad_()
    rows = of_rows(*pair, name, backend)
    p, q = (side.softmax(-1) for side in pair)
    b, u, v = DIVERGENCES[name](0.5, 0.1)
    m = b * q + (1 - b) * p
    want = u * torch.xlogy(q, q / m.clamp(min=1e-300)) + v * torch.xlogy(p, p / m.clamp(min=1e-300))
    want = (want if name != "tvd" else (p - q).abs() / 2).sum(-1)
    torch.testing.assert_close(rows, want, rtol=1e-12, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(rows.sum(), pair))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_a_side_that_excludes_what_the_other_has_makes_infinity_of_a_finite_gradient(name, dtype, backend):
    pair = [side.detach().to(dtype) for side in sides(4, 9)]
    less = name == "reverse"  # the side beside the one whose probabilities weigh
    pair[less][:, 2] = -math.inf
    pair[less].requires_grad_()
    rows = of_rows(*pair, name, backend, 2.0)
    assert rows.isinf().all()
    p, q = ((side.detach() / 2).softmax(-1) for side in (pair[less], pair[not less]))
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), pair[less])[0], 2 * (p - q), rtol=2e-5, atol=1e-6)


# ---- the gradient of a sum is made in the forward pass


def one_number(student, teacher, backend, weights=None, name="jsd"):
    how = measure_of(name, 2.0, beta=0.3)
    return any_divergence(student, teacher, how, None, "sum", backend, weights=weights, factor=0.25)


def by_rows(student, teacher, backend, upstream, name="jsd"):
    """The same by the operator's other way, which keeps no gradient."""
    rows = of_rows(student, teacher, name, backend, 2.0, beta=0.3)
    return torch.autograd.grad(rows, student, torch.full_like(rows, 0.25 * upstream))[0]


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 0.5, -3.0, 0.9])
@pytest.mark.parametrize("name", ["jsd", "skew", "tvd"])
def test_a_sum_has_the_gradient_of_its_rows_whatever_comes_from_above(name, upstream, dtype, backend):
    student, teacher = (side.detach().to(dtype) for side in sides(7, 600))
    student.requires_grad_()
    value = one_number(student, teacher, backend, name=name)
    want = by_rows(student, teacher, backend, upstream, name)
    for _ in range(2):
        (found,) = torch.autograd.grad(value, student, torch.tensor(upstream), retain_graph=True)
        eps = torch.finfo(torch.float32).eps
        if dtype == torch.float32:
            torch.testing.assert_close(found, want, rtol=8 * eps, atol=8 * eps * want.abs().max().item())
        else:  # rounded once: a second time would move one in four
            assert (found != want).float().mean() < 0.02


@fast
def test_a_gradient_that_was_handed_out_is_its_owners(backend):
    student, teacher = (side.detach().float() for side in sides(5, 40))
    student.requires_grad_()
    value = one_number(student, teacher, backend)
    value.backward(retain_graph=True)
    once = student.grad.clone()
    student.grad.mul_(2)
    value.backward()
    torch.testing.assert_close(student.grad, 3 * once)


@every_backend
def test_a_row_of_weight_0_counts_for_nothing_whatever_it_holds(backend):
    student, teacher = (side.detach().float() for side in sides(4, 30))
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
    clean, spoilt = (student.clone() for _ in range(2))
    if backend != "reference":  # by the book NaN reaches its gradient: the losses hide such rows
        spoilt[1, 3] = math.nan
    leaves = clean.requires_grad_(), spoilt.requires_grad_()
    for upstream in (1.0, 0.9):
        (a, got), (b, want) = ((v, torch.autograd.grad(v, x, torch.tensor(upstream))[0]) for x in leaves[::-1]
                               for v in (one_number(x, teacher, backend, weights),))  # fmt: skip
        assert a == b and got.equal(want) and (got[1] == 0).all() and got[0].abs().sum() > 0


@fast
def test_an_upstream_of_nothing_gives_no_gradient_and_one_that_is_no_number_none(backend):
    student, teacher = (side.detach().float() for side in sides(4, 30))
    student[1, 3] = math.nan
    student.requires_grad_()
    value = one_number(student, teacher, backend)
    assert (torch.autograd.grad(value, student, torch.tensor(0.0), retain_graph=True)[0] == 0).all()
    assert torch.autograd.grad(value, student, torch.tensor(math.nan))[0].isnan().all()


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.5, None, "0.5", torch.tensor(0.5)])
def test_a_share_that_is_not_between_0_and_1(beta):
    student, teacher = sides(2, 5)
    with pytest.raises(ValueError, match=r"beta is .*: give a number in \(0, 1\): at 0 and 1 the divergence is 0"):
        kd.generalized_jsd(student, teacher, beta=beta)


def test_temperatures_that_are_none():
    student, teacher = sides(2, 5)
    for tau in (0.0, -1.0, math.nan, "4", None):
        with pytest.raises(ValueError, match="tau is .*: a temperature is a positive number"):
            kd.generalized_jsd(student, teacher, tau=tau)
    for tau in (torch.tensor(0.0), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match="tau holds a value that is no positive number"):
            kd.generalized_jsd(student, teacher, tau=tau)
    with pytest.raises(ValueError, match=r"tau has shape \(3,\): give one number, or one a row of student, \(2,\)"):
        kd.generalized_jsd(student, teacher, tau=torch.ones(3))
    with pytest.raises(TypeError, match="tau is torch.int64: give a number, or a float tensor"):
        kd.generalized_jsd(student, teacher, tau=torch.tensor(4))
