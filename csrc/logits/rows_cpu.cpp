// SPDX-License-Identifier: Apache-2.0
// The losses on logits on the CPU: a row is converted to float32 in cache, all of its exponentials are taken there, and
// only the value and a few numbers leave (forward), or the gradient (backward). PyTorch writes and reads about ten
// tensors of the size of the logits. Formulas, saved statistics and edges: kdkernels/logits/MATH.md.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "matrix.h"
#include "rows.h"

namespace kdkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
enum Statistic { kMs, kLs, kMt, kLt, kKl, kL1, kMa, kLa, kMb, kLb };

struct Call {
  Matrix student, teacher, clean;
  const int64_t *labels, *permuted, *order;
  const double* lam;  // or null
  float number;
  int64_t R, C, padded;
  Terms of;

  float share(int64_t r) const { return lam ? static_cast<float>(lam[r]) : number; }
};

// what one thread works in: student, teacher, the clean rows, the target or the gradient
struct Scratch {
  std::vector<float> memory;
  float* part[5];
  explicit Scratch(int64_t padded) : memory(5 * padded) {
    for (int k = 0; k < 5; ++k) part[k] = memory.data() + k * padded;
  }
};

// a row, padded with classes that are not there
KDK_INLINE void read(const Call& c, const Matrix& m, int64_t r, float* to) {
  fetch(m, r, 0, c.C, to);
  std::fill(to + c.C, to + c.padded, -std::numeric_limits<float>::infinity());
}

KDK_INLINE void add_labels(const Call& c, int64_t r, float weight, float* to) {
  const float lam = c.share(r);
  to[c.labels[r]] += weight * lam;
  to[c.permuted[r]] += weight * (1 - lam);
}

template <int W>
KDK_INLINE void loss_row(const Call& c, int64_t r, Scratch& s, float* value, float* statistics) {
  const Terms& of = c.of;
  Side z{s.part[0], 0, 0}, y{s.part[1], 0, 0}, clean[2] = {{s.part[2], 0, 0}, {s.part[3], 0, 0}};
  const bool together = of.soft && of.plain;
  read(c, c.student, r, s.part[0]);
  if (of.soft) read(c, c.teacher, r, s.part[1]);
  z.top = maximum<W>(z.x, c.padded);
  if (together) y.top = maximum<W>(y.x, c.padded);
  const Sums sums = both_sides<W>(z, y, c.padded, of, together);
  const double log_s = std::log(sums.s);
  z.log = static_cast<float>(log_s);
  double kl = 0, loss = 0;
  if (together) {
    const double log_t = std::log(sums.t);
    y.log = static_cast<float>(log_t);
    kl = sums.cross / sums.t * of.inverse_tau - log_t + log_s;
  } else if (of.soft) {
    normalise<W>(y, c.padded, of.inverse_tau);
    if (of.clean) {
      read(c, c.clean, r, s.part[2]);
      read(c, c.clean, c.order[r], s.part[3]);
      for (Side& side : clean) normalise<W>(side, c.padded, of.inverse_tau);
    }
    mixture<W>(y, clean, c.share(r), of, s.part[4], c.padded);
    if (of.mix[2] > 0) add_labels(c, r, of.mix[2], s.part[4]);
    kl = divergence<W>(s.part[4], z, c.padded, of.inverse_tau);
  }
  // a difference of numbers near 1, in which a divergence this small has lost digits
  if (of.soft && kl < kNear) kl = near_divergence<W>(together ? nullptr : s.part[4], z, y, c.padded, of.inverse_tau);
  kl *= static_cast<double>(of.tau) * of.tau;
  if (of.soft) loss += of.alpha * kl;
  const double log_one = of.hard ? std::log(sums.one) : 0;
  if (of.hard) {
    const double lam = c.share(r), top = z.top;
    double hard = 0;
    if (lam != 0) hard += lam * (log_one - (z.x[c.labels[r]] - top));
    if (lam != 1) hard += (1 - lam) * (log_one - (z.x[c.permuted[r]] - top));
    loss += (1 - of.alpha) * hard;
    if (!(sums.s == sums.s)) loss = kNan;
  }
  value[r] = static_cast<float>(loss);
  if (!statistics) return;
  const float kept[10] = {z.top, z.log, y.top, y.log, static_cast<float>(kl), static_cast<float>(log_one),
                          clean[0].top, clean[0].log, clean[1].top, clean[1].log};
  const int count = of.clean ? 10 : c.labels ? 6 : 5;
  for (int k = 0; k < count; ++k) statistics[k * c.R + r] = kept[k];
}

template <int W>
KDK_INLINE void gradient_row(const Call& c, int64_t r, float g, const float* statistics, Scratch& s, void* ds,
                             void* dt) {
  const Terms& of = c.of;
  float* out = s.part[4];
  if (g == 0) {  // a row that does not count, whatever it holds
    std::fill(out, out + c.C, 0.f);
    if (ds) deliver(out, ds, c.student.dtype, r * c.C, c.C);
    if (dt) deliver(out, dt, c.teacher.dtype, r * c.C, c.C);
    return;
  }
  const float* kept = statistics + r;
  Side z{s.part[0], kept[kMs * c.R], kept[kLs * c.R]}, y{s.part[1], kept[kMt * c.R], kept[kLt * c.R]};
  read(c, c.student, r, s.part[0]);
  if (of.soft) read(c, c.teacher, r, s.part[1]);
  if (dt) {
    teacher_gradient<W>(z, y, kept[kKl * c.R], of, g, out, c.padded);
    deliver(out, dt, c.teacher.dtype, r * c.C, c.C);
  }
  if (!ds) return;
  const float* q = nullptr;
  if (of.soft && !of.plain) {
    Side clean[2] = {{s.part[2], 0, 0}, {s.part[3], 0, 0}};
    if (of.clean) {
      read(c, c.clean, r, s.part[2]);
      read(c, c.clean, c.order[r], s.part[3]);
      clean[0].top = kept[kMa * c.R], clean[0].log = kept[kLa * c.R];
      clean[1].top = kept[kMb * c.R], clean[1].log = kept[kLb * c.R];
    }
    mixture<W>(y, clean, c.share(r), of, out, c.padded);
    if (of.mix[2] > 0) add_labels(c, r, of.mix[2], out);
    q = out;
  }
  student_gradient<W>(z, y, q, of.hard ? kept[kL1 * c.R] : 0.f, of, g, out, c.padded);
  if (of.hard) add_labels(c, r, -g * (1 - of.alpha), out);
  deliver(out, ds, c.student.dtype, r * c.C, c.C);
}

struct Backward {
  const float* grad;
  int64_t grad_stride;
  float factor;
  const float* statistics;
  void *ds, *dt;
};

// plain functions, because the target attribute does not reach through a template
#define KDK_ROWS(NAME, TARGET, W)                                                                             \
  TARGET void loss_##NAME(const Call& c, int64_t begin, int64_t end, Scratch& s, float* value, float* kept) { \
    for (int64_t r = begin; r < end; ++r) loss_row<W>(c, r, s, value, kept);                                  \
  }                                                                                                           \
  TARGET void gradient_##NAME(const Call& c, int64_t begin, int64_t end, Scratch& s, const Backward& b) {     \
    for (int64_t r = begin; r < end; ++r) {                                                                   \
      gradient_row<W>(c, r, b.grad[r * b.grad_stride] * b.factor, b.statistics, s, b.ds, b.dt);               \
    }                                                                                                         \
  }
KDK_ROWS(baseline, , 4)
#if KDK_X86
KDK_ROWS(avx2, KDK_AVX2, 8)
KDK_ROWS(avx512, KDK_AVX512, 16)
#endif
#undef KDK_ROWS

using LossRows = void (*)(const Call&, int64_t, int64_t, Scratch&, float*, float*);
using GradientRows = void (*)(const Call&, int64_t, int64_t, Scratch&, const Backward&);

LossRows loss_rows() {
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return loss_avx512;
  if (isa == Isa::kAvx2) return loss_avx2;
#endif
  return loss_baseline;
}

GradientRows gradient_rows() {
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return gradient_avx512;
  if (isa == Isa::kAvx2) return gradient_avx2;
#endif
  return gradient_baseline;
}

template <class T>
const T* vector_of(const OptionalTensor& t, ScalarType dtype, int64_t R, const char* name) {
  if (!t) return nullptr;
  KDK_CHECK(t->is_cpu() && t->is_contiguous() && t->numel() == R && t->scalar_type() == dtype, "logits_rows: ", name,
            " must be a contiguous ", torch::headeronly::toString(dtype), " [", R, "]");
  return static_cast<const T*>(t->const_data_ptr());
}

void check_range(const int64_t* v, int64_t R, int64_t limit, const char* name) {
  for (int64_t r = 0; v && r < R; ++r) {
    KDK_CHECK(v[r] >= 0 && v[r] < limit, "logits_rows: ", name, " holds ", v[r], ": give 0 to ", limit - 1);
  }
}

Call call_of(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& permuted,
             const OptionalTensor& lam, const OptionalTensor& clean, const OptionalTensor& order, double tau,
             double alpha, double k1, double k2, double k3, double number) {
  const int64_t R = rows_of(student), C = student.size(student.dim() - 1);
  Call c{};
  c.R = R, c.C = C, c.padded = (C + kPad - 1) / kPad * kPad;
  c.student = matrix(student, "logits_rows: student", R, C);
  c.teacher = matrix(teacher, "logits_rows: teacher", R, C);
  if (clean) c.clean = matrix(*clean, "logits_rows: clean", R, C);
  c.labels = vector_of<int64_t>(labels, ScalarType::Long, R, "labels");
  c.permuted = vector_of<int64_t>(permuted, ScalarType::Long, R, "permuted");
  c.order = vector_of<int64_t>(order, ScalarType::Long, R, "order");
  c.lam = vector_of<double>(lam, ScalarType::Double, R, "lam");
  c.number = static_cast<float>(number);
  check_range(c.labels, R, C, "labels");
  check_range(c.permuted, R, C, "permuted");
  check_range(c.order, R, R, "order");
  const bool mixed = c.labels && c.permuted;
  int squarings = -1;
  for (int k = 0; k <= 3; ++k) squarings = tau == (1 << k) ? k : squarings;
  c.of = {static_cast<float>(tau), static_cast<float>(1 / tau), static_cast<float>(alpha), squarings,
          {static_cast<float>(k1), static_cast<float>(k2), static_cast<float>(k3)},
          mixed && alpha < 1, alpha > 0, mixed, k1 == 1, k2 > 0 && alpha > 0};
  KDK_CHECK(!c.of.clean || (clean && order), "logits_rows: k2 > 0 needs clean and order");
  return c;
}

std::tuple<Tensor, Tensor> logits_rows(Tensor student, Tensor teacher, OptionalTensor labels, OptionalTensor permuted,
                                       OptionalTensor lam, OptionalTensor clean, OptionalTensor order, double tau,
                                       double alpha, double k1, double k2, double k3, double number, bool need) {
  const Call c = call_of(student, teacher, labels, permuted, lam, clean, order, tau, alpha, k1, k2, k3, number);
  const int64_t rows[1] = {c.R}, shape[2] = {c.of.clean ? 10 : c.labels ? 6 : 5, c.R}, none[1] = {0};
  Tensor value = torch::stable::new_empty(student, {rows, 1}, ScalarType::Float);
  Tensor statistics = need ? torch::stable::new_empty(student, {shape, 2}, ScalarType::Float)
                           : torch::stable::new_empty(student, {none, 1}, ScalarType::Float);
  float* out = static_cast<float*>(value.mutable_data_ptr());
  float* kept = need ? static_cast<float*>(statistics.mutable_data_ptr()) : nullptr;
  const LossRows run = loss_rows();
  torch::stable::parallel_for(0, c.R, grain(c.C), [&](int64_t begin, int64_t end) {
    Scratch scratch(c.padded);
    run(c, begin, end, scratch, out, kept);
  });
  return {value, statistics};
}

// above: what comes from above, a number a row, `step` apart
std::tuple<Tensor, Tensor> gradients(const float* above, int64_t step, double factor, const Call& c,
                                     const Tensor& student, const Tensor& teacher, const Tensor& statistics,
                                     bool need_student, bool need_teacher) {
  const int64_t count = c.of.clean ? 10 : c.labels ? 6 : 5;
  KDK_CHECK(statistics.is_cpu() && statistics.is_contiguous() && statistics.scalar_type() == ScalarType::Float &&
                statistics.numel() == count * c.R,
            "logits_rows_backward: statistics must be what logits_rows gave, float32 [", count, ", ", c.R, "]");
  const int64_t shape[2] = {c.R, c.C}, none[1] = {0};
  Tensor ds = torch::stable::new_empty(student, {need_student ? shape : none, need_student ? 2u : 1u});
  // beside a student's gradient an empty tensor, whose dtype is the student's as in the other backends
  Tensor dt = torch::stable::new_empty(need_teacher ? teacher : student,
                                       {need_teacher ? shape : none, need_teacher ? 2u : 1u});
  const Backward b{above, step, static_cast<float>(factor),
                   static_cast<const float*>(statistics.const_data_ptr()),
                   need_student ? ds.mutable_data_ptr() : nullptr, need_teacher ? dt.mutable_data_ptr() : nullptr};
  const GradientRows run = gradient_rows();
  torch::stable::parallel_for(0, c.R, grain(c.C), [&](int64_t begin, int64_t end) {
    Scratch scratch(c.padded);
    run(c, begin, end, scratch, b);
  });
  return {ds, dt};
}

std::tuple<Tensor, Tensor> logits_rows_backward(Tensor grad, double factor, Tensor student, Tensor teacher,
                                                OptionalTensor labels, OptionalTensor permuted, OptionalTensor lam,
                                                OptionalTensor clean, OptionalTensor order, Tensor statistics,
                                                double tau, double alpha, double k1, double k2, double k3,
                                                double number, bool need_student, bool need_teacher) {
  const Call c = call_of(student, teacher, labels, permuted, lam, clean, order, tau, alpha, k1, k2, k3, number);
  KDK_CHECK(grad.is_cpu() && grad.dim() == 1 && grad.size(0) == c.R && grad.scalar_type() == ScalarType::Float,
            "logits_rows_backward: grad must be float32 [", c.R, "]");
  return gradients(static_cast<const float*>(grad.const_data_ptr()), grad.stride(0), factor, c, student, teacher,
                   statistics, need_student, need_teacher);
}

// 1 where there is none
float weight_of(const OptionalTensor& weight) {
  if (!weight) return 1;
  KDK_CHECK(weight->is_cpu() && weight->numel() == 1 && weight->scalar_type() == ScalarType::Float,
            "kl_rows: weight must be one float32 number");
  return *static_cast<const float*>(weight->const_data_ptr());
}

// the plain divergence alone, reduced and weighted: few rows of few classes take less time than the arguments of
// `logits_rows`. `mean`: of the rows, else their sum
std::tuple<Tensor, Tensor> kl_rows(Tensor student, Tensor teacher, OptionalTensor weight, double tau, bool mean) {
  auto [rows, statistics] = logits_rows(student, teacher, {}, {}, {}, {}, {}, tau, 1, 1, 0, 0, 1, true);
  const int64_t R = student.size(0);
  const float* of = static_cast<const float*>(rows.const_data_ptr());
  double total = 0;
  for (int64_t r = 0; r < R; ++r) total += of[r];
  const torch::headeronly::IntHeaderOnlyArrayRef scalar(&R, size_t{0});
  Tensor value = torch::stable::new_empty(rows, scalar);
  const float reduced = static_cast<float>(mean ? total / static_cast<double>(R) : total);
  *static_cast<float*>(value.mutable_data_ptr()) = reduced * weight_of(weight);
  return {value, statistics};
}

// its gradient; `grad` is one number
Tensor kl_rows_backward(Tensor grad, Tensor student, Tensor teacher, OptionalTensor weight, Tensor statistics,
                        double tau, bool mean) {
  KDK_CHECK(grad.is_cpu() && grad.numel() == 1 && grad.scalar_type() == ScalarType::Float,
            "kl_rows_backward: grad must be one float32 number");
  const Call c = call_of(student, teacher, {}, {}, {}, {}, {}, tau, 1, 1, 0, 0, 1);
  const float above = *static_cast<const float*>(grad.const_data_ptr()) * weight_of(weight);
  return std::get<0>(gradients(&above, 0, mean ? 1.0 / static_cast<double>(c.R) : 1.0, c, student, teacher, statistics,
                               true, false));
}

}  // namespace
}  // namespace kdkernels

#define KDK_LOGITS                                                                                            \
  "Tensor student, Tensor teacher, Tensor? labels, Tensor? permuted, Tensor? lam, Tensor? clean, Tensor? order, "
#define KDK_NUMBERS "float tau, float alpha, float k1, float k2, float k3, float number, "

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("logits_rows(" KDK_LOGITS KDK_NUMBERS "bool need) -> (Tensor value, Tensor statistics)");
  m.def("logits_rows_backward(Tensor grad, float factor, " KDK_LOGITS "Tensor statistics, " KDK_NUMBERS
        "bool need_student, bool need_teacher) -> (Tensor, Tensor)");
  m.def("kl_rows(Tensor student, Tensor teacher, Tensor? weight, float tau, bool mean) "
        "-> (Tensor value, Tensor statistics)");
  m.def("kl_rows_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? weight, Tensor statistics, float tau, "
        "bool mean) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("logits_rows", TORCH_BOX(&kdkernels::logits_rows));
  m.impl("logits_rows_backward", TORCH_BOX(&kdkernels::logits_rows_backward));
  m.impl("kl_rows", TORCH_BOX(&kdkernels::kl_rows));
  m.impl("kl_rows_backward", TORCH_BOX(&kdkernels::kl_rows_backward));
}
