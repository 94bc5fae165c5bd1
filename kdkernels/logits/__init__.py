# SPDX-License-Identifier: Apache-2.0
"""Mixup of a batch, the tempered divergence of logits, and the loss that joins both."""

from .linear import LinearLogits
from .mixup import MixupBatch
from .op import distillation_kl, generalized_jsd, mixed_distillation, mixup
from .topk import TopKLogits

__all__ = [
    "LinearLogits",
    "MixupBatch",
    "TopKLogits",
    "distillation_kl",
    "generalized_jsd",
    "mixed_distillation",
    "mixup",
]
