# SPDX-License-Identifier: Apache-2.0
"""Losses on logits of which the ranks of a group hold slices of the vocabulary: who has which classes of both sides."""

from __future__ import annotations

import torch

from .. import checks, distributed
from ..logits import LinearLogits, TopKLogits
from ..logits.op import Slices
from .rows import NAMES, options_of, rows_of


def sliced(loss, given, vocab, group, marks):
    """Of both sides the classes that are here, the vocab to cut them to, and `Slices` of the group that has the rest.

    Without any `group`, in the call or of LinearLogits, they are what was given. The ranks agree on everything before
    anything is computed; marks: the rows that count, for `rows_of`.
    """
    groups = [g for g in (group, *(getattr(side, "group", None) for side in given)) if g is not None]
    if not groups:
        return *given, vocab, None
    handles = [distributed.handle_of(g) for g in groups]
    if any(handle is not handles[0] for handle in handles):
        raise ValueError(
            "group names two groups, in the call or of kd.LinearLogits: give those that share a vocabulary"
        )

    def prepare():
        if loss.backend == "reference":
            raise ValueError("backend is 'reference', which has no slices of a vocabulary: leave it out, or group=")
        if vocab is not None:
            checks.integer(vocab, "vocab")
        classes, others = {}, {}
        for name, side in zip(NAMES, given, strict=True):
            if isinstance(side, LinearLogits):
                classes[name], others[f"hidden of {name}"] = side.weight, side.hidden
            elif isinstance(side, TopKLogits):
                others[f"values of {name}"] = side.values
            else:
                checks.floating(side, name)
                if side.dim() < 2:
                    raise ValueError(f"{name} has shape {tuple(side.shape)}: a slice of a vocabulary is [..., C]")
                classes[name] = side.movedim(-1, 0)
        rows_of(given[0], loss.reduction, **marks)
        return others, classes | others

    said = options_of(**{name: value for name, value in marks.items() if name != "ignore_index"})
    if vocab is None and isinstance(given[1], TopKLogits):
        vocab = given[1].vocab
    others, found = distributed.compare(prepare, handles[0], f"{type(loss).__name__} of slices{said}", loss)
    for name in others:
        if len(set(found[name])) > 1:
            raise ValueError(f"{name} has not as many rows on every rank: {found[name]}; slices are of the same rows")
    apart = [isinstance(side, LinearLogits) and side.group is not None or _is_slice(side, group) for side in given]
    cut = _cut(loss, [found.get(name) for name in NAMES], apart, vocab)
    slices = Slices(handles[0], cut)
    return *(_own(side, one, slices) for side, one in zip(given, apart, strict=True)), None, slices


def _is_slice(side, group) -> bool:
    return isinstance(side, torch.Tensor) and group is not None


def _cut(loss, sizes, apart, vocab) -> list[int]:
    """How many classes each rank has, of both sides, cut to the first `vocab`."""
    cuts, wholes = {}, {}
    for name, held, one in zip(NAMES, sizes, apart, strict=True):
        if held is None:  # TopKLogits
            continue
        if not one and len(set(held)) > 1:
            raise ValueError(f"{name} has not as many classes on every rank: {held}; those of a slice need a group")
        classes = sum(held) if one else held[0]
        if vocab is not None and vocab > classes:
            raise ValueError(f"vocab is {vocab}, {name} has {classes} classes: give the classes that both have")
        classes = classes if vocab is None else vocab
        if one:
            begin, cuts[name] = 0, []
            for size in held:
                cuts[name].append(max(0, min(size, classes - begin)))
                begin += size
        wholes[name] = classes
    if len(set(wholes.values())) > 1 or len(set(map(tuple, cuts.values()))) > 1:
        has = ", ".join(f"{name} {cuts.get(name, wholes[name])}" for name in wholes)
        raise ValueError(
            f"both sides must have the same classes on each rank, and have {has}: vocab=n takes the first n of both; "
            "of a side that is cut elsewhere give all classes, or slices that begin where the other's do"
        )
    cut = next(iter(cuts.values()))
    if 0 in cut:
        raise ValueError(f"ranks have {cut} classes: give slices of which each has some")
    return cut


def _own(side, apart: bool, slices):
    size = slices.size
    if isinstance(side, TopKLogits):
        return side
    if not isinstance(side, LinearLogits):
        return side[..., :size] if apart else slices.part(side, size)
    weight, bias = side.weight, side.bias
    if not apart:
        weight, bias = slices.part(weight, size, 0), bias if bias is None else slices.part(bias, size, 0)
    return side.of(side.hidden, weight, bias, vocab=size)
