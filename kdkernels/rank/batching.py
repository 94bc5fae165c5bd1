# SPDX-License-Identifier: Apache-2.0
"""torch.vmap of the operators: one more leading dimension is more rows, so a batch is one call, not a loop."""

from __future__ import annotations

import torch

from .function import STRENGTH
from .pairs import X, Y


def _front(t, dim, size):
    """A tensor with the batch as its first dimension."""
    if t is None:
        return None
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _per_row(strengths, dim, size, rows):
    """Strengths [1] or [rows] of each example, as one value for each row of the batch."""
    if strengths is None or (dim is None and strengths.numel() == 1):
        return strengths
    return _front(strengths, dim, size).expand(size, rows).reshape(-1)


def _per_example(gradient, strengths, dim, size, rows):
    """A gradient [size * rows], or [1], as [size, 1] or [size, rows] like the strengths of each example."""
    gradient = gradient.reshape(size, rows)
    one = strengths.numel() == (1 if dim is None else size)
    return gradient.sum(-1, keepdim=True) if one else gradient


def _forward(operator):
    def rule(info, in_dims, x, strengths, *rest):
        x = _front(x, in_dims[0], info.batch_size)
        rows = x.shape[1:-1].numel()
        out = operator(x, _per_row(strengths, in_dims[1], info.batch_size, rows), *rest)
        # what nobody asked for is [0], for every example alike
        return out, tuple(0 if t.dim() >= x.dim() - 1 and t.shape[:1] == x.shape[:1] else None for t in out)

    return rule


def _backward(operator, place):
    """`place` of the strengths among the tensors."""

    def rule(info, in_dims, *arguments):
        size, need = info.batch_size, arguments[-2]
        tensors = [_front(t, d, size) for t, d in zip(arguments[:6], in_dims[:6], strict=True)]
        x, strengths = tensors[0], arguments[place]
        rows = x.shape[1:-1].numel()
        if strengths is not None:  # one value for each row, so that no sum runs over examples
            tensors[place] = tensors[place].expand(size, rows).reshape(-1)
        dx, dstrengths = operator(*tensors, *arguments[6:])
        if not need & STRENGTH:
            return (dx, dstrengths), (0, None)
        return (dx, _per_example(dstrengths, strengths, in_dims[place], size, rows)), (0, 0)

    return rule


def _pair(operator, count, out_dims):
    def rule(info, in_dims, *arguments):
        tensors = []
        for t, d in zip(arguments[:count], in_dims[:count], strict=True):
            tensors.append(_front(t, d, info.batch_size))
        if count == 4:  # the moments [5, ...] keep their five first
            tensors[3] = tensors[3].movedim(0, 1)
        return operator(*tensors, *arguments[count:]), out_dims(arguments)

    return rule


def _wanted(need, *bits):
    return tuple(0 if need & bit else None for bit in bits)


def _register():
    ops = torch.ops.kdkernels
    rules = {
        "soft_rank_fwd": _forward(ops.soft_rank_fwd),
        "soft_sort_fwd": _forward(ops.soft_sort_fwd),
        "soft_rank_bwd": _backward(ops.soft_rank_bwd, 2),
        "soft_sort_bwd": _backward(ops.soft_sort_bwd, 1),
        "spearman_fwd": _pair(ops.spearman_fwd, 2, lambda a: (0, *_wanted(a[-2], X, Y))),
        "pearson_fwd": _pair(ops.pearson_fwd, 2, lambda a: (0, 1)),
        "pearson_bwd": _pair(ops.pearson_bwd, 4, lambda a: _wanted(a[-1], X, Y)),
    }
    for name, rule in rules.items():
        torch.library.register_vmap(f"kdkernels::{name}", rule)


_register()
