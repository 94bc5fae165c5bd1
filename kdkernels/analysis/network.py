# SPDX-License-Identifier: Apache-2.0
"""One network of a comparison: which of its layers take part, its inputs from a batch, its features through hooks.

A hook turns a layer's output into rows and these into a Gram matrix (or prepared rows) at once, so the outputs of all
layers never exist together and a later in-place operation changes nothing. Hooks are removed however it ends.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .. import checks
from ..autograd import device_type, without_autocast
from ..losses.base import as_rows
from .sums import Groups, Layers


def chosen_layers(model: nn.Module, wanted, name: str) -> list[str]:
    """Names of the modules that are named or matched, in the order of the model; without any wish all leaves."""
    modules = dict(model.named_modules())
    modules.pop("", None)
    if not modules:
        raise ValueError(f"{name} has no layers of its own: wrap it, e.g. nn.Sequential({name})")
    if wanted is None:
        return [layer for layer, module in modules.items() if next(module.children(), None) is None]
    found = set()
    for pattern in wanted:
        matched = {pattern} if pattern in modules else set(fnmatch.filter(modules, pattern))
        if not matched:
            raise ValueError(f"layers: {name} has no layer {pattern!r}; it has {', '.join(modules)}")
        found |= matched
    return [layer for layer in modules if layer in found]


def patterns(layers) -> tuple[list[str] | None, list[str] | None]:
    """One list of names or patterns for both models, or a pair of them."""
    if layers is None or isinstance(layers, str):
        return (_patterns(layers),) * 2
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"layers is a {type(layers).__name__}: give names or patterns such as 'conv*', or a pair of lists"
        )
    if len(layers) == 2 and not all(isinstance(entry, str) for entry in layers):
        return _patterns(layers[0]), _patterns(layers[1])
    return (_patterns(layers),) * 2


def _patterns(layers) -> list[str] | None:
    if layers is None:
        return None
    layers = [layers] if isinstance(layers, str) else list(layers)
    for entry in layers:
        if not isinstance(entry, str):
            raise TypeError(f"layers holds a {type(entry).__name__}: give names or patterns such as 'conv*'")
    if not layers:
        raise ValueError("layers is empty: name at least one layer, or leave it out for all of them")
    return layers


class Network:
    """A model under comparison; `features(batch)` is one forward pass."""

    def __init__(self, model, name: str, wanted: list[str] | None, rows: str | None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}: pass an nn.Module")
        self.model, self.name, self.rows, self.all_leaves = model, name, rows, wanted is None
        self.wanted = chosen_layers(model, wanted, name)
        self.called: list[str] | None = None  # in the order of the model, known after the first batch

    def __len__(self) -> int:
        return len(self.wanted)

    def features(self, arguments: tuple, options: dict, layers: Layers | Groups) -> Layers | Groups:
        """`layers` filled by one forward pass, in the order of the calls: `order` sorts them."""
        self.places: dict[str, int] = {}
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for layer in self.wanted:
                module = self.model.get_submodule(layer)
                hooks.callback(module.register_forward_hook(self._hook(layer, layers)).remove)
            self.model(*arguments, **options)
        called = [layer for layer in self.wanted if layer in self.places]
        if not called or (not self.all_leaves and len(called) < len(self.wanted)):
            missing = [layer for layer in self.wanted if layer not in self.places]
            raise ValueError(
                f"layers: the forward pass of {self.name} does not call {', '.join(missing)}, so there is no output to "
                "compare: name a layer that is called"
            )
        if self.called is not None and called != self.called:
            changed = ", ".join(sorted(set(called) ^ set(self.called)))
            raise ValueError(f"layers: {self.name} calls {changed} for some batches only: name layers it always calls")
        self.called = called
        return layers

    def order(self) -> list[int]:
        """Places of the layers, in the order of `called`."""
        return [self.places[layer] for layer in self.called]

    def _hook(self, layer: str, layers: Layers | Groups):
        name = f"the output of {self.name}.{layer}"

        def hook(_module, _inputs, output):
            tensor = first_tensor(output)
            if self.all_leaves and not (tensor is not None and tensor.is_floating_point() and tensor.dim() > 1):
                return
            if tensor is None:
                raise TypeError(f"layers: {name} is a {type(output).__name__} without a tensor: name another layer")
            checks.floating(tensor, name)
            x, _ = as_rows(tensor.detach(), self.rows, None, name)
            if len(layers) and x.shape[0] != layers.n:
                raise ValueError(
                    f"{name} gives {x.shape[0]} rows with rows={self.rows!r}, another layer {layers.n}: all layers "
                    "need the same rows; rows='flatten', 'gap' or 'mean' give one a sample, or name layers that fit"
                )
            with without_autocast(device_type(x)):
                # a module that is called again stands for its last call
                self.places[layer] = layers.put(x, self.places.get(layer))

        return hook


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
