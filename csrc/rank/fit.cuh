// SPDX-License-Identifier: Apache-2.0
// What a solved row gives: constants of its blocks, ranks and names by position, sorted values, positions of keys.
#pragma once

#include "isotonic.cuh"

namespace kdkernels {

// what `record_linear` computes in
template <class Fit>
struct DoubleRanks {
  using Shared = double;
  using Number = double;
  const Fit& fit;
  double centre, scale;

  __device__ DoubleRanks(const Fit& fit, double centre)
      : fit(fit), centre(centre), scale(fit.eps == 0.0 ? 0.0 : fit.inverse) {}
  __device__ __forceinline__ double first_of(int a, int b) const {
    const double low = fit.sum[padded(a)], mean = quotient(fit.sum[padded(b)] - low, natural(b - a));
    return ((fit.sum[padded(a + 1)] - low) - mean) + natural(a + 1);
  }
  __device__ __forceinline__ double single(int p) const { return natural(p + 1); }
  __device__ __forceinline__ double value(int p) const { return fit.key.value(p); }
  __device__ __forceinline__ double rank(double first, double v, double base) const {
    return fma(v - base, scale, first) - centre;
  }
  __device__ __forceinline__ static double packed(double v) { return v; }
  __device__ __forceinline__ static double unpacked(double v) { return v; }
};

template <class Value, bool kPadded, bool kSort, bool kShort = false, bool kStaged = false>
struct Fit : Isotonic<Value, kPadded, kSort, kShort, kStaged> {
  using Base = Isotonic<Value, kPadded, kSort, kShort, kStaged>;
  using Base::apart, Base::blocks, Base::eps, Base::inverse, Base::key, Base::kl, Base::m, Base::stage, Base::sum;

  static constexpr bool kInStage = kStaged;  // ranks are

  // what the elements of a block share, from the sum of their terms; see `record` and `sorted_at`
  __device__ __forceinline__ double constant(Range block, double total) const {
    const double c = natural(block.b - block.a), mean_w = 0.5 * natural(block.a + block.b + 1);
    if (kSort) return kl ? log(total) : total / c;
    if (kl) return c * mean_w / total;
    return eps == 0.0 ? mean_w : mean_w - quotient(total * inverse, c);
  }

  // of this thread: as many of each, an even number, since two share a place of `shared`, but no multiple of four, so
  // that few threads meet in one bank
  template <int T>
  __device__ __forceinline__ Range own_positions() const {
    const int chunk = ((m + T - 1) / T + 1) / 4 * 4 + 2, first = min(m, Group<T>::rank() * chunk);
    return {first, min(m, first + chunk)};
  }

  // what the elements of a block of two or more share, by its start a: over `sum`; staged, where the ranks of a and of
  // one beside it will be
  __device__ __forceinline__ void share(int a, double v) const {
    if constexpr (kStaged) {
      auto* words = reinterpret_cast<unsigned*>(stage) + (a & ~1);
      split_double(v, words[0], words[1]);
    } else {
      sum[padded(a)] = v;
    }
  }
  __device__ __forceinline__ double shared(int a) const {
    if constexpr (kStaged) {
      const auto* words = reinterpret_cast<const unsigned*>(stage) + (a & ~1);
      return joined_words(words[0], words[1]);
    } else {
      return sum[padded(a)];
    }
  }

  // a constant for every block of two or more, to share. terms are summed afresh, relative to the block: a difference
  // of the long sums has lost digits
  template <int T>
  __device__ void constants(const Group<T>& group) const {
    const auto [first, last] = own_positions<T>();
    Range block = first < last ? blocks.find(first) : Range{0, 0}, early{0, 0};  // early: from below, ends here
    double base = first < last ? key.value(kl ? block.b - 1 : block.a) : 0.0, total = 0.0, early_sum = 0.0;
    bool starts = false;
#pragma unroll 1
    for (int p = first; p < last; ++p) {
      const double v = key.value(p);
      if (starts) {
        block.a = p;
        base = v;
        total = 0.0;
        if (kl) base = key.value(blocks.find(p).b - 1);
      }
      const double d = v - base;
      total += !kl ? d : exp(kSort || d == 0.0 ? d : d * inverse);
      starts = p + 1 == m || blocks.starts_at(p + 1);
      if (!starts || p == block.a) continue;
      block.b = p + 1;
      if (block.a >= first) {
        share(block.a, constant(block, total));
      } else {
        early = block;
        early_sum = total;
      }
    }
    const Segment own{total, first < last && block.a >= first};
    const double carried = group.before(own, Segment::none()).sum;
    if (early.b > 0) share(early.a, constant(early, carried + early_sum));
    group.sync();
  }

  // each position's rank, less `centre`, and block name take the place of `sum`: what is asked of a position later is
  // one load (of a double the name is left to `blocks`; staged, too, and the rank is in the stage). A block is named by
  // its start; -1: alone, or hard
  //   l2: mean_w + (s - mean_B s) / eps;  kl: R_B exp(s / eps) / Z_B
  template <int T>
  __device__ void record(const Group<T>& group, double centre) const {
    const auto [first, last] = own_positions<T>();
    Range block{0, 0};
    double base = 0.0, own = 0.0;
    if (first < last) {
      block = blocks.find(first);
      base = key.value(kl ? block.b - 1 : block.a);
      own = block.b - block.a > 1 ? shared(block.a) : block.b;
    }
    group.sync();  // the last block of the chunk before may have its constant in this one: all have read theirs
#pragma unroll 1
    for (int p = first; p < last; ++p) {
      const double d = key.value(p) - base;
      double rank = own;
      if (block.b - block.a > 1 && eps != 0.0) rank = kl ? own * exp(d == 0.0 ? d : d * inverse) : own + d * inverse;
      const int name = name_of(block);
      if (p + 1 == block.b && p + 1 < last) {
        block = {p + 1, blocks.find(p + 1).b};
        base = key.value(kl ? block.b - 1 : p + 1);
        own = block.b - block.a > 1 ? shared(p + 1) : block.b;
      }
      store_record(p, rank - centre, name);
    }
    group.sync();
  }
  __device__ __forceinline__ int name_of(Range block) const {
    return block.b - block.a > 1 && eps != 0.0 ? block.a : -1;
  }
  template <class Number>
  __device__ __forceinline__ void store_record(int p, Number rank, int name) const {
    if constexpr (kStaged) {
      reinterpret_cast<unsigned*>(stage)[p] = __float_as_uint(static_cast<float>(rank));
    } else if constexpr (sizeof(Value) == 8) {
      sum[padded(p)] = rank;
    } else {
      sum[padded(p)] = joined_words(__float_as_uint(static_cast<float>(rank)), static_cast<unsigned>(name));
    }
  }

  // the same of l2 and short rows, from the sums: y_p = sum[p + 1] - sum[p], and p + 1 + y_p - mean_B y is the rank of
  // p. Each block of two or more leaves the rank of its first position a in the place of the sum before a + 1, which
  // nobody else needs. A thread does one leaf
  template <class Ranks>
  __device__ void leave_first_ranks(const Ranks& ranks, int first, unsigned starts, unsigned several, int after) const {
#pragma unroll 1
    while (several) {
      const int i = __ffs(static_cast<int>(several)) - 1, a = first + i;
      several &= several - 1;
      const unsigned later = starts & ~((2u << i) - 1);
      const int b = later ? first + __ffs(static_cast<int>(later)) - 1 : after;
      sum[padded(a + 1)] = Ranks::packed(ranks.first_of(a, b));
    }
  }
  template <int T>
  __device__ void record_linear(const Group<T>& group, double centre) const {
    using Ranks = std::conditional_t<Base::kNoDouble, WholeRanks<Fit>, DoubleRanks<Fit>>;
    const Ranks ranks(*this, centre);
    const int leaf = group.rank(), first = leaf << blocks.shift, size = max(0, min(m - first, 1 << blocks.shift));
    const unsigned starts = size > 0 ? blocks.starts[leaf] : 0u;
    const int after = size > 0 ? blocks.after[leaf] : 0;
    // starts whose next position is none
    const unsigned end = size > 0 && after == first + size ? 1u << (size - 1) : 0u;
    const unsigned several = starts & ~(starts >> 1) & ~end, alone = starts & ~several;
    leave_first_ranks(ranks, first, starts, several, after);
    group.sync();
    typename Ranks::Shared shared{}, last{};
    typename Ranks::Number base{};
    int name = -1;
    if (size > 0) {
      last = Ranks::unpacked(sum[padded(first + size)]);
      if (!(starts & 1u)) {  // a block came in from below
        name = blocks.before[leaf];
        shared = Ranks::unpacked(sum[padded(name + 1)]);
        base = ranks.value(name);
      }
    }
    group.sync();
#pragma unroll 4
    for (int i = 0; i < size; ++i) {
      const int p = first + i;
      const auto v = ranks.value(p);
      const auto next = i + 1 < size ? Ranks::unpacked(sum[padded(p + 1)]) : last;
      const bool starting = starts >> i & 1u, single = alone >> i & 1u;
      if (starting) {
        shared = single ? ranks.single(p) : next;
        base = v;
        name = single ? -1 : p;
      }
      store_record(p, ranks.rank(shared, v, base), eps == 0.0 ? -1 : name);
    }
    group.sync();
  }

  // ranks and names of all positions
  template <int T>
  __device__ void record_all(const Group<T>& group, double centre) const {
    if constexpr (kShort) {
      if (!kl) {
        record_linear(group, centre);
        return;
      }
    }
    constants(group);
    record(group, centre);
  }

  struct Record {
    Value rank;
    int name;
  };
  // at a position; of a short row after padding
  __device__ __forceinline__ Record record_at(int p) const {
    if constexpr (kStaged) {
      return {__uint_as_float(reinterpret_cast<const unsigned*>(stage)[p]), name_of(blocks.find(p))};
    } else if constexpr (sizeof(Value) == 8) {
      return {sum[padded(p)], name_of(blocks.find(p))};
    } else {
      const long long bits = __double_as_longlong(sum[kShort ? p : padded(p)]);
      return {__uint_as_float(static_cast<unsigned>(bits)), static_cast<int>(bits >> 32)};
    }
  }

  // l2: mean_B s + (w_p - mean_B w) / eps;  kl: w_p / eps - log sum_B exp(w / eps) + log sum_B exp(s)
  __device__ __forceinline__ double sorted_at(int p, Range block) const {
    const int c = block.b - block.a;
    if (c == 1) return key.value(p);
    const double own = shared(block.a);
    if (!kl) return key.value(block.a) + (own + (p - 0.5 * (block.a + block.b - 1)) / eps);
    const double h = 1.0 / eps;
    return key.value(block.b - 1) + ((p + 1 - block.b) * h - log(expm1(-c * h) / expm1(-h)) + own);
  }

  // the first position of a key, 0 < m <= 2^kSteps; 0 for that of absent elements. It is looked for by its bits, so
  // that its padding adds up like them. Of a short row it is one after padding, and keys are there up to 2^kSteps
  template <int kSteps>
  __device__ __forceinline__ int place(typename KeyOf<Value>::Key wanted) const {
    int found = 0;
    if constexpr (kShort) {  // by an index: of a pointer that moves, ptxas 12.0 to 13.5 joins the last two steps' loads
#pragma unroll
      for (int half = 1 << kSteps >> 1; half > 0; half /= 2) {
        if (key.key[found + padded(half - 1)] < wanted) found += padded(half);
      }
    } else {
      const int end = key_place(m - 1);  // its key is not below `wanted`
#pragma unroll
      for (int half = 1 << kSteps >> 1; half > 0; half /= 2) {
        if (key.key[min(found + key_place(half - 1), end)] < wanted) found += key_place(half);
      }
      found = key_position(found);
    }
    return wanted == kAbsent<Value> ? 0 : found;
  }
  // the first position from `low` on, before `high`
  __device__ __forceinline__ int position(typename KeyOf<Value>::Key wanted, int low, int high) const {
    while (low < high) {
      const int p = (low + high) / 2;
      if (key.at(p) < wanted) {
        low = p + 1;
      } else {
        high = p;
      }
    }
    return low;
  }
};

}  // namespace kdkernels
