# SPDX-License-Identifier: Apache-2.0
"""torch.vmap of the operators: one more leading dimension is more rows, so a batch is one call, not a loop."""

from __future__ import annotations

import torch

from .correlation import X, Y
from .operator import STRENGTHS


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


def _named(operator, arguments):
    """The names of the tensors among the arguments, which are the first of them, and the rest."""
    schema = operator.default._schema.arguments
    names = [a.name for a in schema if "Tensor" in str(a.type)]
    return names, arguments[len(names) :]


def _backward(operator):
    def rule(info, in_dims, *arguments):
        names, how = _named(operator, arguments)
        size, place = info.batch_size, names.index("strengths")
        tensors = [_front(t, d, size) for t, d in zip(arguments[: len(names)], in_dims, strict=False)]
        rows, strengths = tensors[0].shape[1:-1].numel(), arguments[place]
        if strengths is not None:  # one value for each row, so that no sum runs over examples
            tensors[place] = tensors[place].expand(size, rows).reshape(-1)
        dx, dstrengths = operator(*tensors, *how)
        out = 0 if how[-1] & X else None
        if not how[-1] & STRENGTHS:
            return (dx, dstrengths), (out, None)
        return (dx, _per_example(dstrengths, strengths, in_dims[place], size, rows)), (out, 0)

    return rule


def _pair(operator, out_dims):
    def rule(info, in_dims, *arguments):
        names, how = _named(operator, arguments)
        tensors = [_front(t, d, info.batch_size) for t, d in zip(arguments[: len(names)], in_dims, strict=False)]
        if "moments" in names:  # [5, ...] keep their five first
            place = names.index("moments")
            tensors[place] = tensors[place].movedim(0, 1)
        return operator(*tensors, *how), out_dims(how[-1])

    return rule


def _register():
    ops = torch.ops.kdkernels

    def wanted(need):
        return tuple(0 if need & bit else None for bit in (X, Y))

    rules = {
        "soft_rank_fwd": _forward(ops.soft_rank_fwd),
        "soft_sort_fwd": _forward(ops.soft_sort_fwd),
        "soft_rank_bwd": _backward(ops.soft_rank_bwd),
        "soft_sort_bwd": _backward(ops.soft_sort_bwd),
        "spearman_fwd": _pair(ops.spearman_fwd, lambda need: (0, *wanted(need))),
        "spearman_bwd": _pair(ops.spearman_bwd, wanted),
        "pearson_fwd": _pair(ops.pearson_fwd, lambda need: (0, 1)),
        "pearson_bwd": _pair(ops.pearson_bwd, wanted),
    }
    for name, rule in rules.items():
        torch.library.register_vmap(f"kdkernels::{name}", rule)


_register()
