// SPDX-License-Identifier: Apache-2.0
// A side of a loss on logits: rows of any float dtype, read as float32 and written back.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/check.h"
#include "../common/lanes.h"

namespace kdkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// row r of [R, C] or of [B, T, C], whose samples may lie apart; a division takes as long as a short row
struct Matrix {
  const void* data;
  int64_t inner, outer_stride, stride;  // rows of a sample; from sample to sample, from row to row
  ScalarType dtype;

  int64_t at(int64_t r) const { return r < inner ? r * stride : r / inner * outer_stride + r % inner * stride; }
};

inline int64_t rows_of(const Tensor& t) { return t.dim() == 3 ? t.size(0) * t.size(1) : t.size(0); }

template <class T>
KDK_INLINE void widen(const T* from, float* to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(from[j]);
}

// `count` classes of row r from class j on
KDK_INLINE void fetch(const Matrix& m, int64_t r, int64_t j, int64_t count, float* to) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const int64_t at = m.at(r) + j;
  if (m.dtype == ScalarType::Float) {
    std::memcpy(to, static_cast<const float*>(m.data) + at, count * sizeof(float));
  } else if (m.dtype == ScalarType::Half) {
    widen(static_cast<const Half*>(m.data) + at, to, count);
  } else {
    widen(static_cast<const BFloat16*>(m.data) + at, to, count);
  }
}

template <class T>
KDK_INLINE void narrow(const float* from, T* to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(from[j]);
}

KDK_INLINE void deliver(const float* from, void* to, ScalarType dtype, int64_t at, int64_t count) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (dtype == ScalarType::Float) {
    std::memcpy(static_cast<float*>(to) + at, from, count * sizeof(float));
  } else if (dtype == ScalarType::Half) {
    narrow(from, static_cast<Half*>(to) + at, count);
  } else {
    narrow(from, static_cast<BFloat16*>(to) + at, count);
  }
}

// `name` says which operator's it is
inline Matrix matrix(const Tensor& t, const char* name, int64_t R, int64_t C) {
  const auto dtype = t.scalar_type();
  const int64_t last = t.dim() - 1;
  KDK_CHECK(t.is_cpu() && (last == 1 || last == 2) && rows_of(t) == R && t.size(last) == C &&
                (C <= 1 || t.stride(last) == 1),
            name, " must be CPU logits [", R, ", ", C, "] with dense rows");
  KDK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            name, " is ", torch::headeronly::toString(dtype), ": pass float32, float16 or bfloat16");
  const int64_t inner = last == 2 ? t.size(1) : R;
  return {t.const_data_ptr(), std::max<int64_t>(1, inner), t.stride(0), t.stride(last - 1), dtype};
}

inline int64_t grain(int64_t C) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, C)); }

}  // namespace kdkernels
