// SPDX-License-Identifier: Apache-2.0
// A kernel with faults planted on request: what the simt leg must catch. One block per row; each thread takes the sum
// and maximum of a chunk, neighbours merge in shared memory until one pair is left: the shape of the ranking kernels.
#pragma once

enum class Plant { kNone, kNoBarrier, kOutOfBounds, kWrongMerge, kUnwritten, kDivergent, kDeadlock, kBadLane };

struct alignas(16) SumMax {
  double sum;
  float max;
};

template <Plant plant>
__global__ void planted_row_stats(const float* x, double* sum, float* maximum, int n) {
  SIMT_DYNAMIC_SHARED(memory);
  SumMax* part = reinterpret_cast<SumMax*>(memory);
  const int t = threadIdx.x, threads = blockDim.x;
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  const int chunk = (n + threads - 1) / threads;
  SumMax mine{0.0, -INFINITY};
  for (int i = t * chunk; i < min(n, (t + 1) * chunk); ++i) {
    mine.sum += row[i];
    mine.max = max(mine.max, row[i]);
  }
  if (!(plant == Plant::kUnwritten && t == threads - 1)) part[t] = mine;
  if (plant == Plant::kOutOfBounds && t == 0) part[threads].sum = 0.0;  // planted: out of bounds
  if (plant == Plant::kDivergent) {
    if (t < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (plant == Plant::kBadLane && t % 32 < 16) __shfl_sync(0xFFFFu, t, 16);
  if (plant == Plant::kDeadlock && t % 32 < 16) __syncwarp(0xFFFFFFFFu);
  for (int step = 1; step < threads; step *= 2) {
    if (plant != Plant::kNoBarrier) __syncthreads();
    if (t % (2 * step) == 0 && t + step < threads) {
      const SumMax other = part[t + step];  // planted: race
      part[t].sum += plant == Plant::kWrongMerge && step == 2 ? other.max : other.sum;
      part[t].max = max(part[t].max, other.max);
    }
  }
  if (t == 0) sum[blockIdx.x] = part[0].sum, maximum[blockIdx.x] = part[0].max;
}

// every warp and block primitive once; the rows of `out` are named in drive.py, which computes them in NumPy
template <int kThreads>
__global__ void primitives(const int* x, long long* out, int early) {
  const int t = threadIdx.x, lane = t % 32;
  SIMT_SHARED(int, total, 1);
  SIMT_SHARED(unsigned, bits, 1);
  if (t == 0) total[0] = 0, bits[0] = 0;
  __syncthreads();
  if (t >= kThreads - early) return;
  const int v = x[t];
  int row = 0;
  auto put = [&](long long value) { out[row++ * kThreads + t] = value; };
  // the lanes of this warp that are left
  const unsigned here = __ballot_sync(0xFFFFFFFFu, 1);
  put(__ballot_sync(0xFFFFFFFFu, v > 0));
  put(__any_sync(here, v == 7));
  put(__all_sync(here, v >= 0));
  put(__reduce_add_sync(here, v));
  put(__reduce_max_sync(here, v));
  put(__reduce_min_sync(here, v));
  put(__match_any_sync(here, v));
  // two halves of a warp exchange on their own, different numbers of times
  const unsigned half = lane < 16 ? 0xFFFFu & here : 0xFFFF0000u & here;
  long long turned = v;
  for (int i = 0; i < (lane < 16 ? 1 : 3); ++i) turned = __shfl_sync(half, turned, __ffs(half) - 1) + i;
  put(turned);
  put(__shfl_up_sync(here, static_cast<double>(v), 1) * 2);
  __syncwarp(here);
  atomicAdd(total, v);
  atomicOr(bits, 1u << (v & 31));
  atomicMax(reinterpret_cast<unsigned long long*>(out + 20 * kThreads), static_cast<unsigned long long>(v + 100));
  __syncthreads();
  put(total[0]);
  put(bits[0]);
  put(__syncthreads_count(v > 0));
  put(__syncthreads_or(v == 7));
  put(__syncthreads_and(v >= 0));
}
