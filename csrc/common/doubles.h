// SPDX-License-Identifier: Apache-2.0
// Vectors of W doubles: from and to memory of either precision, sums, exp and log; rows are padded to whole lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace kdkernels {

// spelled out for each W, as `Register` is
template <int W>
struct Integers;
#define KDK_INTEGERS(W)                                                     \
  template <>                                                               \
  struct Integers<W> {                                                      \
    typedef int64_t I __attribute__((vector_size(W * sizeof(int64_t))));    \
  };
KDK_INTEGERS(2)
KDK_INTEGERS(4)
KDK_INTEGERS(8)
#undef KDK_INTEGERS

template <int W>
KDK_INLINE typename Register<W>::Doubles fetch(const double* p) {
  typename Register<W>::Doubles v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
KDK_INLINE typename Register<W>::Doubles fetch(const float* p) {
  typename Register<W>::Floats x;
  std::memcpy(&x, p, sizeof(x));
  typename Register<W>::Doubles v;
  Register<W>::widen(x, v);
  return v;
}

template <int W>
KDK_INLINE void put(double* p, const typename Register<W>::Doubles& v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int W>
KDK_INLINE void put(float* p, const typename Register<W>::Doubles& v) {
  const typename Register<W>::Floats rounded = __builtin_convertvector(v, typename Register<W>::Floats);
  std::memcpy(p, &rounded, sizeof(rounded));
}

template <int W>
KDK_INLINE double sum_of(const typename Register<W>::Doubles& v) {
  double lanes[W];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = W / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) for x <= 0 to 1e-15, about 0 below -700, NaN for NaN
template <int W>
KDK_INLINE typename Register<W>::Doubles exp_of(typename Register<W>::Doubles x) {
  using D = typename Register<W>::Doubles;
  using I = typename Integers<W>::I;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const D zero{};
  x = x < zero - 700.0 ? zero - 700.0 : x;
  const D shifted = x * 1.44269504088896340736 + kRound;
  const D n = shifted - kRound;
  const D r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  D y = r * (1.0 / 39916800) + 1.0 / 3628800;  // the series: |r| <= log(2) / 2
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const I scale = ((I)shifted - 0x4338000000000000LL + 1023) << 52;
  return y * (D)scale;
}

// log(a / b) of positive normal numbers to a few units in the last place, however near to 0; NaN of NaN. The odd series
// of the inverse hyperbolic tangent of f = (a - b) / (a + b), |f| <= 0.172, once a has the exponent of b
template <int W>
KDK_INLINE typename Register<W>::Doubles log_ratio(const typename Register<W>::Doubles& a,
                                                   const typename Register<W>::Doubles& b,
                                                   const typename Register<W>::Doubles& ratio) {
  using V = typename Register<W>::Doubles;
  using I = typename Integers<W>::I;
  const I e = ((I)ratio - 0x3FE6A09E667F3BCD) >> 52;  // of a mantissa in [sqrt(1/2), sqrt(2))
  const V n = (V)(e + 0x4338000000000000) - 6755399441055744.0;  // to double without a conversion
  const V near = a * (V)((1023 - e) << 52);
  const V f = (near - b) / (near + b), s = f * f;
  V series = s * (1.0 / 21) + 1.0 / 19;
  for (int k = 17; k > 1; k -= 2) series = series * s + 1.0 / k;
  const V log = n * 0.69314718055994530942 + (2.0 * f + 2.0 * f * (s * series));
  return ratio == ratio ? log : ratio;
}

}  // namespace kdkernels
