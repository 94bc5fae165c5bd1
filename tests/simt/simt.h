// SPDX-License-Identifier: Apache-2.0
// CUDA kernels on the host: under a sanitizer a CUDA thread is an OS thread and every barrier a real one, so that it
// sees what the kernels do; elsewhere on Linux the threads are fibers, many times faster.
// Blocks run one after another; shared memory holds garbage when a block starts.
// Checked beside the results: all threads meet at the same __syncthreads, the lanes of a warp collective name the same
// mask, no lane reads one that does not take part, and a barrier that cannot complete ends the launch with a report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <type_traits>
#include <utility>

#include "simt_block.h"

namespace simt {

// segments that a segmented sort on the host, in the place of cub's, did not find empty
inline std::vector<int> sorted_segments;

constexpr unsigned kMaxThreads = 1024;      // of a block
constexpr std::size_t kMaxShared = 232448;  // bytes of a block, sm_90 and later

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

}  // namespace simt

#ifdef KDK_SIMT_FIBERS
#include "simt_fibers.h"
#else
#include "simt_threads.h"
#endif

namespace simt {

// Runs launches of one block size, block after block; a crew (simt_threads.h, simt_fibers.h) runs a block's threads.
class Runner {
 public:
  static Runner& of(unsigned threads) {
    // never destroyed: a crew's OS threads sleep until the process ends
    static auto* runners = new std::map<unsigned, std::unique_ptr<Runner>>;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    auto& runner = (*runners)[threads];
    if (!runner) runner.reset(new Runner(threads));
    return *runner;
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
  explicit Runner(unsigned threads)
      : threads_(threads), block_(threads), crew_(threads, block_, [this](unsigned index) { run_thread(index); }) {}

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
    crew_.run(garbage);
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
    block_.warps[index / 32].exit(int(index % 32));
    block_.progress.alive.fetch_sub(1);
  }

  const unsigned threads_;
  Block block_;
  std::mutex launch_;
  const std::function<void()>* kernel_ = nullptr;
  dim3 grid_, dim_;
  uint3 index_{};
  Crew crew_;
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
  Runner::of(threads).run(grid, block, shared_bytes, call, reverse_blocks);
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
