// SPDX-License-Identifier: Apache-2.0
// The samples of one side: read in blocks of columns, multiplied by themselves in float64, and the product of weights
// with them that is the gradient.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "pair_rows.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kColumns = 1 << 18;  // numbers of a block of rows: it stays in cache
constexpr int64_t kTask = 1 << 14;     // numbers that are worth a thread
constexpr int64_t kBand = 64;          // rows of a product that still fills the machine
constexpr int64_t kStrip = 64;         // columns whose sums stay in registers

// G groups of n samples, padded to N whole lanes
struct Samples {
  int64_t G, n, N;
  std::vector<double> keep, count;  // [G N] 1 or 0, [G] at least 1

  Samples(const Tensor& x, const OptionalTensor& mask) : G(x.size(0)), n(x.size(1)), N((n + 7) / 8 * 8) {
    keep.assign(G * N, 0.0);
    count.assign(G, 0.0);
    const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < n; ++i) count[g] += keep[g * N + i] = !kept || kept[g * n + i];
      count[g] = std::max(count[g], 1.0);
    }
  }
  int64_t rows() const { return G * N; }
  template <class F>
  void each_row(int64_t cost, const F& f) const {  // f(row of [G N], its group)
    torch::stable::parallel_for(0, rows(), std::max<int64_t>(1, kTask / std::max<int64_t>(1, cost)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t r = begin; r < end; ++r) f(r, r / N);
                                });
  }
};

// ---- the loops, for each instruction set: plain functions, as the target attribute does not reach through a template

#define KDK_LOOPS(NAME, TARGET, W)                                                                                     \
  struct NAME {                                                                                                        \
    TARGET static double cosines(double* row, const double* inverse, double own, int64_t n) {                          \
      return cosine_row<W>(row, inverse, own, n);                                                                      \
    }                                                                                                                  \
    TARGET static double divergence(const double* const* cos, const double* share, const double* keep,                 \
                                    double* const* h, int64_t n) {                                                     \
      return divergence_row<W>(cos, share, keep, h, n);                                                                \
    }                                                                                                                  \
    TARGET static void weigh(const double* h, const double* cos, int64_t first, int64_t n, float* weights,             \
                             double* sums, double* along) {                                                            \
      weight_rows<W>(h, cos, first, n, weights, sums, along);                                                          \
    }                                                                                                                  \
    TARGET static Counted distances(double* row, const double* norms, double own, const double* keep, int64_t n) {     \
      return distance_row<W>(row, norms, own, keep, n);                                                                \
    }                                                                                                                  \
    TARGET static Slopes smooth(const double* const* d, const double* scale, int64_t n) {                              \
      return smooth_row<W>(d, scale, n);                                                                               \
    }                                                                                                                  \
    TARGET static double apart(const double* const* d, const double* scale, int side, double mean,                     \
                               const double* norms, double own, int64_t n, float* weights, Close& close) {             \
      return apart_row<W>(d, scale, side, mean, norms, own, n, weights, close);                                        \
    }                                                                                                                  \
    TARGET static void strip(const float* x, int64_t step, const double* factor, int64_t n, double* sums) {            \
      for (int64_t i = 0; i < n; ++i) {                                                                                \
        const double own = factor[i];                                                                                  \
        if (own == 0) continue;                                                                                        \
        for (int64_t j = 0; j < kStrip; ++j) sums[j] += own * x[i * step + j];                                         \
      }                                                                                                                \
    }                                                                                                                  \
    TARGET static void widen(const float* x, const double* mean, int64_t n, double* z) {                               \
      for (int64_t j = 0; j < n; ++j) z[j] = mean ? x[j] - mean[j] : x[j];                                             \
    }                                                                                                                  \
    TARGET static void centre(const float* x, double factor, const double* mean, int64_t n, float* z) {                \
      for (int64_t j = 0; j < n; ++j) z[j] = static_cast<float>(x[j] * factor - mean[j]);                              \
    }                                                                                                                  \
    TARGET static void finish(const float* product, double scale, const double* mean, double of_mean, const float* x,  \
                              double of_x, int64_t n, double* out) {                                                   \
      for (int64_t j = 0; j < n; ++j) out[j] = (product[j] + mean[j] * of_mean) * scale + x[j] * of_x;                 \
    }                                                                                                                  \
    TARGET static void scaled(const float* slope, float factor, int64_t n, float* out) {                               \
      for (int64_t j = 0; j < n; ++j) out[j] = slope[j] * factor;                                                      \
    }                                                                                                                  \
  };
KDK_LOOPS(Baseline, , 2)
#if KDK_X86
KDK_LOOPS(Avx2, KDK_AVX2, 4)
KDK_LOOPS(Avx512, KDK_AVX512, 8)
#endif
#undef KDK_LOOPS

// ---- one side: its rows, their products, the gradient from weights

struct Blocks {
  int64_t width, p;
  Blocks(int64_t rows, int64_t p) : width(std::clamp<int64_t>(kColumns / std::max<int64_t>(1, rows), 1, p)), p(p) {}
};

// [G, N, columns], a matrix for one group
Tensor empty_of(const Tensor& like, const Samples& s, int64_t columns, ScalarType dtype) {
  const int64_t shape[3] = {s.G, s.N, columns};
  return s.G == 1 ? torch::stable::new_empty(like, {shape + 1, 2}, dtype)
                  : torch::stable::new_empty(like, {shape, 3}, dtype);
}

template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class Loops>
struct Side {
  const Samples& s;
  Tensor x;
  int64_t p;
  std::vector<double> mean;  // [G p]
  Tensor products;           // [G, N, N] float64
  double* pairs;

  Side(const Samples& s, const Tensor& x, bool centred) : s(s), x(x), p(x.size(2)), products(x) {
    if (centred) find_means(s.keep);
    const Blocks blocks(s.rows(), p);
    for (int64_t first = 0; first < p; first += blocks.width) {
      const int64_t width = std::min(blocks.width, p - first);
      Tensor z = empty_of(x, s, width, ScalarType::Double);
      double* out = data<double>(z);
      s.each_row(width, [&](int64_t r, int64_t g) {
        if (s.keep[r] == 0) {
          std::fill_n(out + r * width, width, 0.0);
        } else {
          Loops::widen(row(r) + first, centred ? mean.data() + g * p + first : nullptr, width, out + r * width);
        }
      });
      Tensor part = squared(z);
      if (first == 0) {
        products = part;
        pairs = data<double>(products);
      } else {
        const double* more = data<double>(part);
        s.each_row(s.N, [&](int64_t r, int64_t) {
          for (int64_t k = r * s.N; k < (r + 1) * s.N; ++k) pairs[k] += more[k];
        });
      }
    }
  }

  // z z'; of one group a band of rows at a time up to the diagonal, and mirrored: five eighths of the work
  Tensor squared(const Tensor& z) const {
    if (s.G > 1 || s.N < 2 * kBand) return torch::stable::matmul(z, torch::stable::transpose(z, -2, -1));
    Tensor result = empty_of(z, s, s.N, ScalarType::Double);
    Tensor rows = z, turned = torch::stable::transpose(z, 0, 1);
    const int64_t N = s.N, band = std::max(kBand, (N / 4 + 7) / 8 * 8);
    for (int64_t first = 0; first < N; first += band) {
      const int64_t height = std::min(band, N - first), end = first + height;
      Tensor strip = torch::stable::narrow(result, 0, first, height);
      product_into(torch::stable::narrow(rows, 0, first, height), torch::stable::narrow(turned, 1, 0, end),
                   torch::stable::narrow(strip, 1, 0, end));
    }
    double* out = data<double>(result);
    torch::stable::parallel_for(0, N / 8, std::max<int64_t>(1, kTask / (4 * N)), [&](int64_t begin, int64_t past) {
      for (int64_t i0 = begin * 8; i0 < past * 8; i0 += 8) {
        const int64_t known = std::min(N, (i0 / band + 1) * band);  // the rest of these rows lies below the diagonal
        for (int64_t k = known; k < N; ++k) {
          for (int64_t i = i0; i < i0 + 8; ++i) out[i * N + k] = out[k * N + i];
        }
      }
    });
    return result;
  }

  static void product_into(const Tensor& a, const Tensor& b, const Tensor& out) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the result, which is `out`, is ours to release
  }

  const float* row(int64_t r) const {
    return static_cast<const float*>(x.const_data_ptr()) + r / s.N * x.stride(0) + r % s.N * x.stride(1);
  }

  // of the rows times their factors
  void find_means(const std::vector<double>& factors) {
    mean.assign(s.G * p, 0.0);
    const int64_t strips = (p + kStrip - 1) / kStrip;
    const int64_t grain = std::max<int64_t>(1, kTask / (s.n * kStrip));
    torch::stable::parallel_for(0, s.G * strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t g = task / strips, first = task % strips * kStrip, width = std::min(kStrip, p - first);
        const double* factor = factors.data() + g * s.N;
        double* sums = mean.data() + g * p + first;
        if (width == kStrip) {
          Loops::strip(row(g * s.N) + first, x.stride(1), factor, s.n, sums);
        } else {
          for (int64_t i = 0; i < s.n; ++i) {
            for (int64_t j = 0; factor[i] != 0 && j < width; ++j) sums[j] += factor[i] * row(g * s.N + i)[first + j];
          }
        }
        for (int64_t j = 0; j < width; ++j) sums[j] /= s.count[g];
      }
    });
  }

  std::vector<double> diagonal() const {
    std::vector<double> norms(s.rows());
    for (int64_t r = 0; r < s.rows(); ++r) norms[r] = pairs[r * s.N + r % s.N];
    return norms;
  }

  // scale_i (sum_k weights_ik z_k + of_mean_i mean) + of_x_i x_i, z_k = factor_k x_k - mean: the sum in float32; then
  // the close pairs. A row that is silent has gradient 0
  struct Gradient {
    Tensor weights;                                     // [G, N, N] float32
    std::vector<double> factor, scale, of_mean, of_x;   // [G N]
    std::vector<Close> close;                           // [G N] or empty
    std::vector<char> silent;                           // [G N]
  };

  Tensor slope(const Gradient& of) {
    find_means(of.factor);
    const int64_t shape[3] = {s.G, s.n, p};
    Tensor slope = torch::stable::new_empty(x, {shape, 3}, ScalarType::Float);
    float* out = data<float>(slope);
    const Blocks blocks(s.rows(), p);
    for (int64_t first = 0; first < p; first += blocks.width) {
      const int64_t width = std::min(blocks.width, p - first);
      Tensor z = empty_of(x, s, width, ScalarType::Float);
      float* centred = data<float>(z);
      s.each_row(width, [&](int64_t r, int64_t g) {
        if (s.keep[r] == 0) {
          std::fill_n(centred + r * width, width, 0.0f);
        } else {
          Loops::centre(row(r) + first, of.factor[r], mean.data() + g * p + first, width, centred + r * width);
        }
      });
      Tensor product = torch::stable::matmul(of.weights, z);
      const float* found = data<float>(product);
      s.each_row(width, [&](int64_t r, int64_t g) {
        const int64_t i = r % s.N;
        if (i >= s.n) return;
        float* to = out + (g * s.n + i) * p + first;
        if (of.silent[r]) return std::fill_n(to, width, 0.0f), void();
        thread_local std::vector<double> sum;
        sum.resize(width);
        Loops::finish(found + r * width, of.scale[r], mean.data() + g * p + first, of.of_mean[r], row(r) + first,
                      of.of_x[r], width, sum.data());
        if (!of.close.empty()) {
          for (const auto& [k, weight] : of.close[r]) {
            const float *own = row(r) + first, *other = row(g * s.N + k) + first;
            for (int64_t j = 0; j < width; ++j) sum[j] += weight * (static_cast<double>(own[j]) - other[j]);
          }
        }
        for (int64_t j = 0; j < width; ++j) to[j] = static_cast<float>(sum[j]);
      });
    }
    return slope;
  }
};

template <class Loops>
using Gradient = typename Side<Loops>::Gradient;

template <class Loops>
Gradient<Loops> empty_gradient(const Samples& s, const Tensor& like) {
  const std::vector<double> rows(s.rows());
  Gradient<Loops> of{empty_of(like, s, s.N, ScalarType::Float), rows, rows, rows, rows, {}, {}};
  of.silent.resize(s.rows());
  for (int64_t r = 0; r < s.rows(); ++r) of.silent[r] = s.keep[r] == 0;
  return of;
}

}  // namespace
}  // namespace kdkernels
