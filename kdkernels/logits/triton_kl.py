# SPDX-License-Identifier: Apache-2.0
"""KL(q || p) of rows and, in the same launch, the gradient of their sum: each logit is read once where a row fits.

A program takes a row, or several short ones. Up to CHUNKS pieces of a row stay in registers between the sums of
exponentials and what needs these; longer rows are read twice, the second time from cache. The maximum of its first
piece stands for that of a row: as good, unless a sum overflows. Rows where it does, with infinite logits, or whose
sides lie far apart, are done again from their maxima (`careful`). `kl_again`: the same for an upstream that is not 1.
All arithmetic in float32. MATH.md, section 7.
"""

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(-1e30)  # beyond the end of a row: no probability, and a difference of two is a number
NEGATIVE = tl.constexpr(float("-inf"))
FAR = tl.constexpr(16.0)  # temperatures between the sides: above, z - y has lost too many digits
NEAR = tl.constexpr(0.25)  # of |w|


@triton.jit
def piece(row_ptr, start, C, CHUNK: tl.constexpr, FILL: tl.constexpr, ENDS: tl.constexpr = True):
    """[ROWS, CHUNK] logits in float32, FILL beyond the end, which may be inside of this piece."""
    o_c = start + tl.arange(0, CHUNK)[None, :]
    if not ENDS:
        return tl.load(row_ptr + o_c).to(tl.float32)
    b_x = tl.load(row_ptr + o_c, mask=o_c < C, other=FILL).to(tl.float32)
    if row_ptr.dtype.element_ty == tl.float16:  # which has no number so low
        b_x = tl.where(o_c < C, b_x, FILL)
    return b_x


@triton.jit
def _more(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _sums(a, b, c, d):
    return a + c, b + d


@triton.jit
def maxima(b_z, b_y):
    return tl.reduce((b_z, b_y), 1, _more)


@triton.jit
def sums(b_s, b_t):
    """Of both along a row: through shared memory together."""
    return tl.reduce((b_s, b_t), 1, _sums)


@triton.jit
def quotient(a, b, of_b):
    """a / b, 1 of equal ones; of_b is 1 / b."""
    return tl.where(a == b, 1.0, a * of_b)


@triton.jit
def exponentials(s_row, t_row, start, C, inverse, shift_s, shift_t, CHUNK: tl.constexpr, ENDS: tl.constexpr):
    """2^(z / tau - shift) of both sides of a piece, in units of log 2, and z - y."""
    b_z, b_y = piece(s_row, start, C, CHUNK, NONE, ENDS), piece(t_row, start, C, CHUNK, NONE, ENDS)
    b_p, b_q = tl.exp2(b_z * inverse[:, None] - shift_s[:, None]), tl.exp2(b_y * inverse[:, None] - shift_t[:, None])
    return b_p, b_q, b_z - b_y


@triton.jit
def terms(b_u, b_p, b_q, inverse_tau, offset, ratio, CAREFUL: tl.constexpr):
    """q (exp w - 1 - w), q w and p - q of each class, w = u / tau - offset = log(p / q); all times Z_t, as b_q is."""
    b_w = b_u * inverse_tau[:, None] - offset[:, None]
    b_moved = b_q * b_w
    if CAREFUL:  # no 0 * infinity
        b_moved = tl.where(b_q == 0, 0.0, b_moved)
    b_series = b_w * (0.5 + b_w * (0.166666424 + b_w * (0.0416666364 + b_w * (0.00834884779 + b_w * 0.00139082786))))
    b_apart = b_p * ratio[:, None] - b_q
    return tl.where(tl.abs(b_w) < NEAR, b_moved * b_series, b_apart - b_moved), b_moved, b_apart


@triton.jit
def store_gradient(row_ptr, start, C, b_apart, of_q, m_r, CHUNK: tl.constexpr, ENDS: tl.constexpr = True):
    """weight tau (p - q)"""
    o_c = start + tl.arange(0, CHUNK)[None, :]
    m_c = m_r[:, None] if not ENDS else (o_c < C) & m_r[:, None]
    tl.store(row_ptr + o_c, b_apart * of_q[:, None], mask=m_c)


@triton.jit
def careful(s_row, t_row, out_row, C, tau, weight, m_r, CHUNK: tl.constexpr, MADE: tl.constexpr):
    """Maxima, sums, offset, sums of the terms; the gradient is stored."""
    inverse_tau = 1 / tau
    b_s = tl.full([tau.shape[0], CHUNK], NEGATIVE, tl.float32)
    b_t = b_s
    for start in range(0, C, CHUNK):
        b_s = tl.maximum(b_s, piece(s_row, start, C, CHUNK, NEGATIVE))
        b_t = tl.maximum(b_t, piece(t_row, start, C, CHUNK, NEGATIVE))
    m_s, m_t = maxima(b_s, b_t)
    b_s = tl.zeros([tau.shape[0], CHUNK], tl.float32)
    b_t = b_s
    for start in range(0, C, CHUNK):
        b_s += tl.exp2((piece(s_row, start, C, CHUNK, NEGATIVE) - m_s[:, None]) * (inverse_tau * LOG2E)[:, None])
        b_t += tl.exp2((piece(t_row, start, C, CHUNK, NEGATIVE) - m_t[:, None]) * (inverse_tau * LOG2E)[:, None])
    sum_s, sum_t = sums(b_s, b_t)
    of_s, of_t = 1 / sum_s, 1 / sum_t
    ratio = quotient(sum_t, sum_s, of_s)
    offset = -tl.log(ratio)
    near = tl.abs(m_s - m_t) <= tau
    b_s = tl.zeros([tau.shape[0], CHUNK], tl.float32)
    b_t = b_s
    for start in range(0, C, CHUNK):
        b_z = piece(s_row, start, C, CHUNK, NEGATIVE)
        b_y = piece(t_row, start, C, CHUNK, NEGATIVE)
        b_p = tl.exp2((b_z - m_s[:, None]) * (inverse_tau * LOG2E)[:, None])
        b_q = tl.exp2((b_y - m_t[:, None]) * (inverse_tau * LOG2E)[:, None])
        # z - y is exact where the sides are within a factor of 2
        b_u = tl.where(near[:, None], b_z - b_y - (m_s - m_t)[:, None], (b_z - m_s[:, None]) - (b_y - m_t[:, None]))
        b_term, b_moved, b_apart = terms(b_u, b_p, b_q, inverse_tau, offset, ratio, True)
        b_s += b_term
        b_t += b_moved
        if MADE:
            left = weight == 0  # a row of no weight has no gradient, whatever it holds
            b_apart, of_q = tl.where(left[:, None], 0.0, b_apart), tl.where(left, 0.0, tau * weight * of_t)
            store_gradient(out_row, start, C, b_apart, of_q, m_r, CHUNK)
    total, moved = sums(b_s, b_t)
    return m_s, m_t, of_s, of_t, offset, total * of_t, moved * of_t


@triton.jit
def whole_rows(
    s_row, t_row, out_row, C, tau, weight, m_r, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MADE: tl.constexpr
):
    """KL of each row and sum_c q w; references, inverse normalisers relative to them, the log of their ratio.

    With MADE weight times the gradient is stored.
    """
    inverse_tau = 1 / tau
    inverse = inverse_tau * LOG2E
    pieces = ((piece(s_row, 0, C, CHUNK, NONE), piece(t_row, 0, C, CHUNK, NONE)),)
    for k in tl.static_range(1, CHUNKS):
        pieces = pieces + ((piece(s_row, k * CHUNK, C, CHUNK, NONE), piece(t_row, k * CHUNK, C, CHUNK, NONE)),)
    m_s, m_t = maxima(pieces[0][0], pieces[0][1])
    # numbers of their own, or a difference of them would be a multiply-add, in which one of them is not rounded
    shift_s, shift_t = tl.minimum(m_s * inverse, 3e38), tl.minimum(m_t * inverse, 3e38)
    found = ()
    for k in tl.static_range(CHUNKS):
        b_p = tl.exp2(pieces[k][0] * inverse[:, None] - shift_s[:, None])
        b_q = tl.exp2(pieces[k][1] * inverse[:, None] - shift_t[:, None])
        found = found + ((b_p, b_q, pieces[k][0] - pieces[k][1]),)
        if k == 0:
            b_s, b_t = b_p, b_q
        else:
            b_s, b_t = b_s + b_p, b_t + b_q
    whole = C // CHUNK * CHUNK  # no mask for what is inside of every row
    if not CHUNKS:
        b_s = tl.zeros([tau.shape[0], CHUNK], tl.float32)
        b_t = b_s
        for start in range(0, whole, CHUNK):
            b_p, b_q, _ = exponentials(s_row, t_row, start, C, inverse, shift_s, shift_t, CHUNK, False)
            b_s, b_t = b_s + b_p, b_t + b_q
        if whole < C:
            b_p, b_q, _ = exponentials(s_row, t_row, whole, C, inverse, shift_s, shift_t, CHUNK, True)
            b_s, b_t = b_s + b_p, b_t + b_q
    sum_s, sum_t = sums(b_s, b_t)
    of_s, of_t = 1 / sum_s, 1 / sum_t
    ratio = quotient(sum_t, sum_s, of_s)
    offset = (shift_s - shift_t) * LN2 - tl.log(ratio)
    of_q = tau * weight * of_t
    for k in tl.static_range(CHUNKS):
        b_p, b_q, b_u = found[k]
        b_term, b_moved, b_apart = terms(b_u, b_p, b_q, inverse_tau, offset, ratio, False)
        if k == 0:
            b_s, b_t = b_term, b_moved
        else:
            b_s, b_t = b_s + b_term, b_t + b_moved
        if MADE:
            store_gradient(out_row, k * CHUNK, C, b_apart, of_q, m_r, CHUNK)
    if not CHUNKS:
        b_s = tl.zeros([tau.shape[0], CHUNK], tl.float32)
        b_t = b_s
        for start in range(0, whole, CHUNK):
            b_p, b_q, b_u = exponentials(s_row, t_row, start, C, inverse, shift_s, shift_t, CHUNK, False)
            b_term, b_moved, b_apart = terms(b_u, b_p, b_q, inverse_tau, offset, ratio, False)
            b_s, b_t = b_s + b_term, b_t + b_moved
            if MADE:
                store_gradient(out_row, start, C, b_apart, of_q, m_r, CHUNK, False)
        if whole < C:
            b_p, b_q, b_u = exponentials(s_row, t_row, whole, C, inverse, shift_s, shift_t, CHUNK, True)
            b_term, b_moved, b_apart = terms(b_u, b_p, b_q, inverse_tau, offset, ratio, False)
            b_s, b_t = b_s + b_term, b_t + b_moved
            if MADE:
                store_gradient(out_row, whole, C, b_apart, of_q, m_r, CHUNK, True)
    total, moved = sums(b_s, b_t)
    total, moved = total * of_t, moved * of_t
    fine = (tl.abs(offset) < FAR) & (tl.abs(moved) < float("inf"))
    fine &= NONE * inverse - tl.minimum(shift_s, shift_t) < -200  # nothing has no exponential
    # sums are of 2^(x / tau - shift), and a shift is rounded: what is kept is relative to the references themselves
    of_s, of_t = of_s * tl.exp2(m_s * inverse - shift_s), of_t * tl.exp2(m_t * inverse - shift_t)
    offset -= (m_s - m_t) * inverse_tau
    if tl.min(fine.to(tl.int32), 0) == 0:
        m_s, m_t, of_s, of_t, offset, total, moved = careful(s_row, t_row, out_row, C, tau, weight, m_r, CHUNK, MADE)
    # normalisers are rounded, which moves w alike for all classes: by sum_c (p - q), which is 0
    off = total + moved
    value = total - tl.where(tl.abs(off) < 1e-3, off * off * 0.5, 0.0)
    if C == 1:  # which is certain, on both sides
        value, moved, offset = value * 0, moved * 0, offset * 0
    return value, moved, m_s, m_t, of_s, of_t, offset


@triton.jit
def rows_of_program(R, ROWS: tl.constexpr):
    """Row indices, int64, the last one again where there are no more; and which of them are the program's own."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return tl.minimum(o_r, R - 1).to(tl.int64), o_r < R


@triton.jit
def logit_rows(ptr, o_r, T, of_sample, of_row, UNIT: tl.constexpr):
    """Pointers to rows [ROWS, 1] of [R / T, T, C], or, where of_sample is None, of [R, C]."""
    if of_sample is not None:
        in_sample = o_r.to(tl.int32) % T  # a division of 64 bits takes a hundred instructions
        return (ptr + (((o_r.to(tl.int32) // T).to(tl.int64) * of_sample + in_sample.to(tl.int64) * of_row) * UNIT))[
            :, None
        ]
    return (ptr + o_r * of_row * UNIT)[:, None]


@triton.jit
def number_of_rows(ptr, stride, number, o_r):
    """One a row [ROWS]: `number`, times that of a tensor if there is one."""
    if ptr is not None:
        return tl.load(ptr + o_r * stride).to(tl.float32) * number
    return (o_r * 0).to(tl.float32) + number


@triton.jit(do_not_specialize=["R", "T", "C", "s_b", "t_b", "s_r", "t_r"])
def kl_rows(
    s_ptr, t_ptr,  # [R / T, T, C], or [R, C], any float dtype, dense rows
    tau_ptr, weight_ptr,  # [R] float, any stride; or None
    value_ptr,  # [R] float32
    stat_ptr,  # [7, R] float32: the rows of call.py; or None
    out_ptr,  # [R, C] in the dtype of the student; or None
    R, T, C, s_b, t_b, s_r, t_r,  # C and strides: multiples of UNIT, so many of it
    tau_r, weight_r, tau, weight,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    o_r, m_r = rows_of_program(R, ROWS)
    tau, weight = number_of_rows(tau_ptr, tau_r, tau, o_r), number_of_rows(weight_ptr, weight_r, weight, o_r)
    s_row, t_row = logit_rows(s_ptr, o_r, T, s_b, s_r, UNIT), logit_rows(t_ptr, o_r, T, t_b, t_r, UNIT)
    MADE: tl.constexpr = out_ptr is not None
    out_row = s_row
    if MADE:
        out_row = logit_rows(out_ptr, o_r, T, None, C, UNIT)
    value, moved, m_s, m_t, of_s, of_t, offset = whole_rows(
        s_row, t_row, out_row, C * UNIT, tau, weight, m_r, CHUNK, CHUNKS, MADE
    )
    # tau^2 KL, times its weight
    tl.store(value_ptr + o_r, tl.where(weight == 0, 0.0, value * tau * tau * weight), mask=m_r)
    if stat_ptr is not None:
        stat, step = stat_ptr + o_r, tl.cast(R, tl.int64)
        tl.store(stat, m_s, mask=m_r)
        tl.store(stat + step, of_s, mask=m_r)
        tl.store(stat + 2 * step, m_t, mask=m_r)
        tl.store(stat + 3 * step, of_t, mask=m_r)
        tl.store(stat + 4 * step, -offset, mask=m_r)
        tl.store(stat + 5 * step, value * 0, mask=m_r)
        tl.store(stat + 6 * step, -moved, mask=m_r)  # of the very w, which is off for all classes alike


@triton.jit(do_not_specialize=["R", "T", "C", "s_b", "t_b", "s_r", "t_r"])
def kl_again(
    grad_ptr,  # [R] float, any stride
    s_ptr, t_ptr, tau_ptr, weight_ptr, out_ptr,  # as in `kl_rows`
    R, T, C, s_b, t_b, s_r, t_r, grad_r, tau_r, weight_r, tau, weight,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
    MADE: tl.constexpr,  # the gradient for an upstream of 1 is there, and that is one number
):  # fmt: skip
    o_r, m_r = rows_of_program(R, ROWS)
    out_row = logit_rows(out_ptr, o_r, T, None, C, UNIT)
    if MADE:
        g = tl.load(grad_ptr).to(tl.float32)
        if g == 1:
            return
        # a factor that rounds no entry a second time
        exact = (g.to(tl.int32, bitcast=True) & 0x7FFFFF == 0) & (tl.abs(g) < float("inf"))
        if out_ptr.dtype.element_ty == tl.float32 or (out_ptr.dtype.element_ty == tl.bfloat16 and exact):
            for start in range(0, C * UNIT, CHUNK):
                o_c = start + tl.arange(0, CHUNK)[None, :]
                m_c = (o_c < C * UNIT) & m_r[:, None]
                b_d = tl.load(out_row + o_c, mask=m_c, other=0).to(tl.float32)
                tl.store(out_row + o_c, tl.where(g == 0, 0.0, b_d * g), mask=m_c)
            return
    tau, weight = number_of_rows(tau_ptr, tau_r, tau, o_r), number_of_rows(weight_ptr, weight_r, weight, o_r)
    s_row, t_row = logit_rows(s_ptr, o_r, T, s_b, s_r, UNIT), logit_rows(t_ptr, o_r, T, t_b, t_r, UNIT)
    g = tl.load(grad_ptr + o_r * grad_r).to(tl.float32)
    weight = tl.where(weight == 0, 0.0, weight * g)  # what a row of no weight holds, upstream too, is left out
    whole_rows(s_row, t_row, out_row, C * UNIT, tau, weight, m_r, CHUNK, CHUNKS, True)
