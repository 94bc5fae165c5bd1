# SPDX-License-Identifier: Apache-2.0
"""The differentiable operators of the family; the string that carries a question through their schemas lives here.

`nystrom_features_*` give Phi; `nystrom_stat_*` give CKA, HSIC or the transfer of two sides without writing Phi. Saved
are the inputs, the factors of W in float64 and m x m moments: gradients make the chunks again.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..autograd import at_least_float32
from ..differentiable import operator
from ..gram.kernels import spec_from
from . import chunks, landmarks, statistics
from .call import Call, Question, Side


def encode(question: Question) -> str:
    """The schema's `problem` argument, for example cka|rbf:2.0|linear|cholesky|1e-06|10|torch."""
    stat, (kx, ky), whiten, jitter, unbiased, normalize, backend = question
    return f"{stat}|{kx.code}|{ky.code}|{whiten}|{jitter!r}|{bool(unbiased):d}{bool(normalize):d}|{backend}"


@lru_cache(maxsize=1024)  # an operator reads it: nobody traces this
def decode(text: str) -> Question:
    stat, kx, ky, whiten, jitter, flags, backend = text.split("|")
    kernels = spec_from(kx), spec_from(ky)
    return Question(stat, kernels, whiten, float(jitter), *(flag == "1" for flag in flags), backend)


def features(side: Side, question: Question):
    return _features.value(*distinct(*side[:3]), encode(question))


def statistic(call: Call):
    return _statistic.value(*_tensors(call), encode(call.question))


def statistic_over_ranks(call: Call, group):
    return _statistic_over_ranks(*_tensors(call), encode(call.question), group)


def _tensors(call: Call):
    return *distinct(*call.x[:3], *call.y[:3]), call.mask


def distinct(*tensors):
    """The same tensor twice stops torch.compile: a second one becomes a view."""
    if not torch.compiler.is_compiling():
        return tensors
    seen, out = [], []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in seen)
        out.append(tensor.view_as(tensor) if again else tensor)
        seen.append(tensor)
    return out


def _features_forward(x, z, sigma, problem, need):
    question = decode(problem)
    return chunks.features_forward(Side(x, z, sigma, question.kernel[0]), question)


def _features_backward(grad, x, z, sigma, factor, spectrum, problem, need):
    question = decode(problem)
    side = Side(x, z, sigma, question.kernel[0])
    return chunks.features_backward(grad, side, (factor, spectrum), question, need)


def _features_fake(x, z, sigma, problem, need):
    phi = x.new_empty((x.shape[0], z.shape[0]), dtype=torch.promote_types(x.dtype, z.dtype))
    return phi, *_factors(z, decode(problem).whiten)


def _factors(z, whiten):
    return (z.new_empty(shape, dtype=torch.float64) for shape in landmarks.factor_shapes(whiten, z.shape[0]))


def _call(x, zx, sigma_x, y, zy, sigma_y, mask, problem) -> Call:
    question = decode(problem)
    kx, ky = question.kernel
    return Call(question, Side(x, zx, sigma_x, kx), Side(y, zy, sigma_y, ky), mask)


def _statistic_forward(*arguments):
    *arguments, need = arguments
    return statistics.forward(_call(*arguments))


def _statistic_backward(grad, *arguments):
    tensors, saved, (problem, need) = arguments[:7], arguments[7:-2], arguments[-2:]
    return statistics.backward(grad, _call(*tensors, problem), saved, need)


def _statistic_fake(*arguments):
    *arguments, need = arguments
    question, x, y, _ = _call(*arguments)
    value = x.rows.new_empty((), dtype=at_least_float32(x.rows, y.rows, x.landmarks, y.landmarks))
    factors = *_factors(x.landmarks, question.whiten), *_factors(y.landmarks, question.whiten)
    shape = statistics.moment_shape(x.landmarks.shape[0], y.landmarks.shape[0])
    return value, *factors, x.rows.new_empty(shape, dtype=torch.float64)


def _forward_over_ranks(*arguments):
    *arguments, need, group = arguments
    return statistics.forward(_call(*arguments), group.sum)


_features = operator(
    "nystrom_features",
    "x z sigma?",
    "str problem",
    "factor spectrum",
    wanted="x z sigma",
    forward=_features_forward,
    backward=_features_backward,
    fake=_features_fake,
)

_statistic = operator(
    "nystrom_stat",
    "x zx sigma_x? y zy sigma_y? mask?",
    "str problem",
    "factor_x spectrum_x factor_y spectrum_y moments",
    wanted="x zx sigma_x y zy sigma_y",
    forward=_statistic_forward,
    backward=_statistic_backward,
    fake=_statistic_fake,
)
_statistic_over_ranks = _statistic.over_ranks(_forward_over_ranks)
