// SPDX-License-Identifier: Apache-2.0
// What the operators on rows share: checks of their arguments, a dtype picked once, rows spread over torch's threads.
// A row is one thread's work from end to end, so no result depends on the number of threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "../common/check.h"
#include "cpu_values.h"

namespace kdkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kType = std::is_same_v<T, Half>       ? ScalarType::Half
                             : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                             : std::is_same_v<T, float>    ? ScalarType::Float
                                                           : ScalarType::Double;

template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t r) const { return data + r * stride; }
};

template <class T>
Rows<const T> rows(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0)};
}

template <class T>
Rows<T> new_rows(Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.dim() == 2 ? t.size(1) : 0};
}

inline void check_rows(const Tensor& t, const char* op, const char* name) {
  KDK_CHECK(t.is_cpu(), op, ": ", name, " is not a CPU tensor: this implementation runs on the CPU only");
  KDK_CHECK(t.dim() == 2, op, ": ", name, " has ", t.dim(), " dimensions: pass rows [R, n]");
  KDK_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", name, " has column stride ", t.stride(1), ": pass ", name,
            ".contiguous(), the elements of a row must be dense");
  KDK_CHECK(t.size(1) < int64_t(1) << 31, op, ": ", name, " has rows of ", t.size(1), ": positions are 32-bit");
}

inline void check_like(const Tensor& t, const Tensor& x, ScalarType type, const char* op, const char* name) {
  check_rows(t, op, name);
  KDK_CHECK(t.size(0) == x.size(0) && t.size(1) == x.size(1), op, ": ", name, " is [", t.size(0), ", ", t.size(1),
            "]: it needs the shape of the rows, [", x.size(0), ", ", x.size(1), "]");
  KDK_CHECK(t.scalar_type() == type, op, ": ", name, " is ", torch::headeronly::toString(t.scalar_type()), ": pass ",
            torch::headeronly::toString(type));
}

// one strength a row: factor, times a tensor [1] or [R]
struct Strengths {
  const double* each;
  int64_t step;
  double factor;
  double operator[](int64_t r) const { return each ? factor * each[r * step] : factor; }
};

inline Strengths strengths_of(const std::optional<Tensor>& t, double factor, int64_t rows, const char* op) {
  KDK_CHECK(factor >= 0, op, ": strength is ", factor, ": it needs a number >= 0");
  if (!t) return {nullptr, 0, factor};
  const int64_t count = t->numel();
  KDK_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Double && t->dim() == 1 && (count == 1 || count == rows), op,
            ": strengths must be float64 [1] or [", rows, "] on the CPU");
  return {static_cast<const double*>(t->const_data_ptr()), count == 1 ? 0 : t->stride(0), factor};
}

// past the dispatcher, which takes half a microsecond more: short rows notice
inline Tensor new_tensor(int64_t dims, const int64_t* shape, ScalarType type) {
  namespace stable = torch::stable::detail;
  const int64_t strides[2] = {dims == 2 ? std::max<int64_t>(1, shape[1]) : 1, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape, strides, stable::to<int32_t>(stable::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_like_rows(const Tensor& x, bool wanted, ScalarType type) {
  const int64_t shape[2] = {wanted ? x.size(0) : 0, x.size(1)};
  return new_tensor(wanted ? 2 : 1, shape, type);
}

inline Tensor empty_per_row(const Tensor& x, ScalarType type) {
  const int64_t rows = x.size(0);
  return new_tensor(1, &rows, type);
}

// work(make(), r) for each row; below a few thousand elements a second thread costs more than it saves
template <class Make, class Work>
void for_rows(int64_t count, int64_t n, Make make, Work work) {
  constexpr int64_t kElements = 4096;
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, n));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    auto worker = make();
    for (int64_t r = begin; r < end; ++r) work(worker, r);
  });
}

// f(T{}) for the dtype of the rows
template <class F>
auto with_dtype(const Tensor& x, const char* op, const char* name, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      KDK_CHECK(x.scalar_type() == ScalarType::Double, op, ": ", name, " is ",
                torch::headeronly::toString(x.scalar_type()), ": pass float16, bfloat16, float32 or float64");
      return f(double{});
  }
}

}  // namespace kdkernels
