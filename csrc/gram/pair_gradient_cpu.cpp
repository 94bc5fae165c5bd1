// SPDX-License-Identifier: Apache-2.0
// The gradient that goes with pair_statistic: dx = V z, a strip of columns of the features at a time. Each is read
// once, centred in cache as in the forward pass, and its gradient written once. The roof is the product, n^2 p
// multiply-adds.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/check.h"
#include "../common/product.h"
#include "strip.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumns = 64;          // a strip is a multiple of it
constexpr int64_t kStripFloats = 1 << 16;
constexpr int64_t kSerial = 1 << 22;      // multiply-adds below which a second thread costs more than it does

struct Gradient {
  Features f;
  const float* v;  // [n, n]
  float scale, factor;
  float* dx;       // [n, p]
};

template <int W>
KDK_INLINE void multiply_strip(const Gradient& g, int64_t j0, int64_t width, float* mean, float* z, int64_t ld,
                               float* ragged) {
  const int64_t n = g.f.n, p = g.f.p, whole = round_up(width, W);
  mean_columns<W>(g.f, j0, width, mean);
  pack_rows<W>(g.f, j0, width, mean, g.scale, g.factor, z, ld);
  if (whole == width) {
    product<W>(g.v, n, 1, n, z, ld, width, n, g.dx + j0, p);
  } else {
    product<W>(g.v, n, 1, n, z, ld, whole, n, ragged, ld);
    for (int64_t i = 0; i < n; ++i) std::copy_n(ragged + i * ld, width, g.dx + i * p + j0);
  }
  for (int64_t i = 0; g.f.keep && i < n; ++i) {
    if (!g.f.keep[i]) std::fill_n(g.dx + i * p + j0, width, 0.0f);  // even where the value is NaN
  }
}

template <int W>
KDK_INLINE void multiply_strips(const Gradient& g, int64_t strip, int64_t begin, int64_t end) {
  const int64_t ld = strip + kCacheLine;  // no power of two: rows would share the sets of the cache
  const Scratch mean(strip), z(g.f.n * ld), ragged(end * strip > g.f.p ? g.f.n * ld : 1);
  for (int64_t s = begin; s < end; ++s) {
    const int64_t j0 = s * strip;
    multiply_strip<W>(g, j0, std::min(strip, g.f.p - j0), mean.get(), z.get(), ld, ragged.get());
  }
}

// plain functions, because the target attribute does not reach through a template
void strips_baseline(const Gradient& g, int64_t strip, int64_t b, int64_t e) { multiply_strips<4>(g, strip, b, e); }
#if KDK_X86
KDK_AVX2 void strips_avx2(const Gradient& g, int64_t strip, int64_t b, int64_t e) {
  multiply_strips<8>(g, strip, b, e);
}
KDK_AVX512 void strips_avx512(const Gradient& g, int64_t strip, int64_t b, int64_t e) {
  multiply_strips<16>(g, strip, b, e);
}
#endif

decltype(&strips_baseline) strips_of_this_machine() {
#if KDK_X86
  const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return strips_avx512;
  if (isa == Isa::kAvx2) return strips_avx2;
#endif
  return strips_baseline;
}

// grad [G]; V [G, n, n] and scales [G, 2] of this side from pair_statistic
Tensor pair_gradient(Tensor grad, Tensor x, std::optional<Tensor> mask, Tensor scales, Tensor V, bool centre) {
  KDK_CHECK(x.is_cpu() && x.dim() == 3 && x.scalar_type() == ScalarType::Float && (x.size(2) <= 1 || x.stride(2) == 1),
            "pair_gradient: x must be float32 features [G, n, p] on the CPU with dense rows");
  const int64_t G = x.size(0), n = x.size(1), p = x.size(2);
  KDK_CHECK(V.is_contiguous() && V.dim() == 3 && V.size(0) == G && V.size(1) == n && V.size(2) == n &&
                V.scalar_type() == ScalarType::Float && scales.dim() == 2 && scales.size(0) == G &&
                scales.size(1) >= 2 && scales.stride(1) == 1 && scales.scalar_type() == ScalarType::Float,
            "pair_gradient: V and scales must be what pair_statistic kept of this side");
  KDK_CHECK(grad.is_cpu() && grad.dim() == 1 && grad.size(0) == G && grad.scalar_type() == ScalarType::Float,
            "pair_gradient: grad must be float32 [", G, "]");
  KDK_CHECK(!mask || (mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool && mask->numel() == G * n),
            "pair_gradient: mask must be a contiguous bool tensor [", G, ", ", n, "]");
  const int64_t shape[3] = {G, n, p};
  Tensor dx = torch::stable::new_empty(x, {shape, 3});
  static const auto multiply = strips_of_this_machine();
  const int64_t fitting = std::clamp<int64_t>(kStripFloats / n / kColumns * kColumns, kColumns, 8 * kColumns);
  const int64_t strip = std::clamp<int64_t>(round_up((p + 3) / 4, kColumns), kColumns, fitting);
  const int64_t strips = (p + strip - 1) / strip;
  auto one = [&](int64_t k) {
    const bool* keep = mask ? static_cast<const bool*>(mask->const_data_ptr()) + k * n : nullptr;
    const float* of = static_cast<const float*>(scales.const_data_ptr()) + k * scales.stride(0);
    const float upstream = static_cast<const float*>(grad.const_data_ptr())[k * grad.stride(0)];
    const float* data = static_cast<const float*>(x.const_data_ptr()) + k * x.stride(0);
    return Gradient{Features(data, keep, x.stride(1), n, p, centre),
                    static_cast<const float*>(V.const_data_ptr()) + k * n * n, of[0], of[1] * upstream,
                    static_cast<float*>(dx.mutable_data_ptr()) + k * n * p};
  };
  if (G >= static_cast<int64_t>(torch::stable::get_num_threads()) && G > 1) {
    torch::stable::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) multiply(one(k), strip, 0, strips);
    });
    return dx;
  }
  for (int64_t k = 0; k < G; ++k) {
    const Gradient g = one(k);
    if (n * n * p < kSerial) {
      multiply(g, strip, 0, strips);
    } else {
      torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) { multiply(g, strip, begin, end); });
    }
  }
  return dx;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("pair_gradient(Tensor grad, Tensor x, Tensor? mask, Tensor scales, Tensor V, bool centre) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("pair_gradient", TORCH_BOX(&kdkernels::pair_gradient)); }
