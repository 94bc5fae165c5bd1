# SPDX-License-Identifier: Apache-2.0
"""The ranking ops beside what the contract asks: tangents of half rows, ties, absent entries; vmap without a loop."""

import pytest
import torch
from ranking import backends

import kdkernels as kd

fast = pytest.mark.parametrize("backend", backends(reference=False))
# x, y [..., n], strengths of each row -> a tensor: every op, rule and kind of strength
CALLS = {
    "soft_rank l2": lambda x, y, e, b: kd.soft_rank(x, "l2", 0.5, backend=b),
    "soft_rank kl, rows": lambda x, y, e, b: kd.soft_rank(x, "kl", e, descending=True, backend=b),
    "soft_rank auto, dim 0": lambda x, y, e, b: kd.soft_rank(x, "l2", "auto", dim=0, backend=b),
    "soft_sort l2, rows": lambda x, y, e, b: kd.soft_sort(x, "l2", e, backend=b),
    "soft_sort kl": lambda x, y, e, b: kd.soft_sort(x, "kl", 0.5, descending=True, backend=b),
    "spearman": lambda x, y, e, b: kd.spearman(x, y, backend=b),
    "spearman, rows": lambda x, y, e, b: kd.spearman(x, y, regularization_strength=e, backend=b),
    "spearman, hard": lambda x, y, e, b: kd.spearman(x, y, hard_target=True, backend=b),
    "pearson": lambda x, y, e, b: kd.pearson(x, y, backend="auto" if b == "cpp" else b),
}
calls = pytest.mark.parametrize("name", CALLS)


def arguments(n=9, rows=(4,)):
    return torch.randn(*rows, n), torch.randn(*rows, n), torch.linspace(0.2, 2.0, torch.Size(rows).numel()).view(rows)


def tangents(name, inputs, moved):
    """Of the value in direction `moved`, by the reference's Jacobian in float64."""
    inputs, moved = ([t.detach().double() for t in some] for some in (inputs, moved))
    found = torch.func.jacrev(lambda *a: CALLS[name](*a, "reference"), argnums=tuple(range(len(inputs))))(*inputs)
    return sum(torch.tensordot(J, t, t.dim()) for J, t in zip(found, moved, strict=True))


@fast
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@calls
def test_forward_mode_is_the_reference_s_jacobian(name, dtype, backend):
    inputs = list(arguments(23))
    inputs[0][1, 2] = inputs[0][2, 5] = inputs[1][1, 7] = -torch.inf
    inputs[0][3, :7] = 0.25  # ties
    inputs = [t.to(dtype) for t in inputs]
    moved = [torch.randn_like(t) for t in inputs]
    if "soft_sort" in name:
        moved[2] = torch.zeros_like(moved[2])

    def f(x, y, e):
        value = CALLS[name](x, y, inputs[2] if "soft_sort" in name else e, backend)
        return torch.where(value == -torch.inf, 0, value)

    want = tangents(name, inputs, moved)
    value, got = torch.func.jvp(f, tuple(inputs), tuple(moved))
    assert got.dtype == value.dtype and want.abs().max() > 0.1
    close = {"rtol": 0, "atol": float(want.abs().max()) * (2e-6 if value.dtype == torch.float32 else 1e-12)}
    torch.testing.assert_close(got.double(), want, **close)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, m) for t, m in zip(inputs, moved, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent
    torch.testing.assert_close(tangent.double(), want, **close)
    across = torch.func.vmap(lambda *m: torch.func.jvp(f, tuple(inputs), m)[1])(*(torch.stack([m, -m]) for m in moved))
    torch.testing.assert_close(across.double(), torch.stack([want, -want]), **close)


@fast
def test_a_sort_refuses_a_strength_with_a_tangent(backend):
    x, _, e = arguments()
    with pytest.raises(RuntimeError, match="soft_sort: forward-mode .* pass backend='reference'"):
        torch.func.jvp(lambda e: kd.soft_sort(x, "l2", e, backend=backend), (e,), (e,))


# under vmap each operator is called once for the whole batch: a fall-back to a loop would warn
@pytest.mark.filterwarnings("error")
@fast
@calls
def test_vmap_equals_a_loop_over_the_batch(name, backend):
    x, y, e = arguments(9, (3, 4))

    def f(*inputs):
        return CALLS[name](*inputs, backend)

    def looped(function, *inputs):
        return torch.stack([function(*one) for one in zip(*inputs, strict=True)])

    torch.testing.assert_close(torch.func.vmap(f)(x, y, e), looped(f, x, y, e))
    across = (x.movedim(0, 1), y.movedim(0, -1), e)
    torch.testing.assert_close(torch.func.vmap(f, in_dims=(1, -1, 0))(*across), looped(f, x, y, e))
    shared = torch.func.vmap(f, in_dims=(0, None, None))(x, y[0], e[0])
    torch.testing.assert_close(shared, torch.stack([f(one, y[0], e[0]) for one in x]))
    for which in range(3):
        slope = torch.func.grad(lambda *inputs: f(*inputs).square().sum(), argnums=which)
        torch.testing.assert_close(torch.func.vmap(slope)(x, y, e), looped(slope, x, y, e))
        shared = torch.func.vmap(slope, in_dims=(0, None, None))(x, y[0], e[0])
        torch.testing.assert_close(shared, torch.stack([slope(one, y[0], e[0]) for one in x]))


@fast
def test_one_strength_for_all_rows_under_vmap(backend):
    x, e = torch.randn(3, 4, 9), torch.tensor([0.2, 0.5, 2.0])

    def f(x, e):
        return kd.soft_rank(x, "l2", e, backend=backend).square().sum()

    slope = torch.func.grad(f, argnums=(0, 1))
    for in_dims, strengths in (((0, 0), e), ((0, None), e[0])):
        each = list(e) if in_dims[1] == 0 else [e[0]] * 3
        want = [slope(one, s) for one, s in zip(x, each, strict=True)]
        got = torch.func.vmap(slope, in_dims=in_dims)(x, strengths)
        for a, b in zip(got, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))
