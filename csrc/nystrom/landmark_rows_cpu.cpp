// SPDX-License-Identifier: Apache-2.0
// The landmark similarity loss: every thread takes rows of its own through two products of the BLAS, and one pass over
// S and T in its cache, which makes V = clamp(S - T, -1, 1) and the sums of the loss and of T^2. PyTorch makes seven
// passes, and its threads meet after each product.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/blas.h"
#include "../common/check.h"
#include "../common/wide.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPiece = 512;      // elements that are summed in float32 before they join a float64 sum
constexpr int64_t kTile = 16;        // tasks begin at a multiple of so many rows
constexpr int64_t kWorth = 1 << 21;  // multiplications that are worth a thread
constexpr int64_t kGrain = 1 << 15;  // elements that are

struct Sums {
  double loss, square;
};

template <int W>
KDK_INLINE Sums smooth_block(float* s, const float* t, int64_t n) {
  using F = typename Wide<W>::F;
  Sums total{0, 0};
  int64_t j = 0;
  while (j + W <= n) {
    const int64_t end = std::min(n, j + kPiece);
    F loss{}, square{};
    for (; j + W <= end; j += W) {
      const F y = load<W>(t + j), d = load<W>(s + j) - y, v = clamped(d);
      loss += v * (d - 0.5f * v);  // smooth L1
      square += y * y;
      store<W>(s + j, v);
    }
    total.loss += sum_of<W>(loss);
    total.square += sum_of<W>(square);
  }
  for (; j < n; ++j) {
    const float d = s[j] - t[j], v = d < -1 ? -1 : d > 1 ? 1 : d;
    total.loss += static_cast<double>(v) * (d - 0.5f * v);
    total.square += static_cast<double>(t[j]) * t[j];
    s[j] = v;
  }
  return total;
}

// plain functions, because the target attribute does not reach through a template
Sums smooth_baseline(float* s, const float* t, int64_t n) { return smooth_block<4>(s, t, n); }
#if KDK_X86
KDK_AVX2 Sums smooth_avx2(float* s, const float* t, int64_t n) { return smooth_block<8>(s, t, n); }
KDK_AVX512 Sums smooth_avx512(float* s, const float* t, int64_t n) { return smooth_block<16>(s, t, n); }
#endif

using Smooth = Sums (*)(float*, const float*, int64_t);

Smooth smooth_of_this_machine() {
#if KDK_X86
  const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return smooth_avx512;
  if (isa == Isa::kAvx2) return smooth_avx2;
#endif
  return smooth_baseline;
}

void check_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  const bool fits = x.dim() == 2 && x.size(0) == rows && x.size(1) == columns;
  KDK_CHECK(fits && x.is_cpu() && x.scalar_type() == ScalarType::Float, "landmark_rows: ", name,
            " must be float32 on the CPU, [", rows, ", ", columns, "]");
}

Matrix matrix_of(const Tensor& x) {
  return {static_cast<float*>(const_cast<void*>(x.const_data_ptr())), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

float* data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

Tensor empty(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns};
  return torch::stable::new_empty(like, {sizes, 2}, ScalarType::Float);
}

Tensor nothing(const Tensor& like) {
  const int64_t none = 0;
  return torch::stable::new_empty(like, {&none, 1}, ScalarType::Float);
}

Tensor number(const Tensor& like, double value) {
  const int64_t none = 0;
  const Tensor x = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(&none, size_t{0}));
  *data(x) = static_cast<float>(value);
  return x;
}

// V of `rows` rows, by columns where landmarks are few: a product of [256, 512] with 100 landmarks takes 173 us so and
// 209 by rows on one thread, 114 and 130 on two; one of [1024, 2048] with 1000 takes as long either way
Matrix similarities(float* at, int64_t rows, int64_t C, bool turned) {
  return turned ? Matrix{at, rows, C, 1, rows} : dense(at, rows, C);
}

bool turns(int64_t B, int64_t C) { return 2 * C <= B; }

// f(task, first, rows) of tasks of at most `most` rows, on all threads where the work is worth it. Tasks depend on the
// number of threads, and so do the last bits of what is added over them
template <class F>
void over_rows(int64_t B, int64_t most, double work, const F& f) {
  const int64_t threads = work < kWorth ? 1 : torch::stable::get_num_threads();
  const int64_t each = std::max<int64_t>(1, (B + threads - 1) / threads);
  const int64_t size = std::max<int64_t>(1, std::min(most, (each + kTile - 1) / kTile * kTile));
  torch::stable::parallel_for(0, (B + size - 1) / size, threads > 1 ? 1 : B + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task, task * size, std::min(size, B - task * size));
  });
}

// (value, what `landmark_rows_backward` needs, 1 / |T|), value and norm 0 where T is 0. Kept, where needed: V, or V S_c
// [B, d] where features are fewer than landmarks, min(C, d) numbers a row. block: rows of V at a time.
// sums [2] float64, where given, gains the loss and |T|^2
std::tuple<Tensor, Tensor, Tensor> landmark_rows(Tensor s, Tensor t, Tensor s_centers, Tensor t_centers, int64_t block,
                                                 bool need, std::optional<Tensor> sums) {
  KDK_CHECK(s.dim() == 2 && t.dim() == 2 && s_centers.dim() == 2, "landmark_rows: s, t and centers must be matrices");
  const int64_t B = s.size(0), C = s_centers.size(0), d = s.size(1), e = t.size(1);
  check_matrix(s, B, d, "s");
  check_matrix(t, B, e, "t");
  check_matrix(s_centers, C, d, "s_centers");
  check_matrix(t_centers, C, e, "t_centers");
  KDK_CHECK(block > 0, "landmark_rows: block must be a positive number of rows");
  KDK_CHECK(!sums || (sums->is_cpu() && sums->is_contiguous() && sums->scalar_type() == ScalarType::Double &&
                      sums->numel() == 2), "landmark_rows: sums must be float64 [2]");
  const bool stays = need && C <= d, turned = turns(B, C);
  const Tensor kept = need ? empty(s, B, std::min(C, d)) : nothing(s);
  const Matrix S_c = matrix_of(s_centers), T_c = matrix_of(t_centers), x = matrix_of(s), y = matrix_of(t);
  static const Smooth smooth = smooth_of_this_machine();
  std::vector<Sums> slots(B, Sums{0, 0});
  over_rows(B, block, static_cast<double>(B) * C * (d + e), [&](int64_t task, int64_t first, int64_t rows) {
    const std::unique_ptr<float[]> scratch(new float[(stays ? 1 : 2) * rows * C]);
    const Matrix T = similarities(scratch.get(), rows, C, turned);
    const Matrix V = stays ? similarities(data(kept), B, C, turned).block(first, rows, 0, C)
                           : similarities(scratch.get() + rows * C, rows, C, turned);
    multiply(T, 0, 1, y.block(first, rows, 0, e), T_c.turned());
    multiply(V, 0, 1, x.block(first, rows, 0, d), S_c.turned());
    const int64_t lines = turned ? C : rows, length = turned ? rows : C, apart = turned ? V.across : V.step;
    Sums total{0, 0};
    for (int64_t line = 0; line < lines; ++line) {
      const Sums one = smooth(V.data + line * apart, T.data + line * length, length);
      total.loss += one.loss, total.square += one.square;
    }
    slots[task] = total;
    if (need && !stays) multiply(dense(data(kept), B, d).block(first, rows, 0, d), 0, 1, V, S_c);
  });
  double own[2] = {0, 0}, *total = sums ? static_cast<double*>(sums->mutable_data_ptr()) : own;
  for (const Sums& slot : slots) total[0] += slot.loss, total[1] += slot.square;
  const double inverse = total[1] == 0 ? 0 : 1 / std::sqrt(total[1]);
  return {number(s, total[0] * inverse), kept, number(s, inverse)};
}

void scaled(const float* x, int64_t n, float factor, float* out) {
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) out[j] = x[j] * factor;
  });
}

// ds [B, d] float32; grad is one number
Tensor landmark_rows_backward(Tensor grad, Tensor s_centers, Tensor kept, Tensor inverse) {
  for (const Tensor* x : {&grad, &inverse}) {
    KDK_CHECK(x->is_cpu() && x->numel() == 1 && x->scalar_type() == ScalarType::Float,
              "landmark_rows_backward: grad and inverse must be one float32 number each");
  }
  KDK_CHECK(s_centers.dim() == 2 && kept.dim() == 2, "landmark_rows_backward: kept and s_centers must be matrices");
  const int64_t B = kept.size(0), C = s_centers.size(0), d = s_centers.size(1);
  check_matrix(s_centers, C, d, "s_centers");
  check_matrix(kept, B, std::min(C, d), "kept");
  KDK_CHECK(kept.is_contiguous(), "landmark_rows_backward: kept must be what landmark_rows gave");
  const float scale = *static_cast<const float*>(grad.const_data_ptr()) *
                      *static_cast<const float*>(inverse.const_data_ptr());
  const Tensor ds = empty(kept, B, d);
  const float* from = static_cast<const float*>(kept.const_data_ptr());
  float* out = data(ds);
  if (C > d) {
    scaled(from, B * d, scale, out);
    return ds;
  }
  const Matrix V = similarities(const_cast<float*>(from), B, C, turns(B, C)), S_c = matrix_of(s_centers);
  // a BLAS writes 0 for a factor of 0, NaN or not
  const double factor = scale == 0 ? 1 : scale;
  over_rows(B, B, static_cast<double>(B) * C * d, [&](int64_t, int64_t first, int64_t rows) {
    multiply(dense(out, B, d).block(first, rows, 0, d), 0, factor, V.block(first, rows, 0, C), S_c);
  });
  if (scale == 0) scaled(out, B * d, scale, out);
  return ds;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "landmark_rows(Tensor s, Tensor t, Tensor s_centers, Tensor t_centers, int block, bool need, Tensor(a!)? sums) "
      "-> (Tensor value, Tensor kept, Tensor inverse_norm)");
  m.def("landmark_rows_backward(Tensor grad, Tensor s_centers, Tensor kept, Tensor inverse_norm) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("landmark_rows", TORCH_BOX(&kdkernels::landmark_rows));
  m.impl("landmark_rows_backward", TORCH_BOX(&kdkernels::landmark_rows_backward));
}
