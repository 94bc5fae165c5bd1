// SPDX-License-Identifier: Apache-2.0
// out = a b' of bfloat16 rows in float32: logits of a half head whose digits stay, by the CPU's own products of pairs.
// PyTorch's product rounds its result to bfloat16. Used by kdkernels/logits/linear_driver.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "matrix.h"

#if KDK_X86
#include <immintrin.h>
#endif

namespace kdkernels {
namespace {

#if KDK_X86
#define KDK_PAIRS __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16")))

constexpr int64_t kWide = 32;   // rows of b at a time, side by side in two registers
constexpr int64_t kRows = 12;   // rows of a at a time: 24 sums, and registers are left for both sides
constexpr int64_t kSquare = 16;

// rows of pairs of numbers; a row past the last is 0
struct Pairs {
  const uint16_t* data;
  int64_t rows, stride, K;

  KDK_INLINE void copy(int64_t r, int64_t k, int64_t count, uint32_t* to) const {
    std::memset(to, 0, count * sizeof(uint32_t));
    const int64_t held = std::min(2 * count, K - 2 * k);
    if (r < rows && held > 0) std::memcpy(to, data + r * stride + 2 * k, held * sizeof(uint16_t));
  }
};

// 16 x 16 pairs, turned
KDK_PAIRS void turn(const uint32_t (&from)[kSquare][kSquare], uint32_t* to, int64_t step) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from[i]);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_si512(to + j * step, _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88));
    _mm512_storeu_si512(to + (8 + j) * step, _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd));
    _mm512_storeu_si512(to + (4 + j) * step, _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88));
    _mm512_storeu_si512(to + (12 + j) * step, _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd));
  }
}

// [pairs, 32] of 32 rows of b from row v on
void panel_of(const Pairs& b, int64_t v, int64_t pairs, uint32_t* to) {
  uint32_t square[kSquare][kSquare];
  for (int64_t side = 0; side < kWide; side += kSquare) {
    for (int64_t k = 0; k < pairs; k += kSquare) {
      for (int64_t i = 0; i < kSquare; ++i) b.copy(v + side + i, k, kSquare, square[i]);
      turn(square, to + k * kWide + side, kWide);
    }
  }
}

// sums of kRows rows of a with the panel, stored where they exist
KDK_PAIRS void block_of(const uint32_t* a, const uint32_t* panel, int64_t pairs, float* out, int64_t stride,
                        int64_t rows, int64_t columns) {
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(panel + k * kWide);
    const __m512bh high = (__m512bh)_mm512_loadu_si512(panel + k * kWide + kSquare);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * pairs + k]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, low);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, high);
    }
  }
  const uint32_t kept = columns >= kWide ? 0xffffffffu : (1u << columns) - 1;
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    _mm512_mask_storeu_ps(out + r * stride, static_cast<__mmask16>(kept), sum[r][0]);
    _mm512_mask_storeu_ps(out + r * stride + kSquare, static_cast<__mmask16>(kept >> 16), sum[r][1]);
  }
}

void multiply(const Pairs& a, const Pairs& b, float* out, int64_t stride) {
  const int64_t pairs = (a.K + 2 * kSquare - 1) / (2 * kSquare) * kSquare;
  const int64_t padded = (a.rows + kRows - 1) / kRows * kRows;
  std::vector<uint32_t> left(padded * pairs);
  for (int64_t r = 0; r < padded; ++r) a.copy(r, 0, pairs, left.data() + r * pairs);
  torch::stable::parallel_for(0, (b.rows + kWide - 1) / kWide, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> panel(pairs * kWide);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t v = p * kWide;
      panel_of(b, v, pairs, panel.data());
      for (int64_t r = 0; r < a.rows; r += kRows) {
        block_of(left.data() + r * pairs, panel.data(), pairs, out + r * stride + v, stride,
                 std::min(kRows, a.rows - r), std::min(kWide, b.rows - v));
      }
    }
  });
}

Pairs pairs_of(const Tensor& t, const char* name) {
  KDK_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::BFloat16 &&
                (t.stride(1) == 1 || t.size(1) == 1),
            "half_product: ", name, " must be dense rows of bfloat16 on the CPU");
  return {static_cast<const uint16_t*>(t.const_data_ptr()), t.size(0), t.stride(0), t.size(1)};
}
#endif

// out [R, V] = a [R, K] b' [V, K]; false, and nothing is done, where the CPU has no products of pairs
bool half_product(Tensor a, Tensor b, Tensor out) {
#if KDK_X86
  static const bool has = detect_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  if (!has) return false;
  const Pairs left = pairs_of(a, "a"), right = pairs_of(b, "b");
  KDK_CHECK(left.K == right.K && out.is_cpu() && out.dim() == 2 && out.scalar_type() == ScalarType::Float &&
                out.size(0) == left.rows && out.size(1) == right.rows && out.stride(1) == 1,
            "half_product: out must be float32 [rows of a, rows of b] in dense rows");
  multiply(left, right, static_cast<float*>(out.mutable_data_ptr()), out.stride(0));
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) { m.def("half_product(Tensor a, Tensor b, Tensor(a!) out) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("half_product", TORCH_BOX(&kdkernels::half_product)); }
