# SPDX-License-Identifier: Apache-2.0
"""CKA, HSIC and full transfer of two Nystrom kernels from sums of m x m products: one pass over the rows each way.

Neither K~ nor Phi is stored: chunks of both sides are made, added to float64 moments and dropped; the backward pass
makes them again and turns the gradient G_i of each row, linear in phi_i and psi_i, into gradients of the inputs.
Formulas: MATH.md, section 5.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ..autograd import at_least_float32
from ..backend import implementation
from . import maps
from .call import Call
from .chunks import Puller, chunks, prepared_landmarks


class Moments(NamedTuple):
    """Sums over rows in float64. CKA, HSIC: of centred phi (a) and psi (b), k = |phi|^2, l = |psi|^2. Transfer: a, b
    = phi, psi, or their difference and sum where both have m columns; the vectors are then 0."""

    aa: torch.Tensor  # [ma, ma] sum phi phi'
    bb: torch.Tensor
    ab: torch.Tensor  # [ma, mb]
    tt: torch.Tensor  # [mb, mb] sum psi psi' (transfer with a difference)
    mean_a: torch.Tensor  # [ma]
    mean_b: torch.Tensor
    ka: torch.Tensor  # [ma] sum k phi
    la: torch.Tensor  # [ma] sum l phi
    kb: torch.Tensor
    lb: torch.Tensor
    numbers: torch.Tensor  # sum k, sum l, sum kk, sum ll, sum kl, rows, |sum of raw phi phi'|^2, the same of psi


def _shapes(ma: int, mb: int):
    return (ma, ma), (mb, mb), (ma, mb), (mb, mb), (ma,), (mb,), (ma,), (ma,), (mb,), (mb,), (8,)


def moment_shape(ma: int, mb: int):
    return (sum(torch.Size(shape).numel() for shape in _shapes(ma, mb)),)


def _pack(moments: Moments):
    return torch.cat([t.flatten() for t in moments])


def _unpack(flat, ma: int, mb: int) -> Moments:
    shapes = _shapes(ma, mb)
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    return Moments(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


class Pair:
    """Both sides, and their features chunk by chunk."""

    def __init__(self, call: Call, factors=((), ())):
        self.question, *self.given, self.mask = call
        x, y = self.given
        self.outer = self.dtype = at_least_float32(x.rows, y.rows, x.landmarks, y.landmarks)
        for _ in range(2):  # a side that float32 does not do for takes the other with it
            self.sides = tuple(
                prepared_landmarks(side, self.question, self.dtype, *factor)
                for side, factor in zip(self.given, factors, strict=True)
            )
            before, self.dtype = self.dtype, torch.promote_types(*(s.z.dtype for s in self.sides))
            if before == self.dtype:
                break
        self.run = implementation(__package__, self.question.backend)
        # D and P = phi -+ psi, whose products lose nothing as one side nears the other
        self.difference = self.question.stat == "transfer" and len(x.landmarks) == len(y.landmarks)

    def __iter__(self):
        """(rows, kept or None, prepared rows and features of each side)."""
        for rows in chunks(self.given[0].rows, max(len(s.z) for s in self.sides)):
            kept = None if self.mask is None else self.mask[rows, None]
            out = []
            for s, side in zip(self.sides, self.given, strict=True):
                prepared = maps.prepared_rows(s.spec, only(kept, side.rows[rows]), s.shift, self.dtype)
                out += [prepared, only(kept, self.run.phi_of(s, prepared))]
            yield rows, kept, *out


def only(kept, t):
    return t if kept is None else torch.where(kept, t, torch.zeros((), dtype=t.dtype, device=t.device))


def alone(t):
    """What `total` is for one process."""
    return t


def forward(call: Call, total=alone):
    """(value, factor and spectrum of each side, packed moments); total(t): t summed over the ranks."""
    pair = Pair(call)
    moments = (_transfer_moments if call.question.stat == "transfer" else _centred_moments)(pair, total)
    value = _value(moments, pair)
    sx, sy = pair.sides
    return value.to(pair.outer), sx.factor, sx.spectrum, sy.factor, sy.spectrum, _pack(moments)


def _zeros(pair: Pair) -> Moments:
    sizes = _shapes(*(len(s.z) for s in pair.sides))
    return Moments(*(torch.zeros(shape, dtype=torch.float64, device=pair.given[0].rows.device) for shape in sizes))


def _added_up(parts, total):
    """In one message; in place."""
    if total is not alone:
        flat = total(torch.cat([t.flatten() for t in parts]))
        for t, summed in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
            t.copy_(summed.view(t.shape))


def _transfer_moments(pair: Pair, total) -> Moments:
    S = _zeros(pair)
    relative = pair.difference and pair.question.normalize
    for *_, a, _, b in pair:
        if pair.difference:
            if relative:
                S.tt.add_(b.mT @ b)
            a, b = a - b, a + b
        S.aa.add_(a.mT @ a)
        S.bb.add_(b.mT @ b)
        S.ab.add_(a.mT @ b)
    _added_up([S.aa, S.bb, S.ab, *((S.tt,) if relative else ())], total)
    return S


def _provisional_mean(chunk, pair: Pair, total):
    """Of both sides, over the first chunk of each rank; an empty rank has none."""
    sums = torch.zeros(sum(len(s.z) for s in pair.sides) + 1, dtype=pair.dtype, device=pair.given[0].rows.device)
    if chunk is not None:
        _, kept, _, a, _, b = chunk
        sums = torch.cat([a.sum(0), b.sum(0), (a.new_full((), len(a)) if kept is None else kept.sum())[None]])
    if total is not alone:
        sums = total(sums.double()).to(pair.dtype)
    return (sums[:-1] / sums[-1].clamp(min=1)).split([len(s.z) for s in pair.sides])


def _centred_moments(pair: Pair, total) -> Moments:
    """About a provisional mean, that of the first chunk, then moved to the mean itself in float64."""
    S, rest = _zeros(pair), iter(pair)
    sums = [torch.zeros_like(S.mean_a), torch.zeros_like(S.mean_b)]
    first = next(rest, None)
    near = _provisional_mean(first, pair, total)
    rest = itertools.chain([] if first is None else [first], rest)
    del first  # a chunk is large
    for _, kept, _, a, _, b in rest:
        count = a.new_full((), len(a)) if kept is None else kept.sum()
        a, b = only(kept, a - near[0]), only(kept, b - near[1])
        k, l = a.square().sum(1), b.square().sum(1)
        for held, part in (
            (S.aa, a.mT @ a), (S.bb, b.mT @ b), (S.ab, a.mT @ b),
            (sums[0], a.sum(0, dtype=torch.float64)), (sums[1], b.sum(0, dtype=torch.float64)),
            (S.ka, k @ a), (S.la, l @ a), (S.kb, k @ b), (S.lb, l @ b),
        ):  # fmt: skip
            held.add_(part)
        sizes = (k, l, k * k, l * l, k * l)
        S.numbers[:6] += torch.stack([*(t.sum(dtype=torch.float64) for t in sizes), count.double()])
    _added_up([S.aa, S.bb, S.ab, *sums, S.ka, S.la, S.kb, S.lb, S.numbers], total)
    return _moved(S, sums, near)


class Shift(NamedTuple):
    """From a provisional mean of a side to its mean."""

    delta: torch.Tensor  # [m]
    rows: torch.Tensor  # [m] the sum of the rows, about the provisional mean as is
    squares: torch.Tensor  # the sum of their squares


def _moved(S: Moments, sums, near) -> Moments:
    """From sums about `near` to sums about the mean, near + delta."""
    Sk, Sl, Skk, Sll, Skl, n = S.numbers[:6]
    a, b = (t / n.clamp(min=1) for t in sums)  # delta of each side

    def crossed(total, uq, vp, M, P: Shift, Q: Shift):
        """sum u v about the mean, u of P's side and v of Q's: u_i + p2 - 2 p.phi_i is the square of row i there."""
        p, q = P.delta, Q.delta
        p2, q2 = p @ p, q @ q
        total = total + q2 * P.squares - 2 * q @ uq + p2 * Q.squares - 2 * p @ vp + 4 * p @ M @ q
        return total - 2 * q2 * (p @ P.rows) - 2 * p2 * (q @ Q.rows) + n * p2 * q2

    def weighted(vector, M, U: Shift, own: Shift):
        """sum u_i phi_i about the mean, u of U's side, phi of `own`'s, M = sum (the side of u) phi'."""
        d2 = U.delta @ U.delta
        gain = n * d2 - 2 * U.delta @ U.rows
        return vector + d2 * own.rows - 2 * M.mT @ U.delta - own.delta * (U.squares + gain)

    A, B = Shift(a, sums[0], Sk), Shift(b, sums[1], Sl)
    near = [t.double() for t in near]
    raw = [
        (M + torch.outer(s, c) + torch.outer(c, s) + n * torch.outer(c, c)).square().sum()
        for M, s, c in zip((S.aa, S.bb), sums, near, strict=True)
    ]
    numbers = torch.stack([
        Sk + n * (a @ a) - 2 * a @ sums[0],
        Sl + n * (b @ b) - 2 * b @ sums[1],
        crossed(Skk, S.ka, S.ka, S.aa, A, A),
        crossed(Sll, S.lb, S.lb, S.bb, B, B),
        crossed(Skl, S.kb, S.la, S.ab, A, B),
        n,
        *raw,
    ])  # fmt: skip
    return Moments(
        S.aa - n * torch.outer(a, a),
        S.bb - n * torch.outer(b, b),
        S.ab - n * torch.outer(a, b),
        S.tt,
        near[0] + a,
        near[1] + b,
        weighted(S.ka, S.aa, A, A),
        weighted(S.la, S.ab.mT, B, A),
        weighted(S.kb, S.ab, A, B),
        weighted(S.lb, S.bb, B, B),
        numbers,
    )


class Hsics(NamedTuple):
    """h = c [|N|^2 - r sum kl + s sum k sum l] of the three pairs, and c, r, s."""

    kl: torch.Tensor
    kk: torch.Tensor
    ll: torch.Tensor
    c: torch.Tensor
    r: torch.Tensor
    s: torch.Tensor
    defined: torch.Tensor  # False where a side is constant, or a mask leaves too few rows


def _hsics(S: Moments, pair: Pair) -> Hsics:
    Sk, Sl, Skk, Sll, Skl, n, raw_a, raw_b = S.numbers
    least = 4 if pair.question.unbiased else 2
    enough = n >= least
    n = n.clamp(min=least)
    if pair.question.unbiased:
        c, r, s = 1 / (n * (n - 3)), n / (n - 2), 1 / ((n - 1) * (n - 2))
    else:
        c, r, s = 1 / (n - 1) ** 2, n * 0, n * 0
    kl = c * (S.ab.square().sum() - r * Skl + s * Sk * Sl)
    kk = c * (S.aa.square().sum() - r * Skk + s * Sk * Sk)
    ll = c * (S.bb.square().sum() - r * Sll + s * Sl * Sl)
    if pair.question.stat == "hsic":
        return Hsics(kl, kk, ll, c, r, s, enough)
    # a side whose centred matrix is rounding is constant, as in `reference.cka`; NaN is not: it stays NaN
    floor = (8 * torch.finfo(pair.dtype).eps / (n - 1)) ** 2
    constant = (kk <= floor * raw_a) | (ll <= floor * raw_b)
    return Hsics(kl, kk, ll, c, r, s, enough & ~constant)


def _cka_of(h: Hsics):
    one = torch.ones_like(h.kk)
    return h.kl / (torch.where(h.defined, h.kk, one).sqrt() * torch.where(h.defined, h.ll, one).sqrt())


def _value(S: Moments, pair: Pair):
    if pair.question.stat == "transfer":
        total, norm2 = _transfer(S, pair)
        if not pair.question.normalize:
            return total
        return torch.where(norm2 == 0, 0.0, total / torch.where(norm2 == 0, 1.0, norm2))
    h = _hsics(S, pair)
    value = h.kl if pair.question.stat == "hsic" else _cka_of(h)
    return torch.where(h.defined, value, 0.0)


def _transfer(S: Moments, pair: Pair):
    """(|K~ - L~|^2, |L~|^2); with D = phi - psi, P = phi + psi: 1/2 [<D'D, P'P> + tr(D'P D'P)]."""
    if not pair.difference:
        norm2 = S.bb.square().sum()
        return (S.aa.square().sum() + norm2 - 2 * S.ab.square().sum()).clamp(min=0), norm2
    total = ((S.aa * S.bb).sum() + (S.ab * S.ab.mT).sum()) / 2
    return total.clamp(min=0), S.tt.square().sum()


class RowGradient(NamedTuple):
    """G_i = a_i A + b_i B + (u k_i + v l_i) o_i + w, o the side's own features; a, b, k, l as in `Moments`."""

    A: torch.Tensor
    B: torch.Tensor
    u: torch.Tensor | None
    v: torch.Tensor | None
    w: torch.Tensor | None


def backward(grad, call: Call, saved, need: int):
    """dx, dzx, dsigma_x, dy, dzy, dsigma_y, None where nobody asked; bits of `need` in that order."""
    pair = Pair(call, (saved[:2], saved[2:4]))
    S = _unpack(saved[4], *(len(s.z) for s in pair.sides))
    transfer = call.question.stat == "transfer"
    laws = _transfer_laws(S, pair, grad.double()) if transfer else _centred_laws(S, pair, grad.double())
    laws = [RowGradient(*(None if t is None else t.to(pair.dtype) for t in law)) for law in laws]
    pullers = [
        Puller(side, s, pair.run, bits) if bits else None
        for side, s, bits in zip(pair.given, pair.sides, (need & 7, need >> 3), strict=True)
    ]
    means = S.mean_a.to(pair.dtype), S.mean_b.to(pair.dtype)
    for rows, kept, rows_x, a, rows_y, b in pair:
        if transfer:
            a, b = (a - b, a + b) if pair.difference else (a, b)
            k = l = None
        else:
            a, b = only(kept, a - means[0]), only(kept, b - means[1])
            k, l = a.square().sum(1, keepdim=True), b.square().sum(1, keepdim=True)
        for puller, law, prepared, own in zip(pullers, laws, (rows_x, rows_y), (a, b), strict=True):
            if puller is None:
                continue
            G = a @ law.A + b @ law.B
            if law.u is not None:
                G = only(kept, G.addcmul_(law.u * k + law.v * l, own).add_(law.w))
            puller.add(rows, prepared, G)
    out = []
    for puller in pullers:
        dx, dz, dsigma = (None, None, None) if puller is None else puller.finish()
        out += [dx if dx is None or call.mask is None else only(call.mask[:, None], dx), dz, dsigma]
    return out


def _centred_laws(S: Moments, pair: Pair, grad):
    """Of CKA or HSIC, for phi and for psi."""
    h = _hsics(S, pair)
    Sk, Sl = S.numbers[:2]
    zero = torch.zeros_like(h.kl)
    grad = torch.where(h.defined, grad, zero)
    if pair.question.stat == "hsic":
        cross, own = grad, (zero, zero)
    else:
        safe = [torch.where(h.defined, t, torch.ones_like(t)) for t in (h.kk, h.ll)]
        value = _cka_of(h)
        cross = grad / (safe[0].sqrt() * safe[1].sqrt())
        own = [-grad * value / (2 * t) for t in safe]
    n = S.numbers[5].clamp(min=1)
    cross = 2 * h.c * cross
    own = [4 * h.c * t for t in own]
    eye = [torch.eye(len(t), dtype=t.dtype, device=t.device) for t in (S.aa, S.bb)]
    a = RowGradient(
        own[0] * (S.aa + h.s * Sk * eye[0]) + cross * h.s * Sl * eye[0],
        cross * S.ab.mT,
        -own[0] * h.r,
        -cross * h.r,
        (own[0] * S.ka + cross * S.la) * h.r / n,
    )
    b = RowGradient(
        cross * S.ab,
        own[1] * (S.bb + h.s * Sl * eye[1]) + cross * h.s * Sk * eye[1],
        -cross * h.r,
        -own[1] * h.r,
        (own[1] * S.lb + cross * S.kb) * h.r / n,
    )
    return a, b


def _transfer_laws(S: Moments, pair: Pair, grad):
    """Of |K~ - L~|^2 (/ |L~|^2), for phi and for psi."""
    total, norm2 = _transfer(S, pair)
    scale, pull = grad, torch.zeros_like(grad)
    if pair.question.normalize:
        safe = torch.where(norm2 == 0, torch.ones_like(norm2), norm2)
        scale = torch.where(norm2 == 0, torch.zeros_like(grad), grad / safe)
        pull = -scale * total / safe  # of |L~|^2
    if not pair.difference:
        a = RowGradient(4 * scale * S.aa, -4 * scale * S.ab.mT, None, None, None)
        b = RowGradient(-4 * scale * S.ab, 4 * (scale + pull) * S.bb, None, None, None)
        return a, b
    # phi = (P + D) / 2, psi = (P - D) / 2
    PS, DS = (S.bb + S.ab.mT) / 2, (S.ab + S.aa) / 2
    PT, DT = (S.bb - S.ab.mT) / 2, (S.ab - S.aa) / 2
    a = RowGradient(2 * scale * PS, 2 * scale * DS, None, None, None)
    square = 2 * pull * S.tt  # 4 pull psi_i T, psi = (P - D) / 2
    b = RowGradient(-2 * scale * PT - square, -2 * scale * DT + square, None, None, None)
    return a, b
