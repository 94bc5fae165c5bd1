# SPDX-License-Identifier: Apache-2.0
"""The family in PyTorch: value and weights of the gradient from n x n matrices, then one product with the features.

Triplets go in chunks of vertices, so that memory stays n x n plus a chunk. The other backends replace `triplets` alone.
"""

from __future__ import annotations

import torch

from ..autograd import at_least_float32
from . import pairs
from .pairs import Distances, distances, inverse, laplacian, rows_kept
from .problem import EPS, sides

# numbers of a chunk of triplets: the few temporaries stay in cache; the launches count
TRIPLETS = {"cpu": 1 << 16, "cuda": 1 << 25}


def forward(x, y, mask, kind: str, need: int, triplets=None):
    """value [G], and for x and y what `kept_of` says, where `need` names them, else [0]."""
    count = rows_kept(x, mask)
    if kind == "pkt":
        value, weights = _similarities(x, y, mask, count, need)
    else:
        s, t = (distances(side, mask, count) for side in (x, y))
        if kind == "rkd_distance":
            value, V = _distances(s, t, need)
            terms = count**2
        else:
            value, V = (triplets or _triplets)(s.square, t.square, need)
            terms = count**3
        value = value / terms
        # V is in units of mu
        units = [(of.scale.square() / terms)[:, None, None] for of in (s, t)]
        weights = [laplacian(v.mul_(units[k])) for v, k in zip(V, sides(need), strict=True)]
    kept = [x.new_empty(0, dtype=torch.float64) for _ in (x, y)]
    for W, k in zip(weights, sides(need), strict=True):
        kept[k] = W
    return value.to(at_least_float32(x, y)), *kept


def kept_of(x, y, kind: str):
    """Shapes and dtype of what forward keeps of x and y [G, n, p] for backward: W, dvalue/dx = W x."""
    return ((*x.shape[:-1], x.shape[-2]),) * 2, torch.float64


def backward(grad, x, mask, W, kind: str):
    """dvalue/dx [G, n, p] of one side times grad [G], a block of columns at a time.

    float64, as V is 1 / d^2 where a pair is close: its product with rows in float32 would be that much further off.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = None if kind == "pkt" else rows_kept(x, mask)
    W = W * grad[:, None, None]
    for columns in pairs.blocks(x):
        dx[..., columns] = W @ pairs.rows(x[..., columns], mask, count)
    # where nothing comes from above, and where a row is masked, the gradient is 0 whatever the rest holds
    silent = (grad == 0)[:, None] if mask is None else (grad == 0)[:, None] | ~mask
    return dx.masked_fill_(silent[..., None], 0)


# ---- distances


def _distances(s: Distances, t: Distances, need: int):
    """sum_ik of smooth-L1 [G], and V of each side asked for in its units: 2 (g - sum(g u) / pairs) / u."""
    u = [side.square.sqrt() for side in (s, t)]
    e = u[0] - u[1]
    g = e.clamp(-1, 1)
    value = torch.linalg.vecdot(e.flatten(1), g.flatten(1)) - torch.linalg.vecdot(g.flatten(1), g.flatten(1)) / 2
    V = []
    for k in sides(need):
        side, sign = (s, t)[k], 1 - 2 * k
        mean = torch.linalg.vecdot(g.flatten(1), u[k].flatten(1)) / side.pairs
        weights = (g - mean[:, None, None]).div_(u[k]).mul_(2 * sign)
        V.append(weights.masked_fill_(u[k] == 0, 0))
    return value, V


# ---- angles


def _triplets(s, t, need: int):
    """sum_vik of smooth-L1 [G], and V of each side asked for: sums over the vertices, a chunk at a time.

    s, t: squared distances [G, n, n] in units of mu; cos_vik = (d_iv^2 + d_kv^2 - d_ik^2) / (2 d_iv d_kv). float64: in
    float32 a sample far from two that are close would not tell them apart.
    """
    G, n, _ = s.shape
    asked = sides(need)
    both = [(square / 2, inverse(square)) for square in (s, t)]
    V = [torch.zeros_like(s) for _ in asked]
    value = s.new_zeros(G)
    rows = max(1, TRIPLETS.get(s.device.type, TRIPLETS["cuda"]) // n**2)
    for group in range(G):
        for begin in range(0, n, rows):
            vertices = slice(begin, min(n, begin + rows))
            cos = [_cosines(half[group], r[group], vertices) for half, r in both]
            e = cos[0] - cos[1]
            g = e.clamp(-1, 1)
            value[group] += e.sub_(g, alpha=0.5).mul_(g).sum()
            for k, out in zip(asked, V, strict=True):
                _add_weights(out[group], g if k == 0 else -g, cos[k], both[k][1][group], vertices)
    return value, V


def one_sided(run):
    """`triplets` from run(own, other, weight) -> value [G], V of the first; the value does not mind their order."""

    def triplets(s, t, need: int):
        squares, V = (s, t), []
        for k in sides(need):
            value, weights = run(squares[k], squares[1 - k], True)
            V.append(weights)
        return (value if V else run(s, t, False)[0]), V

    return triplets


def _cosines(half, r, vertices):
    """[v, i, k] from half the squared distances and the inverse distances."""
    h, r = half[vertices], r[vertices]
    return (h[:, :, None] + h[:, None] - half).mul_(r[:, :, None]).mul_(r[:, None])


def _add_weights(V, g, cos, r, vertices):
    """V_ik -= 2 g / (d_iv d_kv); V_iv, V_vi += 2 sum_k g (1 / d_kv - cos / d_iv) / d_iv."""
    r = r[vertices]
    to_vertex = torch.bmm(g, r[:, :, None])[..., 0] - (g * cos).sum(-1) * r
    to_vertex = 2 * r * to_vertex
    V[vertices] += to_vertex
    V[:, vertices] += to_vertex.mT
    V.sub_(g.mul(r[:, :, None]).mul_(r[:, None]).sum(0), alpha=2)


# ---- similarities


def _similarities(x, y, mask, count, need: int):
    """mean T log((T + eps) / (P + eps)), P and T rows of (cos + 1) / 2 with sum 1, and W of each side asked for."""
    both = [_Similarity(side, mask, count) for side in (x, y)]
    p, t = (side.p for side in both)
    below, apart = p + EPS, t - p
    log = (apart / below).log1p_()
    size = count**2
    # rows of T - P sum to 0: less them, a student near its teacher has a value of second order in each term
    value = (torch.linalg.vecdot(t.flatten(1), log.flatten(1)) - apart.sum((-2, -1))) / size
    weights = []
    for k in sides(need):
        h = t / below if k == 0 else log + t / (t + EPS)
        sign = 2 * k - 1
        weights.append(both[k].weights(h, mask).mul_(sign / size[:, None, None]))
    return value, weights


class _Similarity:
    """p [G, n, n], 0 where masked: rows (cos + 1) / 2 over their sums; cos = x_i.x_k / (s_i s_k), s = |x| + eps."""

    def __init__(self, x, mask, count):
        self.cos = pairs.gram(x, mask)
        self.norm = self.cos.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
        inverse = 1 / (self.norm + EPS)
        # a masked row is 0: it adds nothing to the sums of the others
        self.cos.mul_(inverse).mul_(inverse.mT)
        self.inverse = inverse
        self.share = 1 / (self.cos.sum(-1, keepdim=True) + count[:, None, None])  # 1 / (2 A)
        self.p = pairs.pairs_masked(torch.addcmul(self.share, self.cos, self.share), mask)

    def weights(self, h, mask):
        """W from h = dvalue/dp: V through row sums and (cos + 1) / 2, symmetric; then through s. 0 for a row of 0."""
        V = h.sub_(torch.linalg.vecdot(h, self.p)[..., None]).mul_(self.share)
        V = pairs.pairs_masked(V, mask)
        V = V + V.mT
        along = torch.linalg.vecdot(V, self.cos)[..., None] * self.inverse / self.norm
        W = V.mul_(self.inverse).mul_(self.inverse.mT)
        W.diagonal(dim1=-2, dim2=-1).sub_(along[..., 0])
        return W.masked_fill_(self.norm == 0, 0)
