// SPDX-License-Identifier: Apache-2.0
// Whole numbers in float64 and back by way of their bits, and quotients by them: what compiles to a slow conversion or
// to a division of thirty instructions otherwise.
#pragma once

#include "device.cuh"

namespace kdkernels {

// whether float64 has a 64th of float's rate: then pairs of floats and whole numbers take its place (pairs.cuh)
#if defined(KDK_SLOW_DOUBLE)  // tests: on any device
constexpr bool kSlowDouble = true;
#elif defined(__CUDA_ARCH__)
constexpr bool kSlowDouble = __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 ||
                             __CUDA_ARCH__ == 1030 || __CUDA_ARCH__ >= 1200;
#else
constexpr bool kSlowDouble = false;
#endif

// of |i| < 2^51: added to the bits of 1.5 * 2^52 it stands in its last places
__device__ __forceinline__ double whole(long long i) {
  return __longlong_as_double(0x4338000000000000LL + i) - 0x1.8p52;
}
// of 0 <= i < 2^31
__device__ __forceinline__ double natural(int i) {
  return __longlong_as_double(0x4330000000000000LL | static_cast<long long>(i)) - 0x1p52;
}
// y * unit to the nearest whole number, less than 2^51 in size
__device__ __forceinline__ long long rounded(double y, double unit) {
  return __double_as_longlong(fma(y, unit, 0x1.8p52)) - 0x4338000000000000LL;
}

// two words of 32 bits hold a double
__device__ __forceinline__ double joined_words(unsigned low, unsigned high) {
  return __longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low));
}
__device__ __forceinline__ void split_double(double v, unsigned& low, unsigned& high) {
  const long long bits = __double_as_longlong(v);
  low = static_cast<unsigned>(bits);
  high = static_cast<unsigned>(bits >> 32);
}

// k in [-1022, 1023]
__device__ __forceinline__ double power_of_two(int k) {
  return __longlong_as_double(static_cast<long long>(k + 1023) << 52);
}
// k with 2^k <= |v| < 2^(k + 1) of a normal number, -1023 of a smaller one
__device__ __forceinline__ int exponent_of(double v) {
  return static_cast<int>(__double_as_longlong(fabs(v)) >> 52) - 1023;
}

// total / count, rounded as a division rounds: Newton's steps double the digits of 1 / count, the last one looks at
// what is left. count > 0; total and total / count far from under- and overflow
__device__ __forceinline__ double quotient(double total, double count) {
  double r = static_cast<double>(__fdividef(1.0f, static_cast<float>(count)));
  r = fma(r, fma(-count, r, 1.0), r);
  r = fma(r, fma(-count, r, 1.0), r);
  const double q = total * r;
  return fma(fma(-count, q, total), r, q);
}

}  // namespace kdkernels
