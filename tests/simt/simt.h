// SPDX-License-Identifier: Apache-2.0
// CUDA kernels on the host: every CUDA thread is an OS thread and every barrier a real one, so the sanitizers see what
// the kernels do. Blocks run one after another on a pool; shared memory holds garbage when a block starts.
// Checked beside the results: all threads meet at the same __syncthreads, the lanes of a warp collective name the same
// mask, no lane reads one that does not take part, and a barrier that cannot complete ends the launch with a report.
#pragma once

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <type_traits>
#include <utility>

#include "simt_barrier.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// the built-in variables of a kernel; each OS thread has its own
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace simt {

// segments that a segmented sort on the host, in the place of cub's, did not find empty
inline std::vector<int> sorted_segments;

constexpr int kNamedBarriers = 16;
constexpr unsigned kMaxThreads = 1024;      // of a block
constexpr std::size_t kMaxShared = 232448;  // bytes of a block, sm_90 and later
constexpr std::size_t kStack = 1 << 20;     // bytes of an OS thread

// NaN and -1, a huge float, small nonsense: whatever is read before it is written shows in the result
inline void poison(void* memory, std::size_t bytes, unsigned seed) {
  static const unsigned garbage[] = {0xFFFFFFFFu, 0x7F4A7C15u, 0x5A5A5A5Au, 0x80000001u};
  auto* p = static_cast<unsigned char*>(memory);
  for (std::size_t i = 0; i < bytes; ++i) p[i] = garbage[(i / 4 + seed) % 4] >> (i % 4 * 8);
}

// shared memory of fixed size: lives on the heap, where AddressSanitizer guards its ends
class StaticShared {
 public:
  explicit StaticShared(std::size_t bytes) : bytes_(bytes), memory_(std::aligned_alloc(16, (bytes + 15) / 16 * 16)) {
    poison(memory_, bytes_, 0);
    std::lock_guard lock(mutex());
    all().push_back(this);
  }
  void* data() const { return memory_; }
  static void poison_all(unsigned seed) {
    std::lock_guard lock(mutex());
    for (StaticShared* one : all()) poison(one->memory_, one->bytes_, seed);
  }

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<StaticShared*>& all() {
    static auto* list = new std::vector<StaticShared*>;
    return *list;
  }
  std::size_t bytes_;
  void* memory_;
};

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
};

struct Self {
  Block* block;
  Warp* warp;
  int lane;
};
inline constinit thread_local Self self{};

// the OS threads of one block size, made once and used by every later launch of that size
class Pool {
 public:
  static Pool& of(unsigned threads) {
    // never destroyed: its threads sleep until the process ends
    static auto* pools = new std::map<unsigned, std::unique_ptr<Pool>>;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    auto& pool = (*pools)[threads];
    if (!pool) pool.reset(new Pool(threads));
    return *pool;
  }

  void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel, bool reversed) {
    std::lock_guard lock(launch_);
    kernel_ = &kernel, grid_ = grid, dim_ = block;
    const std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z;
    for (std::uint64_t i = 0; i < blocks; ++i) {
      const std::uint64_t b = reversed ? blocks - 1 - i : i;
      index_ = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      run_block(shared_bytes);
      if (!block_.failure.empty()) {
        throw Failure("block (" + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ", " +
                      std::to_string(index_.z) + "): " + block_.failure);
      }
    }
  }

 private:
  explicit Pool(unsigned threads) : threads_(threads), block_(threads) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStack);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (unsigned i = 0; i < threads; ++i) {
      auto* start = new std::pair<Pool*, unsigned>(this, i);
      pthread_t thread;
      if (pthread_create(&thread, &attributes, &Pool::work, start)) throw Failure("no more OS threads");
    }
    pthread_attr_destroy(&attributes);
  }

  void run_block(std::size_t shared_bytes) {
    static std::atomic<unsigned> seed{0};
    const unsigned garbage = seed.fetch_add(1);
    // exactly the bytes asked for, anew for every block: AddressSanitizer guards both ends
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes ? shared_bytes : 1)) throw Failure("no memory for shared memory");
    std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
    poison(memory, shared_bytes, garbage);
    StaticShared::poison_all(garbage);
    block_.reset(threads_);
    block_.shared = static_cast<unsigned char*>(memory);
    running_ = static_cast<int>(threads_);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();

    std::unique_lock lock(done_mutex_);
    unsigned seen = ~0u;
    while (!done_.wait_for(lock, std::chrono::milliseconds(200), [&] { return running_ == 0; })) {
      const unsigned before = block_.progress.completed;
      const int waiting = block_.progress.waiting, alive = block_.progress.alive;
      if (waiting == alive && alive > 0 && before == seen && before == block_.progress.completed) {
        std::string text = "deadlock: " + std::to_string(alive) + " threads left";
        block_.each([&](Barrier& barrier) { text += barrier.report(); });
        block_.fail(text);
      }
      seen = before;
    }
  }

  static void* work(void* argument) {
    std::unique_ptr<std::pair<Pool*, unsigned>> start(static_cast<std::pair<Pool*, unsigned>*>(argument));
    auto [pool, index] = *start;
    for (unsigned epoch = 0;;) {
      pool->epoch_.wait(epoch, std::memory_order_acquire);
      if (pool->epoch_.load(std::memory_order_acquire) == epoch) continue;
      ++epoch;
      pool->run_thread(index);
      std::lock_guard lock(pool->done_mutex_);
      if (--pool->running_ == 0) pool->done_.notify_one();
    }
  }

  void run_thread(unsigned index) {
    threadIdx = {index % dim_.x, index / dim_.x % dim_.y, index / dim_.x / dim_.y};
    blockIdx = index_, blockDim = dim_, gridDim = grid_;
    self = {&block_, &block_.warps[index / 32], int(index % 32)};
    try {
      (*kernel_)();
    } catch (const Stopped&) {
    } catch (const std::exception& error) {
      block_.fail("thread " + std::to_string(index) + ": " + error.what());
    }
    // an early return counts as an arrival at every later barrier, as on the device
    block_.syncthreads.drop();
    self.warp->exit(self.lane);
    block_.progress.alive.fetch_sub(1);
  }

  const unsigned threads_;
  Block block_;
  std::mutex launch_, done_mutex_;
  std::condition_variable done_;
  int running_ = 0;
  std::atomic<unsigned> epoch_{0};
  const std::function<void()>* kernel_ = nullptr;
  dim3 grid_, dim_;
  uint3 index_{};
};

// blocks from the last to the first: a result that changes depended on another block
inline bool reverse_blocks = false;

template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu ||
      grid.y > 65535 || grid.z > 65535) {
    throw Failure("invalid launch: " + std::to_string(threads) + " threads, grid (" + std::to_string(grid.x) + ", " +
                  std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")");
  }
  if (shared_bytes > kMaxShared) throw Failure("a block asks for " + std::to_string(shared_bytes) + " shared bytes");
  std::function<void()> call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  Pool::of(threads).run(grid, block, shared_bytes, call, reverse_blocks);
}

inline unsigned char* dynamic_shared() { return self.block->shared; }

// bar.sync id, threads: a barrier for a part of the block
inline void named_barrier(int id, int threads, Where where = Where::current()) {
  if (id < 0 || id >= kNamedBarriers || threads <= 0 || threads % 32) throw Failure("named barrier: bad id or count");
  self.block->named[id].expect(threads);
  self.block->named[id].arrive(where);
}

}  // namespace simt

#define SIMT_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()
#define SIMT_SHARED(T, name, N)                                       \
  static ::simt::StaticShared name##_memory(sizeof(T) * (N));         \
  T(&name)[N] = *static_cast<T(*)[N]>(name##_memory.data())

#include "simt_device.h"
