# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch count: by a tensor, by a key of the batch, or by a function of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import checks
from ..gram.call import check_mask

KEY = "attention_mask"  # what a batch of padded tokens carries
PADDED = ("tokens", "mean")  # rows in which padding would count


def check_asked(mask):
    if not (mask is None or mask is False or isinstance(mask, (torch.Tensor, str)) or callable(mask)):
        raise TypeError(
            f"mask is a {type(mask).__name__}: give a bool tensor, a key of the batch, a function of the batch, False, "
            "or a pair of them"
        )


def mask_of(asked, batch, inputs, rows: str | None):
    """The mask of a batch, bool, or None where everything counts. `inputs`: what the models are called with."""
    if asked is False or (asked is None and rows not in PADDED):
        return None
    if asked is None or isinstance(asked, str):
        found = _fields(inputs) | _fields(batch)
        if isinstance(asked, str) and asked not in found:
            has = (
                f"has {', '.join(map(str, found))}" if found else f"is a {type(batch).__name__}: pass a function of it"
            )
            raise ValueError(f"mask is {asked!r}, and loader's batch {has}")
        mask = found.get(KEY if asked is None else asked)
    else:
        mask = asked if isinstance(asked, torch.Tensor) else asked(batch)
    return None if mask is None else _as_bool(mask)


def _fields(batch) -> dict:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return dict(batch) if isinstance(batch, Mapping) else {}


def _as_bool(mask):
    checks.is_tensor(mask, "mask")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):  # labels, or what is added to logits
        raise ValueError(
            f"mask is {mask.dtype} and holds other numbers than 0 and 1: pass bool, True for what counts, e.g. "
            "lambda batch: batch['labels'] != -100"
        )
    return mask.bool()


def fitted(mask, output):
    """The mask of a layer's output: [B, d] counts where any token of its sample does, [B T, d] token by token."""
    if mask is None:
        return None
    mask = mask.to(output.device)
    if output.dim() != 2 or mask.dim() == 1:
        return mask
    return mask.flatten() if mask.numel() == len(output) else mask.flatten(1).any(1)


def places(mask) -> torch.Tensor:
    """Of what counts; a CUDA device is waited for, once a batch."""
    return mask.nonzero()[:, 0]


def counted(layers: list, mask) -> list:
    """The rows of features [n, p] that count, for a bool mask [n] or None; what is one tensor stays one."""
    if mask is None:
        return layers
    check_mask(mask, layers[0], "mask")
    index = places(mask)
    rows = {key: x.index_select(0, index) for key, x in {id(x): x for x in layers}.items()}
    return [rows[id(x)] for x in layers]
