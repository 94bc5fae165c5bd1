// SPDX-License-Identifier: Apache-2.0
// A product of tiles that are in cache: registers hold R x V vectors of the result while the depth runs by.
#pragma once

#include <cstdint>

#include "wide.h"

namespace kdkernels {

// out [R, V W] = A B, or += A B; A_rk = a[r row + k step] is broadcast, rows of B are loaded
template <int W, int R, int V, bool kAdd = false>
KDK_INLINE void product_registers(const float* a, int64_t row, int64_t step, const float* b, int64_t ld, int64_t depth,
                                  float* out, int64_t out_ld) {
  using F = typename Wide<W>::F;
  F sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += step, b += ld) {
    F y[V];
    // unrolled before anything else, or the sums are kept in memory
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[v] = load<W>(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * row] * y[v];  // one broadcast: `splat` would be a move a lane
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* place = out + r * out_ld + v * W;
      store<W>(place, kAdd ? load<W>(place) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int W, int R, int V>
KDK_INLINE void product_columns(const float* a, int64_t row, int64_t step, int64_t M, const float* b, int64_t ld,
                                int64_t depth, float* out, int64_t out_ld) {
  if (M < R) {
    for (int64_t i = 0; i < M; ++i) {
      product_registers<W, 1, V>(a + i * row, row, step, b, ld, depth, out + i * out_ld, out_ld);
    }
    return;
  }
  for (int64_t i = 0; i < M; i += R) {
    const int64_t first = i + R <= M ? i : M - R;  // the last rows are computed twice rather than one by one
    product_registers<W, R, V>(a + first * row, row, step, b, ld, depth, out + first * out_ld, out_ld);
  }
}

// out [M, N] = A [M, depth] B [depth, N]; N is a multiple of W
template <int W>
KDK_INLINE void product(const float* a, int64_t row, int64_t step, int64_t M, const float* b, int64_t ld, int64_t N,
                        int64_t depth, float* out, int64_t out_ld) {
  constexpr int kV = W == 16 ? 4 : 2;  // 24 of 32 registers, or 12 of 16, are sums
  int64_t j = 0;
  for (; j + kV * W <= N; j += kV * W) {
    product_columns<W, 6, kV>(a, row, step, M, b + j, ld, depth, out + j, out_ld);
  }
  for (; j + 2 * W <= N; j += 2 * W) product_columns<W, 6, 2>(a, row, step, M, b + j, ld, depth, out + j, out_ld);
  if (j < N) product_columns<W, 8, 1>(a, row, step, M, b + j, ld, depth, out + j, out_ld);
}

}  // namespace kdkernels
