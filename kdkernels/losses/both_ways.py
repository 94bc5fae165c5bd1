# SPDX-License-Identifier: Apache-2.0
"""CKA between the rows and between the columns of two matrices, from six products of the row side and no C x C matrix.

Linear, uncentred, biased, Gram rows over sqrt(K_ii): the logit terms of RCKA. X, Y [n, C]; w_c = 1/|X_:c|, v_c =
1/|Y_:c|; Xn = X diag(w), Yn = Y diag(v). Between columns S_KL = <Xn Yn', X Y'>, S_KK = <Xn Xn', X X'>, S_LL alike; the
products X X' and Y Y' are the Gram matrices between rows. Backward is four products of n x n with n x C:

    dX = a Mn Y + (W - g Kn) X + (R - Xn diag(1'(Xn o R))) diag(w),   R = a M Yn - g K Xn,

M = X Y', Mn = Xn Yn', Kn = Xn Xn', a = 1/sqrt(S_KK S_LL), g = CKA/S_KK, and W + W' the pair weights between rows:
W_ij = a r_i s_i L_ij - g r_i^2 K_ij with its own a and g, r and s the inverse row norms, whose own change is
-r_i^2 sum_j W_ij K_ij on the diagonal.
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast

K, L, M, KN, MN = range(5)  # what is kept of the products
MOST_ROWS = 1024  # n x n beyond it is dearer than what `kd.cka` does


def worth_it(backend: str, x) -> bool:
    """Whether the products of the row side are the cheap ones here; kernels of a GPU have two calls of their own."""
    n, C = x.shape[-2:]
    return backend in ("torch", "cpp") and n <= MOST_ROWS and n <= 2 * C


def cka_both_ways(x, y, columns: bool = True):
    """[1 or 2, ...]: CKA between the rows of x, y [..., n, C], and between their columns; gradient to x alone.

    As `kd.cka(..., unbiased=False, center=False, row_normalize=True)` of x, y and of x.mT, y.mT. A row or column of
    zeros adds nothing; CKA is 0 where a side is zero.
    """
    need = torch.is_grad_enabled() and x.requires_grad
    return (apply(BothWays, x, y, columns, need) if need else forward(x, y, columns, need))[0]


def forward(x, y, columns, need):
    run = _fwd if plain(x, y) else torch.ops.kdkernels.both_ways_fwd
    return run(x, y, columns, need)


def backward(grad, x, y, products, norms, numbers, columns):
    run = _bwd if plain(grad, x, y) else torch.ops.kdkernels.both_ways_bwd
    return run(grad, x, y, products, norms, numbers, columns)


class BothWays(torch.autograd.Function):
    generate_vmap_rule = True

    forward = staticmethod(forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.columns, _ = inputs
        _, products, norms, numbers = output
        ctx.mark_non_differentiable(products, norms, numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, products, norms, numbers)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 4
        run = BothWaysGradient.apply if torch.is_grad_enabled() else backward
        return run(grad, *ctx.saved_tensors, ctx.columns), None, None, None


class BothWaysGradient(NoSecondDerivative):
    forward = staticmethod(backward)


def _dtype(x, y):
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _inverse_root(square):
    """1/sqrt, 0 where there is nothing to divide by."""
    return torch.where(square > 0, square, torch.inf).rsqrt()


def _diagonal(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1)


def _dot(a, b, weight=None):
    """Sum over pairs, finished in float64, of row i times weight_i."""
    rows = torch.linalg.vecdot(a, b).double()
    return (rows if weight is None else rows * weight).sum(-1)


def _fwd(x, y, columns, need):
    """Values, products [2 or 5, ..., n, n], inverse column norms [2, ..., C] (or empty), the numbers of backward."""
    dtype = _dtype(x, y)
    with without_autocast(device_type(x)):
        X, Y = (side.detach().to(dtype) for side in (x, y))
        products = X.new_empty(5 if columns else 2, *X.shape[:-1], X.shape[-2])
        for at, left, right in ((K, X, X), (L, Y, Y), (M, X, Y))[: 3 if columns else 2]:
            torch.matmul(left, right.mT, out=products[at])
        scale = _scale(products)
        products[:2] *= scale.square().to(dtype)[..., None, None]
        rho, sigma = (_inverse_root(_diagonal(products[at]).double()) for at in (K, L))
        pairs = ((K, L, rho * sigma), (K, K, rho * rho), (L, L, sigma * sigma))
        sums = [torch.stack([_dot(products[i], products[j], weight) for i, j, weight in pairs])]
        norms = X.new_empty(0)
        if columns:
            products[M] *= scale.prod(0).to(dtype)[..., None, None]
            norms = torch.stack([_inverse_root(side.square().sum(-2)) for side in (X, Y)])
            Xn, Yn = X * norms[0, ..., None, :], Y * norms[1, ..., None, :]
            torch.matmul(Xn, Xn.mT, out=products[KN])
            torch.matmul(Xn, Yn.mT, out=products[MN])
            pairs = ((products[MN], M), (products[KN], K), (Yn @ Yn.mT, L))
            sums.append(torch.stack([_dot(normed, products[at]) for normed, at in pairs]))
        kl, kk, ll = torch.stack(sums, dim=1)
        undefined = (kk <= 0) | (ll <= 0)
        a = torch.where(undefined, torch.inf, kk).rsqrt() * torch.where(undefined, torch.inf, ll).rsqrt()
        value = a * kl
        numbers = torch.cat([scale, a, torch.where(undefined, 0, value / kk)])
    return value.to(dtype), products if need else products[:0].clone(), norms, numbers


def _scale(products):
    """Powers of two that bring the rows of X and of Y to length one or so: no product of two sums leaves float32."""
    mean = torch.stack([_diagonal(products[at]).mean(-1) for at in (K, L)]).double()
    return torch.exp2(torch.log2(torch.where(mean > 0, mean, 1)).div_(-2).round_())


def _bwd(grad, x, y, products, norms, numbers, columns):
    """dX; `numbers` are the scales of X and Y, and a and g of each way."""
    dtype = _dtype(x, y)
    with without_autocast(device_type(x)):
        X, Y = (side.detach().to(dtype) for side in (x, y))
        scale_x, scale_y = numbers[:2]
        a, g = numbers[2:].unflatten(0, (2, -1)) * grad.double()
        rho, sigma = (_inverse_root(_diagonal(products[at]).double()) for at in (K, L))
        p, q = ((f[0, ..., None] * rho * r).to(dtype)[..., None] for f, r in ((a, sigma), (g, rho)))
        W = p * products[L] - q * products[K]
        moved = torch.linalg.vecdot(W, products[K]) * rho.square().to(dtype)
        W = W + W.mT
        _diagonal(W).sub_(moved)
        number = lambda value: value.to(dtype)[..., None, None]  # noqa: E731
        if not columns:
            return ((W * number(scale_x.square())) @ X).to(x.dtype)
        W = (W - number(g[1]) * products[KN]) * number(scale_x.square())
        w, v = norms[..., None, :]
        Xn, Yn = X * w, Y * v
        R = (number(a[1]) * products[M]) @ Yn - (number(g[1]) * products[K]) @ Xn
        R -= Xn * (Xn * R).sum(-2, keepdim=True)
        R *= w
        R += W @ X
        R += (number(a[1] * scale_x * scale_y) * products[MN]) @ Y
    return R.to(x.dtype)


def _fwd_fake(x, y, columns, need):
    dtype, lead, n, ways = _dtype(x, y), x.shape[:-2], x.shape[-2], 2 if columns else 1
    norms = x.new_empty((2, *lead, x.shape[-1]) if columns else 0, dtype=dtype)
    products = x.new_empty((5 if columns else 2) if need else 0, *lead, n, n, dtype=dtype)
    numbers = x.new_empty(2 + 2 * ways, *lead, dtype=torch.float64)
    return x.new_empty(ways, *lead, dtype=dtype), products, norms, numbers


def _bwd_fake(grad, x, y, products, norms, numbers, columns):
    return x.new_empty(x.shape)


register(
    "both_ways_fwd",
    "(Tensor x, Tensor y, bool columns, bool need) -> (Tensor value, Tensor products, Tensor norms, Tensor numbers)",
    _fwd,
    _fwd_fake,
)
register(
    "both_ways_bwd",
    "(Tensor grad, Tensor x, Tensor y, Tensor products, Tensor norms, Tensor numbers, bool columns) -> Tensor dx",
    _bwd,
    _bwd_fake,
)
