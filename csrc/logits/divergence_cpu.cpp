// SPDX-License-Identifier: Apache-2.0
// Divergences of rows of logits on the CPU: value, what backward needs and, where all rows are added up, the gradient
// of the student too, while the row is in cache. Formulas, statistics and edges: kdkernels/logits/MATH.md, section 8.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "divergence.h"
#include "matrix.h"

namespace kdkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// maxima and inverse normalisers, the log of the teacher's by the student's; sum_c p d term / dp, of the student and of
// the teacher
enum Statistic { kMs, kIs, kMt, kIt, kRatio, kMeanS, kMeanT, kStatistics };

// a number for each row, or one for all
struct Vector {
  const float* data;  // or null
  int64_t stride;
  float number;

  float at(int64_t r) const { return data ? data[r * stride] : number; }
};

struct Call {
  Matrix student, teacher;
  int64_t R, C, padded;
  Vector tau;
  Divergence of;
};

// a block of a row in float32, whole vectors of it: where it lies, or in `scratch`
KDK_INLINE const float* block_of(const Matrix& m, int64_t r, int64_t j, int64_t C, float* scratch) {
  if (m.dtype == ScalarType::Float && j + kBlock <= C) return static_cast<const float*>(m.data) + m.at(r) + j;
  const int64_t count = std::min(kBlock, C - j);
  fetch(m, r, j, count, scratch);
  std::fill(scratch + count, scratch + (count + kPad - 1) / kPad * kPad, -std::numeric_limits<float>::infinity());
  return scratch;
}

struct Scratch {
  float z[kBlock], y[kBlock];
  std::vector<float> slopes;
};

struct Normaliser {
  float top;
  double sum;  // of exp((x - top) / tau)
};

template <int W>
KDK_INLINE Normaliser normaliser_of(const Matrix& m, int64_t r, const Call& c, float inverse_tau, float* scratch) {
  Normaliser of{-std::numeric_limits<float>::infinity(), 0};
  for (int64_t j = 0; j < c.C; j += kBlock) {
    const float* x = block_of(m, r, j, c.C, scratch);
    const int64_t padded = std::min(kBlock, c.padded - j);
    const float top = std::max(of.top, maximum<W>(x, padded));
    if (top != of.top && of.sum != 0) of.sum *= std::exp(static_cast<double>(of.top - top) * inverse_tau);
    of.top = top;
    // from a number, as long as nothing but -inf was seen
    of.sum += block_sum<W>(x, std::max(top, std::numeric_limits<float>::lowest()), padded, inverse_tau);
  }
  if (of.sum == 0) of.sum = std::numeric_limits<double>::quiet_NaN();
  return of;
}

// a row whose normalisers are known: maxima, their inverses, log of the teacher's by the student's
struct Pass {
  float top_z, of_p, top_y, of_q, ratio, inverse_tau;

  // p and what is to be known of a class; with maxima that are near, z - y is exact where the sides are
  template <int W, Form form>
  KDK_INLINE Class<W> at(const Divergence& of, const float* z_at, const float* y_at, typename Wide<W>::F& p) const {
    using F = typename Wide<W>::F;
    const bool near = std::abs(top_z - top_y) * inverse_tau <= 1;
    const F z = load<W>(z_at), y = load<W>(y_at), dz = z - top_z, dy = y - top_y;
    p = of_p * exp_of<W>(dz * inverse_tau);
    const F q = of_q * exp_of<W>(dy * inverse_tau);
    const F w = (near ? (z - y) - (top_z - top_y) : dz - dy) * inverse_tau + ratio;
    return class_of<W, form>(of, p, q, w);
  }
};

struct Sums {
  double term = 0, apart = 0, slope = 0;
};

// sums of a row, and the slopes of its classes where there is a place for them
template <int W, Form form>
KDK_INLINE Sums sums_of(const Call& c, int64_t r, const Pass& pass, Scratch& s, float* slopes) {
  using F = typename Wide<W>::F;
  Sums total;
  for (int64_t j0 = 0; j0 < c.C; j0 += kBlock) {
    const float *z = block_of(c.student, r, j0, c.C, s.z), *y = block_of(c.teacher, r, j0, c.C, s.y);
    F term{}, apart{}, slope{}, p;
    for (int64_t j = 0; j < std::min(kBlock, c.padded - j0); j += W) {
      const Class<W> of = pass.at<W, form>(c.of, z + j, y + j, p);
      term += of.term;
      apart += of.apart;
      slope += of.slope;
      if (slopes) store<W>(slopes + j0 + j, of.slope);
    }
    total.term += sum_of<W>(term);
    total.apart += sum_of<W>(apart);
    total.slope += sum_of<W>(slope);
  }
  return total;
}

struct Forward {
  float *value, *statistics;  // statistics [7, R] or null
  Vector weight;              // of a row's value and gradient
  void* gradient;             // [R, C] or null
};

struct Backward {
  Vector grad;
  const float* statistics;
  void* gradient;
};

// a row that does not count, whatever it holds
KDK_INLINE void no_gradient(const Call& c, int64_t r, void* to, Scratch& s) {
  std::fill(s.z, s.z + kBlock, 0.f);
  for (int64_t j = 0; j < c.C; j += kBlock) deliver(s.z, to, c.student.dtype, r * c.C + j, std::min(kBlock, c.C - j));
}

template <int W, Form form>
KDK_INLINE void row_of(const Call& c, int64_t r, Scratch& s, const Forward& to) {
  const float tau = c.tau.at(r), weight = to.weight.at(r), inverse_tau = 1 / tau;
  const Normaliser z = normaliser_of<W>(c.student, r, c, inverse_tau, s.z);
  const Normaliser y = normaliser_of<W>(c.teacher, r, c, inverse_tau, s.y);
  const Pass pass{z.top, static_cast<float>(1 / z.sum), y.top, static_cast<float>(1 / y.sum),
                  static_cast<float>(std::log(y.sum / z.sum)), inverse_tau};
  const Sums sums = sums_of<W, form>(c, r, pass, s, to.gradient ? s.slopes.data() : nullptr);
  // normalisers are rounded, which moves w alike for all classes: by sum_c (p - q), which is 0
  const double off = std::abs(sums.apart) < 1e-3 && std::isfinite(sums.slope) ? sums.apart : 0;
  const double value = sums.term - (off == 0 ? 0 : off * sums.slope) + off * off / 2 * c.of.curvature;
  const float mean = static_cast<float>(value == value ? sums.slope : value);
  to.value[r] = weight == 0 ? 0.f : static_cast<float>(value * tau * tau) * weight;
  if (to.statistics) {
    // infinite both: KL(p || q), whose teacher's slopes are q - p
    const double others = std::isinf(value) && value == sums.slope ? 0 : value - sums.slope;
    const float kept[kStatistics] = {z.top, pass.of_p, y.top, pass.of_q, pass.ratio, mean, static_cast<float>(others)};
    for (int k = 0; k < kStatistics; ++k) to.statistics[k * c.R + r] = kept[k];
  }
  if (!to.gradient) return;
  if (weight == 0) return no_gradient(c, r, to.gradient, s);
  const float factor = weight * tau;
  for (int64_t j0 = 0; j0 < c.C; j0 += kBlock) {
    const float* from = block_of(c.student, r, j0, c.C, s.z);
    for (int64_t j = 0; j < std::min(kBlock, c.padded - j0); j += W) {
      const auto p = pass.of_p * exp_of<W>((load<W>(from + j) - z.top) * inverse_tau);
      store<W>(s.y + j, factor * (load<W>(s.slopes.data() + j0 + j) - mean * p));
    }
    deliver(s.y, to.gradient, c.student.dtype, r * c.C + j0, std::min(kBlock, c.C - j0));
  }
}

template <int W, Form form>
KDK_INLINE void row_of(const Call& c, int64_t r, Scratch& s, const Backward& b) {
  const float grad = b.grad.at(r), tau = c.tau.at(r);
  if (grad == 0) return no_gradient(c, r, b.gradient, s);
  const float* kept = b.statistics + r;
  const Pass pass{kept[kMs * c.R], kept[kIs * c.R], kept[kMt * c.R], kept[kIt * c.R], kept[kRatio * c.R], 1 / tau};
  const float mean = kept[kMeanS * c.R], factor = grad * tau;
  for (int64_t j0 = 0; j0 < c.C; j0 += kBlock) {
    const float *z = block_of(c.student, r, j0, c.C, s.z), *y = block_of(c.teacher, r, j0, c.C, s.y);
    for (int64_t j = 0; j < std::min(kBlock, c.padded - j0); j += W) {
      typename Wide<W>::F p;
      const Class<W> of = pass.at<W, form>(c.of, z + j, y + j, p);
      store<W>(s.y + j, factor * (of.slope - mean * p));
    }
    deliver(s.y, b.gradient, c.student.dtype, r * c.C + j0, std::min(kBlock, c.C - j0));
  }
}

template <int W, Form form, class How>
KDK_INLINE void each_row(const Call& c, int64_t begin, int64_t end, Scratch& s, const How& how) {
  for (int64_t r = begin; r < end; ++r) row_of<W, form>(c, r, s, how);
}

template <int W, class How>
KDK_INLINE void each_row(const Call& c, int64_t begin, int64_t end, Scratch& s, const How& how) {
  switch (c.of.form) {
    case Form::kMixture: return each_row<W, Form::kMixture>(c, begin, end, s, how);
    case Form::kForward: return each_row<W, Form::kForward>(c, begin, end, s, how);
    case Form::kReverse: return each_row<W, Form::kReverse>(c, begin, end, s, how);
    case Form::kVariation: return each_row<W, Form::kVariation>(c, begin, end, s, how);
  }
}

// plain functions, because the target attribute does not reach through a template
#define KDK_ROWS(NAME, TARGET, W)                                                                              \
  TARGET void value_##NAME(const Call& c, int64_t begin, int64_t end, Scratch& s, const Forward& to) { \
    each_row<W>(c, begin, end, s, to);                                                                       \
  }                                                                                                            \
  TARGET void slope_##NAME(const Call& c, int64_t begin, int64_t end, Scratch& s, const Backward& b) { \
    each_row<W>(c, begin, end, s, b);                                                                        \
  }
KDK_ROWS(baseline, , 4)
#if KDK_X86
KDK_ROWS(avx2, KDK_AVX2, 8)
KDK_ROWS(avx512, KDK_AVX512, 16)
#endif
#undef KDK_ROWS

template <class How>
using Rows = void (*)(const Call&, int64_t, int64_t, Scratch&, const How&);

template <class How>
void run(const Call& c, const How& how, bool slopes, Rows<How> baseline, [[maybe_unused]] Rows<How> avx2,
         [[maybe_unused]] Rows<How> avx512) {
  Rows<How> rows = baseline;
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) rows = avx512;
  if (isa == Isa::kAvx2) rows = avx2;
#endif
  torch::stable::parallel_for(0, c.R, grain(c.C), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    scratch.slopes.resize(slopes ? c.padded : 0);
    rows(c, begin, end, scratch, how);
  });
}

Vector vector_of(const OptionalTensor& t, int64_t R, double number, const char* name) {
  if (!t) return {nullptr, 0, static_cast<float>(number)};
  KDK_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == R && t->scalar_type() == ScalarType::Float,
            "divergence_rows: ", name, " must be float32 [", R, "]");
  return {static_cast<const float*>(t->const_data_ptr()), t->stride(0), 0};
}

Call call_of(const Tensor& student, const Tensor& teacher, const OptionalTensor& taus, double tau, double b, double u,
             double v) {
  const int64_t R = rows_of(student), C = student.size(student.dim() - 1);
  return {matrix(student, "divergence_rows: student", R, C), matrix(teacher, "divergence_rows: teacher", R, C), R, C,
          (C + kPad - 1) / kPad * kPad, vector_of(taus, R, tau, "taus"), Divergence(b, u, v)};
}

// value and gradient are those of each row times its weight
std::tuple<Tensor, Tensor, Tensor> divergence_rows(Tensor student, Tensor teacher, OptionalTensor taus,
                                                   OptionalTensor weights, double tau, double b, double u, double v,
                                                   double weight, bool need, bool gradient) {
  const Call c = call_of(student, teacher, taus, tau, b, u, v);
  const int64_t rows[1] = {c.R}, none[1] = {0}, kept[2] = {kStatistics, c.R}, shape[2] = {c.R, c.C};
  Tensor value = torch::stable::new_empty(student, {rows, 1}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(student, {need ? kept : none, need ? 2u : 1u}, ScalarType::Float);
  Tensor found = torch::stable::new_empty(student, {gradient ? shape : none, gradient ? 2u : 1u});
  const Forward to{static_cast<float*>(value.mutable_data_ptr()),
                   need ? static_cast<float*>(statistics.mutable_data_ptr()) : nullptr,
                   vector_of(weights, c.R, weight, "weights"), gradient ? found.mutable_data_ptr() : nullptr};
#if KDK_X86
  run<Forward>(c, to, gradient, value_baseline, value_avx2, value_avx512);
#else
  run<Forward>(c, to, gradient, value_baseline, nullptr, nullptr);
#endif
  return {value, statistics, found};
}

Tensor divergence_rows_backward(Tensor grad, Tensor student, Tensor teacher, OptionalTensor taus, Tensor statistics,
                                double tau, double b, double u, double v) {
  const Call c = call_of(student, teacher, taus, tau, b, u, v);
  KDK_CHECK(statistics.is_cpu() && statistics.is_contiguous() && statistics.scalar_type() == ScalarType::Float &&
                statistics.numel() == kStatistics * c.R,
            "divergence_rows_backward: statistics must be what divergence_rows gave, float32 [7, ", c.R, "]");
  const int64_t shape[2] = {c.R, c.C};
  Tensor found = torch::stable::new_empty(student, {shape, 2});
  const Backward back{vector_of(grad, c.R, 0, "grad"), static_cast<const float*>(statistics.const_data_ptr()),
                      found.mutable_data_ptr()};
#if KDK_X86
  run<Backward>(c, back, false, slope_baseline, slope_avx2, slope_avx512);
#else
  run<Backward>(c, back, false, slope_baseline, nullptr, nullptr);
#endif
  return found;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("divergence_rows(Tensor student, Tensor teacher, Tensor? taus, Tensor? weights, float tau, float b, float u, "
        "float v, float weight, bool need, bool gradient) -> (Tensor value, Tensor statistics, Tensor gradient)");
  m.def("divergence_rows_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? taus, Tensor statistics, "
        "float tau, float b, float u, float v) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("divergence_rows", TORCH_BOX(&kdkernels::divergence_rows));
  m.impl("divergence_rows_backward", TORCH_BOX(&kdkernels::divergence_rows_backward));
}
