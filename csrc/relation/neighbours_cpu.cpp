// SPDX-License-Identifier: Apache-2.0
// CC between neighbours: a_i = |x_i - y_i|, the mean over i of a_i . a_(i+1), and its gradient to x for an upstream of
// 1, in one pass over both sides. PyTorch makes thirteen over memory. Nothing is written but the gradient.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/wide.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTask = 1 << 14;  // numbers that are worth a thread
constexpr int64_t kPiece = 512;     // numbers that are summed in float32 before they join a float64 sum

// row i of both sides, its neighbours where it has them, and the factor of the mean
struct Rows {
  const float *x[3], *y[3];
  bool has[3];
  float factor;
};

template <int W>
KDK_INLINE typename Wide<W>::F apart(const Rows& of, int side, int64_t j) {
  using F = typename Wide<W>::F;
  if (!of.has[side]) return F{};
  const F d = load<W>(of.x[side] + j) - load<W>(of.y[side] + j);
  return d < 0.0f ? -d : d;
}

// sum_j a_i a_(i+1), and the slope (a_(i-1) + a_(i+1)) sign(x_i - y_i) / (n - 1) into `out` if there is one
template <int W>
KDK_INLINE double neighbour_row(const Rows& of, int64_t p, float* out) {
  using F = typename Wide<W>::F;
  double total = 0;
  int64_t j = 0;
  while (j + W <= p) {
    const int64_t end = std::min(p, j + kPiece);
    F sum{};
    for (; j + W <= end; j += W) {
      const F d = load<W>(of.x[1] + j) - load<W>(of.y[1] + j), next = apart<W>(of, 2, j);
      if (of.has[2]) sum += (d < 0.0f ? -d : d) * next;  // no inf * 0
      if (out) {
        const F both = (apart<W>(of, 0, j) + next) * of.factor;
        store<W>(out + j, d > 0.0f ? both : d < 0.0f ? -both : d * both);  // 0 of 0, NaN of NaN
      }
    }
    total += sum_of<W>(sum);
  }
  for (; j < p; ++j) {
    const auto at = [&](int side) {
      const float d = of.has[side] ? of.x[side][j] - of.y[side][j] : 0;
      return d < 0 ? -d : d;
    };
    const float d = of.x[1][j] - of.y[1][j];
    if (of.has[2]) total += static_cast<double>(d < 0 ? -d : d) * at(2);
    if (out) {
      const float both = (at(0) + at(2)) * of.factor;
      out[j] = d > 0 ? both : d < 0 ? -both : d * both;
    }
  }
  return total;
}

// plain functions, because the target attribute does not reach through a template
double row_baseline(const Rows& of, int64_t p, float* out) { return neighbour_row<4>(of, p, out); }
#if KDK_X86
KDK_AVX2 double row_avx2(const Rows& of, int64_t p, float* out) { return neighbour_row<8>(of, p, out); }
KDK_AVX512 double row_avx512(const Rows& of, int64_t p, float* out) { return neighbour_row<16>(of, p, out); }
#endif

using Row = double (*)(const Rows&, int64_t, float*);

Row row_of_this_machine() {
#if KDK_X86
  const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return row_avx512;
  if (isa == Isa::kAvx2) return row_avx2;
#endif
  return row_baseline;
}

void check_rows(const Tensor& t, const char* name) {
  KDK_CHECK(t.is_cpu() && t.dim() == 3 && t.scalar_type() == ScalarType::Float && (t.size(2) <= 1 || t.stride(2) == 1),
            "neighbour_rows: ", name, " must be float32 rows [G, n, p] on the CPU, dense along p");
}

// the mean [G], and with `need` its gradient to x for an upstream of 1 [G, n, p] ([0] without)
std::tuple<Tensor, Tensor> neighbour_rows(Tensor x, Tensor y, bool need) {
  check_rows(x, "x");
  check_rows(y, "y");
  const int64_t G = x.size(0), n = x.size(1), p = x.size(2);
  KDK_CHECK(y.size(0) == G && y.size(1) == n && y.size(2) == p, "neighbour_rows: y is [", y.size(0), ", ", y.size(1),
            ", ", y.size(2), "] and x is [", G, ", ", n, ", ", p, "]: pass rows of one shape");
  KDK_CHECK(n > 1, "neighbour_rows: x has ", n, " rows: a neighbour needs 2");
  const int64_t groups[1] = {G}, shape[3] = {G, n, p}, none[1] = {0};
  Tensor value = torch::stable::new_empty(x, {groups, 1});
  Tensor slope = need ? torch::stable::new_empty(x, {shape, 3}) : torch::stable::new_empty(x, {none, 1});
  float* out = need ? static_cast<float*>(slope.mutable_data_ptr()) : nullptr;
  const auto* of_x = static_cast<const float*>(x.const_data_ptr());
  const auto* of_y = static_cast<const float*>(y.const_data_ptr());
  static const Row row = row_of_this_machine();
  std::vector<double> rows(G * n);
  torch::stable::parallel_for(0, G * n, std::max<int64_t>(1, kTask / std::max<int64_t>(1, p)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t g = r / n, i = r % n;
      Rows of{{}, {}, {}, 1.0f / static_cast<float>(n - 1)};
      for (int side = 0; side < 3; ++side) {
        const int64_t k = i + side - 1;
        const bool there = k >= 0 && k < n;
        of.x[side] = of_x + g * x.stride(0) + (there ? k : i) * x.stride(1);
        of.y[side] = of_y + g * y.stride(0) + (there ? k : i) * y.stride(1);
        of.has[side] = there;
      }
      rows[r] = row(of, p, out ? out + r * p : nullptr);
    }
  });
  for (int64_t g = 0; g < G; ++g) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += rows[g * n + i];
    static_cast<float*>(value.mutable_data_ptr())[g] = static_cast<float>(total / static_cast<double>(n - 1));
  }
  return {value, slope};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("neighbour_rows(Tensor x, Tensor y, bool need) -> (Tensor value, Tensor slope)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("neighbour_rows", TORCH_BOX(&kdkernels::neighbour_rows)); }
