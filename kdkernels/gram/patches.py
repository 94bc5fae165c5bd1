# SPDX-License-Identifier: Apache-2.0
"""CKA between the patches of each channel of a feature map: what is kept for backward is the maps and n x n a channel.

Linear, uncentred, biased; X, Y [n, P] the patches of a channel as rows, K = XX', L = YY', M = XY'. Between patches
S_KL = <K, L>; between positions (the transposes) <M, M>; S_KK = <K, K> and S_LL = <L, L> of both. With a = 1/sqrt(S_KK
S_LL), values v = a S_KL and t = a <M, M> and upstream gradients g, h:

    dX = 2 [(g a L - (g v + h t)/S_KK K) X + h a M Y].

The patches are made again for it. On a CPU channels go through in blocks that stay in cache, elsewhere all at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..autograd import at_least_float32
from ..differentiable import operator
from .both_ways import of_ways

PATCH = 16
BLOCK = 2**19  # numbers of one side in a block of channels on a CPU: 2 MB


def patch_rows(maps, size, kept=None):
    """[B, C, H, W] as [C, patches, B 256]: 0 where not `kept` [B, 1] or [B, H, W], resized to `size`, cut up."""
    maps = maps.to(at_least_float32(maps))
    if kept is not None:
        maps = torch.where(_over_channels(kept), maps, torch.zeros((), dtype=maps.dtype, device=maps.device))
    if tuple(maps.shape[2:]) != tuple(size):  # at their own size bilinear weights are 1 and 0
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    B, C = maps.shape[:2]
    tall, wide = (n // PATCH for n in size)
    patches = maps.reshape(B, C, tall, PATCH, wide, PATCH).permute(1, 2, 4, 0, 3, 5)
    return patches.reshape(C, tall * wide, B * PATCH**2)


def _over_channels(kept):
    return kept[:, None] if kept.dim() == 3 else kept[:, :, None, None]


def _patch_rows_backward(grad, shape, size, kept):
    """The gradient of `patch_rows` to maps of this shape, in the dtype of `grad`."""
    B, C, H, W = shape
    tall, wide = (n // PATCH for n in size)
    grad = grad.reshape(C, tall, wide, B, PATCH, PATCH).permute(3, 0, 1, 4, 2, 5).reshape(B, C, *size)
    if (H, W) != tuple(size):
        grad = torch.ops.aten.upsample_bilinear2d_backward(grad, size, shape, False, None, None)
    return grad if kept is None else torch.where(_over_channels(kept), grad, 0)


def patch_cka(student, teacher, size, kept=None, transposed: bool = False):
    """[1 or 2, C]: CKA between the patches of each channel, and between the positions; gradient to the student alone.

    0 where a channel is zero on a side.
    """
    return _channels.value(student, teacher, kept, *size, transposed)


def _blocks(student, size):
    """Slices of channels."""
    B, C = student.shape[:2]
    step = C if not student.is_cpu else max(1, BLOCK // (B * size[0] * size[1]))
    return [slice(c, min(c + step, C)) for c in range(0, C, step)]


def _forward(student, teacher, kept, height, width, transposed, need):
    """Values [ways, C]; products K, L (and M) [2 or 3, C, n, n]; a, 1/S_KK, values and scales [5 or 6, C]."""
    size, dtype, C = (height, width), at_least_float32(student, teacher), student.shape[1]
    n = height * width // PATCH**2
    products = student.new_empty(3 if transposed else 2, C, n, n, dtype=dtype)
    for at in _blocks(student, size):
        x, y = (patch_rows(side.detach()[:, at], size, kept).to(dtype) for side in (student, teacher))
        pairs = ((x, x), (y, y), (x, y))[: len(products)]
        for product, (left, right) in zip(products, pairs, strict=True):
            torch.bmm(left, right.mT, out=product[at])
    # rows of length one or so: no product of two sums leaves float32
    mean = products[:2].diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(mean > 0, mean, 1).rsqrt()
    factors = [scale[0].square(), scale[1].square(), scale[0] * scale[1]][: len(products)]
    products *= torch.stack(factors)[..., None, None]
    k, l, *m = products
    pairs = ((k, k), (l, l), (k, l), *((one, one) for one in m))
    kk, ll, *sums = ((a * b).sum(-1).double().sum(-1) for a, b in pairs)
    undefined = (kk <= 0) | (ll <= 0)
    a = torch.where(undefined, 0, (kk * ll).rsqrt())
    values = a * torch.stack(sums)
    numbers = torch.cat([torch.stack([a, torch.where(undefined, 0, 1 / kk)]), scale.double(), values]).to(dtype)
    return values.to(dtype), products if need else products[:0].clone(), numbers


def _backward(grad, student, teacher, kept, *rest):
    products, numbers, height, width, transposed, _ = rest
    size, dtype = (height, width), at_least_float32(student, teacher)
    a, inverse, scale_x, scale_y = numbers[:4]
    own = 2 * scale_x.square() * inverse * (grad * numbers[4:]).sum(0)
    other = 2 * scale_x.square() * a * grad[0]
    weights = products[1] * other[:, None, None]
    weights.addcmul_(products[0], own[:, None, None], value=-1)
    cross = products[2] * (2 * scale_x * scale_y * a * grad[1])[:, None, None] if transposed else None
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for at in _blocks(student, size):
        part = student.detach()[:, at]
        dx = torch.bmm(weights[at], patch_rows(part, size, kept).to(dtype))
        if transposed:
            dx.baddbmm_(cross[at], patch_rows(teacher.detach()[:, at], size, kept).to(dtype))
        out[:, at] = _patch_rows_backward(dx, part.shape, size, kept)
    return [out]


def _fake(student, teacher, kept, height, width, transposed, need):
    dtype, C, n = at_least_float32(student, teacher), student.shape[1], height * width // PATCH**2
    ways = 2 if transposed else 1
    products = student.new_empty(ways + 1 if need else 0, C, n, n, dtype=dtype)
    return student.new_empty(ways, C, dtype=dtype), products, student.new_empty(4 + ways, C, dtype=dtype)


_channels = operator(
    "patch_cka",
    "student teacher kept?",
    "SymInt height, SymInt width, bool transposed",
    "products numbers",
    wanted="student",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=of_ways(0, 2, 3),
)
