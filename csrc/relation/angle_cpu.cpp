// SPDX-License-Identifier: Apache-2.0
// RKD-A over all triplets of samples, from squared distances: value and gradient in one pass, nothing of n^3 numbers.
// A pair (a, b) and a third sample c are a triangle with three angles; d_ab enters all of them. For each pair a < b one
// loop over c, vectorised, gives the angles at c their place in the value, and all three theirs in dvalue/dd_ab: each
// weight has one writer, no thread waits, and the bits do not depend on how many there are. Formulas: MATH.md of
// kdkernels/relation. The roof is arithmetic: about 45 operations for each of the n^3 / 2 (pair, c).
//
// float64: where one sample is far from two that are close, the law of cosines in float32 would lose their angle.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/doubles.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTask = 1 << 15;  // triplets that are worth a thread

// half the squared distances and the inverse distances of one group, rows padded with zeros to whole lanes: a sample
// that is not there has no angle
struct Sides {
  std::vector<double> memory;
  int64_t n, padded;
  const double *half[2], *inverse[2];

  Sides(const double* x, const double* y, int64_t n) : n(n), padded((n + kLanes - 1) / kLanes * kLanes) {
    memory.assign(4 * n * padded, 0.0);
    const double* squares[2] = {x, y};
    for (int k = 0; k < 2; ++k) {
      double* h = memory.data() + 2 * k * n * padded;
      double* r = h + n * padded;
      half[k] = h, inverse[k] = r;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double square = squares[k][i * n + j];
          h[i * padded + j] = square / 2;
          r[i * padded + j] = square == 0 ? 0 : 1 / std::sqrt(square);
        }
      }
    }
  }
};

// the triangle (a, b, c) of one side, for W third samples at once
template <int W>
struct Angles {
  using V = typename Register<W>::Doubles;
  V at_a, at_b, at_c, to_a, to_b, across;  // cosines; 1 / (d_ab d_ac), 1 / (d_ab d_bc), 1 / (d_ac d_bc)

  KDK_INLINE Angles(const double* half, const double* inverse, int64_t a, int64_t b, int64_t c, double s, double r) {
    const V ha = fetch<W>(half + a + c), hb = fetch<W>(half + b + c);
    const V ra = fetch<W>(inverse + a + c), rb = fetch<W>(inverse + b + c);
    const V difference = ha - hb;
    to_a = ra * r, to_b = rb * r, across = ra * rb;
    at_a = (difference + s) * to_a;
    at_b = (s - difference) * to_b;
    at_c = (ha + hb - s) * across;
  }
};

struct Pair {
  double value, weight;  // sum_c huber(angle at c); V_ab
};

template <int W, bool kWeight>
KDK_INLINE Pair triangles(const Sides& of, int64_t a, int64_t b) {
  using V = typename Register<W>::Doubles;
  const int64_t row_a = a * of.padded, row_b = b * of.padded;
  const double s = of.half[0][row_a + b], r = of.inverse[0][row_a + b];
  const double s_t = of.half[1][row_a + b], r_t = of.inverse[1][row_a + b];
  V value{}, straight{}, cosine{};
  for (int64_t c = 0; c < of.padded; c += W) {
    const Angles<W> x(of.half[0], of.inverse[0], row_a, row_b, c, s, r);
    const Angles<W> y(of.half[1], of.inverse[1], row_a, row_b, c, s_t, r_t);
    const V e = x.at_c - y.at_c, g = clamped(e);
    value += g * (e - g * 0.5);
    if (kWeight) {
      const V g_a = clamped(x.at_a - y.at_a), g_b = clamped(x.at_b - y.at_b);
      straight += g_a * x.to_a + g_b * x.to_b - g * x.across;
      cosine += g_a * x.at_a + g_b * x.at_b;
    }
  }
  // angles (i, k) and (k, i) at a vertex are both counted
  return {2 * sum_of<W>(value), r == 0 ? 0 : 2 * (sum_of<W>(straight) - r * r * sum_of<W>(cosine))};
}

// plain functions, because the target attribute does not reach through a template
#define KDK_ROW(NAME, TARGET, W)                                                                \
  TARGET double NAME(const Sides& of, int64_t a, double* weights) {                             \
    double total = 0;                                                                           \
    for (int64_t b = a + 1; b < of.n; ++b) {                                                    \
      const Pair p = weights ? triangles<W, true>(of, a, b) : triangles<W, false>(of, a, b);    \
      total += p.value;                                                                         \
      if (weights) weights[a * of.n + b] = weights[b * of.n + a] = p.weight;                    \
    }                                                                                           \
    return total;                                                                               \
  }
KDK_ROW(row_baseline, , 2)
#if KDK_X86
KDK_ROW(row_avx2, KDK_AVX2, 4)
KDK_ROW(row_avx512, KDK_AVX512, 8)
#endif
#undef KDK_ROW

double row(const Sides& of, int64_t a, double* weights) {
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return row_avx512(of, a, weights);
  if (isa == Isa::kAvx2) return row_avx2(of, a, weights);
#endif
  return row_baseline(of, a, weights);
}

double group(const double* x, const double* y, int64_t n, double* weights) {
  const Sides of(x, y, n);
  std::vector<double> rows(n);
  const int64_t folds = (n + 1) / 2;  // rows a and n - 1 - a together have as many pairs as any other two
  torch::stable::parallel_for(0, folds, std::max<int64_t>(1, kTask / (n * n)), [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) {
      rows[a] = row(of, a, weights);
      if (n - 1 - a != a) rows[n - 1 - a] = row(of, n - 1 - a, weights);
    }
  });
  double total = 0;
  for (const double r : rows) total += r;
  // i = k: cosine 1, or 0 where v is the sample itself or one like it, which may hold on one side alone
  for (int64_t i = 0; i < n * n; ++i) total += (x[i] == 0) != (y[i] == 0) ? 0.5 : 0.0;
  if (weights) {
    for (int64_t a = 0; a < n; ++a) weights[a * n + a] = 0;
  }
  return total;
}

void check_squares(const Tensor& t, const char* name) {
  KDK_CHECK(t.is_cpu() && t.dim() == 3 && t.size(1) == t.size(2) && t.is_contiguous() &&
                t.scalar_type() == ScalarType::Double,
            "angle_triplets: ", name, " must be contiguous float64 squared distances [G, n, n] on the CPU");
}

// sum over (v, i, k) of smooth-L1 of cos_vik(x) - cos_vik(y) [G], and V of x [G, n, n] ([0] without `weights`)
std::tuple<Tensor, Tensor> angle_triplets(Tensor x, Tensor y, bool weights) {
  check_squares(x, "x");
  check_squares(y, "y");
  const int64_t G = x.size(0), n = x.size(1);
  KDK_CHECK(y.size(0) == G && y.size(1) == n, "angle_triplets: y is [", y.size(0), ", ", y.size(1), ", ", y.size(1),
            "] and x is [", G, ", ", n, ", ", n, "]: pass distances of the same samples");
  const int64_t groups[1] = {G}, shape[3] = {G, n, n}, none[1] = {0};
  Tensor value = torch::stable::new_empty(x, {groups, 1});
  Tensor V = weights ? torch::stable::new_empty(x, {shape, 3}) : torch::stable::new_empty(x, {none, 1});
  const auto* of_x = static_cast<const double*>(x.const_data_ptr());
  const auto* of_y = static_cast<const double*>(y.const_data_ptr());
  auto* values = static_cast<double*>(value.mutable_data_ptr());
  double* out = weights ? static_cast<double*>(V.mutable_data_ptr()) : nullptr;
  for (int64_t g = 0; g < G; ++g) {
    const int64_t at = g * n * n;
    values[g] = group(of_x + at, of_y + at, n, out ? out + at : nullptr);
  }
  return {value, V};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("angle_triplets(Tensor x, Tensor y, bool weights) -> (Tensor value, Tensor V)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("angle_triplets", TORCH_BOX(&kdkernels::angle_triplets)); }
