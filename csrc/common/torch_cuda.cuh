// SPDX-License-Identifier: Apache-2.0
// What a launch needs of torch, through its stable ABI: the current stream, the tensor's device, workspace from the
// caching allocator, dtypes. Everything is queued on the stream and nothing waits, so calls can be captured in a graph.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "element.cuh"

namespace kdkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBfloat16;
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    default:
      throw std::invalid_argument(join(op, ": ", name, " is ", torch::headeronly::toString(t.scalar_type()),
                                       ": pass float16, bfloat16, float32 or float64"));
  }
}
inline ScalarType scalar_of(int dtype) {
  constexpr ScalarType of[] = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float, ScalarType::Double};
  return of[dtype];
}

// rows [R, n] on a CUDA device, the last dimension dense; their stride
inline int64_t check_rows(const Tensor& t, const char* op, const char* name) {
  KDK_CHECK(t.is_cuda(), op, ": ", name, " is not a CUDA tensor: move it to the device of the others");
  KDK_CHECK(t.dim() == 2, op, ": ", name, " has ", t.dim(), " dimensions: pass rows [R, n]");
  KDK_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", name, " has column stride ", t.stride(1), ": pass ", name,
            ".contiguous(), rows must be dense");
  KDK_CHECK(t.size(1) < (int64_t(1) << 30), op, ": ", name, " has rows of ", t.size(1), ": at most 2^30 are ranked");
  return t.stride(0);
}
inline void check_like(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  KDK_CHECK(t.size(0) == x.size(0) && t.size(1) == x.size(1), op, ": ", name, " is [", t.size(0), ", ", t.size(1),
            "], the rows are [", x.size(0), ", ", x.size(1), "]: pass one entry for each");
  KDK_CHECK(t.get_device_index() == x.get_device_index(), op, ": ", name, " is on another device: move it");
}

// makes the tensor's device the current one; workspace lives until this goes, and is then reused in stream order
class Launch {
 public:
  explicit Launch(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaDeviceGetAttribute(&shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index()),
               "shared memory of the device");
  }
  cudaStream_t stream() const { return stream_; }
  size_t shared() const { return static_cast<size_t>(shared_); }
  void* allocate(size_t bytes) {
    const int64_t shape[1] = {static_cast<int64_t>(bytes)};
    workspace_.push_back(torch::stable::new_empty(like_, {shape, 1}, ScalarType::Byte));
    return workspace_.back().mutable_data_ptr();
  }
  Tensor rows(int64_t r, int64_t n, ScalarType dtype) const {
    const int64_t shape[2] = {r, n};
    return torch::stable::new_empty(like_, {shape, 2}, dtype);
  }
  Tensor vector(int64_t r, ScalarType dtype) const {
    const int64_t shape[1] = {r};
    return torch::stable::new_empty(like_, {shape, 1}, dtype);
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int shared_ = 0;
  std::vector<Tensor> workspace_;
};

}  // namespace kdkernels
