# SPDX-License-Identifier: Apache-2.0
"""Two row kernels of a divergence u KL(q || m) + v KL(p || m), m = b q + (1 - b) p, or of half of sum |p - q|.

`divergence_rows`: one program a row, both rows read twice, the second time from cache, seven numbers kept.
`divergence_gradient_rows`: one program a block of a row, each logit read once and each gradient written once. All
arithmetic in float32; the roof is memory. The forward divergence is in `triton_kl.py`. Formulas: MATH.md, section 8.
"""

import triton
import triton.language as tl

from .triton_kernels import NEGATIVE, difference, finite_maximum, load_row

MIXTURE, REVERSE, VARIATION = (tl.constexpr(k) for k in range(3))
NEAR = tl.constexpr(0.25)  # of |w|
TINY = tl.constexpr(1.1754944e-38)


@triton.jit
def log_ratio(b_z, b_y, m_s, m_t, inverse_tau, ratio):
    """w = log(p / q): with maxima that are near, z - y is exact where the sides are."""
    near = tl.abs(m_s - m_t) * inverse_tau <= 1
    b_d = (b_z - tl.where(near, 0.0, m_s)) - (b_y - tl.where(near, 0.0, m_t)) - tl.where(near, m_s - m_t, 0.0)
    return b_d * inverse_tau + ratio


@triton.jit
def class_of(b_p, b_q, b_w, b, u, v, log_b, log_c, FORM: tl.constexpr):
    """Of each class: its term, p - q, and p d term / dp; w is infinite, or NaN, where sides exclude it."""
    near = tl.abs(b_w) < NEAR
    mine = (1 - b) * b_p > b * b_q  # m by the side that is more of it
    b_t = tl.where(mine, -b_w, b_w)
    b_e = 1 / 120 + b_t * (1 / 720 + b_t * (1 / 5040))
    b_e = b_t * (1 + b_t * (0.5 + b_t * (1 / 6 + b_t * (1 / 24 + b_t * b_e))))  # exp(t) - 1
    b_apart = tl.where(near, tl.where(mine, -b_p, b_q) * b_e, b_p - b_q)
    if FORM == VARIATION:
        b_slope = tl.where(b_w == 0, 0.0, tl.where(b_w < 0, -0.5 * b_p, 0.5 * b_p))
        return 0.5 * tl.abs(b_apart), b_apart, b_slope
    elif FORM == REVERSE:
        b_term, _ = difference(b_q, b_p, -b_w)
        return b_term, b_apart, tl.where(b_p == 0, 0.0, b_p * b_w)
    else:
        b_most = tl.where(mine, (1 - b) * b_p, b * b_q)
        b_least = tl.where(mine, b * b_q, (1 - b) * b_p)
        b_share = tl.where(mine, b, 1 - b) * b_e
        # log(m / p), or log(m / q), as log((1 + x) / (1 - x))
        b_x = tl.where(near, b_share, b_least) / tl.where(near, 2 + b_share, 2 * b_most + b_least + TINY)
        b_xx = b_x * b_x
        b_log = b_x * (2 + b_xx * (0.66666317 + b_xx * (0.40024853 + b_xx * (0.27961418 + b_xx * 0.28174657))))
        # apart: a choice between two arguments becomes a load at an index of each lane
        b_log += tl.where(near | mine, 0.0, log_b) + tl.where(mine & ~near, log_c, 0.0)
        b_open = tl.where(b_p * b_q == 0, 0.0, b_w)
        b_m = b_most + b_least
        over_q, _ = difference(b_m, b_q, tl.where(mine, b_log + b_open, b_log))
        over_p, b_moved = difference(b_m, b_p, tl.where(mine, b_log, b_log - b_open))
        b_slope = (1 - b) * (u * (1 - b) - v * b) * b_apart * (b_p / (b_m + TINY)) - v * b_moved
        return u * over_q + v * over_p, b_apart, b_slope


@triton.jit
def temperature(tau_ptr, tau_r, tau, r, HAS_TAU: tl.constexpr):
    if HAS_TAU:
        tau = tl.load(tau_ptr + r * tau_r).to(tl.float32)
    return tau


@triton.jit(do_not_specialize=["R", "T"])
def divergence_rows(
    s_ptr, t_ptr,  # [R / T, T, C], any float dtype, dense rows
    tau_ptr, weight_ptr,  # [R] float, any stride
    value_ptr,  # [R] float32
    stat_ptr,  # [7, R] float32: the rows of call.py
    R, T, C, s_b, t_b, s_r, t_r, tau_r, weight_r, tau, weight, b, u, v, log_b, log_c,
    BLOCK: tl.constexpr, FORM: tl.constexpr, HAS_TAU: tl.constexpr, HAS_WEIGHT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_ptr + r // T * s_b + r % T * s_r, t_ptr + r // T * t_b + r % T * t_r
    tau = temperature(tau_ptr, tau_r, tau, r, HAS_TAU)
    inverse_tau = 1 / tau
    m_s = C * 0.0 + NEGATIVE
    m_t = m_s
    sum_s = C * 0.0
    sum_t, total, apart, mean = sum_s, sum_s, sum_s, sum_s
    for start in range(0, C, BLOCK):
        b_z = load_row(s_row, start, C, BLOCK)
        new = finite_maximum(tl.maximum(m_s, tl.max(b_z)))
        sum_s = sum_s * tl.exp((m_s - new) * inverse_tau) + tl.sum(tl.exp((b_z - new) * inverse_tau))
        m_s = tl.maximum(m_s, tl.max(b_z))
        b_y = load_row(t_row, start, C, BLOCK)
        new = finite_maximum(tl.maximum(m_t, tl.max(b_y)))
        sum_t = sum_t * tl.exp((m_t - new) * inverse_tau) + tl.sum(tl.exp((b_y - new) * inverse_tau))
        m_t = tl.maximum(m_t, tl.max(b_y))
    # a row of -inf has no probabilities
    of_p, of_q = 1 / tl.where(sum_s == 0, float("nan"), sum_s), 1 / tl.where(sum_t == 0, float("nan"), sum_t)
    ratio = tl.log(sum_t * of_p)
    for start in range(0, C, BLOCK):
        b_z = load_row(s_row, start, C, BLOCK)
        b_y = load_row(t_row, start, C, BLOCK)
        b_p = of_p * tl.exp((b_z - m_s) * inverse_tau)
        b_q = of_q * tl.exp((b_y - m_t) * inverse_tau)
        b_w = log_ratio(b_z, b_y, m_s, m_t, inverse_tau, ratio)
        b_term, b_apart, b_slope = class_of(b_p, b_q, b_w, b, u, v, log_b, log_c, FORM)
        total += tl.sum(b_term)
        apart += tl.sum(b_apart)
        mean += tl.sum(b_slope)
    # normalisers are rounded, which moves w alike for all classes: by sum_c (p - q), which is 0
    off = tl.where((tl.abs(apart) < 1e-3) & (tl.abs(mean) < float("inf")), apart, 0.0)
    value = total - tl.where(off == 0, 0.0, off * mean) + off * off * 0.5 * (u * (1 - b) * (1 - b) + v * b * b)
    mean = tl.where(value == value, mean, value)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + r * weight_r).to(tl.float32)
    tl.store(value_ptr + r, tl.where(weight == 0, 0.0, value * tau * tau * weight))
    if KEEP:
        stat = stat_ptr + r
        step = tl.cast(R, tl.int64)
        tl.store(stat, m_s)
        tl.store(stat + step, of_p)
        tl.store(stat + 2 * step, m_t)
        tl.store(stat + 3 * step, of_q)
        tl.store(stat + 4 * step, ratio)
        tl.store(stat + 5 * step, mean)
        tl.store(stat + 6 * step, value - mean)


@triton.jit(do_not_specialize=["R", "T"])
def divergence_gradient_rows(
    grad_ptr,  # [R] float32, any stride
    s_ptr, t_ptr, tau_ptr, stat_ptr,  # as `divergence_rows` has them and left them
    out_ptr,  # [R, C] in the dtype of the student
    R, T, C, s_b, t_b, s_r, t_r, grad_r, tau_r, tau, b, u, v, log_b, log_c,
    BLOCK: tl.constexpr, FORM: tl.constexpr, HAS_TAU: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    o_c = start + tl.arange(0, BLOCK)
    tau = temperature(tau_ptr, tau_r, tau, r, HAS_TAU)
    g = tl.load(grad_ptr + r * grad_r).to(tl.float32)
    stat, step = stat_ptr + r, tl.cast(R, tl.int64)
    m_s, of_p, m_t, of_q = tl.load(stat), tl.load(stat + step), tl.load(stat + 2 * step), tl.load(stat + 3 * step)
    ratio, mean = tl.load(stat + 4 * step), tl.load(stat + 5 * step)
    b_z = load_row(s_ptr + r // T * s_b + r % T * s_r, start, C, BLOCK)
    b_y = load_row(t_ptr + r // T * t_b + r % T * t_r, start, C, BLOCK)
    b_p = of_p * tl.exp((b_z - m_s) / tau)
    b_q = of_q * tl.exp((b_y - m_t) / tau)
    b_w = log_ratio(b_z, b_y, m_s, m_t, 1 / tau, ratio)
    _, _, b_slope = class_of(b_p, b_q, b_w, b, u, v, log_b, log_c, FORM)
    # tau g (p d term / dp - p sum_c p d term / dp)
    b_d = (b_slope - mean * b_p) * (tau * g)
    tl.store(out_ptr + r * C + o_c, tl.where(g == 0, 0.0, b_d), mask=o_c < C)
