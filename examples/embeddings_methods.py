# SPDX-License-Identifier: Apache-2.0
"""The losses that distill_embeddings.py compares. A student of another width needs a projection, or relations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from embeddings_student import similarities
from torch import nn

from kdkernels import losses


class On(nn.Module):
    """The loss on what `view` makes of both sides."""

    def __init__(self, view: Callable, loss: nn.Module):
        super().__init__()
        self.view, self.loss = view, loss

    def forward(self, student, teacher):
        return self.loss(self.view(student), self.view(teacher))


class Projected(nn.Module):
    """The usual way: a learned projection to the teacher's width."""

    def __init__(self, widths: tuple[int, int], distance: Callable):
        super().__init__()
        self.project, self.distance = nn.Linear(*widths, bias=False), distance

    def forward(self, student, teacher):
        return self.distance(self.project(student), teacher)


class Principal(nn.Module):
    """MSE to the teacher's principal components, as many as the student is wide: nothing to learn."""

    def __init__(self, width: int, teacher):
        super().__init__()
        self.register_buffer("basis", torch.linalg.svd(teacher, full_matrices=False)[2][:width].T.contiguous())

    def forward(self, student, teacher):
        return (student - teacher @ self.basis).square().sum(1).mean()


class Both(nn.Module):
    """A projecting loss, and `weight` times a relational one."""

    def __init__(self, projected: Projected, relational: nn.Module, weight: float):
        super().__init__()
        self.projected, self.relational, self.weight = projected, relational, weight
        self.project = projected.project

    def forward(self, student, teacher):
        return self.projected(student, teacher) + self.weight * self.relational(student, teacher)


def unit(x):
    return F.normalize(x, dim=1)


def squared(student, teacher):
    return (student - teacher).square().sum(1).mean()


def cosine(student, teacher):
    return (1 - F.cosine_similarity(student, teacher)).mean()


def neighbours(tau: float, weight: float) -> nn.Module:
    """KL of the distributions over the other sentences of a batch."""
    return On(similarities, losses.KDLoss(tau=tau, weight=weight))


def on_unit(name: str, *positional, **options) -> Callable:
    """(width, teacher) -> a loss of the package on rows of length 1."""
    return lambda width, teacher: On(unit, getattr(losses, name)(*positional, **options))


def projected(distance: Callable) -> Callable:
    return lambda width, teacher: Projected((width, teacher.shape[1]), distance)


def of_ranks(spearman: float) -> Callable:
    """CMKD on rows of similarities; the rest of it is Pearson's correlation."""
    return lambda width, teacher: On(similarities, losses.CMKDLoss(spearman_share=spearman))


class Method(NamedTuple):
    title: str
    make: Callable  # (width, the teacher's training rows) -> loss(student, teacher)
    rate: float  # of Adam at its highest: the best of RATES by `--tune`
    baseline: bool = False


RATES = (0.005, 0.01, 0.02, 0.04)
# Adam sees no factor of a loss that stands alone but for its epsilon, which gradients are to be far above: so what is
# tuned is the rate
METHODS = {
    "projection-mse": Method("projection + MSE", projected(squared), 0.04, baseline=True),
    "projection-cosine": Method("projection + cosine", projected(cosine), 0.01, baseline=True),
    "pca": Method("MSE to the teacher's PCA", Principal, 0.02, baseline=True),
    "kl-05": Method("KL of similarities, tau 0.05", lambda w, t: neighbours(0.05, 400.0), 0.01),
    "kl-10": Method("KL of similarities, tau 0.1", lambda w, t: neighbours(0.1, 100.0), 0.01),
    "cmkd": Method("CMKD of similarities", of_ranks(0.5), 0.01),
    "spearman": Method("Spearman of similarities", of_ranks(1.0), 0.01),
    "sp": Method("SP", lambda w, t: losses.SPLoss(weight=3000.0), 0.01),
    "pkt": Method("PKT", lambda w, t: losses.PKTLoss(weight=30000.0), 0.01),
    "cka-cosine": Method("CKA of unit rows, uncentred", on_unit("CKALoss", unbiased=False, center=False), 0.01),
    "cka-linear": Method("CKA, linear", lambda w, t: losses.CKALoss(), 0.01),
    "cka-rbf": Method("CKA of unit rows, rbf", on_unit("CKALoss", kernel="rbf"), 0.01),
    "cc": Method("CC", lambda w, t: losses.CCLoss("taylor", gamma=0.4, order=2, weight=1000.0), 0.01),
    "rkd": Method("RKD distance, unit rows", on_unit("RKDDistanceLoss", weight=25.0), 0.04),
    "gram": Method("MSE of cosines", on_unit("GramMSELoss", weight=100.0), 0.02),
    "cosine-kl": Method(
        "projection + cosine + 0.3 KL",
        lambda w, t: Both(Projected((w, t.shape[1]), cosine), neighbours(0.1, 100.0), 0.3),
        0.01,
    ),
}
