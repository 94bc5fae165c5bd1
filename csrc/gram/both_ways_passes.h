// SPDX-License-Identifier: Apache-2.0
// What stands between the products of `both_ways_cpu.cpp`: each function is one pass over a row or a strip of columns,
// for the instruction set at hand.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/wide.h"

namespace kdkernels {
namespace {

constexpr int64_t kStrip = 128;  // columns of a task
constexpr int64_t kPiece = 32;   // terms a lane sums in float32 before they join a float64 sum
// of a squared norm: what is below counts as zero, or the square of an inverse norm would leave float32
constexpr double kLeast = std::numeric_limits<float>::min();

// one side of the pair, [n, C]
struct Side {
  const float* x;
  int64_t C;
  float *normed, *norms;  // [n, C], [C]; norms is null where columns are not compared
  double* squares;        // [strips]
};

KDK_INLINE void norm_strip(const Side& side, int64_t n, int64_t strip) {
  const int64_t C = side.C, begin = strip * kStrip, width = std::min(kStrip, C - begin);
  double squares[kStrip] = {};
  for (int64_t i0 = 0; i0 < n; i0 += kPiece) {
    float piece[kStrip] = {};
    for (int64_t i = i0; i < std::min(n, i0 + kPiece); ++i) {
      const float* x = side.x + i * C + begin;
      for (int64_t j = 0; j < width; ++j) piece[j] += x[j] * x[j];
    }
    for (int64_t j = 0; j < width; ++j) squares[j] += piece[j];
  }
  double total = 0;
  for (int64_t j = 0; j < width; ++j) total += squares[j];
  side.squares[strip] = total;
  if (!side.norms) return;
  float inverse[kStrip];
  for (int64_t j = 0; j < width; ++j) {
    side.norms[begin + j] = inverse[j] = squares[j] >= kLeast ? static_cast<float>(1 / std::sqrt(squares[j])) : 0.0f;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* x = side.x + i * C + begin;
    float* out = side.normed + i * C + begin;
    for (int64_t j = 0; j < width; ++j) out[j] = x[j] * inverse[j];
  }
}

// the products of a group, and of one row: k, m, l of the raw rows, then of the rows over their columns' norms
constexpr int kProducts = 6;
enum Product { kK, kM, kL, kKn, kMn, kLn };
enum Sum { kRowsKK, kRowsKL, kRowsLL };  // then the same three of the columns

template <int W, bool kColumns>
KDK_INLINE void sum_row(const float* const* row, int64_t n, double* sums) {
  using F = typename Wide<W>::F;
  int64_t j = 0;
  while (j + W <= n) {
    const int64_t end = std::min(n, j + kPiece * W);
    F part[6] = {};
    for (; j + W <= end; j += W) {
      const F k = load<W>(row[kK] + j), l = load<W>(row[kL] + j);
      part[0] += k * k, part[1] += k * l, part[2] += l * l;
      if (!kColumns) continue;
      part[3] += k * load<W>(row[kKn] + j);
      part[4] += load<W>(row[kM] + j) * load<W>(row[kMn] + j);
      part[5] += l * load<W>(row[kLn] + j);
    }
    for (int s = 0; s < (kColumns ? 6 : 3); ++s) sums[s] += sum_of<W>(part[s]);
  }
  for (; j < n; ++j) {
    const double k = row[kK][j], l = row[kL][j];
    sums[0] += k * k, sums[1] += k * l, sums[2] += l * l;
    if (!kColumns) continue;
    sums[3] += k * row[kKn][j];
    sums[4] += static_cast<double>(row[kM][j]) * row[kMn][j];
    sums[5] += l * row[kLn][j];
  }
}

template <int W>
KDK_INLINE void sum_row_any(const float* const* row, int64_t n, bool columns, double* sums) {
  if (columns) return sum_row<W, true>(row, n, sums);
  sum_row<W, false>(row, n, sums);
}

// what backward multiplies a row of K, L and Kn with
struct Slope {
  double a, g, g_columns, unit;  // unit: the square of the scale of X
  const float *rr, *rs;          // [n] r^2, r s
};

template <int W>
KDK_INLINE void weigh_row(const Slope& slope, const float* k, const float* l, const float* kn, int64_t i, int64_t n,
                          float* out) {
  using F = typename Wide<W>::F;
  const float a = slope.a * slope.unit, g = slope.g * slope.unit, gc = slope.g_columns * slope.unit;
  const float rr = slope.rr[i], rs = slope.rs[i], own_l = a * rs, own_k = g * rr;
  double moved = 0;
  int64_t j = 0;
  while (j + W <= n) {
    const int64_t end = std::min(n, j + kPiece * W);
    F part{};
    for (; j + W <= end; j += W) {
      const F K = load<W>(k + j);
      part += (own_l * load<W>(l + j) - own_k * K) * K;
    }
    moved += sum_of<W>(part);
  }
  for (; j < n; ++j) moved += static_cast<double>(own_l * l[j] - own_k * k[j]) * k[j];
  for (j = 0; j < n; ++j) out[j] = a * (rs + slope.rs[j]) * l[j] - g * (rr + slope.rr[j]) * k[j];
  if (kn) {
    for (j = 0; j < n; ++j) out[j] -= gc * kn[j];
  }
  out[i] -= static_cast<float>(moved * rr);
}

// my [n, C] = M Y becomes (R - X diag(w^2 1'(X o R))) diag(w), R = a M Y diag(v) - g K X diag(w)
KDK_INLINE void turn_strip(const float* x, const float* kx, float* my, const float* w, const float* v, float a, float g,
                           int64_t n, int64_t C, int64_t strip) {
  const int64_t begin = strip * kStrip, width = std::min(kStrip, C - begin);
  float of_y[kStrip], of_x[kStrip], along[kStrip];
  double moved[kStrip] = {};
  for (int64_t j = 0; j < width; ++j) of_y[j] = a * v[begin + j], of_x[j] = g * w[begin + j];
  for (int64_t i0 = 0; i0 < n; i0 += kPiece) {
    float piece[kStrip] = {};
    for (int64_t i = i0; i < std::min(n, i0 + kPiece); ++i) {
      const int64_t at = i * C + begin;
      for (int64_t j = 0; j < width; ++j) {
        const float r = of_y[j] * my[at + j] - of_x[j] * kx[at + j];
        my[at + j] = r;
        piece[j] += x[at + j] * r;
      }
    }
    for (int64_t j = 0; j < width; ++j) moved[j] += piece[j];
  }
  for (int64_t j = 0; j < width; ++j) {
    const float norm = w[begin + j];
    of_x[j] = norm, along[j] = static_cast<float>(moved[j] * norm * norm);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * C + begin;
    for (int64_t j = 0; j < width; ++j) my[at + j] = (my[at + j] - along[j] * x[at + j]) * of_x[j];
  }
}

// plain functions, because the target attribute does not reach through a template
#define KDK_PASSES(NAME, TARGET, W)                                                                                 \
  TARGET void norm_##NAME(const Side& side, int64_t n, int64_t strip) { norm_strip(side, n, strip); }            \
  TARGET void sum_##NAME(const float* const* row, int64_t n, bool columns, double* sums) {                          \
    sum_row_any<W>(row, n, columns, sums);                                                                          \
  }                                                                                                                 \
  TARGET void weigh_##NAME(const Slope& slope, const float* k, const float* l, const float* kn, int64_t i, int64_t n, \
                           float* out) {                                                                            \
    weigh_row<W>(slope, k, l, kn, i, n, out);                                                                       \
  }                                                                                                                 \
  TARGET void turn_##NAME(const float* x, const float* kx, float* my, const float* w, const float* v, float a,      \
                          float g, int64_t n, int64_t C, int64_t strip) {                                           \
    turn_strip(x, kx, my, w, v, a, g, n, C, strip);                                                              \
  }
KDK_PASSES(baseline, , 4)
#if KDK_X86
KDK_PASSES(avx2, KDK_AVX2, 8)
KDK_PASSES(avx512, KDK_AVX512, 16)
#endif
#undef KDK_PASSES

struct Passes {
  decltype(&norm_baseline) norm = norm_baseline;
  decltype(&sum_baseline) sum = sum_baseline;
  decltype(&weigh_baseline) weigh = weigh_baseline;
  decltype(&turn_baseline) turn = turn_baseline;
};

const Passes& passes() {
  static const Passes chosen = [] {
#if KDK_X86
    const Isa isa = detect_isa();
    if (isa == Isa::kAvx512) return Passes{norm_avx512, sum_avx512, weigh_avx512, turn_avx512};
    if (isa == Isa::kAvx2) return Passes{norm_avx2, sum_avx2, weigh_avx2, turn_avx2};
#endif
    return Passes{};
  }();
  return chosen;
}

int64_t strips_of(int64_t columns) { return (columns + kStrip - 1) / kStrip; }

}  // namespace
}  // namespace kdkernels
