# SPDX-License-Identifier: Apache-2.0
"""Rows of a loss straight from hidden states: a chunk's logits, its values and slopes, its share of the gradients.

Alive at once are the logits of one chunk of rows, of each side that has a head, the slope of the student's, and the
gradients: never an array [R, C]. The products of half tensors have float32 results. MATH.md, section 11.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..autograd import at_least_float32
from ..backend import runs_compiled

CPU_BYTES, GPU_BYTES = 3 << 24, 1 << 30  # of a chunk's logits and slopes
LEAST = 128  # rows: a product of 32 costs 1.6 times as much a row
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 26  # entries of a half head that are float32 at a time: on a CPU, in cache

HIDDEN, WEIGHT, BIAS = 1, 2, 4  # bits of `need`


class Side(NamedTuple):
    """Logits [R, C] themselves (weight None), or hidden states [R, H] and what makes logits of them."""

    rows: torch.Tensor
    weight: torch.Tensor | None  # [C or more, H]
    bias: torch.Tensor | None
    scale: float
    softcap: float  # 0: none

    @property
    def lazy(self) -> bool:
        return self.weight is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: the head's products have at least float32 results."""
        return at_least_float32(self.rows, self.weight, self.bias) if self.lazy else self.rows.dtype

    def buffer(self, rows: int, classes: int):
        return self.rows.new_empty((rows, classes), dtype=self.dtype) if self.lazy else None


def values_and_gradients(student: Side, teacher: Side, classes: int, per_row, loss, rows: int, need: int, slices=None):
    """Values [R] of the rows, and the gradients of the student's rows, weight and bias, [0] where not asked for.

    loss(z, y, *per_row, need) -> (values [r], slopes [r, C] of the sum of the values) of logits in either's dtype.
    per_row: tensors [R] or None, the last of them weights: a row of weight 0 is left out, whatever it holds. rows: of a
    chunk, 0 for what its bytes allow. slices: of the classes, where other ranks have the rest of them (`Slices`).
    """
    counted = _counted(per_row[-1])
    left = len(student.rows) if counted is None else len(counted)
    chunks = _chunks(left, rows or _rows_of_budget(student, teacher, classes, need, slices))
    values = student.rows.new_zeros(len(student.rows), dtype=at_least_float32(*student[:3], *teacher[:3]))
    wide = slices is not None and student.lazy  # of rows to be summed over the ranks
    gradients = Gradients(student, classes, need, left, len(chunks), wide)
    # made once: the C library's heap may keep as much again as is given back and taken anew
    buffers = [side.buffer(chunks[0].stop if chunks else 0, classes) for side in (student, teacher)]
    for part in chunks:
        at = part if counted is None else counted[part]
        z, y = (_logits(side, at, classes, to) for side, to in zip((student, teacher), buffers, strict=True))
        own = [t if t is None else t[at] for t in per_row]
        found, slopes = loss(z, y, *own, need)
        values[at] = found.to(values.dtype)  # temperatures of rows may be wider
        if need:
            gradients.add(at, z, slopes, own[-1])
        del slopes  # before the next chunk's
    if wide and need & HIDDEN:
        slices.sum(gradients.rows)
    return values, *gradients.found()


def _counted(weights):
    """The rows that count, or None: all; of CUDA tensors nobody asks how many, which would wait for them."""
    if weights is None or not weights.is_cpu:
        return None
    counted = weights.nonzero()[:, 0]
    return None if len(counted) == len(weights) else counted


def _rows_of_budget(student: Side, teacher: Side, classes: int, need: int, slices=None) -> int:
    arrays = student.lazy + teacher.lazy + (need > 0)
    if slices is not None:  # rows as on the other ranks, and temporaries of PyTorch's
        classes, arrays = slices.most, arrays + 6
    budget = CPU_BYTES if student.rows.is_cpu else GPU_BYTES
    return max(LEAST, budget // (arrays * classes * student.dtype.itemsize))


def _chunks(R: int, rows: int) -> list[slice]:
    """Slices of about the same number of rows, `rows` at most."""
    each = math.ceil(R / max(1, math.ceil(R / rows)))
    return [slice(begin, min(R, begin + each)) for begin in range(0, R, each or 1)]


def _logits(side: Side, at, classes: int, to):
    """Those of the rows, in the buffer."""
    if not side.lazy:
        return side.rows[at]
    h = side.rows[at]
    z = to[: len(h)]
    if not _compiled_product(h, side.weight[:classes], z):
        for part in _blocks(side, classes):
            product(h, side.weight[part].mT, z[:, part])
    if side.bias is not None:
        z += side.bias[:classes]
    if side.scale != 1:
        z *= side.scale
    return z.div_(side.softcap).tanh_().mul_(side.softcap) if side.softcap else z


def _compiled_product(h, weight, to) -> bool:
    """to = h weight' of bfloat16 on a CPU that multiplies it and keeps float32 sums; whether that was done."""
    both = h.is_cpu and h.dtype == weight.dtype == torch.bfloat16 and to.dtype == torch.float32
    if not (both and h.stride(-1) == weight.stride(-1) == 1 and runs_compiled("auto", "cpu", ("half_product",))):
        return False
    return torch.ops.kdkernels.half_product(h, weight, to)


def product(a, b, to):
    """to = a @ b; the dtype of `to` may be wider than theirs: no entry is rounded to half on its way."""
    if a.is_cuda and a.dtype == b.dtype != to.dtype:
        to.copy_(torch.mm(a, b, out_dtype=to.dtype))  # in tensor cores, summed in float32
    else:
        torch.mm(a.to(to.dtype), b.to(to.dtype), out=to)


def _narrow(slopes, weight) -> bool:
    """Whether slopes are rounded to the bfloat16 of their head for the products of the gradients, which are rounded to
    it themselves: where a product of such is faster. (In float16 they would be 0.)"""
    if weight.dtype != torch.bfloat16 or slopes.dtype != torch.float32:
        return False
    return slopes.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _exact(a, b, dtype):
    """a @ b, rounded no further than bfloat16 sides are, which a CPU rounds the result to, too."""
    if a.dtype == b.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a @ b).to(dtype)
    return a.to(dtype) @ b.to(dtype)


def _blocks(side: Side, classes: int) -> Iterator[slice]:
    """Of classes: all at once, or those of a half head that are worked on in a wider dtype."""
    block = CPU_BLOCK if side.rows.is_cpu else GPU_BLOCK
    each = classes if side.weight.dtype == side.dtype else max(1, block // side.weight.shape[1])
    return (slice(begin, min(classes, begin + each)) for begin in range(0, classes, each))


def held(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient until the upstream is known: a mean over rows is below float16's least number."""
    return torch.float32 if dtype == torch.float16 else dtype


class Gradients:
    """Those of the student's rows, weight and bias, summed chunk by chunk in the dtype of the logits."""

    def __init__(self, side: Side, classes: int, need: int, counted: int, chunks: int, wide: bool):
        self.side, self.classes, self.need = side, classes, need
        whole = counted == len(side.rows)
        rows = side.rows.new_empty if whole else side.rows.new_zeros
        self.rows = rows(side.rows.shape if need & HIDDEN else 0, dtype=side.dtype if wide else held(side.rows.dtype))
        self.weight = self.bias = None
        if need & WEIGHT:
            dtype = side.dtype if chunks > 1 else held(side.weight.dtype)  # of one chunk: written once, as it is kept
            self.weight = side.weight.new_empty(side.weight.shape, dtype=dtype)
            self.weight[classes if chunks else 0 :].zero_()
        if need & BIAS:
            self.bias = side.bias.new_zeros(side.bias.shape, dtype=side.dtype)
        self.first = True

    def add(self, at, z, slopes, weights):
        """Of a chunk; slopes [r, C] and, under a softcap, the logits z are overwritten."""
        side, need = self.side, self.need
        if not side.lazy:
            self.rows[at] = slopes
            return
        if side.softcap:  # 1 - tanh^2
            slopes.mul_(z.div_(side.softcap).square_().neg_().add_(1))
        if need & BIAS:
            self.bias[: self.classes].add_(slopes.sum(0), alpha=side.scale)
        if _narrow(slopes, side.weight):
            slopes = slopes.bfloat16()
        if need & HIDDEN:
            self.rows[at] = self._of_hidden(slopes).mul_(side.scale).to(self.rows.dtype)
        if need & WEIGHT:
            h = side.rows[at]
            if weights is not None and not weights.is_cpu:  # a row that is left out may hold NaN
                h = torch.where(weights[:, None] != 0, h, 0)
            h = h if side.scale == 1 else h.to(side.dtype) * side.scale
            self._add_weight(slopes, h)
        self.first = False

    def _of_hidden(self, slopes):
        side, weight = self.side, self.side.weight[: self.classes]
        if slopes.dtype == weight.dtype:
            return _exact(slopes, weight, side.dtype)
        total, part_of = None, slopes.new_empty((len(slopes), weight.shape[1]), dtype=side.dtype)
        for part in _blocks(side, self.classes):
            product(slopes[:, part], weight[part], part_of)
            total = part_of.clone() if total is None else total.add_(part_of)
        return total

    def _add_weight(self, slopes, h):
        side, whole = self.side, self.weight[: self.classes]
        for part in _blocks(side, self.classes):
            to, slope = whole[part], slopes[:, part].mT
            if to.dtype == side.dtype and slope.dtype == side.dtype:
                torch.mm(slope, h.to(side.dtype), out=to) if self.first else to.addmm_(slope, h.to(side.dtype))
            else:
                found = _exact(slope, h, side.dtype)
                to.copy_(found) if self.first else to.add_(found)

    def found(self):
        """As they are held: [0] where not asked for."""
        side, none = self.side, self.side.rows.new_empty(0)
        weight = none if self.weight is None else self.weight.to(held(side.weight.dtype))
        bias = none if self.bias is None else self.bias.to(held(side.bias.dtype))
        return self.rows if self.need & HIDDEN else none, weight, bias
