// SPDX-License-Identifier: Apache-2.0
// Products of parts of matrices by the BLAS that torch brought.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace kdkernels {

// element (i, j) is data[i step + j across]
struct Matrix {
  float* data;
  int64_t rows, columns, step, across;

  Matrix block(int64_t i, int64_t m, int64_t j, int64_t k) const {
    return {data + i * step + j * across, m, k, step, across};
  }
  Matrix turned() const { return {data, columns, rows, across, step}; }
  torch::stable::Tensor view() const {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {step, across};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, aoti_torch_dtype_float32(),
                                                              aoti_torch_device_type_cpu(), 0, &handle));
    return torch::stable::Tensor(handle);
  }
};

inline Matrix dense(const float* data, int64_t rows, int64_t columns) {
  return {const_cast<float*>(data), rows, columns, columns, 1};
}

// out = beta out + alpha a b, straight to the BLAS: the dispatcher, autograd and autocast are not asked
inline void multiply(const Matrix& out, double beta, double alpha, const Matrix& a, const Matrix& b) {
  const torch::stable::Tensor to = out.view(), left = a.view(), right = b.view();
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), beta, alpha));
}

}  // namespace kdkernels
