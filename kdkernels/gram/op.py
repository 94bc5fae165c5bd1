# SPDX-License-Identifier: Apache-2.0
"""CKA, HSIC, MMD and Gram-matrix distances as differentiable ops that read the features and never store n x n.

Read on in `reference.py` (what is computed), `torch_impl/` (how, in PyTorch) and `triton_impl/` (how, on a GPU).
"""

from __future__ import annotations

from typing import Literal

import torch

from .._types import Backend, Mask, Reduction
from ..autograd import device_type, in_pytorch, plain, without_autocast
from ..backend import implementation, matmul_precision, resolve
from ..checks import Recent, settles
from ..distributed import GroupLike
from . import distributed, reference, two_sample
from .call import Question, Rows, check_bandwidths, check_features
from .kernels import KernelLike
from .operator import decode, encode, gram, statistic

__all__ = ["cka", "gram_mse", "hsic", "mmd"]


def cka(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    kernel: KernelLike = "linear",
    unbiased: bool = True,
    center: bool = True,
    row_normalize: bool = False,
    mask: Mask = None,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Centred kernel alignment, CKA(K, L) = h(K, L) / sqrt(h(K, K) h(L, L)) with h = HSIC.

    Source: Kornblith et al. 2019 (arXiv 1905.00414); unbiased estimator HSIC_1: Song et al. 2012.

    Args:
        x: features [n, p] or, for G independent groups at once, [G, n, p]; float16, bfloat16, float32 or float64.
        y: features [n, q] or [G, n, q] of the same samples; its own width and float dtype.
        kernel: a name ("linear", "polynomial", "cosine", "rbf", "laplacian"), a kernel object, or a pair (x's, y's).
        unbiased: HSIC_1 (n >= 4; does not drift with the batch size, may be negative), else HSIC_0, the paper's,
            the default of ckatorch and repsim; pytorch-cka has HSIC_1, cut to [0, 1]. On 4 or 5 rows HSIC_1 cancels: a
            CPU computes it in float64, on a GPU float32 CKA may be off by 2e-3.
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
    question = Question("cka", kernel, unbiased, center, row_normalize, True)
    return _answer(question, Rows(x, y, mask), group, backend)


def hsic(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    kernel: KernelLike = "linear",
    unbiased: bool = True,
    center: bool = True,
    row_normalize: bool = False,
    mask: Mask = None,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion: tr(KHLH)/(n-1)^2 (biased), or the unbiased HSIC_1 of Song et al. 2012.

    HSIC_1 = [tr(K~L~) + (1'K~1)(1'L~1)/((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3)), K~ and L~ with zero diagonal.
    Source: Gretton et al. 2005; Song et al. 2012. Arguments, dtypes, masks, group, errors as in `cka`; with
    center=False the value is sum_ij K_ij L_ij / (n-1)^2.

    >>> x = torch.randn(64, 8)
    >>> bool(kd.hsic(x, x) > kd.hsic(x, torch.randn(64, 8)).abs())
    True
    """
    question = Question("hsic", kernel, unbiased, center, row_normalize, True)
    return _answer(question, Rows(x, y, mask), group, backend)


def gram_mse(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    normalize: Literal["row"] | None = None,
    reduction: Reduction = "mean",
    mask: Mask = None,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
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
    rows = Rows(x, y, mask)
    if group is not None:
        options = {"normalize": normalize, "reduction": reduction, "backend": backend}
        group = distributed.agreed("gram_mse", rows, group, options)
    if normalize not in (None, "row"):
        raise ValueError(f"normalize is {normalize!r}: give None or 'row'")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
    stat = "mse" if normalize is None else "row_mse"
    return _answer(Question(stat, "linear", False, False, False, reduction == "mean"), rows, group, backend)


def mmd(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    kernel: KernelLike = "rbf",
    unbiased: bool = True,
    mask: tuple[Mask, Mask] | None = None,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Squared maximum mean discrepancy, mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    Source: Gretton et al. 2012 (JMLR 13). unbiased leaves i = j out of the first two means (the value may be negative).
    geomloss's SamplesLoss is half of the biased one.

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
    question, samples = Question("mmd", kernel, unbiased, False, False, True), Rows(x, y, mask)
    if group is not None:
        value, samples = distributed.samples(question, samples, group, backend)
        if samples is None:
            return value
    own = question.kernels()[0]
    samples = two_sample.checked(samples, unbiased)
    check_bandwidths((own,), samples.x)
    chosen = resolve("mmd", backend, device_type(samples.x), (samples.x.dtype, samples.y.dtype))
    if chosen == "reference":
        textbook = lambda x, y, *masks: two_sample.reference_mmd(Rows(x, y, masks), own, unbiased)  # noqa: E731
        return in_pytorch(textbook, (samples.x, samples.y, *samples.mask))
    return statistic(*two_sample.as_sum(own, unbiased), two_sample.joined(samples, unbiased), chosen)


class _Settled:
    """What shapes and options of a call have decided: without a mask, of one kernel whose bandwidth is no tensor."""

    def __init__(self, question: Question, kernels, backend: str):
        self.question, self.kernels, self.backend = question, kernels, backend
        self.text = encode(question, kernels, backend)
        run = implementation(__package__, backend)
        self.find, self.rule = getattr(run, "direct", None), None
        self.find_rule = run.rule if self.find and kernels[0].has_rule else None
        self.plans: dict = {}  # by `need`

    def __call__(self, x, y):
        need = x.requires_grad | y.requires_grad << 1 if torch.is_grad_enabled() else 0
        plan = self.plans.get(need) or self._plan(need, x, y)
        if plan is None:
            return statistic(self.question, self.kernels, Rows(x, y, None), self.backend)
        sigmas = (None, None) if self.rule is None else self.rule(x, y)
        return gram.settled(plan, x, y, None, *sigmas)

    def _plan(self, need: int, x, y):
        """That of the backend, where it has one for such tensors."""
        if self.find_rule is not None and self.rule is None:
            self.rule = self.find_rule(self.kernels[0].sigma, x, y)
            if self.rule is None:
                self.find = None
        if self.find is not None:
            self.plans[need] = self.find(decode(self.text)[0], self.text, need, x, y)
        return self.plans.get(need)


# what calls have settled, the last ones by what they were asked and by the layout of their tensors
_settled: Recent = Recent(256)


def _answer(question: Question, rows: Rows, group, backend: str):
    if group is not None:
        value, rows = distributed.answer(question, rows, group, backend)
        if rows is None:
            return value
    x, y, mask = rows
    key = None
    if group is None and mask is None and plain(x, y) and question.settles() and type(backend) is str and settles(x, y):
        of_x, of_y = (x.shape, x.stride(), x.dtype, x.device), (y.shape, y.stride(), y.dtype, y.device)
        key = question, backend, matmul_precision(), of_x, of_y
        known = _settled.get(key)
        if known is not None:
            return known(x, y)
    check_features(x, y)
    kernels = question.kernels()
    rows = rows.checked(question, kernels)
    chosen = resolve(question.op(), backend, device_type(x), (x.dtype, y.dtype))
    if chosen == "reference":
        return _reference(question, kernels, rows)
    if key is not None:
        known = _Settled(question, kernels, chosen)
        _settled.keep(key, known)
        return known(x, y)
    return statistic(question, kernels, rows, chosen)


def _reference(question: Question, kernels, rows: Rows):
    stat, _, *how = question
    if stat in ("mse", "row_mse"):
        one, how = reference.gram_mse_one, ["row" if stat == "row_mse" else None, "mean" if question.mean else "sum"]
    else:
        one, how = reference.cka_one if stat == "cka" else reference.hsic_one, how[:3]

    def of_group(x, y, pair):
        return one(x, y, *how) if one is reference.gram_mse_one else one(x, y, pair, *how)

    with without_autocast(device_type(rows.x)):
        return reference.over_groups(of_group, rows.x, rows.y, kernels, rows.mask, question.least())
