# SPDX-License-Identifier: Apache-2.0
"""The differentiable operators of the family: schemas, fakes, autograd and dispatch to the implementations.

`nystrom_features_*` give Phi; `nystrom_stat_*` give CKA, HSIC or the transfer of two sides without writing Phi. What is
asked of them travels as the string of `problem.py`; gradients recompute the chunks: saved are the inputs and m x m.
"""

from __future__ import annotations

import torch

from ..autograd import NoSecondDerivative, apply, device_type, plain, register, without_autocast
from ..dtypes import at_least_float32
from . import side, statistics, torch_impl
from .problem import decode


def _run(name, direct, *arguments):
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    return (direct if plain(*tensors) else getattr(torch.ops.kdkernels, name))(*arguments)


def _features_forward(*arguments):
    return _run("nystrom_features_fwd", _features_fwd, *arguments)


def _features_backward(*arguments):
    return _run("nystrom_features_bwd", _features_bwd, *arguments)


def _stat_forward(*arguments):
    return _run("nystrom_stat_fwd", _stat_fwd, *arguments)


def _stat_backward(*arguments):
    return _run("nystrom_stat_bwd", _stat_bwd, *arguments)


class Features(torch.autograd.Function):
    """Phi; saved for backward: x, landmarks, sigma, the factor of W in float64."""

    generate_vmap_rule = True

    forward = staticmethod(_features_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, z, sigma, ctx.problem, ctx.need = inputs
        _, factor, spectrum = output
        ctx.mark_non_differentiable(factor, spectrum)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, sigma, factor, spectrum)

    @staticmethod
    def backward(ctx, grad, _factor, _spectrum):
        if grad is None:
            return (None,) * 5
        run = FeaturesGradient.apply if torch.is_grad_enabled() else _features_backward
        out = run(grad, *ctx.saved_tensors, ctx.problem, ctx.need)
        return *(g if ctx.need >> bit & 1 else None for bit, g in enumerate(out)), None, None


class Statistic(torch.autograd.Function):
    """CKA, HSIC or transfer of two sides; saved: the inputs, factors of both W, the m x m moments."""

    generate_vmap_rule = True

    forward = staticmethod(_stat_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.problem, ctx.need = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 9
        run = StatisticGradient.apply if torch.is_grad_enabled() else _stat_backward
        out = run(grad, *ctx.saved_tensors, ctx.problem, ctx.need)
        dx, dzx, dsx, dy, dzy, dsy = (g if ctx.need >> bit & 1 else None for bit, g in enumerate(out))
        return dx, dy, None, dzx, dzy, dsx, dsy, None, None


class FeaturesGradient(NoSecondDerivative):
    forward = staticmethod(_features_backward)


class StatisticGradient(NoSecondDerivative):
    forward = staticmethod(_stat_backward)


def needs(*tensors) -> int:
    """One bit for each tensor that wants a gradient."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << bit for bit, t in enumerate(tensors) if t is not None and t.requires_grad)


def distinct(*tensors):
    """The same tensor twice stops torch.compile: a second one becomes a view."""
    seen, out = [], []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in seen)
        out.append(tensor.view_as(tensor) if again else tensor)
        seen.append(tensor)
    return out


def features(x, z, sigma, problem: str):
    x, z, sigma = distinct(x, z, sigma)
    need = needs(x, z, sigma)
    if need:
        return apply(Features, x, z, sigma, problem, need)[0]
    return _features_forward(x, z, sigma, problem, 0)[0]


def statistic(x, y, mask, zx, zy, sigma_x, sigma_y, problem: str):
    x, y, zx, zy, sigma_x, sigma_y = distinct(x, y, zx, zy, sigma_x, sigma_y)
    need = needs(x, zx, sigma_x, y, zy, sigma_y)
    if need:
        return apply(Statistic, x, y, mask, zx, zy, sigma_x, sigma_y, problem, need)[0]
    return _stat_forward(x, y, mask, zx, zy, sigma_x, sigma_y, problem, 0)[0]


def _features_fwd(x, z, sigma, problem, need):
    with without_autocast(device_type(x)):
        return torch_impl.features_forward(x, z, sigma, decode(problem))


def _features_bwd(grad, x, z, sigma, factor, spectrum, problem, need):
    with without_autocast(device_type(x)):
        return torch_impl.features_backward(grad, x, z, sigma, factor, spectrum, decode(problem), need)


def _stat_fwd(x, y, mask, zx, zy, sigma_x, sigma_y, problem, need):
    with without_autocast(device_type(x)):
        return statistics.forward(x, y, mask, zx, zy, sigma_x, sigma_y, decode(problem))


def _stat_bwd(grad, x, y, mask, zx, zy, sigma_x, sigma_y, *saved):
    *saved, problem, need = saved
    with without_autocast(device_type(x)):
        return statistics.backward(grad, x, y, mask, zx, zy, sigma_x, sigma_y, *saved, decode(problem), need)


def _factors(z, whiten):
    return (z.new_empty(shape, dtype=torch.float64) for shape in side.factor_shapes(whiten, z.shape[0]))


def _features_fwd_fake(x, z, sigma, problem, need):
    phi = x.new_empty((x.shape[0], z.shape[0]), dtype=torch.promote_types(x.dtype, z.dtype))
    return phi, *_factors(z, decode(problem).whiten)


def _like(need, *tensors):
    first = tensors[0]
    return tuple(
        t.new_empty(t.shape) if need >> bit & 1 and t is not None else first.new_empty(0)
        for bit, t in enumerate(tensors)
    )


def _features_bwd_fake(grad, x, z, sigma, factor, spectrum, problem, need):
    return _like(need, x, z, sigma)


def _stat_fwd_fake(x, y, mask, zx, zy, sigma_x, sigma_y, problem, need):
    problem = decode(problem)
    value = x.new_empty((), dtype=at_least_float32(x, y, zx, zy))
    shape = statistics.moment_shape(problem, zx.shape[0], zy.shape[0])
    moments = x.new_empty(shape, dtype=torch.float64)
    return value, *_factors(zx, problem.whiten), *_factors(zy, problem.whiten), moments


def _stat_bwd_fake(grad, x, y, mask, zx, zy, sigma_x, sigma_y, fx, sx, fy, sy, moments, problem, need):
    return _like(need, x, zx, sigma_x, y, zy, sigma_y)


def _register():
    one, two = "Tensor x, Tensor z, Tensor? sigma", "Tensor x, Tensor y, Tensor? mask, Tensor zx, Tensor zy"
    two += ", Tensor? sigma_x, Tensor? sigma_y"
    saved = "Tensor factor_x, Tensor spectrum_x, Tensor factor_y, Tensor spectrum_y, Tensor moments"
    how = "str problem, int need"
    for name, schema, function, fake in (
        (
            "nystrom_features_fwd",
            f"({one}, {how}) -> (Tensor phi, Tensor factor, Tensor spectrum)",
            _features_fwd,
            _features_fwd_fake,
        ),
        (
            "nystrom_features_bwd",
            f"(Tensor grad, {one}, Tensor factor, Tensor spectrum, {how}) -> (Tensor dx, Tensor dz, Tensor dsigma)",
            _features_bwd,
            _features_bwd_fake,
        ),
        ("nystrom_stat_fwd", f"({two}, {how}) -> (Tensor value, {saved})", _stat_fwd, _stat_fwd_fake),
        (
            "nystrom_stat_bwd",
            f"(Tensor grad, {two}, {saved}, {how}) -> (Tensor dx, Tensor dzx, Tensor dsx, Tensor dy, Tensor dzy, "
            "Tensor dsy)",
            _stat_bwd,
            _stat_bwd_fake,
        ),
    ):
        register(name, schema, function, fake)


_register()
