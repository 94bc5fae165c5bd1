# SPDX-License-Identifier: Apache-2.0
"""What every loss module shares: weights as buffers, levels, rows and masks, detached teachers, parts, last batches.

A loss is called student before teacher and returns a scalar in float32 (float64 for float64 input), whatever autocast
says. The teacher never gets a gradient. Masked rows have no influence, even where they hold NaN, and gradient 0.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from .. import checks, distributed
from .._types import Backend, Features, Masks, Parts, Result, RowsOf, Weights
from ..accumulator import Unrounded
from ..autograd import at_least_float32, ordinary
from ..backend import check_name
from ..distributed import GroupLike
from .levels import at, levels, masks
from .means import has_samples, mean_of_groups, nothing_of, zero_where_masked
from .weights import level_weights, weight_tensor, weight_text

TOKENS = ("tokens", "mean", "groups")  # how [B, T, d] becomes rows
MAPS = ("gap", "positions")  # how [B, C, H, W] becomes rows
ROWS = ("flatten", *TOKENS, *MAPS)


class Loss(Unrounded):
    """A scalar loss with a `weight` buffer: `loss.weight.fill_(w)` changes it and never recompiles, `.half()` keeps it.

    `return_parts=True` in the call gives `(total, parts)`: a dict of the terms as they enter the total, weights
    included, so that they sum to it. They carry gradients: detach them before logging.
    """

    weight: torch.Tensor
    takes_topk = False  # kd.TopKLogits in the place of the teacher's logits
    shown: tuple[str, ...] = ()  # the attributes, and the weights of terms, that `repr` shows before the weight
    takes_heads = False  # LinearLogits in the place of logits
    _instances = itertools.count()

    def __init__(self, weight: float = 1.0, group: GroupLike = None):
        super().__init__()
        distributed.check_group(group)
        self._group = group if group is None or isinstance(group, str) else distributed.Held(group)
        self.register_buffer("weight", weight_tensor(weight, "weight"))
        if self.weight.dim() != 0:
            raise ValueError(f"weight is {weight!r}: give one number")
        self._token = str(next(Loss._instances))

    if TYPE_CHECKING:

        @overload
        def __call__(self, *args: Any, return_parts: Literal[False] = ..., **options: Any) -> torch.Tensor: ...
        @overload
        def __call__(self, *args: Any, return_parts: Literal[True], **options: Any) -> tuple[torch.Tensor, Parts]: ...
        @overload
        def __call__(self, *args: Any, return_parts: bool, **options: Any) -> Result: ...
        def __call__(self, *args: Any, **options: Any) -> Any: ...

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, name: Backend) -> None:
        self._backend = check_name(name)

    @property
    def group(self) -> GroupLike:
        """None for this process alone, "world", or the process group whose ranks make up the batch."""
        return self._group.group if isinstance(self._group, distributed.Held) else self._group

    def _over_ranks(self, prepare, call: str = ""):
        """`prepare()` -> {name: (student, teacher, mask or None)}, one entry a level, and a group for each or None.

        With `group=`, the ranks compare all levels at once, before anything is computed: what `prepare` raises on one
        rank ends the call on every rank. Each level comes with its `distributed.Agreed`: `.total` rows, `.gather(x, y)`
        rows of all ranks, `.sum(x)` over the ranks; as `group=` of an op it makes the op ask no second time. Do all
        checks in `prepare`, and decide by `.total`, which is the same on every rank, what is too small.
        """
        if self._group is None:
            ready = prepare()
            return list(ready.values()), [None] * len(ready)
        handle = distributed.handle_of(self.group)

        def named():
            ready, tensors = prepare(), {}
            for level, (student, teacher, mask) in ready.items():
                # of groups [G, n, d] the samples are spread over the ranks, which may have other numbers n
                one = [t if t is None or student.dim() != 3 else t[:, 0] for t in (student, teacher, mask)]
                names = f"student_{level}", f"teacher_{level}", f"mask of student_{level}"
                tensors |= dict(zip(names, one, strict=True))
            return list(ready.values()), tensors

        ready, rows = distributed.compare(named, handle, f"{type(self).__name__}{call}", self)
        return ready, [distributed.Agreed(handle, n) for n in list(rows.values())[::3]]

    def _total(self, parts: dict[str, torch.Tensor], return_parts: bool):
        checks.flags(return_parts=return_parts)
        parts = {name: value * self.weight.to(value.dtype) for name, value in parts.items()}
        total = functools.reduce(operator.add, parts.values())  # sum() would begin with 0 + value: a node for nothing
        return (total, parts) if return_parts else total

    def _too_small(self, n: int, least: int, what: str = "rows") -> bool:
        """Whether a batch of n rows is too small for the estimator; says so once a module."""
        if n >= least:
            return False
        warn_once(
            f"{self._token} small",
            f"{type(self).__name__} got a batch of {n} {what} and needs {least}: it gives 0 with zero gradient for "
            f"such a batch{' (drop_last=True in the data loader avoids it)' if what.startswith('rows') else ''}",
        )
        return True

    def _level_too_small(self, x, least: int, group, term: str = "") -> bool:
        """Whether a level, or a term of it such as " for its column term", is 0 on every rank for want of rows."""
        if group is None:
            if x.dim() == 3 and len(x) == 0:
                return self._too_small(0, 1, "samples")
            return self._too_small(x.shape[-2], least, f"rows{term}")
        if x.dim() != 3:
            return self._too_small(group.total, least, f"rows on all ranks{term}")
        self._too_small(x.shape[-2], least, f"rows a sample{term}")
        return False  # the samples of other ranks may have more

    def _nothing(self, names, student, return_parts: bool):
        """The loss of a batch that is too small: 0 for each part, differentiable in `student`."""
        return self._total({name: zero_of(student) for name in names}, return_parts)

    def extra_repr(self) -> str:
        shown = {**self._shown(), "weight": weight_text(self.weight)}
        if self._group is not None:
            shown["group"] = repr(self._group) if isinstance(self._group, str) else "ProcessGroup"
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def _shown(self) -> dict:
        """What `repr` shows before the weight."""
        return {name: self._text(name) for name in self.shown}

    def _text(self, name: str):
        value = getattr(self, name)
        if name in self._buffers:
            return 0 if value is None else weight_text(value)
        return value


class FeatureLoss(Loss):
    """A loss between features, summed over levels with one weight each.

    A subclass says what it compares (`_compared`, by default rows) and what that costs (`_value`, or `_terms` for more
    than one part). Levels are checked before any of them is computed; one too small for the estimator adds 0.
    """

    part: str = "features"  # the name of a level's part; a list of levels adds _0, _1, ..., a dict its keys
    least: int = 1  # rows, or samples, that a level needs
    unit = "levels"  # what `weights` counts

    def __init__(
        self, *, rows: RowsOf | None = None, weights: Weights = None, weight: float = 1.0, group: GroupLike = None
    ):
        super().__init__(weight, group)
        self.rows = check_rows(rows)
        self.register_buffer("weights", None if weights is None else level_weights(weights, "weights"))

    def forward(
        self,
        student_features: Features,
        teacher_features: Features,
        *,
        mask: Masks = None,
        rows: RowsOf | None = None,
        return_parts: bool = False,
    ) -> Result:
        rows = self.rows if rows is None else rows
        keys = None

        def prepare():
            nonlocal keys
            check_rows(rows)
            pairs = levels(student_features, teacher_features)
            with full_precision(pairs[0][1]):
                ready = self._ready(pairs, rows, mask)
            if self.weights is not None and len(self.weights) != len(ready):
                raise ValueError(f"student_features has {len(ready)} {self.unit}, weights has {len(self.weights)}")
            keys = list(ready)
            return {at("features", key): compared for key, compared in ready.items()}

        ready, groups = self._over_ranks(prepare, f" with rows={rows!r}")
        with full_precision(ready[0][0]):
            parts = {}
            for i, (key, compared, group) in enumerate(zip(keys, ready, groups, strict=True)):
                terms = self._terms(*compared) if group is None else self._terms(*compared, group=group)
                for name, value in terms.items():
                    if self.weights is not None:
                        value = value * self.weights[i].to(value.dtype)
                    parts[name if key is None else f"{name}_{key}"] = value
        return self._total(parts, return_parts)

    def _ready(self, pairs, rows, mask) -> dict:
        """What `_terms` takes, by the key of each level; checks everything."""
        given = masks(mask, [key for key, *_ in pairs])
        return {key: self._compared(s, t, rows, m, key) for (key, s, t), m in zip(pairs, given, strict=True)}

    def _compared(self, student, teacher, rows, mask, key) -> tuple:
        return rows_of_pair(self, student, teacher, rows, mask, "features", key)

    def _terms(self, x, y, kept, group=None) -> dict[str, torch.Tensor]:
        if self._level_too_small(x, self.least, group):
            return {self.part: zero_of(x)}
        return {self.part: self._mean(self._value, x, y, kept, group)}

    def _mean(self, value, x, y, kept, group, least: int | None = None):
        """`value(x, y, kept, group)`, averaged over the samples of rows="groups"; 0 where a mask leaves < least rows.

        With a group: rows [n, d] are those of all ranks, which is up to `value`; samples [G, n, d] are computed where
        they are, and only their sum and number travel.
        """
        if not has_samples(x, group, self.least):
            return mean_of_groups(nothing_of(x, y), None, 0, group)
        values = value(x, y, kept, group if x.dim() == 2 else None)
        return mean_of_groups(values, kept, self.least if least is None else least, group)

    def _shown(self):
        shown = super()._shown() | ({} if self.rows is None else {"rows": self.rows})
        return shown if self.weights is None else {**shown, "weights": weight_text(self.weights)}


_warned = set()


# while torch.compile traces, this runs once as plain Python; a warning in the graph would break it
@torch.compiler.assume_constant_result
def warn_once(token: str, message: str) -> int:
    if token not in _warned:
        _warned.add(token)
        checks.warn(message)
    return 0


def zero_of(student) -> torch.Tensor:
    """0 whatever the values are, with gradient 0 for each of the tensors."""
    if isinstance(student, torch.Tensor):
        return student[:0].sum(dtype=at_least_float32(student))
    return sum(zero_of(level) for level in student)


# the Dynamo of torch 2.10 does not trace the question
@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def full_precision(tensor):
    """Inside, autocast does not round: losses are computed in at least float32."""
    device = tensor.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def check_pair(loss, student, teacher, what: str, key=None):
    """Both sides are float tensors of one device with the same number of samples; each may have its own dtype."""
    names = at(f"student_{what}", key), at(f"teacher_{what}", key)
    for tensor, name in ((student, names[0]), (teacher, names[1])):
        checks.floating(tensor, name)
        if tensor.dim() == 0 or (tensor.numel() == 0 and 0 in tensor.shape[1:]):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it needs a batch dimension and features")
    checks.same_device(student, teacher, *names)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{names[1]} has {teacher.shape[0]} rows, {names[0]} has {student.shape[0]}: "
            "both sides must describe the same samples, in one order"
        )
    if teacher.requires_grad and not student.requires_grad and torch.is_grad_enabled():
        warn_once(
            loss._token,
            f"{names[1]} requires grad and {names[0]} does not, but {type(loss).__name__} has a gradient for the "
            "student only: call loss(student, teacher), in this order",
        )
    return names


def check_rows(rows, name: str = "rows"):
    if rows is not None and rows not in ROWS:
        raise ValueError(f"{name} is {rows!r}: give one of {ROWS}")
    return rows


def as_rows(x, rows: str | None, mask, name: str):
    """Features of any rank as rows: [n, d], or [G, n, d] for rows="groups", and the mask of these rows (or None).

    [B, d] is taken as it is. [B, T, d]: "tokens" (n = B T), "mean" over the tokens (n = B), "groups" (one comparison a
    sample, n = T), "flatten" (n = B). [B, C, H, W]: "flatten" (the default), "gap" (mean over H, W), "positions"
    (n = B H W). mask: bool [B], or one entry a token [B, T] or position [B, H, W].
    """
    shape = tuple(x.shape)
    if x.dim() == 3 and rows is None:
        raise ValueError(
            f"{name} has shape {shape} and rows is not given: for [B, T, d] pass rows='tokens', 'mean' or 'groups' "
            "(or 'flatten')"
        )
    if x.dim() < 2 or (x.dim() == 3 and rows in MAPS) or (x.dim() > 3 and rows in TOKENS):
        raise ValueError(
            f"{name} has shape {shape} with rows={rows!r}: tokens, mean and groups are for [B, T, d], gap and "
            "positions for [B, C, H, W], flatten for any, [B, d] needs none"
        )
    if mask is not None:
        checks.boolean(mask, x, name)
        mask = constant(mask)
    if x.dim() == 2 or rows in (None, "flatten"):
        return x.flatten(1), _fit_mask(mask, shape[:1], (), name, rows)
    tokens = x if x.dim() == 3 else x.flatten(2).mT
    mask = _fit_mask(mask, shape[:1], shape[1:-1] if x.dim() == 3 else shape[2:], name, rows)
    if rows in ("mean", "gap"):
        if mask is None:
            return tokens.mean(1, dtype=at_least_float32(x)), None
        kept = zero_where_masked(tokens, mask).sum(1, dtype=at_least_float32(x))
        return kept / mask.sum(1, keepdim=True).clamp_min(1), mask.any(1)
    if rows == "groups":
        return tokens, mask
    return tokens.flatten(0, 1), None if mask is None else mask.flatten()


def _fit_mask(mask, batch, inner, name: str, rows):
    """The mask with one entry a row: [B] if `inner` is empty, else [B, T]."""
    if mask is None:
        return None
    allowed = [tuple(batch)] + ([(*batch, *inner)] if inner else [])
    if tuple(mask.shape) not in allowed:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: for {name} with rows={rows!r} give {' or '.join(map(str, allowed))}"
        )
    if not inner:
        return mask
    return (mask[:, None] if mask.dim() == 1 else mask.flatten(1)).expand(*batch, math.prod(inner))


def constant(tensor):
    """A teacher's tensor, or a mask, without its graph; a copy of one made under inference mode, as autograd cannot
    save that."""
    tensor = tensor.detach()
    return ordinary((tensor,))[0] if torch.is_grad_enabled() else tensor


def rows_of_pair(loss, student, teacher, rows, mask, what: str, key=None):
    """Both sides as rows, the teacher's detached, and the mask of these rows."""
    names = check_pair(loss, student, teacher, what, key)
    x, kept = as_rows(student, rows, mask, names[0])
    y, _ = as_rows(constant(teacher), rows, mask, names[1])
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{names[1]} gives {tuple(y.shape[:-1])} rows, {names[0]} {tuple(x.shape[:-1])} with rows={rows!r}: "
            "both sides need the same tokens or positions; rows='mean', 'gap' or 'flatten' compare samples"
        )
    return x, y, kept


def row_mask(mask, labels, ignore_index: int, like, name: str):
    """The mask of a loss over rows, like [..., C]: `mask`, or labels != ignore_index, or both; None if neither."""
    if mask is None and labels is None:
        return None
    shape = tuple(like.shape[:-1])
    if mask is not None:
        checks.boolean(mask, like, name)
    for given, what in ((mask, "mask"), (labels, "labels")):
        if given is not None:
            checks.is_tensor(given, what)
            checks.same_device(given, like, what, name)
            if tuple(given.shape) != shape:
                raise ValueError(f"{what} has shape {tuple(given.shape)}: one entry a row of {name} is {shape}")
    if labels is None:
        return constant(mask)
    checks.integer(ignore_index, "ignore_index", None)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels is {labels.dtype}: give class indices, {ignore_index} where a row is to be ignored")
    counted = labels != ignore_index
    return counted if mask is None else mask & counted
