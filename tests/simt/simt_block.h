// SPDX-License-Identifier: Apache-2.0
// A block of threads with all its barriers, and which of them the running thread is.
#pragma once

#include <cstddef>

#include "simt_barrier.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// the built-in variables of a kernel; each CUDA thread has its own
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace simt {

constexpr int kNamedBarriers = 16;
constexpr std::size_t kStack = 1 << 20;  // bytes of a thread

struct Block {
  Progress progress;
  Barrier syncthreads, named[kNamedBarriers];
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  std::mutex mutex;
  std::string failure;

  explicit Block(unsigned threads) : warps((threads + 31) / 32) {}
  template <class Visit>
  void each(Visit visit) {
    visit(syncthreads);
    for (auto& barrier : named) visit(barrier);
    for (auto& warp : warps) warp.each(visit);
  }
  void reset(unsigned threads) {
    progress.alive = static_cast<int>(threads), progress.waiting = 0, progress.stopped = false;
    syncthreads.reset(&progress, "__syncthreads", static_cast<int>(threads));
    for (auto& barrier : named) barrier.reset(&progress, "named barrier", 0);
    for (std::size_t w = 0; w < warps.size(); ++w) warps[w].reset(&progress, static_cast<int>(threads - 32 * w));
    failure.clear();
  }
  void fail(const std::string& reason) {
    {
      std::lock_guard lock(mutex);
      if (!failure.empty()) return;
      failure = reason;
    }
    progress.stopped = true;
    each([](Barrier& barrier) { barrier.stop(); });
  }
  // of a crew that finds all threads waiting
  void fail_at_barriers() {
    std::string text = "deadlock: " + std::to_string(progress.alive.load()) + " threads left";
    each([&](Barrier& barrier) { text += barrier.report(); });
    fail(text);
  }
};

struct Self {
  Block* block;
  Warp* warp;
  int lane;
};
inline constinit thread_local Self self{};

}  // namespace simt
