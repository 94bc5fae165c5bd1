# SPDX-License-Identifier: Apache-2.0
"""From row statistics to the value and the pair weights of its gradient: O(n) work in float64, for every backend.

A backend sums over pairs once and hands over, per row i, a = sum_j K_ij, b = sum_j L_ij, kk = sum_j K_ij^2,
kl = sum_j K_ij L_ij, ll = sum_j L_ij^2 (for "mse": kl = sum_j (K_ij - L_ij)^2), diagonal left out if `unbiased`.
The gradient of every member of the family with respect to K has then the one form

    c_ij = p_i L_ij + q_i K_ij + e_i + f_i h_j,   dL/dx_i = sum_j (c_ij + c_ji) dK_ij/dx_i  (+ the row norm's diagonal).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..call import Problem

ZERO_ROW = 1e-36  # |K_i|^2 up to which a row counts as zero in float32, the mean K_ii being 1
SIDE_ROWS = 6  # vectors a side that the backward pass reads: u, p, q, e, f, h


class RowStats(NamedTuple):
    """Sums over j per row, float64 [G, n]; `aw`, `bw` are column sums of the row-normalised matrices where needed."""

    a: torch.Tensor
    b: torch.Tensor
    kk: torch.Tensor
    kl: torch.Tensor
    ll: torch.Tensor
    aw: torch.Tensor | None = None
    bw: torch.Tensor | None = None


class Weights(NamedTuple):
    """The vectors of c_ij = p_i L_ij + q_i K_ij + e_i + f_i h_j of one side, [G, n] each (f, h: [G, 0] when unused)."""

    p: torch.Tensor
    q: torch.Tensor
    e: torch.Tensor
    f: torch.Tensor
    h: torch.Tensor


def over_rows(t):
    return t.sum(-1)


def combine(problem: Problem, stats: RowStats, count, eps: float, units, rho=None, need=(True, True), total=over_rows):
    """value [G] float64 and the Weights of both sides (None where `need` says that nobody asks).

    count: rows kept, an int or [G] float64. eps: of the dtype in which K and L were computed. units = (unit_x, unit_y)
    with K = unit * K^. rho = (rho_x, rho_y) [G, n], 1/sqrt(K_ii), where `row_normalize`. total: [G, n] -> [G], the sum
    over all rows, where `stats` has only a part of them (`ring.py`).
    """
    if problem.stat in ("mse", "row_mse"):
        return _mse(problem, stats, count, eps, total)
    ux, uy = units if not problem.row_normalize else (units[0].sqrt(), units[1].sqrt())
    n = float(count) if isinstance(count, int) else count.double()
    if problem.stat == "sum":
        value = total(stats.kl) * ux * uy
        one = torch.ones_like(stats.a) * uy[:, None]  # ux, which may leave float32, is in the scale of x's gradient
        none = torch.zeros_like(one)
        return value, (_side(one, none, none), _side(one, none, none))
    rows = _RowNormalized(stats, rho, total) if problem.row_normalize else _Plain(stats, total)
    form = estimator(problem, n)
    kl, kk, ll = rows.hsic("kl", form), rows.hsic("kk", form), rows.hsic("ll", form)
    if problem.stat == "hsic":
        unit, zero = ux * uy, torch.zeros_like(ux)
        return kl * unit, (
            rows.x_side(form, unit, zero) if need[0] else None,
            rows.y_side(form, unit, zero) if need[1] else None,
        )
    defined = ~(constant(kk, rows.total("kk"), form, eps) | constant(ll, rows.total("ll"), form, eps))
    one = torch.ones_like(kk)
    kk, ll = torch.where(defined, kk, one), torch.where(defined, ll, one)
    alpha = (1 / (kk.sqrt() * ll.sqrt())) * defined
    value = kl * alpha
    return value, (
        rows.x_side(form, alpha, -value / kk) if need[0] else None,
        rows.y_side(form, alpha, -value / ll) if need[1] else None,
    )


# The next four are arithmetic alone: Triton compiles the same lines for the small schedule.


def coefficients(n, unbiased, center):
    """(c, r, s) of h(K, L) = c [ S_KL - r a.b + s A B ], the shape that HSIC_0, HSIC_1 and the uncentred sum share."""
    if unbiased:
        return 1 / (n * (n - 3)), 2 / (n - 2), 1 / ((n - 1) * (n - 2))
    elif center:
        return 1 / ((n - 1) * (n - 1)), 2 / n, 1 / (n * n)
    else:
        return 1 / ((n - 1) * (n - 1)), 0 * n, 0 * n


def centred(c, r, s, total, cross, own, other):
    return c * (total - r * cross + s * own * other)


def plain_weights(c, r, s, alpha, beta, own, other, own_total, other_total):
    """c_ij = c [alpha C(L) + beta C(K)]_ij, C(L)_ij = L_ij - r/2 (b_i + b_j) + s B, split evenly over i and j."""
    p, q = c * alpha, c * beta
    return p, q, s * (p * other_total + q * own_total) - r * (p * other + q * own)


def row_weights(c, alpha, beta, rho_own, rho_other):
    return c * alpha * rho_own * rho_other, c * beta * rho_own * rho_own


class Form(NamedTuple):
    """`coefficients`"""

    c: torch.Tensor | float
    r: torch.Tensor | float
    s: torch.Tensor | float


def estimator(problem: Problem, n) -> Form:
    if problem.unbiased:
        n = n.clamp(min=4) if isinstance(n, torch.Tensor) else n  # a smaller masked group is set to 0 by the caller
    else:
        n = n.clamp(min=2) if isinstance(n, torch.Tensor) else max(n, 2.0)
    return Form(*coefficients(n, problem.unbiased, problem.center))


def constant(h, total, form: Form, eps: float):
    """Whether a side has no direction, h(K, K) being below the rounding of S_KK: CKA is 0 there, with zero gradient."""
    return h <= (8 * eps) ** 2 * form.c * total


def _column(value):
    return value[:, None] if isinstance(value, torch.Tensor) else value


def _side(p, q, e, f=None, h=None) -> Weights:
    none = p.new_empty(p.shape[0], 0)
    return Weights(p, q, e, none if f is None else f, none if h is None else h)


class _Plain:
    """K and L symmetric: row sums are column sums."""

    def __init__(self, stats: RowStats, total):
        self.over = total
        self.sums = {"k": stats.a, "l": stats.b}
        self.totals = {"k": total(stats.a), "l": total(stats.b)}
        self.squares = {which: total(getattr(stats, which)) for which in ("kk", "kl", "ll")}

    def total(self, which):
        return self.squares[which]

    def hsic(self, which, form):
        first, second = which
        cross = self.over(self.sums[first] * self.sums[second])
        return centred(*form, self.squares[which], cross, self.totals[first], self.totals[second])

    def _weights(self, form, alpha, beta, own, other):
        columns = [_column(v) for v in (*form, alpha, beta)]
        totals = [_column(self.totals[which]) for which in (own, other)]
        p, q, e = plain_weights(*columns, self.sums[own], self.sums[other], *totals)
        return _side(p.expand_as(e), q.expand_as(e), e)

    def x_side(self, form, alpha, beta):
        return self._weights(form, alpha, beta, "k", "l")

    def y_side(self, form, alpha, beta):
        return self._weights(form, alpha, beta, "l", "k")


class _RowNormalized:
    """K~_ij = rho_i K_ij is not symmetric: rows sums rho_i a_i and column sums aw_j both enter."""

    def __init__(self, stats: RowStats, rho, total):
        self.over = total
        self.rho = dict(zip("kl", rho, strict=True))
        self.rows = {"k": rho[0] * stats.a, "l": rho[1] * stats.b}
        self.columns = {"k": stats.aw, "l": stats.bw}
        self.sums = {"kk": stats.kk, "kl": stats.kl, "ll": stats.ll}

    def total(self, which):
        return self.over(self.rho[which[0]] * self.rho[which[1]] * self.sums[which])

    def hsic(self, which, form):
        first, second = which
        value = self.total(which)
        if self.columns["k"] is not None:
            value = value - form.r / 2 * self.over(self.rows[first] * self.rows[second])
            value = value - form.r / 2 * self.over(self.columns[first] * self.columns[second])
            value = value + form.s * self.over(self.rows[first]) * self.over(self.rows[second])
        return form.c * value

    def _weights(self, form, alpha, beta, own, other):
        """dL/dK_ij = rho_i M_ij, M = c [alpha C(L~) + beta C(K~)]; the backward pass adds the diagonal term."""
        c, alpha, beta = _column(form.c), alpha[:, None], beta[:, None]
        f = self.rho[own]
        p, q = row_weights(c, alpha, beta, f, self.rho[other])
        if self.columns["k"] is None:
            return _side(p, q, torch.zeros_like(p), f, torch.zeros_like(p))
        rows = alpha * self.rows[other] + beta * self.rows[own]
        columns = alpha * self.columns[other] + beta * self.columns[own]
        mean = _column(form.s) * self.over(rows)[:, None]
        half = _column(form.r) / 2
        return _side(p, q, f * c * (mean - half * rows), f, -c * half * columns)

    def x_side(self, form, alpha, beta):
        return self._weights(form, alpha, beta, "k", "l")

    def y_side(self, form, alpha, beta):
        return self._weights(form, alpha, beta, "l", "k")


def _mse(problem: Problem, stats: RowStats, count, eps: float, total):
    n = float(count) if isinstance(count, int) else count.double().clamp(min=1)[:, None]
    r = torch.ones_like(stats.a) / (n * n if problem.mean else 1.0)
    zero = torch.zeros_like(r)
    if problem.stat == "mse":
        side = _side(-2 * r, 2 * r, zero)
        return total(r * stats.kl), (side, side)
    # unit rows: sum_j (K_ij/|K_i| - L_ij/|L_i|)^2 = [K_i != 0] + [L_i != 0] - 2 cos_i; p and q have to fit float32
    least = ZERO_ROW if eps > torch.finfo(torch.float64).eps else 0.0
    kk, ll = (torch.where(s <= least, torch.inf, s) for s in (stats.kk, stats.ll))
    cross = 1 / (kk.sqrt() * ll.sqrt())
    cos = stats.kl * cross
    value = total(r * ((stats.kk > least).double() + (stats.ll > least).double() - 2 * cos))
    p = -2 * r * cross
    return value, (_side(p, 2 * r * cos / kk, zero), _side(p, 2 * r * cos / ll, zero))


def pack_rows(value, sides, u, count, problem: Problem, need: int, dtype):
    """The value and [G, 12, n] = u, p, q, e, f, h of x and of y; both 0 for a group whose mask leaves too few rows."""
    if isinstance(count, torch.Tensor):
        enough = count >= problem.minimum
        value = torch.where(enough, value, torch.zeros_like(value))
    if not need:
        return value.to(dtype), value.new_empty(0, dtype=dtype)
    some = next(side for side in sides if side is not None)
    rows = some.e.new_zeros((some.e.shape[0], 2 * SIDE_ROWS, some.e.shape[1]), dtype=dtype)
    for k, (means, side) in enumerate(zip(u, sides, strict=True)):
        for place, vector in enumerate((means, *(side or ()))):
            if vector is not None and vector.shape[-1]:
                rows[:, SIDE_ROWS * k + place] = vector
    if isinstance(count, torch.Tensor):
        rows = torch.where(enough[:, None, None], rows, torch.zeros_like(rows))
    return value.to(dtype), rows


def unpack_weights(rows, grad, side: int, problem: Problem) -> Weights:
    """One side's weights times the upstream gradient [G]: multiplying n-vectors here spares a pass over n x p later."""
    p, q, e, f, h = rows[:, SIDE_ROWS * side + 1 : SIDE_ROWS * (side + 1)].unbind(1)
    p, q, e, h = (v * grad[:, None] for v in (p, q, e, h))
    none = f[:, :0]
    return Weights(p, q, e, f, h) if problem.row_normalize else Weights(p, q, e, none, none)
