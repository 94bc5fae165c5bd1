// SPDX-License-Identifier: Apache-2.0
// What stands for float64 where that is slow: pairs of floats, and whole numbers of 64 bits as fixed point.
#pragma once

#include "numbers.cuh"

namespace kdkernels {

// high + low, of which high is the nearest float: 48 bits
struct Pair {
  float high, low;
};
__device__ __forceinline__ Pair pair_of(double v) {
  const float high = static_cast<float>(v);
  return {high, static_cast<float>(v - static_cast<double>(high))};
}
// exact
__device__ __forceinline__ Pair sum_of(float a, float b) {
  const float sum = a + b, other = sum - a;
  return {sum, (a - (sum - other)) + (b - other)};
}
__device__ __forceinline__ Pair product_of(float a, Pair b) {
  const float high = __fmul_rn(a, b.high);
  return {high, __fmaf_rn(a, b.low, __fmaf_rn(a, b.high, -high))};
}
__device__ __forceinline__ Pair product_of(Pair a, Pair b) {
  const Pair product = product_of(a.high, b);
  return {product.high, __fmaf_rn(a.low, b.high, product.low)};
}
__device__ __forceinline__ float rounded_sum(Pair a, Pair b) {
  const Pair sum = sum_of(a.high, b.high);
  return sum.high + (sum.low + (a.low + b.low));
}

// v * unit, unit a power of two, |v| < 2^45
__device__ __forceinline__ Pair pair_of(long long v, float unit) {
  const float high = static_cast<float>(static_cast<int>(v >> 23)) * (unit * 0x1p23f);
  const float low = static_cast<float>(static_cast<int>(v & 0x7FFFFF)) * unit, sum = high + low;
  return {sum, low - (sum - high)};
}

// adding 1.5 * 2^23 rounds a float to a whole number, which stands in the last places
constexpr float kWhole = 0x1.8p23f;
// the nearest whole number, less than 2^44 in size: above 2^22, and the rest, which the low part may make longer
__device__ __forceinline__ long long rounded(Pair v) {
  constexpr float kCoarse = 0x1p22f * kWhole;
  const float shifted = v.high + kCoarse, rest = (v.high - (shifted - kCoarse)) + v.low;
  return (static_cast<long long>(__float_as_int(shifted) - __float_as_int(kCoarse)) << 22) +
         (__float_as_int(rest + kWhole) - __float_as_int(kWhole));
}

// total / count, off by less than one; |total| < 2^54, 0 < count <= 1024. Three digits: a float's product is off by
// 2^-22 of one, which is left for the next
__device__ __forceinline__ long long whole_quotient(long long total, int count) {
  const float part = __fdividef(1.0f, static_cast<float>(count));
  long long found = 0;
#pragma unroll
  for (int shift : {24, 8, 0}) {
    const int digit = __float2int_rn(static_cast<float>(static_cast<int>(total >> shift)) * part);
    found += static_cast<long long>(digit) << shift;
    total -= (static_cast<long long>(digit) * count) << shift;
  }
  return found;
}

// a * b <= c * d; b and d are not negative
__device__ __forceinline__ bool product_at_most(long long a, int b, long long c, int d) {
  const auto lower = [](long long v, int factor) {
    return static_cast<unsigned long long>(static_cast<unsigned>(v)) * static_cast<unsigned>(factor);
  };
  const auto upper = [](long long v, int factor, unsigned long long below) {
    return static_cast<long long>(static_cast<int>(v >> 32)) * factor + static_cast<long long>(below >> 32);
  };
  const unsigned long long low = lower(a, b), other_low = lower(c, d);
  const long long high = upper(a, b, low), other_high = upper(c, d, other_low);
  return high < other_high ||
         (high == other_high && static_cast<unsigned>(low) <= static_cast<unsigned>(other_low));
}

}  // namespace kdkernels
