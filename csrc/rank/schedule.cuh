// SPDX-License-Identifier: Apache-2.0
// Which kernel runs for which rows. Free of torch: raw pointers, a stream and a function that allocates, so that the
// host emulation runs the same choices. COST.md says what each schedule costs.
//   n <= 1,024   one warp a row, several rows to a block; few rows of n > 128: 128 threads a row
//   n <= 12,288  one block a row, all in shared memory (float64: 8,192)
//   n <= 23,552  one block a row, sums in global memory, where a block may have 200 KiB (sm_80: n <= 15,500; not
//                float64)
//   beyond       keys, sort and fit by kernels of their own over a workspace
#pragma once

#include <algorithm>

#include "backward.cuh"
#include "long_rank.cuh"
#include "soft_sort.cuh"
#include "spearman.cuh"

namespace kdkernels {

enum class Schedule { kAuto, kWarp, kBlock, kBig, kLong };

struct Device {
  size_t shared;                        // bytes a block may have
  Schedule forced = Schedule::kAuto;    // tests: this one wherever it can run
};

constexpr int64_t kFewRows = 2112;      // below: 16 warps a multiprocessor of 132 are not reached, threads are free
constexpr int kWarpRows = 4;            // the most of a block
constexpr int64_t kGrid = 1 << 20;      // the most blocks of a launch, each then takes several rows
constexpr int64_t kOutsideGrid = 148;   // blocks with a workspace of their own: a multiprocessor's each
constexpr size_t kBatchBytes = size_t(1) << 29;
constexpr int kFewItems = 8, kBlockItems = 16, kLargeItems = 24;
constexpr int kRunItems = 23;  // of a run of two: odd, so that threads do not meet in one bank
constexpr int kFewThreads = 128, kBlockThreads = 256, kLargeThreads = 512;
#ifdef KDK_SIMT
constexpr int kLongThreads = 64, kCountThreads = 64;  // each is a thread of the operating system
#else
constexpr int kLongThreads = 512, kCountThreads = 1024;
#endif

inline unsigned grid_of(int64_t blocks, int64_t most = kGrid) {
  return static_cast<unsigned>(blocks < most ? blocks : most);
}
inline int64_t blocks_of(int64_t rows, int slots) { return (rows + slots - 1) / slots; }

// leaves of 4 to 32 positions, as short as the threads allow
inline int shift_of(int n, int threads) {
  int shift = 2;
  while (shift < 5 && leaves_of(n, shift) > threads) ++shift;
  return shift;
}

template <int T>
constexpr int slots_of() {
  return T == 32 ? kWarpRows : 1;
}

// rows of a block of warps, of so many bytes each: fewer where that leaves more warps on a multiprocessor, which has
// the memory of its largest block, one reserved KiB for each, and room for 16 blocks and the registers of 16 warps
inline int warp_rows(size_t bytes, const Device& device) {
  auto resident = [&](int rows) {
    const int blocks = static_cast<int>((device.shared + 1024) / (rows * bytes + 1024));
    return std::min(16, rows * std::min(16, blocks));
  };
  int best = kWarpRows;
  for (int rows = kWarpRows - 1; rows > 0; --rows) {
    if (resident(rows) > resident(best)) best = rows;
  }
  return best;
}

template <class Value, int T, int kItems>
bool launch_ranks(RankCall call, const Device& device, cudaStream_t stream) {
  call.shift = shift_of(call.n, T);
  const size_t bytes = row_bytes<Value, T, kItems>(call.n, call.shift);
  const int slots = T == 32 ? warp_rows(bytes, device) : 1;
  if (call.n > T * kItems || slots * bytes > device.shared) return false;
  KDK_LAUNCH((rank_rows_kernel<Value, T, kItems>), grid_of(blocks_of(call.rows, slots)), T * slots, slots * bytes,
             stream, call);
  return true;
}

template <class Value>
bool launch_warp_ranks(const RankCall& call, const Device& device, cudaStream_t stream) {
  if constexpr (sizeof(Value) == 8) {
    return launch_ranks<Value, 32, 4>(call, device, stream);
  } else {
    if (call.n <= 32) return launch_ranks<Value, 32, 1>(call, device, stream);
    if (call.n <= 128) return launch_ranks<Value, 32, 4>(call, device, stream);
    if (call.n <= 512) return launch_ranks<Value, 32, 16>(call, device, stream);
    return launch_ranks<Value, 32, 32>(call, device, stream);
  }
}

template <class Value>
bool launch_block_ranks(const RankCall& call, const Device& device, cudaStream_t stream) {
  if (call.n <= kFewThreads * kFewItems) {
    return launch_ranks<Value, kFewThreads, kFewItems>(call, device, stream);
  }
  if constexpr (sizeof(Value) == 8) {
    return launch_ranks<Value, kLargeThreads, kBlockItems>(call, device, stream);
  } else {
    if (call.n <= kBlockThreads * kBlockItems) {
      return launch_ranks<Value, kBlockThreads, kBlockItems>(call, device, stream);
    }
    return launch_ranks<Value, kLargeThreads, kLargeItems>(call, device, stream);
  }
}

template <class Value, class Allocate>
bool launch_big_ranks(LongCall call, const Device& device, Allocate allocate, cudaStream_t stream) {
  RankCall& rank = call.rank;
  rank.shift = 5;
  const size_t bytes = big_row_bytes<Value, kLargeThreads, kRunItems>(rank.n, rank.shift);
  if (rank.n > 2 * kLargeThreads * kRunItems || bytes > device.shared) return false;
  const unsigned grid = grid_of(rank.rows, kOutsideGrid);
  call.memory = static_cast<unsigned char*>(allocate(grid * sizeof(double) * (padded(rank.n) + 1)));
  KDK_LAUNCH((rank_big_kernel<Value, kLargeThreads, kRunItems>), grid, kLargeThreads, bytes, stream, call);
  return true;
}

template <class Value, class Allocate>
void launch_long_ranks(LongCall call, const Device& device, Allocate allocate, cudaStream_t stream) {
  using Key = typename KeyOf<Value>::Key;
  const RankCall whole = call.rank;
  const int n = whole.n;
  // a float row may turn out to hold half values alone: every one has a table, and an empty segment if it does
  const size_t bins = kScratchBytes + kHalfCodes * sizeof(int);
  const bool counts = sizeof(Key) == 4 && bins <= device.shared;
  const bool sorts = !counts || !is_half(whole.x.dtype);
  const size_t row_size = (sorts ? 3 : 2) * sizeof(Key) * static_cast<size_t>(n) + (counts ? kCodes * sizeof(int) : 0);
  int64_t batch = static_cast<int64_t>(kBatchBytes / row_size);
  batch = batch < 1 ? 1 : batch < whole.rows ? batch : whole.rows;
  const size_t keys = sizeof(Key) * static_cast<size_t>(n) * batch;
  call.keys = allocate(keys);
  call.sorted = allocate(keys);
  call.valid = static_cast<int*>(allocate(sizeof(int) * batch));
  call.format = static_cast<int*>(allocate(sizeof(int) * batch));
  call.table = counts ? static_cast<int*>(allocate(sizeof(int) * kCodes * batch)) : nullptr;
  size_t sort_size = 0;
  void* sort_memory = nullptr;
  const Segments<NeedsSort> segments{n, {call.valid, call.format}};  // cub keeps one more copy of the keys
  if (sorts) {
    sort_segments<Key>(nullptr, &sort_size, nullptr, nullptr, batch, segments, stream);
    sort_memory = allocate(sort_size > 0 ? sort_size : 1);
  }
  call.rank.shift = 5;
  const unsigned outside = grid_of(batch, kOutsideGrid);
  const size_t fit = layout_of<Value>(n, call.rank.shift, true, 0).total;
  call.memory = static_cast<unsigned char*>(allocate(outside * fit));
  for (call.first = 0; call.first < whole.rows; call.first += batch) {
    const int64_t left = whole.rows - call.first;
    call.rank.rows = left < batch ? left : batch;
    KDK_LAUNCH((prepare_keys_kernel<Value, kLongThreads>), grid_of(call.rank.rows), kLongThreads, kScratchBytes, stream,
               call);
    if (counts) {
      KDK_LAUNCH((count_keys_kernel<kCountThreads>), grid_of(call.rank.rows), kCountThreads, bins, stream, call);
    }
    if (sorts) {
      sort_segments(sort_memory, &sort_size, static_cast<const Key*>(call.keys), static_cast<Key*>(call.sorted),
                    call.rank.rows, segments, stream);
    }
    KDK_LAUNCH((finish_ranks_kernel<Value, kLongThreads>), grid_of(call.rank.rows, outside), kLongThreads,
               kScratchBytes + kParts * sizeof(Key), stream, call);
  }
}

template <class Value, class Allocate>
void launch_ranks_of(const RankCall& call, const Device& device, Allocate allocate, cudaStream_t stream) {
  LongCall whole{};
  whole.rank = call;
  const Schedule forced = device.forced;
  const bool automatic = forced == Schedule::kAuto;
  const bool few = call.rows < kFewRows && call.n > 128;
  if (forced == Schedule::kWarp || (automatic && !few)) {
    if (launch_warp_ranks<Value>(call, device, stream)) return;
  }
  if (forced != Schedule::kLong && forced != Schedule::kBig) {
    if (launch_block_ranks<Value>(call, device, stream)) return;
  }
  if constexpr (sizeof(Value) == 4) {
    if (forced != Schedule::kLong && launch_big_ranks<Value>(whole, device, allocate, stream)) return;
  }
  launch_long_ranks<Value>(whole, device, allocate, stream);
}

// wide: ranks are double
template <class Allocate>
void rank_rows(const RankCall& call, bool wide, const Device& device, Allocate allocate,
               cudaStream_t stream) {
  if (call.rows == 0) return;
  wide ? launch_ranks_of<double>(call, device, allocate, stream)
       : launch_ranks_of<float>(call, device, allocate, stream);
}

// the kernels of a backward pass, by the threads of a row, and the bytes of its sums
template <class Value, bool kKl>
struct RankBackward {
  template <bool kWide, int T>
  static auto kernel() {
    return rank_rows_backward_kernel<Value, kKl, kWide, T>;
  }
  template <bool kWide, int T>
  static size_t bytes(int n) {
    using Pool = PoolOf<kWide, T, kKl>;
    return Pool::bytes(room_of<Pool>(n), true);
  }
};
template <class Value, bool kKl>
struct SortBackward {
  template <bool kWide, int T>
  static auto kernel() {
    return sort_rows_backward_kernel<Value, kKl, kWide, T>;
  }
  template <bool kWide, int T>
  static size_t bytes(int n) {
    using Pool = PoolOf<kWide, T, kKl>;
    return (kKl ? 2 : 1) * Pool::bytes(room_of<Pool>(n), !kKl);
  }
};

// false: the sums do not fit into shared memory
template <class Kernels, bool kWide, int T>
bool launch_backward(BackwardCall call, const Device& device, cudaStream_t stream) {
  call.pool_bytes = Kernels::template bytes<kWide, T>(call.n);
  const size_t shared = slots_of<T>() * (Group<T>::kBytes + call.pool_bytes);
  if (shared > device.shared || device.forced == Schedule::kLong) return false;
  KDK_LAUNCH((Kernels::template kernel<kWide, T>()), grid_of(blocks_of(call.rows, slots_of<T>())), T * slots_of<T>(),
             shared, stream, call);
  return true;
}
template <class Kernels, class Allocate>
void launch_outside_backward(BackwardCall call, Allocate allocate, cudaStream_t stream) {
  constexpr int T = kOutsideThreads;
  call.pool_bytes = Kernels::template bytes<true, T>(call.n);
  const unsigned grid = grid_of(call.rows, 2 * kOutsideGrid);
  call.pool = static_cast<unsigned char*>(allocate(grid * call.pool_bytes));
  KDK_LAUNCH((Kernels::template kernel<true, T>()), grid, T, Group<T>::kBytes, stream, call);
}

template <class Value, class Kernels, class Allocate>
void backward(const BackwardCall& call, const Device& device, Allocate allocate, cudaStream_t stream) {
  if constexpr (sizeof(Value) == 8) {
    if (launch_backward<Kernels, true, kBlockThreads>(call, device, stream)) return;
  } else {
    const bool warp = device.forced == Schedule::kWarp || (device.forced == Schedule::kAuto &&
                                                           (call.rows >= kFewRows || call.n <= 128));
    if (warp && call.n <= kSmallRow && launch_backward<Kernels, false, 32>(call, device, stream)) return;
    if (call.n <= kNarrowRow && launch_backward<Kernels, false, kBlockThreads>(call, device, stream)) return;
  }
  launch_outside_backward<Kernels>(call, allocate, stream);
}

template <class Allocate>
void rank_rows_backward(const BackwardCall& call, bool wide, bool kl, const Device& device, Allocate allocate,
                        cudaStream_t stream) {
  if (call.rows == 0 || call.n == 0) return;
  if (wide) {
    kl ? backward<double, RankBackward<double, true>>(call, device, allocate, stream)
       : backward<double, RankBackward<double, false>>(call, device, allocate, stream);
  } else {
    kl ? backward<float, RankBackward<float, true>>(call, device, allocate, stream)
       : backward<float, RankBackward<float, false>>(call, device, allocate, stream);
  }
}

template <class Allocate>
void sort_rows_backward(const BackwardCall& call, bool wide, bool kl, const Device& device, Allocate allocate,
                        cudaStream_t stream) {
  if (call.rows == 0 || call.n == 0) return;
  if (wide) {
    kl ? backward<double, SortBackward<double, true>>(call, device, allocate, stream)
       : backward<double, SortBackward<double, false>>(call, device, allocate, stream);
  } else {
    kl ? backward<float, SortBackward<float, true>>(call, device, allocate, stream)
       : backward<float, SortBackward<float, false>>(call, device, allocate, stream);
  }
}

template <class Value, class Allocate>
void launch_sorts_of(SortCall call, const Device& device, Allocate allocate, cudaStream_t stream) {
  auto bytes = [&](int threads, int slots, size_t scratch) {
    call.shift = shift_of(call.n, threads);
    return slots * (scratch + layout_of<Value>(call.n, call.shift, true, call.n).total);
  };
  const bool few = call.rows < kFewRows && call.n > 128;
  if (device.forced == Schedule::kWarp || (device.forced == Schedule::kAuto && !few)) {
    const int slots = warp_rows(bytes(32, 1, Group<32>::kBytes), device);
    const size_t shared = bytes(32, slots, Group<32>::kBytes);
    if (call.n <= 1024 && shared <= device.shared) {
      KDK_LAUNCH((sort_rows_kernel<Value, 32, false>), grid_of(blocks_of(call.rows, slots)), 32 * slots, shared,
                 stream, call);
      return;
    }
  }
  const size_t shared = bytes(kBlockThreads, 1, Group<kBlockThreads>::kBytes);
  if (shared <= device.shared && device.forced != Schedule::kLong) {
    KDK_LAUNCH((sort_rows_kernel<Value, kBlockThreads, false>), grid_of(call.rows), kBlockThreads, shared, stream,
               call);
    return;
  }
  bytes(kLongThreads, 1, 0);
  const unsigned grid = grid_of(call.rows, kOutsideGrid);
  const size_t outside = layout_of<Value>(call.n, call.shift, true, call.n).total;
  call.memory = static_cast<unsigned char*>(allocate(grid * outside));
  KDK_LAUNCH((sort_rows_kernel<Value, kLongThreads, true>), grid, kLongThreads, kScratchBytes, stream, call);
}

template <class Allocate>
void sort_rows(const SortCall& call, bool wide, const Device& device, Allocate allocate, cudaStream_t stream) {
  if (call.rows == 0) return;
  wide ? launch_sorts_of<double>(call, device, allocate, stream)
       : launch_sorts_of<float>(call, device, allocate, stream);
}

template <class Value, int T, int kItems>
bool launch_spearman(SpearmanCall call, const Device& device, cudaStream_t stream) {
  call.shift = shift_of(call.n, T);
  const size_t bytes = slots_of<T>() * pair_bytes<Value, T, kItems>(call.n, call.shift);
  if (call.n > T * kItems || bytes > device.shared) return false;
  KDK_LAUNCH((spearman_rows_kernel<Value, T, kItems>), grid_of(blocks_of(call.rows, slots_of<T>())),
             T * slots_of<T>(), bytes, stream, call);
  return true;
}

template <class Value>
bool launch_fused_spearman(const SpearmanCall& call, const Device& device, cudaStream_t stream) {
  if (device.forced == Schedule::kBig || device.forced == Schedule::kLong) return false;
  // many rows, but no more than a workspace of six may hold: a warp a side and a kernel for each pass are done sooner
  // than a block a pair (COST.md)
  const bool fits = static_cast<size_t>(call.rows) * call.n * 6 * sizeof(Value) <= kBatchBytes;
  const bool many =
      device.forced == Schedule::kWarp || (device.forced == Schedule::kAuto && call.rows >= kFewRows && fits);
  if (many && sizeof(Value) == 4 && call.n > 128 && call.n <= kSmallRow) return false;
  if (call.n <= 128 && device.forced != Schedule::kBlock) {
    if (launch_spearman<Value, 32, 4>(call, device, stream)) return true;
  }
  return launch_spearman<Value, kFewThreads, kFewItems>(call, device, stream);
}

template <class Value, class Allocate>
void spearman_of(const SpearmanCall& call, const Device& device, Allocate allocate, cudaStream_t stream) {
  if (launch_fused_spearman<Value>(call, device, stream)) return;
  constexpr int kDtype = sizeof(Value) == 8 ? kDouble : kFloat;
  const size_t size = static_cast<size_t>(call.rows) * call.n;
  const Rows side[2] = {call.x, call.y};
  void* out[2] = {call.dx, call.dy};
  void *rank[2], *gradient[2];
  int* blocks[2];
  double* eps[2];
  for (int i = 0; i < 2; ++i) {
    const bool hard = i == 1 && call.hard_target;
    rank[i] = allocate(size * sizeof(Value));
    gradient[i] = out[i] ? allocate(size * sizeof(Value)) : nullptr;
    blocks[i] = out[i] ? static_cast<int*>(allocate(size * sizeof(int))) : nullptr;
    eps[i] = static_cast<double*>(allocate(call.rows * sizeof(double)));
    const Strength strength{nullptr, false, hard ? 0.0 : call.strength, !hard && call.relative};
    const RankCall ranks{side[i], side[1 - i], strength, call.kl, false, call.rows, call.n, 0,
                         rank[i], blocks[i], eps[i], true};
    launch_ranks_of<Value>(ranks, device, allocate, stream);
  }
  const TailCall tail{rank[0],   rank[1], eps[0],     call.x,      call.y,
                      call.rows, call.n,  call.value, gradient[0], gradient[1]};
  KDK_LAUNCH((spearman_tail_kernel<Value, kBlockThreads>), grid_of(call.rows), kBlockThreads, kScratchBytes, stream,
             tail);
  for (int i = 0; i < 2; ++i) {
    if (!out[i]) continue;
    const Rows u{gradient[i], call.n, kDtype}, r{rank[i], call.n, kDtype};
    const BackwardCall pull{u,         r,      blocks[i], call.n, eps[i],  false,
                            call.rows, call.n, out[i],    kDtype, nullptr, 0};
    call.kl ? backward<Value, RankBackward<Value, true>>(pull, device, allocate, stream)
            : backward<Value, RankBackward<Value, false>>(pull, device, allocate, stream);
  }
}

template <class Allocate>
void spearman_rows(const SpearmanCall& call, bool wide, const Device& device, Allocate allocate,
                   cudaStream_t stream) {
  if (call.rows == 0) return;
  wide ? spearman_of<double>(call, device, allocate, stream) : spearman_of<float>(call, device, allocate, stream);
}

}  // namespace kdkernels
