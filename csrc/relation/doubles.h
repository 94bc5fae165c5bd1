// SPDX-License-Identifier: Apache-2.0
// Vectors of W doubles as the loops over pairs and triplets use them; rows are padded to whole lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/lanes.h"

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

// NaN is neither below nor above: it stays
template <class V>
KDK_INLINE V clamped(const V& e) {
  const V one = V{} + 1.0;
  const V low = e < -one ? -one : e;
  return low > one ? one : low;
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
