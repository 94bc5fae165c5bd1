// SPDX-License-Identifier: Apache-2.0
// Ascending keys of a group, T * kItems of them: before, in any order; after, thread t holds those of the positions
// t * kItems ... Up to kBitonic keys by a bitonic network in registers, shuffles and, across warps, shared memory:
// about 1.7 (log2 N)(log2 N + 1) / 2 instructions a key, 90 for 1,024. Above, cub's radix sort (under KDK_SIMT a host
// sort).
#pragma once

#include "group.cuh"

#ifdef KDK_SIMT
#include <algorithm>
#else
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#endif

namespace kdkernels {

constexpr int kBitonic = 1024;

template <class Key>
__device__ __forceinline__ void order(Key& low, Key& high) {
  const Key a = low, b = high;
  low = a < b ? a : b;
  high = a < b ? b : a;
}

// the steps of distance kItems / 2 ... 1, inside a thread
template <int kItems, class Key>
__device__ __forceinline__ void merge_own(Key (&item)[kItems]) {
#pragma unroll
  for (int distance = kItems / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (!(j & distance)) order(item[j], item[j | distance]);
    }
  }
}

// the partner's item for each of the own; `turned` reads its items from the last to the first
template <int T, int kItems, class Key>
__device__ __forceinline__ void exchange(Key (&item)[kItems], int partner, bool turned, Key* buffer) {
  const int t = Group<T>::rank(), apart = partner ^ t;
  Key other[kItems];
  if (T == 32 || apart < 32) {
    if (turned) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) other[j] = __shfl_xor_sync(kAllLanes, item[kItems - 1 - j], apart);
    } else {
#pragma unroll
      for (int j = 0; j < kItems; ++j) other[j] = __shfl_xor_sync(kAllLanes, item[j], apart);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kItems; ++j) buffer[j * T + t] = item[j];
    Group<T>::sync();
#pragma unroll
    for (int j = 0; j < kItems; ++j) other[j] = buffer[(turned ? kItems - 1 - j : j) * T + partner];
    Group<T>::sync();
  }
  const bool low = t < partner;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const bool keep = low == (item[j] < other[j]);
    item[j] = keep ? item[j] : other[j];
  }
}

template <int T, int kItems, class Key>
__device__ void bitonic_sort(Key (&item)[kItems], Key* buffer) {
#pragma unroll
  for (int size = 2; size <= kItems; size *= 2) {
    // the first step of a merge pairs mirrored positions, so that every pair is put in ascending order
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j < (j ^ (size - 1))) order(item[j], item[j ^ (size - 1)]);
    }
#pragma unroll
    for (int distance = size / 4; distance > 0; distance /= 2) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (!(j & distance)) order(item[j], item[j | distance]);
      }
    }
  }
  const int t = Group<T>::rank();
#pragma unroll 1
  for (int threads = 2; threads <= T; threads *= 2) {
    exchange<T>(item, t ^ (threads - 1), true, buffer);
#pragma unroll 1
    for (int apart = threads / 4; apart > 0; apart /= 2) exchange<T>(item, t ^ apart, false, buffer);
    merge_own(item);
  }
}

// bytes of shared memory that sorting needs
template <class Key, int T, int kItems>
__host__ __device__ constexpr size_t sort_bytes() {
  if constexpr (T == 32) {
    return 0;
  } else if constexpr (T * kItems <= kBitonic) {
    return T * kItems * sizeof(Key);
  } else {
#ifdef KDK_SIMT
    return T * kItems * sizeof(Key);
#else
    return sizeof(typename cub::BlockRadixSort<Key, T, kItems>::TempStorage);
#endif
  }
}

// of keys that are in order where their bits from `low` on are. Every thread has left `memory` when this returns
template <int T, int kItems, class Key>
__device__ void sort_keys(Key (&item)[kItems], void* memory, [[maybe_unused]] int low = 0) {
  if constexpr (T * kItems <= kBitonic) {
    bitonic_sort<T>(item, static_cast<Key*>(memory));
  } else {
#ifdef KDK_SIMT
    Key* buffer = static_cast<Key*>(memory);
    for (int j = 0; j < kItems; ++j) buffer[Group<T>::rank() * kItems + j] = item[j];
    Group<T>::sync();
    if (Group<T>::rank() == 0) std::sort(buffer, buffer + T * kItems);
    Group<T>::sync();
    for (int j = 0; j < kItems; ++j) item[j] = buffer[Group<T>::rank() * kItems + j];
#else
    using Sort = cub::BlockRadixSort<Key, T, kItems>;
    Sort(*static_cast<typename Sort::TempStorage*>(memory)).Sort(item, low, 8 * sizeof(Key));
#endif
    Group<T>::sync();
  }
}

// where rows [rows, n] start and end: a batch is small enough for int (schedule.cuh). One that is not wanted ends where
// it starts, which is read on the device
template <class Wanted>
struct Segments {
  int n;
  Wanted wanted;
  struct Start {
    int n;
    __host__ __device__ int operator()(int row) const { return row * n; }
  };
  struct End {
    int n;
    Wanted wanted;
    __host__ __device__ int operator()(int row) const { return row * n + (wanted(row) ? n : 0); }
  };
};

// rows of keys, each wanted one sorted ascending from `from` into `to`; memory null: only *bytes is set
template <class Key, class Wanted>
void sort_segments(void* memory, size_t* bytes, const Key* from, Key* to, int64_t rows,
                   const Segments<Wanted>& segments, cudaStream_t stream) {
  const typename Segments<Wanted>::Start start{segments.n};
  const typename Segments<Wanted>::End end{segments.n, segments.wanted};
#ifdef KDK_SIMT
  (void)stream;
  if (memory == nullptr) {
    *bytes = 1;
    return;
  }
  for (int row = 0; row < rows; ++row) {
    if (start(row) < end(row)) simt::sorted_segments.push_back(row);
    std::copy(from + start(row), from + end(row), to + start(row));
    std::sort(to + start(row), to + end(row));
  }
#else
  const thrust::counting_iterator<int> row(0);
  check_cuda(cub::DeviceSegmentedRadixSort::SortKeys(
                 memory, *bytes, from, to, static_cast<int>(rows) * segments.n, static_cast<int>(rows),
                 thrust::make_transform_iterator(row, start),
                 thrust::make_transform_iterator(row, end), 0, static_cast<int>(8 * sizeof(Key)), stream),
             "sort of long rows");
#endif
}

}  // namespace kdkernels
