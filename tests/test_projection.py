# SPDX-License-Identifier: Apache-2.0
"""projected_mse: its definition in every layout, what it saves, and its bases; the oracle here is written by hand."""

import pytest
import torch
import torch._dynamo.testing

import kdkernels as kd
from kdkernels import backend as backends
from kdkernels.projection import layout, torch_impl

compiled = backends.obstacle("cpp", "cpu", op="projected_mse") is None
BACKENDS = ("reference", "torch", *(("cpp",) if compiled else ()))


def naive(s, t, P, channel_dim=1):
    """Permute, two projections, mean: as one writes it from the paper."""
    a, b = (x.movedim(channel_dim, -1).reshape(-1, P.shape[0]) @ P for x in (s, t))
    return (a - b).square().mean()


def features(*shape, dtype=torch.float64, near=0.3):
    t = torch.randn(shape, dtype=dtype)
    return (t + near * torch.randn(shape, dtype=dtype)).requires_grad_(), t


def basis(c, k, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(c, k, dtype=dtype)).Q


# shape, channel_dim, memory format; 7 and 11 are odd so that no tile or vector fits
LAYOUTS = {
    "rows": ((11, 6), 1, None),
    "tokens": ((3, 7, 6), -1, None),
    "sequence": ((3, 6, 7), 1, None),
    "nchw": ((3, 6, 5, 7), 1, None),
    "channels last": ((3, 6, 5, 7), 1, torch.channels_last),
    "nhwc": ((3, 5, 7, 6), 3, None),
    "video": ((2, 6, 3, 5, 7), 1, torch.channels_last_3d),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_mean_squared_error_of_two_projections_in_every_layout(name, backend):
    shape, dim, form = LAYOUTS[name]
    s, t = features(*shape)
    if form is not None:
        s, t = (x.detach().contiguous(memory_format=form) for x in (s, t))
        s.requires_grad_()
    P = basis(6, 3)
    value = kd.projected_mse(s, t, P, channel_dim=dim, backend=backend)
    want = naive(s, t, P, dim)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    (got,), (expected,) = torch.autograd.grad(value, s), torch.autograd.grad(want, s)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)
    assert backend == "reference" or got.stride() == s.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_equals_permute_and_matmul_within_its_own_error(backend):
    s, t = features(4, 64, 14, 14, dtype=torch.float32)
    P = basis(64, 16).float()
    exact = naive(s.double(), t.double(), P.double())
    ours = kd.projected_mse(s, t, P, backend=backend).double()
    assert abs(ours - exact) <= abs(naive(s, t, P).double() - exact) + 1e-7 * exact


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reductions_agree_with_each_other(backend):
    s, t = features(5, 6, 3, 4)
    P, mask = basis(6, 2), torch.rand(5, 3, 4) > 0.4
    mask[1] = False
    how = {"mask": mask, "backend": backend}
    each = kd.projected_mse(s, t, P, reduction="none", **how)
    counts = mask.flatten(1).sum(1)
    total = (each * counts * 2).sum()
    assert each.shape == (5,) and each[1] == 0
    torch.testing.assert_close(kd.projected_mse(s, t, P, reduction="sum", **how), total)
    torch.testing.assert_close(kd.projected_mse(s, t, P, **how), total / (2 * counts.sum()))


def test_both_sides_may_lie_in_memory_differently():
    s, t = features(3, 6, 5, 7)
    P = basis(6, 3)
    last = t.contiguous(memory_format=torch.channels_last)
    for a, b in ((s, last), (s.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), t)):
        value = kd.projected_mse(a, b, P)
        torch.testing.assert_close(value, naive(s, t, P))
        torch.testing.assert_close(torch.autograd.grad(value, a)[0], torch.autograd.grad(naive(s, t, P), s)[0])


def test_an_orthonormal_square_basis_changes_nothing():
    s, t = features(4, 8, 5)
    torch.testing.assert_close(kd.projected_mse(s, t, basis(8, 8)), torch.nn.functional.mse_loss(s, t))


def test_a_difference_outside_the_subspace_costs_nothing():
    t, P = torch.randn(3, 8, 5).double(), basis(8, 3)
    outside = torch.eye(8).double() - P @ P.T
    s = t + torch.einsum("cd,bdp->bcp", outside, torch.randn(3, 8, 5).double())
    assert kd.projected_mse(s, t, P) < 1e-28


def test_nothing_larger_than_the_projection_is_saved_beyond_the_inputs():
    s, t = features(4, 32, 6, 6, dtype=torch.float32)
    P = basis(32, 4).float()
    inputs, saved = {x.data_ptr() for x in (s, t, P)}, []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kd.projected_mse(s, t, P).backward()
    own = [x for x in saved if x.data_ptr() not in inputs]
    assert [x.numel() for x in own] == [4 * 36 * 4]


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_beyond_the_result_is_one_block_and_the_projection(channels_last, monkeypatch):
    """Counted in what PyTorch allocates: a permuted copy of one side alone would be 8 MiB."""
    monkeypatch.setitem(torch_impl.BLOCK, "cpu", 1 << 19)
    s, t = (torch.randn(16, 128, 32, 32) for _ in range(2))
    if channels_last:
        s, t = (x.contiguous(memory_format=torch.channels_last) for x in (s, t))
    s.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        kd.projected_mse(s, t, basis(128, 8).float()).backward()
    bound = max(torch_impl.BLOCK["cpu"] * 4, 16 * 1024 * 8 * 4) + 4096
    large = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > bound]
    assert large == [4 * s.numel()]  # the gradient itself


def test_views_are_found_without_a_copy_and_only_turned_positions_are_copied():
    x = torch.randn(2, 3, 4, 5)
    for y, dim in ((x, 1), (x.contiguous(memory_format=torch.channels_last), 1), (x, 3), (x, 2), (x[:, :, ::2], 1)):
        assert layout.is_view(y, dim) == (layout.planes(y, dim).data_ptr() == y.data_ptr())
    assert not layout.is_view(x.transpose(2, 3), 1)
    buffer, finish = layout.write(x.transpose(2, 3), 1)
    buffer.fill_(7)
    finish()
    assert (x == 7).all()


# argument(s) to change -> the error
BAD = {
    "other shape": ({"t": torch.zeros(2, 4, 5)}, ValueError, r"t has shape \(2, 4, 5\), s has \(2, 4, 3\)"),
    "one dim": ({"s": torch.zeros(4), "t": torch.zeros(4)}, ValueError, r"s has shape \(4,\): give \[B, c\]"),
    "the batch": ({"channel_dim": 0}, ValueError, "dimension 0 is the batch, give one from 1 to 2"),
    "no such dim": ({"channel_dim": 3}, ValueError, "channel_dim is 3"),
    "dim no integer": ({"channel_dim": 1.0}, TypeError, "channel_dim is a float"),
    "wide basis": ({"basis": torch.zeros(4, 5)}, ValueError, "basis has 5 columns: a subspace of 4 channels"),
    "empty basis": ({"basis": torch.zeros(4, 0)}, ValueError, "basis has 0 columns"),
    "other channels": ({"basis": torch.zeros(5, 2)}, ValueError, "basis has 5 rows, s has 4 channels"),
    "basis a vector": ({"basis": torch.zeros(4)}, ValueError, r"basis has shape \(4,\): give \[c, k\]"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max'"),
    "mask of numbers": ({"mask": torch.ones(2)}, TypeError, "mask is torch.float32: pass a bool tensor"),
    "mask of channels": ({"mask": torch.ones(2, 4).bool()}, ValueError, r"a sample, \(2,\), or a position, \(2, 3\)"),
    "no positions": ({"s": torch.zeros(2, 4, 0), "t": torch.zeros(2, 4, 0)}, ValueError, "it needs channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_argument_and_the_fix(name):
    change, error, message = BAD[name]
    call = {"s": torch.zeros(2, 4, 3), "t": torch.zeros(2, 4, 3), "basis": torch.zeros(4, 2)} | change
    s, t, P = (call.pop(argument) for argument in ("s", "t", "basis"))
    with pytest.raises(error, match=message):
        kd.projected_mse(s, t, P, **call)


def test_debug_checks_find_a_nan():
    s = torch.full((2, 4), float("nan"))
    with kd.debug_checks(), pytest.raises(ValueError, match="s holds NaN"):
        kd.projected_mse(s, torch.zeros(2, 4), torch.eye(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_zero_and_an_empty_gradient(backend):
    s = torch.zeros(0, 4, 3, requires_grad=True)
    value = kd.projected_mse(s, torch.zeros(0, 4, 3), torch.eye(4), backend=backend)
    value.backward()
    assert value == 0 and s.grad.shape == (0, 4, 3)
