# SPDX-License-Identifier: Apache-2.0
"""Levels of features: a tensor, a list of them, or a dict of them as pyramids give, and a mask for all or for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .. import checks


def at(what: str, key) -> str:
    """What an error calls a level: student_features, student_features[1], student_features['p3']."""
    return what if key is None else f"{what}[{key!r}]"


def by_key(side, name: str) -> dict:
    """The levels of a side by index, or by its own keys; of a single tensor the key is None."""
    if isinstance(side, torch.Tensor):
        return {None: side}
    if not isinstance(side, (Mapping, Sequence)):
        raise TypeError(f"{name} is a {type(side).__name__}: pass a torch.Tensor, or a list or dict of them")
    return dict(side if isinstance(side, Mapping) else enumerate(side))


def levels(student, teacher, what: str = "features") -> list[tuple]:
    """(key, student's tensor, teacher's tensor) of each level, in the student's order."""
    names = f"student_{what}", f"teacher_{what}"
    x, y = (by_key(side, name) for side, name in zip((student, teacher), names, strict=True))
    for kind in (torch.Tensor, Mapping):
        if isinstance(student, kind) != isinstance(teacher, kind):
            raise TypeError(f"{names[0]} and {names[1]}: give two tensors, two lists of levels, or two dicts of them")
    for side, name in ((x, names[0]), (y, names[1])):
        for key, level in side.items():
            checks.is_tensor(level, at(name, key))
    if x.keys() != y.keys():
        own, other = (list(s) if isinstance(student, Mapping) else len(s) for s in (x, y))
        raise ValueError(f"{names[1]} has {other} levels, {names[0]} has {own}: both sides need the same")
    if not x:
        raise ValueError(f"{names[0]} is an empty {type(student).__name__}: it needs at least one level")
    return [(key, x[key], y[key]) for key in x]


def masks(mask, keys: list) -> list:
    """The mask of each level: one for all, or a list or dict of masks, one a level, None where all of it counts."""
    if mask is None or isinstance(mask, torch.Tensor) or keys == [None]:
        return [mask] * len(keys)
    given = by_key(mask, "mask")
    if given.keys() != set(keys):
        raise ValueError(f"mask has levels {list(given)}, student_features {keys}: give one for all, or one a level")
    return [given[key] for key in keys]
