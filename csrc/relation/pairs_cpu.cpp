// SPDX-License-Identifier: Apache-2.0
// PKT and RKD-D in one call: value, and the gradient up to what comes from above. The BLAS makes n x n products in
// float64; everything of n x n numbers is then a few passes over rows in cache, where PyTorch makes thirty over memory;
// one product in float32 of the weights with centred rows gives the gradient. What float32 would lose there is left out
// of it and added in float64: a row's own share, the mean, and pairs closer than an eighth of their norms, from their
// difference. Formulas: MATH.md of kdkernels/relation. Each sum has one writer and one order, whatever the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "pair_sides.h"

namespace kdkernels {
namespace {

// sum of the rows of each group
std::vector<double> of_groups(const Samples& s, const std::vector<double>& rows) {
  std::vector<double> sums(s.G, 0.0);
  for (int64_t r = 0; r < s.rows(); ++r) sums[r / s.N] += rows[r];
  return sums;
}

Tensor none_of(const Tensor& like) {
  const int64_t none[1] = {0};
  return torch::stable::new_empty(like, {none, 1}, ScalarType::Float);
}

using Found = std::tuple<std::vector<double>, Tensor, Tensor>;  // values, what is kept of each side

template <class Loops>
Found similarities(const Samples& s, Side<Loops> (&sides)[2], int64_t need, const Tensor& nothing) {
  const int64_t N = s.N;
  std::vector<double> norm[2], inverse[2], share[2];
  for (int k = 0; k < 2; ++k) {
    norm[k] = sides[k].diagonal();
    inverse[k].resize(s.rows());
    share[k].resize(s.rows());
    for (int64_t r = 0; r < s.rows(); ++r) {
      norm[k][r] = std::sqrt(norm[k][r]);
      inverse[k][r] = 1 / (norm[k][r] + kEps);
    }
  }
  std::vector<double> rows(s.rows(), 0.0);
  Tensor h[2] = {nothing, nothing};
  for (int k = 0; k < 2; ++k) {
    if (need >> k & 1) h[k] = empty_of(nothing, s, N, ScalarType::Double);
  }
  double* out[2] = {need & 1 ? data<double>(h[0]) : nullptr, need & 2 ? data<double>(h[1]) : nullptr};
  s.each_row(4 * N, [&](int64_t r, int64_t g) {
    double* to[2];
    const double* cos[2];
    double own[2];
    for (int k = 0; k < 2; ++k) {
      double* row = sides[k].pairs + r * N;
      own[k] = 1 / (Loops::cosines(row, inverse[k].data() + g * N, inverse[k][r], N) + s.count[g]);
      cos[k] = row;
      to[k] = out[k] ? out[k] + r * N : nullptr;
      if (to[k] && s.keep[r] == 0) std::fill_n(to[k], N, 0.0);
    }
    if (s.keep[r] != 0) rows[r] = Loops::divergence(cos, own, s.keep.data() + g * N, to, N);
  });
  std::vector<double> values = of_groups(s, rows);
  for (int64_t g = 0; g < s.G; ++g) values[g] /= s.count[g] * s.count[g];
  Tensor kept[2] = {none_of(nothing), none_of(nothing)};
  for (int k = 0; k < 2; ++k) {
    if (!out[k]) continue;
    auto of = empty_gradient<Loops>(s, nothing);
    std::vector<double> along(s.rows());
    float* weights = data<float>(of.weights);
    const int64_t grain = std::max<int64_t>(1, kTask / (8 * N));
    torch::stable::parallel_for(0, s.rows() / 8, grain, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t g = band * 8 / N, at = g * N * N;
        Loops::weigh(out[k] + at, sides[k].pairs + at, band * 8 - g * N, N, weights + at, of.of_mean.data() + g * N,
                     along.data() + g * N);
      }
    });
    for (int64_t r = 0; r < s.rows(); ++r) {
      const double terms = s.count[r / N] * s.count[r / N];
      of.factor[r] = s.keep[r] * inverse[k][r];
      of.scale[r] = inverse[k][r] / terms;
      of.of_x[r] = -along[r] * inverse[k][r] / norm[k][r] / terms;
      of.silent[r] |= norm[k][r] == 0;
    }
    kept[k] = sides[k].slope(of);
  }
  return {values, kept[0], kept[1]};
}

template <class Loops>
Found distances(const Samples& s, Side<Loops> (&sides)[2], int64_t need, const Tensor& nothing) {
  const int64_t N = s.N;
  std::vector<double> norms[2], scale[2], pairs[2];
  for (int k = 0; k < 2; ++k) {
    norms[k] = sides[k].diagonal();
    std::vector<double> sum(s.rows()), count(s.rows());
    s.each_row(N, [&](int64_t r, int64_t g) {
      const int64_t at = g * N;
      const Counted row = Loops::distances(sides[k].pairs + r * N, norms[k].data() + at, norms[k][r],
                                           s.keep.data() + at, N);
      // of a sample that is not there nothing is a distance
      if (s.keep[r] == 0) std::fill_n(sides[k].pairs + r * N, N, 0.0);
      sum[r] = s.keep[r] == 0 ? 0 : row.sum, count[r] = s.keep[r] == 0 ? 0 : row.count;
    });
    scale[k] = of_groups(s, sum), pairs[k] = of_groups(s, count);
    for (int64_t g = 0; g < s.G; ++g) {
      scale[k][g] = pairs[k][g] > 0 ? pairs[k][g] / scale[k][g] : 1;
      pairs[k][g] = std::max(pairs[k][g], 1.0);
    }
  }
  const auto both = [&](int64_t r, const double* (&d)[2], double (&units)[2]) {
    for (int k = 0; k < 2; ++k) d[k] = sides[k].pairs + r * N, units[k] = scale[k][r / N];
  };
  std::vector<double> rows(s.rows()), means[2] = {std::vector<double>(s.rows()), std::vector<double>(s.rows())};
  s.each_row(2 * N, [&](int64_t r, int64_t) {
    const double* d[2];
    double units[2];
    both(r, d, units);
    const Slopes of = Loops::smooth(d, units, N);
    rows[r] = of.value, means[0][r] = of.mean[0], means[1][r] = of.mean[1];
  });
  std::vector<double> values = of_groups(s, rows);
  for (int64_t g = 0; g < s.G; ++g) values[g] /= s.count[g] * s.count[g];
  Tensor kept[2] = {none_of(nothing), none_of(nothing)};
  for (int k = 0; k < 2; ++k) {
    if (!(need >> k & 1)) continue;
    auto of = empty_gradient<Loops>(s, nothing);
    of.close.resize(s.rows());
    const std::vector<double> mean = of_groups(s, means[k]);
    float* weights = data<float>(of.weights);
    s.each_row(2 * N, [&](int64_t r, int64_t g) {
      const double* d[2];
      double units[2];
      both(r, d, units);
      const double sum = Loops::apart(d, units, k, mean[g] / pairs[k][g], norms[k].data() + g * N, norms[k][r], N,
                                      weights + r * N, of.close[r]);
      const double unit = 1 / units[k], terms = units[k] * units[k] / (s.count[g] * s.count[g]);
      of.factor[r] = s.keep[r] * units[k];
      of.scale[r] = terms * unit;
      of.of_mean[r] = -sum, of.of_x[r] = sum * terms;
      for (auto& pair : of.close[r]) pair.second *= terms;
    });
    kept[k] = sides[k].slope(of);
  }
  return {values, kept[0], kept[1]};
}

template <class Loops>
Found run(const Tensor& x, const Tensor& y, const Samples& s, bool similar, int64_t need, const Tensor& nothing) {
  Side<Loops> sides[2] = {{s, x, !similar}, {s, y, !similar}};
  return similar ? similarities<Loops>(s, sides, need, nothing) : distances<Loops>(s, sides, need, nothing);
}

void check_rows(const Tensor& t, const char* name) {
  KDK_CHECK(t.is_cpu() && t.dim() == 3 && t.scalar_type() == ScalarType::Float && (t.size(2) <= 1 || t.stride(2) == 1),
            "relate_pairs: ", name, " must be float32 rows [G, n, p] on the CPU, dense along p");
}

void check_mask(const OptionalTensor& mask, const char* op, int64_t G, int64_t n) {
  KDK_CHECK(!mask || (mask->is_cpu() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool &&
                      mask->numel() == G * n), op, ": mask must be a contiguous bool [", G, ", ", n, "]");
}

// value [G] float32, and of x (need & 1) and y (need & 2) the gradient for an upstream of 1, [0] where not asked for
std::tuple<Tensor, Tensor, Tensor> relate_pairs(Tensor x, Tensor y, OptionalTensor mask, bool similar, int64_t need) {
  check_rows(x, "x");
  check_rows(y, "y");
  const int64_t G = x.size(0), n = x.size(1);
  KDK_CHECK(y.size(0) == G && y.size(1) == n, "relate_pairs: y has ", y.size(0), " x ", y.size(1), " rows and x ", G,
            " x ", n, ": pass both sides of the same samples");
  KDK_CHECK(G > 0 && n > 0 && x.size(2) > 0 && y.size(2) > 0, "relate_pairs: x and y need samples and features");
  check_mask(mask, "relate_pairs", G, n);
  const int64_t groups[1] = {G};
  const Samples s(x, mask);
  const Tensor nothing = none_of(x);
  const auto found = [&]() -> Found {
#if KDK_X86
    static const Isa isa = detect_isa();
    if (isa == Isa::kAvx512) return run<Avx512>(x, y, s, similar, need, nothing);
    if (isa == Isa::kAvx2) return run<Avx2>(x, y, s, similar, need, nothing);
#endif
    return run<Baseline>(x, y, s, similar, need, nothing);
  }();
  Tensor value = torch::stable::new_empty(x, {groups, 1}, ScalarType::Float);
  for (int64_t g = 0; g < G; ++g) data<float>(value)[g] = static_cast<float>(std::get<0>(found)[g]);
  return {value, std::get<1>(found), std::get<2>(found)};
}

template <class Loops>
void scale(const Tensor& grad, const Tensor& slope, const OptionalTensor& mask, float* out) {
  const auto* from = static_cast<const float*>(slope.const_data_ptr());
  const auto* above = static_cast<const float*>(grad.const_data_ptr());
  const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const int64_t n = slope.size(1), p = slope.size(2), step = grad.stride(0);
  torch::stable::parallel_for(0, slope.size(0) * n, std::max<int64_t>(1, kTask / p), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float factor = above[r / n * step];
      // where nothing comes from above, and where a row is masked, the gradient is 0 whatever the rest holds
      if (factor == 0 || (kept && !kept[r])) {
        std::fill_n(out + r * p, p, 0.0f);
      } else {
        Loops::scaled(from + r * p, factor, p, out + r * p);
      }
    }
  });
}

// what `relate_pairs` gave for one side, times grad [G]
Tensor scale_pairs(Tensor grad, Tensor slope, OptionalTensor mask) {
  KDK_CHECK(slope.is_cpu() && slope.dim() == 3 && slope.is_contiguous() && slope.scalar_type() == ScalarType::Float,
            "scale_pairs: slope must be what relate_pairs gave, contiguous float32 [G, n, p]");
  const int64_t shape[3] = {slope.size(0), slope.size(1), slope.size(2)};
  KDK_CHECK(grad.is_cpu() && grad.dim() == 1 && grad.size(0) == shape[0] && grad.scalar_type() == ScalarType::Float,
            "scale_pairs: grad must be float32 [", shape[0], "]");
  check_mask(mask, "scale_pairs", shape[0], shape[1]);
  Tensor dx = torch::stable::new_empty(slope, {shape, 3});
  float* out = data<float>(dx);
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return scale<Avx512>(grad, slope, mask, out), dx;
  if (isa == Isa::kAvx2) return scale<Avx2>(grad, slope, mask, out), dx;
#endif
  return scale<Baseline>(grad, slope, mask, out), dx;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "relate_pairs(Tensor x, Tensor y, Tensor? mask, bool similar, int need) -> "
      "(Tensor value, Tensor of_x, Tensor of_y)");
  m.def("scale_pairs(Tensor grad, Tensor slope, Tensor? mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("relate_pairs", TORCH_BOX(&kdkernels::relate_pairs));
  m.impl("scale_pairs", TORCH_BOX(&kdkernels::scale_pairs));
}
