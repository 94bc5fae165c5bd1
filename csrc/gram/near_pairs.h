// SPDX-License-Identifier: Apache-2.0
// Distances of pairs that are near beside their distance from the mean, as in clusters far apart: |x|^2 + |y|^2 - 2 xy
// is then the rounding of the squares. Of these pairs the rows themselves are subtracted.

#pragma once

#include <algorithm>
#include <cstdint>

#include "strip.h"

namespace kdkernels {

constexpr float kNear = 1.0f / 128;  // of the squared norms: what is above has lost 7 of 24 bits at most

// whether there is a near pair; norms: the diagonal of g
template <int W>
KDK_INLINE bool near_pairs(const float* g, int64_t ld, const float* norms, int64_t n) {
  const auto apart = splat<W>(1 - kNear);
  typename Wide<W>::I near{};
  bool found = false;
  for (int64_t i = 0; i < n; ++i, g += ld) {
    const auto own = splat<W>(norms[i]);
    int64_t j = 0;
    for (; j + W <= i; j += W) near |= 2 * load<W>(g + j) > (load<W>(norms + j) + own) * apart;
    for (; j < i; ++j) found |= 2 * g[j] > (norms[j] + norms[i]) * (1 - kNear);
  }
  for (int w = 0; w < W; ++w) found |= near[w] != 0;
  return found;
}

inline double squared_distance(const float* x, const float* y, int64_t p) {
  double sum[4] = {};
  int64_t j = 0;
  for (; j + 4 <= p; j += 4) {
    for (int c = 0; c < 4; ++c) {
      const double d = x[j + c] - y[j + c];
      sum[c] += d * d;
    }
  }
  for (; j < p; ++j) sum[0] += static_cast<double>(x[j] - y[j]) * (x[j] - y[j]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// row i of g below the diagonal becomes -d2 / 2; g holds products of rows that were multiplied by `scale`
inline void subtract_row(const Features& f, const float* norms, float scale, int64_t i, float* g) {
  const double half = -0.5 * scale * scale;
  for (int64_t j = 0; j < i; ++j) {
    const bool near = 2 * g[j] > (norms[j] + norms[i]) * (1 - kNear);
    const double t = g[j] - 0.5 * (static_cast<double>(norms[i]) + norms[j]);
    g[j] = static_cast<float>(near ? half * squared_distance(f.row(i), f.row(j), f.p) : std::min(t, 0.0));
  }
}

// what subtract_row made of the rows, on both sides of a diagonal of zeros
inline void mirror_row(int64_t i, int64_t n, float* g, int64_t ld) {
  g[i * ld + i] = 0;
  for (int64_t j = i + 1; j < n; ++j) g[i * ld + j] = g[j * ld + i];
}

}  // namespace kdkernels
