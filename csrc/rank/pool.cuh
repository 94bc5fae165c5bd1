// SPDX-License-Identifier: Apache-2.0
// Sums over the blocks of a row in any order of its elements, with the same bits in every run: fixed point, integer
// atomics. Summands lie in [-1, 1]; one is rounded to 2^-33 (narrow: two native 32-bit shared atomics, rows up to
// 32,768) or 2^-(62 - log2 n) (wide: one 64-bit atomic, emulated by a loop in shared memory, for float64 and rows in
// global memory). A row whose elements share a block would queue at one address: equal slots of a warp are added up
// first.
#pragma once

#include "../common/group.cuh"

namespace kdkernels {

constexpr int kNarrowRow = 32768;   // |high| <= 2^15 and low < 2^17: sums of 2^15 of them fit 32 bits
constexpr int kPoolSlotBytes = 12;  // 8 of the sum, 4 of the count
constexpr int kSharedSlots = 2;     // groups of equal slots that a warp adds up before it goes one by one

// blocks of two or more start at least two apart: the slot of a block is half its start
__host__ __device__ inline int pool_slots(int n) { return (n + 1) / 2; }

template <bool kWide>
struct Pool {
  unsigned long long* sum;  // narrow: [slots] low words, then [slots] high words
  int* count;
  int slots;
  int bits;  // wide: places after the point

  __device__ static Pool at(void* memory, int n) {
    const int slots = pool_slots(n);
    auto* sum = static_cast<unsigned long long*>(memory);
    return {sum, reinterpret_cast<int*>(sum + slots), slots, 30 + __clz(n)};
  }
  __device__ __forceinline__ unsigned* low() const { return reinterpret_cast<unsigned*>(sum); }
  __device__ __forceinline__ int* high() const { return reinterpret_cast<int*>(sum) + slots; }

  template <int T>
  __device__ void clear(const Group<T>& group) const {
    for (int i = group.rank(); i < slots; i += T) {
      sum[i] = 0;
      count[i] = 0;
    }
    group.sync();
  }

  // all lanes of a warp call; those without a part have active = false
  template <bool kCount, bool kSum>
  __device__ void add(int slot, bool active, double part) const {
    const double scale = kWide ? static_cast<double>(1ull << bits) : 0x1p32;
    const long long q = kSum && active ? llrint(part * scale) : 0;
    const unsigned q_low = static_cast<unsigned>(q) & 0x1FFFFu;
    const int q_high = static_cast<int>(q >> 17);
#pragma unroll 1
    for (int round = 0; round < kSharedSlots; ++round) {
      const unsigned left = __ballot_sync(kAllLanes, active);
      if (!left) return;
      const int leader = __ffs(static_cast<int>(left)) - 1;
      const int wanted = __shfl_sync(kAllLanes, slot, leader);  // all lanes take part, the idle ones too
      const bool same = active && slot == wanted;
      const unsigned members = __ballot_sync(kAllLanes, same);
      if (__popc(members) < 3) break;
      long long total = 0;
      unsigned total_low = 0;
      int total_high = 0;
      if (kSum && kWide) {
        total = same ? q : 0;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      } else if (kSum) {
        total_low = __reduce_add_sync(kAllLanes, same ? q_low : 0u);
        total_high = __reduce_add_sync(kAllLanes, same ? q_high : 0);
      }
      if (Group<32>::lane() == leader) put<kCount, kSum>(slot, total, total_low, total_high, __popc(members));
      active = active && !same;
    }
    if (active) put<kCount, kSum>(slot, q, q_low, q_high, 1);
  }

  template <bool kCount, bool kSum>
  __device__ __forceinline__ void put(int slot, long long q, unsigned q_low, int q_high, int c) const {
    if (kSum && kWide) atomicAdd(sum + slot, static_cast<unsigned long long>(q));
    if (kSum && !kWide) {
      atomicAdd(low() + slot, q_low);
      atomicAdd(high() + slot, q_high);
    }
    if (kCount) atomicAdd(count + slot, c);
  }

  __device__ __forceinline__ double total(int slot) const {
    if (kWide) return static_cast<double>(static_cast<long long>(sum[slot])) / static_cast<double>(1ull << bits);
    return (static_cast<double>(high()[slot]) * 0x1p17 + static_cast<double>(low()[slot])) * 0x1p-32;
  }
};

// J u of one row, J = d rank / d theta. each(visit) calls visit(i, u, r, name) as often in every lane of a warp, with
// name -1 where there is nothing; store(i, g) takes what it gives. u is scaled by the row's largest
template <bool kKl, bool kWide, int T, class Each, class Store>
__device__ void rank_gradient(const Group<T>& group, const Pool<kWide>& pool, double eps, Each each, Store store) {
  double largest = 0.0;
  bool finite = true;
  pool.clear(group);
  each([&](int, double u, double, int name) {
    if (name >= 0) {
      finite = finite && isfinite(u);
      largest = fmax(largest, fabs(u));
    }
    if (kKl) pool.template add<true, false>(name >> 1, name >= 0, 0.0);
  });
  largest = group.reduce(largest, [](double a, double b) { return fmax(a, b); });
  const double unit = group.any(!finite) ? static_cast<double>(NAN) : largest > 0.0 ? largest : 1.0;
  // R_B = sum_B w is known exactly from where the block stands
  auto weight = [&](double r, int name) {
    const double c = pool.count[name >> 1];
    return r / (0.5 * c * (2 * name + c + 1));
  };
  group.sync();
  if (isfinite(unit)) {
    each([&](int, double u, double r, int name) {
      double part = 0.0;
      if (name >= 0) part = kKl ? fmin(weight(r, name), 1.0) * (u / unit) : u / unit;
      pool.template add<!kKl, true>(name >> 1, name >= 0, part);
    });
  }
  group.sync();
  // l2: (u - mean_B u) / eps;  kl: r (u - sum_B r u / R_B) / eps
  each([&](int i, double u, double r, int name) {
    double g = 0.0;
    if (name >= 0) {
      const double total = pool.total(name >> 1);
      g = kKl ? r * (u / unit - total) : u / unit - total / pool.count[name >> 1];
      g *= unit;
    }
    store(i, eps == 0.0 ? 0.0 : g / eps);
  });
}

}  // namespace kdkernels
