// SPDX-License-Identifier: Apache-2.0
// Rows of logits on the CPU as k chosen classes and one for all others: each logit is read once for the values, and
// once for the gradient. Formulas and edges: kdkernels/logits/MATH.md, section 10.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "matrix.h"
#include "rows.h"

namespace kdkernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Call {
  Matrix student;
  const int64_t* index;  // [R, k]
  int64_t R, C, k;
  float inverse_tau;
};

struct Scratch {
  float block[kBlock + kPad];
  std::vector<int64_t> chosen;  // of a row, in order
};

// (z - whole) / tau of the chosen and the log of the others' sum, relative to the same; maximum and log of the others
struct Forward {
  float *out, *statistics;  // [R, k + 1], [2, R] or null
};

struct Backward {
  const float *grad, *statistics;
  void* gradient;
};

KDK_INLINE void in_order(const Call& c, int64_t r, Scratch& s) {
  s.chosen.assign(c.index + r * c.k, c.index + (r + 1) * c.k);
  std::sort(s.chosen.begin(), s.chosen.end());
}

KDK_INLINE float logit(const Matrix& m, int64_t r, int64_t j) {
  float z;
  fetch(m, r, j, 1, &z);
  return z;
}

template <int W>
KDK_INLINE void row_of(const Call& c, int64_t r, Scratch& s, const Forward& to) {
  in_order(c, r, s);
  float top = -kInfinity;
  double sum = 0;
  auto next = s.chosen.begin();
  for (int64_t j = 0; j < c.C; j += kBlock) {
    const int64_t count = std::min(kBlock, c.C - j), padded = (count + kPad - 1) / kPad * kPad;
    fetch(c.student, r, j, count, s.block);
    std::fill(s.block + count, s.block + padded, -kInfinity);
    for (; next != s.chosen.end() && *next < j + count; ++next) s.block[*next - j] = -kInfinity;
    const float now = std::max(top, maximum<W>(s.block, padded));
    if (now != top && sum != 0) sum *= std::exp(static_cast<double>(top - now) * c.inverse_tau);
    top = now;
    sum += block_sum<W>(s.block, std::max(top, std::numeric_limits<float>::lowest()), padded, c.inverse_tau);
  }
  float whole = top;
  for (const int64_t j : s.chosen) whole = std::max(whole, logit(c.student, r, j));
  float* out = to.out + r * (c.k + 1);
  for (int64_t i = 0; i < c.k; ++i) out[i] = (logit(c.student, r, c.index[r * c.k + i]) - whole) * c.inverse_tau;
  // of nothing the log is -inf, and what it has of the gradient nothing, too
  const bool none = top == -kInfinity && sum == 0;
  const float log = static_cast<float>(std::log(sum));
  out[c.k] = none ? log - 0 * whole : (top - whole) * c.inverse_tau + log;
  if (!to.statistics) return;
  to.statistics[r] = none ? 0 : top;
  to.statistics[c.R + r] = none ? kInfinity : log;
}

template <int W>
KDK_INLINE void row_of(const Call& c, int64_t r, Scratch& s, const Backward& b) {
  in_order(c, r, s);
  const float *grad = b.grad + r * (c.k + 1), top = b.statistics[r], log = b.statistics[c.R + r];
  const float rest = grad[c.k] * c.inverse_tau;
  for (int64_t j0 = 0; j0 < c.C; j0 += kBlock) {
    const int64_t count = std::min(kBlock, c.C - j0);
    if (rest == 0) {
      std::fill(s.block, s.block + count, 0.f);
    } else {
      fetch(c.student, r, j0, count, s.block);
      for (int64_t j = 0; j < count; j += W) {
        store<W>(s.block + j, rest * exp_of<W>((load<W>(s.block + j) - top) * c.inverse_tau - log));
      }
    }
    deliver(s.block, b.gradient, c.student.dtype, r * c.C + j0, count);
  }
  for (int64_t i = 0; i < c.k; ++i) {
    const float own = grad[i] * c.inverse_tau;
    deliver(&own, b.gradient, c.student.dtype, r * c.C + c.index[r * c.k + i], 1);
  }
}

template <int W, class How>
KDK_INLINE void each_row(const Call& c, int64_t begin, int64_t end, Scratch& s, const How& how) {
  for (int64_t r = begin; r < end; ++r) row_of<W>(c, r, s, how);
}

// plain functions, because the target attribute does not reach through a template
#define KDK_ROWS(NAME, TARGET, W)                                                                      \
  TARGET void value_##NAME(const Call& c, int64_t begin, int64_t end, Scratch& s, const Forward& to) { \
    each_row<W>(c, begin, end, s, to);                                                                 \
  }                                                                                                    \
  TARGET void slope_##NAME(const Call& c, int64_t begin, int64_t end, Scratch& s, const Backward& b) { \
    each_row<W>(c, begin, end, s, b);                                                                  \
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
void run(const Call& c, const How& how, Rows<How> baseline, [[maybe_unused]] Rows<How> avx2,
         [[maybe_unused]] Rows<How> avx512) {
  Rows<How> rows = baseline;
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) rows = avx512;
  if (isa == Isa::kAvx2) rows = avx2;
#endif
  torch::stable::parallel_for(0, c.R, grain(c.C), [&](int64_t begin, int64_t end) {
    Scratch scratch{};
    rows(c, begin, end, scratch, how);
  });
}

Call call_of(const Tensor& student, const Tensor& index, double tau) {
  const int64_t R = rows_of(student), C = student.size(student.dim() - 1), k = index.size(index.dim() - 1);
  const bool dense = index.is_cpu() && index.is_contiguous() && index.numel() == R * k;
  KDK_CHECK(dense && index.scalar_type() == ScalarType::Long, "bucket_rows: index must be contiguous int64 [", R,
            ", k]");
  const auto* at = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < R * k; ++i) {
    KDK_CHECK(at[i] >= 0 && at[i] < C, "bucket_rows: index holds ", at[i], ": classes are 0 to ", C - 1);
  }
  return {matrix(student, "bucket_rows: student", R, C), at, R, C, k, static_cast<float>(1 / tau)};
}

std::tuple<Tensor, Tensor> bucket_rows(Tensor student, Tensor index, double tau, bool need) {
  const Call c = call_of(student, index, tau);
  const int64_t shape[2] = {c.R, c.k + 1}, kept[2] = {2, c.R}, none[1] = {0};
  Tensor out = torch::stable::new_empty(student, {shape, 2}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(student, {need ? kept : none, need ? 2u : 1u}, ScalarType::Float);
  const Forward to{static_cast<float*>(out.mutable_data_ptr()),
                   need ? static_cast<float*>(statistics.mutable_data_ptr()) : nullptr};
#if KDK_X86
  run<Forward>(c, to, value_baseline, value_avx2, value_avx512);
#else
  run<Forward>(c, to, value_baseline, nullptr, nullptr);
#endif
  return {out, statistics};
}

Tensor bucket_rows_backward(Tensor grad, Tensor student, Tensor index, Tensor statistics, double tau) {
  const Call c = call_of(student, index, tau);
  for (const auto* t : {&grad, &statistics}) {
    KDK_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Float,
              "bucket_rows_backward: grad and statistics must be contiguous float32");
  }
  KDK_CHECK(grad.numel() == c.R * (c.k + 1) && statistics.numel() == 2 * c.R,
            "bucket_rows_backward: grad must be [", c.R, ", ", c.k + 1, "], statistics [2, ", c.R, "]");
  const int64_t shape[2] = {c.R, c.C};
  Tensor found = torch::stable::new_empty(student, {shape, 2});
  const Backward back{static_cast<const float*>(grad.const_data_ptr()),
                      static_cast<const float*>(statistics.const_data_ptr()), found.mutable_data_ptr()};
#if KDK_X86
  run<Backward>(c, back, slope_baseline, slope_avx2, slope_avx512);
#else
  run<Backward>(c, back, slope_baseline, nullptr, nullptr);
#endif
  return found;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("bucket_rows(Tensor student, Tensor index, float tau, bool need) -> (Tensor values, Tensor statistics)");
  m.def("bucket_rows_backward(Tensor grad, Tensor student, Tensor index, Tensor statistics, float tau) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("bucket_rows", TORCH_BOX(&kdkernels::bucket_rows));
  m.impl("bucket_rows_backward", TORCH_BOX(&kdkernels::bucket_rows_backward));
}
