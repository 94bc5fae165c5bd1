# SPDX-License-Identifier: Apache-2.0
"""CKA between the layers of two networks in one pass over a loader: unbiased, and memory that no batch adds to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import checks
from .._types import Backend, Device, LayerNames, MaskOf, RowsOf
from ..autograd import device_type, without_autocast
from ..gram.call import minimum_rows
from ..gram.kernels import KernelLike, spec_of
from . import masks, stream, sums
from .comparison import Comparison
from .layers import patterns
from .network import ROWS, Asked, Network, arguments_of, device_of, dtype_of, moved


def compare_models(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    layers: LayerNames | tuple[LayerNames, LayerNames] = None,
    *,
    rows: RowsOf | None | tuple[RowsOf | None, RowsOf | None] = None,
    mask: MaskOf | tuple[MaskOf, MaskOf] = None,
    kernel: KernelLike = "linear",
    unbiased: bool = True,
    inputs: Callable[[Any], Any] | None = None,
    device: Device | None = None,
    progress: bool = True,
    backend: Backend = "auto",
) -> Comparison:
    """CKA of every chosen layer of `model_a` with every chosen layer of `model_b`, over all batches of `loader`.

    cka[l, m] = sum h(K_l, L_m) / sqrt(sum h(K_l, K_l) sum h(L_m, L_m)), sums over batches of HSIC_1: a ratio of sums
    (Nguyen et al. 2021, arXiv 2010.15327; Song et al. 2012), with its standard error. Each batch's HSICs are unbiased,
    so the batch size does not move the value; their ratio has a bias below the standard error. See `kd.CKAMetric`.

    Memory beside the models, with linear and cosine kernels: no more than the features of all layers for one batch
    (counted for 20 layers and more, 16 to 512 wide; the activations of two or three layers come on top for fewer),
    then nine numbers a pair of layers, whatever the number of batches. Other kernels keep Gram matrices also of layers
    narrower than the batch, or tiles of them, 64 MB at most. One forward pass of each model a batch (one in all where
    both are the same model and layers).

    Args:
        model_a, model_b: nn.Modules for the same inputs. A model in training mode warns, and is left in it: dropout and
            batch statistics then make the features depend on chance and on the batch. No gradient is recorded.
        loader: any iterable of batches: tensors, (inputs, ...) tuples, of which the first entry counts, or dicts,
            passed by keyword as far as `forward` takes them. Shuffle it: the error takes batches for independent.
        layers: a name or an fnmatch pattern ("layer?", "blocks.*.mlp"; `*` stays within dots, `**` crosses them), a
            list of them for both models, or a pair of lists. None: every module without children. What a pattern or
            None brings and the first batch does not call, or what has no such rows there (one row for all samples, no
            tokens), is left out with one warning. A layer called several times counts with its last call; of an output
            that is a tuple or a dict its first tensor counts.
        rows: how outputs become rows, one value or a pair (a's, b's). Convolutions [B, C, H, W]: "flatten" (default),
            "gap" (mean over positions), "positions" (each position a sample). Tokens [B, T, d], which have no default:
            "tokens", "mean", "flatten".
        mask: which samples, tokens or positions count, one value or a pair (a's, b's): a bool (or 0/1) tensor that fits
            every batch, a key of the batch, or a function of the batch that gives a tensor or None: [B], or with
            "tokens" and "mean" [B, T], with "positions" [B, H, W]. None: with rows "tokens" or "mean" a batch's
            "attention_mask" is used, with one warning; False: everything counts, padding too.
        kernel, unbiased, backend: as in `kd.cka_matrix`; a bandwidth rule such as "median" sees one batch at a time.
        inputs: a function of the batch that gives what the models are called with, where the above does not fit.
        device: moves the models and the batches there; None: batches go where each model is.
        progress: a tqdm bar, where tqdm is installed.

    Returns:
        `Comparison`: `cka` and `standard_error` [La, Lb] float64 on the CPU, labels, `plot(path)`, `to_csv(path)`.

    A batch with fewer rows than the estimator needs (4; 2 with unbiased=False) is left out with one warning; if it is
    the first, that is an error: the loader's batch_size is too small. Every batch counts once: drop_last=True spares
    the noise of a small last one. A NaN in a layer makes its entries NaN and no others.

    Raises:
        ValueError: layers that do not exist (it lists those that do; of a list for both models one may lack some) or
            are named and not called, layers whose rows do not fit together, a mask that does not fit, an empty loader.
            TypeError: an output without a tensor, a batch of unknown type, a loader that is no iterable.

    >>> a = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    >>> found = kd.compare_models(a, a, torch.randn(10, 32, 8), progress=False)
    >>> found.labels_a, found.cka.diagonal().allclose(torch.ones(3, dtype=torch.float64))
    (('0', '1', '2'), True)
    """
    a, b = _networks(model_a, model_b, patterns(layers), _pair(rows, "rows"), _pair(mask, "mask"))
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader is a {type(loader).__name__}: give an iterable of batches, e.g. a DataLoader")
    kernels = spec_of(kernel)
    checks.flags(unbiased=unbiased)
    if device is not None:
        model_a.to(device), model_b.to(device)
    for name, model in dict.fromkeys((("model_a", model_a), ("model_b", model_b))):
        if model.training:
            checks.warn(f"{name} is in training mode, and left in it: call {name}.eval() first")
    run = _Run(a, b, kernels, unbiased, backend, dtype_of(model_a, model_b))
    for batch in _bar(loader, progress):
        run.add(batch, batch if inputs is None else inputs(batch))
    return run.result(kernel)


def _pair(value, name: str) -> tuple:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} has {len(pair)} entries: give one, or a pair (model_a's, model_b's)")
    return pair


def _networks(model_a, model_b, layers: tuple, rows: tuple, mask: tuple) -> tuple[Network, Network]:
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}: pass an nn.Module")
    for entry in rows:
        if entry is not None and entry not in ROWS:
            raise ValueError(f"rows is {entry!r}: give one of {ROWS}")
    for entry in mask:
        masks.check_asked(entry)
    shared = layers[0] is layers[1]
    asked = [Asked(*one) for one in zip(layers, rows, mask, strict=True)]
    a = Network(model_a, "model_a", asked[0], model_b if shared else None)
    if model_b is model_a and layers[0] == layers[1] and rows[0] == rows[1] and mask[0] is mask[1]:
        return a, a
    return a, Network(model_b, "model_b", asked[1], model_a if shared else None)


class _Run:
    """The sums of all batches so far."""

    def __init__(self, a: Network, b: Network, kernels, unbiased: bool, backend: str, dtype):
        self.a, self.b, self.kernels, self.unbiased, self.dtype = a, b, kernels, unbiased, dtype
        self.backend, self.minimum = backend, minimum_rows(self.unbiased, True)
        self.same = b is a and kernels[0] is kernels[1]
        self.sums, self.seen, self.batches, self.rows, self.left_out = None, 0, 0, 0, 0
        self.said = False  # that a batch's own mask is used
        self.layers: dict[bool, sums.Layers | sums.Groups] = {}  # of the first network and of the second

    def add(self, batch, inputs):
        """`inputs`: what the models are called with, as a batch."""
        self.seen += 1
        A = self._features(self.a, (batch, inputs), self.kernels[0], True)
        B = A if self.same else self._features(self.b, (batch, inputs), self.kernels[1], False)
        if self.seen == 1:
            self._say_left_out()
        if A.n != B.n:
            raise ValueError(
                f"rows: model_a's layers give {A.n} rows, model_b's {B.n}: both must describe the same samples; "
                "rows='flatten', 'gap' (maps) or 'mean' (tokens) gives one a sample"
            )
        if A.n < self.minimum:
            self._too_small(A.n)
            return
        with without_autocast(device_type(A.units)):
            h = sums.hsics(A, A, A.budget()) if self.same else B.hsics()
        rows, columns = self.a.order(), self.b.order()
        batch = stream.terms(h.kl[rows][:, columns], h.kk[rows][:, None], h.ll[columns])
        self.sums = batch if self.sums is None else self.sums.add_(batch)
        self.batches, self.rows = self.batches + 1, self.rows + A.n

    def _features(self, net: Network, batch, kernel, first: bool):
        arguments, options = arguments_of(batch[1], net.model, net.name)
        mask = self._mask(net, *batch)
        device = device_of(net.model)
        if device is not None:
            arguments, options, mask = (moved(value, device) for value in (arguments, options, mask))
        if first not in self.layers:
            if first:
                together = len(net) + (0 if self.same else sums.group(len(self.b)))
                problem, centre = sums.problem_of(self.kernels, self.unbiased), self._centring(arguments, options)
                self.layers[first] = sums.Layers(len(net), together, kernel, problem, self.dtype, True, centre)
            else:
                self.layers[first] = sums.Groups(self.layers[True], len(net), kernel)
        self.layers[first].clear()
        return net.features(arguments, options, mask, self.layers[first])

    def _mask(self, net: Network, batch, inputs):
        mask = masks.mask_of(net.mask, batch, inputs, net.rows)
        if net.mask is None and mask is not None and not self.said:
            self.said = True
            checks.warn(
                f"loader's batches carry {masks.KEY}: tokens that it leaves out do not count (mask={masks.KEY!r} asks "
                "for this, mask=False for all tokens)"
            )
        return mask

    def _say_left_out(self):
        said = {net.name: net.why_left_out() for net in (self.a, self.b)}
        if len(said) == 2 and len(set(said.values())) == 1:
            said = {"both models": said[self.a.name]}
        text = "; ".join(f"of {name} {why}" for name, why in said.items() if why)
        if text:
            checks.warn(f"left out of the comparison: {text}")

    def _centring(self, arguments, options):
        tensor = next((t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)), torch.empty(0))
        return sums.centring(sums.choose_backend(self.backend, tensor))

    def _too_small(self, n: int):
        if self.seen == 1:
            raise ValueError(
                f"loader's first batch gives {n} rows, and CKA with unbiased={self.unbiased} needs at least "
                f"{self.minimum}: use a larger batch_size"
            )
        self.left_out += 1
        if self.left_out == 1:
            checks.warn(
                f"loader's batch {self.seen} gives {n} rows and {self.minimum} are needed: it is left out, as are "
                "others like it (drop_last=True in the data loader avoids it)"
            )

    def result(self, kernel) -> Comparison:
        if not self.batches:
            raise ValueError("loader gave no batch: it is empty, or an iterator that was used up before")
        total = self.sums.cpu()
        return Comparison(
            cka=stream.value(total),
            standard_error=stream.standard_error(total, self.batches),
            labels_a=tuple(self.a.called),
            labels_b=tuple(self.b.called),
            rows=self.rows,
            batches=self.batches,
            kernel=repr(kernel),
            unbiased=self.unbiased,
        )


def _bar(loader, progress: bool):
    if not progress:
        return loader
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return loader
    return tqdm(loader, desc="comparing", unit="batch", dynamic_ncols=True)
