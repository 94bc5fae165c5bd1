# SPDX-License-Identifier: Apache-2.0
"""What the projection ops require of their tensors, with the family's own wording."""

from __future__ import annotations

from .. import checks

REDUCTIONS = ("mean", "sum", "none")


def check_channel_dim(x, channel_dim, name: str) -> int:
    """channel_dim counted from the front; dimension 0 is the batch."""
    checks.integer(channel_dim, "channel_dim", None, ", 1 for NCHW, -1 for tokens")
    if x.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: give [B, c], [B, c, ...], or tokens [B, T, c]")
    dim = channel_dim + x.dim() if channel_dim < 0 else channel_dim
    if not 1 <= dim < x.dim():
        raise ValueError(
            f"channel_dim is {channel_dim}: {name} has shape {tuple(x.shape)}, dimension 0 is the batch, "
            f"give one from 1 to {x.dim() - 1}"
        )
    return dim


def check_call(s, t, basis, channel_dim, reduction, mask) -> int:
    """Raises for what `projected_mse` cannot take; returns channel_dim counted from the front."""
    for tensor, name in ((s, "s"), (t, "t"), (basis, "basis")):
        checks.floating(tensor, name)
    checks.same_device(s, t, "s", "t")
    checks.same_device(s, basis, "s", "basis")
    if s.shape != t.shape:
        raise ValueError(
            f"t has shape {tuple(t.shape)}, s has {tuple(s.shape)}: one basis projects both, so they must agree "
            "(a student of another width goes through an adapter first)"
        )
    dim = check_channel_dim(s, channel_dim, "s")
    if s[:0].numel() or 0 in s.shape[1:]:
        raise ValueError(f"s has shape {tuple(s.shape)}: it needs channels and positions")
    check_basis(basis, s.shape[dim], "s")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: give one of {REDUCTIONS}")
    if mask is not None:
        check_mask(mask, s, dim)
    for tensor, name in ((s, "s"), (t, "t"), (basis, "basis")):
        checks.finite(tensor, name)
    return dim


def check_basis(basis, channels: int, name: str):
    if basis.dim() != 2:
        raise ValueError(f"basis has shape {tuple(basis.shape)}: give [c, k], a column for each direction")
    if basis.shape[0] != channels:
        raise ValueError(f"basis has {basis.shape[0]} rows, {name} has {channels} channels: a basis is [channels, k]")
    _check_size(basis.shape[1], channels, "basis has {} columns")


def check_count(k, channels: int):
    checks.integer(k, "k", None)
    _check_size(k, channels, "k is {}")


def _check_size(k, channels: int, what: str):
    if not 1 <= k <= channels:
        raise ValueError(f"{what.format(k)}: a subspace of {channels} channels has between 1 and {channels} dimensions")


def check_mask(mask, s, dim: int):
    checks.boolean(mask, s, "s")
    # not `i in (0, dim)`: Dynamo has no equality there for a symbolic dim
    where = (s.shape[0], *(n for i, n in enumerate(s.shape) if i != 0 and i != dim))
    if tuple(mask.shape) not in ((s.shape[0],), where):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: give one entry a sample, ({s.shape[0]},), or a position, {where}"
        )


def mask_of_positions(mask, s, dim: int):
    """The mask as [B, p]."""
    if mask is None:
        return None
    count = s[:1].numel() // s.shape[dim] if s.shape[0] else 1
    return mask.reshape(s.shape[0], -1).expand(-1, count) if s.shape[0] else mask.new_empty((0, count))
