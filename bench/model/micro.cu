// SPDX-License-Identifier: Apache-2.0
// Kernels of which each depends on one entry of rates.py: fit.py times them with two numbers of iterations.
#include <cstdint>

constexpr int kSteps = 16;  // of an iteration

#define CHAIN(name, type, start, step)                                         \
  extern "C" __global__ void name(int n, type* p) {                            \
    type v = start;                                                            \
    _Pragma("unroll 1") for (int i = 0; i < n; ++i) {                          \
      _Pragma("unroll") for (int k = 0; k < kSteps; ++k) { step; }             \
    }                                                                          \
    p[(blockIdx.x * blockDim.x + threadIdx.x) % 1024] = v;                     \
  }

// four cycles each by their stall counts: what is left is the jump of the loop
CHAIN(chain_product, float, p[threadIdx.x % 32], v = __fmaf_rn(v, v, 0.5f))
CHAIN(chain_special, float, p[threadIdx.x % 32], asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(v)))
CHAIN(chain_shuffle, float, p[threadIdx.x % 32], v = __shfl_xor_sync(~0u, v, 1))
// chains through memory that holds zeros: p[0] is 0, and so is the address that is loaded
CHAIN(chain_l1, std::uint64_t, reinterpret_cast<std::uint64_t>(p),
      asm volatile("ld.global.ca.u64 %0, [%0];" : "+l"(v)); v |= reinterpret_cast<std::uint64_t>(p))
CHAIN(chain_l2, std::uint64_t, reinterpret_cast<std::uint64_t>(p),
      asm volatile("ld.global.cg.u64 %0, [%0];" : "+l"(v)); v |= reinterpret_cast<std::uint64_t>(p))
CHAIN(chain_barrier, int, 0, __syncthreads())

extern "C" __global__ void chain_shared(int n, int* p) {
  __shared__ volatile int words[64];
  words[threadIdx.x] = 0;
  int v = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) v = words[v];
  }
  p[threadIdx.x] = v;
}

// sectors that nobody has read, of a page or more apart, one after the other
extern "C" __global__ void chain_dram(int n, std::uint64_t* p) {
  std::uint64_t v = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) v = p[(i * kSteps + k) * 1024 + v];
  }
  if (v) p[0] = v;
}

// many blocks read what lies one after the other; each again and again one of three pieces of its own
extern "C" __global__ void stream_dram(int n, const float4* p, float* out) {
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) sum += p[(std::size_t(i) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x].x;
  if (sum != 0) out[0] = sum;
}

extern "C" __global__ void stream_l2(int n, const float4* p, float* out) {
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    const float4 v = __ldcg(p + (i % 3 * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x);
    sum += v.x + v.y + v.z + v.w;
  }
  if (sum != 0) out[0] = sum;
}

// the clock: cycles that this many take are known
extern "C" __global__ void spin(int cycles, void*) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}
