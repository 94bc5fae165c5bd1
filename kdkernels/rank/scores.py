# SPDX-License-Identifier: Apache-2.0
"""What a loss of ranks needs of two rows of logits beside them: one compiled visit on the CPU, PyTorch elsewhere.

Of x and y [..., C], an entry absent (`checks.absent`) on either side is absent from both: (z_x, z_y, share, pearson),
z-scores with z_x = 0 and z_y = -inf where absent, the relative entropy of softmax(y / tau), and the correlation of the
present entries, [...]. Gradient to x alone, through z_x and pearson; both ways can be differentiated twice, and in
forward mode. Half of one loss and no public op: it has no row in the registry and no contract of its own.
"""

from __future__ import annotations

import math

import torch

from ..autograd import apply, device_type, in_forward_mode, in_transform, ordinary
from ..backend import runs_compiled
from . import checks

NATIVE = {
    # x, y [R, C] of one dtype, float32 or float64, rows dense; scale, count float64 [R]: 1 / deviation of x, entries
    # present (at least 1); tau 0: share is 0
    "score_rows": "(Tensor x, Tensor y, float tau) -> (Tensor z_x, Tensor z_y, Tensor scale, Tensor count,"
    " Tensor share, Tensor pearson)",
    # d/dx; grad [R, C] of z_x, grad_pearson [R], in the rows' dtype
    "score_rows_backward": "(Tensor? grad, Tensor? grad_pearson, Tensor z_x, Tensor z_y, Tensor scale, Tensor count)"
    " -> Tensor",
}
for _name, _schema in NATIVE.items():
    torch.library.define(f"kdkernels::{_name}", _schema)


@torch.library.register_fake("kdkernels::score_rows")
def _score_rows(x, y, tau):
    R = x.shape[:1]
    z, wide = (x.new_empty(x.shape) for _ in range(2)), (x.new_empty(R, dtype=torch.float64) for _ in range(2))
    return *z, *wide, x.new_empty(R), x.new_empty(R)


@torch.library.register_fake("kdkernels::score_rows_backward")
def _score_rows_backward(grad, grad_pearson, z_x, z_y, scale, count):
    return z_x.new_empty(z_x.shape)


def score(x, y, tau: float, backend: str):
    """(z_x, z_y, share, pearson) of x, y in one dtype, float32 or float64, y detached; tau = 0: share is not wanted."""
    dual, (y,) = in_forward_mode(), ordinary((y,))
    if runs_compiled(backend, device_type(x), tuple(NATIVE)) and not (dual or in_transform()):
        z_x, z_y, _, _, share, pearson = apply(ScoreRows, x, y, tau)
        return z_x, z_y, share, pearson
    absent = checks.absent(torch.fmin(x.detach(), y))  # whatever the other side holds
    keep = (~absent).to(x.dtype)
    count = keep.sum(-1, keepdim=True).clamp_min(1)
    share = relative_entropy(y, absent, count[..., 0], tau) if tau else None
    z_score = ZScore.forward if dual else ZScore.apply  # the formula has its own way forward
    x, y = (z_score(side.masked_fill(absent, 0), keep, count)[0] for side in (x, y))
    # of z-scored rows, Pearson is the mean product
    return x, y.masked_fill(absent, -math.inf), share, torch.linalg.vecdot(x, y) / count[..., 0]


def _rows(t):
    """[..., C] as [R, C] with a contiguous last dimension."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


class ScoreRows(torch.autograd.Function):
    """z_x, z_y, 1 / deviation of x, the number present (both float64), share, pearson: the compiled visit."""

    @staticmethod
    def forward(x, y, tau):
        z_x, z_y, *per_row = torch.ops.kdkernels.score_rows(_rows(x), _rows(y), tau)
        return z_x.view(x.shape), z_y.view(x.shape), *(t.view(x.shape[:-1]) for t in per_row)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z_x, z_y, scale, count, share, _ = output
        ctx.mark_non_differentiable(z_y, scale, count, share)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], z_x, z_y, scale, count)

    @staticmethod
    def backward(ctx, grad, _z_y, _scale, _count, _share, grad_pearson):
        if grad is None and grad_pearson is None:
            return None, None, None
        x, z_x, z_y, scale, count = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad = None if grad is None else _rows(grad)
            per_row = (None if t is None else t.reshape(-1).contiguous() for t in (grad_pearson, scale, count))
            grad_pearson, scale, count = per_row
            run = torch.ops.kdkernels.score_rows_backward
            return run(grad, grad_pearson, _rows(z_x), _rows(z_y), scale, count).view(x.shape), None, None
        # to be differentiated again: the same in operations that can
        absent = z_y == -math.inf
        keep, count = (~absent).to(x.dtype), count[..., None].to(x.dtype)
        z_x, scale = ZScore.apply(x.masked_fill(absent, 0), keep, count)
        if grad_pearson is not None:
            own = z_y.masked_fill(absent, 0) * (grad_pearson[..., None] / count)
            grad = own if grad is None else grad + own
        return through_z_score(grad, keep, count, z_x, scale).masked_fill(absent, 0), None, None


class ZScore(torch.autograd.Function):
    """z = (x - mean) / population standard deviation of the `count` entries a row that `keep` has, and 1 / deviation.

    x and z are 0 elsewhere. A constant row is 0, with zero gradient. One node: autograd's own way back through the
    formula passes over the rows three times as often. It can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, keep, count):
        mean = x.sum(-1, keepdim=True) / count
        z = (x - mean) * keep
        variance = torch.linalg.vecdot(z, z)[..., None] / count
        # a spread of the mean's rounding is none; NaN stays NaN
        constant = variance <= (4 * torch.finfo(x.dtype).eps * mean).square()
        scale = torch.where(constant, 0, torch.where(constant, 1, variance).rsqrt())
        return z * scale, scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx, grad, grad_scale):
        keep, count, z, scale = ctx.saved_tensors
        dx = None if grad is None else through_z_score(grad, keep, count, z, scale)
        if grad_scale is not None:  # in a second derivative
            own = z * (-scale.square() * grad_scale / count)
            dx = own if dx is None else dx + own
        return dx, None, None


def through_z_score(grad, keep, count, z, scale):
    mean, slope = (torch.linalg.vecdot(grad, side)[..., None] / count for side in (keep, z))
    return (grad - mean - z * slope) * (keep * scale)


def relative_entropy(logits, absent, count, tau):
    """H(softmax(logits / tau)) / log(count) over the classes not absent, in [0, 1]; 0 where fewer than two are."""
    logits = logits.masked_fill(absent, -math.inf)
    z = (logits - logits.amax(-1, keepdim=True)) / tau
    p = z.exp()
    total = p.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(p, z.masked_fill(absent, 0)) / total
    most = count.log()
    return torch.where(most > 0, entropy / torch.where(most > 0, most, 1), 0).clamp(max=1)
