// SPDX-License-Identifier: Apache-2.0
// Whether this library runs on a device: the library is asked, no list of architectures and drivers is kept. Read by
// kdkernels/native.py.
#include <cuda_runtime.h>

#include <string>

namespace kdkernels {
namespace {

// compiled as all the others are. A file of its own: a driver that compiles PTX compiles no more than this
__global__ void smallest_kernel() {}

// what no later call on this device changes. Memory that is short or another kernel's fault is for a launch to report
bool lasts(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace
}  // namespace kdkernels

// why the kernels do not run on the current device, or null; the text is the thread's until it asks again
extern "C" __attribute__((visibility("default"))) const char* kdkernels_cuda_refusal() {
  using namespace kdkernels;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, smallest_kernel);
  (void)cudaGetLastError();  // not for the next launch to find
  if (!lasts(error)) return nullptr;
  int driver = 0, runtime = 0;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  thread_local std::string why;
  why = std::string(cudaGetErrorString(error)) + " (its runtime is CUDA " + version(runtime) + ", the driver serves " +
        version(driver) + ")";
  return why.c_str();
}
