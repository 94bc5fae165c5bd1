# SPDX-License-Identifier: Apache-2.0
"""The compiled projection and landmark kernels: every tile edge, rows shared out over threads, refusals."""

import pytest
import torch
from conftest import needs_native
from formulas import assert_near

import kdkernels as kd
from kdkernels.nystrom.kda import torch_impl as landmarks
from kdkernels.registry import OPS

pytestmark = needs_native(*OPS["projected_mse"].native, *OPS["landmark_similarity_loss"].native)

CHANNELS_LAST = {"memory_format": torch.channels_last}


def projected(s, t, basis, backend, **how):
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    value = kd.projected_mse(s, t, basis, backend=backend, **how)
    return value.detach(), *torch.autograd.grad(value.sum(), (s, t))


def similarity(s, t, centers, backend):
    s = s.detach().requires_grad_()
    value = kd.landmark_similarity_loss(s, t, *centers, backend=backend)
    return value.detach(), torch.autograd.grad(value, s)[0]


# tiles of 48 rows, 128 positions, 96 channels of a gradient; vectors of 16; registers of 6 rows
@pytest.mark.parametrize("c, k", [(1, 1), (5, 3), (16, 16), (17, 5), (96, 33), (97, 96), (200, 129)])
@pytest.mark.parametrize("positions", [1, 47, 48, 49, 127, 128, 129])
@pytest.mark.parametrize("rows", [False, True])
def test_every_edge_of_the_tiles_is_the_textbook(c, k, positions, rows):
    s, t = (torch.randn(2, positions, c).mT if rows else torch.randn(2, c, positions) for _ in range(2))
    basis = torch.randn(c, k)
    exact = projected(s.double(), t.double(), basis.double(), "reference")
    assert_near(projected(s, t, basis, "cpp"), exact)


@pytest.mark.parametrize("layouts", [("nchw", "last"), ("last", "nchw"), ("last", "last"), ("turned", "nchw")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_side_may_have_its_own_layout_dtype_and_mask(layouts, reduction):
    turn = {"nchw": lambda x: x, "last": lambda x: x.contiguous(**CHANNELS_LAST), "turned": lambda x: x.mT}
    s, t = (turn[name](torch.randn(3, 20, 7, 7)) for name in layouts)
    keep = torch.rand(3, 7, 7) > 0.3
    s = s.bfloat16()
    s[1, :, 2, 3], keep[1, 2, 3] = float("nan"), False
    how = {"reduction": reduction, "mask": keep}
    basis = torch.randn(20, 6)
    exact = projected(s.double(), t.double(), basis.double(), "reference", **how)
    value, ds, dt = projected(s, t, basis, "cpp", **how)
    assert ds.dtype == torch.bfloat16 and ds.stride() == s.stride() and dt.dtype == torch.float32
    assert_near((value, dt), exact[::2])
    assert_near((ds,), exact[1:2], eps=2**-8)
    assert (ds[1, :, 2, 3] == 0).all()


def test_the_bits_of_a_projection_do_not_depend_on_the_number_of_threads(same_bits):
    s, t, basis = torch.randn(9, 33, 21, 13), torch.randn(9, 33, 21, 13), torch.randn(33, 10)
    for pair in ((s, t), [x.contiguous(**CHANNELS_LAST) for x in (s, t)]):
        same_bits(lambda pair=pair: projected(*pair, basis, "cpp"))


def test_float64_and_float16_run_in_pytorch_with_the_same_answer():
    s, t, basis = torch.randn(3, 8, 5), torch.randn(3, 8, 5), torch.randn(8, 3)
    centers = torch.randn(4, 40), torch.randn(4, 40)
    for dtype in (torch.float64, torch.float16):
        pair = s.to(dtype), t.to(dtype)
        for a, b in zip(projected(*pair, basis, "cpp"), projected(*pair, basis, "torch"), strict=True):
            assert a.equal(b)
    wide = [x.flatten(1).double() for x in (s, t)]
    for a, b in zip(similarity(*wide, centers, "cpp"), similarity(*wide, centers, "torch"), strict=True):
        assert a.equal(b)


# landmarks fewer than features, as many, more; one block and several
@pytest.mark.parametrize("C", [1, 7, 16, 17, 63])
@pytest.mark.parametrize("block", [1 << 20, 40])
def test_the_landmark_loss_keeps_no_more_than_its_gradient_and_is_the_textbook(C, block, monkeypatch):
    monkeypatch.setitem(landmarks.BLOCK, "cpu", block)
    s, t = torch.randn(37, 16), torch.randn(37, 24).bfloat16()
    centers = torch.randn(C, 16), torch.randn(C, 24)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        got = similarity(s, t, centers, "cpp")
    assert [tuple(x.shape) for x in saved[2:]] == [(37, min(C, 16)), ()]
    exact = similarity(s.double(), t.double(), [c.double() for c in centers], "reference")
    assert_near(got, exact, eps=5e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("C, d, block", [(100, 160, 1 << 20), (100, 160, 1300), (290, 160, 1 << 20), (290, 100, 1300)])
def test_the_rows_of_the_landmark_loss_are_shared_out_over_threads(count, C, d, block, threads, monkeypatch):
    """V by columns and by rows, kept and multiplied at once; shares that no tile and no block divides."""
    monkeypatch.setitem(landmarks.BLOCK, "cpu", block)
    s, t, centers = torch.randn(333, d) / 50, torch.randn(333, 70) / 50, (torch.randn(C, d), torch.randn(C, 70))
    threads(count)
    got, again = (similarity(s, t, centers, "cpp") for _ in range(2))
    assert all(a.equal(b) for a, b in zip(got, again, strict=True))
    assert_near(got, similarity(s.double(), t.double(), [c.double() for c in centers], "reference"))


@pytest.mark.parametrize("C", [3, 9])  # fewer landmarks than features, and more
def test_an_upstream_gradient_of_zero_hides_no_nan_from_the_product_with_the_landmarks(C):
    s, t, centers = torch.randn(6, 5), torch.randn(6, 4), (torch.randn(C, 5), torch.randn(C, 4))
    s[2, 1] = float("nan")
    s.requires_grad_()
    for backend in ("cpp", "torch"):
        value = kd.landmark_similarity_loss(s, t, *centers, backend=backend)
        grad = torch.autograd.grad(0 * value, s)[0]
        assert grad[2].isnan().all()


@pytest.mark.parametrize("C", [3, 9])
def test_an_empty_batch_gives_zero_and_an_empty_gradient(C):
    value, grad = similarity(torch.zeros(0, 5), torch.zeros(0, 6), (torch.randn(C, 5), torch.randn(C, 6)), "cpp")
    assert value == 0 and grad.shape == (0, 5)
    for reduction in ("mean", "sum", "none"):
        for shape in ((0, 4, C), (0, 4)):
            value, *gradients = projected(*torch.zeros(2, *shape), torch.eye(4), "cpp", reduction=reduction)
            assert value.sum() == 0 and all(g.shape == shape for g in gradients)


def test_the_operators_refuse_what_they_would_misread():
    run = torch.ops.kdkernels
    s, P = torch.randn(2, 5, 7), torch.randn(5, 3)
    how = (None, False, False, 1.0, True)
    for arguments, message in (
        ((s[0], s, P, *how), "s must be planes"),
        ((s, s[:, :4], P, *how), r"t must be CPU planes \[2, 5, 7\]"),
        ((s, s.double(), P, *how), "t is Double: pass float32 or bfloat16"),
        ((s, s, P.mT, *how), "basis must be a contiguous float32"),
        ((s, s, P[:4].contiguous(), *how), r"basis must be \[c, k\]"),
        ((s, s, P, torch.ones(3, dtype=torch.bool), *how[1:]), r"mask must be contiguous bool \[B, p\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run.project_rows(*arguments)
    Q, w = torch.randn(42), torch.ones(1)
    for arguments, message in (
        ((Q[1:], P, w, 1.0, False, s, None), "projected must be what project_rows kept"),
        ((Q, P, torch.ones(3), 1.0, False, s, None), "weight must be one number, or one a sample"),
    ):
        with pytest.raises(ValueError, match=message):
            run.spread_rows(*arguments)
    rows, centers, how = torch.randn(6, 4), torch.randn(3, 4), (6, True, None)
    for arguments, message in (
        ((rows, rows[1:], centers, centers, *how), r"t must be float32 on the CPU, \[6, 4\]"),
        ((rows, rows, centers[:, 1:], centers, *how), r"s_centers must be float32 on the CPU, \[3, 4\]"),
        ((rows, rows, centers, centers[1:], *how), r"t_centers must be float32 on the CPU, \[3, 4\]"),
        ((rows, rows, centers, centers, 0, True, None), "block must be a positive number of rows"),
        ((rows, rows, centers, centers, 6, True, torch.zeros(2)), r"sums must be float64 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run.landmark_rows(*arguments)
    kept, one = torch.randn(6, 3), torch.ones(())
    for arguments, message in (
        ((rows[0], centers, kept, one), "grad and inverse must be one float32 number each"),
        ((one.double(), centers, kept, one), "grad and inverse must be one float32 number each"),
        ((one, centers, rows, one), r"kept must be float32 on the CPU, \[6, 3\]"),
        ((one, centers, kept.mT.contiguous().mT, one), "kept must be what landmark_rows gave"),
        ((one, centers[0], kept, one), "kept and s_centers must be matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            run.landmark_rows_backward(*arguments)
