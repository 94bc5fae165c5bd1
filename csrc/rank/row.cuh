// SPDX-License-Identifier: Apache-2.0
// What every ranking kernel knows of a row: where its elements are, what its strength is, how its memory is laid out.
#pragma once

#include "fit.cuh"

namespace kdkernels {

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
    const Value least = dtype == kHalf       ? static_cast<Value>(least_of(__half()))
                        : dtype == kBfloat16 ? static_cast<Value>(least_of(__nv_bfloat16()))
                        : dtype == kFloat    ? static_cast<Value>(least_of(0.0f))
                                             : static_cast<Value>(least_of(0.0));
    return v == least ? -static_cast<Value>(INFINITY) : v;
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

// where the parts of a row lie, from 0; the whole is a multiple of 16. keys_here: 0 if they are elsewhere
struct Layout {
  size_t sum, key, merged, before, after, starts, total;
};

__host__ __device__ inline int leaves_of(int n, int shift) { return (n + (1 << shift) - 1) >> shift; }

template <class Value>
__host__ __device__ inline Layout layout_of(int n, int shift, bool sum_here, int keys_here, bool lists = false) {
  const size_t leaves = leaves_of(n, shift);
  Layout at;
  at.sum = 0;
  at.key = at.sum + (sum_here ? 8 * static_cast<size_t>(padded(n) + 1) : 0);
  const size_t keys = sizeof(Value) * (static_cast<size_t>(key_place(keys_here)) + 1);
  at.merged = at.key + (keys_here > 0 ? (keys + 7) / 8 * 8 : 0);
  at.before = at.merged + (lists ? 4 * ((n + 2 * leaves) / 2 + 1) : 8 * ((leaves + 1) / 2));
  at.after = at.before + 4 * leaves;
  at.starts = at.after + 4 * leaves;
  at.total = (at.starts + 4 * leaves + 15) / 16 * 16;
  return at;
}

__device__ inline Blocks blocks_at(unsigned char* base, const Layout& at, int shift) {
  return {reinterpret_cast<unsigned*>(base + at.starts), reinterpret_cast<int*>(base + at.before),
          reinterpret_cast<int*>(base + at.after), reinterpret_cast<Range*>(base + at.merged),
          reinterpret_cast<Place*>(base + at.merged), shift};
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

// of an element without a partner
template <class Value, class Stored>
__device__ __forceinline__ typename KeyOf<Value>::Key plain_key(Stored stored, Value sign, bool& poisoned) {
  const Value v = wider(stored);
  poisoned |= !(v < static_cast<Value>(INFINITY));
  return v <= static_cast<Value>(least_of(stored)) ? kAbsent<Value> : encode(v * sign);
}
// of one with a partner of the same dtype
template <class Value, class Stored>
__device__ __forceinline__ typename KeyOf<Value>::Key pair_key(Stored stored, Stored other, Value sign,
                                                               bool& poisoned) {
  const Value v = wider(stored), w = wider(other);
  const bool absent = v <= static_cast<Value>(least_of(stored)) || w <= static_cast<Value>(least_of(stored));
  const bool fine = v < static_cast<Value>(INFINITY) && w < static_cast<Value>(INFINITY);
  poisoned |= !fine && !absent;
  return absent ? kAbsent<Value> : encode(v * sign);
}

// elements of this thread, rank, rank + T, ..., the least number beyond the end: all loads are on their way before the
// first is waited for
template <class Stored, int kItems>
struct Elements {
  Stored value[kItems];
};
template <int kItems, int T, class Stored>
__device__ __forceinline__ Elements<Stored, kItems> own_elements(const Group<T>& group, const Stored* p, int n) {
  Elements<Stored, kItems> own;
  const int left = n - group.rank();
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (j * T < left) {
      own.value[j] = p[group.rank() + j * T];
    } else {
      put(own.value[j], least_of(Stored()));
    }
  }
  return own;
}

// whether `own_keys` can be called
template <class Value>
__device__ __forceinline__ bool is_plain(const Rows& x, const Rows& partner) {
  return (!partner.p || partner.dtype == x.dtype) && (sizeof(Value) == 4 || x.dtype == kDouble);
}

// keys of this thread's elements from `first` on, rank, rank + T, ..., that of absent elements beyond the end n
template <class Value, int T, int kItems>
__device__ __forceinline__ void own_keys(const Group<T>& group, const Rows& x, const Rows& partner, int64_t row,
                                         int first, int n, bool descending, bool& poisoned,
                                         typename KeyOf<Value>::Key (&key)[kItems]) {
  const Value sign = static_cast<Value>(descending ? -1 : 1);
  typed<Value>(const_cast<void*>(x.p), x.dtype, [&](auto* all) {
    const auto own = own_elements<kItems>(group, all + row * x.stride + first, n - first);
    if (partner.p) {
      auto* others = static_cast<decltype(all)>(const_cast<void*>(partner.p));
      const auto other = own_elements<kItems>(group, others + row * partner.stride + first, n - first);
#pragma unroll
      for (int j = 0; j < kItems; ++j) key[j] = pair_key<Value>(own.value[j], other.value[j], sign, poisoned);
    } else {
#pragma unroll
      for (int j = 0; j < kItems; ++j) key[j] = plain_key<Value>(own.value[j], sign, poisoned);
    }
  });
}

// visit(i, key) of this thread's elements, from memory
template <class Value, int T, class Visit>
__device__ __forceinline__ void each_key(const Group<T>& group, const Rows& x, const Rows& partner, int64_t row, int n,
                                         bool descending, bool& poisoned, Visit visit) {
  if (is_plain<Value>(x, partner)) {
    constexpr int kBatch = 4;
    for (int first = 0; first < n; first += kBatch * T) {
      typename KeyOf<Value>::Key key[kBatch];
      own_keys<Value>(group, x, partner, row, first, n, descending, poisoned, key);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = first + group.rank() + j * T;
        if (i < n) visit(i, key[j]);
      }
    }
  } else {
#pragma unroll 1
    for (int i = group.rank(); i < n; i += T) visit(i, key_of<Value>(x, partner, row, i, descending, poisoned));
  }
}

// of the m elements of a row, of what each(visit) visits in all threads
template <int T, class Each>
__device__ Moments moments_of(const Group<T>& group, int m, Each each) {
  Moments own{0.0, 0.0};
  each([&](double d) {
    own.mean += d;
    own.square = fma(d, d, own.square);
  });
  own = group.reduce(own, [](const Moments& a, const Moments& b) { return a.plus(b); });
  const double part = 1.0 / m;
  return {own.mean * part, own.square * part};
}

// squares of doubles neither overflow nor vanish in the units of their range
template <class Value>
__device__ __forceinline__ double scale_of(double range) {
  return sizeof(Value) == 8 ? power_of_two(-max(-1022, min(exponent_of(range), 1022))) : 1.0;
}

// the same of a row in any order, 1 where it is constant. each(visit) visits this thread's keys. The mean's square must
// not be most of the mean square: once more about the mean, if it is
template <class Value, int T, class Each>
__device__ double spread_of(const Group<T>& group, int m, Each each) {
  using Key = typename KeyOf<Value>::Key;
  Key least = kAbsent<Value>, most = 0;
  each([&](Key key) {
    least = min(key, least);
    most = max(key, most);
  });
  least = group.reduce(least, [](Key a, Key b) { return min(a, b); });
  most = group.reduce(most, [](Key a, Key b) { return max(a, b); });
  if (m == 0 || least == most) return 1.0;
  double pivot = decode<Value>(least);
  const double scale = scale_of<Value>(decode<Value>(most) - pivot);
  Moments d;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    d = moments_of(group, m, [&](auto visit) {
      each([&](Key key) { visit((static_cast<double>(decode<Value>(key)) - pivot) * scale); });
    });
    if (d.mean * d.mean < 0.9 * d.square) break;
    pivot += d.mean / scale;
  }
  return spread_from(d, m, scale);
}

// the same of a row whose keys are sorted. The median is within a deviation of the mean: one pass about it. Of this
// thread each(median, visit) visits values and, for what is not there, medians
template <class Fit, int T, class Each>
__device__ double spread_of_sorted(const Group<T>& group, const Fit& fit, Each each) {
  using Value = typename Fit::Element;
  const int m = fit.m;
  if (m == 0 || fit.key.at(0) == fit.key.at(m - 1)) return 1.0;
  if constexpr (Fit::kNoDouble) return whole_spread(group, fit, each);
  const Value median = decode<Value>(fit.key.at(m / 2));
  const double scale = scale_of<Value>(fit.key.value(m - 1) - fit.key.value(0));
  const Moments d = moments_of(group, m, [&](auto visit) {
    each(median, [&](Value v) { visit((static_cast<double>(v) - static_cast<double>(median)) * scale); });
  });
  return spread_from(d, m, scale);
}
template <class Fit, int T>
__device__ double spread_of_sorted(const Group<T>& group, const Fit& fit) {
  using Value = typename Fit::Element;
  return spread_of_sorted(group, fit, [&](Value, auto visit) {
    for (int p = group.rank(); p < fit.m; p += T) visit(decode<Value>(fit.key.at(p)));
  });
}

// of this thread: `count` elements are there
template <int T>
__device__ RowFacts count_row(const Group<T>& group, bool poisoned, int count) {
  return {group.sum(count), group.any(poisoned), static_cast<double>(NAN)};
}

// and the strength of a row in any order; each(visit) visits this thread's keys, those of absent elements among them
template <class Value, int T, class Each>
__device__ RowFacts facts_of(const Group<T>& group, const Strength& strength, int64_t row, bool poisoned, int count,
                             Each each) {
  using Key = typename KeyOf<Value>::Key;
  RowFacts facts = count_row(group, poisoned, count);
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
