// SPDX-License-Identifier: Apache-2.0
// In the place of the CUDA runtime, for the launch code of csrc/ as it is compiled: it remembers which kernel stands
// behind which function, gives every launch to the machine (machine/cuda_device.py), and knows one device. What the
// real runtime refuses is refused here, too.
#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "launches.h"

using machine::Launch;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
};

// of kernels, by the function of the host; the library registers them before anything here is constructed
std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> made;
  return made;
}
// dynamic shared memory beyond 48 KiB that was asked for, by function and device
std::map<std::pair<const void*, int>, size_t> allowed;
std::vector<Configuration> configurations;
std::string failure;
cudaError_t last = cudaSuccess;

cudaError_t failed(const std::string& why) {
  failure = why;
  return last = cudaErrorLaunchFailure;
}

size_t granted(const void* function) {
  const auto found = allowed.find({function, machine::device().number});
  return found == allowed.end() ? 0 : found->second;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const auto found = names().find(function);
  if (found == names().end()) return failed("a launch of no kernel");
  const std::string name = found->second;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return failed("an empty grid of " + name);
  if (shared > 48 * 1024 && granted(function) < shared) return failed("shared memory that nobody asked for: " + name);
  const Launch call{found->second,
                    {grid.x, grid.y, grid.z},
                    {block.x, block.y, block.z},
                    shared,
                    arguments,
                    machine::ranges().data(),
                    static_cast<int>(machine::ranges().size()),
                    machine::operation()};
  const char* why = machine::device().run(&call);
  return why ? failed(why) : cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  configurations.push_back({grid, block, shared});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration of = configurations.back();
  configurations.pop_back();
  *grid = of.grid, *block = of.block, *shared = of.shared;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void** arguments) {
  return launch(function, how->gridDim, how->blockDim, arguments, how->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > machine::device().shared) return last = cudaErrorInvalidValue;
  // a second value is another thread's that launches with the first
  if (!allowed.insert({{function, machine::device().number}, static_cast<size_t>(value)}).second)
    return failed("shared memory asked for twice");
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  if (machine::device().architecture < 80) return last = cudaErrorNoKernelImageForDevice;
  *of = {};
  of->ptxVersion = of->binaryVersion = machine::device().architecture;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(machine::device().shared);
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = machine::device().architecture / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = machine::device().architecture % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 1;
      return cudaSuccess;
    default:
      return failed("an attribute of the device that is not modelled, " + std::to_string(which));
  }
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 64;  // cub asks once for all: more than will ever be set (Device::number)
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = machine::device().number;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice) return "no kernel image";
  return error == cudaErrorLaunchFailure ? failure.c_str() : "an invalid value";
}

}  // extern "C"
