// SPDX-License-Identifier: Apache-2.0
// The projected difference of two feature maps on the CPU: a tile of s - t is formed in cache from the layout it has,
// multiplied by the basis there, and leaves as a square sum and as the projection that backward keeps. PyTorch writes
// and reads the difference, and projects rows of few directions at half the speed. The roof is the processor's.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/product.h"

namespace kdkernels {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPad = 16;        // floats of the widest vector
constexpr int64_t kPositions = 128;  // of a tile whose positions are neighbours
constexpr int64_t kRows = 48;       // of a tile whose channels are neighbours
constexpr int64_t kChannels = 96;   // of a gradient at once: it stays in the first-level cache

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct Features {  // [B, c, p] by strides
  void* data;
  ScalarType dtype;
  int64_t b, c, p;
  bool half() const { return dtype == ScalarType::BFloat16; }
  const float* floats(int64_t at) const { return static_cast<const float*>(data) + at; }
  const BFloat16* halves(int64_t at) const { return static_cast<const BFloat16*>(data) + at; }
};

struct Call {
  Features s, t;
  int64_t B, c, p, k;
  bool rows;         // channels are neighbours: tiles of rows, else of positions
  const bool* keep;  // [B, p], or null
  int64_t tiles() const { return rows ? (B * p + kRows - 1) / kRows : B * ((p + kPositions - 1) / kPositions); }
};

template <class T, class U>
KDK_INLINE void subtract(const T* s, int64_t s_step, const U* t, int64_t t_step, float* to, int64_t n) {
  if (s_step == 1 && t_step == 1) {
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(s[j]) - static_cast<float>(t[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(s[j * s_step]) - static_cast<float>(t[j * t_step]);
  }
}

KDK_INLINE void difference(const Features& s, int64_t s_at, int64_t s_step, const Features& t, int64_t t_at,
                           int64_t t_step, float* to, int64_t n) {
  if (s.half() && t.half()) return subtract(s.halves(s_at), s_step, t.halves(t_at), t_step, to, n);
  if (s.half()) return subtract(s.halves(s_at), s_step, t.floats(t_at), t_step, to, n);
  if (t.half()) return subtract(s.floats(s_at), s_step, t.halves(t_at), t_step, to, n);
  subtract(s.floats(s_at), s_step, t.floats(t_at), t_step, to, n);
}

template <class T>
KDK_INLINE void scale_to(const float* from, float weight, T* to, int64_t step, int64_t n) {
  if (step == 1) {
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(weight * from[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) to[j * step] = static_cast<T>(weight * from[j]);
  }
}

KDK_INLINE void deliver(const float* from, float weight, const Features& to, int64_t at, int64_t step, int64_t n) {
  if (to.half()) return scale_to(from, weight, static_cast<BFloat16*>(to.data) + at, step, n);
  scale_to(from, weight, static_cast<float*>(to.data) + at, step, n);
}

template <int W>
KDK_INLINE double square_sum(const float* x, int64_t n) {
  typename Wide<W>::F sum{};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const auto v = load<W>(x + j);
    sum += v * v;
  }
  double total = sum_of<W>(sum);
  for (; j < n; ++j) total += static_cast<double>(x[j]) * x[j];
  return total;
}

// the tile of one unit of work: q [B, k, p] or [B, p, k] (or null); adds each sample's square sum to its slot
template <int W>
KDK_INLINE void project_tile(const Call& c, const float* basis, int64_t ld, int64_t unit, float* scratch, float* q,
                             double* squares) {
  if (c.rows) {
    const int64_t first = unit * kRows, n = std::min(kRows, c.B * c.p - first);
    float *D = scratch, *Q = scratch + kRows * c.c;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = first + i, b = r / c.p, at = r % c.p;
      if (c.keep && !c.keep[r]) {
        std::fill(D + i * c.c, D + (i + 1) * c.c, 0.0f);
      } else {
        difference(c.s, b * c.s.b + at * c.s.p, c.s.c, c.t, b * c.t.b + at * c.t.p, c.t.c, D + i * c.c, c.c);
      }
    }
    product<W>(D, c.c, 1, n, basis, ld, padded(c.k), c.c, Q, ld);
    for (int64_t i = 0; i < n; ++i) {
      squares[first + i] = square_sum<W>(Q + i * ld, c.k);
      if (q) std::copy(Q + i * ld, Q + i * ld + c.k, q + (first + i) * c.k);
    }
    return;
  }
  const int64_t tiles = (c.p + kPositions - 1) / kPositions, b = unit / tiles, first = unit % tiles * kPositions;
  const int64_t n = std::min(kPositions, c.p - first), width = padded(n);
  float *D = scratch, *Q = scratch + c.c * kPositions;
  for (int64_t j = 0; j < c.c; ++j) {
    float* row = D + j * kPositions;
    difference(c.s, b * c.s.b + j * c.s.c + first * c.s.p, c.s.p, c.t, b * c.t.b + j * c.t.c + first * c.t.p, c.t.p,
               row, n);
    std::fill(row + n, row + width, 0.0f);
    if (!c.keep) continue;
    const bool* keep = c.keep + b * c.p + first;
    for (int64_t i = 0; i < n; ++i) row[i] = keep[i] ? row[i] : 0.0f;
  }
  product<W>(basis, 1, ld, c.k, D, kPositions, width, c.c, Q, kPositions);
  double total = 0;
  for (int64_t i = 0; i < c.k; ++i) {
    total += square_sum<W>(Q + i * kPositions, width);
    if (q) std::copy(Q + i * kPositions, Q + i * kPositions + n, q + (b * c.k + i) * c.p + first);
  }
  squares[unit] = total;
}

struct Gradient {
  const float *q, *weight;
  int64_t weights;  // 1, or B
  float factor;
  float of(int64_t b) const { return factor * weight[weights == 1 ? 0 : b]; }
};

// ds = w Q P', dt = -ds of one unit; in rows `basis` is P' padded to whole vectors, else P itself
template <int W>
KDK_INLINE void spread_tile(const Call& c, const float* basis, int64_t ld, int64_t unit, float* scratch,
                            const Gradient& g) {
  if (c.rows) {
    const int64_t first = unit * kRows, n = std::min(kRows, c.B * c.p - first);
    for (int64_t j = 0; j < c.c; j += kChannels) {
      const int64_t wide = std::min(kChannels, c.c - j);
      product<W>(g.q + first * c.k, c.k, 1, n, basis + j, ld, padded(wide), c.k, scratch, kChannels);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t b = (first + i) / c.p, at = (first + i) % c.p;
        const float *row = scratch + i * kChannels, w = g.of(b);
        if (c.s.data) deliver(row, w, c.s, b * c.s.b + at * c.s.p + j * c.s.c, c.s.c, wide);
        if (c.t.data) deliver(row, -w, c.t, b * c.t.b + at * c.t.p + j * c.t.c, c.t.c, wide);
      }
    }
    return;
  }
  const int64_t tiles = (c.p + kPositions - 1) / kPositions, b = unit / tiles, first = unit % tiles * kPositions;
  const int64_t n = std::min(kPositions, c.p - first), width = padded(n);
  float *Q = scratch + kChannels * kPositions, w = g.of(b);
  for (int64_t i = 0; i < c.k; ++i) {
    const float* from = g.q + (b * c.k + i) * c.p + first;
    std::copy(from, from + n, Q + i * kPositions);
    std::fill(Q + i * kPositions + n, Q + i * kPositions + width, 0.0f);
  }
  for (int64_t j = 0; j < c.c; j += kChannels) {
    const int64_t high = std::min(kChannels, c.c - j);
    product<W>(basis + j * ld, ld, 1, high, Q, kPositions, width, c.k, scratch, kPositions);
    for (int64_t i = 0; i < high; ++i) {
      const float* row = scratch + i * kPositions;
      if (c.s.data) deliver(row, w, c.s, b * c.s.b + (j + i) * c.s.c + first * c.s.p, c.s.p, n);
      if (c.t.data) deliver(row, -w, c.t, b * c.t.b + (j + i) * c.t.c + first * c.t.p, c.t.p, n);
    }
  }
}

// plain functions, because the target attribute does not reach through a template
#define KDK_TILES(NAME, TARGET, W)                                                                                \
  TARGET void project_##NAME(const Call& c, const float* basis, int64_t ld, int64_t begin, int64_t end, float* m, \
                             float* q, double* squares) {                                                         \
    for (int64_t unit = begin; unit < end; ++unit) project_tile<W>(c, basis, ld, unit, m, q, squares);            \
  }                                                                                                               \
  TARGET void spread_##NAME(const Call& c, const float* basis, int64_t ld, int64_t begin, int64_t end, float* m,  \
                            const Gradient& g) {                                                                  \
    for (int64_t unit = begin; unit < end; ++unit) spread_tile<W>(c, basis, ld, unit, m, g);                      \
  }
KDK_TILES(baseline, , 4)
#if KDK_X86
KDK_TILES(avx2, KDK_AVX2, 8)
KDK_TILES(avx512, KDK_AVX512, 16)
#endif
#undef KDK_TILES

struct Tiles {
  void (*project)(const Call&, const float*, int64_t, int64_t, int64_t, float*, float*, double*) = project_baseline;
  void (*spread)(const Call&, const float*, int64_t, int64_t, int64_t, float*, const Gradient&) = spread_baseline;
};

Tiles tiles_of_this_machine() {
#if KDK_X86
  const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return {project_avx512, spread_avx512};
  if (isa == Isa::kAvx2) return {project_avx2, spread_avx2};
#endif
  return {};
}

const Tiles& tiles_here() {
  static const Tiles tiles = tiles_of_this_machine();
  return tiles;
}

// memory that nobody has to clear
struct Scratch {
  std::unique_ptr<float[]> memory;
  explicit Scratch(int64_t floats) : memory(new float[floats]) {}
  float* data() { return memory.get(); }
};

Features features(const Tensor& x, int64_t B, int64_t c, int64_t p, const char* op, const char* name) {
  const auto dtype = x.scalar_type();
  KDK_CHECK(x.is_cpu() && x.dim() == 3 && x.size(0) == B && x.size(1) == c && x.size(2) == p, op, ": ", name,
            " must be CPU planes [", B, ", ", c, ", ", p, "]");
  KDK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name, " is ",
            torch::headeronly::toString(dtype), ": pass float32 or bfloat16");
  return {const_cast<void*>(x.const_data_ptr()), dtype, x.stride(0), x.stride(1), x.stride(2)};
}

void check_floats(const Tensor& x, const char* op, const char* name) {
  KDK_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float, op, ": ", name,
            " must be a contiguous float32 CPU tensor");
}

// rows of whole vectors, zeros beyond the last column
const float* with_padding(const float* from, int64_t rows, int64_t columns, int64_t ld, std::vector<float>& kept) {
  if (ld == columns) return from;
  kept.assign(rows * ld, 0.0f);
  for (int64_t i = 0; i < rows; ++i) std::copy(from + i * columns, from + (i + 1) * columns, kept.data() + i * ld);
  return kept.data();
}

// P' [k, ld]: a cache line of P is read once
const float* transposed(const float* P, int64_t c, int64_t k, int64_t ld, std::vector<float>& kept) {
  kept.assign(k * ld, 0.0f);
  float* to = kept.data();
  for (int64_t i0 = 0; i0 < k; i0 += kPad) {
    const int64_t i1 = std::min(k, i0 + kPad);
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t i = i0; i < i1; ++i) to[i * ld + j] = P[j * k + i];
    }
  }
  return to;
}

// (square sums / divisor, one float64 number or one a sample; Q [B k p] as `spread_rows` wants it, or empty)
std::tuple<Tensor, Tensor> project_rows(Tensor s, Tensor t, Tensor basis, OptionalTensor mask, bool rows, bool each,
                                        double divisor, bool keep) {
  const char* op = "project_rows";
  KDK_CHECK(s.dim() == 3, op, ": s must be planes [B, c, p]");
  const int64_t B = s.size(0), c = s.size(1), p = s.size(2);
  check_floats(basis, op, "basis");
  KDK_CHECK(basis.dim() == 2 && basis.size(0) == c && basis.size(1) >= 1, op, ": basis must be [c, k]");
  const int64_t k = basis.size(1);
  Call call{features(s, B, c, p, op, "s"), features(t, B, c, p, op, "t"), B, c, p, k, rows, nullptr};
  if (mask) {
    KDK_CHECK(mask->is_cpu() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool &&
                  mask->numel() == B * p, op, ": mask must be contiguous bool [B, p]");
    call.keep = static_cast<const bool*>(mask->const_data_ptr());
  }
  const int64_t shape[1] = {B}, saved[1] = {keep ? B * p * k : 0};
  Tensor value = torch::stable::new_empty(s, {shape, each ? 1u : 0u}, ScalarType::Double);
  Tensor projected = torch::stable::new_empty(s, {saved, 1}, ScalarType::Float);
  float* q = keep ? static_cast<float*>(projected.mutable_data_ptr()) : nullptr;
  const int64_t ld = rows ? padded(k) : k, units = B > 0 ? call.tiles() : 0;
  std::vector<float> kept;
  const float* P = static_cast<const float*>(basis.const_data_ptr());
  if (rows) P = with_padding(P, c, k, ld, kept);
  std::vector<double> squares(rows ? B * p : units);
  const int64_t floats = rows ? kRows * (c + ld) : kPositions * (c + k);
  // a tile is about a tenth of a millisecond: few of them need no second thread
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(floats);
    tiles_here().project(call, P, ld, begin, end, scratch.data(), q, squares.data());
  });
  const int64_t slots = B ? static_cast<int64_t>(squares.size()) / B : 0;
  double *out = static_cast<double*>(value.mutable_data_ptr()), total = 0;
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < slots; ++i) sum += squares[b * slots + i];
    if (each) out[b] = sum / divisor;
    total += sum;
  }
  if (!each) *out = total / divisor;
  return {value, projected};
}

// ds = factor weight Q P' and dt = -ds into planes by strides, each only if given; weight: one number, or one a sample
void spread_rows(Tensor projected, Tensor basis, Tensor weight, double factor, bool rows, OptionalTensor ds,
                 OptionalTensor dt) {
  const char* op = "spread_rows";
  if (!ds && !dt) return;
  const Tensor& like = ds ? *ds : *dt;
  KDK_CHECK(like.dim() == 3, op, ": gradients must be planes [B, c, p]");
  const int64_t B = like.size(0), c = like.size(1), p = like.size(2);
  check_floats(projected, op, "projected");
  check_floats(basis, op, "basis");
  check_floats(weight, op, "weight");
  KDK_CHECK(basis.dim() == 2 && basis.size(0) == c, op, ": basis must be [c, k]");
  const int64_t k = basis.size(1);
  KDK_CHECK(projected.numel() == B * p * k, op, ": projected must be what project_rows kept");
  KDK_CHECK(weight.numel() == 1 || weight.numel() == B, op, ": weight must be one number, or one a sample");
  Call call{{}, {}, B, c, p, k, rows, nullptr};
  if (ds) call.s = features(*ds, B, c, p, op, "ds");
  if (dt) call.t = features(*dt, B, c, p, op, "dt");
  const Gradient gradient{static_cast<const float*>(projected.const_data_ptr()),
                          static_cast<const float*>(weight.const_data_ptr()), weight.numel(),
                          static_cast<float>(factor)};
  std::vector<float> kept;
  const int64_t ld = rows ? padded(c) : k;
  const float* P = static_cast<const float*>(basis.const_data_ptr());
  if (rows) P = transposed(P, c, k, ld, kept);
  const int64_t floats = rows ? kRows * kChannels : kPositions * (kChannels + k);
  torch::stable::parallel_for(0, B > 0 ? call.tiles() : 0, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(floats);
    tiles_here().spread(call, P, ld, begin, end, scratch.data(), gradient);
  });
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "project_rows(Tensor s, Tensor t, Tensor basis, Tensor? mask, bool rows, bool each, float divisor, bool keep) "
      "-> (Tensor value, Tensor projected)");
  m.def(
      "spread_rows(Tensor projected, Tensor basis, Tensor weight, float factor, bool rows, Tensor(a!)? ds, "
      "Tensor(b!)? dt) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("project_rows", TORCH_BOX(&kdkernels::project_rows));
  m.impl("spread_rows", TORCH_BOX(&kdkernels::spread_rows));
}
