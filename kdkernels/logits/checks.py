# SPDX-License-Identifier: Apache-2.0
"""What the logits ops require of their arguments, with the family's own wording."""

from __future__ import annotations

import math

import torch

from .. import checks

REDUCTIONS = ("mean", "sum", "none")
MOST_CLASSES = 2**30  # positions in a row, one block past its end included, are int32


def check_logits(student, teacher, name: str = "teacher"):
    checks.floating(student, "student")
    checks.floating(teacher, name)
    checks.same_device(student, teacher, "student", name)
    if student.dim() == 0:
        raise ValueError("student is 0-d: give logits [..., C]")
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name} has shape {tuple(teacher.shape)}, student has {tuple(student.shape)}: "
            "both sides need the same rows and classes"
        )
    check_rows(student, teacher, "student", name)


def check_rows(student, teacher, *names: str):
    """What is left to require of logits of one shape."""
    checks.not_empty(student, names[0])
    if student.shape[-1] > MOST_CLASSES:
        raise ValueError(f"{names[0]} has {student.shape[-1]} classes: a row may have {MOST_CLASSES}")
    if checks.debugging():
        for side, name in zip((student, teacher), names, strict=True):
            for tensor in getattr(side, "tensors", (side,)):  # of LinearLogits
                checks.finite(tensor, name)


def check_tau(tau):
    if not (checks.is_number(tau) and 0 < tau < math.inf):
        raise ValueError(f"tau is {tau!r}: a temperature is a positive number")
    return float(tau)


def check_taus(tau, student, of: str = "student"):
    """A positive number, or a float tensor [] or one a row of student: (number, None) or (1, [R]), a constant."""
    if not isinstance(tau, torch.Tensor):
        return check_tau(tau), None
    check_tau_tensor(tau)
    rows = tuple(student.shape[:-1])
    if tau.dim() and tuple(tau.shape) != rows:
        raise ValueError(f"tau has shape {tuple(tau.shape)}: give one number, or one a row of {of}, {rows}")
    checks.same_device(student, tau, of, "tau")
    return 1.0, tau.detach().expand(rows).reshape(-1)


def check_tau_tensor(tau):
    if not tau.is_floating_point():
        raise TypeError(f"tau is {tau.dtype}: give a number, or a float tensor")
    if checks.may_read(tau) and not bool(((tau > 0) & tau.isfinite()).all()):
        raise ValueError("tau holds a value that is no positive number: temperatures are")


def check_inside(value, name: str, ends: str):
    """A number between 0 and 1; `ends` says what to take in their place."""
    if not (checks.is_number(value) and 0 < value < 1):
        raise ValueError(f"{name} is {value!r}: give a number in (0, 1){ends}")
    return float(value)


def check_fraction(value, name: str):
    if not (checks.is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} is {value!r}: give a number in [0, 1]")
    return float(value)


def check_reduction(reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: give one of {REDUCTIONS}")


def check_mix(mix) -> tuple[float, float, float]:
    """Weights of a distribution: not negative, sum 1."""
    fine = isinstance(mix, (tuple, list)) and len(mix) == 3 and all(checks.is_number(k) and k >= 0 for k in mix)
    if not fine or abs(sum(mix) - 1) > 1e-6:
        raise ValueError(f"mix is {mix!r}: give three weights k1, k2, k3 >= 0 that sum to 1")
    return tuple(map(float, mix))


def check_labels(labels, rows: int, classes: int | None, like, name: str, of: str = "student"):
    checks.is_tensor(labels, name)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} is {labels.dtype}: give class indices, e.g. {name}.argmax(-1) of one-hot rows")
    if labels.dim() != 1 or labels.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}: one class index a row of {of} is ({rows},)")
    checks.same_device(like, labels, of, name)
    if classes is not None and checks.may_read(labels) and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"{name} holds {_outside(labels, classes)}: classes are 0 to {classes - 1}")


def _outside(labels, classes) -> int:
    return int(labels[(labels < 0) | (labels >= classes)][0])


def check_lam(lam, rows: int, like, of: str = "student"):
    """A number in [0, 1], or a float tensor [] or [rows] of such."""
    if not isinstance(lam, torch.Tensor):
        return check_fraction(lam, "lam")
    if not lam.is_floating_point():
        raise TypeError(f"lam is {lam.dtype}: give a number, or a float tensor")
    if lam.dim() and tuple(lam.shape) != (rows,):
        raise ValueError(f"lam has shape {tuple(lam.shape)}: give one number, or one a row of {of}, ({rows},)")
    checks.same_device(like, lam, of, "lam")
    if checks.may_read(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError("lam holds a value outside [0, 1]: it is the share of a row in its mixture")
    return lam.detach()


def check_permutation(permutation, rows: int, like, of: str = "student"):
    checks.is_tensor(permutation, "permutation")
    if permutation.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"permutation is {permutation.dtype}: give row indices, int64")
    if tuple(permutation.shape) != (rows,):
        raise ValueError(f"permutation has shape {tuple(permutation.shape)}: one row index a row of {of} is ({rows},)")
    checks.same_device(like, permutation, of, "permutation")
    if checks.may_read(permutation) and bool(((permutation < 0) | (permutation >= rows)).any()):
        raise ValueError(f"permutation holds {_outside(permutation, rows)}: rows are 0 to {rows - 1}")
