// SPDX-License-Identifier: Apache-2.0
// Tensors of the ranking operators as the arguments of their kernels.
#pragma once

#include "../common/torch_cuda.cuh"
#include "row.cuh"

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

}  // namespace kdkernels
