# SPDX-License-Identifier: Apache-2.0
"""Nystrom features, landmark selection, and kernel statistics in O(n m) that never store an n x n or an n x m matrix.

Read on in `reference.py` (what is computed), `landmarks.py`, `chunks.py`, `torch_impl.py` and `statistics.py` (how, in
PyTorch) and `triton_impl.py` (how, on a GPU).
"""

from __future__ import annotations

import torch

from .. import backend as backends
from .._types import Backend, Mask, Selection, Whitening
from ..autograd import at_least_float32, device_type, in_pytorch, without_autocast
from ..distributed import GroupLike
from ..gram.bandwidth import sigma_of
from ..gram.kernels import Kernel, KernelLike, spec_of
from ..gram.op import gram_mse, hsic
from . import distributed, reference
from . import select as selection
from .call import Call, Question, Rows, Side
from .checks import check_bandwidths, check_mask, check_rows, check_same_rows, check_selection, check_side, one_kernel
from .operator import distinct, features, statistic

__all__ = [
    "nystrom_cka",
    "nystrom_features",
    "nystrom_hsic",
    "nystrom_transfer",
    "select_landmarks",
    "transfer_quality",
]

JITTER = 1e-6
TEXTBOOK = torch.float64  # of statistics on the backend reference: off the origin their sums cancel


def nystrom_features(
    x: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    kernel: KernelLike = "rbf",
    whiten: Whitening = "cholesky",
    jitter: float = JITTER,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Phi = C W^(-1/2) [n, m], C = k(x, landmarks), W = k(landmarks, landmarks): Phi Phi' ~ k(x, x).

    Source: Williams & Seeger 2001. Exact where the landmarks span the features of x, e.g. landmarks = x.

    Args:
        x: rows [n, d]; landmarks: rows [m, d] of the same space, any m >= 1. float16, bfloat16, float32 or float64.
        kernel: a name or a kernel object of the Gram ops. A bandwidth rule ("median", "mean") is that of x, detached:
            for features of several batches give a number.
        whiten: "cholesky": W + jitter = R R', Phi = C R'^-1 by triangular solve. "sqrt": the symmetric inverse root
            by eigh, where eigenvalues of W up to jitter (and all below m eps) count as 0: Phi then has the rank of what
            is kept. eigh may wait for the device: "sqrt" is not for CUDA graphs.
        jitter: >= 0, relative to the mean diagonal of W. K~ is below K by about this much in each direction.
        backend: "auto", "triton", "torch" or "reference" (the last one also gives higher derivatives).

    Returns:
        [n, m] in the promoted dtype of x and landmarks. W is formed and factored in float64, C and the whitening are
        float32 (float64 for float64 input). Gradients to x, landmarks and a `sigma` tensor. Duplicate landmarks are
        fine with jitter > 0. NaN in a landmark gives NaN everywhere, in a row of x in its own row. A W without
        Cholesky factor raises on the CPU and under `kd.debug_checks()`, and gives NaN on CUDA.

    Raises:
        ValueError: shapes that do not fit, jitter < 0, no landmarks, a W that is not positive definite.

    >>> x = torch.randn(100, 8)
    >>> phi = kd.nystrom_features(x, x[:20], kernel=kd.RBF(3.0))
    >>> phi.shape
    torch.Size([100, 20])
    >>> bool(((phi @ phi.T).diagonal() <= 1 + 1e-4).all())
    True
    """
    check_side(x, landmarks, "x", "landmarks")
    question = Question("features", kernel, whiten, jitter, backend=backend).checked()
    one = one_kernel(question.kernel)
    question = question.resolved(x, landmarks)
    wide = landmarks.dtype == torch.float64
    side = Side(x, landmarks, sigma_of(one, x.double() if wide else x), one)
    if question.backend != "reference":
        return features(side, question)
    phi = _reference_features(side, question, at_least_float32(x, landmarks))
    return phi.to(torch.promote_types(x.dtype, landmarks.dtype))


def select_landmarks(
    x: torch.Tensor,
    m: int,
    *,
    method: Selection = "rpcholesky",
    kernel: KernelLike = "rbf",
    generator: torch.Generator | None = None,
    mask: Mask = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Indices [m] (int64, all different) of rows of x [n, d] to use as landmarks; O(n m) memory, O(n m (m + d)) time.

    Args:
        m: 1 <= m <= n.
        method: "rpcholesky", randomly pivoted Cholesky (Chen, Epperly, Tropp & Webber, arXiv 2207.06503): rows drawn
            by what the chosen ones do not explain of k(x, x); the best cheap rule. "kmeans++": by squared distance to
            the nearest chosen row. "uniform". "greedy": the largest residual instead of a draw, deterministic, ours.
        kernel: as in `nystrom_features`; read by rpcholesky and greedy only.
        generator: a torch.Generator of any device; the same seed on the same device gives the same rows.
        mask: bool [n], False rows are not chosen while True ones are left.
        backend: "auto", "torch" or "reference".

    No gradient. Once the chosen rows explain the kernel matrix to rounding, the rest is drawn uniformly.

    >>> x = torch.cat([torch.zeros(50, 2), torch.ones(50, 2)]) + 0.01 * torch.randn(100, 2)
    >>> chosen = kd.select_landmarks(x, 2, kernel=kd.RBF(0.3), generator=torch.Generator().manual_seed(0))
    >>> sorted((chosen // 50).tolist())
    [0, 1]
    """
    check_selection(x, m, method)
    check_mask(mask, x, "x")
    one = one_kernel(spec_of(kernel))
    check_bandwidths((one,))
    chosen = backends.resolve("select_landmarks", backend, device_type(x), (x.dtype,))
    sigma = None if method in ("uniform", "kmeans++") else sigma_of(one, x, mask)
    u = selection.draws(x, m, method, generator)
    if chosen == "reference" and method != "uniform":
        with torch.no_grad(), without_autocast(device_type(x)):
            return _reference_selection(x, m, method, one, sigma, u, mask)
    return selection.select(x, mask, None if sigma is None else sigma.detach(), u, m, method, one.code)


def paired_landmarks(s, t, m: int, *, method, kernel, mask=None, group=None):
    """(m rows of s, the same rows of t), chosen among t's; with a `distributed.Agreed`, of the rows of all ranks."""

    def select(rows, mask):
        return select_landmarks(rows, m, method=method, kernel=kernel, mask=mask)

    if group is not None:
        return distributed.paired_landmarks(s, t, mask, select, group)
    index = select(t, mask)
    return s[index], t[index]


def nystrom_transfer(
    s: torch.Tensor,
    t: torch.Tensor,
    s_landmarks: torch.Tensor,
    t_landmarks: torch.Tensor,
    *,
    kernel: KernelLike = "rbf",
    normalize: bool = True,
    mask: Mask = None,
    whiten: Whitening = "cholesky",
    jitter: float = JITTER,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Full kernel matrix transfer: |K~_S - K~_T|_F^2, over |K~_T|_F^2 if normalize, K~ = Phi Phi' of each side.

    Source: Qian, Li, Hu, Li & Jin, Improved Knowledge Distillation via Full Kernel Matrix Transfer (arXiv 2009.14416).

    Args:
        s, t: student and teacher rows [n, d_s], [n, d_t] of the same samples.
        s_landmarks, t_landmarks: [m_s, d_s], [m_t, d_t].
        kernel: a name, an object, or a pair (student's, teacher's); rules are those of s and of t.
        mask: bool [n], False rows take no part and get gradient 0.
        whiten, jitter, backend: as in `nystrom_features`.
        group: as in `nystrom_cka`; a rank sends 8 (m_s^2 + m_s m_t + m_t^2) bytes, and 8 m^2 for the norm if m_s = m_t.

    Returns:
        A scalar in at least float32. Gradients to s, t, both landmarks and `sigma` tensors. Only m x m products are
        kept, summed in float64. Where m_s = m_t the difference of the features is squared, not expanded: the value
        keeps its digits as the student nears the teacher; else the error is 1e-6 of the two squared norms. 0 with zero
        gradient where K~_T is 0 (and normalize).

    >>> t = torch.randn(64, 8)
    >>> kd.nystrom_transfer(t, t, t[:16], t[:16]).item()
    0.0
    """
    question = Question("transfer", kernel, whiten, jitter, normalize=normalize, backend=backend)
    return _answer(question, Rows(s, t, s_landmarks, t_landmarks, mask), group)


def nystrom_cka(
    x: torch.Tensor,
    y: torch.Tensor,
    x_landmarks: torch.Tensor,
    y_landmarks: torch.Tensor,
    *,
    kernel: KernelLike = "rbf",
    unbiased: bool = True,
    mask: Mask = None,
    whiten: Whitening = "cholesky",
    jitter: float = JITTER,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """CKA of the Nystrom kernels of x and y: approximate kernel CKA in O(n m (d + m)) time and O(m^2) memory.

    Equivalent to: `kd.cka(kd.nystrom_features(x, x_landmarks), kd.nystrom_features(y, y_landmarks))`, without the
    features. With landmarks = all rows it is `kd.cka(x, y, kernel=kernel)` up to the jitter.

    Args:
        x, y: rows [n, p], [n, q] of the same samples; x_landmarks [m_x, p], y_landmarks [m_y, q].
        kernel: a name, an object, or a pair (x's, y's); rules ("median") are those of x and of y.
        unbiased: HSIC_1 (n >= 4), else HSIC_0 (n >= 2).
        mask: bool [n], False rows take no part and get gradient 0.
        whiten, jitter, backend: as in `nystrom_features`.
        group: None, or "world" or a process group: the statistic of the rows of all its ranks (n is then any number on
            each), the same on each rank; the gradient, averaged over the ranks, is that of one process
            (`kdkernels/distributed.py`). Landmarks have to be the same on all ranks, e.g. `kd.distributed.gather` of
            rows that each has chosen, which passes their gradient on. A rank sends 8 (m_x^2 + m_x m_y + m_y^2 + 4 m_x +
            4 m_y + 9) bytes and its share of what a bandwidth rule reads.

    Returns:
        A scalar in at least float32, finished in float64. Gradients to x, y, both landmarks and `sigma` tensors. 0 with
        zero gradient where it is undefined: a constant side, or a mask that leaves too few rows. NaN gives NaN.

    >>> x = torch.randn(200, 8)
    >>> y = x + 0.1 * torch.randn(200, 8)
    >>> bool((kd.nystrom_cka(x, y, x[:50], y[:50]) - kd.cka(x, y, kernel="rbf")).abs() < 0.05)
    True
    """
    question = Question("cka", kernel, whiten, jitter, unbiased, backend=backend)
    return _answer(question, Rows(x, y, x_landmarks, y_landmarks, mask), group)


def nystrom_hsic(
    x: torch.Tensor,
    y: torch.Tensor,
    x_landmarks: torch.Tensor,
    y_landmarks: torch.Tensor,
    *,
    kernel: KernelLike = "rbf",
    unbiased: bool = True,
    mask: Mask = None,
    whiten: Whitening = "cholesky",
    jitter: float = JITTER,
    group: GroupLike = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """HSIC of the Nystrom kernels of x and y; arguments, dtypes, masks and groups as in `nystrom_cka`.

    >>> x = torch.randn(100, 8)
    >>> y = torch.randn(100, 8)
    >>> bool(kd.nystrom_hsic(x, x, x[:20], x[:20]) > kd.nystrom_hsic(x, y, x[:20], y[:20]))
    True
    """
    question = Question("hsic", kernel, whiten, jitter, unbiased, backend=backend)
    return _answer(question, Rows(x, y, x_landmarks, y_landmarks, mask), group)


def transfer_quality(
    s: torch.Tensor, t: torch.Tensor, *, kernel: KernelLike = "linear", backend: Backend = "auto"
) -> torch.Tensor:
    """How far the student's kernel matrix is from the teacher's: |K_S - K_T|_F / |K_T|_F, without an n x n matrix.

    Source: figure 3 of arXiv 2009.14416. s, t: rows [n, d_s], [n, d_t] of the same samples. kernel: a name, an object
    or a pair. backend: "auto", "torch" or "reference". A scalar in at least float32: 0 is a perfect copy, and what an
    all-zero teacher gives. Computed in float64, as a metric may be: linear and cosine kernels by `kd.gram_mse`, the
    others by the sums of squares of `kd.hsic`. Gradients to s and t (0 where the value is 0).

    >>> t = torch.randn(32, 8)
    >>> round(kd.transfer_quality(2 * t, t).item(), 4)
    3.0
    """
    check_rows(s, "s")
    check_rows(t, "t")
    check_same_rows(s, t, "s", "t")
    kernels = spec_of(kernel)
    check_bandwidths(kernels)
    chosen = backends.resolve("transfer_quality", backend, device_type(s), (s.dtype, t.dtype))
    dtype = at_least_float32(s, t)
    if chosen == "reference":
        with without_autocast(device_type(s)):
            return _reference_quality(s.to(dtype), t.to(dtype), kernels)
    s, t = s.double(), t.double()
    names = [k.name for k in kernels]
    if names[0] == names[1] and names[0] in ("linear", "cosine"):
        if names[0] == "cosine":
            s, t = (torch.nn.functional.normalize(v, dim=1, eps=1e-300) for v in (s, t))
        total = gram_mse(s, t, reduction="sum")
        norm2 = gram_mse(t, torch.zeros_like(t), reduction="sum")
    else:
        raw = {"unbiased": False, "center": False}
        sides = (s, s, (kernels[0],) * 2), (t, t, (kernels[1],) * 2), (s, t, kernels)
        ss, norm2, st = (hsic(*distinct(a, b), kernel=pair, **raw) for a, b, pair in sides)
        total = ss + norm2 - 2 * st
        # what is rounding of the expansion is 0
        total = torch.where(total > 64 * torch.finfo(total.dtype).eps * (ss + norm2), total, 0 * total)
    ratio = total / torch.where(norm2 > 0, norm2, 1.0)
    some = (ratio > 0) & (norm2 > 0)
    return torch.where(some, torch.where(some, ratio, 1.0).sqrt(), 0 * ratio).to(dtype)


def _answer(question: Question, rows: Rows, group) -> torch.Tensor:
    if group is None:
        rows.check(question)
    else:
        value, rows = distributed.answer(question, rows, group)
        if rows is None:
            return value
    question = question.checked()
    question.check_number(rows.x.shape[0])
    question = question.resolved(*rows[:4])
    call = rows.call(question)
    if question.backend != "reference":
        return statistic(call)
    with without_autocast(device_type(rows.x)):
        return _reference_statistic(call)


def _parameters(kernel: Kernel, sigma, dtype):
    """What the textbook takes: numbers, or the bandwidth tensor."""
    if sigma is not None:
        return [sigma.to(dtype).reshape(())]
    return [float(value) for value in kernel.code.split(":")[1:]]


def _reference_features(side: Side, question: Question, dtype):
    *tensors, kernel = side

    def features(x, z, sigma):
        params = _parameters(kernel, sigma, dtype)
        return reference.features(x.to(dtype), z.to(dtype), kernel.name, params, question.whiten, question.jitter)

    return in_pytorch(features, tensors)


def _reference_statistic(call: Call):
    question, *sides, mask = call
    dtype = at_least_float32(*(t for side in sides for t in side[:2]))
    if mask is not None:
        sides = [side._replace(rows=side.rows[mask]) for side in sides]
    if sides[0].rows.shape[0] == 0:
        tensors = (t for side in sides for t in side[:3] if t is not None)
        return reference.nothing(*(t.to(dtype) for t in tensors)).to(dtype)
    wide = torch.promote_types(dtype, TEXTBOOK)
    phi, psi = (_reference_features(side, question, wide) for side in sides)
    if question.stat == "transfer":
        return reference.transfer(phi, psi, question.normalize).to(dtype)
    return (reference.cka if question.stat == "cka" else reference.hsic)(phi, psi, question.unbiased).to(dtype)


def _reference_quality(s, t, kernels):
    matrices = {
        id(v): reference.kernel(v, v, k.name, _parameters(k, sigma_of(k, v), v.dtype))
        for v, k in zip((s, t), kernels, strict=True)
    }
    return reference.transfer_quality(s, t, lambda v: matrices[id(v)])


def _reference_selection(x, m, method, kernel, sigma, u, mask):
    x = x.to(at_least_float32(x))
    keep = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
    x = torch.where(keep[:, None], x, torch.zeros_like(x))
    if method == "kmeans++":
        columns = lambda i: reference.squared_distances(x - x.mean(0), x[i : i + 1] - x.mean(0))[:, 0]  # noqa: E731
        return reference.select(x, m, method, columns, torch.ones_like(x[:, 0]), u, keep)
    params = _parameters(kernel, sigma, x.dtype)
    columns = lambda i: reference.kernel(x, x[i : i + 1], kernel.name, params)[:, 0]  # noqa: E731
    diagonal = torch.cat([columns(i)[i : i + 1] for i in range(len(x))])
    return reference.select(x, m, method, columns, diagonal, u, keep)
