# SPDX-License-Identifier: Apache-2.0
"""Mixup of a batch, the tempered divergence of logits, and the loss that joins both."""

from .mixup import MixupBatch
from .op import distillation_kl, generalized_jsd, mixed_distillation, mixup

__all__ = ["MixupBatch", "distillation_kl", "generalized_jsd", "mixed_distillation", "mixup"]
