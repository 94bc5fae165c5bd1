// SPDX-License-Identifier: Apache-2.0
// CKA and HSIC of linear and Gaussian kernels on up to about a thousand rows in one call: the products of all pairs, a
// strip of columns at a time, centred in cache and below the diagonal alone; then K and L row by row, their sums in
// float64, the value, and the matrix V of pair weights that the gradient is one product with.
// PyTorch needs two passes over the features a side before its products, which do both triangles, and thirty calls on
// n x n. The roof is that of the products, n^2 p / 2 multiply-adds a side. Sums are ordered: the bits do not depend on
// the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "near_pairs.h"
#include "pair_bandwidth.h"
#include "pair_products.h"
#include "pair_rows.h"
#include "weigh.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerial = 1 << 22;  // multiply-adds below which a second thread costs more than it does
constexpr int64_t kSaved = 3;         // numbers a side for the backward pass: scale, factor of V z, dL/dsigma

// plain functions, because the target attribute does not reach through a template; W counts doubles
#define KDK_PAIRS(NAME, TARGET, W)                                                                                    \
  TARGET void multiply_##NAME(const Features& f, const Chunk& part, int64_t ldc) {                                    \
    multiply_chunk<2 * W>(f, part, ldc);                                                                              \
  }                                                                                                                   \
  TARGET void gather_##NAME(const float* const* parts, int64_t count, int64_t ldc, int64_t i0, int64_t i1, int64_t n, \
                            float* g, int64_t ld) {                                                                   \
    for (int64_t i = i0; i < i1; i += 2 * W) gather_rows<2 * W>(parts, count, ldc, i, n, g, ld);                      \
  }                                                                                                                   \
  TARGET bool near_##NAME(const float* g, int64_t ld, const float* norms, int64_t n) {                                \
    return near_pairs<2 * W>(g, ld, norms, n);                                                                        \
  }                                                                                                                   \
  TARGET void kernel_##NAME(const Kernel& s, int64_t i) { kernel_row<W>(s, i); }                                      \
  TARGET void sum_##NAME(const float* k, const float* l, int64_t n, double* out) { sum_row<W>(k, l, n, out); }        \
  TARGET void weigh_##NAME(const Kernel& own, const float* l, const PairWeights& w, int64_t i, float* v, double* s) { \
    weigh_row<W>(own, l, w, i, v, s);                                                                                 \
  }
KDK_PAIRS(baseline, , 2)
#if KDK_X86
KDK_PAIRS(avx2, KDK_AVX2, 4)
KDK_PAIRS(avx512, KDK_AVX512, 8)
#endif
#undef KDK_PAIRS

struct Passes {
  decltype(&multiply_baseline) multiply = multiply_baseline;
  decltype(&gather_baseline) gather = gather_baseline;
  decltype(&near_baseline) near = near_baseline;
  decltype(&kernel_baseline) kernel = kernel_baseline;
  decltype(&sum_baseline) sum = sum_baseline;
  decltype(&weigh_baseline) weigh = weigh_baseline;
};

const Passes& passes() {
  static const Passes chosen = [] {
#if KDK_X86
    const Isa isa = detect_isa();
    if (isa == Isa::kAvx512) {
      return Passes{multiply_avx512, gather_avx512, near_avx512, kernel_avx512, sum_avx512, weigh_avx512};
    }
    if (isa == Isa::kAvx2) return Passes{multiply_avx2, gather_avx2, near_avx2, kernel_avx2, sum_avx2, weigh_avx2};
#endif
    return Passes{};
  }();
  return chosen;
}

// f(begin, end) over [0, size), in steps of `grain` where more than one thread helps
template <class F>
void over(int64_t size, int64_t grain, bool parallel, const F& f) {
  if (parallel) return torch::stable::parallel_for(0, size, grain, f);
  f(int64_t{0}, size);
}

struct Side {
  Features f;
  KernelChoice choice;
  float scale = 1;
  double spread = 0;  // mean squared norm of the centred rows, times scale^2
  int64_t ld = 0;
  std::optional<Scratch> g, k, slope;
  std::vector<double> half, rates;
  Kernel kernel;

  Side(const Features& features, const KernelChoice& of) : f(features), choice(of) {}
};

// rows of a size that would leave float32 when squared are brought to about 1 by a power of two
float scale_of(const Features& f) {
  float largest = 0;
  for (int64_t i = 0; i < f.n; ++i) {
    if (!f.counts(i)) continue;
    const float *x = f.row(i), *first = f.row(f.reference);
    for (int64_t j = 0; j < f.p; ++j) largest = std::max(largest, std::abs(f.centre ? x[j] - first[j] : x[j]));
  }
  // 2^-126 is the smallest power of two that is normal, and its inverse is finite
  if (largest == 0 || !std::isfinite(largest)) return 1;
  return static_cast<float>(std::exp2(std::clamp(-std::ilogb(largest), -126, 126)));
}

// the products of each side in `sides`, its spread, and whether its rows are constant
void multiply(const std::vector<Side*>& sides, bool parallel) {
  const Passes& pass = passes();
  struct Work {
    Side* side;
    Chunk chunk;
  };
  std::vector<Work> works;
  std::vector<std::vector<double>> mean2(sides.size());
  std::vector<Scratch> parts;
  std::vector<std::vector<const float*>> starts(sides.size());
  for (size_t s = 0; s < sides.size(); ++s) {
    const Features& f = sides[s]->f;
    const int64_t rows = f.n + kTileRows - 1, ldc = round_up(f.n, kCacheLine);
    // the order of the sums: a part's products are worth many times the writing and reading of its matrix
    const int64_t count = std::clamp<int64_t>(f.p / std::max<int64_t>(512, 4 * f.n), 1, 8);
    const int64_t step = round_up((f.p + count - 1) / count, kCacheLine);
    // cutting the rows changes no sum: as many parts as there are threads to serve
    const int64_t threads = parallel ? torch::stable::get_num_threads() : 1, tasks = count * sides.size();
    const int64_t cuts = std::clamp<int64_t>((threads + tasks - 1) / tasks, 1, (f.n + 127) / 128);
    mean2[s].assign(count, 0.0);
    for (int64_t c = 0; c < count; ++c) {
      parts.emplace_back(rows * ldc);
      starts[s].push_back(parts.back().get());
      const int64_t j0 = std::min(f.p, c * step), j1 = std::min(f.p, j0 + step);
      for (int64_t r1 = f.n, cut = cuts; cut > 0; --cut) {  // equal areas of the triangle
        const double edge = static_cast<double>(f.n) * std::sqrt(static_cast<double>(cut - 1) / cuts);
        const int64_t r0 = static_cast<int64_t>(edge) / kPart * kPart;
        double* own = cut == 1 ? &mean2[s][c] : nullptr;
        if (r0 < r1 || own) works.push_back({sides[s], {j0, j1, r0, r1, sides[s]->scale, parts.back().get(), own}});
        r1 = r0;
      }
    }
    sides[s]->ld = ldc;
    sides[s]->g.emplace(ldc * ldc);
  }
  std::atomic<size_t> next{0};
  over(static_cast<int64_t>(works.size()), 1, parallel, [&](int64_t, int64_t) {
    for (size_t t = next++; t < works.size(); t = next++) {
      const Work& w = works[t];
      pass.multiply(w.side->f, w.chunk, w.side->ld);
    }
  });
  for (size_t s = 0; s < sides.size(); ++s) {
    Side& side = *sides[s];
    const int64_t n = side.f.n, ld = side.ld, blocks = ld / kCacheLine;
    float* g = side.g->get();
    over(blocks, 8, parallel, [&](int64_t begin, int64_t end) {
      const int64_t i1 = std::min(n, end * kCacheLine);
      pass.gather(starts[s].data(), starts[s].size(), ld, begin * kCacheLine, i1, n, g, ld);
    });
    double sum = 0, mean_square = 0;
    for (int64_t i = 0; i < n; ++i) sum += g[i * ld + i];
    for (double part : mean2[s]) mean_square += part;
    side.spread = sum / std::max<int64_t>(side.f.count, 1);
    // rows that differ by less than the rounding of their mean are constant: exact zeros keep CKA's 0/0 recognisable
    constexpr double kRounding = 4.0 * std::numeric_limits<float>::epsilon();
    mean_square *= static_cast<double>(side.scale) * side.scale;
    if (side.f.centre && side.spread <= kRounding * kRounding * mean_square) {
      std::fill(g, g + n * ld, 0.0f);
      side.spread = 0;
    }
  }
}

// where a pair is near, g becomes -d2 / 2 with a diagonal of 0, from which all that follows reads the same distances
void subtract_near_pairs(Side& side, bool parallel) {
  const int64_t n = side.f.n, ld = side.ld;
  float* g = side.g->get();
  const Scratch norms(ld);
  for (int64_t i = 0; i < n; ++i) norms.get()[i] = g[i * ld + i];
  if (!passes().near(g, ld, norms.get(), n)) return;
  over(n, 8, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) subtract_row(side.f, norms.get(), side.scale, i, g + i * ld);
  });
  over(n, 8, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) mirror_row(i, n, g, ld);
  });
}

// what the rows of K^ are computed from
void prepare_kernel(Side& side, bool centre, bool slopes, bool parallel) {
  Kernel& k = side.kernel;
  k.n = side.f.n, k.ld = side.ld, k.g = k.k = side.g->get();
  if (side.choice.rule == kLinear) return;
  k.rbf = true;
  subtract_near_pairs(side, parallel);
  side.k.emplace(k.n * k.ld);
  k.k = side.k->get();
  if (slopes) side.slope.emplace(k.n * k.ld), k.slope = side.slope->get();
  side.half.assign(k.ld, 0.0);
  for (int64_t i = 0; i < k.n; ++i) side.half[i] = 0.5 * static_cast<double>(k.g[i * k.ld + i]);
  side.rates = rates_of(side.choice, side.f, k.g, k.ld, side.spread, side.scale);
  k.half = side.half.data(), k.rates = side.rates.data(), k.bandwidths = side.rates.size();
  // a centred statistic does not see what all pairs have in common
  for (double rate : side.rates) k.level += !centre ? 0 : std::exp(std::max(-side.spread * rate, -30.0));
}

// one side's rows of K^ from its products; zero where a pair does not count
void finish_kernel(const Side& side, bool unbiased, int64_t begin, int64_t end) {
  const Kernel& k = side.kernel;
  const Passes& pass = passes();
  for (int64_t i = begin; i < end; ++i) {
    float *row = k.k + i * k.ld, *slope = k.slope ? k.slope + i * k.ld : nullptr;
    if (k.rbf) {
      pass.kernel(k, i);
      row[i] = static_cast<float>(k.bandwidths - k.level);
      if (slope) slope[i] = 0;
      for (int64_t j = 0; side.f.keep && j < k.n; ++j) {
        if (side.f.keep[i] && side.f.keep[j]) continue;
        row[j] = 0;
        if (slope) slope[j] = 0;
      }
    }
    if (unbiased) row[i] = 0;
  }
}

// V of one side, [n, n], and its numbers for the backward pass
void weigh_side(const Side& own, const Side& other, const double* rows, const double* sums, const Estimator& how,
                bool sigma, bool parallel, float* v, float* saved) {
  const int64_t n = own.f.n;
  const Passes& pass = passes();
  std::vector<double> e(own.ld, 0.0), moved(n);
  std::copy_n(rows + 3 * n, n, e.begin());
  const double p = rows[n], q = rows[2 * n];
  double slope = 1, largest = 0;
  if (own.kernel.rbf) slope = *std::max_element(own.rates.begin(), own.rates.end());
  for (double a : e) largest = std::max(largest, std::abs(a));
  const double entry = std::abs(p) * std::sqrt(sums[1]) / n + std::abs(q) * std::sqrt(sums[0]) / n + largest;
  const double size = 2 * slope * entry;
  const double unit = size > 0 && std::isfinite(size) ? std::exp2(std::ilogb(size)) : 1;
  const PairWeights w{p, q, e.data(), unit, sigma};
  over(n, std::max<int64_t>(1, (1 << 14) / n), parallel, [&](int64_t begin, int64_t end) {
    const Scratch row(own.ld);
    for (int64_t i = begin; i < end; ++i) {
      double sum[2];
      pass.weigh(own.kernel, other.kernel.k + i * other.ld, w, i, row.get(), sum);
      // a distance moves both of its ends
      if (own.kernel.rbf) row.get()[i] = static_cast<float>(-sum[0]);
      if (!own.kernel.rbf && how.unbiased) row.get()[i] = 0;
      std::copy_n(row.get(), n, v + i * n);
      moved[i] = sum[1];
    }
  });
  saved[0] = own.scale;
  saved[1] = static_cast<float>(own.scale * unit);
  if (sigma) saved[2] = static_cast<float>(total(moved.data(), n) * unit / 2 * std::sqrt(own.rates[0]) * own.scale);
}

struct Group {
  Side x, y;
  float* value;
  float* saved;   // [2, kSaved], or null
  float* v[2];    // [n, n] of each side, or null
};

void run(Group& group, const Estimator& how, bool parallel) {
  Side* sides[2] = {&group.x, &group.y};
  const int64_t n = group.x.f.n;
  std::vector<Side*> again;
  multiply({sides[0], sides[1]}, parallel);
  for (Side* side : sides) {
    if (side->spread > 0x1p-40 && side->spread < 0x1p40) continue;  // 0: constant, or too small for float32
    side->scale = scale_of(side->f);
    if (side->scale != 1) again.push_back(side);
  }
  if (!again.empty()) multiply(again, parallel);
  for (int s = 0; s < 2; ++s) {
    prepare_kernel(*sides[s], how.centre, group.v[s] || how.need >> s & 0b100, parallel);
  }

  std::vector<double> sums(5 * n);
  over(n, std::max<int64_t>(1, (1 << 14) / n), parallel, [&](int64_t begin, int64_t end) {
    for (const Side* side : sides) finish_kernel(*side, how.unbiased, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      double row[5];
      passes().sum(group.x.kernel.k + i * group.x.ld, group.y.kernel.k + i * group.y.ld, n, row);
      for (int m = 0; m < 5; ++m) sums[m * n + i] = row[m];
    }
  });
  GroupSums of{};
  of.n = n;
  of.count = static_cast<double>(group.x.f.count);
  for (int m = 0; m < 5; ++m) of.sums[m] = sums.data() + m * n;
  for (int s = 0; s < 2; ++s) {
    const double scale = sides[s]->scale;
    of.unit[s] = sides[s]->kernel.rbf ? 1 : 1 / (scale * scale);
  }
  std::vector<double> rows(how.need ? 2 * kSide * n : 0);
  *group.value = static_cast<float>(weigh<double>(of, how, how.need ? rows.data() : nullptr));
  for (int s = 0; how.need && s < 2; ++s) {
    std::fill_n(group.saved + s * kSaved, kSaved, 0.0f);
    if (!group.v[s]) continue;
    const double squares[2] = {total(of.sums[s ? 4 : 2], n), total(of.sums[s ? 2 : 4], n)};
    weigh_side(*sides[s], *sides[1 - s], rows.data() + s * kSide * n, squares, how, how.need >> s & 0b100, parallel,
               group.v[s], group.saved + s * kSaved);
  }
}

KernelChoice choice_of(int64_t rule, double factor, const std::optional<Tensor>& sigma, int64_t g, int64_t G) {
  KernelChoice out{static_cast<Rule>(rule), factor, nullptr, 0};
  if (rule != kNumbers) return out;
  out.count = sigma->size(1);
  out.sigma = static_cast<const double*>(sigma->const_data_ptr()) + (sigma->size(0) == G ? g * out.count : 0);
  return out;
}

void check_features(const Tensor& x, const char* name) {
  KDK_CHECK(x.is_cpu() && x.dim() == 3 && x.scalar_type() == ScalarType::Float && (x.size(2) <= 1 || x.stride(2) == 1),
            "pair_statistic: ", name, " must be float32 features [G, n, p] on the CPU with dense rows");
}

void check_sigma(int64_t rule, const std::optional<Tensor>& sigma, int64_t G, const char* name) {
  KDK_CHECK(rule >= kLinear && rule <= kMedian, "pair_statistic: rule_", name, " is ", rule, ": give 0 to 3");
  if (rule != kNumbers) return;
  KDK_CHECK(sigma && sigma->is_cpu() && sigma->is_contiguous() && sigma->dim() == 2 &&
                sigma->scalar_type() == ScalarType::Double && (sigma->size(0) == 1 || sigma->size(0) == G) &&
                sigma->size(1) >= 1,
            "pair_statistic: sigma_", name, " must be contiguous float64 on the CPU, [1, S] or [", G, ", S]");
}

// rule: 0 linear, 1 the numbers of sigma, 2 factor times the mean distance, 3 times the median. need: bits of x, y,
// sigma of x, sigma of y. V stands for the sides that need it, x before y
std::tuple<Tensor, Tensor, Tensor> pair_statistic(Tensor x, Tensor y, std::optional<Tensor> mask, int64_t rule_x,
                                                  double factor_x, std::optional<Tensor> sigma_x, int64_t rule_y,
                                                  double factor_y, std::optional<Tensor> sigma_y, bool cka,
                                                  bool unbiased, bool centre, int64_t need, int64_t minimum) {
  check_features(x, "x");
  check_features(y, "y");
  const int64_t G = x.size(0), n = x.size(1);
  KDK_CHECK(n > 0 && y.size(0) == G && y.size(1) == n, "pair_statistic: x and y must have the same groups and rows");
  KDK_CHECK(!mask || (mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                      mask->size(0) == G && mask->size(1) == n && mask->is_contiguous()),
            "pair_statistic: mask must be a contiguous bool tensor [", G, ", ", n, "] on the CPU");
  check_sigma(rule_x, sigma_x, G, "x");
  check_sigma(rule_y, sigma_y, G, "y");
  const bool wanted[2] = {(need & 0b101) != 0, (need & 0b1010) != 0};
  const int64_t groups[1] = {G}, shape[3] = {G, 2, kSaved}, none[1] = {0}, kept[4] = {wanted[0] + wanted[1], G, n, n};
  Tensor value = torch::stable::new_empty(x, {groups, 1});
  Tensor rows = need ? torch::stable::new_empty(x, {shape, 3}) : torch::stable::new_empty(x, {none, 1});
  Tensor v = need ? torch::stable::new_empty(x, {kept, 4}) : torch::stable::new_empty(x, {none, 1});

  const Estimator how{cka, unbiased, centre, need, minimum, std::numeric_limits<float>::epsilon()};
  auto one = [&](int64_t k, bool parallel) {
    const bool* keep = mask ? static_cast<const bool*>(mask->const_data_ptr()) + k * n : nullptr;
    auto side = [&](const Tensor& t, int64_t rule, double factor, const std::optional<Tensor>& sigma) {
      const float* data = static_cast<const float*>(t.const_data_ptr()) + k * t.stride(0);
      const Features f(data, keep, t.stride(1), n, t.size(2), centre || rule != kLinear);
      return Side(f, choice_of(rule, factor, sigma, k, G));
    };
    Group group{side(x, rule_x, factor_x, sigma_x), side(y, rule_y, factor_y, sigma_y),
                static_cast<float*>(value.mutable_data_ptr()) + k, nullptr, {nullptr, nullptr}};
    if (need) {
      group.saved = static_cast<float*>(rows.mutable_data_ptr()) + k * 2 * kSaved;
      float* first = static_cast<float*>(v.mutable_data_ptr()) + k * n * n;
      if (wanted[0]) group.v[0] = first;
      if (wanted[1]) group.v[1] = first + (wanted[0] ? G * n * n : 0);
    }
    run(group, how, parallel);
  };
  if (G >= static_cast<int64_t>(torch::stable::get_num_threads()) && G > 1) {
    torch::stable::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) one(k, false);
    });
  } else {
    const bool parallel = n * n / 2 * (x.size(2) + y.size(2)) >= kSerial;
    for (int64_t k = 0; k < G; ++k) one(k, parallel);
  }
  return {value, rows, v};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "pair_statistic(Tensor x, Tensor y, Tensor? mask, int rule_x, float factor_x, Tensor? sigma_x, int rule_y, "
      "float factor_y, Tensor? sigma_y, bool cka, bool unbiased, bool centre, int need, int minimum) -> "
      "(Tensor value, Tensor rows, Tensor V)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("pair_statistic", TORCH_BOX(&kdkernels::pair_statistic)); }
