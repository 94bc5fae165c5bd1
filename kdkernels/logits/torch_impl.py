# SPDX-License-Identifier: Apache-2.0
"""The family in PyTorch: rows in chunks that stay in cache, probabilities recomputed from a few numbers a row.

Nothing of the size of the logits is saved; temporaries are of the size of a chunk.
"""

from __future__ import annotations

import math

import torch

from ..autograd import at_least_float32
from .call import (
    INVERSE_S,
    INVERSE_T,
    KEPT,
    L_1,
    L_A,
    L_B,
    L_S,
    L_T,
    M_A,
    M_B,
    M_S,
    M_T,
    MAX_S,
    MAX_T,
    MEAN_S,
    RATIO,
    STUDENT,
    TEACHER,
    Extras,
    K,
    Measure,
    Problem,
    rows_of,
)  # fmt: skip

CPU_CHUNK, CUDA_CHUNK = 1 << 16, 1 << 25  # elements: a few temporaries fit the second-level cache; the launches count


def chunks(student):
    """Slices of the rows, of which none of [B, T, C] spans a part of a sample beside another."""
    (*_, T, C), R = student.shape, rows_of(student)
    rows = max(1, (CPU_CHUNK if student.device.type == "cpu" else CUDA_CHUNK) // C)
    if rows >= T:
        rows -= rows % T
        return [slice(begin, min(R, begin + rows)) for begin in range(0, R, rows)]
    return [slice(b + i, min(b + T, b + i + rows)) for b in range(0, R, T) for i in range(0, T, rows)]


def part(logits, rows: slice):
    """Those rows [r, C]; where samples of [B, T, C] lie apart, a copy of several."""
    if logits.dim() == 2:
        return logits[rows]
    first, start = divmod(rows.start, logits.shape[1])
    if start + rows.stop - rows.start <= logits.shape[1]:
        return logits[first, start : start + rows.stop - rows.start]
    return logits[first : rows.stop // logits.shape[1]].flatten(0, 1)


def _lam(problem: Problem, extras: Extras, rows: slice, count: int, like):
    """[r, 1]; NaN where it is outside [0, 1], which only a CUDA tensor can still be here."""
    if extras.lam is None:
        return like.new_full((count, 1), problem.lam)
    lam = extras.lam.expand(extras.labels.shape)[rows, None].to(like.dtype)
    return torch.where((lam >= 0) & (lam <= 1), lam, torch.nan)


def _shifted(logits, tau, dtype):
    """x - max, (x - max) / tau, its exponentials, the maximum [r, 1], and the log of the sum of exponentials."""
    x = logits.to(dtype)
    top = x.amax(-1, keepdim=True)
    x = x - top
    scaled = x / tau if tau != 1 else x
    e = scaled.exp()
    return x, scaled, e, top, e.sum(-1, keepdim=True).log()


def softmax(e, log):
    """In the place of e; rounded as the log is, which `kl` counts on."""
    return e.mul_((-log).exp())


SHORT = 128  # classes
NEAR = 0.25  # of |log(p / q)|: below, p - q - q log(p / q) is its series


def _excess(m, x, l):
    """x (exp(l) - 1 - l) = m - x - x l of each class, l = log(m / x), and x l."""
    l = l.masked_fill(x == 0, 0)
    v = l.clamp(-NEAR, NEAR)
    near = (l == v) & (x > 0)
    terms = 7 if l.dtype == torch.float32 else 13
    series = torch.full_like(v, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series = (series * v).add_(1 / math.factorial(k))
    moved = x * l
    # products with masks: a choice entry by entry takes twenty times as long on a CPU
    return series * v * v * x * near + (m - x - moved) * ~near, moved


def kl(p, q, w):
    """sum_c q_c log(q_c / p_c) of each row, as sum_c (p_c - q_c - q_c w_c), w = log(p / q): no term is negative.

    What w is off for all classes alike, by normalisers that are rounded, is a = sum_c (p_c - q_c): a^2 / 2 leaves.
    """
    terms, moved = _excess(p, q, w)
    total = terms.sum(-1)
    a = total + moved.sum(-1)
    return total - torch.where(a.abs() < 1e-3, a * a / 2, 0)


def _working_dtype(dtype, logits):
    """float64 for short rows on a CPU: it costs less than `kl` of most of them, and loses no digits of float32."""
    return torch.float64 if logits.is_cpu and logits.shape[-1] <= SHORT else dtype


def _divergence(e, log, q, w, dtype):
    """`kl` of p = softmax(e, log) and -w = log(p / q); on a CPU, where a look at values costs nothing, only of rows
    whose plain sum has lost digits of `dtype`."""
    if not e.is_cpu:
        return kl(softmax(e, log), q, -w)
    value = (w * q).masked_fill_(q == 0, 0.0).sum(-1)  # not the product alone: 0 * infinity
    least = 1 / 64 if w.dtype == dtype else 2.0**-24  # above, a normaliser's rounding is nothing
    if not value.min().item() >= least:
        near = (value < least).nonzero()[:, 0]
        value[near] = kl(softmax(e[near], log[near]), q[near], -w[near])
    return value


def _classes(labels, C):
    """The classes to read, and NaN where a label is none: only a CUDA tensor can still hold such."""
    outside = (labels < 0) | (labels >= C)
    return labels.clamp(0, C - 1)[:, None], torch.where(outside, torch.nan, 0.0)[:, None]


def _target(problem, extras, rows, p, lam, clean):
    """q [r, C]; p is the teacher's softmax, which is overwritten."""
    q = p.mul_(problem.k1)
    if clean is not None:
        q += problem.k2 * (lam * clean[0] + (1 - lam) * clean[1])
    if problem.k3:
        a, b = (_classes(labels[rows], p.shape[-1])[0] for labels in (extras.labels, extras.permuted))
        q.scatter_add_(-1, a, problem.k3 * lam).scatter_add_(-1, b, problem.k3 * (1 - lam))
    return q


def _clean_rows(extras, rows):
    return extras.clean[rows], extras.clean[extras.permutation[rows]]


def forward(student, teacher, problem: Problem, extras: Extras, need: int):
    """The loss of each row [R], and the statistics [statistics, R] that backward needs ([0] without `need`)."""
    dtype = at_least_float32(student, teacher, extras.clean)
    R, C = rows_of(student), student.shape[-1]
    values = student.new_empty(R, dtype=dtype)
    statistics = student.new_empty((problem.statistics, R) if need else (0,), dtype=dtype)
    tau, work = problem.tau, _working_dtype(dtype, student)
    for rows in chunks(student):
        z, zs, e, m_s, l_s = _shifted(part(student, rows), tau, work)
        lam = _lam(problem, extras, rows, len(z), z) if problem.labelled else None
        kept, clean_kept, value = [m_s, l_s], [], 0
        if problem.soft:
            _, ys, q, m_t, l_t = _shifted(part(teacher, rows), tau, work)
            q, clean = softmax(q, l_t), None
            if problem.cleaned():
                clean = []
                for logits in _clean_rows(extras, rows):
                    _, _, of_clean, m, l = _shifted(logits, tau, work)
                    clean.append(softmax(of_clean, l))
                    clean_kept += [m, l]
            if problem.plain_target:
                w = (ys - zs).sub_(l_t - l_s)  # digits of logits are lost in logs of their softmax
            else:
                q = _target(problem, extras, rows, q, lam, clean)
                w = q.log().sub_(zs - l_s)
            divergence = tau**2 * _divergence(e, l_s, q, w, dtype)[:, None]
            value = divergence if problem.alpha == 1 else problem.alpha * divergence
            kept += [m_t, l_t, divergence]
        else:
            kept += [torch.zeros_like(m_s)] * 3
        if problem.mixed:
            l_1 = z.exp().sum(-1, keepdim=True).log()
            kept += [l_1, *clean_kept]
        if problem.labelled:
            (a, wrong_a), (b, wrong_b) = (_classes(t[rows], C) for t in (extras.labels, extras.permuted))
            if problem.hard:
                hard = torch.where(lam == 0, 0.0, lam * (l_1 - z.gather(-1, a)))
                hard = hard + torch.where(lam == 1, 0.0, (1 - lam) * (l_1 - z.gather(-1, b)))
                value = value + (1 - problem.alpha) * hard
            value = value + (wrong_a + wrong_b + 0 * lam).to(work)
        values[rows] = value[:, 0]
        if need:
            statistics[:, rows] = torch.cat(kept, -1).mT
    return values, statistics


def backward(grad, factor: float, student, teacher, statistics, problem: Problem, extras: Extras, need: int):
    """d/d student and d/d teacher of sum_r factor grad_r loss_r; grad [R] of any stride; [0] where not asked for.

    A row with grad 0 gets exactly 0, whatever it holds: how losses leave masked rows out.
    """
    shape = rows_of(student), student.shape[-1]
    d_student = student.new_empty(shape) if need & STUDENT else None
    d_teacher = teacher.new_empty(shape) if need & TEACHER else None
    dtype, tau = statistics.dtype, problem.tau
    for rows in chunks(student):
        of = statistics[:, rows, None]
        g = grad[rows, None].to(dtype) * factor
        counts = g != 0
        z = part(student, rows).to(dtype) - of[M_S]
        lam = None
        if problem.labelled:
            lam = _lam(problem, extras, rows, len(z), z)
            (a, wrong_a), (b, wrong_b) = (_classes(t[rows], z.shape[-1]) for t in (extras.labels, extras.permuted))
        if problem.soft:
            log_p = z / tau - of[L_S]
            log_q = (part(teacher, rows).to(dtype) - of[M_T]).div_(tau).sub_(of[L_T])
            q = log_q.exp()
            if d_teacher is not None:  # tau g q_c (log q_c - log p_c - KL)
                d = torch.where(q == 0, 0.0, q * (log_q - log_p - of[K] / tau**2))
                d_teacher[rows] = torch.where(counts, d * (tau * g), 0.0).to(teacher.dtype)
                if d_student is None:
                    continue
            if not problem.plain_target:
                clean = None
                if problem.cleaned():
                    pairs = zip(_clean_rows(extras, rows), ((M_A, L_A), (M_B, L_B)), strict=True)
                    clean = [((t.to(dtype) - of[m]) / tau - of[l]).exp_() for t, (m, l) in pairs]
                q = _target(problem, extras, rows, q, lam, clean)
            d = log_p.exp_().sub_(q).mul_(problem.alpha * tau)
        else:
            d = torch.zeros_like(z)
        if problem.labelled:
            if problem.hard:
                d += z.sub_(of[L_1]).exp_().mul_(1 - problem.alpha)
                d.scatter_add_(-1, a, (problem.alpha - 1) * lam)
                d.scatter_add_(-1, b, (problem.alpha - 1) * (1 - lam))
            d += (wrong_a + wrong_b + 0 * lam).to(dtype)
        d_student[rows] = torch.where(counts, d.mul_(g), 0.0).to(student.dtype)
    empty = student.new_empty(0)
    return empty if d_student is None else d_student, empty if d_teacher is None else d_teacher


FAR = 80  # of |w|: exp(-80) is nothing beside 1, in float64 too


def _classes_of(how: Measure, p, q, w):
    """Of each class: its term, p - q, and p d term / dp; w = log(p / q), infinite where one side excludes it."""
    near = w.abs() < NEAR
    # products with masks: a choice entry by entry takes ten times as long on a CPU
    apart = (q * w.clamp(-NEAR, NEAR).expm1_()).mul_(near).add_((p - q).mul_(~near))
    if how.variation:
        return apart.abs() / 2, apart, p * w.sign() / 2
    if how.forward:
        return how.u * _excess(p, q, w)[0], apart, how.u * apart
    if how.b == 1:
        return how.v * _excess(q, p, -w)[0], apart, how.v * torch.where(p == 0, 0, p * w)
    b, c = how.b, 1 - how.b
    w = w.clamp(-1e30, 1e30)
    mine = (c * p > b * q).to(w.dtype)  # m by the side that is more of it
    other = 1 - mine
    # log(m / p) where it is mine, log(m / q) where it is not, and both of all
    log = (w * (other - mine)).clamp_(max=FAR).expm1_().mul_(b * mine + c * other).log1p_()
    log_p, log_q = log - w * other, log + w * mine
    m = b * q + c * p
    term, slope = how.u * _excess(m, q, log_q)[0], torch.zeros_like(m)
    if how.tilt:
        slope = how.tilt * c * apart * p / (m + torch.finfo(m.dtype).tiny)
    if how.v:
        over_p, moved = _excess(m, p, log_p)
        term, slope = term + how.v * over_p, slope - how.v * moved
    return term, apart, slope


class Whole:
    """Whose rows have all classes here: of nothing that is added up does another rank have a part."""

    parts = staticmethod(chunks)

    @staticmethod
    def sum(x):
        return x

    max = sum


def _exponentials(pair, tau, over):
    """Of both sides: maximum [r, 1], exp((x - max) / tau), and the sum of it."""
    tops = over.max(torch.stack([x.amax(-1, keepdim=True) for x in pair])).unbind()
    e = [((x - top) / tau).exp_() for x, top in zip(pair, tops, strict=True)]
    return tops, e, over.sum(torch.stack([t.sum(-1, keepdim=True) for t in e])).unbind()


def _log_ratio(z, y, top_z, top_y, tau, ratio):
    """w = log(p / q), 0 where both sides exclude the class: with maxima that are near, z - y is exact."""
    near = (top_z - top_y).abs() <= tau
    z, y = (x - torch.where(near, 0, top) for x, top in ((z, top_z), (y, top_y)))
    w = (z.sub_(y).sub_(torch.where(near, top_z - top_y, 0)) / tau).add_(ratio)
    return w.nan_to_num_(0.0, math.inf, -math.inf)


def divergence(student, teacher, rows_of_each, how: Measure, factor: float, need: bool, made: bool, over=Whole):
    """Values [R] times tau^2 and their weights, statistics (`call.KEPT` a row) if `need`, and, if `made`, the student's
    gradient of their sum; rows_of_each: temperatures and weights, None or [R], in the place of how.tau and of `factor`.
    over: `slices.Slices` where the ranks of a group have a part of the classes each.
    """
    dtype, (taus, weights) = at_least_float32(student, teacher), rows_of_each
    R = rows_of(student)
    values = student.new_empty(R, dtype=dtype)
    statistics = values.new_empty((KEPT, R) if need else (0,))
    gradient = student.new_empty((R, student.shape[-1]) if made else (0,))
    for rows in over.parts(student):
        tau = how.tau if taus is None else taus[rows, None].to(dtype)
        z, y = (part(t, rows).to(dtype) for t in (student, teacher))
        (top_z, top_y), (p, q), (sum_z, sum_y) = _exponentials((z, y), tau, over)
        ratio = (sum_y / sum_z).log_()
        p, q = p.div_(sum_z), q.div_(sum_y)
        finite = 0 * ratio  # NaN for a row that is poisoned
        terms, apart, slope = _classes_of(how, p, q, _log_ratio(z, y, top_z, top_y, tau, ratio))
        sums = torch.stack([t.sum(-1, keepdim=True) for t in (terms, apart, slope)])
        value, off, mean = over.sum(sums).add_(finite).unbind()
        # normalisers are rounded, which moves w alike for all classes: by sum_c (p - q), which is 0
        off = torch.where((off.abs() < 1e-3) & mean.isfinite(), off, 0)
        value = value - torch.where(off == 0, 0, off * mean) + off * off * (how.curvature / 2)
        weight = factor if weights is None else weights[rows, None].to(dtype)
        counts = torch.ones_like(value, dtype=torch.bool) if weights is None else weight != 0
        values[rows] = torch.where(counts, value * tau**2 * weight, 0)[:, 0]
        if need:
            # infinite both: KL(p || q), whose teacher's slopes are q - p
            others = torch.where(value.isinf() & (value == mean), 0, value - mean)
            statistics[:, rows] = torch.cat([top_z, 1 / sum_z, top_y, 1 / sum_y, ratio, mean, others], -1).mT
        if made:
            found = slope.sub_(mean * p).mul_(weight * tau)
            gradient[rows] = torch.where(counts, found, 0).to(student.dtype)
    return values, statistics, gradient


def divergence_gradient(grad, student, teacher, taus, statistics, how: Measure):
    """d/d student of sum_r grad_r divergence_r, [R, C]. A row with grad 0 gets exactly 0, whatever it holds."""
    found, dtype = student.new_empty((rows_of(student), student.shape[-1])), statistics.dtype
    for rows in chunks(student):
        of, g = statistics[:, rows, None], grad[rows, None].to(dtype)
        tau = how.tau if taus is None else taus[rows, None].to(dtype)
        z, y = (part(t, rows).to(dtype) for t in (student, teacher))
        p, q = (((x - of[m]) / tau).exp_() * of[i] for x, m, i in ((z, MAX_S, INVERSE_S), (y, MAX_T, INVERSE_T)))
        slope = _classes_of(how, p, q, _log_ratio(z, y, of[MAX_S], of[MAX_T], tau, of[RATIO]))[2]
        d = slope.sub_(of[MEAN_S] * p) * (g * tau)
        found[rows] = torch.where(g != 0, d, 0.0).to(student.dtype)
    return found


def lerp_rows(x, weight, other, index):
    """weight_i x_i + other_i x_index(i) along the first dimension, in at least float32, rounded once."""
    dtype = at_least_float32(x)
    R = x.shape[0]
    shape = (-1, *[1] * (x.dim() - 1))
    weight, other = (w.to(dtype).expand(R).reshape(shape) for w in (weight, other))
    if x.dtype == dtype:
        return (x[index] * other).addcmul_(x, weight)
    return (x[index].to(dtype) * other).addcmul_(x.to(dtype), weight).to(x.dtype)


def bucket_rows(student, index, tau: float, need: bool):
    """[R, k + 1]: (z - max) / tau of the chosen classes, log of the sum of its exponentials over the others; and their
    maximum and log, [2, R] if `need`."""
    dtype, (R, k) = at_least_float32(student), index.shape
    out = student.new_empty((R, k + 1), dtype=dtype)
    statistics = out.new_empty((2, R) if need else (0,))
    for rows in chunks(student):
        x = part(student, rows).to(dtype, copy=True)
        chosen = x.gather(-1, index[rows])
        top = x.scatter_(-1, index[rows], -math.inf).amax(-1, keepdim=True)
        shift = torch.where(top == -math.inf, 0, top)
        log = x.sub_(shift).div_(tau).exp_().sum(-1, keepdim=True).log_()
        whole = torch.maximum(chosen.amax(-1, keepdim=True), top)
        out[rows] = torch.cat([(chosen - whole) / tau, (shift - whole) / tau + log], -1)
        if need:
            # of nothing: what it has of the gradient is nothing, too
            statistics[:, rows] = torch.cat([shift, torch.where(log == -math.inf, math.inf, log)], -1).mT
    return out, statistics


def bucket_gradient(grad, student, index, statistics, tau: float):
    """g_i / tau at the chosen classes, g_rest / tau exp((z - m) / tau - L) at the others; 0 where g_rest is."""
    dtype, out = statistics.dtype, student.new_empty((len(index), student.shape[-1]))
    for rows in chunks(student):
        g, (top, log) = grad[rows].to(dtype) / tau, statistics[:, rows, None]
        rest = g[:, -1:]
        x = part(student, rows).to(dtype, copy=True).sub_(top).div_(tau).sub_(log).exp_().mul_(rest)
        out[rows] = x.masked_fill_(rest == 0, 0).scatter_(-1, index[rows], g[:, :-1])
    return out
