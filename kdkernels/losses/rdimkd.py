# SPDX-License-Identifier: Apache-2.0
"""RdimKD: L2 between two feature maps inside one fixed subspace of their channels, straight from NCHW or tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .. import checks, distributed
from .._types import Backend, Mask, Result, RowsOf
from ..accumulator import summed
from ..autograd import at_least_float32
from ..distributed import GroupLike
from ..projection import StreamingPCA, autoencoder_basis, random_basis
from ..projection.checks import check_mask, mask_of_positions
from ..projection.op import projected_mse
from .base import (
    Loss,
    as_rows,
    check_pair,
    check_rows,
    constant,
    full_precision,
    zero_where_masked,
)
from .product import product

VARIANTS = ("P", "A", "R")
NORMALIZERS = ("mean", "variance")


class RdimKDLoss(Loss):
    """Distillation in fewer dimensions (RdimKD): features compared after one projection of both sides.

    |(F_s - F_t) P|_F^2 / norm over all positions, P [c, k] fixed: one projection for both sides.

    Source: RdimKD, arXiv 2312.08700. From the paper: the projection of both sides by one matrix, the L2 distance, the
    three choices of P, the 1x1 convolution where the student is narrower. Its code is not public: k, the weight, the
    layers and the norm are ours, and so is how P is fitted.

    variant "P": the k principal directions of the teacher's channels (streaming covariance). "A": the encoder of a
    linear autoencoder trained on the teacher's features (on their covariance, which is the same loss, see
    `kd.autoencoder_basis`). "R": random orthonormal columns, ready at once. P and A need the teacher's features once:
    `loss.observe(teacher_features)` for some batches, then `loss.fit()`.

    Args:
        channels: c, the teacher's. k: directions kept, at most c.
        variant: "P", "A" or "R".
        student_channels: None: the student has c channels. A number: it goes through a trained 1x1 convolution with
            bias to c channels first; give `loss.parameters()` to the optimiser too.
        normalizer: "mean": rows times k. "variance": also times the mean variance of the teacher along the k
            directions, so that 1 is the distance of a student that knows only the mean; R then needs a fit too. A
            teacher without variance (all zero) is divided by 1.
        rows: [B, T, d]: "tokens" or "mean", needed. [B, C, H, W]: "positions" (the default here) or "gap"; [B, C, L]:
            "positions". Features [B, c] need none. May also be given in the call.
        seed: of R, and of the start of A; None draws from PyTorch's generator.
        pca: a `kd.StreamingPCA` that has seen the teacher's features: the loss is fitted at once (with `group` by
            `fit()`, which all ranks call), and observes into it. weight: factor of the loss, a buffer.
        group: None, or "world" or a process group: the batch is that of all its ranks, see below.
        backend: as in `kd.projected_mse`.

    Call: `(student_features, teacher_features, *, mask, rows, return_parts)`: the same positions on both sides, float
    dtypes may differ; computed in at least float32. mask: bool [B], or one entry a position or token: False rows do not
    count and get no gradient; all masked gives 0. An empty batch gives 0 with zero gradient and warns once. Gradient to
    the student and the adapter. Buffers: `basis` [c, k], `scale`, and the accumulator `pca` of P and A.

    With `group=` the mean is over the rows of all ranks, however they are spread: one value on all of them, whose
    gradient, averaged over the ranks, is that of one process; 16 bytes a rank, and backward, 224 to agree. Each rank
    observes its own batches; `fit()`, called by all, is of what all of them have seen, and ends with the basis of the
    first rank: 8 (c^2 + c + 1) + 8 (c k + 1) bytes. R without a seed needs a fit then, as ranks draw differently.

    >>> teacher = torch.randn(8, 32, 7, 7)
    >>> loss = kd.losses.RdimKDLoss(32, 4, variant="P", student_channels=16)
    >>> loss.observe(teacher)
    >>> loss.fit()
    >>> student = torch.randn(8, 16, 7, 7, requires_grad=True)
    >>> loss(student, teacher).backward()
    """

    channels: int
    k: int
    seed: int | None
    pca: StreamingPCA
    adapter: nn.Linear | None

    def __init__(
        self,
        channels: int,
        k: int,
        *,
        variant: Literal["P", "A", "R"] = "P",
        student_channels: int | None = None,
        normalizer: Literal["mean", "variance"] = "mean",
        rows: RowsOf | None = None,
        seed: int | None = None,
        pca: StreamingPCA | None = None,
        weight: float = 1.0,
        group: GroupLike = None,
        backend: Backend = "auto",
    ):
        super().__init__(weight, group)
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}: give one of {VARIANTS}")
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer is {normalizer!r}: give one of {NORMALIZERS}")
        checks.integer(channels, "channels")
        if student_channels is not None:
            checks.integer(student_channels, "student_channels")
        if seed is not None:
            checks.integer(seed, "seed", 0)
        self.channels, self.k, self.variant, self.normalizer = channels, k, variant, normalizer
        self.rows, self.backend, self.seed = check_rows(rows), backend, seed
        self.pca = StreamingPCA(channels) if pca is None else checked_pca(pca, channels)
        self.register_buffer("basis", random_basis(channels, k, generator=self._generator()))
        self.register_buffer("scale", torch.ones(()))
        # P and A must not run on the random basis that stands here before the fit, nor each rank on its own one
        ready = variant == "R" and normalizer == "mean" and (group is None or seed is not None)
        self.register_buffer("fitted", torch.tensor(ready))
        self._ready = bool(self.fitted)
        self.adapter = None if student_channels is None else nn.Linear(student_channels, channels)
        if pca is not None and group is None:
            self.fit()

    def observe(self, teacher_features: torch.Tensor, *, mask: Mask = None, rows: RowsOf | None = None) -> None:
        """Adds a batch of the teacher's features to what `fit` reads."""
        x, dim, mask = self._view(teacher_features.detach(), mask, rows, "teacher_features")
        self.pca.update(x, channel_dim=dim, mask=mask)

    @torch.no_grad()
    def fit(self) -> None:
        """Sets the basis and the scale from what was observed; may be called again."""
        pca = self.pca if self.group is None else self.pca.merged(self.group, self)
        if self.variant == "P":
            self.basis.copy_(pca.components(self.k))
        elif self.variant == "A":
            self.basis.copy_(autoencoder_basis(pca.covariance(), self.k, generator=self._generator()))
        if self.normalizer == "variance":
            P = self.basis.double()
            variance = ((pca.covariance() @ P) * P).sum() / self.k
            self.scale.copy_(torch.where(variance > 0, variance, 1.0))
        if self.group is not None:
            handle = distributed.handle_of(self.group)
            first = torch.distributed.get_rank(handle) == 0
            own = (self.basis, self.scale) if first else (torch.zeros_like(self.basis), torch.zeros_like(self.scale))
            for buffer, found in zip((self.basis, self.scale), summed(own, handle), strict=True):
                buffer.copy_(found)
        self.fitted.fill_(True)
        self._ready = True

    def forward(
        self,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        *,
        mask: Mask = None,
        rows: RowsOf | None = None,
        return_parts: bool = False,
    ) -> Result:
        (s, t, kept, dim), group = self._compared(lambda: self._checked(student_features, teacher_features, mask, rows))
        if self._too_small(len(s) if group is None else group.total, 1):
            return self._nothing(["projected"], student_features, return_parts)
        with full_precision(s):
            if self.adapter is not None:
                s = adapted(s, self.adapter, dim, kept)
            how = {"channel_dim": dim, "mask": kept, "backend": self.backend}
            if group is None:
                value = projected_mse(s, t, self.basis, **how)
            else:
                value = self._mean_of_all(projected_mse(s, t, self.basis, reduction="sum", **how), s, dim, kept, group)
            if self.normalizer == "variance":
                value = value / self.scale.to(value.dtype)
        return self._total({"projected": value}, return_parts)

    def _compared(self, prepare):
        """What it makes, and the group whose ranks have compared the channels of theirs, or None."""
        if self.group is None:
            return prepare(), None

        def named():
            s, t, kept, dim = prepare()
            named = {"student_features": _first(s, dim), "teacher_features": _first(t, dim)}
            return (s, t, kept, dim), named | {"mask": None if kept is None else _first(kept)}

        handle = distributed.handle_of(self.group)
        view, rows = distributed.compare(named, handle, type(self).__name__, self)
        return view, distributed.Agreed(handle, rows["student_features"])

    def _mean_of_all(self, total, s, dim: int, kept, group):
        """The sum over the rows of all ranks by their number and k."""
        rows = total.new_full((), s.numel() // s.shape[dim], dtype=torch.float64)
        if kept is not None:
            rows = mask_of_positions(kept, s, dim).sum().double()
        both = group.sum(torch.stack([total.double(), rows]))
        return (both[0] / (both[1].clamp(min=1) * self.k)).to(total.dtype)

    def _checked(self, student_features, teacher_features, mask, rows):
        """(student, teacher, mask, channel dim) as `projected_mse` takes them."""
        names = check_pair(self, student_features, teacher_features, "features")
        if not self._ready:
            raise RuntimeError(
                f"variant {self.variant!r} with normalizer={self.normalizer!r} has nothing fitted yet: call "
                "loss.observe(teacher_features) for some batches, then loss.fit()"
            )
        s, dim, kept = self._view(student_features, mask, rows, names[0])
        t, _, _ = self._view(constant(teacher_features), mask, rows, names[1])
        for x, name, width in ((s, names[0], self._student_channels()), (t, names[1], self.channels)):
            if x.dim() <= dim or x.shape[dim] != width:
                found = f"{x.shape[dim]} channels" if x.dim() > dim else "no channels"
                raise ValueError(f"{name} has {found} in shape {tuple(x.shape)}, this loss was made for {width}")
        places = [tuple(n for i, n in enumerate(x.shape) if i != dim) for x in (s, t)]
        if places[0] != places[1]:
            raise ValueError(
                f"{names[1]} has samples and positions {places[1]}, {names[0]} {places[0]}: pool one side first, or "
                "compare means with rows='gap' or 'mean'"
            )
        return s, t, kept, dim

    def _view(self, x, mask, rows, name: str):
        """(features, channel dim, mask) as `projected_mse` takes them; means and flattened features as rows."""
        rows = self.rows if rows is None else check_rows(rows)
        if x.dim() == 2 or rows in ("flatten", "mean", "gap", "groups"):
            x, mask = as_rows(x, rows, mask, name)
            return x, x.dim() - 1, mask
        if rows is None and x.dim() == 3:
            as_rows(x, rows, mask, name)  # raises: [B, T, d] and [B, C, L] look alike
        if rows == "tokens" and x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)} with rows='tokens': tokens are [B, T, d]")
        dim = 2 if rows == "tokens" else 1
        if mask is not None:
            check_mask(mask, x, dim)
        return x, dim, mask

    def _generator(self):
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def _student_channels(self) -> int:
        return self.channels if self.adapter is None else self.adapter.in_features

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._ready = bool(self.fitted)

    def _shown(self):
        shown = {"channels": self.channels, "k": self.k, "variant": repr(self.variant)}
        return shown | {"normalizer": repr(self.normalizer), **({"rows": repr(self.rows)} if self.rows else {})}


def checked_pca(pca, channels: int) -> StreamingPCA:
    if not isinstance(pca, StreamingPCA):
        raise TypeError(f"pca is a {type(pca).__name__}: give a kd.StreamingPCA that has seen the teacher's features")
    if pca.num_channels != channels:
        raise ValueError(f"pca has {pca.num_channels} channels, this loss {channels}")
    return pca


def _first(x, dim: int = 0):
    """The first position of each sample, with all channels of dimension `dim`."""
    return x[tuple(slice(None) if i in (0, dim) else 0 for i in range(x.dim()))]


def adapted(s, adapter: nn.Linear, dim: int, mask):
    """The 1x1 convolution over channel dimension `dim`, in at least float32; masked rows enter it as 0."""
    dtype = at_least_float32(s)
    weight, bias = adapter.weight.to(dtype), adapter.bias.to(dtype)
    if mask is not None:
        # NaN under the mask would reach the gradient of the weight
        kept = mask.reshape(*mask.shape, *[1] * (s.dim() - 1 - mask.dim()))
        s = zero_where_masked(s.movedim(dim, -1), kept.expand(s.movedim(dim, -1).shape[:-1])).movedim(-1, dim)
    s = s.to(dtype)
    if dim == s.dim() - 1:
        return product(s.reshape(-1, s.shape[-1]), weight.mT).reshape(*s.shape[:-1], -1) + bias
    shape = (s.shape[0], weight.shape[0], *s.shape[2:])
    return (product(weight.expand(len(s), -1, -1), s.flatten(2)) + bias[:, None]).reshape(shape)
