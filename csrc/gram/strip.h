// SPDX-License-Identifier: Apache-2.0
// A strip of columns of the features, small enough for the cache: its means, and its centred rows as the products read
// them. What is centred never reaches memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "../common/wide.h"

namespace kdkernels {

constexpr int64_t kCacheLine = 16;  // floats

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// floats that begin at a cache line; not initialised
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<float*>(::operator new[](static_cast<size_t>(size) * sizeof(float), kAlignment))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  std::unique_ptr<float[], Free> data_;
};

// the features of one side
struct Features {
  const float* x;     // [n, p], row stride ld
  const bool* keep;   // [n], or null: every row counts
  int64_t ld, n, p;
  int64_t reference;  // a row that counts
  int64_t count;      // rows that count
  bool centre;

  Features(const float* data, const bool* mask, int64_t stride, int64_t rows, int64_t columns, bool centred)
      : x(data), keep(mask), ld(stride), n(rows), p(columns), reference(0), count(rows), centre(centred) {
    if (!keep) return;
    reference = std::find(keep, keep + n, true) - keep;
    count = std::count(keep, keep + n, true);
  }
  bool counts(int64_t i) const { return !keep || keep[i]; }
  const float* row(int64_t i) const { return x + i * ld; }
};

template <int W, int R>
KDK_INLINE void add_differences(const float* const* rows, const float* first, int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + W <= width; j += W) {
    const auto x0 = load<W>(first + j);
    auto sum = load<W>(sums + j);
    for (int r = 0; r < R; ++r) sum += load<W>(rows[r] + j) - x0;
    store<W>(sums + j, sum);
  }
  for (; j < width; ++j) {
    for (int r = 0; r < R; ++r) sums[j] += rows[r][j] - first[j];
  }
}

// means of the columns from j0 on, zeros up to whole vectors. They are sums of differences from a row that counts: rows
// that are equal have exactly their mean. A mean that is a little off changes nothing: a centred statistic of a linear
// kernel, as a distance, does not see what all rows have in common
template <int W>
KDK_INLINE void mean_columns(const Features& f, int64_t j0, int64_t width, float* mean) {
  constexpr int R = 4;
  std::fill(mean, mean + round_up(width, W), 0.0f);
  if (!f.centre || f.count == 0) return;
  const float *first = f.row(f.reference) + j0, *rows[R];
  int waiting = 0;
  for (int64_t i = 0; i < f.n; ++i) {
    if (!f.counts(i)) continue;
    rows[waiting++] = f.row(i) + j0;
    if (waiting < R) continue;
    add_differences<W, R>(rows, first, width, mean);
    waiting = 0;
  }
  for (int r = 0; r < waiting; ++r) add_differences<W, 1>(rows + r, first, width, mean);
  const float share = 1.0f / static_cast<float>(f.count);
  for (int64_t j = 0; j < width; ++j) mean[j] = first[j] + mean[j] * share;
}

template <int W, bool kWhole>
KDK_INLINE typename Wide<W>::F load_columns(const float* p, int64_t count) {
  if (kWhole) return load<W>(p);
  float copy[W] = {};
  std::copy(p, p + count, copy);
  return load<W>(copy);
}

#ifdef KDK_SHUFFLE
// lanes with bit D change places between two rows
template <int W, int D, int... L>
KDK_INLINE void exchange(typename Wide<W>::F& a, typename Wide<W>::F& b, std::integer_sequence<int, L...>) {
  const auto upper = __builtin_shufflevector(a, b, (L & D ? W + L - D : L)...);
  b = __builtin_shufflevector(a, b, (L & D ? W + L : L + D)...);
  a = upper;
}

template <int W, int D>
KDK_INLINE void transpose_step(typename Wide<W>::F (&v)[W]) {
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    if (!(r & D)) exchange<W, D>(v[r], v[r + D], std::make_integer_sequence<int, W>{});
  }
  if constexpr (D > 1) transpose_step<W, D / 2>(v);
}

template <int W>
KDK_INLINE void transpose(typename Wide<W>::F (&v)[W]) {
  transpose_step<W, W / 2>(v);
}
#else
template <int W>
KDK_INLINE void transpose(typename Wide<W>::F (&v)[W]) {
  float a[W][W], b[W][W];
  std::memcpy(a, v, sizeof(a));
  for (int r = 0; r < W; ++r) {
    for (int c = 0; c < W; ++c) b[c][r] = a[r][c];
  }
  std::memcpy(v, b, sizeof(b));
}
#endif

template <int W, bool kWhole>
KDK_INLINE void pack_block(const float* const* rows, int64_t j, int64_t width, const float* mean, float scale, float* z,
                           int64_t ld) {
  typename Wide<W>::F v[W];
  const auto m = load<W>(mean + j);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) v[r] = (load_columns<W, kWhole>(rows[r] + j, width - j) - m) * scale;
  transpose<W>(v);
#pragma GCC unroll 16
  for (int c = 0; c < W; ++c) store<W>(z + (j + c) * ld, v[c]);
}

// how a product in registers reads the columns of a strip: rows in panels of V vectors, each [depth, V W] in one piece,
// or a panel would touch more pages than the first level of the TLB holds
template <int W>
struct Panels {
  static constexpr int kVectors = 3, kWidth = kVectors * W;
  static constexpr int kRows = W == 16 ? 8 : 4;  // of a tile in registers: 24 of 32 registers, or 12 of 16, are sums
  static KDK_INLINE int64_t place(int64_t row, int64_t depth) { return row / kWidth * kWidth * depth + row % kWidth; }
};

// z = scale (x_ij - mean_j) of the first rows, in panels; rows that do not count, and those that fill the last panel,
// are 0
template <int W>
KDK_INLINE void pack_panels(const Features& f, int64_t count, int64_t j0, int64_t width, const float* mean, float scale,
                            float* z, int64_t depth) {
  using P = Panels<W>;
  for (int64_t i = 0; i < round_up(count, P::kWidth); i += W) {
    const float* rows[W];
    for (int r = 0; r < W; ++r) rows[r] = i + r < f.n && f.counts(i + r) ? f.row(i + r) + j0 : mean;
    float* out = z + P::place(i, depth);
    int64_t j = 0;
    for (; j + W <= width; j += W) pack_block<W, true>(rows, j, width, mean, scale, out, P::kWidth);
    if (j < width) pack_block<W, false>(rows, j, width, mean, scale, out, P::kWidth);
  }
}

// z_ij = factor scale (x_ij - mean_j), rows of length ld; the columns up to whole vectors and rows that do not count
// are 0
template <int W>
KDK_INLINE void pack_rows(const Features& f, int64_t j0, int64_t width, const float* mean, float scale, float factor,
                          float* z, int64_t ld) {
  for (int64_t i = 0; i < f.n; ++i) {
    float* out = z + i * ld;
    if (!f.counts(i)) {
      std::fill(out, out + round_up(width, W), 0.0f);
      continue;
    }
    const float* row = f.row(i) + j0;
    int64_t j = 0;
    for (; j + W <= width; j += W) store<W>(out + j, (load<W>(row + j) - load<W>(mean + j)) * scale * factor);
    if (j < width) {
      const auto x = load_columns<W, false>(row + j, width - j);
      store<W>(out + j, (x - load<W>(mean + j)) * scale * factor);
    }
  }
}

}  // namespace kdkernels
