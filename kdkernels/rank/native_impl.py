# SPDX-License-Identifier: Apache-2.0
"""What the compiled libraries implement, on rows: the schemas stand here, `csrc/rank/` registers CPU and CUDA for them.

x [R, n]: the last dimension contiguous, the stride of a row free; float16, bfloat16, float32, float64. Ranks, values
and statistics are float32, float64 for float64 rows. x = -inf is absent, a row with NaN or +inf is NaN throughout.
eps of row r = strength * (strengths[r], or strengths[0], if given) * (the row's spread if relative, `strength.py`).
"""

from __future__ import annotations

import torch

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


def rank_forward(x, strengths, strength, relative, kl, descending, need):
    rank, blocks, eps = torch.ops.kdkernels.rank_rows(_rows(x), strengths, strength, relative, kl, descending, need)
    return rank.reshape(x.shape), blocks.reshape(x.shape) if need else blocks, eps.reshape(x.shape[:-1])


def rank_backward(grad, x, rank, blocks, eps, kl, descending):
    rows = (_rows(t) for t in (grad, x, rank, blocks))
    dx = torch.ops.kdkernels.rank_rows_backward(*rows, eps.reshape(-1), kl, descending)
    return dx.reshape(x.shape)


def sort_forward(s, strengths, strength, relative, kl):
    value, start, eps = torch.ops.kdkernels.sort_rows(_rows(s), strengths, strength, relative, kl)
    return value.reshape(s.shape), start.reshape(s.shape), eps.reshape(s.shape[:-1])


def sort_backward(grad, s, start, kl):
    return torch.ops.kdkernels.sort_rows_backward(_rows(grad), _rows(s), _rows(start), kl).reshape(s.shape)


def spearman_forward(x, y, strength, relative, kl, hard_target, grad_x, grad_y):
    run = torch.ops.kdkernels.spearman_rows
    value, dx, dy = run(_rows(x), _rows(y), strength, relative, kl, hard_target, grad_x, grad_y)
    return value.reshape(x.shape[:-1]), dx.reshape(x.shape) if grad_x else dx, dy.reshape(y.shape) if grad_y else dy
