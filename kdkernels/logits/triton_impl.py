# SPDX-License-Identifier: Apache-2.0
"""The family on a GPU: one launch for the loss of all rows, one for the gradient, one for the mixing of a batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from ..checks import Recent
from ..triton_launch import PLANS, Launch, cdiv, layout, on_device_of
from .call import KEPT, Extras, Measure, Problem, rows_of
from .triton_divergence import MIXTURE, REVERSE, VARIATION, divergence_gradient_rows, divergence_rows
from .triton_kernels import gradient_rows, loss_rows, mix_rows
from .triton_kl import kl_again, kl_rows


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


class Pieces(NamedTuple):
    """Of rows in `kl_rows`."""

    rows: int  # of a program
    columns: int  # of a piece
    held: int  # pieces of a row in registers, all that it has; 0: they are read again
    warps: int
    registers: int | None = None  # of a thread, at most: with 128, 16 warps are on a multiprocessor


# by the model of an H200. one warp has a row, 32 logits of each side a lane, as long as it can: no barrier
KL = (
    *((columns, Pieces(512 // columns, columns, 1, 1)) for columns in (16, 64, 128, 256)),
    (512, Pieces(1, 256, 2, 1)),
    *((1024 * warps, Pieces(1, 256 * warps, 4, warps, 128)) for warps in (1, 2, 4, 8)),
    (1 << 31, Pieces(1, 1024, 0, 4)),
)


def row_config(C: int, table=None):
    return next(config for limit, config in table or ROWS if C <= limit)


def _dense(t):
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _constants(problem: Problem, extras: Extras) -> dict:
    return {
        "SOFT": problem.soft,
        "HARD": problem.hard,
        "LABELLED": problem.labelled,
        "PLAIN": problem.plain_target,
        "CLEAN": problem.cleaned(),
        "HAS_LAM": extras.lam is not None,
    }


def _strides(student, teacher):
    """From sample to sample, and from row to row, of both."""
    return *(t.stride(0) if t.dim() == 3 else 0 for t in (student, teacher)), student.stride(-2), teacher.stride(-2)


def _arguments(student, teacher, problem: Problem, extras: Extras):
    """Pointers and strides: what a kernel is told not to read gets the student's."""
    lam, clean = extras.lam, extras.clean
    fill = lambda t: student if t is None else t  # noqa: E731
    pointers = (fill(extras.labels), fill(extras.permuted), fill(lam), fill(clean), fill(extras.permutation))
    strides = (
        student.stride(0),
        teacher.stride(0),
        0 if clean is None else clean.stride(0),
        lam.stride(0) if lam is not None and lam.dim() else 0,
    )
    numbers = (problem.tau, 1 / problem.tau, *problem[1:-1])
    return pointers, strides, numbers


def forward(student, teacher, problem: Problem, extras: Extras, need: int):
    student, teacher, extras = _dense(student), _dense(teacher), extras._replace(clean=_dense(extras.clean))
    R, C = student.shape
    value = student.new_empty(R, dtype=torch.float32)
    statistics = student.new_empty((problem.statistics, R) if need else (0,), dtype=torch.float32)
    pointers, strides, numbers = _arguments(student, teacher, problem, extras)
    config = row_config(C)
    with torch.cuda.device_of(student):  # a launch goes to the current device, wherever its tensors are
        loss_rows[(R,)](
            student, teacher, *pointers, value, statistics, R, C, *strides, *numbers,
            BLOCK=config.block, KEEP=need > 0, num_warps=config.warps, **_constants(problem, extras),
        )  # fmt: skip
    return value, statistics


def backward(grad, factor: float, student, teacher, statistics, problem: Problem, extras: Extras, need: int):
    """A row with grad 0 gets exactly 0, as in `torch_impl.backward`."""
    student, teacher, extras = _dense(student), _dense(teacher), extras._replace(clean=_dense(extras.clean))
    R, C = student.shape
    out = student.new_empty((R, C))
    pointers, strides, numbers = _arguments(student, teacher, problem, extras)
    config = row_config(C)
    with torch.cuda.device_of(student):
        gradient_rows[(R * triton.cdiv(C, config.block),)](
            grad, student, teacher, *pointers, statistics, out, R, C, grad.stride(0), *strides, factor, *numbers,
            BLOCK=config.block, num_warps=config.warps, **_constants(problem, extras),
        )  # fmt: skip
    return out, student.new_empty(0)


def _form(how: Measure) -> int:
    """Which code of `class_of` runs."""
    if how.variation:
        return VARIATION.value
    return REVERSE.value if how.b == 1 else MIXTURE.value


def _numbers(how: Measure):
    b = min(max(how.b, 1e-30), 1 - 1e-16)  # at the ends the logs are not read
    return (*how[1:], math.log(b), math.log1p(-b))


class _KLRows:
    """Both launches of the forward divergence, for sides of these layouts: all but tensors and numbers is settled."""

    def __init__(self, student, teacher, taus, weights):
        R, T, C = rows_of(student), *student.shape[-2:]
        sizes = C, *_strides(student, teacher)
        unit = math.gcd(8, *sizes)  # which divides them all
        C, s_b, t_b, s_r, t_r = (size // unit for size in sizes)
        if student.dim() == 2:
            s_b = t_b = None
        self.sizes = R, T, C, s_b, t_b, s_r, t_r
        self.steps = [0 if t is None else t.stride(0) for t in (taus, weights)]
        config = row_config(C * unit, KL)
        most = config.registers if unit > 1 else None  # narrow loads are many, and would spill
        self.grid = (cdiv(R, config.rows),)
        self.constants = {"ROWS": config.rows, "CHUNK": config.columns, "CHUNKS": config.held, "UNIT": unit}
        self.constants |= {"num_warps": config.warps, "maxnreg": most}
        self.launches = {}

    def _launch(self, kernel, *what, **more) -> Launch:
        """That of other tensors of the same kinds: `what` says which."""
        if what not in self.launches:
            self.launches[what] = Launch(kernel, self.grid, **self.constants, **more)
        return self.launches[what]

    @on_device_of
    def forward(self, student, teacher, taus, weights, tau: float, factor: float, keep: bool, made: bool):
        """Values [R]; statistics and the gradient of their sum, or None."""
        R = self.sizes[0]
        value = student.new_empty(R, dtype=torch.float32)
        statistics = student.new_empty((KEPT, R), dtype=torch.float32) if keep else None
        gradient = student.new_empty((R, student.shape[-1])) if made else None
        tensors = student, teacher, taus, weights, value, statistics, gradient
        self._launch(kl_rows, keep, made)(*tensors, *self.sizes, *self.steps, tau, factor)
        return value, statistics, gradient

    @on_device_of
    def gradient(self, student, teacher, taus, weights, tau: float, factor: float, grad, made):
        """Of sum_r grad_r factor weights_r KL_r, in the place of that for grad 1, if there is one."""
        gradient = student.new_empty((self.sizes[0], student.shape[-1])) if made is None else made
        step = grad.stride(0) if grad.dim() else 0
        launch = self._launch(kl_again, grad.dtype, step, made is not None, MADE=made is not None)
        launch(grad, student, teacher, taus, weights, gradient, *self.sizes, step, *self.steps, tau, factor)
        return gradient


_KL_ROWS = Recent(PLANS)


def _kl_rows(*tensors) -> tuple:
    """The settled launches of the student, the teacher, temperatures and weights; and these, rows made dense."""
    tensors = *map(_dense, tensors[:2]), *tensors[2:]
    key = tuple(t if t is None else layout(t) for t in tensors)
    rows = _KL_ROWS.get(key)
    if rows is None:
        rows = _KLRows(*tensors)
        _KL_ROWS.keep(key, rows)
    return rows, tensors


def _tau(how: Measure, taus) -> float:
    """What is multiplied into the rows' own."""
    return how.tau if taus is None else 1.0


def makes_gradient(how: Measure) -> bool:
    """Whether there is `sum_and_gradient` of this divergence: of the forward one, which has kernels of its own."""
    return how.forward


def sum_and_gradient(student, teacher, taus, weights, how: Measure, factor: float):
    """The sum of the divergences times factor and weights, and its gradient."""
    rows, tensors = _kl_rows(student, teacher, taus, weights)
    value, _, gradient = rows.forward(*tensors, _tau(how, taus), factor, False, True)
    return value.sum(), gradient


def gradient_again(grad, student, teacher, taus, weights, how: Measure, factor: float, made):
    """The gradient for an upstream of one number; made: that of `sum_and_gradient`, which is overwritten, or None."""
    rows, tensors = _kl_rows(student, teacher, taus, weights)
    return rows.gradient(*tensors, _tau(how, taus), factor, grad, made)


def divergence(student, teacher, rows_of_each, how: Measure, factor: float, need: bool, made: bool):
    """As `torch_impl.divergence`."""
    if makes_gradient(how):
        rows, tensors = _kl_rows(student, teacher, *rows_of_each)
        found = rows.forward(*tensors, _tau(how, rows_of_each[0]), factor, need, made)
        return tuple(student.new_empty(0) if t is None else t for t in found)
    student, teacher, (taus, weights) = _dense(student), _dense(teacher), rows_of_each
    R, T, C = rows_of(student), *student.shape[-2:]
    value = student.new_empty(R, dtype=torch.float32)
    statistics = student.new_empty((KEPT, R) if need else (0,), dtype=torch.float32)
    config = row_config(C)
    with torch.cuda.device_of(student):
        divergence_rows[(R,)](
            student, teacher, value if taus is None else taus, value if weights is None else weights, value, statistics,
            R, T, C, *_strides(student, teacher), *(0 if t is None else t.stride(0) for t in rows_of_each),
            how.tau, factor, *_numbers(how), BLOCK=config.block, FORM=_form(how), HAS_TAU=taus is not None,
            HAS_WEIGHT=weights is not None, KEEP=need, num_warps=config.warps,
        )  # fmt: skip
    if not made:
        return value, statistics, student.new_empty(0)
    weights = value.new_full((R,), factor) if weights is None else weights
    return value, statistics, divergence_gradient(weights, student, teacher, taus, statistics, how)


def divergence_gradient(grad, student, teacher, taus, statistics, how: Measure):
    """As `torch_impl.divergence_gradient`."""
    if makes_gradient(how):
        return gradient_again(grad, student, teacher, taus, None, how, 1.0, None)
    student, teacher = _dense(student), _dense(teacher)
    R, T, C = rows_of(student), *student.shape[-2:]
    out, config = student.new_empty((R, C)), row_config(C)
    with torch.cuda.device_of(student):
        divergence_gradient_rows[(R * triton.cdiv(C, config.block),)](
            grad, student, teacher, grad if taus is None else taus, statistics, out, R, T, C,
            *_strides(student, teacher), grad.stride(0), 0 if taus is None else taus.stride(0), how.tau, *_numbers(how),
            BLOCK=config.block, FORM=_form(how), HAS_TAU=taus is not None, num_warps=config.warps,
        )  # fmt: skip
    return out


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
