# SPDX-License-Identifier: Apache-2.0
"""Transfer through Nystrom features: the formula from n x n matrices in float64, landmarks, last batches, bad calls."""

import pytest
import torch

import kdkernels as kd
from kdkernels.losses import NystromTransferLoss


def rbf(a, b, sigma):
    return torch.exp(torch.cdist(a, b).square() / (-2 * sigma**2))


def nystrom(x, z, sigma):
    """K~ = C W^+ C' [n, n]."""
    C, W = rbf(x, z, sigma), rbf(z, z, sigma)
    return C @ torch.linalg.solve(W + 1e-6 * torch.eye(len(z), dtype=x.dtype), C.mT)


def median(x):
    """The rule of `kd.RBF("median")`: NumPy's median of all n^2 distances, the zeros of the diagonal too; detached."""
    return torch.cdist(x, x).detach().square().flatten().quantile(0.5).sqrt()


def own(s):
    """The student's median, with the gradient of the spread of its rows."""
    spread = (s - s.mean(0)).norm()
    return median(s) * spread / spread.detach()


def transfer(s, t, zs, zt, normalize=True):
    K, L = nystrom(s, zs, own(s)), nystrom(t, zt, median(t))
    return (K - L).square().sum() / (L.square().sum() if normalize else 1)


def pair(n=40, d=6, e=9):
    s = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    return s, torch.randn(n, e, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_formula_with_landmarks_of_the_teachers_choice(normalize):
    s, t = pair()
    loss = NystromTransferLoss(7, normalize=normalize, weight=3.0)
    value = loss(s, t)
    index = kd.select_landmarks(t, 7, method="greedy")
    plain = s.detach().requires_grad_()
    want = 3 * transfer(plain, t, plain[index], t[index], normalize)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=0)
    got, exact = torch.autograd.grad(value, s)[0], torch.autograd.grad(want, plain)[0]
    torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-9 * float(exact.abs().max()))


def test_float32_is_float64s_to_one_part_in_a_million_of_both_norms():
    s, t = pair()
    exact = NystromTransferLoss(16)(s, t)
    assert abs(NystromTransferLoss(16)(s.float(), t.float()) - exact) <= 1e-6 * (1 + (1 + exact.sqrt()) ** 2)


def test_as_many_landmarks_as_rows_compare_the_kernel_matrices_themselves():
    s, t = pair(12)
    K, L = rbf(s, s, median(s)), rbf(t, t, median(t))
    want = (K - L).square().sum() / L.square().sum()
    torch.testing.assert_close(NystromTransferLoss(64)(s, t), want, rtol=1e-4, atol=0)


def test_class_means_are_landmarks_after_the_first_epoch():
    s, t = pair(30)
    labels = torch.arange(30) % 3
    loss = NystromTransferLoss(centers=kd.ClassCenters(4, 6, 9))  # class 3 never comes: its centre stays 0
    assert loss(s, t, labels) == 0
    loss.end_epoch()
    means = [torch.stack([x[labels == c].mean(0) for c in range(3)] + [x[0] * 0]).detach() for x in (s, t)]
    # the centres are kept in float32
    torch.testing.assert_close(loss.eval()(s, t), transfer(s, t, *means), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="labels is None: with centers"):
        loss.train()(s, t)


@pytest.mark.parametrize("kept", [1, 3, 11])
def test_masked_rows_do_not_count_even_where_they_hold_nan(kept):
    s, t = pair(12)
    mask = torch.arange(12) < kept
    loss = NystromTransferLoss(8)
    alone = loss(s[:kept], t[:kept])
    with torch.no_grad():
        s[kept:], t[kept:] = float("nan"), float("nan")
    value = loss(s, t, mask=mask)
    value.backward()
    # where fewer rows than landmarks are left one is repeated: jitter is all that changes
    torch.testing.assert_close(value, alone, rtol=1e-4, atol=1e-10)
    assert (s.grad[kept:] == 0).all() and s.grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_smallest_batches_have_a_finite_value_and_gradient(n):
    s, t = pair(n)
    value = NystromTransferLoss(8)(s, t)
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize("kernel", ["linear", "cosine"])
def test_a_teacher_of_zeros_gives_zero_and_a_student_of_zeros_one(kernel):
    s, t = pair()
    value = NystromTransferLoss(8, kernel=kernel)(s, 0 * t)
    value.backward()
    assert value == 0 and (s.grad == 0).all()
    zero = torch.zeros_like(s, requires_grad=True)
    value = NystromTransferLoss(8, kernel=kernel)(zero, t)
    value.backward()
    assert value == 1 and zero.grad.isfinite().all()


def test_bad_settings_and_calls_are_refused_with_the_argument_and_the_fix():
    for arguments, error, message in (
        ({"num_landmarks": 0}, ValueError, "num_landmarks is 0: give at least 1"),
        ({"num_landmarks": 2.0}, TypeError, "num_landmarks is a float: give an integer"),
        ({"method": "best"}, ValueError, "method is 'best': give one of"),
        ({"kernel": "sigmoid"}, ValueError, "kernel is 'sigmoid'"),
        ({"rows": "groups"}, ValueError, "rows is 'groups': the transfer compares one kernel matrix"),
        ({"centers": 3}, TypeError, "centers is a int: give a kd.ClassCenters, or None"),
    ):
        with pytest.raises(error, match=message):
            NystromTransferLoss(**arguments)
    s, t = pair()
    with pytest.raises(ValueError, match="jitter is -1.0: it is added to the diagonal of W"):
        NystromTransferLoss(4, jitter=-1.0)(s, t)
    with pytest.raises(ValueError, match="student_features is on cpu, teacher_features on meta"):
        NystromTransferLoss(4)(s, t.to("meta"))
