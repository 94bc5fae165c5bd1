# SPDX-License-Identifier: Apache-2.0
"""CKA between the rows and between the columns of two matrices, from six products of the shorter side.

Linear, uncentred, biased, Gram rows over sqrt(K_ii): the logit terms of RCKA. X, Y [n, C]; w_c = 1/|X_:c|, v_c =
1/|Y_:c|; Xn = X diag(w), Yn = Y diag(v). Between columns S_KL = <Xn Yn', X Y'>, S_KK = <Xn Xn', X X'>, S_LL alike; the
products X X' and Y Y' are the Gram matrices between rows. Backward is four products of n x n with n x C:

    dX = a Mn Y + (W - g Kn) X + (R - X diag(w^2 1'(X o R))) diag(w),   R = a M Y diag(v) - g K X diag(w),

M = X Y', Mn = Xn Yn', Kn = Xn Xn', a = 1/sqrt(S_KK S_LL), g = CKA/S_KK, and W + W' the pair weights between rows:
W_ij = a r_i s_i L_ij - g r_i^2 K_ij with its own a and g, r and s the inverse row norms, whose own change is
-r_i^2 sum_j W_ij K_ij on the diagonal. Rows and columns are alike in this: where columns are fewer, the matrices are
turned and the products are C x C. With the compiled library each direction is one call in float32
(`csrc/gram/both_ways_cpu.cpp`).
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from ..differentiable import operator

HALVES = 64  # rows of a block below which two products are dearer than their symmetry saves
SMALL = 512  # rows of the shorter side up to which its products are the cheaper way whatever the longer side is


def worth_it(backend: str, x, columns: bool = True) -> bool:
    """Whether the products of the shorter side are the cheap ones; kernels of a GPU have two calls of their own."""
    n, C = x.shape[-2:]
    short, long = (min(n, C), max(n, C)) if columns else (n, C)  # a compiler has no `sorted` for symbolic sizes
    return backend in ("torch", "cpp") and (short <= SMALL or 2 * short <= long)


def cka_both_ways(x, y, columns: bool = True, native: bool = False):
    """[1 or 2, ...]: CKA between the rows of x, y [..., n, C], and between their columns; gradient to x alone.

    As `kd.cka(..., unbiased=False, center=False, row_normalize=True)` of x, y and of x.mT, y.mT. A row or column of
    zeros adds nothing; CKA is 0 where a side is zero. Zero is a squared length below the smallest normal number of the
    dtype: that of a side is its rows' mean, and those of its rows (its columns, where they are fewer) are in units of
    it. native: in the compiled library, where it can.
    """
    return _pair.value(x, y, columns, native)


def _forward(x, y, columns, native, need):
    """Values; for backward products [2 or 6, ..., n, n], weights [3, ..., n], norms [2, ..., C] and numbers."""
    X, Y, turned = _sides(x, y, columns)
    value, products, *kept = (_native_fwd if _fits(X, native) else _torch_fwd)(X, Y, columns)
    return value.flip(0) if turned else value, products if need else products[:0].clone(), *kept


def _backward(grad, x, y, *rest):
    """dX; of what is kept, `numbers` are a and g of each way, and the scales of X and Y."""
    *kept, columns, native, _ = rest
    X, Y, turned = _sides(x, y, columns)
    run = _native_bwd if _fits(X, native) else _torch_bwd
    dx = run(grad.flip(0) if turned else grad, X, Y, *kept, columns)
    return [(dx.mT.contiguous() if turned else dx).to(x.dtype)]


def _sides(x, y, columns):
    """Both sides in the dtype of the products, and whether they are turned: rows are never more than columns then."""
    dtype, turned = at_least_float32(x, y), _turned(x, columns)
    X, Y = (side.detach().to(dtype) for side in (x, y))
    return (X.mT, Y.mT, True) if turned else (X, Y, False)


def _turned(x, columns):
    return columns and x.shape[-1] < x.shape[-2]


def _fits(X, native):
    return native and X.dtype == torch.float32 and X.numel() > 0


def _native_fwd(X, Y, columns):
    return torch.ops.kdkernels.both_ways.default(X.contiguous(), Y.contiguous(), columns)


def _native_bwd(grad, X, Y, products, weights, norms, numbers, columns):
    run = torch.ops.kdkernels.both_ways_backward.default
    return run(grad.contiguous(), X.contiguous(), Y.contiguous(), products, weights, norms, numbers, columns)


def _inverse_root(square, dtype):
    """1/sqrt; 0 where that is too small for its inverse to stay in the dtype."""
    return torch.where(square >= torch.finfo(dtype).tiny, square, torch.inf).rsqrt().to(dtype)


def _squares(v):
    """(v_x v_x, v_x v_y, v_y v_y) of a pair v [2, ...]."""
    return torch.cat([v[:1], v]) * torch.cat([v, v[1:]])


def _gram(X, out):
    """X X' into `out`, a quarter of it by symmetry; returns its diagonal."""
    half = X.shape[-2] // 2
    if half < HALVES:
        torch.matmul(X, X.mT, out=out)
    else:
        torch.matmul(X[..., :half, :], X.mT, out=out[..., :half, :])
        torch.matmul(X[..., half:, :], X[..., half:, :].mT, out=out[..., half:, half:])
        out[..., half:, :half] = out[..., :half, half:].mT
    return out.diagonal(dim1=-2, dim2=-1)


def _torch_fwd(X, Y, columns):
    products = X.new_empty(6 if columns else 2, *X.shape[:-1], X.shape[-2])
    plain, normed = products[:3], products[3:]
    own = torch.stack([_gram(X, plain[0]), _gram(Y, plain[-1])])
    # rows of length one or so: no product of two sums leaves float32
    scale = _inverse_root(own.mean(-1, dtype=torch.float64), X.dtype)
    weights = _squares(_inverse_root(own * scale.square()[..., None], X.dtype))
    if columns:
        torch.matmul(X, Y.mT, out=plain[1])
        plain *= _squares(scale)[..., None, None]
    else:
        plain *= scale.square()[..., None, None]
    k, l = plain[0], plain[-1]
    rows = torch.stack([(k * k).sum(-1), (k * l).sum(-1), (l * l).sum(-1)])
    sums = (rows * weights).double().sum(-1, keepdim=True).movedim(-1, 1)
    norms = X.new_empty(0)
    if columns:
        norms = _inverse_root(torch.stack([side.square().sum(-2) for side in (X, Y)]), X.dtype)
        Xn, Yn = X * norms[0, ..., None, :], Y * norms[1, ..., None, :]
        _gram(Xn, normed[0]), _gram(Yn, normed[2])
        torch.matmul(Xn, Yn.mT, out=normed[1])
        sums = torch.cat([sums, (normed * plain).sum(-1).double().sum(-1)[:, None]], dim=1)
    kk, kl, ll = sums
    undefined = (kk <= 0) | (ll <= 0)
    a = torch.where(undefined, 0, (kk * ll).rsqrt())
    value = a * kl
    numbers = torch.cat([a, torch.where(undefined, 0, value / kk), scale.double()]).to(X.dtype)
    return value.to(X.dtype), products, weights, norms, numbers


def _torch_bwd(grad, X, Y, products, weights, norms, numbers, columns):
    plain, normed, ways = products[:3], products[3:], len(grad)
    k, l = plain[0], plain[-1]
    a, g = (numbers[:ways] * grad)[..., None, None], (numbers[ways : 2 * ways] * grad)[..., None, None]
    scale_x, scale_y = numbers[2 * ways :, ..., None, None]
    W = a[0] * weights[1, ..., None] * l
    W.addcmul_(g[0] * weights[0, ..., None], k, value=-1)
    moved = (W * k).sum(-1) * weights[0]
    W = W + W.mT
    W.diagonal(dim1=-2, dim2=-1).sub_(moved)
    if not columns:
        return (W * scale_x.square()) @ X
    W.addcmul_(g[1], normed[0], value=-1)
    w, v = norms[..., None, :]
    R = ((a[1] * plain[1]) @ Y).mul_(v)
    R.addcmul_((g[1] * k) @ X, w, value=-1)
    R.addcmul_(X, w.square() * (X * R).sum(-2, keepdim=True), value=-1)
    dx = R.mul_(w)
    # a product that adds into what is there saves a pass over [n, C] for each
    for weights, side in ((W.mul_(scale_x.square()), X), (a[1] * scale_x * scale_y * normed[1], Y)):
        dx = dx.addmm_(weights, side) if dx.dim() == 2 else dx.add_(weights @ side)
    return dx


def _fake(x, y, columns, native, need):
    dtype, lead, ways = at_least_float32(x, y), x.shape[:-2], 2 if columns else 1
    n, C = reversed(x.shape[-2:]) if _turned(x, columns) else x.shape[-2:]
    new = lambda *shape: x.new_empty(shape, dtype=dtype)  # noqa: E731
    products = new((6 if columns else 2) if need else 0, *lead, n, n)
    norms = new(2, *lead, C) if columns else new(0)
    return new(ways, *lead), products, new(3, *lead, n), norms, new(2 + 2 * ways, *lead)


def of_ways(*dims):
    """The rule of forward mode of values [ways, ...] of groups: one backward pass a way, summed over `dims`."""

    def tangent(run, moved, value, saved, how):
        found = []
        for way in torch.eye(len(value), dtype=value.dtype, device=value.device):
            upstream = way.reshape(-1, *(1,) * (value.dim() - 1)).expand_as(value)
            found.append((run(upstream, *saved, *how)[0].to(value.dtype) * moved[0].to(value.dtype)).sum(dims))
        return torch.stack(found)

    return tangent


_pair = operator(
    "both_ways",
    "x y",
    "bool columns, bool native",
    "products weights norms numbers",
    wanted="x",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_ways(-2, -1),
)
