# SPDX-License-Identifier: Apache-2.0
"""RdimKDLoss: the three bases, the adapter, the norms and the layouts, against permute and matmul in float64."""

import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels import losses

C, K = 8, 3


def teacher_maps(n=16, c=C, size=5):
    """Channels of falling variance around a mean of 2."""
    mixing = torch.linalg.qr(torch.randn(c, c)).Q
    rows = torch.randn(n, size, size, c) * torch.logspace(0, -2, c) @ mixing + 2
    return rows.permute(0, 3, 1, 2).contiguous()


def fitted(variant, teacher, **how):
    loss = losses.RdimKDLoss(C, K, variant=variant, seed=0, **how)
    loss.observe(teacher[:7])
    loss.observe(teacher[7:])
    loss.fit()
    return loss


def plain(s, t, P):
    D = (s.double() - t.double()).movedim(1, -1).reshape(-1, P.shape[0]) @ P.double()
    return D.square().mean()


@pytest.mark.parametrize("variant", ["P", "A", "R"])
def test_it_is_the_projected_mean_squared_error_and_its_gradient(variant):
    teacher = teacher_maps()
    loss = fitted(variant, teacher)
    s = (teacher + torch.randn_like(teacher)).requires_grad_()
    value, want = loss(s, teacher), plain(s, teacher, loss.basis)
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], torch.autograd.grad(want, s)[0], rtol=1e-5, atol=1e-9)


def test_p_is_the_span_of_the_principal_directions_of_the_teacher():
    teacher = teacher_maps()
    rows = teacher.permute(0, 2, 3, 1).reshape(-1, C).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    P = fitted("P", teacher).basis.double().numpy()
    np.testing.assert_allclose(P @ P.T, vectors[:, -K:] @ vectors[:, -K:].T, atol=1e-6)
    np.testing.assert_allclose(np.diag(P.T @ np.cov(rows, rowvar=False) @ P), values[::-1][:K], rtol=1e-5)


def test_a_spans_the_same_space_without_being_orthonormal_and_r_is_orthonormal():
    teacher = teacher_maps()
    P, A, R = (fitted(variant, teacher).basis.double() for variant in "PAR")
    Q = torch.linalg.qr(A).Q
    torch.testing.assert_close(Q @ Q.T, P @ P.T, atol=1e-3, rtol=0)
    assert (A.T @ A - torch.eye(K)).abs().max() > 1e-3
    torch.testing.assert_close(R.T @ R, torch.eye(K).double(), atol=1e-6, rtol=0)
    assert losses.RdimKDLoss(C, K, variant="R", seed=0).basis.equal(losses.RdimKDLoss(C, K, variant="R", seed=0).basis)


@pytest.mark.parametrize("variant", ["P", "A"])
def test_before_a_fit_it_refuses_to_run_and_after_loading_one_it_runs(variant):
    loss, teacher = losses.RdimKDLoss(C, K, variant=variant), teacher_maps()
    with pytest.raises(RuntimeError, match=r"call loss.observe\(teacher_features\) .* loss.fit\(\)"):
        loss(teacher, teacher)
    with pytest.raises(ValueError, match="0 rows were seen"):
        loss.fit()
    ready = fitted(variant, teacher)
    loss.load_state_dict(ready.state_dict())
    assert loss(teacher * 0, teacher).equal(ready(teacher * 0, teacher))


@pytest.mark.parametrize("variant", ["P", "A", "R"])
def test_relative_to_the_variance_the_teachers_mean_is_at_distance_one(variant):
    teacher = teacher_maps(64)
    loss = fitted(variant, teacher, normalizer="variance")
    mean = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher)
    assert loss(mean, teacher) == pytest.approx(1, abs=1e-3)
    scaled = fitted(variant, 10 * teacher, normalizer="variance")
    if variant != "A":  # the autoencoder starts and ends elsewhere
        assert scaled(10 * mean, 10 * teacher) == pytest.approx(1, abs=1e-3)


def test_relative_to_the_variance_even_random_directions_need_a_fit():
    with pytest.raises(RuntimeError, match="normalizer='variance'"):
        losses.RdimKDLoss(C, K, variant="R", normalizer="variance")(teacher_maps(), teacher_maps())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_adapter_is_a_1x1_convolution_that_learns(form):
    teacher = teacher_maps()
    loss = fitted("P", teacher, student_channels=5)
    s = torch.randn(16, 5, 5, 5).contiguous(memory_format=form).requires_grad_()
    conv = torch.nn.functional.conv2d(
        s.double(), loss.adapter.weight.double()[:, :, None, None], loss.adapter.bias.double()
    )
    value, want = loss(s, teacher), plain(conv, teacher, loss.basis)
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    leaves = (s, loss.adapter.weight, loss.adapter.bias)
    for got, expected in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert len(list(loss.parameters())) == 2


def test_tokens_sequences_and_means_are_rows_of_the_same_loss():
    teacher = teacher_maps()
    loss, s = fitted("P", teacher), torch.randn(16, C, 5, 5)
    want = loss(s, teacher)
    flat = lambda x: x.flatten(2)  # noqa: E731
    torch.testing.assert_close(loss(flat(s).mT, flat(teacher).mT, rows="tokens"), want)
    torch.testing.assert_close(loss(flat(s), flat(teacher), rows="positions"), want)
    torch.testing.assert_close(loss(s, teacher, rows="gap"), loss(s.mean((2, 3)), teacher.mean((2, 3))))
    torch.testing.assert_close(loss(flat(s).mT, flat(teacher).mT, rows="mean"), loss(s, teacher, rows="gap"))
    with pytest.raises(ValueError, match="rows is not given"):
        loss(flat(s), flat(teacher))


@pytest.mark.parametrize("student_channels", [None, 5])
def test_masked_positions_do_not_count_even_where_they_hold_nan(student_channels):
    teacher = teacher_maps()
    loss = fitted("P", teacher, student_channels=student_channels)
    s, mask = torch.randn(16, student_channels or C, 5, 5), torch.rand(16, 5, 5) > 0.4
    tokens = lambda x: x.permute(0, 2, 3, 1)[mask]  # noqa: E731
    want = loss(tokens(s), tokens(teacher))
    poisoned, poison = (x.masked_fill(~mask[:, None], float("nan")) for x in (s, teacher))
    poisoned.requires_grad_()
    value = loss(poisoned, poison, mask=mask)
    torch.testing.assert_close(value, want)
    value.backward()
    assert (poisoned.grad.permute(0, 2, 3, 1)[~mask] == 0).all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    one = torch.zeros(16, dtype=torch.bool)
    one[3] = True
    torch.testing.assert_close(loss(s, teacher, mask=one), loss(s[3:4], teacher[3:4]))


def test_what_is_observed_under_a_mask_does_not_count():
    teacher, mask = teacher_maps(), torch.rand(16, 5, 5) > 0.4
    loss, other = losses.RdimKDLoss(C, K), losses.RdimKDLoss(C, K)
    loss.observe(teacher.masked_fill(~mask[:, None], float("nan")), mask=mask)
    other.observe(teacher.permute(0, 2, 3, 1)[mask])
    torch.testing.assert_close(loss.pca.covariance(), other.pca.covariance())


def test_a_student_trained_by_it_meets_the_teacher_inside_the_subspace_only():
    torch.manual_seed(0)
    teacher = teacher_maps()
    loss = fitted("P", teacher)
    s = torch.zeros_like(teacher).requires_grad_()
    for _ in range(200):
        (grad,) = torch.autograd.grad(loss(s, teacher), s)
        s = (s - 0.2 * grad * s[:, 0].numel() * K).detach().requires_grad_()
    P = loss.basis
    inside, outside = P @ P.T, torch.eye(C) - P @ P.T
    apart = (s - teacher).detach().movedim(1, -1)
    assert (apart @ inside).abs().max() < 1e-3 < (apart @ outside).abs().max()


def test_bad_input_is_refused_with_the_argument_and_the_fix():
    loss, t = losses.RdimKDLoss(C, K, variant="R"), teacher_maps()
    for s, teacher, message in (
        (t[:, :5], t, "student_features has 5 channels in shape .* made for 8"),
        (t, t[:, :5], "teacher_features has 5 channels"),
        (t[:, :, :4], t, r"student_features \(16, 4, 5\): pool one side first"),
        (t[:15], t, "teacher_features has 16 rows, student_features has 15"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(s, teacher)
    with pytest.raises(ValueError, match="mask has shape"):
        loss(t, t, mask=torch.ones(16, 5).bool())
    with pytest.raises(ValueError, match="tokens are"):
        loss(t, t, rows="tokens")
    for arguments, how, message in (
        ((C, 9), {}, "k is 9: a subspace of 8 channels"),
        ((C, K), {"variant": "Q"}, "variant is 'Q'"),
        ((C, K), {"normalizer": "max"}, "normalizer is 'max'"),
        ((C, K), {"rows": "columns"}, "rows is 'columns'"),
        ((C, K), {"student_channels": 0}, "student_channels is 0: give at least 1"),
        ((C, K), {"seed": -1}, "seed is -1: give at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.RdimKDLoss(*arguments, **how)


@pytest.mark.parametrize("variant", ["P", "A", "R"])
def test_a_teacher_of_zeros_has_no_variance_and_is_divided_by_one(variant):
    loss = losses.RdimKDLoss(4, 2, variant=variant, normalizer="variance", seed=0)
    loss.observe(torch.zeros(20, 4))
    loss.fit()
    s = torch.randn(20, 4, requires_grad=True)
    value = loss(s, torch.zeros(20, 4))
    value.backward()
    torch.testing.assert_close(value, (s.detach() @ loss.basis).square().mean())
    assert s.grad.isfinite().all() and s.grad.abs().max() > 0


def test_a_module_on_another_device_is_named_with_the_fix():
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="s is on cpu, basis on meta: move both to one device"):
        losses.RdimKDLoss(3, 2, variant="R").to("meta")(x, x)
    with pytest.raises(ValueError, match="x is on meta, the accumulator on cpu: move one"):
        losses.RdimKDLoss(3, 2).observe(x.to("meta"))


@pytest.mark.parametrize("variant, normalizer", [("P", "mean"), ("A", "mean"), ("R", "variance")])
def test_a_fitted_accumulator_is_all_it_needs(variant, normalizer):
    t, pca = teacher_maps(), kd.StreamingPCA(C)
    pca.update(t)
    loss = losses.RdimKDLoss(C, K, variant=variant, normalizer=normalizer, seed=0, pca=pca)
    other = losses.RdimKDLoss(C, K, variant=variant, normalizer=normalizer, seed=0)
    other.observe(t)
    other.fit()
    assert loss(2 * t, t).equal(other(2 * t, t)) and loss.pca is pca
    with pytest.raises(ValueError, match="pca has 8 channels, this loss 9"):
        losses.RdimKDLoss(9, K, pca=pca)
    with pytest.raises(TypeError, match="pca is a Tensor: give a kd.StreamingPCA"):
        losses.RdimKDLoss(C, K, pca=t)
    with pytest.raises(ValueError, match="0 rows were seen"):
        losses.RdimKDLoss(C, K, pca=kd.StreamingPCA(C))
