// SPDX-License-Identifier: Apache-2.0
// Which block each position of a sorted row is in, and the lanes of a warp that look for a block's ends together.
#pragma once

#include "../common/group.cuh"

namespace kdkernels {

constexpr int kLeaf = 32;  // the most positions of a leaf: their block starts are the bits of one word

// one word in 33 stays empty, so that threads a power of two apart do not meet in one bank
__host__ __device__ __forceinline__ constexpr int padded(int p) { return p + (p >> 5); }

struct Range {
  int a, b;
};
// the place of the last bit that is set, 32 if none is: sooner than by __ffs, which turns the word around first
__device__ __forceinline__ int lowest_bit(unsigned word) { return __popc(~word & (word - 1)); }

using Place = unsigned short;  // a position of a short row

// the least b with 2^b >= count
__host__ __device__ constexpr int bits_of(int count) { return count > 1 ? 1 + bits_of((count + 1) / 2) : 0; }

// which block each position is in: of each leaf, the starts inside it and the ends of the blocks that leave it
struct Blocks {
  unsigned* starts;  // [leaves], bit i: a block starts at position leaf << shift + i
  int* before;       // start of the block that holds the leaf's first position
  int* after;        // end of the block that holds its last one
  Range* merged;     // [leaves / 2], what a level of merges found
  Place* list;       // lists.cuh, over `merged`: first positions of blocks, [m + 1], then their counts
  int shift;         // log2 of the positions of a leaf

  __device__ __forceinline__ bool starts_at(int p) const {
    return starts[p >> shift] >> (p & ((1 << shift) - 1)) & 1u;
  }
  // kTogether: what is seldom needed is loaded with the rest, not after it
  template <bool kTogether = false>
  __device__ __forceinline__ Range find(int p) const {
    const int leaf = p >> shift, first = leaf << shift;
    int outer_a = 0, outer_b = 0;
    if constexpr (kTogether) outer_a = before[leaf], outer_b = after[leaf];
    const unsigned word = starts[leaf], upto = (2u << (p - first)) - 1;  // 2u << 31 is 0
    const unsigned low = word & upto, high = word & ~upto;
    return {low ? first + 31 - __clz(static_cast<int>(low)) : kTogether ? outer_a : before[leaf],
            high ? first + lowest_bit(high) : kTogether ? outer_b : after[leaf]};
  }
};

// lanes of a warp that look for the ends of one block together, a power of two of them; all lanes of the warp call
struct Team {
  int size, shift, lane;

  // as many as `pairs`, one or more, leave for each of a power of two of threads
  __device__ static Team of(int threads, int pairs) {
    return of(max(0, min(5, __clz(pairs - 1) - 1 - __clz(threads))));
  }
  __device__ static Team of(int shift) { return {1 << shift, shift, Group<32>::lane() & ((1 << shift) - 1)}; }
  __device__ __forceinline__ int first() const { return Group<32>::lane() - lane; }
  // lanes of the team before the first that says no
  __device__ __forceinline__ int joined(bool yes) const {
    return min(lowest_bit(~__ballot_sync(kAllLanes, yes) >> first()), size);
  }
  // what lane `which` of the team holds; anything for one that does not exist
  __device__ __forceinline__ int from(int value, int which) const {
    return __shfl_sync(kAllLanes, value, (first() + which) & 31);
  }
};

}  // namespace kdkernels
