# SPDX-License-Identifier: Apache-2.0
"""Soft ranks of sorted rows, and their gradient, on a GPU: one program a row, which it holds in registers.

`fit_rows`: pooling as a lower hull. Point p of a row is (sum of weights, sum of values) before its position p; a block
is an edge of the lower hull of these points, and its value the edge's slope (MATH.md, "As a hull"). Halves of 1, 2, 4
and more positions merge in pairs, all pairs of a level together: the edge over the border of two halves touches each
in one point. `spread_rows`: the gradient. Its sums over blocks are whole numbers, so that their order does not matter.

float64 throughout: a row has some thousand operations, and the sums decide which positions share a block.
"""

import triton
import triton.language as tl


@triton.jit
def over(x, INSIDE: tl.constexpr):
    """What a pair of halves has, over all of their positions: [T, pairs] as [T, pairs, 2, L] where both lie in a
    thread, else [pairs] as [pairs, 2, L / C, C]."""
    return x[:, :, None, None] if INSIDE else x[:, None, None, None]


@triton.jit
def over_half(x, INSIDE: tl.constexpr):
    """The same of what each half has."""
    return x[:, :, :, None] if INSIDE else x[:, :, None, None]


@triton.jit
def sum_of_half(t, INSIDE: tl.constexpr):
    return tl.sum(t, 3) if INSIDE else tl.sum(tl.sum(t, 3), 2)


@triton.jit
def of_half(t, wanted, INSIDE: tl.constexpr):
    """What the halves that are wanted have, for each pair."""
    return tl.sum(tl.where(wanted, t, 0), 2 if INSIDE else 1)


@triton.jit
def at(t, where, INSIDE: tl.constexpr):
    """The one element of each pair that is there."""
    return tl.sum(sum_of_half(tl.where(where, t, 0.0), INSIDE), 2 if INSIDE else 1)


@triton.jit
def abscissa(distance, sign, border, KL: tl.constexpr):
    """Where the point `distance` positions beside the border lies, from there: in positions (l2), or in ranks (kl)."""
    d = sign * distance.to(tl.float64)
    if KL:
        d = d * (2 * border + d + 1) * 0.5
    return d


@triton.jit
def slot(p, C: tl.constexpr, T: tl.constexpr):
    """Where position p of a row has its place in memory: what neighbouring threads hold lies side by side."""
    return (p & (C - 1)) * T + p // C


@triton.jit
def kept(sums, p, C: tl.constexpr, T: tl.constexpr):
    """The sum up to and with position p; 0 before the first."""
    return tl.load(sums + slot(p, C, T), mask=p >= 0, other=0.0)


@triton.jit
def height_at(sums, edge, distance, middle, side: tl.constexpr, C: tl.constexpr, T: tl.constexpr, KL: tl.constexpr):
    """Of the point `distance` beside the edge, on the left (-1) or right (1)."""
    if KL:
        out = kept(sums, edge - distance if side < 0 else edge + distance - 1, C, T)
    else:
        out = kept(sums, edge + side * distance - 1, C, T) - middle
    return out


@triton.jit
def relative_sums(u, first, right, INSIDE: tl.constexpr):
    """kl: sums of exponentials from the border outwards, negative on the left, relative to the border's own value."""
    # what is cut is so far above the border that no block reaches it
    e = tl.exp(tl.minimum(u - over(at(u, first, INSIDE), INSIDE), 600.0))
    out = tl.cumsum(e, 3)
    if not INSIDE:
        own = tl.sum(e, 3)
        out += (tl.cumsum(own, 2) - own)[:, :, :, None]
    return tl.where(right, out, out - e - over_half(sum_of_half(e, INSIDE), INSIDE))


@triton.jit
def merged(sums, o, u, block, L: tl.constexpr, C: tl.constexpr, T: tl.constexpr, KL: tl.constexpr):
    """The block of each position, [T, C], once neighbouring halves of L positions merge; o: the positions, [C, T].

    sums: T C places in memory, of l2 filled already. They are loaded again for each level, as registers are few.
    """
    INSIDE: tl.constexpr = L < C
    G: tl.constexpr = C // (2 * L) if INSIDE else T * C // (2 * L)
    D: tl.constexpr = L if INSIDE else L // C
    if INSIDE:
        shape: tl.constexpr = (T, G, 2, D)
        half, j = tl.arange(0, 2)[None, None, :, None], tl.arange(0, D)[None, None, None, :]
        edge = (2 * tl.arange(0, G) + 1)[None, :] * L + tl.arange(0, T)[:, None] * C
        side = tl.arange(0, 2)[None, None, :]
    else:
        shape: tl.constexpr = (G, 2, D, C)
        half = tl.arange(0, 2)[None, :, None, None]
        j = tl.arange(0, D)[None, None, :, None] * C + tl.arange(0, C)[None, None, None, :]
        edge = (2 * tl.arange(0, G) + 1) * L
        side = tl.arange(0, 2)[None, :]
    right = half == 1
    distance = tl.where(right, j + 1, L - j)
    border = edge.to(tl.float64)
    q = abscissa(distance, (2 * half - 1).to(tl.float64), over(border, INSIDE), KL)
    # a line through one point of each half; the least height over the border of all such lines is that of the edge
    low, high = edge * 0 + 1, edge * 0 + 1
    middle = border * 0.0
    if KL:
        Q = relative_sums(tl.reshape(u, shape), right & (distance == 1), right, INSIDE)
        if not INSIDE:
            tl.debug_barrier()
            tl.store(sums + slot(o, C, T), tl.trans(tl.reshape(Q, [T, C])))
            tl.debug_barrier()
    else:
        before, after = tl.trans(kept(sums, o - 1, C, T)), tl.trans(kept(sums, o, C, T))
        before = tl.reshape(before, shape)
        middle = at(before, right & (distance == 1), INSIDE) if INSIDE else kept(sums, edge - 1, C, T)
        Q = tl.where(right, tl.reshape(after, shape), before) - over(middle, INSIDE)
    if INSIDE:
        Q_low, Q_high = at(Q, (distance == 1) & (right == 0), INSIDE), at(Q, (distance == 1) & right, INSIDE)
    else:
        Q_low = height_at(sums, edge, low, middle, -1, C, T, KL)
        Q_high = height_at(sums, edge, high, middle, 1, C, T, KL)
    q_low, q_high = abscissa(low, -1.0, border, KL), abscissa(high, 1.0, border, KL)
    # kept, not found again: it falls with each step, so that steps end
    height, width = Q_low * q_high - Q_high * q_low, q_high - q_low
    steps = 4 * L + 4 if L > 1 else 0
    while steps > 0:
        # the point of each half that lies farthest below, the outermost of several
        t = over(q_high - q_low, INSIDE) * Q - over(Q_high - Q_low, INSIDE) * q
        least = tl.min(t, 3) if INSIDE else tl.min(tl.min(t, 3), 2)
        far = tl.where(t == over_half(least, INSIDE), distance, 0)
        far = tl.max(far, 3) if INSIDE else tl.max(tl.max(far, 3), 2)
        low, high = of_half(far, side == 0, INSIDE), of_half(far, side == 1, INSIDE)
        if INSIDE:
            Q_far = sum_of_half(tl.where(distance == over_half(far, INSIDE), Q, 0.0), INSIDE)
            Q_far_low, Q_far_high = of_half(Q_far, side == 0, INSIDE), of_half(Q_far, side == 1, INSIDE)
        else:
            Q_far_low = height_at(sums, edge, low, middle, -1, C, T, KL)
            Q_far_high = height_at(sums, edge, high, middle, 1, C, T, KL)
        q_far_low, q_far_high = abscissa(low, -1.0, border, KL), abscissa(high, 1.0, border, KL)
        # of the lines through these points and those before, the lowest over the border
        both, both_width = Q_far_low * q_far_high - Q_far_high * q_far_low, q_far_high - q_far_low
        one, one_width = Q_far_low * q_high - Q_high * q_far_low, q_high - q_far_low
        other, other_width = Q_low * q_far_high - Q_far_high * q_low, q_far_high - q_low
        take_both = both * width < height * both_width
        height, width = tl.where(take_both, both, height), tl.where(take_both, both_width, width)
        take_one = one * width < height * one_width
        height, width = tl.where(take_one, one, height), tl.where(take_one, one_width, width)
        take_other = other * width < height * other_width
        height, width = tl.where(take_other, other, height), tl.where(take_other, other_width, width)
        move_low = (take_both | take_one) & (take_other == 0)
        move_high = (take_both & (take_one == 0)) | take_other
        Q_low, q_low = tl.where(move_low, Q_far_low, Q_low), tl.where(move_low, q_far_low, q_low)
        Q_high, q_high = tl.where(move_high, Q_far_high, Q_high), tl.where(move_high, q_far_high, q_high)
        steps -= 1
        moved = tl.max((move_low | move_high).to(tl.int32), 0)
        if INSIDE:
            moved = tl.max(moved, 0)
        if moved == 0:
            steps = 0
    pools = height <= 0.0
    low, high = tl.where(pools, low, 0), tl.where(pools, high, 0)
    joins = distance <= tl.where(right, over(high, INSIDE), over(low, INSIDE))
    block = tl.where(joins, over(packed(edge - low, edge + high), INSIDE), tl.reshape(block, shape))
    return tl.reshape(block, [T, C])


@triton.jit
def packed(first, after):
    """A block: its first position and the one after its last."""
    return first | (after << 12)


@triton.jit
def running(x):
    """Sums up to and with each position of [T, C], as they stand."""
    own = tl.sum(x, 1)
    return tl.cumsum(x, 1) + (tl.cumsum(own, 0) - own)[:, None]


@triton.jit
def refined(r, x):
    """1 / x in float64, from one in float32: its error is squared twice."""
    r = r.to(tl.float64)
    r += r * (1.0 - x * r)
    return r + r * (1.0 - x * r)


@triton.jit
def quotient(a, b):
    """a / b where b is at least 1 and in float32's range; exact where it is a float64. A division is a call."""
    r = refined(1.0 / b.to(tl.float32), b)
    c = a * r
    return c + (a - c * b) * r


@triton.jit
def reciprocal(x):
    """1 / x of any normal x > 0."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = bits & 0x7FF0000000000000
    one_to_two = ((bits ^ exponent) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    back = (0x7FE0000000000000 - exponent).to(tl.float64, bitcast=True)
    return refined(1.0 / one_to_two.to(tl.float32), one_to_two) * back


@triton.jit
def root(x):
    """The square root of x >= 0."""
    half = (((x.to(tl.int64, bitcast=True) >> 52) & 2047) - 1023) >> 1
    down, up = ((1023 - half) << 52).to(tl.float64, bitcast=True), ((1023 + half) << 52).to(tl.float64, bitcast=True)
    near_one = x * down * down
    r = tl.rsqrt(near_one.to(tl.float32)).to(tl.float64)
    r *= 1.5 - 0.5 * near_one * r * r
    r *= 1.5 - 0.5 * near_one * r * r
    found = near_one * r
    return tl.where(x == 0.0, 0.0, (found + 0.5 * r * (near_one - found * found)) * up)


@triton.jit
def spread_of(v, valid, lowest, m, flat):
    """sqrt(12) deviation / m of a row's present values, 1 of a flat row."""
    share = reciprocal(tl.maximum(m, 1).to(tl.float64))
    d = tl.where(valid, v - lowest, 0.0)
    d = tl.where(valid, d - tl.sum(tl.sum(d, 1), 0) * share, 0.0)
    found = root(12.0 * tl.sum(tl.sum(d * d, 1), 0) * share) * share
    return tl.where(flat, 1.0, tl.maximum(found, 2.2250738585072014e-308))


@triton.jit
def in_units(d, inverse):
    """Differences of values over the strength; 0 stays 0 whatever the strength is."""
    return tl.where(d == 0.0, 0.0, d * inverse)


@triton.jit(do_not_specialize=["n", "each", "relative", "hard", "descending", "need"])
def fit_rows(
    s_ptr, order_ptr,  # [R, n] rows sorted ascending, NaN last, and int64: where each element stood
    strength_ptr,  # float64 [R], or [1]
    rank_ptr, blocks_ptr,  # [R, n]: ranks, and the first position of the block; -1: alone in it
    eps_ptr,  # float64 [R]
    sums_ptr,  # float64 [R, C T], for this launch alone
    n, each, relative, hard, descending, need,  # the last five 0 or 1; hard: not with KL
    C: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, BOUND: tl.constexpr, CUT: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = C * T
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, N)
    own, order = s_ptr + row * n, order_ptr + row * n
    gone = (tl.load(own + p, mask=p < n, other=0.0).to(tl.float64) < BOUND) & (p < n)
    absent = tl.sum(gone.to(tl.int32), 0)
    m = n - absent
    # +inf and NaN are not. A number, as the interpreter spreads a comparison of two floats as a float
    healthy = (tl.load(own + n - 1).to(tl.float64) < 1e300).to(tl.int32) != 0
    # positions ascend from the smallest element, or from the largest of a row that is negated
    step = 1 - 2 * descending
    start = tl.where(descending != 0, n - 1, absent)
    sign = step.to(tl.float64)
    own += start
    # a thread holds positions that lie side by side: bits joined, as Triton would spread a sum over the lanes of a warp
    o = tl.arange(0, C)[:, None] ^ (tl.arange(0, T)[None, :] * C)
    inside = (o < m) & healthy
    v = sign * tl.load(own + step * o, mask=inside, other=0.0).to(tl.float64)
    below = sign * tl.load(own + step * (o - 1), mask=inside & (o > 0), other=0.0).to(tl.float64)
    gap = tl.trans(tl.where(inside & (o > 0), v - below, 0.0))
    v, inside = tl.trans(v), tl.trans(inside)
    eps = tl.load(strength_ptr + row * each)
    if relative != 0:
        lowest = sign * tl.load(own, mask=(m > 0) & healthy, other=0.0).to(tl.float64)
        eps *= spread_of(v, inside, lowest, m, tl.max(tl.max(gap, 1), 0) == 0.0)
    inverse = reciprocal(eps)
    # a gap that forbids pooling whatever stands around it is cut; what fills the row up stands as far off
    gap = tl.minimum(tl.where(gap > 0.0, tl.where(hard != 0, CUT, gap * inverse), 0.0), CUT)
    u = running(tl.where(inside, gap, CUT))
    sums = sums_ptr + row * N
    if not KL:
        tl.store(sums + slot(o, C, T), tl.trans(running(u - tl.trans(o))))
        tl.debug_barrier()
    block = tl.trans(packed(o, o + 1))
    for level in tl.static_range(LEVELS):
        block = merged(sums, o, u, block, 1 << level, C, T, KL)
    block = tl.reshape(block, [N])
    first, after = block & 4095, block >> 12
    # of a block: what is summed over it, relative to the smallest (l2) or the largest (kl) of its elements
    valid = (p < m) & healthy
    count, mean = (after - first).to(tl.float64), (first + after + 1).to(tl.float64) * 0.5
    rank = mean
    if hard == 0:
        s = sign * tl.load(own + step * p, mask=valid, other=0.0).to(tl.float64)
        base = tl.gather(s, after - 1 if KL else first, 0)
        term = in_units(s - base, inverse)
        if KL:
            term = tl.exp(term)
        term = tl.where(valid, term, 0.0)
        total = tl.cumsum(term, 0)
        total = tl.gather(total, after - 1, 0) - tl.gather(total - term, first, 0)
        rank = quotient(count * mean * term, total) if KL else mean + (term - quotient(total, count))
        rank = tl.where(count == 1.0, mean, rank)
    rank = tl.where(healthy, rank, float("nan"))
    present = p < m
    to = tl.load(order + start + step * p, mask=present, other=0)
    tl.store(rank_ptr + row * n + to, rank, mask=present)
    away = tl.load(order + p, mask=p < absent, other=0)
    tl.store(rank_ptr + row * n + away, tl.where(healthy, 0.0, float("nan")), mask=p < absent)
    if need != 0:
        name = tl.where((count > 1.0) & healthy & (hard == 0), first, -1)
        tl.store(blocks_ptr + row * n + to, name, mask=present)
        tl.store(blocks_ptr + row * n + away, -1, mask=p < absent)
    tl.store(eps_ptr + row, tl.where(healthy, eps, float("nan")))


@triton.jit(do_not_specialize=["n", "descending"])
def spread_rows(
    grad_ptr, rank_ptr, blocks_ptr,  # [R, n]; the last two as `fit_rows` leaves them
    eps_ptr,  # float64 [R]
    sums_ptr,  # int64 [R, N], zero
    out_ptr,  # [R, n]
    n, descending,
    N: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """l2: (u - mean_B u) / eps. kl: r (u - sum_B r u / R_B) / eps, R_B = count (2 first + count + 1) / 2."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, N)
    name = tl.load(blocks_ptr + row * n + p, mask=p < n, other=-1)
    pooled = name >= 0
    u = tl.load(grad_ptr + row * n + p, mask=pooled, other=0.0).to(tl.float64)
    finite = tl.abs(u) < float("inf")
    spoiled = tl.max((finite == 0).to(tl.int32), 0)
    # over a power of two near the largest, in whole parts of 2^-35 (kl: of n times that), 13 bits up; below, the count
    largest = tl.max(tl.where(finite, tl.abs(u), 0.0), 0)
    exponent = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 52), 2045 << 52)
    unit = exponent.to(tl.float64, bitcast=True)
    u *= ((2046 << 52) - exponent).to(tl.float64, bitcast=True)
    u = tl.where(finite, u, 0.0)
    if KL:
        r = tl.load(rank_ptr + row * n + p, mask=pooled, other=0.0).to(tl.float64)
        part = r * u * (1.0 / N)
    else:
        part = u
    whole = (part * 34359738368.0 + tl.where(part < 0.0, -0.5, 0.5)).to(tl.int64)
    tl.atomic_add(sums_ptr + row * N + name, (whole << 13) + 1, mask=pooled, sem="relaxed")
    tl.debug_barrier()
    sums = tl.load(sums_ptr + row * N + name, mask=pooled, other=1, cache_modifier=".cg")
    count, total = (sums & 8191).to(tl.float64), (sums >> 13).to(tl.float64) * (1.0 / 34359738368.0)
    if KL:
        g = r * (u - quotient(total * N, count * (2.0 * name.to(tl.float64) + count + 1.0) * 0.5))
    else:
        g = u - quotient(total, count)
    eps = tl.load(eps_ptr + row)
    inverse = reciprocal(eps) * (1 - 2 * descending)
    g = tl.where(pooled, tl.where(spoiled != 0, float("nan"), g * unit * inverse), 0.0)
    g = tl.where(eps == eps, g, float("nan"))
    tl.store(out_ptr + row * n + p, g, mask=p < n)
