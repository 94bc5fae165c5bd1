# SPDX-License-Identifier: Apache-2.0
"""Liger's distillation losses with their arguments, defaults and endpoints, computed by kdkernels on any device.

    from kdkernels.compat.liger import LigerFusedLinearJSDLoss  # in place of: from liger_kernel.chunked_loss import
    from kdkernels.compat.liger import LigerFusedLinearJSD      # in place of: from liger_kernel.transformers import

Written against liger-kernel 0.8.5. Hidden states are [BT, H], heads [V, H], labels [BT] with ignore_index where a token
does not count; all are means over those that do. beta = 0 is KL(p_t || p_s) and 1 is KL(p_s || p_t); no temperature^2.

What differs: logits of half tensors are float32, not rounded, and the loss is float32; a token that does not count may
hold NaN; a frozen head costs no product; a head of more classes than the other is refused, where the original gives the
student's missing ones the logit 0, and with it probability (log 2 for a student equal to its teacher): cut both to the
classes that exist, `weight[:n]`. Labels out of range raise on a CPU. No gradient to the teacher. compiled and
accum_dtype are taken and change nothing: sums are float32. Rows are taken by their bytes; another chunk_size than the
default is the number at a time.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from .. import checks
from ..autograd import at_least_float32
from ..logits import LinearLogits
from ..logits.call import Measure
from ..logits.checks import check_inside, check_labels, check_tau
from ..logits.op import Asked, any_divergence, kind, measure_of
from ..losses.rows import over_heads, rows_of
from .shared import shared
from .trl import jensen_shannon

__all__ = ["LigerFusedLinearCosineSimilarityLoss", "LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerJSD"]

CHUNK_SIZE = 1024  # Liger's default, which asks for nothing here


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """weight_hard_loss CE(labels, p_s) + weight_soft_loss JSD(beta) of the softmaxes at the temperature, by one pass.

    With return_soft_hard_loss=True also both terms, detached, for which it takes two passes. The cross-entropy is at
    the temperature 1, as in the original.

    >>> from kdkernels.compat.liger import LigerFusedLinearJSDLoss
    >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 100, bias=False)
    >>> teacher, labels = (torch.randn(8, 32), torch.randn(100, 32)), torch.randint(100, (8,))
    >>> LigerFusedLinearJSDLoss(beta=0.1)(hidden, head.weight, *teacher, labels).backward()
    """

    cosine = False

    def __init__(
        self,
        weight_hard_loss=0.5,
        weight_soft_loss=0.5,
        beta=0.5,
        ignore_index=-100,
        temperature=1.0,
        compiled=True,
        chunk_size=CHUNK_SIZE,
        return_soft_hard_loss=False,
    ):
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature = ignore_index, check_tau(temperature)
        self.compiled, self.chunk_size, self.return_soft_hard_loss = compiled, chunk_size, return_soft_hard_loss
        self._measure()

    def forward(
        self,
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        true_labels,
        student_bias=None,
        teacher_bias=None,
    ):
        pair = heads((student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias))
        rows = rows_of(pair[0], "mean", labels=true_labels, ignore_index=self.ignore_index, **NO_OTHERS)
        labels = torch.where(rows.mask, true_labels, 0)
        check_labels(labels, len(labels), pair[0].shape[-1], labels, "true_labels", "student_input")

        def value(hard, soft):
            numbers = hard, soft * (self.beta if self.cosine else 1), self.cosine, *self._measure()
            asked = Asked("hard and soft", numbers, "auto", chunk=chunk_of(self.chunk_size))
            return over_heads(pair, rows, asked, labels)

        if not self.return_soft_hard_loss:
            return value(self.weight_hard_loss, self.weight_soft_loss)
        soft, hard = value(0.0, 1.0), value(1.0, 0.0)
        return self.weight_hard_loss * hard + self.weight_soft_loss * soft, soft.detach(), hard.detach()

    def _measure(self) -> Measure:
        if self.cosine:  # which the temperature does not change
            return measure_of("forward", 1.0)
        how = jensen_shannon(self.beta)
        if "beta" in how:
            check_inside(self.beta, "beta", ", or an end")
        return measure_of(how["divergence"], self.temperature, beta=self.beta)


class LigerFusedLinearCosineSimilarityLoss(LigerFusedLinearJSDLoss):
    """weight_hard_loss CE(labels, p_s) + weight_soft_loss beta (1 - cosine of the rows of logits), by one pass.

    >>> from kdkernels.compat.liger import LigerFusedLinearCosineSimilarityLoss
    >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 100, bias=False)
    >>> teacher, labels = (torch.randn(8, 32), torch.randn(100, 32)), torch.randint(100, (8,))
    >>> LigerFusedLinearCosineSimilarityLoss()(hidden, head.weight, *teacher, labels).backward()
    """

    cosine = True


class LigerFusedLinearJSD(torch.nn.Module):
    """JSD(jsd_beta) of the softmaxes at the temperature, straight from hidden states and heads.

    >>> from kdkernels.compat.liger import LigerFusedLinearJSD
    >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 100, bias=False)
    >>> LigerFusedLinearJSD(0.1)(hidden, head.weight, torch.randn(8, 32), torch.randn(100, 32), None).backward()
    """

    def __init__(self, jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype=None):
        super().__init__()
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, check_tau(temperature)
        self.accum_dtype = accum_dtype

    def forward(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels=None):
        pair = heads((student_input, student_weight), (teacher_input, teacher_weight))
        loss = shared(student_input, "KDLoss", self.temperature, scale_tau=False, **jensen_shannon(self.jsd_beta))
        return loss(*pair, labels=shift_labels, ignore_index=self.ignore_index)


class LigerJSD(torch.nn.Module):
    """JSD(beta) of log-probabilities log_q, the student's, and log_p, the teacher's, [BT, V].

    They must be normalised: here both are logits, whose softmax they are. So the gradient is that of the original less
    its projection on the softmax, which is what log_softmax makes of the original's.

    >>> from kdkernels.compat.liger import LigerJSD
    >>> student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
    >>> LigerJSD(beta=0.1)(student.log_softmax(-1), teacher.log_softmax(-1)).backward()
    """

    def __init__(self, beta=0.5, ignore_index=-100):
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q, log_p, shift_labels=None):
        loss = shared(log_q, "KDLoss", 1.0, **jensen_shannon(self.beta))
        return loss(log_q, log_p, labels=shift_labels, ignore_index=self.ignore_index)


NO_OTHERS = {"mask": None, "token_weights": None, "normalizer": None}


def heads(student, teacher):
    """Both as `kd.LinearLogits` of the same rows and classes."""
    (x, w, *_), (y, v, *_) = student, teacher
    for tensor, name in ((x, "student_input"), (w, "student_weight"), (y, "teacher_input"), (v, "teacher_weight")):
        checks.floating(tensor, name)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"teacher_input has shape {tuple(y.shape)}, student_input {tuple(x.shape)}: give the same rows"
        )
    if w.shape[0] != v.shape[0]:
        raise ValueError(
            f"teacher_weight has {v.shape[0]} classes, student_weight {w.shape[0]}: cut both to those that exist, "
            "weight[:n]; zeros in the place of missing logits would get probability"
        )
    return LinearLogits(*student), LinearLogits(*teacher).detach()


def chunk_of(chunk_size):
    return None if chunk_size == CHUNK_SIZE else chunk_size


@kind("hard and soft")
def _hard_and_soft(z, y, labels, _, __, numbers, backend):
    hard, soft, cosine, *how = numbers
    how, z, terms = Measure(*how), z.to(at_least_float32(z)), []
    if hard:
        terms.append(hard * (z.logsumexp(-1) - z.gather(-1, labels[:, None])[:, 0]))
    if soft and cosine:
        terms.append(soft * (1 - cosine_similarity(z, y.to(z.dtype), dim=-1)))
    elif soft:
        terms.append(any_divergence(z, y, how, None, "none", backend, factor=soft * how.tau**-2))
    return sum(terms) if terms else 0 * z[:, 0]
