// SPDX-License-Identifier: Apache-2.0
// l2 ranks of short rows of floats where float64 is slow: strength, sums and ranks in whole numbers and pairs of
// floats, off by 2^-5 of a float's last place at most. What is left of float64 is done once a row, and of rows whose
// ends are more than 16 strengths a position apart for every position.
#pragma once

#include "../common/element.cuh"
#include "../common/group.cuh"
#include "../common/pairs.cuh"
#include "scans.cuh"

namespace kdkernels {

// a row's values as floats of a size that leaves their differences and products with 1 / eps in range: they are exact
struct Scaled {
  int exponent;      // of the factor
  float to, offset;  // of a row far from 0 for its width: its first value becomes 0

  __device__ __forceinline__ float of(float v) const { return __fmaf_rn(v, to, offset); }
  __device__ static Scaled between(float least, float most) {
    const bool far = least > 0.0f ? most <= 2.0f * least : most < 0.0f && least >= 2.0f * most;
    const float from = far ? least : 0.0f, size = fmaxf(fabsf(least - from), fabsf(most - from));
    const int exponent = size > 0.0f ? max(-2, min(126, 127 - static_cast<int>(__float_as_uint(size) >> 23))) : 0;
    const float to = __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
    return {exponent, to, -from * to};
  }
};

constexpr double kSmallestSpread = 0x1p-1022;  // 1 / eps stays finite, as in strength.py

// of the elements of a row
struct Moments {
  double mean, square;
  __device__ __forceinline__ Moments plus(const Moments& o) const { return {mean + o.mean, square + o.square}; }
};
__device__ __forceinline__ Moments from_partner(const Moments& d, int step) {
  return {from_partner(d.mean, step), from_partner(d.square, step)};
}
// sqrt(12) std / m, from the moments of what is `scale` times as far from any pivot
__device__ __forceinline__ double spread_from(const Moments& d, int m, double scale) {
  return fmax(sqrt(12.0 * fmax(d.square - d.mean * d.mean, 0.0)) / (m * scale), kSmallestSpread);
}

struct WholeRow {
  Scaled scaled;
  Pair inverse;  // 1 / eps of what is scaled; 0 where no rank shows it
  // of the sums: places after the point, and a position, which is less than 1 where all of the row is one block anyway,
  // so that small differences of the ranks keep their digits
  int places;
  bool together;
  long long one;
};

// `spread_of_sorted` of keys that differ, from values in two parts of 22 and 23 bits
template <class Fit, int T, class Each>
__device__ double whole_spread(const Group<T>& group, const Fit& fit, Each each) {
  const int m = fit.m;
  const Scaled& scaled = fit.whole.scaled;
  auto value = [&](int p) { return decode<float>(fit.key.at(p)); };
  const float size = fmaxf(fabsf(scaled.of(value(0))), fabsf(scaled.of(value(m - 1))));
  const int exponent = 148 - static_cast<int>(__float_as_uint(size) >> 23);  // 2^exponent takes it below 2^22
  const float to = __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
  auto high = [&](float x) { return __fmaf_rn(x, to, kWhole); };
  auto low = [&](float x, float part) { return __fmaf_rn(__fmaf_rn(x, to, kWhole - part), 0x1p23f, kWhole); };
  const float median = value(m / 2), upper = high(scaled.of(median)), lower = low(scaled.of(median), upper);
  int sum[2] = {0, 0};
  long long square[3] = {0, 0, 0};
  each(median, [&](float v) {
    const float x = scaled.of(v), part = high(x);
    const int a = __float_as_int(part) - __float_as_int(upper);
    const int b = __float_as_int(low(x, part)) - __float_as_int(lower);
    sum[0] += a, sum[1] += b;
    square[0] += static_cast<long long>(a) * a;
    square[1] += static_cast<long long>(a) * b;
    square[2] += static_cast<long long>(b) * b;
  });
  const double part = 1.0 / m;
  const double total = group.sum(fma(static_cast<double>(sum[1]), 0x1p-23, static_cast<double>(sum[0])));
  const double squares = fma(fma(static_cast<double>(square[2]), 0x1p-24, static_cast<double>(square[1])), 0x1p-22,
                             static_cast<double>(square[0]));
  return spread_from({total * part, group.sum(squares) * part}, m, power_of_two(exponent + scaled.exponent));
}

// y = u - p of positions [first, last), u = s / eps, and their sums
template <class Fit, int T>
__device__ void whole_sums(const Group<T>& group, Fit& fit, int first, int last) {
  constexpr int kNear = 16;  // strengths a position
  WholeRow& row = fit.whole;
  const int m = max(fit.m, 1), size = 31 - __clz(m);  // and its logarithm
  const double all = fit.m > 0 ? (fit.key.value(m - 1) - fit.key.value(0)) * fit.inverse : 0.0;
  const bool shows = fit.eps != 0.0 && all >= 0x1p-53 * m;
  long long total = 0;
  row.together = shows && all < 0x1p-6;
  row.inverse = pair_of(shows ? fmin(fit.inverse * power_of_two(-row.scaled.exponent), 0x1p126) : 0.0);
  if (all <= kNear * natural(m)) {
    const int reach = exponent_of(all), step = row.together ? reach + 1 : 0;
    row.places = 42 - max(reach, size + step);
    row.one = 1ll << (row.places + step);
    const float unit = static_cast<float>(power_of_two(row.places));
    const Pair scale{row.inverse.high * unit, row.inverse.low * unit};
    auto u = [&](int p) { return rounded(product_of(row.scaled.of(decode<float>(fit.key.at(p))), scale)); };
    long long at = (fit.m > 0 ? u(0) : 0) + first * row.one;
#pragma unroll 4
    for (int p = first; p < last; ++p) {
      total += u(p) - at;
      at += row.one;
      fit.set_prefix(p + 1, total);
    }
  } else {  // long gaps are cut
    Rise own = Rise::none();
#pragma unroll 1
    for (int p = first; p < last; ++p) own.value += fit.gap(p);
    double u = group.before(own, Rise::none()).value;
    row.places = min(43 - size, 50 - exponent_of(fmax(group.sum(own.value), natural(m))));
    row.one = 1ll << row.places;
    const double unit = power_of_two(row.places);
#pragma unroll 1
    for (int p = first; p < last; ++p) {
      u += fit.gap(p);
      total += rounded(u - natural(p), unit);
      fit.set_prefix(p + 1, total);
    }
  }
  fit.add_before(first, last, total, group);
}

// what `record_linear` computes in
template <class Fit>
struct WholeRanks {
  using Shared = Pair;
  using Number = float;
  const Fit& fit;
  float unit, level;  // of sums; added to every rank
  long long lift;     // the same in units
  float alone;        // rank of the first position

  __device__ WholeRanks(const Fit& fit, double centre) : fit(fit) {
    const WholeRow& row = fit.whole;
    unit = static_cast<float>(power_of_two(-row.places));
    level = row.together ? static_cast<float>(0.5 * (fit.m + 1) - centre) : 0.0f;
    lift = (row.together ? 1 - fit.m : 2 - static_cast<int>(2.0 * centre)) * (row.one >> 1);
    alone = static_cast<float>(1.0 - centre);
  }
  __device__ __forceinline__ Pair first_of(int a, int b) const {
    const long long low = fit.prefix(a), y = fit.prefix(a + 1) - low, others = fit.prefix(b) - low - (b - a) * y;
    const Pair rank = pair_of(a * fit.whole.one + lift - whole_quotient(others, b - a), unit);
    const Pair lifted = sum_of(level, rank.high);
    return {lifted.high, lifted.low + rank.low};
  }
  __device__ __forceinline__ Pair single(int p) const { return {alone + static_cast<float>(p), 0.0f}; }
  __device__ __forceinline__ float value(int p) const { return fit.whole.scaled.of(decode<float>(fit.key.at(p))); }
  __device__ __forceinline__ float rank(Pair first, float v, float base) const {
    return rounded_sum(first, product_of(sum_of(v, -base), fit.whole.inverse));
  }
  __device__ __forceinline__ static double packed(Pair v) {
    return joined_words(__float_as_uint(v.high), __float_as_uint(v.low));
  }
  __device__ __forceinline__ static Pair unpacked(double v) {
    const long long bits = __double_as_longlong(v);
    return {__uint_as_float(static_cast<unsigned>(bits)), __uint_as_float(static_cast<unsigned>(bits >> 32))};
  }
};

}  // namespace kdkernels
