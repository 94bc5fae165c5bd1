// SPDX-License-Identifier: Apache-2.0
// What CMKDLoss takes from two rows of logits beside their ranks, in one visit of each: z-scores, Pearson's correlation
// and the teacher's entropy, and the gradient back through the student's z-score. Sums are float64. The formulas are
// those of kdkernels/rank/scores.py, which has the schemas and runs where this does not.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../logits/rows.h"
#include "cpu_rows.h"

namespace kdkernels {
namespace {

// rows as the caller's T, 1 and 0 for what is present and what is away, and in float64; zero behind the end
template <class T>
struct RowScratch {
  int64_t padded;
  std::vector<double> doubles;
  std::vector<T> values;
  double *a, *b;
  T *x, *y, *keep, *scores;
  explicit RowScratch(int64_t n)
      : padded((n + kPad - 1) / kPad * kPad), doubles(2 * padded), values(4 * padded), a(doubles.data()),
        b(a + padded), x(values.data()), y(x + padded), keep(y + padded), scores(keep + padded) {}
};

template <class T>
struct Scored {
  Rows<const T> x, y;
  Rows<T> z_x, z_y;
  double *scale, *count;
  T *share, *pearson;
  int64_t n;
  double tau;  // 0: the entropy is not asked for
};

template <class T>
struct ScoreGradient {
  Rows<const T> grad;  // or null
  const T* grad_pearson;  // or null
  Rows<const T> z_x, z_y;
  const double *scale, *count;
  Rows<T> dx;
  int64_t n;
};

template <class T>
constexpr T kAway = -std::numeric_limits<T>::infinity();
// what is no greater is away: rows are padded with -inf or with this
template <class T>
constexpr T kLeast = std::numeric_limits<T>::lowest();

// 1 / population deviation; 0 where the spread is no more than the mean's rounding. NaN stays NaN
template <class T>
KDK_INLINE double inverse_deviation(double square, double count, double mean) {
  const double variance = square / count, least = 4.0 * std::numeric_limits<T>::epsilon() * mean;
  return variance <= least * least ? 0 : 1 / std::sqrt(variance);
}

// sum exp(z) and sum z exp(z), z = (y - max y) / tau; what is away is -inf
template <int W>
KDK_INLINE void exponentials(const float* y, int64_t padded, double tau, double& total, double& cross) {
  using F = typename Wide<W>::F;
  const float top = maximum<W>(y, padded), inverse = static_cast<float>(1 / tau);
  for (int64_t j0 = 0; j0 < padded; j0 += kBlock) {
    F t{}, c{};
    for (int64_t j = j0; j < std::min(padded, j0 + kBlock); j += W) {
      const F z = (load<W>(y + j) - top) * inverse;
      const F e = exp_of<W>(z);
      t += e;
      c += e == 0.f ? F{} : e * z;  // no 0 * inf; NaN is not 0
    }
    total += sum_of<W>(t);
    cross += sum_of<W>(c);
  }
}

template <int W>
KDK_INLINE void exponentials(const double* y, int64_t padded, double tau, double& total, double& cross) {
  double top = kAway<double>;
  for (int64_t j = 0; j < padded; ++j) top = y[j] > top ? y[j] : top;
  for (int64_t j = 0; j < padded; ++j) {
    const double z = (y[j] - top) / tau, e = std::exp(z);
    total += e;
    cross += e == 0 ? 0 : e * z;
  }
}

template <int W, class T>
KDK_INLINE void score_row(const Scored<T>& c, int64_t r, RowScratch<T>& s) {
  using L = Lanes<W / 2>;
  const T *__restrict__ x = c.x[r], *__restrict__ y = c.y[r];
  const int64_t n = c.n;
  double *__restrict__ a = s.a, *__restrict__ b = s.b;
  T *__restrict__ own_x = s.x, *__restrict__ own_y = s.y, *__restrict__ keep = s.keep, *__restrict__ scores = s.scores;
  int64_t first = 0;
  while (first < n && (x[first] <= kLeast<T> || y[first] <= kLeast<T>)) ++first;
  // about an entry of the row: equal entries then have a spread of exactly 0
  const T about_x = first < n ? x[first] : T(0), about_y = first < n ? y[first] : T(0);
  // one loop each: the compiler makes vectors of these, not of their union
  for (int64_t j = 0; j < n; ++j) keep[j] = x[j] <= kLeast<T> ? T(0) : T(1);
  for (int64_t j = 0; j < n; ++j) keep[j] = y[j] <= kLeast<T> ? T(0) : keep[j];
  for (int64_t j = 0; j < n; ++j) own_x[j] = keep[j] == 0 ? about_x : x[j];
  for (int64_t j = 0; j < n; ++j) own_y[j] = keep[j] == 0 ? about_y : y[j];
  for (int64_t j = 0; j < n; ++j) scores[j] = keep[j] == 0 ? kAway<T> : y[j];
  for (int64_t j = n; j < s.padded; ++j) own_x[j] = about_x, own_y[j] = about_y, scores[j] = kAway<T>;
  const double x0 = about_x, y0 = about_y;
  L one, u, v, sums[3]{};
  for (int64_t j = 0; j < s.padded; j += kLanes) {
    one.load(keep + j), u.load(own_x + j), v.load(own_y + j);
    for (int h = 0; h < L::kParts; ++h) {
      sums[0].part[h] += one.part[h];
      sums[1].part[h] += u.part[h] - x0;
      sums[2].part[h] += v.part[h] - y0;
    }
  }
  const double present = sums[0].sum(), count = present > 1 ? present : 1;
  const double mean_x = sums[1].sum() / count, mean_y = sums[2].sum() / count;
  L squares[3]{};
  for (int64_t j = 0; j < s.padded; j += kLanes) {
    one.load(keep + j), u.load(own_x + j), v.load(own_y + j);
    for (int h = 0; h < L::kParts; ++h) {
      u.part[h] = (u.part[h] - x0 - mean_x) * one.part[h];
      v.part[h] = (v.part[h] - y0 - mean_y) * one.part[h];
      squares[0].part[h] += u.part[h] * u.part[h];
      squares[1].part[h] += v.part[h] * v.part[h];
      squares[2].part[h] += u.part[h] * v.part[h];
    }
    u.store(a + j), v.store(b + j);
  }
  const double scale_x = inverse_deviation<T>(squares[0].sum(), count, x0 + mean_x);
  const double scale_y = inverse_deviation<T>(squares[1].sum(), count, y0 + mean_y);
  T *__restrict__ z_x = c.z_x[r], *__restrict__ z_y = c.z_y[r];
  for (int64_t j = 0; j < n; ++j) z_x[j] = static_cast<T>(a[j] * scale_x);
  for (int64_t j = 0; j < n; ++j) own_y[j] = static_cast<T>(b[j] * scale_y);
  for (int64_t j = 0; j < n; ++j) z_y[j] = keep[j] == 0 ? kAway<T> : own_y[j];
  c.scale[r] = scale_x, c.count[r] = count;
  c.pearson[r] = static_cast<T>(squares[2].sum() * scale_x * scale_y / count);
  double share = 0;
  if (c.tau > 0 && count > 1) {
    double total = 0, cross = 0;
    exponentials<W>(scores, s.padded, c.tau, total, cross);
    share = (std::log(total) - cross / total) / std::log(count);
    share = share > 1 ? 1 : share;
  }
  c.share[r] = static_cast<T>(share);
}

// g = grad + grad_pearson z_y / count; dx = (g - mean g - z_x mean(g z_x)) / deviation
template <int W, class T>
KDK_INLINE void gradient_row(const ScoreGradient<T>& c, int64_t r, RowScratch<T>& s) {
  using L = Lanes<W / 2>;
  const T *z_x = c.z_x[r], *z_y = c.z_y[r], *grad = c.grad.data ? c.grad[r] : nullptr;
  const int64_t n = c.n;
  double *__restrict__ g = s.a, *__restrict__ z = s.b;
  T *__restrict__ own_y = s.y, *__restrict__ keep = s.keep;
  const double count = c.count[r], scale = c.scale[r];
  for (int64_t j = 0; j < n; ++j) {
    const bool away = z_y[j] == kAway<T>;
    keep[j] = away ? T(0) : T(1);
    own_y[j] = away ? T(0) : z_y[j];
  }
  for (int64_t j = 0; j < n; ++j) g[j] = grad ? grad[j] : T(0);
  if (c.grad_pearson) {
    const double slope_y = c.grad_pearson[r] / count;
    for (int64_t j = 0; j < n; ++j) g[j] += slope_y * own_y[j];
  }
  for (int64_t j = 0; j < n; ++j) z[j] = z_x[j];
  L one, u, v, sums[2]{};
  for (int64_t j = 0; j < s.padded; j += kLanes) {
    one.load(keep + j), u.load(g + j), v.load(z + j);
    for (int h = 0; h < L::kParts; ++h) {
      sums[0].part[h] += u.part[h] * one.part[h];
      sums[1].part[h] += u.part[h] * v.part[h];
    }
  }
  const double mean = sums[0].sum() / count, slope = sums[1].sum() / count;
  T* __restrict__ dx = c.dx[r];
  // own_y has done its work. NaN does not reach what is away
  for (int64_t j = 0; j < n; ++j) own_y[j] = static_cast<T>((g[j] - mean - z[j] * slope) * scale);
  for (int64_t j = 0; j < n; ++j) dx[j] = keep[j] == 0 ? T(0) : own_y[j];
}

// plain functions, because the target attribute does not reach through a template
#define KDK_SCORES(TARGET, W, NAME, T)                                                                        \
  TARGET void score_##NAME(const Scored<T>& c, int64_t begin, int64_t end, RowScratch<T>& s) {                \
    for (int64_t r = begin; r < end; ++r) score_row<W>(c, r, s);                                              \
  }                                                                                                           \
  TARGET void gradient_##NAME(const ScoreGradient<T>& c, int64_t begin, int64_t end, RowScratch<T>& s) {      \
    for (int64_t r = begin; r < end; ++r) gradient_row<W>(c, r, s);                                           \
  }
#define KDK_SCORES_OF_BOTH(TARGET, W, NAME) \
  KDK_SCORES(TARGET, W, NAME, float)        \
  KDK_SCORES(TARGET, W, NAME, double)
KDK_SCORES_OF_BOTH(, 4, baseline)
#if KDK_X86
KDK_SCORES_OF_BOTH(KDK_AVX2, 8, avx2)
KDK_SCORES_OF_BOTH(KDK_AVX512, 16, avx512)
#endif
#undef KDK_SCORES_OF_BOTH
#undef KDK_SCORES

template <class Job, class T>
using Run = void (*)(const Job&, int64_t, int64_t, RowScratch<T>&);

template <class T, class Job>
void over_rows(int64_t count, const Job& job, Run<Job, T> baseline, [[maybe_unused]] Run<Job, T> avx2,
               [[maybe_unused]] Run<Job, T> avx512) {
  Run<Job, T> run = baseline;
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx2) run = avx2;
  if (isa == Isa::kAvx512) run = avx512;
#endif
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, job.n));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    RowScratch<T> scratch(job.n);
    run(job, begin, end, scratch);
  });
}

#if KDK_X86
#define KDK_EACH(NAME) NAME##_baseline, NAME##_avx2, NAME##_avx512
#else
#define KDK_EACH(NAME) NAME##_baseline, nullptr, nullptr
#endif

template <class F>
auto with_wide_dtype(const Tensor& x, const char* op, const char* name, F f) {
  if (x.scalar_type() == ScalarType::Float) return f(float{});
  KDK_CHECK(x.scalar_type() == ScalarType::Double, op, ": ", name, " is ",
            torch::headeronly::toString(x.scalar_type()), ": pass float32 or float64");
  return f(double{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> score_rows(Tensor x, Tensor y, double tau) {
  const char* op = "score_rows";
  check_rows(x, op, "x");
  check_like(y, x, x.scalar_type(), op, "y");
  return with_wide_dtype(x, op, "x", [&](auto zero) {
    using T = decltype(zero);
    Tensor z_x = empty_like_rows(x, true, kType<T>), z_y = empty_like_rows(x, true, kType<T>);
    Tensor scale = empty_per_row(x, ScalarType::Double), count = empty_per_row(x, ScalarType::Double);
    Tensor share = empty_per_row(x, kType<T>), pearson = empty_per_row(x, kType<T>);
    const Scored<T> job{rows<T>(x), rows<T>(y), new_rows<T>(z_x), new_rows<T>(z_y),
                        static_cast<double*>(scale.mutable_data_ptr()), static_cast<double*>(count.mutable_data_ptr()),
                        static_cast<T*>(share.mutable_data_ptr()), static_cast<T*>(pearson.mutable_data_ptr()),
                        x.size(1), tau};
    over_rows<T, Scored<T>>(x.size(0), job, KDK_EACH(score));
    return std::make_tuple(z_x, z_y, scale, count, share, pearson);
  });
}

const void* per_row(const Tensor& t, const Tensor& x, ScalarType type, const char* op, const char* name) {
  KDK_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.size(0) == x.size(0) && t.is_contiguous(), op,
            ": ", name, " must be a contiguous ", torch::headeronly::toString(type), " [", x.size(0), "] on the CPU");
  return t.const_data_ptr();
}

Tensor score_rows_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_pearson, Tensor z_x, Tensor z_y,
                           Tensor scale, Tensor count) {
  const char* op = "score_rows_backward";
  check_rows(z_x, op, "z_x");
  check_like(z_y, z_x, z_x.scalar_type(), op, "z_y");
  return with_wide_dtype(z_x, op, "z_x", [&](auto zero) {
    using T = decltype(zero);
    if (grad) check_like(*grad, z_x, kType<T>, op, "grad");
    const void* of_pearson = grad_pearson ? per_row(*grad_pearson, z_x, kType<T>, op, "grad_pearson") : nullptr;
    Tensor dx = empty_like_rows(z_x, true, kType<T>);
    const ScoreGradient<T> job{grad ? rows<T>(*grad) : Rows<const T>{nullptr, 0}, static_cast<const T*>(of_pearson),
                               rows<T>(z_x), rows<T>(z_y),
                               static_cast<const double*>(per_row(scale, z_x, ScalarType::Double, op, "scale")),
                               static_cast<const double*>(per_row(count, z_x, ScalarType::Double, op, "count")),
                               new_rows<T>(dx), z_x.size(1)};
    over_rows<T, ScoreGradient<T>>(z_x.size(0), job, KDK_EACH(gradient));
    return dx;
  });
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("score_rows", TORCH_BOX(&kdkernels::score_rows));
  m.impl("score_rows_backward", TORCH_BOX(&kdkernels::score_rows_backward));
}
