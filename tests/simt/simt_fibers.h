// SPDX-License-Identifier: Apache-2.0
// A crew of fibers: one OS thread runs each CUDA thread up to its next barrier, in an order that every block shuffles
// anew, so that what a missing barrier lets through shows in some block. A deadlock is where none of them can go on.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <utility>

#include "simt_block.h"

namespace simt {

class Crew {
 public:
  Crew(unsigned threads, Block& block, std::function<void(unsigned)> thread)
      : block_(block), thread_(std::move(thread)), fibers_(threads) {
    const std::size_t bytes = threads * kStack;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Failure("no memory for the threads' stacks");
    for (unsigned i = 0; i < threads; ++i) {
      fibers_[i].index = i, fibers_[i].stack = static_cast<char*>(memory) + i * kStack;
      mprotect(fibers_[i].stack, kGuard, PROT_NONE);  // stacks grow down
    }
  }

  // all threads of the block, until the last has ended
  void run(unsigned seed) {
    std::vector<Fiber*> left;
    for (Fiber& fiber : fibers_) left.push_back(&fiber), start(fiber);
    std::shuffle(left.begin(), left.end(), std::mt19937(seed));
    current_crew = this;
    while (!left.empty()) {
      bool moved = false;
      for (Fiber* fiber : left) moved |= resume(*fiber);
      if (!moved) block_.fail_at_barriers();
      std::erase_if(left, [](Fiber* fiber) { return fiber->ended; });
    }
  }

  void pause(const std::atomic<unsigned>& value, unsigned old) {
    Fiber& fiber = *running_;
    const uint3 index = threadIdx;
    const Self me = self;
    fiber.awaited = &value, fiber.old = old;
    swapcontext(&fiber.context, &home_);
    threadIdx = index, self = me;
  }

  static inline thread_local Crew* current_crew = nullptr;

 private:
  static constexpr std::size_t kGuard = 1 << 16;  // a page, of any size

  struct Fiber {
    ucontext_t context;
    unsigned index;
    char* stack;
    const std::atomic<unsigned>* awaited;  // what it waits for to differ from `old`, or null
    unsigned old;
    bool ended;
  };

  void start(Fiber& fiber) {
    fiber.awaited = nullptr, fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &home_;
    makecontext(&fiber.context, &Crew::work, 0);
  }
  bool resume(Fiber& fiber) {
    if (fiber.awaited && fiber.awaited->load(std::memory_order_relaxed) == fiber.old) return false;
    fiber.awaited = nullptr;
    running_ = &fiber;
    swapcontext(&home_, &fiber.context);
    return true;
  }
  static void work() {
    Crew& crew = *current_crew;
    Fiber& fiber = *crew.running_;
    crew.thread_(fiber.index);
    fiber.ended = true;
  }

  Block& block_;
  const std::function<void(unsigned)> thread_;
  std::vector<Fiber> fibers_;
  ucontext_t home_;
  Fiber* running_ = nullptr;
};

inline void wait_while(const std::atomic<unsigned>& value, unsigned old) { Crew::current_crew->pause(value, old); }

}  // namespace simt
