// SPDX-License-Identifier: Apache-2.0
// What every ranking kernel knows of a row: where its elements are, what its strength is, how its memory is laid out.
#pragma once

#include <cfloat>

#include "isotonic.cuh"

namespace kdkernels {

constexpr double kSmallestSpread = 0x1p-1022;  // 1 / eps stays finite, as in strength.py

// x [R, n], rows `stride` apart; p null: there is none
struct Rows {
  const void* p;
  int64_t stride;
  int dtype;

  template <class Value>
  __device__ __forceinline__ Value at(int64_t row, int i) const {
    return load<Value>(p, dtype, row * stride + i);
  }
  // an element to be ranked: the least finite number of the dtype, by which rows are padded, is -inf, absent
  template <class Value>
  __device__ __forceinline__ Value entry(int64_t row, int i) const {
    const Value v = at<Value>(row, i);
    bool least = false;
    switch (dtype) {
      case kHalf:
        least = v == static_cast<Value>(-65504.0);
        break;
      case kBfloat16:
        least = v == static_cast<Value>(-0x1.FEp127);
        break;
      case kFloat:
        least = v == static_cast<Value>(-FLT_MAX);
        break;
      default:
        least = v == static_cast<Value>(-DBL_MAX);
    }
    return least ? -static_cast<Value>(INFINITY) : v;
  }
};

struct Strength {
  const double* factors;  // float64 [1] or [R], or null
  bool per_row;
  double number;
  bool relative;

  __device__ double of(int64_t row, double spread) const {
    return (factors ? number * factors[per_row ? row : 0] : number) * spread;
  }
};

// where the parts of a row lie, from 0; the whole is a multiple of 16
struct Layout {
  size_t sum, key, merged, before, after, starts, total;
};

__host__ __device__ inline int leaves_of(int n, int shift) { return (n + (1 << shift) - 1) >> shift; }

template <class Value>
__host__ __device__ inline Layout layout_of(int n, int shift, bool sum_here, bool key_here) {
  const size_t leaves = leaves_of(n, shift);
  Layout at;
  at.sum = 0;
  at.key = at.sum + (sum_here ? 8 * static_cast<size_t>(padded(n) + 1) : 0);
  at.merged = at.key + (key_here ? (sizeof(Value) * static_cast<size_t>(padded(n) + 1) + 7) / 8 * 8 : 0);
  at.before = at.merged + 8 * ((leaves + 1) / 2);
  at.after = at.before + 4 * leaves;
  at.starts = at.after + 4 * leaves;
  at.total = (at.starts + 4 * leaves + 15) / 16 * 16;
  return at;
}

__device__ inline Blocks blocks_at(unsigned char* base, const Layout& at, int shift) {
  return {reinterpret_cast<unsigned*>(base + at.starts), reinterpret_cast<int*>(base + at.before),
          reinterpret_cast<int*>(base + at.after), reinterpret_cast<Range*>(base + at.merged), shift};
}

// what is known of a row beside its keys
struct RowFacts {
  int m;  // elements that are there
  bool poisoned;
  double eps;
};

// of the elements that count; an element also goes where its partner is absent, and a pair that stays may poison both
// rows
template <class Value>
__device__ __forceinline__ typename KeyOf<Value>::Key key_of(const Rows& x, const Rows& partner, int64_t row, int i,
                                                             bool descending, bool& poisoned) {
  const Value v = x.entry<Value>(row, i);
  bool absent = is_absent(v), poison = is_poison(v);
  if (partner.p) {
    const Value w = partner.entry<Value>(row, i);
    absent |= is_absent(w);
    poison |= is_poison(w);
  }
  poisoned |= poison && !absent;
  return absent ? kAbsent<Value> : encode(descending ? -v : v);
}

// visit(i, key) of this thread's elements. A row of full precision without a partner has a loop of its own, free of the
// choice of a dtype
template <class Value, int T, class Visit>
__device__ __forceinline__ void each_key(const Group<T>& group, const Rows& x, const Rows& partner, int64_t row, int n,
                                         bool descending, bool& poisoned, Visit visit) {
  if (x.dtype == KeyOf<Value>::kDtype && !partner.p) {
    const Value* p = static_cast<const Value*>(x.p) + row * x.stride + group.rank();
    constexpr auto kLeast = static_cast<Value>(sizeof(Value) == 4 ? -FLT_MAX : -DBL_MAX);
#pragma unroll 4
    for (int i = group.rank(); i < n; i += T, p += T) {
      const Value v = *p;
      auto key = v == kLeast ? kAbsent<Value> : encode(descending ? -v : v);
      if (!(fabs(v) < static_cast<Value>(INFINITY))) {
        if (is_absent(v)) {
          key = kAbsent<Value>;
        } else {
          poisoned = true;
        }
      }
      visit(i, key);
    }
  } else {
#pragma unroll 1
    for (int i = group.rank(); i < n; i += T) visit(i, key_of<Value>(x, partner, row, i, descending, poisoned));
  }
}

// sqrt(12) std / m, 1 for a constant row. each(visit) visits this thread's keys; values are scaled by their range
// first, so that squares neither overflow nor vanish
template <class Value, int T, class Each>
__device__ double spread_of(const Group<T>& group, int m, Each each) {
  using Key = typename KeyOf<Value>::Key;
  Key least = kAbsent<Value>, most = 0;
  each([&](Key key) {
    least = key < least ? key : least;
    most = key > most ? key : most;
  });
  least = group.reduce(least, [](Key a, Key b) { return a < b ? a : b; });
  most = group.reduce(most, [](Key a, Key b) { return a < b ? b : a; });
  if (m == 0 || least == most) return 1.0;
  const double top = decode<Value>(most), range = top - static_cast<double>(decode<Value>(least));
  double total = 0.0;
  each([&](Key key) { total += (static_cast<double>(decode<Value>(key)) - top) / range; });
  const double mean = group.sum(total) / m;
  double squares = 0.0;
  each([&](Key key) {
    const double d = (static_cast<double>(decode<Value>(key)) - top) / range - mean;
    squares += d * d;
  });
  const double found = range * sqrt(12.0 * group.sum(squares) / m) / m;
  return found < kSmallestSpread ? kSmallestSpread : found;
}

// of this thread: `count` elements are there; each(visit) visits its keys, those of absent elements among them
template <class Value, int T, class Each>
__device__ RowFacts facts_of(const Group<T>& group, const Strength& strength, int64_t row, bool poisoned, int count,
                             Each each) {
  using Key = typename KeyOf<Value>::Key;
  RowFacts facts;
  facts.poisoned = group.any(poisoned);
  facts.m = group.sum(count);
  facts.eps = NAN;
  if (facts.poisoned) return facts;
  double spread = 1.0;
  if (strength.relative) {
    spread = spread_of<Value>(group, facts.m, [&](auto visit) {
      each([&](Key key) {
        if (key != kAbsent<Value>) visit(key);
      });
    });
  }
  facts.eps = strength.of(row, spread);
  return facts;
}

}  // namespace kdkernels
