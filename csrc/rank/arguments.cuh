// SPDX-License-Identifier: Apache-2.0
// Tensors of the ranking operators as the arguments of their kernels.
#pragma once

#include "../common/torch_cuda.cuh"
#include "backward.cuh"

namespace kdkernels {

inline Rows rows_of(const Tensor& t, const char* op, const char* name) {
  const int64_t stride = check_rows(t, op, name);
  return {t.const_data_ptr(), stride, dtype_of(t, op, name)};
}

inline Strength strength_of(const std::optional<Tensor>& factors, double number, bool relative, const Tensor& x,
                            const char* op) {
  if (!factors) return {nullptr, false, number, relative};
  KDK_CHECK(factors->is_cuda() && factors->get_device_index() == x.get_device_index(), op,
            ": strengths is not on the device of the rows: move it");
  KDK_CHECK(factors->scalar_type() == ScalarType::Double && factors->dim() == 1 && factors->is_contiguous(), op,
            ": strengths is not a dense float64 vector: pass strengths.double().contiguous()");
  KDK_CHECK(factors->size(0) == 1 || factors->size(0) == x.size(0), op, ": strengths has ", factors->size(0),
            " entries: pass 1 or ", x.size(0), ", one for each row");
  return {static_cast<const double*>(factors->const_data_ptr()), factors->size(0) != 1, number, relative};
}

// what both backward passes share; dx takes the dtype of `like`
inline BackwardCall backward_of(const Tensor& grad, const Tensor& like, const Tensor& value, const char* value_name,
                                const Tensor& name, const char* name_name, Tensor& dx, const char* op) {
  const Rows u = rows_of(grad, op, "grad"), v = rows_of(value, op, value_name);
  const int64_t name_stride = check_rows(name, op, name_name);
  KDK_CHECK(name.scalar_type() == ScalarType::Int, op, ": ", name_name, " is ",
            torch::headeronly::toString(name.scalar_type()), ": pass int32");
  check_like(grad, like, op, "grad");
  check_like(value, like, op, value_name);
  check_like(name, like, op, name_name);
  return {u,
          v,
          static_cast<const int*>(name.const_data_ptr()),
          name_stride,
          nullptr,
          false,
          like.size(0),
          static_cast<int>(like.size(1)),
          dx.mutable_data_ptr(),
          dtype_of(like, op, "x"),
          nullptr,
          0};
}

}  // namespace kdkernels
