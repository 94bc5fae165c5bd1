# SPDX-License-Identifier: Apache-2.0
"""Three row kernels: the mixed loss with what its gradient needs, the gradient, and the mixing of rows.

`loss_rows`: one program a row, each logit read once (twice where the target is a mixture), running maxima, so any C.
`gradient_rows`: one program a block of a row, probabilities from the saved maxima and logs, each logit read once and
each gradient written once. `mix_rows`: both rows read once, one written. All arithmetic in float32; the roof is memory.
"""

import triton
import triton.language as tl

NEGATIVE = tl.constexpr(float("-inf"))
NEAR = tl.constexpr(1 / 8)  # of a divergence: below, the difference of two logs has lost digits


@triton.jit
def load_row(row_ptr, start, C, BLOCK: tl.constexpr):
    """A block of a row in float32, -inf beyond its end."""
    o_c = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + o_c, mask=o_c < C, other=NEGATIVE).to(tl.float32)


@triton.jit
def finite_maximum(m):
    """A maximum to subtract: 0 for a row that has only -inf so far."""
    return tl.where(m == NEGATIVE, 0.0, m)


@triton.jit
def log_sum(m, total):
    """log of the normaliser; NaN for a row of -inf, which has no probabilities."""
    return tl.where(m == NEGATIVE, float("nan"), tl.log(total))


@triton.jit
def normaliser(row_ptr, C, inverse_tau, BLOCK: tl.constexpr):
    """Maximum of a row and log of sum_c exp((y_c - maximum) / tau)."""
    m = C * 0.0 + NEGATIVE
    total = C * 0.0
    for start in range(0, C, BLOCK):
        b_y = load_row(row_ptr, start, C, BLOCK)
        new = finite_maximum(tl.maximum(m, tl.max(b_y)))
        total = total * tl.exp((m - new) * inverse_tau) + tl.sum(tl.exp((b_y - new) * inverse_tau))
        m = tl.maximum(m, tl.max(b_y))
    return m, log_sum(m, total)


@triton.jit
def share(lam_ptr, lam_r, number, r, HAS_LAM: tl.constexpr):
    """lambda of row r, NaN outside [0, 1]."""
    lam = number
    if HAS_LAM:
        lam = tl.load(lam_ptr + r * lam_r).to(tl.float32)
    return tl.where((lam >= 0) & (lam <= 1), lam, float("nan"))


@triton.jit
def mixture(
    b_q, a_row, b_row, start, C, inverse_tau, m_a, l_a, m_b, l_b, first, second, lam, k1, k2, k3,
    BLOCK: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """q = k1 p_t(x~) + k2 [lam p_t(x) + (1 - lam) p_t(x')] + k3 mixed label"""
    b_q = b_q * k1
    if CLEAN:
        b_a = tl.exp((load_row(a_row, start, C, BLOCK) - m_a) * inverse_tau - l_a)
        b_b = tl.exp((load_row(b_row, start, C, BLOCK) - m_b) * inverse_tau - l_b)
        b_q += k2 * (lam * b_a + (1 - lam) * b_b)
    o_c = start + tl.arange(0, BLOCK)
    return b_q + k3 * (lam * (o_c == first).to(tl.float32) + (1 - lam) * (o_c == second).to(tl.float32))


@triton.jit
def difference(b_p, b_q, b_w):
    """p - q - q w >= 0, w = log(p / q), by its series where the terms cancel; and q w."""
    b_w = tl.where(b_q == 0, 0.0, b_w)
    b_series = 0.5 + b_w * (1 / 6 + b_w * (1 / 24 + b_w * (1 / 120 + b_w * (1 / 720 + b_w * (1 / 5040)))))
    near = (tl.abs(b_w) < 0.25) & (b_q > 0)
    return tl.where(near, b_series * b_w * b_w * b_q, b_p - b_q - b_q * b_w), b_q * b_w


@triton.jit(do_not_specialize=["R"])
def loss_rows(
    s_ptr, t_ptr,  # [R, C], any float dtype, dense rows
    labels_ptr, permuted_ptr,  # [R] int64
    lam_ptr,  # [R] float, any stride
    clean_ptr,  # [R, C]
    order_ptr,  # [R] int64
    value_ptr,  # [R] float32
    stat_ptr,  # [6 or 10, R] float32: the rows of call.py
    R, C, s_r, t_r, clean_r, lam_r, tau, inverse_tau, alpha, k1, k2, k3, number,
    BLOCK: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, LABELLED: tl.constexpr, PLAIN: tl.constexpr,
    CLEAN: tl.constexpr, HAS_LAM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_ptr + r * s_r, t_ptr + r * t_r
    m_s = C * 0.0 + NEGATIVE
    m_t = m_s
    sum_s = C * 0.0
    sum_1, sum_t, cross, ref_s, ref_t = sum_s, sum_s, sum_s, sum_s, sum_s
    for start in range(0, C, BLOCK):
        b_z = load_row(s_row, start, C, BLOCK)
        new = finite_maximum(tl.maximum(m_s, tl.max(b_z)))
        sum_s = sum_s * tl.exp((m_s - new) * inverse_tau) + tl.sum(tl.exp((b_z - new) * inverse_tau))
        if HARD:
            sum_1 = sum_1 * tl.exp(m_s - new) + tl.sum(tl.exp(b_z - new))
        m_s = tl.maximum(m_s, tl.max(b_z))
        ref_s = tl.where(start == 0, new, ref_s)
        if SOFT and PLAIN:
            b_y = load_row(t_row, start, C, BLOCK)
            new = finite_maximum(tl.maximum(m_t, tl.max(b_y)))
            ref_t = tl.where(start == 0, new, ref_t)
            b_e = tl.exp((b_y - new) * inverse_tau)
            fade = tl.exp((m_t - new) * inverse_tau)
            sum_t = sum_t * fade + tl.sum(b_e)
            # differences from the first block's maxima: logits may be far from 0
            b_d = (b_y - ref_t) - (b_z - ref_s)
            cross = cross * fade + tl.sum(tl.where(b_e == 0, 0.0, b_e * b_d))
            m_t = tl.maximum(m_t, tl.max(b_y))
    l_s = log_sum(m_s, sum_s)
    lam = C * 0.0
    first, second = r * 0, r * 0
    value = C * 0.0
    if LABELLED:
        lam = share(lam_ptr, lam_r, number, r, HAS_LAM)
        first, second = tl.load(labels_ptr + r), tl.load(permuted_ptr + r)
        outside = (first < 0) | (first >= C) | (second < 0) | (second >= C)
        value = tl.where(outside, float("nan"), 0 * lam)
        first, second = tl.where(outside, 0, first), tl.where(outside, 0, second)
    l_t, divergence = value * 0, value * 0
    m_a, l_a, m_b, l_b = l_t, l_t, l_t, l_t
    if SOFT:
        if PLAIN:
            l_t = log_sum(m_t, sum_t)
            # KL = E_q[y - z] / tau - log Z_t + log Z_s, all relative to the reference maxima
            divergence = cross / sum_t * inverse_tau - ((m_t - ref_t) * inverse_tau + l_t)
            divergence += (m_s - ref_s) * inverse_tau + l_s
        else:
            m_t, l_t = normaliser(t_row, C, inverse_tau, BLOCK)
            a_row, b_row = clean_ptr, clean_ptr
            if CLEAN:
                a_row = clean_ptr + r * clean_r
                b_row = clean_ptr + tl.load(order_ptr + r).to(tl.int64) * clean_r
                m_a, l_a = normaliser(a_row, C, inverse_tau, BLOCK)
                m_b, l_b = normaliser(b_row, C, inverse_tau, BLOCK)
        if divergence < NEAR:  # a mixture's is still 0
            total, moved = divergence * 0, divergence * 0
            for start in range(0, C, BLOCK):
                b_z = load_row(s_row, start, C, BLOCK) - m_s
                b_y = load_row(t_row, start, C, BLOCK) - m_t
                b_q = tl.exp(b_y * inverse_tau - l_t)
                b_w = (b_z - b_y) * inverse_tau - (l_s - l_t)
                if not PLAIN:
                    b_q = mixture(
                        b_q, a_row, b_row, start, C, inverse_tau, m_a, l_a, m_b, l_b, first, second, lam, k1, k2, k3,
                        BLOCK, CLEAN,
                    )  # fmt: skip
                    b_w = b_z * inverse_tau - l_s - tl.log(tl.where(b_q == 0, 1.0, b_q))
                b_term, b_moved = difference(tl.exp(b_z * inverse_tau - l_s), b_q, b_w)
                total += tl.sum(b_term)
                moved += tl.sum(b_moved)
            # what w is off for all classes alike, by normalisers that are rounded
            off = total + moved
            divergence = total - tl.where(tl.abs(off) < 1e-3, off * off * 0.5, 0.0)
        divergence *= tau * tau
        value += alpha * divergence
    l_1 = value * 0
    if HARD:
        l_1 = log_sum(m_s, sum_1)
        of_first = l_1 - (tl.load(s_row + first).to(tl.float32) - m_s)
        of_second = l_1 - (tl.load(s_row + second).to(tl.float32) - m_s)
        hard = tl.where(lam == 0, 0.0, lam * of_first) + tl.where(lam == 1, 0.0, (1 - lam) * of_second)
        value += (1 - alpha) * hard
    tl.store(value_ptr + r, value)
    if KEEP:
        stat = stat_ptr + r
        step = tl.cast(R, tl.int64)
        tl.store(stat, m_s)
        tl.store(stat + step, l_s)
        tl.store(stat + 2 * step, m_t)
        tl.store(stat + 3 * step, l_t)
        tl.store(stat + 4 * step, divergence)
        tl.store(stat + 5 * step, l_1)
        if CLEAN:
            tl.store(stat + 6 * step, m_a)
            tl.store(stat + 7 * step, l_a)
            tl.store(stat + 8 * step, m_b)
            tl.store(stat + 9 * step, l_b)


@triton.jit(do_not_specialize=["R"])
def gradient_rows(
    grad_ptr,  # [R] float32, any stride
    s_ptr, t_ptr, labels_ptr, permuted_ptr, lam_ptr, clean_ptr, order_ptr,
    stat_ptr,  # as `loss_rows` left them
    out_ptr,  # [R, C] in the dtype of the student
    R, C, grad_r, s_r, t_r, clean_r, lam_r, factor, tau, inverse_tau, alpha, k1, k2, k3, number,
    BLOCK: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, LABELLED: tl.constexpr, PLAIN: tl.constexpr,
    CLEAN: tl.constexpr, HAS_LAM: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    o_c = start + tl.arange(0, BLOCK)
    m_c = o_c < C
    g = tl.load(grad_ptr + r * grad_r).to(tl.float32) * factor
    stat, step = stat_ptr + r, tl.cast(R, tl.int64)
    m_s, l_s = tl.load(stat), tl.load(stat + step)
    b_z = load_row(s_ptr + r * s_r, start, C, BLOCK) - m_s
    lam = g * 0
    first, second = r * 0, r * 0
    if LABELLED:
        lam = share(lam_ptr, lam_r, number, r, HAS_LAM)
        first, second = tl.load(labels_ptr + r), tl.load(permuted_ptr + r)
        outside = (first < 0) | (first >= C) | (second < 0) | (second >= C)
        lam = tl.where(outside, float("nan"), lam)
    b_d = b_z * 0
    if SOFT:
        m_t, l_t = tl.load(stat + 2 * step), tl.load(stat + 3 * step)
        b_log_q = (load_row(t_ptr + r * t_r, start, C, BLOCK) - m_t) * inverse_tau - l_t
        b_log_p = b_z * inverse_tau - l_s
        b_q = tl.exp(b_log_q)
        if not PLAIN:
            a_row, b_row = clean_ptr, clean_ptr
            m_a, l_a, m_b, l_b = g, g, g, g
            if CLEAN:
                a_row = clean_ptr + r * clean_r
                b_row = clean_ptr + tl.load(order_ptr + r).to(tl.int64) * clean_r
                m_a, l_a = tl.load(stat + 6 * step), tl.load(stat + 7 * step)
                m_b, l_b = tl.load(stat + 8 * step), tl.load(stat + 9 * step)
            b_q = mixture(
                b_q, a_row, b_row, start, C, inverse_tau, m_a, l_a, m_b, l_b, first, second, lam, k1, k2, k3,
                BLOCK, CLEAN,
            )  # fmt: skip
        b_d = (tl.exp(b_log_p) - b_q) * (alpha * tau)
    if HARD:
        l_1 = tl.load(stat + 5 * step)
        b_hard = lam * (o_c == first).to(tl.float32) + (1 - lam) * (o_c == second).to(tl.float32)
        b_d += (tl.exp(b_z - l_1) - b_hard) * (1 - alpha)
    if LABELLED:
        b_d += 0 * lam
    # g [alpha tau (p_c - q_c) + (1 - alpha) (p_c^1 - y_c)]
    tl.store(out_ptr + r * C + o_c, tl.where(g == 0, 0.0, b_d * g), mask=m_c)


@triton.jit
def mix_rows(
    x_ptr, out_ptr,  # [R, width], contiguous
    weight_ptr, other_ptr,  # [R] float, any stride
    index_ptr,  # [R] int64
    width, weight_r, other_r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    weight = tl.load(weight_ptr + r * weight_r).to(tl.float32)
    other = tl.load(other_ptr + r * other_r).to(tl.float32)
    b_x = tl.load(x_ptr + r * width + o, mask=m, other=0).to(tl.float32)
    b_y = tl.load(x_ptr + tl.load(index_ptr + r) * width + o, mask=m, other=0).to(tl.float32)
    # weight_i x_i + other_i x_index(i)
    tl.store(out_ptr + r * width + o, weight * b_x + other * b_y, mask=m)
