// SPDX-License-Identifier: Apache-2.0
// Vectors of W floats: 4 everywhere, 8 with AVX2, 16 with AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace kdkernels {

template <int W>
struct Wide;
#define KDK_WIDE(W)                                                  \
  template <>                                                        \
  struct Wide<W> {                                                   \
    typedef float F __attribute__((vector_size(W * sizeof(float)))); \
    typedef int32_t I __attribute__((vector_size(W * sizeof(int32_t)))); \
  };
KDK_WIDE(4)
KDK_WIDE(8)
KDK_WIDE(16)
#undef KDK_WIDE

template <int W>
KDK_INLINE typename Wide<W>::F load(const float* p) {
  typename Wide<W>::F x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <int W>
KDK_INLINE void store(float* p, const typename Wide<W>::F& x) {
  std::memcpy(p, &x, sizeof(x));
}

template <int W>
KDK_INLINE typename Wide<W>::F splat(float x) {
  return x - typename Wide<W>::F{};
}

template <int W>
KDK_INLINE double sum_of(const typename Wide<W>::F& x) {
  float v[W];
  std::memcpy(v, &x, sizeof(v));
  for (int half = W / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

}  // namespace kdkernels
