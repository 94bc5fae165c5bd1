# SPDX-License-Identifier: Apache-2.0
"""All triplets of samples on a GPU: one program a row of pairs and a tile of it, one loop over third samples.

`triangles`: for pairs (a, b), b in the tile, and all c, the angles at c enter the value and all three angles of the
triangle the weight V_ab (MATH.md). Each weight has one writer, so nothing is atomic and the bits repeat. Per tile of
[BB, BC] triangles six tiles of distances are read, from cache as rows b come again for each a; the roof is arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def numerator(b_p, b_p_low, b_q, b_q_low, b_m, b_m_low):
    """p + q - m of squared distances in two floats each: the larger of p and q meets m first, where digits cancel."""
    return (tl.maximum(b_p, b_q) - b_m) + tl.minimum(b_p, b_q) + (b_p_low + b_q_low - b_m_low)


@triton.jit
def clamped(b_e):
    """In [-1, 1]; NaN stays."""
    b_e = tl.where(b_e < -1.0, -1.0, b_e)
    return tl.where(b_e > 1.0, 1.0, b_e)


@triton.jit
def load_side(side, row_a, row_b, step, o_bc, o_c, m_bc, m_c):
    """Half the squared distances (two floats) and the inverse distances of row a, [1, BC], then of rows b, [BB, BC].

    Flat: Triton 3.6 and 3.7 cannot take nested tuples apart.
    """
    high, low, inverse = side, side + step, side + 2 * step
    b_a = tl.load(high + row_a + o_c, mask=m_c, other=0.0)[None, :]
    b_a_low = tl.load(low + row_a + o_c, mask=m_c, other=0.0)[None, :]
    b_a_inverse = tl.load(inverse + row_a + o_c, mask=m_c, other=0.0)[None, :]
    b_b = tl.load(high + row_b + o_bc, mask=m_bc, other=0.0)
    b_b_low = tl.load(low + row_b + o_bc, mask=m_bc, other=0.0)
    b_b_inverse = tl.load(inverse + row_b + o_bc, mask=m_bc, other=0.0)
    return b_a, b_a_low, b_a_inverse, b_b, b_b_low, b_b_inverse


@triton.jit(do_not_specialize=["step"])
def triangles(
    x_ptr, y_ptr,  # [3, G, n, n] float32: high and low part of d^2 / 2, and 1 / d (0 where d = 0)
    value_ptr,  # [G n, tiles] float32: sum over the tile's pairs and all c of smooth-L1
    v_ptr,  # [G, n, n] float32: V of x, its diagonal left as it is
    n,
    step,  # G n n
    BB: tl.constexpr, BC: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a = (tl.program_id(0) % n).to(tl.int32)
    tile = tl.program_id(1)
    group = (row - a) * n  # where the group's first row begins
    row_a, row_b = row * n, group + tl.cast(tile, tl.int64) * BB * n
    o_b = tl.arange(0, BB)
    b = tile * BB + o_b
    m_b = (b > a) & (b < n)
    # the pair itself, [BB, 1]
    s = tl.load(x_ptr + row_a + b, mask=m_b, other=0.0)[:, None]
    s_low = tl.load(x_ptr + step + row_a + b, mask=m_b, other=0.0)[:, None]
    r = tl.load(x_ptr + 2 * step + row_a + b, mask=m_b, other=0.0)[:, None]
    t = tl.load(y_ptr + row_a + b, mask=m_b, other=0.0)[:, None]
    t_low = tl.load(y_ptr + step + row_a + b, mask=m_b, other=0.0)[:, None]
    q = tl.load(y_ptr + 2 * step + row_a + b, mask=m_b, other=0.0)[:, None]
    b_value = tl.zeros((BB, BC), tl.float32)
    b_straight = tl.zeros((BB, BC), tl.float32)
    b_cosine = tl.zeros((BB, BC), tl.float32)
    end = tl.where(tile * BB + BB - 1 > a, n, 0)  # no pair of a tile left of the diagonal counts
    for start in range(0, end, BC):
        o_c = start + tl.arange(0, BC)
        m_c = o_c < n
        o_bc = o_b[:, None] * n + o_c[None, :]
        m_bc = m_b[:, None] & m_c[None, :]
        b_h, b_l, b_r, b_k, b_j, b_i = load_side(x_ptr, row_a, row_b, step, o_bc, o_c, m_bc, m_c)
        b_hy, b_ly, b_ry, b_ky, b_jy, b_iy = load_side(y_ptr, row_a, row_b, step, o_bc, o_c, m_bc, m_c)
        b_across = b_r * b_i
        b_e = numerator(b_h, b_l, b_k, b_j, s, s_low) * b_across
        b_e -= numerator(b_hy, b_ly, b_ky, b_jy, t, t_low) * (b_ry * b_iy)
        b_g = clamped(b_e)
        b_value += b_g * (b_e - 0.5 * b_g)
        if WEIGHT:
            # (g_a / d_ac + g_b / d_bc) / d_ab - g_c / (d_ac d_bc), and g_a cos_a + g_b cos_b
            b_to_a, b_to_b = b_r * r, b_i * r
            b_cos_a = numerator(s, s_low, b_h, b_l, b_k, b_j) * b_to_a
            b_cos_b = numerator(s, s_low, b_k, b_j, b_h, b_l) * b_to_b
            b_g_a = clamped(b_cos_a - numerator(t, t_low, b_hy, b_ly, b_ky, b_jy) * (b_ry * q))
            b_g_b = clamped(b_cos_b - numerator(t, t_low, b_ky, b_jy, b_hy, b_ly) * (b_iy * q))
            b_straight += b_g_a * b_to_a + b_g_b * b_to_b - b_g * b_across
            b_cosine += b_g_a * b_cos_a + b_g_b * b_cos_b
    tl.store(value_ptr + row * tl.num_programs(1) + tile, tl.sum(tl.where(m_b, tl.sum(b_value, 1), 0.0)))
    if WEIGHT:
        pair = tl.reshape(r, (BB,))
        # V_ab = 2 (straight - cosine / d_ab^2), 0 where a and b are one
        b_v = 2 * (tl.sum(b_straight, 1) - pair * pair * tl.sum(b_cosine, 1))
        b_v = tl.where(pair == 0, 0.0, b_v)
        tl.store(v_ptr + row_a + b, b_v, mask=m_b)
        tl.store(v_ptr + row_b + o_b * n + a, b_v, mask=m_b)
