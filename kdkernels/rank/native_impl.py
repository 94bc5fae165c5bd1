# SPDX-License-Identifier: Apache-2.0
"""What the compiled libraries implement, on rows: the schemas stand here, `csrc/rank/` registers CPU and CUDA for them.

x [R, n]: the last dimension contiguous, the stride of a row free; float16, bfloat16, float32, float64. Ranks, values
and statistics are float32, float64 for float64 rows. x = -inf, or the least number of its dtype, is
absent, a row with NaN or +inf is NaN throughout.
eps of row r = strength * (strengths[r], or strengths[0], if given) * (the row's spread if relative, `strength.py`).
"""

from __future__ import annotations

import torch

from . import torch_impl

SCHEMAS = {
    # rank [R, n]; blocks int32 [R, n] or [0]: an id >= 0, unique in its row, for elements pooled with others, else -1;
    # eps float64 [R], NaN for a poisoned row; strength 0: hard ranks, ties averaged
    "rank_rows": "(Tensor x, Tensor? strengths, float strength, bool relative, bool kl, bool descending,"
    " bool need_blocks) -> (Tensor rank, Tensor blocks, Tensor eps)",
    # d/dx, in x's dtype; grad in rank's
    "rank_rows_backward": "(Tensor grad, Tensor x, Tensor rank, Tensor blocks, Tensor eps, bool kl, bool descending)"
    " -> Tensor",
    # s [R, n] sorted descending, -inf last; value [R, n] descending; start int32 [R, n]: first position of the block.
    # a row that starts with NaN or +inf has NaN values and NaN eps
    "sort_rows": "(Tensor s, Tensor? strengths, float strength, bool relative, bool kl)"
    " -> (Tensor value, Tensor start, Tensor eps)",
    # d/ds, in s's dtype; grad in value's
    "sort_rows_backward": "(Tensor grad, Tensor s, Tensor start, bool kl) -> Tensor",
    # the CPU library alone: the same of rows in any order. s [R, n]: x, or -x unless descending, sorted, absent entries
    # last; order int64 [R, n]: where each stood; value of x, in the caller's order
    "soft_sort_rows": "(Tensor x, Tensor? strengths, float strength, bool relative, bool kl, bool descending)"
    " -> (Tensor value, Tensor s, Tensor order, Tensor start, Tensor eps)",
    # d/dx, with the order undone
    "soft_sort_rows_backward": "(Tensor grad, Tensor s, Tensor order, Tensor start, bool kl) -> Tensor",
    # value [R]; dx, dy [R, n], or [0] where not asked for: the gradient of value[r] in row r
    "spearman_rows": "(Tensor x, Tensor y, float strength, bool relative, bool kl, bool hard_target, bool grad_x,"
    " bool grad_y) -> (Tensor value, Tensor dx, Tensor dy)",
}


def _define():
    for name, schema in SCHEMAS.items():
        torch.library.define(f"kdkernels::{name}", schema)


_define()


def _rows(t):
    """[..., n] as [R, n] with a contiguous last dimension."""
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def _shaped(x, *rows):
    """Results [R, n], [R] (or [0], not asked for) in the shape of x [..., n]; rows [R, n] are in it already."""
    if x.dim() == 2:
        return rows
    per_row = x.shape[:-1]
    return tuple(t.reshape(x.shape) if t.dim() == 2 else t.reshape(per_row) if t.numel() else t for t in rows)


def rank_forward(x, strengths, strength, relative, kl, descending, need):
    run = torch.ops.kdkernels.rank_rows
    return _shaped(x, *run(_rows(x), strengths, strength, relative, kl, descending, need))


def rank_backward(grad, x, rank, blocks, eps, kl, descending):
    if x.dim() != 2:
        eps = eps.reshape(-1)
    run = torch.ops.kdkernels.rank_rows_backward
    return _shaped(x, run(_rows(grad), _rows(x), _rows(rank), _rows(blocks), eps, kl, descending))[0]


def sort_forward(s, strengths, strength, relative, kl):
    return _shaped(s, *torch.ops.kdkernels.sort_rows(_rows(s), strengths, strength, relative, kl))


def sort_backward(grad, s, start, kl):
    return _shaped(s, torch.ops.kdkernels.sort_rows_backward(_rows(grad), _rows(s), _rows(start), kl))[0]


def soft_sort_forward(x, *how):
    if x.is_cuda:
        return torch_impl.of_sorted(sort_forward, x, *how)
    return _shaped(x, *torch.ops.kdkernels.soft_sort_rows(_rows(x), *how))


def soft_sort_backward(grad, s, order, start, kl):
    if s.is_cuda:
        return torch_impl.unsorted(sort_backward(grad, s, start, kl), order)
    run = torch.ops.kdkernels.soft_sort_rows_backward
    return _shaped(s, run(_rows(grad), _rows(s), _rows(order), _rows(start), kl))[0]


def spearman_forward(x, y, strength, relative, kl, hard_target, grad_x, grad_y):
    run = torch.ops.kdkernels.spearman_rows
    return _shaped(x, *run(_rows(x), _rows(y), strength, relative, kl, hard_target, grad_x, grad_y))
