# SPDX-License-Identifier: Apache-2.0
"""mixup: the formula, what a seed fixes, the distribution of the share, its gradient, and bad input."""

import math

import pytest
import torch
from conftest import BACKENDS

import kdkernels as kd
from kdkernels.registry import OPS

EVERY = [b for b in BACKENDS if (b if isinstance(b, str) else b.values[0]) in OPS["mixup"].backends]
every_backend = pytest.mark.parametrize("backend", EVERY)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(9, 3, 4, 4), (9, 33), (9,), (1, 5)])
def test_rows_are_mixed_with_the_rows_of_the_permutation(shape, per_sample, backend):
    x, labels = torch.randn(shape), torch.randint(10, shape[:1])
    batch = kd.mixup(x, labels, per_sample=per_sample, generator=seeded(), backend=backend)
    assert batch.lam.shape == (shape[:1] if per_sample else ()) and batch.lam.dtype == torch.float32
    assert sorted(batch.permutation.tolist()) == list(range(shape[0]))
    assert batch.labels is labels and batch.permuted_labels.equal(labels[batch.permutation])
    lam = batch.lam.reshape(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(batch.x, lam * x + (1 - lam) * x[batch.permutation])


@every_backend
def test_the_seed_fixes_the_batch_and_another_seed_another_one(backend):
    x, labels = torch.randn(50, 8), torch.arange(50)
    first, again, other = (
        kd.mixup(x, labels, alpha=0.4, per_sample=True, generator=seeded(s), backend=backend) for s in (3, 3, 4)
    )
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first.lam.equal(other.lam) and not first.permutation.equal(other.permutation)


def test_every_backend_draws_the_same_batch():
    x, labels = torch.randn(20, 8), torch.arange(20)
    batches = [
        kd.mixup(x, labels, generator=seeded(), backend=b if isinstance(b, str) else b.values[0])
        for b in EVERY
        if isinstance(b, str) or kd.backend.obstacle(b.values[0], "cpu", (), "mixup") is None
    ]
    for batch in batches[1:]:
        torch.testing.assert_close(batch, batches[0])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_the_share_has_the_mean_and_the_variance_of_its_beta_distribution(alpha):
    lam = kd.mixup(
        torch.zeros(40000, 1), torch.zeros(40000).long(), alpha=alpha, per_sample=True, generator=seeded()
    ).lam
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 5 * (variance / 40000) ** 0.5
    assert abs(lam.var() / variance - 1) < 0.05
    assert ((lam >= 0) & (lam <= 1)).all()


def test_a_tiny_alpha_gives_shares_near_0_or_1_and_never_nan():
    lam = kd.mixup(torch.zeros(4000, 1), torch.zeros(4000).long(), alpha=1e-3, per_sample=True, generator=seeded()).lam
    assert lam.isfinite().all() and ((lam < 0.01) | (lam > 0.99)).float().mean() > 0.98
    assert 0.4 < (lam > 0.5).float().mean() < 0.6


@every_backend
def test_alpha_zero_and_lambda_one_change_nothing(backend):
    x, labels = torch.randn(9, 33).bfloat16(), torch.arange(9)
    assert kd.mixup(x, labels, alpha=0.0, backend=backend).x.equal(x)
    batch = kd.mixup(x, labels, lam=1.0, backend=backend)
    assert batch.x.equal(x) and batch.lam == 1
    swapped = kd.mixup(x, labels, lam=0.0, backend=backend)
    assert swapped.x.equal(x[swapped.permutation])


@every_backend
def test_a_given_lambda_is_the_lambda_of_the_batch(backend):
    x, labels = torch.randn(4, 3), torch.arange(4)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert kd.mixup(x, labels, lam=share, backend=backend).lam.equal(share.float())
    assert kd.mixup(x, labels, lam=0.3, per_sample=True, backend=backend).lam.equal(torch.full((4,), 0.3))
    assert kd.mixup(x.double(), labels, lam=0.3, backend=backend).lam.dtype == torch.float64


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_gradient_is_the_transposed_mixing_and_can_be_differentiated_again(per_sample, backend):
    x, labels = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True), torch.arange(5)
    f = lambda x: kd.mixup(x, labels, per_sample=per_sample, generator=seeded(), backend=backend).x  # noqa: E731
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@every_backend
def test_half_inputs_are_mixed_in_float32_and_rounded_once(backend):
    for dtype in (torch.float16, torch.bfloat16):
        x = (100 * torch.randn(64, 33)).to(dtype)
        batch = kd.mixup(x, torch.arange(64), lam=0.3, generator=seeded(), backend=backend)
        wide = x.float()
        exact = 0.3 * wide.double() + 0.7 * wide[batch.permutation].double()
        assert batch.x.dtype == dtype
        assert (batch.x.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()


X, LABELS = torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.tensor(1.0), LABELS), ValueError, "x is 0-d: give a batch"),
        ((X, LABELS[:3]), ValueError, r"labels has shape \(3,\): one class index a row of x is \(4,\)"),
        ((X, LABELS.float()), TypeError, "labels is torch.float32: give class indices"),
        ((X, [0, 1, 2, 3]), TypeError, "labels is a list: pass a torch.Tensor"),
        ((X, LABELS.to("meta")), ValueError, "x is on cpu, labels on meta"),
    ],
)
def test_bad_tensors_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        kd.mixup(*arguments)


@pytest.mark.parametrize(
    "how, error, message",
    [
        ({"alpha": -0.5}, ValueError, "alpha is -0.5"),
        ({"alpha": math.inf}, ValueError, "alpha is inf"),
        ({"alpha": "auto"}, ValueError, "alpha is 'auto'"),
        ({"lam": 1.5}, ValueError, r"lam is 1.5: give a number in \[0, 1\]"),
        ({"lam": math.nan}, ValueError, "lam is nan"),
        ({"lam": torch.tensor([0.1, 0.2, -0.1, 0.5])}, ValueError, r"lam holds a value outside \[0, 1\]"),
        ({"lam": torch.tensor([0.1, 0.2])}, ValueError, r"lam has shape \(2,\): give one number, or one a row of x"),
        ({"lam": torch.tensor(1)}, TypeError, "lam is torch.int64: give a number, or a float tensor"),
    ],
)
def test_bad_options_are_named(how, error, message):
    with pytest.raises(error, match=message):
        kd.mixup(X, LABELS, **how)


def test_an_empty_batch_stays_empty():
    batch = kd.mixup(torch.zeros(0, 3), torch.zeros(0).long())
    assert batch.x.shape == (0, 3) and batch.permuted_labels.shape == (0,)
