// SPDX-License-Identifier: Apache-2.0
// A crew of OS threads, made once for a block size and used by every later launch of that size.
#pragma once

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <utility>

#include "simt_block.h"

namespace simt {

inline void wait_while(const std::atomic<unsigned>& value, unsigned old) { value.wait(old, std::memory_order_acquire); }

class Crew {
 public:
  Crew(unsigned threads, Block& block, std::function<void(unsigned)> thread)
      : threads_(threads), block_(block), thread_(std::move(thread)) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStack);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (unsigned i = 0; i < threads; ++i) {
      auto* start = new std::pair<Crew*, unsigned>(this, i);
      pthread_t thread;
      if (pthread_create(&thread, &attributes, &Crew::work, start)) throw Failure("no more OS threads");
    }
    pthread_attr_destroy(&attributes);
  }

  // all threads of the block, until the last has ended
  void run(unsigned) {
    running_ = static_cast<int>(threads_);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();

    std::unique_lock lock(done_mutex_);
    unsigned seen = ~0u;
    while (!done_.wait_for(lock, std::chrono::milliseconds(200), [&] { return running_ == 0; })) {
      const unsigned before = block_.progress.completed;
      const int waiting = block_.progress.waiting, alive = block_.progress.alive;
      if (waiting == alive && alive > 0 && before == seen && before == block_.progress.completed) {
        block_.fail_at_barriers();
      }
      seen = before;
    }
  }

 private:
  static void* work(void* argument) {
    std::unique_ptr<std::pair<Crew*, unsigned>> start(static_cast<std::pair<Crew*, unsigned>*>(argument));
    auto [crew, index] = *start;
    for (unsigned epoch = 0;;) {
      crew->epoch_.wait(epoch, std::memory_order_acquire);
      if (crew->epoch_.load(std::memory_order_acquire) == epoch) continue;
      ++epoch;
      crew->thread_(index);
      std::lock_guard lock(crew->done_mutex_);
      if (--crew->running_ == 0) crew->done_.notify_one();
    }
  }

  const unsigned threads_;
  Block& block_;
  const std::function<void(unsigned)> thread_;
  std::mutex done_mutex_;
  std::condition_variable done_;
  int running_ = 0;
  std::atomic<unsigned> epoch_{0};
};

}  // namespace simt
