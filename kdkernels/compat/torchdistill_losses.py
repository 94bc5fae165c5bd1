# SPDX-License-Identifier: Apache-2.0
"""Losses of torchdistill 1.1.5 with its names, arguments, defaults and values, computed by kdkernels.

`torchdistill.replace` puts them in the places of its own. They are called (student_io_dict, teacher_io_dict, targets).
"""

from __future__ import annotations

from torch import nn

from ..autograd import at_least_float32
from .shared import check_reduction, kl_div, shared

__all__ = ["ATLoss", "ChSimLoss", "KDLoss", "PKTLoss", "RKDLoss"]


def recorded(io_dict, where):
    """The tensor at {path, io}, or the list of them."""
    if isinstance(where, (list, tuple)):
        return [recorded(io_dict, one) for one in where]
    return io_dict[where["path"]][where["io"]]


class _Loss(nn.Module):
    """`value` of what is recorded at two places."""

    def __init__(self, student_module_path, student_module_io, teacher_module_path, teacher_module_io):
        super().__init__()
        self.student = {"path": student_module_path, "io": student_module_io}
        self.teacher = {"path": teacher_module_path, "io": teacher_module_io}

    def forward(self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs):
        return self.value(recorded(student_io_dict, self.student), recorded(teacher_io_dict, self.teacher), targets)


class KDLoss(_Loss):
    """alpha CE + beta tau^2 KL(p_t || p_s) of logits [B, C, ...]; beta is 1 - alpha by default.

    Without targets, or with alpha 0 or none, it is the KL alone: neither beta nor tau^2. reduction: "batchmean" (the
    sum over B), "sum" or "mean" of the entries. The other arguments are those of nn.CrossEntropyLoss.
    """

    def __init__(
        self,
        student_module_path,
        student_module_io,
        teacher_module_path,
        teacher_module_io,
        temperature,
        alpha=None,
        beta=None,
        reduction="batchmean",
        **kwargs,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.temperature, self.alpha, self.reduction = temperature, alpha, check_reduction(reduction)
        self.beta = 1 - alpha if beta is None else beta
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def value(self, student, teacher, targets):
        soft = kl_div(student, teacher, self.temperature, self.reduction)
        if not self.alpha or targets is None:
            return soft / self.temperature**2
        hard = self.cross_entropy_loss(student.to(at_least_float32(student)), targets)
        return self.alpha * hard + self.beta * soft


class PKTLoss(_Loss):
    """`kd.losses.PKTLoss` of features [B, d]; eps must be the default."""

    def __init__(self, student_module_path, student_module_io, teacher_module_path, teacher_module_io, eps=1e-7):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        if eps != 1e-7:
            raise ValueError(f"eps is {eps!r}: only eps=1e-7, the default, is computed here")

    def value(self, student, teacher, targets):
        return shared(student, "PKTLoss")(student, teacher)


class RKDLoss(_Loss):
    """dist_factor times the distances of features [B, ...], angle_factor times the angles. `kd.losses.RKDLoss`.

    Memory B x B, where the original stores B x B x d and B^3. reduction: "mean" or "sum", over B^2 pairs and B^3
    triples. A batch of one gives 0 and warns once (there NaN).
    """

    def __init__(self, student_output_path, teacher_output_path, dist_factor, angle_factor, reduction, **kwargs):
        super().__init__(student_output_path, "output", teacher_output_path, "output")
        self.factors = {"RKDDistanceLoss": dist_factor, "RKDAngleLoss": angle_factor}
        self.reduction = check_reduction(reduction, ("mean", "sum"))

    def value(self, student, teacher, targets):
        rows = student.flatten(1), teacher.flatten(1)
        total = 0
        for power, (name, factor) in zip((2, 3), self.factors.items(), strict=True):
            if factor:
                count = len(student) ** power if self.reduction == "sum" else 1
                total = total + factor * count * shared(student, name)(*rows)
        return total


class _PairsLoss(nn.Module):
    """The sum of `value` over pairs {name: {student: {path, io}, teacher: {path, io}, weight: 1 by default}}."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        total = 0
        for pair in self.pairs.values():
            student, teacher = recorded(student_io_dict, pair["student"]), recorded(teacher_io_dict, pair["teacher"])
            total = total + pair.get("weight", 1) * self.value(student, teacher)
        return total


class ATLoss(_PairsLoss):
    """`kd.losses.ATLoss` of pairs of maps [B, C, H, W]; mode must be "code", the default."""

    def __init__(self, at_pairs, mode="code", **kwargs):
        super().__init__(at_pairs)
        if mode != "code":
            raise ValueError(f"mode is {mode!r}: only mode='code', the default, is computed here")

    def value(self, student, teacher):
        return shared(student, "ATLoss")(student, teacher)


class ChSimLoss(_PairsLoss):
    """`kd.losses.ICKDLoss` of pairs of maps [B, C, H, W], divided by B once more, as there."""

    def __init__(self, feature_pairs, **kwargs):
        super().__init__(feature_pairs)

    def value(self, student, teacher):
        return shared(student, "ICKDLoss")(student, teacher) / len(student)
