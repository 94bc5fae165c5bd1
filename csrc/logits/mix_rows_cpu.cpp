// SPDX-License-Identifier: Apache-2.0
// out_i = weight_i x_i + other_i x_index(i): two rows read and one written, where indexing first writes and reads a
// copy of x besides. The roof is memory bandwidth: 3 elements moved for each one of x.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "../common/check.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPiece = 8192;  // elements of a row that a thread takes at once: long rows are shared too

template <class T>
void mix(const Tensor& x, const double* weight, const double* other, const int64_t* index, Tensor& out) {
  const int64_t R = x.size(0), width = x.size(1), pieces = (width + kPiece - 1) / kPiece;
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, R * pieces, std::max<int64_t>(1, kPiece / (width + 1)), [&](int64_t b, int64_t e) {
    for (int64_t t = b; t < e; ++t) {
      const int64_t r = t / pieces, j0 = t % pieces * kPiece, j1 = std::min(width, j0 + kPiece);
      const T w = static_cast<T>(weight[r]), o = static_cast<T>(other[r]);
      const T *own = from + r * width, *mate = from + index[r] * width;
      T* result = to + r * width;
      for (int64_t j = j0; j < j1; ++j) result[j] = w * own[j] + o * mate[j];
    }
  });
}

Tensor mix_rows(Tensor x, Tensor weight, Tensor other, Tensor index) {
  const auto dtype = x.scalar_type();
  KDK_CHECK(x.is_cpu() && x.dim() == 2 && x.is_contiguous(), "mix_rows: x must be a contiguous CPU tensor [R, width]");
  KDK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "mix_rows: x is ",
            torch::headeronly::toString(dtype), ": pass float32 or float64");
  const int64_t R = x.size(0);
  for (const auto* t : {&weight, &other}) {
    KDK_CHECK(t->is_cpu() && t->is_contiguous() && t->numel() == R && t->scalar_type() == ScalarType::Double,
              "mix_rows: weight and other must be contiguous float64 [", R, "]");
  }
  KDK_CHECK(index.is_cpu() && index.is_contiguous() && index.numel() == R && index.scalar_type() == ScalarType::Long,
            "mix_rows: index must be a contiguous int64 [", R, "]");
  const auto* rows = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t r = 0; r < R; ++r) {
    KDK_CHECK(rows[r] >= 0 && rows[r] < R, "mix_rows: index holds ", rows[r], ": give 0 to ", R - 1);
  }
  const int64_t shape[2] = {R, x.size(1)};
  Tensor out = torch::stable::new_empty(x, {shape, 2});
  const auto* w = static_cast<const double*>(weight.const_data_ptr());
  const auto* o = static_cast<const double*>(other.const_data_ptr());
  if (dtype == ScalarType::Float) {
    mix<float>(x, w, o, rows, out);
  } else {
    mix<double>(x, w, o, rows, out);
  }
  return out;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("mix_rows(Tensor x, Tensor weight, Tensor other, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("mix_rows", TORCH_BOX(&kdkernels::mix_rows)); }
