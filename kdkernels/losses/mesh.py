# SPDX-License-Identifier: Apache-2.0
"""Losses on logits that are DTensors: placements say which classes, and which rows, a rank has."""

from __future__ import annotations

import math
import warnings

import torch

from ..logits import LinearLogits, TopKLogits
from ..logits.op import total
from .rows import NAMES, rows_of


class _Laid:
    """Both sides are laid as the one whose classes are cut, else as the student."""

    def __init__(self, loss, pair, vocabulary: bool):
        from torch.distributed.tensor import DTensor, Replicate, Shard

        laid, last = [side for side in pair if isinstance(side, DTensor)], len(pair[0].shape) - 1
        if any(isinstance(side, LinearLogits) for side in pair):
            raise TypeError("logits are a DTensor beside kd.LinearLogits: give what this rank holds, and its group=")
        if any(side.device_mesh != laid[0].device_mesh or side.dim() != last + 1 for side in laid):
            raise ValueError(f"{' and '.join(NAMES)} are DTensors of two meshes, or shapes: give them alike")
        for side in laid:
            if any(type(placed) not in (Replicate, Shard) for placed in side.placements):
                raise ValueError(
                    f"logits are a DTensor placed {side.placements}: redistribute it to Replicate() or Shard(dim)"
                )
        self.mesh = laid[0].device_mesh
        places = min(laid, key=lambda side: Shard(last) not in side.placements).placements
        self.sides, self.rows = places, [Replicate() if placed == Shard(last) else placed for placed in places]
        cut = [self.mesh.get_group(dim) for dim, placed in enumerate(places) if placed == Shard(last)]
        if len(cut) > vocabulary:
            raise ValueError(
                f"logits are a DTensor placed {places}: {type(loss).__name__} takes the vocabulary "
                f"{'cut along one dimension of the mesh' if vocabulary else 'whole'}, redistribute it"
            )
        self.cut = cut[0] if cut else None
        self.spread = [self.mesh.get_group(dim) for dim, placed in enumerate(self.rows) if placed != Replicate()]

    def here(self, t, places):
        """What this rank has of a tensor; one that is no DTensor is whole on all ranks."""
        from torch.distributed.tensor import DTensor, Replicate

        if isinstance(t, TopKLogits):
            return t.of(self.of_rows(t.values), self.of_rows(t.indices))
        if not isinstance(t, torch.Tensor) or t.dim() == 0:
            return t
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return t.redistribute(self.mesh, places).to_local()

    def of_side(self, t):
        return self.here(t, self.sides)

    def of_rows(self, t):
        """Of a tensor of rows [..., k], or [...]."""
        return self.here(t, self.rows)

    def over(self, value):
        """Of all rows."""
        for group in self.spread:
            value = total(value, group)
        return value


def over_mesh(loss, pair, marks, call, *, more=lambda of_rows: (), vocabulary: bool = True):
    """The loss of DTensors, the same on every rank: a vocabulary that is cut becomes `group=`; where rows are, each
    rank adds up its own, divided by what all of them count.

    marks: the rows that count, as `rows_of` takes them. more(of_rows): what else the loss takes by position.
    """
    laid = _Laid(loss, pair, vocabulary)
    if laid.spread and loss.reduction == "none":
        raise ValueError("reduction is 'none', and ranks hold other rows of the DTensors: give logits.to_local()")
    sides, marks = [laid.of_side(side) for side in pair], {name: laid.of_rows(value) for name, value in marks.items()}
    if laid.spread and loss.reduction == "mean" and marks["normalizer"] is None:
        marks["normalizer"] = _counted(laid, pair[0], sides[0], marks)
    if laid.cut is not None:
        call = {**call, "group": laid.cut}
    with warnings.catch_warnings():
        if laid.spread:  # a rank without rows is none to warn of
            warnings.simplefilter("ignore")
        found = loss(*sides, *more(laid.of_rows), **{name: t for name, t in marks.items() if t is not None}, **call)
    if not isinstance(found, tuple):
        return laid.over(found)
    parts = {name: laid.over(part) for name, part in found[1].items()}
    return sum(parts.values()), parts


def _counted(laid, whole, student, marks):
    """The weight of the rows that count, on all ranks."""
    rows = rows_of(student, "mean", **marks)
    if rows.plain():
        return math.prod(whole.shape[:-1])
    return laid.over(rows.mask.sum() if rows.weights is None else rows.weights.sum())
