// SPDX-License-Identifier: Apache-2.0
// Vectors of W floats: 4 everywhere, 8 with AVX2, 16 with AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

// lane i with lane i ^ H, for H = W / 2, ..., 1: in registers where the compiler can, as a store would wait each time
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KDK_SHUFFLE 1
template <int W, int H, int... I>
KDK_INLINE typename Wide<W>::F crossed(const typename Wide<W>::F& x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ H)...);
}
#endif
#endif

template <int W, int H = W / 2, class Two>
KDK_INLINE float folded(const typename Wide<W>::F& x, const Two& two) {
#ifdef KDK_SHUFFLE
  const auto y = two(x, crossed<W, H>(x, std::make_integer_sequence<int, W>()));
#else
  typename Wide<W>::F other;
  for (int i = 0; i < W; ++i) other[i] = x[i ^ H];
  const auto y = two(x, other);
#endif
  if constexpr (H > 1) {
    return folded<W, H / 2>(y, two);
  } else {
    return y[0];
  }
}

template <int W>
KDK_INLINE double sum_of(const typename Wide<W>::F& x) {
  using F = typename Wide<W>::F;
  return folded<W>(x, [](const F& a, const F& b) __attribute__((always_inline)) { return a + b; });
}

}  // namespace kdkernels
