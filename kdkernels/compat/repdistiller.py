# SPDX-License-Identifier: Apache-2.0
"""The loss classes of RepDistiller's distiller_zoo with its names, arguments and results, computed by kdkernels.

    from kdkernels.compat.repdistiller import NSTLoss   # in place of: from distiller_zoo import NSTLoss

Constructors, methods, formulas and what is returned are the original's: `Attention`, `FSP`, `NSTLoss` and `Similarity`
take lists and return lists (of [1] tensors in `Similarity`), the others take tensors and return a scalar. The modules
have no parameters and an empty state dict. A longer list is cut to the shorter, as there. Of two heights the higher map
is pooled to H x H, H the lower height, as there; where that leaves two sizes, an error or worse there, to the lesser
height and width.

What differs: half inputs are computed in float32 and give float32. Only `DistillKL` has a gradient to the teacher; in
the others the teacher is detached, which RepDistiller's training loop does itself. Second derivatives raise, except in
`Attention`, `FSP` and `Correlation`. Nothing waits for the GPU or changes its input. Where the
original is NaN or wrong the classes say so. ABLoss, FactorTransfer, HintLoss, KDSVD and VIDLoss have no counterpart
here: keep the original's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import normalize

from ..autograd import at_least_float32
from . import mdistiller
from .shared import kl_div, shared

__all__ = ["FSP", "PKT", "Attention", "Correlation", "DistillKL", "NSTLoss", "RKDLoss", "Similarity"]


class DistillKL(nn.Module):
    """T^2 KL(p_t || p_s), summed over logits [B, C, ...] and divided by B. `kd.losses.KDLoss`.

    >>> from kdkernels.compat.repdistiller import DistillKL
    >>> DistillKL(4)(torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)).backward()
    """

    def __init__(self, T: float):
        super().__init__()
        self.T = T

    def forward(self, y_s: torch.Tensor, y_t: torch.Tensor) -> torch.Tensor:
        return kl_div(y_s, y_t, self.T)


class Similarity(nn.Module):
    """Similarity-preserving loss: a list of [1] tensors, one a pair of features [B, ...]. `kd.losses.SPLoss`."""

    def forward(self, g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]  # noqa: B905

    def similarity_loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return mdistiller.similarity_loss(f_s, f_t)


class Attention(nn.Module):
    """Attention transfer: a list of scalars, one a pair of maps [B, C, H, W]. `kd.losses.ATLoss`.

    The map is the mean of |f|^p, the paper's: for odd p the original keeps the sign of negative features, for other p
    it is NaN there.
    """

    def __init__(self, p: float = 2):
        super().__init__()
        self.p = p

    def forward(self, g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]  # noqa: B905

    def at_loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return mdistiller.single_stage_at_loss(f_s, f_t, self.p)

    def at(self, f: torch.Tensor) -> torch.Tensor:
        """The attention map [B, H W] of f [B, C, H, W], of norm 1."""
        return normalize((f if self.p == 2 else f.abs()).pow(self.p).mean(1).flatten(1))


class NSTLoss(nn.Module):
    """Neuron selectivity transfer: a list of scalars, one a pair of maps [B, C, H, W]. `kd.losses.NSTLoss`.

    Never B x C x C x HW, the tensor with which the original runs out of memory.
    """

    def forward(self, g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self.nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]  # noqa: B905

    def nst_loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return mdistiller.single_stage_nst_loss(f_s, f_t)

    def poly_kernel(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return mdistiller.poly_kernel(a, b)


class FSP(nn.Module):
    """Flow of solution procedure: a list of scalars, one a pair of consecutive maps. `kd.losses.FSPLoss`.

    s_shapes, t_shapes: shapes of the maps [B, C, H, W] of both sides; other channels raise ValueError, as there.
    """

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]):
        super().__init__()
        # the original's exceptions
        if len(s_shapes) != len(t_shapes):
            raise AssertionError("unequal length of feat list")
        if [shape[1] for shape in s_shapes] != [shape[1] for shape in t_shapes]:
            raise ValueError("num of channels not equal (error in FSP)")

    def forward(self, g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(_consecutive(g_s), _consecutive(g_t))  # noqa: B905
        return [shared(s[0], "FSPLoss")(s, t) for s, t in pairs]

    @staticmethod
    def compute_fsp(g):
        """The flows of maps g: one [B, C of the next map, C of the map] a pair, products averaged over positions."""
        return [top.flatten(2) @ bot.flatten(2).mT / bot[0, 0].numel() for bot, top in _consecutive(g)]

    @staticmethod
    def compute_loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s - t).square().mean()


def _consecutive(g):
    return [list(mdistiller.to_lower(*g[i : i + 2])) for i in range(len(g) - 1)]


class RKDLoss(nn.Module):
    """w_d times the distance loss and w_a times the angle loss of features [B, ...]: a scalar. `kd.losses.RKDLoss`.

    Memory B x B, where the original stores B x B x d and B^3. A batch of one gives 0 and warns once (there NaN).
    Identical samples have distance 0 (there 1e-6, which counts in the mean distance that all are divided by).
    """

    def __init__(self, w_d: float = 25, w_a: float = 50):
        super().__init__()
        self.w_d = w_d
        self.w_a = w_a

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return mdistiller.rkd_loss(f_s, f_t, distance_weight=self.w_d, angle_weight=self.w_a)

    @staticmethod
    def pdist(e: torch.Tensor, squared: bool = False, eps: float = 1e-12) -> torch.Tensor:
        """Distances [B, B] of rows e [B, d], their squares at least eps (there those of Gram matrices); diagonal 0."""
        e = e.to(at_least_float32(e))
        distance = torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=eps**0.5)
        distance = distance.square() if squared else distance
        return distance.masked_fill(torch.eye(len(e), dtype=torch.bool, device=e.device), 0)


class PKT(nn.Module):
    """Probabilistic knowledge transfer between features [B, d]: a scalar. `kd.losses.PKTLoss`.

    A sample of zeros has the gradient 0 (there NaN); NaN features give NaN (there they are written over with zeros).
    """

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return self.cosine_similarity_loss(f_s, f_t)

    @staticmethod
    def cosine_similarity_loss(
        output_net: torch.Tensor, target_net: torch.Tensor, eps: float = 0.0000001
    ) -> torch.Tensor:
        return mdistiller.pkt_loss(output_net, target_net, eps)


class Correlation(nn.Module):
    """Correlation congruence between neighbours in the batch, embeddings [B, d] of one width. `kd.losses.CCLoss`.

    A batch of one gives 0 and warns once (there NaN).
    """

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        # the original sums over dimension 1 alone, and takes the mean over what follows it
        return shared(f_s, "CCLoss")(f_s.flatten(1), f_t.flatten(1)) / math.prod(f_s.shape[2:])
