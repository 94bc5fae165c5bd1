// SPDX-License-Identifier: Apache-2.0
// The features of one side, centred and scaled, in two passes over x: the first reads it once for the column means and
// the spread, the second reads it again and writes z with its squared row norms. PyTorch needs six passes and as many
// temporaries. The roof is memory bandwidth: 8 n p bytes read, 4 n p written.
//
// Sums are float64 of differences from a row that counts: rows that are equal have a spread of exactly 0, and rows that
// nearly are lose no digits. Tiles and lanes fix the order of every sum, so the bits do not depend on the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/lanes.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBand = 256;   // rows of a tile of the first pass
constexpr int64_t kStrip = 512;  // columns of it: 4 KB of sums stay in the first-level cache

struct Group {
  const float* x;     // [n, p], row stride ld
  const bool* keep;   // [n], or null: every row counts
  int64_t ld, n, p;
  int64_t reference;  // a row that counts
  bool counts(int64_t i) const { return !keep || keep[i]; }
  const float* row(int64_t i) const { return x + i * ld; }
};

struct Strip {
  double sums[kStrip];  // sum_i x_ij - x_0j, a multiple of eight columns
  double squares;       // sum_ij (x_ij - x_0j)^2
};

// eight columns from j on; of the ragged end (kWhole is false) those inside, then zeros
template <int W, bool kWhole>
KDK_INLINE void load(FloatLanes<W>& v, const float* row, int64_t j, int64_t end) {
  if (kWhole) return v.load(row + j);
  float copy[kLanes] = {};
  for (int64_t lane = 0; j + lane < end; ++lane) copy[lane] = row[j + lane];
  v.load(copy);
}

template <int W, int R, bool kCentre, bool kWhole>
KDK_INLINE void sum_lanes(const float* const* rows, const float* first, int64_t j, int64_t j1, double* sums,
                          Lanes<W>* squares) {
  Lanes<W> sum;
  if (kCentre) sum.load(sums);
  for (int r = 0; r < R; ++r) {
    FloatLanes<W> x, x0;
    load<W, kWhole>(x, rows[r], j, j1);
    if (kCentre) {
      load<W, kWhole>(x0, first, j, j1);
      x.subtract(x0);
    }
    Lanes<W> d, square;
    d.set(x);
    square.set_product(d, d);
    squares[r].add(square);
    if (kCentre) sum.add(d);
  }
  if (kCentre) sum.store(sums);
}

// R rows share one read and write of the column sums
template <int W, int R, bool kCentre>
KDK_INLINE void sum_rows(const float* const* rows, const float* first, int64_t j0, int64_t j1, Strip& out,
                         Lanes<W>* squares) {
  Lanes<W> own[R];
  for (int r = 0; r < R; ++r) own[r] = squares[r];
  const int64_t whole = j0 + (j1 - j0) / kLanes * kLanes;
  for (int64_t j = j0; j < whole; j += kLanes) {
    sum_lanes<W, R, kCentre, true>(rows, first, j, j1, out.sums + (j - j0), own);
  }
  if (whole < j1) sum_lanes<W, R, kCentre, false>(rows, first, whole, j1, out.sums + (whole - j0), own);
  for (int r = 0; r < R; ++r) squares[r] = own[r];
}

template <int W, bool kCentre>
KDK_INLINE void sum_tile(const Group& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Strip& out) {
  constexpr int R = 4;
  std::fill(out.sums, out.sums + kStrip, 0.0);
  Lanes<W> squares[R] = {};
  const float *first = g.row(g.reference), *rows[R];
  int waiting = 0;
  for (int64_t i = i0; i < i1; ++i) {
    if (!g.counts(i)) continue;
    rows[waiting++] = g.row(i);
    if (waiting < R) continue;
    sum_rows<W, R, kCentre>(rows, first, j0, j1, out, squares);
    waiting = 0;
  }
  for (int r = 0; r < waiting; ++r) sum_rows<W, 1, kCentre>(rows + r, first, j0, j1, out, squares + r);
  for (int r = 1; r < R; ++r) squares[0].add(squares[r]);
  out.squares = squares[0].sum();
}

template <int W, bool kMean, bool kWhole>
KDK_INLINE void write_lanes(const float* x, const float* mean, float factor, float* z, int64_t j, int64_t p,
                            Lanes<W>& squares) {
  FloatLanes<W> v, m;
  load<W, kWhole>(v, x, j, p);
  if (kMean) {
    load<W, kWhole>(m, mean, j, p);
    v.subtract(m);
  }
  v.multiply(factor);
  Lanes<W> d, square;
  d.set(v);
  square.set_product(d, d);
  squares.add(square);
  if (kWhole) return v.store(z + j);
  float copy[kLanes];
  v.store(copy);
  std::copy(copy, copy + (p - j), z + j);
}

// z_i = (x_i - mean) factor; returns |z_i|^2 of the row as it is stored
template <int W, bool kMean>
KDK_INLINE double write_row(const float* x, const float* mean, float factor, float* z, int64_t p) {
  constexpr int R = 4;  // sums side by side, or each addition would wait for the one before
  Lanes<W> squares[R] = {};
  int64_t j = 0;
  for (; j + R * kLanes <= p; j += R * kLanes) {
    for (int r = 0; r < R; ++r) write_lanes<W, kMean, true>(x, mean, factor, z, j + r * kLanes, p, squares[r]);
  }
  for (; j + kLanes <= p; j += kLanes) write_lanes<W, kMean, true>(x, mean, factor, z, j, p, squares[0]);
  if (j < p) write_lanes<W, kMean, false>(x, mean, factor, z, j, p, squares[0]);
  for (int r = 1; r < R; ++r) squares[0].add(squares[r]);
  return squares[0].sum();
}

// plain functions, because the target attribute does not reach through a template
#define KDK_PASSES(NAME, TARGET, W)                                                                     \
  TARGET void sum_##NAME(const Group& g, bool centre, int64_t i0, int64_t i1, int64_t j0, int64_t j1,   \
                         Strip& out) {                                                                  \
    if (centre) return sum_tile<W, true>(g, i0, i1, j0, j1, out);                                       \
    sum_tile<W, false>(g, i0, i1, j0, j1, out);                                                         \
  }                                                                                                     \
  TARGET double write_##NAME(const float* x, const float* mean, float factor, float* z, int64_t p) {    \
    if (mean) return write_row<W, true>(x, mean, factor, z, p);                                         \
    return write_row<W, false>(x, mean, factor, z, p);                                                  \
  }
KDK_PASSES(baseline, , 2)
#if KDK_X86
KDK_PASSES(avx2, KDK_AVX2, 4)
KDK_PASSES(avx512, KDK_AVX512, 8)
#endif
#undef KDK_PASSES

struct Passes {
  void (*sum)(const Group&, bool, int64_t, int64_t, int64_t, int64_t, Strip&) = sum_baseline;
  double (*write)(const float*, const float*, float, float*, int64_t) = write_baseline;
};

Passes passes_of_this_machine() {
#if KDK_X86
  const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return {sum_avx512, write_avx512};
  if (isa == Isa::kAvx2) return {sum_avx2, write_avx2};
#endif
  return {};
}

struct Result {
  float* z;        // [n, p]
  float* square;   // [n]
  float* scale;    // z = scale (x - mean), a power of two
  float* shift;    // [p] scale * mean, or null
  double* unit;    // scale^-2
  float* typical;  // twice the mean |z_i|^2
};

void run(const Group& g, bool centre, bool rescale, const Result& out) {
  static const Passes pass = passes_of_this_machine();
  const int64_t bands = (g.n + kBand - 1) / kBand, strips = (g.p + kStrip - 1) / kStrip;
  int64_t count = g.n;
  if (g.keep) count = std::count(g.keep, g.keep + g.n, true);
  count = std::max<int64_t>(count, 1);

  std::vector<Strip> parts(bands * strips);
  torch::stable::parallel_for(0, bands * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i0 = t / strips * kBand, j0 = t % strips * kStrip;
      pass.sum(g, centre, i0, std::min(g.n, i0 + kBand), j0, std::min(g.p, j0 + kStrip), parts[t]);
    }
  });

  // sum_i |x_i - m|^2 = sum_ij d^2 - 2 (m - x_0) sum_i d + count (m - x_0)^2, with m rounded to float32
  double total = 0, mean2 = 0;
  for (const Strip& part : parts) total += part.squares;
  std::vector<float> mean(centre ? g.p : 0);
  for (int64_t j = 0; j < static_cast<int64_t>(mean.size()); ++j) {
    double sum = 0;
    for (int64_t band = 0; band < bands; ++band) sum += parts[band * strips + j / kStrip].sums[j % kStrip];
    const double first = g.row(g.reference)[j];
    mean[j] = static_cast<float>(first + sum / count);
    const double d = mean[j] - first;
    total += d * (count * d - 2 * sum);
    mean2 += static_cast<double>(mean[j]) * mean[j];
  }
  double spread = (total < 0 ? 0 : total) / count, scale = 1;
  if (rescale && spread != 0) scale = std::exp2(std::nearbyint(std::log2(spread) / -2));
  // rows that differ by less than the rounding of their mean are constant: exact zeros keep CKA's 0/0 recognisable
  constexpr double kRounding = 4.0 * std::numeric_limits<float>::epsilon();
  const bool constant = centre && spread <= kRounding * kRounding * mean2;
  const float factor = static_cast<float>(constant ? 0 : scale);

  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(g.p, 1));
  torch::stable::parallel_for(0, g.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* z = out.z + i * g.p;
      if (g.counts(i)) {
        out.square[i] = static_cast<float>(pass.write(g.row(i), centre ? mean.data() : nullptr, factor, z, g.p));
      } else {
        std::fill(z, z + g.p, 0.0f);
        out.square[i] = 0;
      }
    }
  });
  *out.scale = static_cast<float>(scale);
  *out.unit = 1 / (scale * scale);
  *out.typical = static_cast<float>(constant ? 0 : 2 * spread * scale * scale);
  for (int64_t j = 0; j < static_cast<int64_t>(mean.size()); ++j) out.shift[j] = static_cast<float>(mean[j] * scale);
}

using Rows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Rows centre_rows(Tensor x, std::optional<Tensor> mask, bool centre, bool rescale) {
  KDK_CHECK(x.is_cpu(), "centre_rows: x is not a CPU tensor: this op runs on the CPU only");
  KDK_CHECK(x.dim() == 3, "centre_rows: x has ", x.dim(), " dimensions: pass features [G, n, p]");
  KDK_CHECK(x.scalar_type() == ScalarType::Float, "centre_rows: x is ",
            torch::headeronly::toString(x.scalar_type()), ": pass float32");
  const int64_t G = x.size(0), n = x.size(1), p = x.size(2);
  KDK_CHECK(p <= 1 || x.stride(2) == 1, "centre_rows: x has column stride ", x.stride(2),
            ": pass x.contiguous(), rows must be dense");
  if (mask) {
    KDK_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == G &&
                  mask->size(1) == n && mask->is_contiguous(),
              "centre_rows: mask does not fit x: pass a contiguous bool tensor [", G, ", ", n, "] on the CPU");
  }
  const int64_t rows[2] = {G, n}, features[3] = {G, n, p}, groups[1] = {G}, means[3] = {G, 1, centre ? p : 0};
  Tensor z = torch::stable::new_empty(x, {features, 3});
  Tensor square = torch::stable::new_empty(x, {rows, 2});
  Tensor scale = torch::stable::new_empty(x, {groups, 1});
  Tensor shift = torch::stable::new_empty(x, {means, 3});
  Tensor unit = torch::stable::new_empty(x, {groups, 1}, ScalarType::Double);
  Tensor typical = torch::stable::new_empty(x, {groups, 1});
  for (int64_t k = 0; k < G; ++k) {
    Group g{static_cast<const float*>(x.const_data_ptr()) + k * x.stride(0), nullptr, x.stride(1), n, p, 0};
    if (mask) {
      g.keep = static_cast<const bool*>(mask->const_data_ptr()) + k * n;
      g.reference = std::min<int64_t>(std::find(g.keep, g.keep + n, true) - g.keep, n - 1);
    }
    // a group without a row that counts must not read the one it would take for reference
    const bool any = n > 0 && g.counts(g.reference);
    auto of = [k](Tensor& t, int64_t size) { return static_cast<float*>(t.mutable_data_ptr()) + k * size; };
    run(g, centre && any, rescale,
        {of(z, n * p), of(square, n), of(scale, 1), of(shift, p), static_cast<double*>(unit.mutable_data_ptr()) + k,
         of(typical, 1)});
    if (centre && !any) std::fill(of(shift, p), of(shift, p) + p, 0.0f);
  }
  return {z, square, scale, shift, unit, typical};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "centre_rows(Tensor x, Tensor? mask, bool centre, bool rescale) -> "
      "(Tensor z, Tensor square, Tensor scale, Tensor shift, Tensor unit, Tensor typical)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("centre_rows", TORCH_BOX(&kdkernels::centre_rows)); }
