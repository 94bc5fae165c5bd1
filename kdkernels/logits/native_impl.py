# SPDX-License-Identifier: Apache-2.0
"""The family on a CPU through `csrc/logits/`: a row stays in cache from its logits to its value, or its gradient.

float64 rows, and half rows of mixup, run in PyTorch: nobody trains on them here.
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, applied, at_least_float32, plain
from . import torch_impl
from .call import STUDENT, TEACHER, Extras, Measure, Problem


def _dense(t):
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _arguments(student, teacher, extras: Extras):
    R = student.shape[0]
    lam = None if extras.lam is None else extras.lam.double().expand(R).contiguous()
    vectors = (None if t is None else t.contiguous() for t in (extras.labels, extras.permuted))
    order = None if extras.permutation is None else extras.permutation.contiguous()
    return _dense(student), _dense(teacher), *vectors, lam, _dense(extras.clean), order


def forward(student, teacher, problem: Problem, extras: Extras, need: int):
    if at_least_float32(student, teacher, extras.clean) == torch.float64:
        return torch_impl.forward(student, teacher, problem, extras, need)
    arguments = _arguments(student, teacher, extras)
    numbers = problem[:-1]
    return torch.ops.kdkernels.logits_rows(*arguments, *numbers, need > 0)


def backward(grad, factor: float, student, teacher, statistics, problem: Problem, extras: Extras, need: int):
    """A row with grad 0 gets exactly 0, as in `torch_impl.backward`."""
    if statistics.dtype == torch.float64:
        return torch_impl.backward(grad, factor, student, teacher, statistics, problem, extras, need)
    arguments = _arguments(student, teacher, extras)
    numbers = problem[:-1]
    run = torch.ops.kdkernels.logits_rows_backward
    return run(grad, factor, *arguments, statistics.contiguous(), *numbers, need & STUDENT > 0, need & TEACHER > 0)


def _single(t):
    return t if t is None else t.float()


def divergence(student, teacher, rows_of_each, how: Measure, factor: float, need: bool, made: bool):
    """As `torch_impl.divergence`."""
    if at_least_float32(student, teacher) == torch.float64:
        return torch_impl.divergence(student, teacher, rows_of_each, how, factor, need, made)
    rows_of_each = map(_single, rows_of_each)
    run = torch.ops.kdkernels.divergence_rows
    return run(_dense(student), _dense(teacher), *rows_of_each, *how, factor, need, made)


def divergence_gradient(grad, student, teacher, taus, statistics, how: Measure):
    """As `torch_impl.divergence_gradient`."""
    if statistics.dtype == torch.float64:
        return torch_impl.divergence_gradient(grad, student, teacher, taus, statistics, how)
    run = torch.ops.kdkernels.divergence_rows_backward
    return run(grad, _dense(student), _dense(teacher), _single(taus), statistics.contiguous(), *how)


def bucket_rows(student, index, tau: float, need: bool):
    """As `torch_impl.bucket_rows`, of rows that are not float64."""
    return torch.ops.kdkernels.bucket_rows(_dense(student), index.contiguous(), tau, need)


def bucket_gradient(grad, student, index, statistics, tau: float):
    run = torch.ops.kdkernels.bucket_rows_backward
    return run(grad.contiguous(), _dense(student), index.contiguous(), statistics.contiguous(), tau)


def lerp_rows(x, weight, other, index):
    if x.dtype not in (torch.float32, torch.float64):
        return torch_impl.lerp_rows(x, weight, other, index)
    R = x.shape[0]
    weight, other = (w.double().expand(R).contiguous() for w in (weight, other))
    return torch.ops.kdkernels.mix_rows(x.reshape(R, -1).contiguous(), weight, other, index).reshape(x.shape)


def directly(student, teacher, weight, tau: float, mean: bool):
    """The plain divergence, with the gradient of the student, or None where the general operator has to do it."""
    if not _direct(student, teacher, weight):
        return None
    weight = weight if weight is None or weight.dtype == torch.float32 else weight.float()
    return _kl(student, teacher, weight, tau, mean)


def _direct(student, teacher, weight) -> bool:
    """Whether the gradient is the student's alone, the compiled rows read all as it is, and nobody watches."""
    if student.dim() != 2 or teacher.requires_grad or not torch.is_grad_enabled():
        return False
    for side in (student, teacher):
        if side.stride(1) != 1 or side.dtype == torch.float64:
            return False
    return (weight is None or weight.is_cpu) and plain(student, teacher, weight) and not teacher.is_inference()


class Divergence(torch.autograd.Function):
    """One number, the commonest call on a CPU, through operators of fewer arguments; the maker's takes 12 % longer."""

    @staticmethod
    def forward(ctx, student, teacher, weight, tau, mean):
        value, statistics = torch.ops.kdkernels.kl_rows.default(student, teacher, weight, tau, mean)
        ctx.how = tau, mean
        ctx.save_for_backward(student, teacher, weight, statistics)
        return value

    @staticmethod
    def backward(ctx, grad):
        run = torch.ops.kdkernels.kl_rows_backward.default
        run = DivergenceGradient.apply if torch.is_grad_enabled() else run
        return run(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


class DivergenceGradient(NoSecondDerivative):
    @staticmethod
    def forward(*a):
        return torch.ops.kdkernels.kl_rows_backward(*a)


_kl = applied(Divergence)
