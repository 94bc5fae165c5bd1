# SPDX-License-Identifier: Apache-2.0
"""TRL's generalised Jensen-Shannon loss with its arguments, defaults and endpoints, computed by kdkernels.

    from kdkernels.compat.trl import generalized_jsd_loss    # in place of: GKDTrainer.generalized_jsd_loss

In a trainer: `GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)`, or in a subclass of it. Written
against trl 1.16.0 (`trl.experimental.gkd`), whose GOLD and online distillation trainers have the same function.

What differs: half logits are computed in float32 and give float32; logits [B, T, V] are never copied, softened or
stored a second time; no gradient to the teacher (there it has one where it asks for it); reduction="none", which is an
array of the size of the logits, is refused; a mean of nothing is 0 (there reduction="mean" is NaN), and so is nothing
over num_items_in_batch = 0. Either side may be `kd.LinearLogits`, and the teacher `kd.TopKLogits` at the temperature.
"""

from __future__ import annotations

import torch

from ..losses.rows import tensor_of
from .shared import check_reduction, shared

__all__ = ["generalized_jsd_loss"]

IGNORED = -100


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s, of logits [B, T, V].

    beta = 0 is KL(p_t || p_s) and 1 is KL(p_s || p_t): the loss jumps there, as near an end it is beta, or 1 - beta,
    times these. Rows whose label is -100 do not count. "batchmean": the sum over the rows by the number of those that
    count, without labels by B, whatever T is; "mean": by the number of entries; num_items_in_batch, if given, is the
    divisor in the place of both. No temperature^2.

    >>> from kdkernels.compat.trl import generalized_jsd_loss
    >>> student, teacher = torch.randn(2, 5, 100, requires_grad=True), torch.randn(2, 5, 100)
    >>> generalized_jsd_loss(student, teacher, beta=0.1).backward()
    """
    check_reduction(reduction, ("batchmean", "sum", "mean"))
    like = tensor_of(student_logits)
    loss = shared(like, "KDLoss", temperature, scale_tau=False, reduction="sum", **jensen_shannon(beta))
    total = loss(student_logits, teacher_logits, labels=labels, ignore_index=IGNORED)
    counted = None if labels is None else (labels != IGNORED).sum().clamp_min(1)
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch, dtype=total.dtype, device=total.device)
        return total / torch.where(divisor == 0, torch.finfo(total.dtype).tiny, divisor)
    if reduction == "sum":
        return total
    if reduction == "mean":
        rows = like[..., 0].numel() if counted is None else counted
        return total / (rows * student_logits.shape[-1])
    return total / (max(student_logits.shape[0], 1) if counted is None else counted)


def jensen_shannon(beta) -> dict:
    """Options of `kd.losses.KDLoss`: TRL's and Liger's ends are the two KL divergences."""
    ends = {0: "forward", 1: "reverse"}
    return {"divergence": ends[beta]} if beta in ends else {"divergence": "jsd", "beta": beta}
