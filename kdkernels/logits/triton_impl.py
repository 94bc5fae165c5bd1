# SPDX-License-Identifier: Apache-2.0
"""The family on a GPU: one launch for the loss of all rows, one for the gradient, one for the mixing of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .call import STUDENT, TEACHER, Extras, Problem, rows_of
from .triton_kernels import gradient_rows, loss_rows, mix_rows


class Config(NamedTuple):
    block: int  # columns a step
    warps: int


# (largest C, config) of both loss kernels; unmeasured: chosen for 64 bytes of spills at most on sm_80, sm_90 and sm_100
ROWS = (
    (128, Config(128, 1)),
    (512, Config(512, 4)),
    (1024, Config(1024, 8)),
    (1 << 31, Config(2048, 8)),
)
MIX = Config(1024, 4)


def row_config(C: int) -> Config:
    return next(config for limit, config in ROWS if C <= limit)


def _dense(t):
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _constants(problem: Problem, extras: Extras) -> dict:
    return {
        "SOFT": problem.soft,
        "HARD": problem.mixed and problem.hard,
        "LABELLED": problem.labelled,
        "PLAIN": problem.plain_target,
        "CLEAN": problem.cleaned,
        "HAS_LAM": extras.lam is not None,
    }


def _arguments(student, teacher, problem: Problem, extras: Extras):
    """Pointers and strides: what a kernel is told not to read gets the student's."""
    lam, clean = extras.lam, extras.clean
    fill = lambda t: student if t is None else t  # noqa: E731
    pointers = (fill(extras.labels), fill(extras.permuted), fill(lam), fill(clean), fill(extras.permutation))
    strides = (
        *(t.stride(0) if t.dim() == 3 else 0 for t in (student, teacher)),
        student.stride(-2),
        teacher.stride(-2),
        0 if clean is None else clean.stride(0),
        lam.stride(0) if lam is not None and lam.dim() else 0,
    )
    numbers = (problem.tau, 1 / problem.tau, *problem[1:-1])
    return pointers, strides, numbers


def forward(student, teacher, problem: Problem, extras: Extras, need: int):
    student, teacher, extras = _dense(student), _dense(teacher), extras._replace(clean=_dense(extras.clean))
    R, T, C = rows_of(student), *student.shape[-2:]
    value = student.new_empty(R, dtype=torch.float32)
    statistics = student.new_empty((problem.statistics, R) if need else (0,), dtype=torch.float32)
    pointers, strides, numbers = _arguments(student, teacher, problem, extras)
    config = row_config(C)
    with torch.cuda.device_of(student):  # a launch goes to the current device, wherever its tensors are
        loss_rows[(R,)](
            student, teacher, *pointers, value, statistics, R, T, C, *strides, *numbers,
            BLOCK=config.block, MIXED=problem.mixed, KEEP=need > 0, num_warps=config.warps,
            **_constants(problem, extras),
        )  # fmt: skip
    return value, statistics


def backward(grad, factor: float, student, teacher, statistics, problem: Problem, extras: Extras, need: int):
    """A row with grad 0 gets exactly 0, as in `torch_impl.backward`."""
    student, teacher, extras = _dense(student), _dense(teacher), extras._replace(clean=_dense(extras.clean))
    R, T, C = rows_of(student), *student.shape[-2:]
    d_student = student.new_empty((R, C) if need & STUDENT else (0,))
    d_teacher = teacher.new_empty((R, C)) if need & TEACHER else student.new_empty(0)
    pointers, strides, numbers = _arguments(student, teacher, problem, extras)
    config = row_config(C)
    with torch.cuda.device_of(student):
        gradient_rows[(R * triton.cdiv(C, config.block),)](
            grad, student, teacher, *pointers, statistics, d_student, d_teacher, R, T, C, grad.stride(0), *strides,
            factor, *numbers, BLOCK=config.block, STUDENT=need & STUDENT > 0, TEACHER=need & TEACHER > 0,
            num_warps=config.warps, **_constants(problem, extras),
        )  # fmt: skip
    return d_student, d_teacher


def lerp_rows(x, weight, other, index):
    x = x.contiguous()
    R, out = x.shape[0], torch.empty_like(x)
    width = x.numel() // R
    strides = (weight.stride(0) if weight.dim() else 0, other.stride(0) if other.dim() else 0)
    with torch.cuda.device_of(x):
        mix_rows[(R * triton.cdiv(width, MIX.block),)](
            x, out, weight, other, index, width, *strides, BLOCK=MIX.block, num_warps=MIX.warps
        )
    return out
