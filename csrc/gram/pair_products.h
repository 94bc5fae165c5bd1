// SPDX-License-Identifier: Apache-2.0
// The products of all pairs of rows, a strip of columns at a time: centred in cache, below the diagonal alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/product.h"
#include "strip.h"

namespace kdkernels {

constexpr int64_t kTileRows = 8;           // no tile in registers has more
constexpr int64_t kPart = 48;              // rows, a multiple of every panel's
constexpr int64_t kDepth = 128;            // columns of one product: a panel of them stays in the first-level cache
constexpr int64_t kStripFloats = 1 << 16;  // of a strip: it stays in the second level

// lower triangle of C += Z Z' on rows r0 (a multiple of kPart) to r1, Z' in panels
template <int W>
KDK_INLINE void add_products(const float* z, int64_t depth, int64_t n, int64_t r0, int64_t r1, float* c, int64_t ldc) {
  using P = Panels<W>;
  constexpr int R = P::kRows;
  for (int64_t j = 0; j < r1; j += P::kWidth) {
    const float* b = z + P::place(j, depth);
    for (int64_t i = std::max(j, r0); i < r1; i += R) {
      const int64_t vectors = (std::min(i + R, n) - j + W - 1) / W;
      const float* a = z + P::place(i, depth);
      float* out = c + i * ldc + j;
      if (vectors >= 3) {
        product_registers<W, R, 3, true>(a, 1, P::kWidth, b, P::kWidth, depth, out, ldc);
      } else if (vectors == 2) {
        product_registers<W, R, 2, true>(a, 1, P::kWidth, b, P::kWidth, depth, out, ldc);
      } else {
        product_registers<W, R, 1, true>(a, 1, P::kWidth, b, P::kWidth, depth, out, ldc);
      }
    }
  }
}

// a part of the columns, and of the rows of C
struct Chunk {
  int64_t j0, j1, r0, r1;
  float scale;
  float* c;       // [n + kTileRows - 1, ldc]
  double* mean2;  // |mean|^2 of these columns, or null
};

template <int W>
KDK_INLINE void multiply_chunk(const Features& f, const Chunk& part, int64_t ldc) {
  const int64_t rows = round_up(f.n, Panels<W>::kWidth);
  const int64_t strip = std::max(kDepth, kStripFloats / rows / kDepth * kDepth);
  const Scratch z(kDepth * rows), mean(strip);
  std::fill(part.c + part.r0 * ldc, part.c + part.r1 * ldc, 0.0f);
  double mean2 = 0;
  for (int64_t j = part.j0; j < part.j1; j += strip) {
    const int64_t width = std::min(strip, part.j1 - j);
    mean_columns<W>(f, j, width, mean.get());
    for (int64_t k = 0; k < width; ++k) mean2 += static_cast<double>(mean.get()[k]) * mean.get()[k];
    for (int64_t k = 0; k < width; k += kDepth) {
      const int64_t depth = round_up(std::min(kDepth, width - k), W);
      pack_panels<W>(f, part.r1, j + k, std::min(kDepth, width - k), mean.get() + k, part.scale, z.get(), depth);
      add_products<W>(z.get(), depth, f.n, part.r0, part.r1, part.c, ldc);
    }
  }
  if (part.mean2) *part.mean2 = mean2;
}

// G = the sum of its parts, mirrored; rows and columns in multiples of W
template <int W>
KDK_INLINE void gather_rows(const float* const* parts, int64_t count, int64_t ldc, int64_t i0, int64_t n, float* g,
                            int64_t ld) {
  const int64_t rows = std::min<int64_t>(W, n - i0);
  for (int64_t j = 0; j <= i0; j += W) {
    typename Wide<W>::F v[W];
    for (int r = 0; r < W; ++r) {
      v[r] = splat<W>(0.0f);
      if (r >= rows) continue;
      for (int64_t c = 0; c < count; ++c) v[r] += load<W>(parts[c] + (i0 + r) * ldc + j);
      store<W>(g + (i0 + r) * ld + j, v[r]);
    }
    if (j == i0) break;
    transpose<W>(v);
    for (int c = 0; c < W; ++c) store<W>(g + (j + c) * ld + i0, v[c]);
  }
  for (int64_t i = i0; i < i0 + rows; ++i) {
    for (int64_t j = i0; j < i; ++j) g[j * ld + i] = g[i * ld + j];
    // what lies behind the last column is 0
    for (int64_t j = i0 + rows; j < i0 + W; ++j) g[i * ld + j] = 0;
  }
}

}  // namespace kdkernels
