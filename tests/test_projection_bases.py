# SPDX-License-Identifier: Apache-2.0
"""StreamingPCA and the bases for projected_mse: against NumPy in float64, in any split, order, layout and offset."""

import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels.projection import pca as module


def rows(n=200, c=6, mean=0.0):
    """Falling variances and a mean, float64."""
    mixing = torch.linalg.qr(torch.randn(c, c, dtype=torch.float64)).Q
    return torch.randn(n, c, dtype=torch.float64) * torch.logspace(0, -1, c).double() @ mixing + mean


def seen(*batches, c=6, **how):
    pca = kd.StreamingPCA(c)
    for batch in batches:
        pca.update(batch, **how)
    return pca


@pytest.mark.parametrize("mean", [0.0, 30.0, 1e6])
def test_mean_and_covariance_are_those_of_numpy_in_any_split(mean):
    x = rows(mean=mean)
    want = np.cov(x.numpy(), rowvar=False)
    for sizes in ([200], [1, 199], [50, 1, 99, 50], [1] * 200):
        pca = seen(*x.split(sizes))
        np.testing.assert_allclose(pca.covariance().numpy(), want, rtol=0, atol=1e-13 + 1e-15 * mean)
        np.testing.assert_allclose(pca.mean.numpy(), x.mean(0).numpy(), rtol=1e-13, atol=1e-13)


def test_the_one_pass_formula_that_this_replaces_fails_at_that_offset():
    x = rows(mean=1e6)
    naive = x.T @ x / 200 - torch.outer(x.mean(0), x.mean(0))
    assert (naive - torch.from_numpy(np.cov(x.numpy(), rowvar=False, bias=True))).abs().max() > 1e-5
    assert (seen(x).covariance() - torch.from_numpy(np.cov(x.numpy(), rowvar=False))).abs().max() < 2e-9


def test_merged_parts_equal_the_whole_in_both_orders():
    x = rows(mean=5.0)
    a, b, whole = seen(x[:60]), seen(x[60:]), seen(x)
    left, right = seen(x[:60]), seen(x[60:])
    left.merge(b)
    right.merge(a)
    for joined in (left, right):
        assert int(joined.count) == 200
        torch.testing.assert_close(joined.covariance(), whole.covariance(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(joined.mean, whole.mean, rtol=1e-13, atol=0)
    assert int(b.count) == 140  # as it was
    empty = kd.StreamingPCA(6)
    empty.merge(whole)
    torch.testing.assert_close(empty.covariance(), whole.covariance())
    before = whole.covariance()
    whole.merge(kd.StreamingPCA(6))
    assert whole.covariance().equal(before)


def test_layouts_give_the_same_accumulator(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 200)
    x = rows(3 * 20).reshape(3, 20, 6)
    want = np.cov(x.reshape(-1, 6).numpy(), rowvar=False)
    image = x.mT.unflatten(2, (4, 5))
    for y, dim in ((x, -1), (x.mT, 1), (image, 1), (image.contiguous(memory_format=torch.channels_last), 1)):
        np.testing.assert_allclose(seen(y, channel_dim=dim).covariance().numpy(), want, atol=1e-14)


def test_masked_rows_do_not_count_even_where_they_hold_nan():
    x = rows(4 * 10).reshape(4, 10, 6)
    mask = torch.rand(4, 10) > 0.4
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    want = np.cov(x[mask].numpy(), rowvar=False)
    np.testing.assert_allclose(seen(poisoned, channel_dim=-1, mask=mask).covariance().numpy(), want, atol=1e-14)
    nothing = seen(x, channel_dim=-1, mask=torch.zeros(4, dtype=torch.bool))
    assert int(nothing.count) == 0 and (nothing.scatter == 0).all()


def test_components_are_orthonormal_and_ordered_and_keep_the_largest_variance():
    pca = seen(rows())
    P = pca.components(3, dtype=torch.float64)
    torch.testing.assert_close(P.T @ P, torch.eye(3).double())
    values = np.linalg.eigvalsh(pca.covariance().numpy())[::-1]
    np.testing.assert_allclose(torch.diagonal(P.T @ pca.covariance() @ P).numpy(), values[:3], rtol=1e-10)
    np.testing.assert_allclose(pca.variances().numpy(), values, rtol=1e-10)
    assert (P.gather(0, P.abs().argmax(0, keepdim=True)) > 0).all()
    assert pca.components(2).dtype == torch.float32


def test_the_state_travels_and_casting_the_module_rounds_nothing():
    pca = seen(rows(mean=1e4))
    other = kd.StreamingPCA(6)
    other.load_state_dict(pca.state_dict())
    assert other.covariance().equal(pca.covariance())
    torch.nn.ModuleList([pca]).half()
    assert pca.mean.dtype == torch.float64 and other.covariance().equal(pca.covariance())
    other.update(rows(10))
    assert int(other.count) == 210


def test_half_features_are_widened_and_autocast_changes_nothing():
    x = (rows() + 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pca = seen(x)
    np.testing.assert_allclose(pca.covariance().numpy(), np.cov(x.double().numpy(), rowvar=False), atol=1e-13)


def test_no_gradient_is_kept():
    x = rows().requires_grad_()
    assert not seen(x).covariance().requires_grad


def test_what_cannot_be_answered_is_refused():
    pca = kd.StreamingPCA(4)
    with pytest.raises(ValueError, match=r"0 rows were seen: .* call update"):
        pca.components(1)
    pca.update(torch.randn(8, 4))
    for call, error, message in (
        (lambda: pca.components(5), ValueError, "k is 5: a subspace of 4 channels"),
        (lambda: pca.components(0), ValueError, "k is 0"),
        (lambda: pca.components(1.0), TypeError, "k is a float"),
        (lambda: pca.update(torch.randn(8, 3)), ValueError, "x has 3 channels in dimension 1: .* 4"),
        (lambda: pca.update(torch.zeros(8, 4, dtype=torch.int32)), TypeError, "x is torch.int32"),
        (lambda: pca.update(torch.zeros(8, 4, device="meta")), ValueError, "x is on meta, the accumulator on cpu"),
        (lambda: pca.update(torch.randn(4, 4), channel_dim=0), ValueError, "dimension 0 is the batch"),
        (lambda: pca.update(torch.randn(4, 4), mask=torch.ones(3).bool()), ValueError, "mask has shape"),
        (lambda: pca.merge(torch.zeros(4)), TypeError, "other is a Tensor"),
        (lambda: pca.merge(kd.StreamingPCA(3)), ValueError, "other has 3 channels, this StreamingPCA 4"),
        (lambda: kd.StreamingPCA(0), ValueError, "num_channels is 0"),
        (lambda: kd.StreamingPCA("4"), TypeError, "num_channels is a str"),
    ):
        with pytest.raises(error, match=message):
            call()
    pca.update(torch.full((1, 4), float("nan")))
    with pytest.raises(ValueError, match="NaN or infinity"):
        pca.components(1)


def test_a_random_basis_is_orthonormal_seeded_and_uniform():
    make = lambda seed, k=4: kd.random_basis(16, k, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    P = make(0)
    torch.testing.assert_close(P.T @ P, torch.eye(4), atol=1e-6, rtol=0)
    assert P.equal(make(0)) and not P.equal(make(1))
    # the sign of an entry is a coin: without the correction of the factorisation's signs the diagonal never is
    signs = torch.stack([make(seed, 1)[0, 0].sign() for seed in range(200)])
    assert abs(signs.mean()) < 0.25
    with pytest.raises(ValueError, match="k is 17: a subspace of 16 channels"):
        kd.random_basis(16, 17)


def test_the_autoencoder_reconstructs_as_well_as_the_principal_directions():
    pca = seen(rows(400, 12), c=12)
    C, values = pca.covariance(), pca.variances()
    E = kd.autoencoder_basis(C, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    D = torch.linalg.lstsq(E.T @ C @ E, E.T @ C).solution  # the best decoder of this encoder
    R = torch.eye(12).double() - E @ D
    error = torch.trace(R.T @ C @ R)
    assert values[4:].sum() * (1 - 1e-9) <= error <= 1.0001 * values[4:].sum()
    assert not torch.allclose(E.T @ E, torch.eye(4).double(), atol=1e-3)  # trained, not orthonormalised


def test_the_autoencoders_loss_on_the_covariance_is_the_loss_on_the_features():
    x = rows()
    x = x - x.mean(0)
    E, D = torch.randn(6, 2).double(), torch.randn(2, 6).double()
    R = torch.eye(6).double() - E @ D
    C = x.T @ x / len(x)
    torch.testing.assert_close(torch.trace(R.T @ C @ R), (x - x @ E @ D).square().sum(1).mean())


def test_the_autoencoder_survives_a_constant_teacher_and_refuses_nonsense():
    assert kd.autoencoder_basis(torch.zeros(4, 4), 2).isfinite().all()
    for C, k, error, message in (
        (torch.zeros(4, 3), 2, ValueError, r"covariance has shape \(4, 3\)"),
        (torch.zeros(4, 4), 5, ValueError, "k is 5"),
        (torch.full((4, 4), float("nan")), 2, ValueError, "NaN"),
        (torch.zeros(4, 4).long(), 2, TypeError, "covariance is torch.int64"),
    ):
        with pytest.raises(error, match=message):
            kd.autoencoder_basis(C, k)
    with pytest.raises(ValueError, match="steps is 0"):
        kd.autoencoder_basis(torch.eye(4), 2, steps=0)


def test_explained_variance_ratios_are_those_of_the_singular_values():
    x = torch.randn(50, 6, dtype=torch.float64) @ torch.diag(torch.tensor([5.0, 3, 1, 1, 0.1, 0]).double()) + 7
    pca = kd.StreamingPCA(6)
    pca.update(x)
    square = torch.linalg.svdvals(x - x.mean(0)).square()
    torch.testing.assert_close(pca.explained_variance_ratio(), square / square.sum(), rtol=1e-10, atol=1e-14)
    constant = kd.StreamingPCA(2)
    constant.update(torch.ones(4, 2))
    assert constant.explained_variance_ratio().tolist() == [0, 0]
