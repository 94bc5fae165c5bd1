// SPDX-License-Identifier: Apache-2.0
// The threads that share a row: one warp (T = 32, several rows to a block) or a whole block (T > 32, T a multiple of
// 32). Reductions and scans combine in one fixed order, so they have the same bits in every run.
#pragma once

#include "device.cuh"

namespace kdkernels {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kScratchBytes = 32 * 24;  // of a group of more than one warp: one item of up to 24 bytes for each warp

// what the lane `step` away has, of what a lane holds in one register or two; others have their own
template <class V>
__device__ __forceinline__ V from_partner(V value, int step) {
  return __shfl_xor_sync(kAllLanes, value, step);
}

template <int T>
struct Group {
  static constexpr int kWarps = T / 32;
  static constexpr size_t kBytes = T == 32 ? 0 : kScratchBytes;  // what `scratch` must hold
  unsigned char* scratch;  // kBytes

  __device__ static int rank() { return static_cast<int>(threadIdx.x) % T; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return rank() / 32; }

  // also orders global memory within the group
  __device__ static void sync() {
    if constexpr (T == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // the same in every thread; `merge` commutes
  template <class V, class Merge>
  __device__ V reduce(V value, Merge merge) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = merge(value, from_partner(value, step));
    return of_warps(value, merge);
  }
  // the same of what is the same in all lanes of a warp
  template <class V, class Merge>
  __device__ V of_warps(V value, Merge merge) const {
    if constexpr (T > 32) {
      V* part = reinterpret_cast<V*>(scratch);
      if (lane() == 0) part[warp()] = value;
      sync();
      value = part[0];
      for (int w = 1; w < kWarps; ++w) value = merge(value, part[w]);
      sync();
    }
    return value;
  }
  template <class V>
  __device__ V sum(V value) const {
    return reduce(value, [](V a, V b) { return a + b; });
  }
  __device__ int sum(int value) const {
    const int all = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(value)));
    return of_warps(all, [](int a, int b) { return a + b; });
  }
  __device__ bool any(bool value) const {
    return of_warps(__any_sync(kAllLanes, value), [](int a, int b) { return a | b; }) != 0;
  }

  // what the threads before this one make together, `none` for the first. State: static from_lane(state, delta)
  // shuffles up, before.then(after) joins
  template <class State>
  __device__ State before(State state, State none) const {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const State lower = State::from_lane(state, step);
      if (lane() >= step) state = lower.then(state);
    }
    State total = State::from_lane(state, 1);
    if (lane() == 0) total = none;
    if constexpr (T > 32) {
      static_assert(sizeof(State) <= kScratchBytes / 32);
      State* part = reinterpret_cast<State*>(scratch);
      if (lane() == 31) part[warp()] = state;
      sync();
      State lower = none;
      for (int w = 0; w < warp(); ++w) lower = lower.then(part[w]);
      total = lower.then(total);
      sync();
    }
    return total;
  }
};

}  // namespace kdkernels
