// SPDX-License-Identifier: Apache-2.0
// The one door to CUDA: kernel files include this and nothing of CUDA, torch or cub, so the same text runs on the host
// under KDK_SIMT (tests/simt), where every thread is an OS thread. What the kernels use:
//   __syncthreads __syncwarp __shfl_sync _up_sync _xor_sync __ballot_sync __any_sync __reduce_add_sync
//   atomicAdd (int, unsigned, unsigned long long)  __clz __ffs __popc
//   __half2float __bfloat162float __float2half_rn __float2bfloat16_rn __half_as_ushort __ushort_as_half and bfloat16's
//   __float_as_uint __uint_as_float __double_as_longlong __longlong_as_double  exp expm1 log sqrt llrint fabs fmax
//   fma __fdividef
#pragma once

#ifdef KDK_SIMT

#include "simt.h"
#define KDK_DYNAMIC_SHARED(name) SIMT_DYNAMIC_SHARED(name)
#define KDK_SHARED(T, name, N) SIMT_SHARED(T, name, N)
#define KDK_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), simt::launch(dim3(grid), dim3(block), bytes, kernel, __VA_ARGS__))

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#define KDK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define KDK_SHARED(T, name, N) __shared__ T name[N]
#define KDK_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ::kdkernels::launch(kernel, grid, block, bytes, stream, __VA_ARGS__)

namespace kdkernels {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// shared memory beyond 48 KiB is asked for once for each kernel and device, and all of it: what one launch needs may be
// too little for the launch of another thread. Setting an attribute is no launch and may be captured in a graph
inline void allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const char* what = "shared memory of a ranking kernel";
  int device = 0, most = 0;
  cudaFuncAttributes of;
  check_cuda(cudaGetDevice(&device), what);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check_cuda(cudaFuncGetAttributes(&of, kernel), what);
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(of.sharedSizeBytes)), what);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared), what);
  allowed.insert({kernel, device});
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t bytes, cudaStream_t stream,
            Arguments... arguments) {
  if (bytes > 48 * 1024) allow_shared(reinterpret_cast<const void*>(kernel));
  kernel<<<grid, block, bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), "launch of a ranking kernel");
}

}  // namespace kdkernels

#endif

#include <cstddef>
#include <cstdint>
