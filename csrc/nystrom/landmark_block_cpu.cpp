// SPDX-License-Identifier: Apache-2.0
// A block of both similarity matrices: two products of the BLAS, then V = clamp(S - T, -1, 1) over S with the sums of
// the loss and of T^2, in one pass while the block is in cache. PyTorch makes seven.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/wide.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 4096;  // elements whose sums are one slot
constexpr int64_t kPiece = 512;   // elements that are summed in float32 before they join a float64 sum

struct Sums {
  double loss, square;
};

// comparisons keep NaN
template <int W>
KDK_INLINE typename Wide<W>::F clamped(const typename Wide<W>::F& d) {
  using F = typename Wide<W>::F;
  const F one = splat<W>(1.0f);
  const F low = d < -one ? -one : d;
  return low > one ? one : low;
}

template <int W>
KDK_INLINE Sums smooth_block(float* s, const float* t, int64_t n) {
  using F = typename Wide<W>::F;
  Sums total{0, 0};
  int64_t j = 0;
  while (j + W <= n) {
    const int64_t end = std::min(n, j + kPiece);
    F loss{}, square{};
    for (; j + W <= end; j += W) {
      const F y = load<W>(t + j), d = load<W>(s + j) - y, v = clamped<W>(d);
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

// [B, C], or [C, B] where that is the faster product: a BLAS splits the many columns of the few rows better
Tensor similarity(const Tensor& rows, const Tensor& centers, bool turned) {
  const Tensor &left = turned ? centers : rows, &right = turned ? rows : centers;
  return torch::stable::contiguous(torch::stable::matmul(left, torch::stable::transpose(right, 0, 1)));
}

void check_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  const bool fits = x.dim() == 2 && x.size(0) == rows && x.size(1) == columns;
  KDK_CHECK(fits && x.is_cpu() && x.scalar_type() == ScalarType::Float, "landmark_block: ", name,
            " must be float32 on the CPU, [", rows, ", ", columns, "]");
}

// (V, loss / |T|, 1 / |T|) of one block of rows, both 0 where T is 0. sums [2] float64, where given, holds the loss and
// |T|^2 of the blocks before and gains those of this one; the two numbers are then those of all blocks so far
std::tuple<Tensor, Tensor, Tensor> landmark_block(Tensor s, Tensor t, Tensor s_centers, Tensor t_centers,
                                                  std::optional<Tensor> sums) {
  KDK_CHECK(s.dim() == 2 && t.dim() == 2 && s_centers.dim() == 2, "landmark_block: s, t and centers must be matrices");
  check_matrix(s, s.size(0), s.size(1), "s");
  check_matrix(t, s.size(0), t.size(1), "t");
  check_matrix(s_centers, s_centers.size(0), s.size(1), "s_centers");
  check_matrix(t_centers, s_centers.size(0), t.size(1), "t_centers");
  KDK_CHECK(!sums || (sums->is_cpu() && sums->is_contiguous() && sums->scalar_type() == ScalarType::Double &&
                      sums->numel() == 2), "landmark_block: sums must be float64 [2]");
  const bool turned = 2 * s_centers.size(0) <= s.size(0);
  const Tensor T = similarity(t, t_centers, turned), S = similarity(s, s_centers, turned);
  static const Smooth smooth = smooth_of_this_machine();
  const int64_t n = S.numel(), blocks = (n + kBlock - 1) / kBlock;
  float* v = static_cast<float*>(S.mutable_data_ptr());
  const float* y = static_cast<const float*>(T.const_data_ptr());
  std::vector<Sums> slots(blocks);
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      slots[b] = smooth(v + b * kBlock, y + b * kBlock, std::min(kBlock, n - b * kBlock));
    }
  });
  double own[2] = {0, 0}, *total = sums ? static_cast<double*>(sums->mutable_data_ptr()) : own;
  for (const Sums& slot : slots) total[0] += slot.loss, total[1] += slot.square;
  const double inverse = total[1] == 0 ? 0 : 1 / std::sqrt(total[1]);
  const torch::headeronly::IntHeaderOnlyArrayRef scalar(&n, size_t{0});
  Tensor value = torch::stable::new_empty(s, scalar), norm = torch::stable::new_empty(s, scalar);
  *static_cast<float*>(value.mutable_data_ptr()) = static_cast<float>(total[0] * inverse);
  *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(inverse);
  return {turned ? torch::stable::transpose(S, 0, 1) : S, value, norm};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "landmark_block(Tensor s, Tensor t, Tensor s_centers, Tensor t_centers, Tensor(a!)? sums) -> "
      "(Tensor V, Tensor value, Tensor inverse_norm)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("landmark_block", TORCH_BOX(&kdkernels::landmark_block)); }
