// SPDX-License-Identifier: Apache-2.0
// One row from its elements to its solved blocks, in one group of threads: load, sort, strength, isotonic fit. Shared
// memory of a row of n floats: 12 n bytes and a little; neither a permutation nor anything in global memory.
#pragma once

#include "../common/block_sort.cuh"
#include "row.cuh"

namespace kdkernels {

template <class Value, int T, int kItems>
constexpr bool kIsShort = sizeof(Value) == 4 && T * kItems <= kShortRow;

template <class Value, int T, int kItems>
using RowFit = Fit<Value, true, false, kIsShort<Value, T, kItems>>;

// a short row has keys up to the end of what it may hold, those of no element as if absent
template <class Value, int T, int kItems>
__host__ __device__ inline Layout row_layout(int n, int shift) {
  constexpr bool kShort = kIsShort<Value, T, kItems>;
  return layout_of<Value>(n, shift, true, kShort ? T * kItems : n, kShort && T > 32);
}

// keys of the elements of row `row` from `first` on into registers, in any order; n: the end of the row
template <class Value, int T, int kItems>
__device__ RowFacts load_row(const Group<T>& group, const Rows& x, const Rows& partner, int64_t row, int first, int n,
                             bool descending, unsigned char* memory, typename KeyOf<Value>::Key (&item)[kItems]) {
  bool poisoned = false;
  int count = 0;
  if ((T <= 256 || sizeof(Value) == 4) && is_plain<Value>(x, partner)) {  // of 512 threads registers are short
    own_keys<Value>(group, x, partner, row, first, n, descending, poisoned, item);
#pragma unroll
    for (int j = 0; j < kItems; ++j) count += item[j] != kAbsent<Value>;
  } else {
    auto* keys = reinterpret_cast<typename KeyOf<Value>::Key*>(memory);
    const int size = min(n - first, T * kItems);
    for (int i = group.rank(); i < size; i += T) {
      keys[i] = key_of<Value>(x, partner, row, first + i, descending, poisoned);
      count += keys[i] != kAbsent<Value>;
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int i = group.rank() + j * T;
      item[j] = i < size ? keys[i] : kAbsent<Value>;
    }
    group.sync();
  }
  return count_row(group, poisoned, count);
}

// a loaded row, sorted, solved and its ranks recorded, less `centre`
template <class Value, int T, int kItems>
__device__ RowFit<Value, T, kItems> solve_row(const Group<T>& group, const Strength& strength, int64_t row, int m,
                                              bool kl, unsigned char* memory, int n, int shift,
                                              double centre, typename KeyOf<Value>::Key (&item)[kItems]) {
  using Key = typename KeyOf<Value>::Key;
  sort_keys<T>(item, memory);
  const Layout at = row_layout<Value, T, kItems>(n, shift);
  RowFit<Value, T, kItems> fit;
  fit.key.key = reinterpret_cast<Key*>(memory + at.key);
  fit.sum = reinterpret_cast<double*>(memory + at.sum);
  fit.blocks = blocks_at(memory, at, shift);
  fit.m = m;
  fit.kl = kl;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int p = group.rank() * kItems + j;
    if (kIsShort<Value, T, kItems> || p < m) fit.key.at(p) = item[j];
  }
  group.sync();
  if constexpr (RowFit<Value, T, kItems>::kNoDouble) {
    auto value = [&](int p) { return m > 0 ? decode<Value>(fit.key.at(p)) : 0; };
    fit.whole.scaled = Scaled::between(value(0), value(m - 1));
  }
  double spread = 1.0;
  if (strength.relative) {
    if constexpr (kIsShort<Value, T, kItems>) {
      const int left = m - group.rank() * kItems;
      spread = spread_of_sorted(group, fit, [&](Value median, auto visit) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) visit(j < left ? decode<Value>(item[j]) : median);
      });
    } else {  // registers are short
      spread = spread_of_sorted(group, fit);
    }
  }
  fit.eps = strength.of(row, spread);
  fit.inverse = inverse_of(fit.eps);
  fit.solve(group);
  fit.record_all(group, centre);
  return fit;
}

}  // namespace kdkernels
