# SPDX-License-Identifier: Apache-2.0
"""One network of a comparison: which of its layers take part, its inputs from a batch, its features through hooks.

A hook turns a layer's output into rows and these into a Gram matrix (or prepared rows) at once, so the outputs of all
layers never exist together and a later in-place operation changes nothing. Hooks are removed however it ends.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from .. import checks
from ..autograd import device_type, without_autocast
from ..losses.base import as_rows
from . import masks
from .layers import chosen_layers, listed
from .sums import Groups, Layers

TOKENS = ("flatten", "tokens", "mean")  # how [B, T, d] becomes rows
MAPS = ("flatten", "gap", "positions")  # how [B, C, H, W] does
ROWS = tuple(dict.fromkeys((*TOKENS, *MAPS)))
FITTING = (
    "for [B, T, d] pass rows='tokens', 'mean' or 'flatten', for [B, C, H, W] 'flatten' (the default), 'gap' or "
    "'positions'; [B, d] needs none"
)
ONE_A_SAMPLE = "rows='flatten', 'gap' (maps) or 'mean' (tokens) gives one a sample, or name layers that fit"
ONE_FOR_ALL = "this one has one row for all samples: leave it out"


class Asked(NamedTuple):
    """What is compared of a network: names or patterns of layers, how outputs become rows, which rows count."""

    layers: list[str] | None
    rows: str | None
    mask: object


class Network:
    """A model under comparison; `features(batch)` is one forward pass."""

    def __init__(self, model: nn.Module, name: str, asked: Asked, other: nn.Module | None = None):
        # other: a model for which the same list of layers stands
        self.model, self.name, self.rows, self.mask = model, name, asked.rows, asked.mask
        self.wanted = chosen_layers(model, asked.layers, name, other)
        self.named = set(asked.layers or ()) & set(self.wanted)  # which must be there; others are left out as they come
        self.called: list[str] | None = None  # in the order of the model, known after the first batch
        self.left_out: dict[str, str] = {}  # why

    def __len__(self) -> int:
        return len(self.wanted)

    def features(self, arguments: tuple, options: dict, mask, layers: Layers | Groups) -> Layers | Groups:
        """`layers` filled by one forward pass, in the order of the calls: `order` sorts them."""
        self.places: dict[str, int] = {}
        self.batch = _Batch(_samples(arguments, options), mask)
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for layer in self.wanted:
                module = self.model.get_submodule(layer)
                hooks.callback(module.register_forward_hook(self._hook(layer, layers)).remove)
            self.model(*arguments, **options)
        called = [layer for layer in self.wanted if layer in self.places]
        if self.called is None:
            self._settle(called)
        elif called != self.called:
            changed = listed(layer for layer in self.called if layer not in self.places)
            raise ValueError(f"layers: {self.name} calls {changed} for some batches only: name layers it always calls")
        return layers

    def _settle(self, called: list[str]):
        """After the first batch: those that gave rows, in any call, are the layers."""
        self.left_out = {
            layer: self.left_out.get(layer, "not called") for layer in self.wanted if layer not in self.places
        }
        missing = [layer for layer in self.left_out if layer in self.named] or (not called and self.wanted)
        if missing:
            raise ValueError(
                f"layers: the forward pass of {self.name} does not call {listed(missing)}, or it has no features, so "
                "there is no output to compare: name a layer that is called"
            )
        self.called = self.wanted = called

    def why_left_out(self) -> str:
        """Layers that nobody named, by the reason why they take no part."""
        reasons = defaultdict(list)
        for layer, why in self.left_out.items():
            reasons[why].append(layer)
        return ", ".join(f"{listed(layers)} ({why})" for why, layers in reasons.items())

    def order(self) -> list[int]:
        """Places of the layers, in the order of `called`."""
        return [self.places[layer] for layer in self.called]

    def _hook(self, layer: str, layers: Layers | Groups):
        name = f"the output of {self.name}.{layer}"

        def hook(_module, _inputs, output):
            tensor = first_tensor(output)
            why = self._unfit(tensor)
            if why and layer not in self.named:
                self.left_out[layer] = why
                return
            if tensor is None:
                raise TypeError(f"layers: {name} is a {type(output).__name__} without a tensor: name another layer")
            x = self._counted(tensor.detach(), name)
            with without_autocast(device_type(x)):
                # a module that is called again stands for its last call; of no rows the caller says so, later
                self.places[layer] = layers.put(x, self.places.get(layer)) if len(x) else 0

        return hook

    def _unfit(self, tensor) -> str | None:
        """Why an output cannot take part, None if it can."""
        if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
            return "no features"
        if self.batch.shares(tensor):
            return "one row for all samples"
        if tensor.dim() == 2 and self.rows in ("tokens", "positions") and tensor.shape[0] == self.batch.samples:
            return f"no {self.rows}"
        return None if _fits(tensor, self.rows) or self.rows is None else f"shape that rows={self.rows!r} does not fit"

    def _counted(self, output, name: str):
        """The rows of an output that count, the same of every layer."""
        checks.floating(output, name)
        if not _fits(output, self.rows):
            raise ValueError(f"{name} has shape {tuple(output.shape)} with rows={self.rows!r}: {FITTING}")
        batch = self.batch
        x, kept = as_rows(output, self.rows, masks.fitted(batch.mask, output), name)
        if batch.rows not in (None, len(x)):
            raise ValueError(
                f"{name} gives {len(x)} rows with rows={self.rows!r}, another layer {batch.rows}: all layers need the "
                f"same rows; {ONE_FOR_ALL if batch.shares(output) else ONE_A_SAMPLE}"
            )
        batch.rows = len(x)
        if kept is None:
            return x
        if batch.index is None:
            batch.index = masks.places(kept)
        return x.index_select(0, batch.index)


class _Batch:
    """What the outputs of a batch share."""

    def __init__(self, samples: int | None, mask):
        self.samples, self.mask = samples, mask
        self.rows = self.index = None  # how many before the mask; places of those that count

    def shares(self, output) -> bool:
        """Whether an output is one for all samples."""
        return output.shape[0] == 1 and self.samples not in (None, 1)


def _samples(arguments: tuple, options: dict) -> int | None:
    """How many samples the model is given, as far as one can see."""
    tensor = first_tensor((*arguments, *options.values()))
    return None if tensor is None or not tensor.dim() else tensor.shape[0]


def _fits(output, rows: str | None) -> bool:
    """Whether `as_rows` takes the shape."""
    allowed = {2: ROWS, 3: TOKENS}.get(output.dim(), MAPS)
    return output.dim() > 1 and (rows in allowed or (rows is None and output.dim() != 3))


def first_tensor(output):
    """A tensor, or the first one inside tuples, lists and dicts; None where there is none."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((t for t in map(first_tensor, output) if t is not None), None)
    return None


def arguments_of(batch, model: nn.Module, name: str) -> tuple[tuple, dict]:
    """What the model is called with: a tensor, the first entry of a tuple or list, a dict's entries by keyword."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        takes = inspect.signature(model.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            return (), dict(batch)
        known = {key: value for key, value in batch.items() if key in takes}
        if not known:
            raise ValueError(
                f"loader gives dicts of {', '.join(map(str, batch))}, and {name}.forward takes {', '.join(takes)}: "
                "pass inputs=, e.g. inputs=lambda batch: batch['image']"
            )
        return (), known
    if isinstance(batch, (tuple, list)) and batch:
        return arguments_of(batch[0], model, name)
    raise TypeError(
        f"loader gives a {type(batch).__name__}: compare_models takes tensors, (inputs, ...) tuples and dicts, or pass "
        "inputs=, a function of the batch"
    )


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([moved(entry, device) for entry in value])
    return value


def device_of(model: nn.Module):
    """Where the model is, None for one without parameters and buffers."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), None)


def dtype_of(*models: nn.Module) -> torch.dtype:
    """The dtype of the sums: float64 where a model has float64 parameters."""
    wide = any(p.dtype == torch.float64 for model in models for p in model.parameters())
    return torch.float64 if wide else torch.float32
