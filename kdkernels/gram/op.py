# SPDX-License-Identifier: Apache-2.0
"""CKA, HSIC, MMD and Gram-matrix distances as differentiable ops that read the features and never store n x n.

Read on in `reference.py` (what is computed), `torch_impl.py` (how, in PyTorch) and `triton_impl/` (how, on a GPU).
"""

from __future__ import annotations

import torch

from .. import backend as backends
from ..autograd import device_type, without_autocast
from . import native_impl, ranks, reference, two_sample
from .bandwidth import bandwidth
from .checks import check_bandwidths, check_features, check_mask, check_mmd_masks
from .kernels import Kernel, spec_of
from .operator import statistic
from .problem import encode, minimum_rows

__all__ = ["cka", "gram_mse", "hsic", "mmd"]

LINEAR = spec_of("linear")


def cka(
    x,
    y,
    *,
    kernel="linear",
    unbiased=True,
    center=True,
    row_normalize=False,
    mask=None,
    group=None,
    backend="auto",
) -> torch.Tensor:
    """Centred kernel alignment, CKA(K, L) = h(K, L) / sqrt(h(K, K) h(L, L)) with h = HSIC.

    Source: Kornblith et al. 2019 (arXiv 1905.00414); unbiased estimator HSIC_1: Song et al. 2012.

    Args:
        x: features [n, p] or, for G independent groups at once, [G, n, p]; float16, bfloat16, float32 or float64.
        y: features [n, q] or [G, n, q] of the same samples; its own width and float dtype.
        kernel: a name ("linear", "polynomial", "cosine", "rbf", "laplacian"), a kernel object, or a pair (x's, y's).
        unbiased: HSIC_1 (n >= 4; does not drift with the batch size, may be negative), else HSIC_0.
        center: False drops the centring (RCKA); needs unbiased=False.
        row_normalize: K_ij / sqrt(K_ii), rows only (RCKA); needs unbiased=False.
        mask: bool [n] or [G, n], False rows take no part and get gradient 0.
        group: None, or "world" or a process group: the statistic of the rows of all its ranks, the same on each, whose
            gradient averaged over the ranks is that of one process (`kdkernels/distributed.py`); n is then any number.
        backend: "auto", "triton", "cpp", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        A scalar, or [G]; float32 for half inputs, else the promoted dtype of x and y. Sums over pairs are finished in
        float64. Gradients to x, y and a `sigma` tensor. CKA is 0 with zero gradient where it is undefined: a constant
        side, or a mask that leaves fewer rows than the estimator needs. A NaN in a row that counts gives NaN.

    Raises:
        ValueError: shapes that do not fit, too few samples, an unknown kernel. TypeError: a dtype that is not float.

    >>> x = torch.randn(32, 16)
    >>> rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    >>> round(kd.cka(x, 3 * x @ rotation).item(), 4)
    1.0
    """
    return _statistic("cka", x, y, kernel, unbiased, center, row_normalize, True, mask, group, backend)


def hsic(
    x,
    y,
    *,
    kernel="linear",
    unbiased=True,
    center=True,
    row_normalize=False,
    mask=None,
    group=None,
    backend="auto",
) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion: tr(KHLH)/(n-1)^2 (biased), or the unbiased HSIC_1 of Song et al. 2012.

    HSIC_1 = [tr(K~L~) + (1'K~1)(1'L~1)/((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3)), K~ and L~ with zero diagonal.
    Source: Gretton et al. 2005; Song et al. 2012. Arguments, dtypes, masks, group, errors as in `cka`; with
    center=False the value is sum_ij K_ij L_ij / (n-1)^2.

    >>> x = torch.randn(64, 8)
    >>> bool(kd.hsic(x, x) > kd.hsic(x, torch.randn(64, 8)).abs())
    True
    """
    return _statistic("hsic", x, y, kernel, unbiased, center, row_normalize, True, mask, group, backend)


def gram_mse(x, y, *, normalize=None, reduction="mean", mask=None, group=None, backend="auto") -> torch.Tensor:
    """Squared distance of two linear Gram matrices, sum_ij (K_ij - L_ij)^2, K = XX', L = YY'.

    normalize="row" divides each row of K and L by its L2 norm first (similarity preserving, Tung & Mori 2019,
    arXiv 1907.09682); a zero row stays zero. reduction: "mean" divides by n^2, "sum" does not. Shapes, dtypes, masks
    and group as in `cka`; n >= 1. The float32 error is 1e-6 (|K|^2 + |L|^2), and where p = q < 2/3 n or so the plain
    form on the backends torch and cpp keeps its relative accuracy even as the student nears the teacher. With "row" in
    float32, a row of K or L whose norm is 1e-18 of the mean K_ii counts as zero, as does, up to 1024 rows, a side whose
    mean K_ii is below 1e-38.

    >>> x = torch.randn(32, 16)
    >>> kd.gram_mse(x, x).item()
    0.0
    """
    options = {"normalize": normalize, "reduction": reduction, "backend": backend}
    if group is not None:
        group = ranks.agreed("gram_mse", x, y, mask, group, options)
    if normalize not in (None, "row"):
        raise ValueError(f"normalize is {normalize!r}: give None or 'row'")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
    stat = "mse" if normalize is None else "row_mse"
    return _statistic(stat, x, y, LINEAR, False, False, False, reduction == "mean", mask, group, backend)


def mmd(x, y, *, kernel="rbf", unbiased=True, mask=None, group=None, backend="auto") -> torch.Tensor:
    """Squared maximum mean discrepancy, mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    Source: Gretton et al. 2012 (JMLR 13). unbiased leaves i = j out of the first two means (the value may be negative).

    Args:
        x: samples [n, p] or [G, n, p]; y: samples [m, p] or [G, m, p] in the same space. n, m >= 2 (1 if biased).
        kernel: one kernel function for both; a sequence as sigma is a sum of kernels; rules see x and y together.
        mask: None, or a pair (mask_x, mask_y) of bool [n] / [G, n] and [m] / [G, m] or None.
        group, backend: as in `cka`; with a group the samples of each side are those of all its ranks.

    Returns, dtypes and errors as in `cka`.

    >>> x, y = torch.randn(64, 4), torch.randn(64, 4) + 2
    >>> bool(kd.mmd(x, y) > 0.1)
    True
    """

    def check():
        check_features(x, y, same_rows=False, empty=group is not None)
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(f"y has {y.shape[-1]} features, x has {x.shape[-1]}: mmd compares samples of one space")
        if group is not None:
            backends.resolve("mmd", backend, device_type(x), (x.dtype, y.dtype))
        return check_mmd_masks(mask, x, y)

    if group is not None:
        options = {"kernel": kernel, "unbiased": unbiased, "backend": backend}
        groups = ranks.agreed_on_both(x, y, mask, group, check, options)
    kernels = spec_of(kernel)
    if kernels[0] is not kernels[1]:
        raise ValueError("kernel is a pair: mmd compares x and y under one kernel function")
    if group is not None:
        value, gathered = ranks.two_samples(x, y, kernels[0], unbiased, mask, groups, backend)
        if gathered is None:
            return value
        x, y, mask = gathered
        return mmd(x, y, kernel=kernel, unbiased=unbiased, mask=mask, backend=backend)
    masks = check()
    least = 2 if unbiased else 1
    for name, n in (("x", x.shape[-2]), ("y", y.shape[-2])):
        if n < least:
            raise ValueError(f"{name} has {n} rows: mmd with unbiased={unbiased} needs at least {least}")
    check_bandwidths(kernels, x)
    chosen = backends.resolve("mmd", backend, device_type(x), (x.dtype, y.dtype))
    if chosen == "reference":
        with without_autocast(device_type(x)):
            return two_sample.reference_mmd(x, y, kernels[0], unbiased, masks, least)
    rows = torch.cat(two_sample.promoted(x, y), dim=-2)
    labels, keep = two_sample.labels(x, y, masks, unbiased, least)
    specs = (kernels[0], LINEAR[1])
    return _call("sum", rows, labels, specs, unbiased, False, False, True, keep, chosen)


def _statistic(stat, x, y, kernel, unbiased, center, row_normalize, mean, mask, group, backend):
    if group is None:
        check_features(x, y)
    else:
        options = {"kernel": kernel, "unbiased": unbiased, "center": center, "row_normalize": row_normalize}
        group = ranks.agreed(stat, x, y, mask, group, {**options, "backend": backend})
    kernels = spec_of(kernel)
    if unbiased and stat in ("cka", "hsic"):
        if not center:
            raise ValueError("center=False with unbiased=True: the unbiased estimator is centred, pass unbiased=False")
        if row_normalize:
            raise ValueError("row_normalize=True with unbiased=True: row normalisation needs unbiased=False")
    if group is not None:
        # what came from moments or the ring runs on no backend: an unknown one is refused all the same
        backends.resolve("gram_mse" if "mse" in stat else stat, backend, device_type(x), (x.dtype, y.dtype))
        how = (kernels, unbiased, center, row_normalize, mean)
        value, rows = ranks.of_all_ranks(stat, x, y, *how, mask, group, backend)
        return value if rows is None else _statistic(stat, *rows[:2], *how, rows[2], None, backend)
    least = minimum_rows(unbiased, center, stat)
    if x.shape[-2] < least:
        raise ValueError(
            f"x and y have {x.shape[-2]} rows: {stat} with unbiased={unbiased}, center={center} needs at least {least}"
        )
    check_bandwidths(kernels, x)
    if mask is not None:
        check_mask(mask, x, "mask")
        # a group left with too few rows is one with none: what those rows hold, even NaN, reaches no gradient
        mask = mask & (mask.sum(-1, keepdim=True) >= least)
    name = "gram_mse" if stat in ("mse", "row_mse") else stat
    chosen = backends.resolve(name, backend, device_type(x), (x.dtype, y.dtype))
    if chosen == "reference":
        with without_autocast(device_type(x)):
            return _reference(stat, x, y, kernels, unbiased, center, row_normalize, mean, mask, least)
    return _call(stat, x, y, kernels, unbiased, center, row_normalize, mean, mask, chosen)


def _reference(stat, x, y, kernels, unbiased, center, row_normalize, mean, mask, least):
    if stat in ("mse", "row_mse"):
        how = ("row" if stat == "row_mse" else None, "mean" if mean else "sum")
        return reference.over_groups(lambda a, b, _: reference.gram_mse_one(a, b, *how), x, y, kernels, mask, least)
    one = reference.cka_one if stat == "cka" else reference.hsic_one
    how = (unbiased, center, row_normalize)
    return reference.over_groups(lambda a, b, pair: one(a, b, pair, *how), x, y, kernels, mask, least)


def _call(stat, x, y, kernels, unbiased, center, row_normalize, mean, mask, chosen):
    """Resolve bandwidth rules, then the operator: with its gradient where one is needed."""
    ruled = chosen == "cpp" and native_impl.follows_rules(stat, *kernels, row_normalize, x, y)
    sigma_x, sigma_y = (
        None if ruled and kernel.ruled_code != kernel.code else sigma_of(kernel, features, mask)
        for kernel, features in zip(kernels, (x, y), strict=True)
    )
    problem = encode(stat, *kernels, unbiased, center, row_normalize, mean, chosen, ruled)
    return statistic.value(x, y, mask, sigma_x, sigma_y, problem)


def sigma_of(kernel: Kernel, x, mask):
    """The bandwidth as a tensor [1] or [G], or None where the kernel has none or it is a number."""
    sigma = kernel.sigma
    if sigma is None or (isinstance(sigma, tuple) and not isinstance(sigma[0], str)):
        return None
    if isinstance(sigma, torch.Tensor):
        return sigma.to(x.device).reshape(-1)
    if x.dim() == 2:
        x, mask = x[None], None if mask is None else mask[None]
    return bandwidth(x, mask, *sigma)
