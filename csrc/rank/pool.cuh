// SPDX-License-Identifier: Apache-2.0
// Sums over the blocks of a row in any order of its elements, with the same bits in every run: fixed point, integer
// atomics. Summands are less than 2 in size, scaled by a power of two. Three pools, which offer the same:
//   SmallPool   rows up to 1,024 in shared memory: parts of 2^-31, a sum and its count in two 32-bit words
//   NarrowPool  rows up to 32,768 in shared memory: parts of 2^-31, the sum in two words, the count in a third
//   WidePool    float64, and rows in global memory: parts of 2^-(61 - log2 n), one 64-bit atomic, which in shared
//               memory is emulated by a loop
// One without counts (`counted` false) takes less memory. After `settle` what the elements of a block share lies over
// its sum.
#pragma once

#include "../common/group.cuh"
#include "../common/pairs.cuh"

namespace kdkernels {

constexpr int kSmallRow = 1024;
constexpr int kNarrowRow = 32768;

// blocks of two or more start at least two apart: the slot of a block is half its start
__host__ __device__ inline int pool_slots(int n) { return (n + 1) / 2; }

struct Total {
  double sum;  // in parts
  int count;   // of what was counted
};

struct SmallPool {
  // 2^43 + q, q the part: its last 22 bits, and those above. Sums of 1,024 of either fit their words, and leave the
  // count above bit 43
  struct Part {
    unsigned low, high;
    __device__ static Part none() { return {0, 0}; }
    __device__ Part then(const Part& next) const { return {low + next.low, high + next.high}; }
    __device__ Part over_warp() const {
      return {__reduce_add_sync(kAllLanes, low), __reduce_add_sync(kAllLanes, high)};
    }
  };
  unsigned* word;
  int apart;  // of the two words

  __host__ __device__ static size_t bytes(int n, bool) {
    return (static_cast<size_t>(8) * pool_slots(n) + 15) / 16 * 16;
  }
  __device__ static SmallPool at(void* memory, int n) { return {static_cast<unsigned*>(memory), pool_slots(n)}; }

  __device__ __forceinline__ double one() const { return 0x1p31; }
  // the last place of the sum is 2: its bits are those of 2^43 + q
  __device__ __forceinline__ Part part(double u, double scale) const {
    const long long bits = __double_as_longlong(fma(u, scale * 0x1p32, 0x1p53 + 0x1p44));
    return {static_cast<unsigned>(bits) & 0x3FFFFFu, static_cast<unsigned>(bits >> 22)};
  }
  // the same in parts of 2^-30
  __device__ __forceinline__ static Part whole_part(float u) {
    const int q = __float2int_rn(u * 0x1p30f);
    return {static_cast<unsigned>(q) << 1 & 0x3FFFFFu, static_cast<unsigned>(q >> 21) + (1u << 21)};
  }
  template <bool kCount, bool kSum>
  __device__ __forceinline__ void put(int slot, const Part& part) const {
    static_assert(kCount && kSum);
    atomicAdd(word + slot, part.low);
    atomicAdd(word + apart + slot, part.high);
  }
  // in parts of 2^-31
  __device__ __forceinline__ long long whole_total(int slot, int& count) const {
    const long long all = (static_cast<long long>(word[apart + slot]) << 22) + word[slot];
    count = static_cast<int>((all + (1ll << 42)) >> 43);
    return all - (static_cast<long long>(count) << 43);
  }
  __device__ __forceinline__ Total total(int slot) const {
    int count;
    const long long sum = whole_total(slot, count);
    return {whole(sum), count};
  }
  __device__ __forceinline__ void settle(int slot, double v) const { split_double(v, word[slot], word[apart + slot]); }
  __device__ __forceinline__ void settle(int slot, Pair v) const {
    word[slot] = __float_as_uint(v.high), word[apart + slot] = __float_as_uint(v.low);
  }
  __device__ __forceinline__ Pair shared_pair(int slot) const {
    return {__uint_as_float(word[slot]), __uint_as_float(word[apart + slot])};
  }
  __device__ __forceinline__ double shared(int slot) const { return joined_words(word[slot], word[apart + slot]); }
  template <int T>
  __device__ void clear(const Group<T>& group, int slots, bool) const {
    for (int i = group.rank(); i < slots; i += T) word[i] = word[apart + i] = 0;
    group.sync();
  }
};

struct NarrowPool {
  struct Part {
    unsigned low;  // 17 bits of one part; |high| <= 2^15
    int high, count;
    __device__ static Part none() { return {0, 0, 0}; }
    __device__ Part then(const Part& next) const { return {low + next.low, high + next.high, count + next.count}; }
    __device__ Part over_warp() const {
      return {__reduce_add_sync(kAllLanes, low), __reduce_add_sync(kAllLanes, high),
              __reduce_add_sync(kAllLanes, count)};
    }
  };
  unsigned* low;
  int* high;
  int* count;

  __host__ __device__ static size_t bytes(int n, bool counted) {
    return (static_cast<size_t>(counted ? 12 : 8) * pool_slots(n) + 15) / 16 * 16;
  }
  __device__ static NarrowPool at(void* memory, int n) {
    auto* words = static_cast<int*>(memory);
    return {reinterpret_cast<unsigned*>(words), words + pool_slots(n), words + 2 * pool_slots(n)};
  }
  __device__ __forceinline__ double one() const { return 0x1p31; }
  __device__ __forceinline__ Part part(double u, double scale) const {
    const long long q = rounded(u, scale * 0x1p31);
    return {static_cast<unsigned>(q) & 0x1FFFFu, static_cast<int>(q >> 17), 1};
  }
  template <bool kCount, bool kSum>
  __device__ __forceinline__ void put(int slot, const Part& part) const {
    if (kSum) atomicAdd(low + slot, part.low);
    if (kSum) atomicAdd(high + slot, part.high);
    if (kCount) atomicAdd(count + slot, part.count);
  }
  __device__ __forceinline__ Total total(int slot) const {
    return {fma(static_cast<double>(high[slot]), 0x1p17, static_cast<double>(low[slot])), count[slot]};
  }
  __device__ __forceinline__ void settle(int slot, double v) const {
    unsigned above;
    split_double(v, low[slot], above);
    high[slot] = static_cast<int>(above);
  }
  __device__ __forceinline__ double shared(int slot) const {
    return joined_words(low[slot], static_cast<unsigned>(high[slot]));
  }
  template <int T>
  __device__ void clear(const Group<T>& group, int slots, bool counted) const {
    for (int i = group.rank(); i < slots; i += T) {
      low[i] = 0, high[i] = 0;
      if (counted) count[i] = 0;
    }
    group.sync();
  }
};

struct WidePool {
  struct Part {
    long long sum;
    int count;
    __device__ static Part none() { return {0, 0}; }
    __device__ Part then(const Part& next) const { return {sum + next.sum, count + next.count}; }
    __device__ Part over_warp() const {
      Part all = *this;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) all.sum += __shfl_xor_sync(kAllLanes, all.sum, step);
      all.count = __reduce_add_sync(kAllLanes, count);
      return all;
    }
  };
  unsigned long long* sum;
  int* count;
  int bits;  // places after the point

  __host__ __device__ static size_t bytes(int n, bool counted) {
    return (static_cast<size_t>(counted ? 12 : 8) * pool_slots(n) + 15) / 16 * 16;
  }
  __device__ static WidePool at(void* memory, int n) {
    auto* sum = static_cast<unsigned long long*>(memory);
    return {sum, reinterpret_cast<int*>(sum + pool_slots(n)), 29 + __clz(n)};
  }
  __device__ __forceinline__ double one() const { return static_cast<double>(1ull << bits); }
  __device__ __forceinline__ Part part(double u, double scale) const { return {llrint(u * scale * one()), 1}; }
  template <bool kCount, bool kSum>
  __device__ __forceinline__ void put(int slot, const Part& part) const {
    if (kSum) atomicAdd(sum + slot, static_cast<unsigned long long>(part.sum));
    if (kCount) atomicAdd(count + slot, part.count);
  }
  __device__ __forceinline__ Total total(int slot) const {
    return {static_cast<double>(static_cast<long long>(sum[slot])), count[slot]};
  }
  __device__ __forceinline__ void settle(int slot, double v) const {
    sum[slot] = static_cast<unsigned long long>(__double_as_longlong(v));
  }
  __device__ __forceinline__ double shared(int slot) const {
    return __longlong_as_double(static_cast<long long>(sum[slot]));
  }
  template <int T>
  __device__ void clear(const Group<T>& group, int slots, bool counted) const {
    for (int i = group.rank(); i < slots; i += T) {
      sum[i] = 0;
      if (counted) count[i] = 0;
    }
    group.sync();
  }
};

// of the largest |u|, a power of two 2^e and its reciprocal
template <class Value>
struct Unit {
  static constexpr int kLeast = sizeof(Value) == 8 ? -1022 : -150;
  double to, back;
  __device__ static Unit of(double largest) {
    const int e = max(kLeast, min(exponent_of(largest), 1022));
    return {power_of_two(-e), power_of_two(e)};
  }
};

// a block whose sum stays in registers of a warp: elements that share one would queue at its address
template <class Pool>
struct Frequent {
  const Pool& pool;
  int slot;
  typename Pool::Part sum;

  // the more frequent one of two among a warp's first elements, if any has one. All lanes call, each with the slot of
  // its first element or -1
  __device__ Frequent(const Pool& pool, int first) : pool(pool), slot(-1), sum(Pool::Part::none()) {
    int most = 0;
    bool other = first >= 0;
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      const int leader = __ffs(static_cast<int>(__ballot_sync(kAllLanes, other))) - 1;
      const int found = __shfl_sync(kAllLanes, other ? first : -1, max(leader, 0));
      const int count = __popc(__ballot_sync(kAllLanes, other && first == found));
      if (count > most) {
        most = count;
        slot = found;
      }
      other = other && first != found;
    }
  }
  template <bool kCount, bool kSum>
  __device__ __forceinline__ void add(int where, const typename Pool::Part& part) {
    if (where == slot) {
      sum = sum.then(part);
    } else if (where >= 0) {
      pool.template put<kCount, kSum>(where, part);
    }
  }
  // all lanes of a warp call
  template <bool kCount, bool kSum>
  __device__ void finish() {
    const auto all = sum.over_warp();
    if (slot >= 0 && Group<32>::lane() == 0) pool.template put<kCount, kSum>(slot, all);
    sum = Pool::Part::none();
  }
  // goes over to another block. All lanes of a warp call
  template <bool kCount, bool kSum>
  __device__ __forceinline__ void follow(int where) {
    if (where == slot) return;
    finish<kCount, kSum>();
    slot = where;
  }
};

// the mean of every block over its sum; NaN in all where the unit is
template <class Pool, int T>
__device__ void settle_means(const Group<T>& group, const Pool& pool, int slots, double unit) {
  const double part = 1.0 / pool.one();
  for (int slot = group.rank(); slot < slots; slot += T) {
    const Total total = pool.total(slot);
    if (total.count || isnan(unit)) pool.settle(slot, quotient(total.sum, natural(total.count)) * part * unit);
  }
}

}  // namespace kdkernels
