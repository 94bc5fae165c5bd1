// SPDX-License-Identifier: Apache-2.0
// What a kernel calls by CUDA's names: block and warp barriers, votes, shuffles and reductions, atomics.
#pragma once

#include "simt_types.h"

// simt.h includes this file; there is no __shared__, which could not be filled with garbage: see SIMT_SHARED
#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {

constexpr unsigned kFullMask = 0xFFFFFFFFu;

// every named lane leaves a value and waits for the others; the slots stay until the lanes meet twice more
template <class T>
class Exchange {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Slot));

 public:
  Exchange(unsigned mask, const T& value, const Where& where) {
    if (!(mask >> self.lane & 1)) {
      throw Failure(place(where) + ": lane " + std::to_string(self.lane) + " is not in its mask");
    }
    Group& group = self.warp->group(mask);
    slots_ = group.slots[group.barrier.phase()];
    std::memcpy(slots_[self.lane].bytes, &value, sizeof(T));
    present_ = group.barrier.arrive(where, 1u << self.lane);
  }
  unsigned present() const { return present_; }
  bool has(int lane) const { return present_ >> lane & 1; }
  T at(int lane) const {
    T value;
    std::memcpy(&value, slots_[lane].bytes, sizeof(T));
    return value;
  }
  T from(int lane, const Where& where) const {
    if (!has(lane)) throw Failure(place(where) + ": reads lane " + std::to_string(lane) + ", which takes no part");
    return at(lane);
  }
  template <class Merge>
  T reduce(Merge merge) const {
    T total = at(self.lane);
    bool first = true;
    for (int lane = 0; lane < 32; ++lane) {
      if (!has(lane)) continue;
      total = first ? at(lane) : merge(total, at(lane));
      first = false;
    }
    return total;
  }

 private:
  unsigned present_;  // the lanes that arrived: one that exited left nothing
  Slot* slots_;
};

}  // namespace simt

namespace simt {
// "file:line" of a __syncthreads or __syncwarp to leave out: the tests take each away and see it missed
inline std::string skipped_barrier;
inline bool skipped(const Where& where) { return !skipped_barrier.empty() && place(where) == skipped_barrier; }
}  // namespace simt

inline void __syncthreads(simt::Where where = simt::Where::current()) {
  if (!simt::skipped(where)) simt::self.block->syncthreads.arrive(where);
}
inline int __syncthreads_count(int predicate, simt::Where where = simt::Where::current()) {
  return static_cast<int>(simt::self.block->syncthreads.arrive(where, predicate != 0));
}
inline int __syncthreads_or(int predicate, simt::Where where = simt::Where::current()) {
  return simt::self.block->syncthreads.arrive(where, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, simt::Where where = simt::Where::current()) {
  return simt::self.block->syncthreads.arrive(where, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = simt::kFullMask, simt::Where where = simt::Where::current()) {
  if (!simt::skipped(where)) simt::Exchange<char>(mask, 0, where);
}

// shuffles: `width` cuts the warp into segments; up and down keep the own value where the source is outside
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  simt::Exchange<T> lanes(mask, value, where);
  return lanes.from((simt::self.lane & ~(width - 1)) | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Where where = simt::Where::current()) {
  simt::Exchange<T> lanes(mask, value, where);
  const int source = simt::self.lane ^ bits;
  return source > (simt::self.lane | (width - 1)) ? value : lanes.from(source, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  simt::Exchange<T> lanes(mask, value, where);
  const int source = simt::self.lane - static_cast<int>(delta);
  return source < (simt::self.lane & ~(width - 1)) ? value : lanes.from(source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  simt::Exchange<T> lanes(mask, value, where);
  const int source = simt::self.lane + static_cast<int>(delta);
  return source > (simt::self.lane | (width - 1)) ? value : lanes.from(source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  simt::Exchange<int> lanes(mask, predicate != 0, where);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(lanes.has(lane) && lanes.at(lane)) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::Exchange<int>(mask, predicate != 0, where).reduce([](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::Exchange<int>(mask, predicate != 0, where).reduce([](int a, int b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  simt::Exchange<T> lanes(mask, value, where);
  unsigned equal = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes.has(lane)) continue;
    const T other = lanes.at(lane);
    equal |= unsigned(std::memcmp(&other, &value, sizeof(T)) == 0) << lane;
  }
  return equal;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, simt::Where where = simt::Where::current()) {
  simt::Exchange<T> lanes(mask, value, where);
  *all = 1;
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes.has(lane)) continue;
    const T other = lanes.at(lane);
    *all &= std::memcmp(&other, &value, sizeof(T)) == 0;
  }
  return *all ? lanes.present() : 0;
}

// for int and unsigned alone, as on the device
#define SIMT_REDUCE(name, T, expression)                                                             \
  inline T name(unsigned mask, T value, simt::Where where = simt::Where::current()) {                \
    return simt::Exchange<T>(mask, value, where).reduce([](T a, T b) -> T { return expression; });   \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SIMT_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SIMT_REDUCE(__reduce_and_sync, unsigned, a & b)
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SIMT_REDUCE

// atomics: relaxed, as on the device; only for the types that CUDA has
namespace simt {

template <class T>
constexpr bool kAtomicInteger = std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                                std::is_same_v<T, unsigned long long>;

template <class T, class Change>
T atomic_update(T* p, Change change) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    next = change(old);
  } while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace simt

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  static_assert(simt::kAtomicInteger<T> || std::is_floating_point_v<T>);
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  } else {
    return simt::atomic_update(p, [=](T old) { return old + value; });
  }
}
#define SIMT_ATOMIC(name, ...)                                            \
  template <class T>                                                      \
  T name(T* p, std::type_identity_t<T> value) {                           \
    static_assert(simt::kAtomicInteger<T> || std::is_same_v<T, long long>); \
    return simt::atomic_update(p, [=](T old) -> T { return __VA_ARGS__; }); \
  }
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicAnd, old & value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef SIMT_ATOMIC
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  static_assert(simt::kAtomicInteger<T> || std::is_same_v<T, float>);
  return simt::atomic_update(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  static_assert(simt::kAtomicInteger<T>);
  __atomic_compare_exchange_n(p, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}

// blocks run one after another: a fence has nothing to order between them
inline void __threadfence() {}
inline void __threadfence_block() {}
