// SPDX-License-Identifier: Apache-2.0
// One row from its elements to its solved blocks, in one group of threads: load, strength, sort, isotonic fit. Shared
// memory of a row of n floats: 12 n bytes and a little; neither a permutation nor anything in global memory.
#pragma once

#include "../common/block_sort.cuh"
#include "row.cuh"

namespace kdkernels {

// keys of a row into registers; thread t takes the elements t, t + T, ...
template <class Value, int T, int kItems>
__device__ RowFacts load_row(const Group<T>& group, const Rows& x, const Rows& partner, const Strength& strength,
                             int64_t row, int n, bool descending, typename KeyOf<Value>::Key (&item)[kItems]) {
  bool poisoned = false;
  int count = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int i = group.rank() + j * T;
    item[j] = i < n ? key_of<Value>(x, partner, row, i, descending, poisoned) : kAbsent<Value>;
    count += item[j] != kAbsent<Value>;
  }
  RowFacts facts;
  facts.poisoned = group.any(poisoned);
  facts.m = group.sum(count);
  facts.eps = NAN;
  if (facts.poisoned) return facts;
  double spread = 1.0;
  if (strength.relative) {
    spread = spread_of<Value>(group, facts.m, [&](auto visit) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (item[j] != kAbsent<Value>) visit(item[j]);
      }
    });
  }
  facts.eps = strength.of(row, spread);
  return facts;
}

// keys in registers -> a solved row; memory as in `layout_of`
template <class Value, Kind kKind, int T, int kItems>
__device__ Fit<Value, true, kKind> solve_row(const Group<T>& group, typename KeyOf<Value>::Key (&item)[kItems],
                                             const RowFacts& facts, unsigned char* base, const Layout& at, int shift) {
  using Key = typename KeyOf<Value>::Key;
  group.sync();
  sort_keys<T>(item, base);
  const Fit<Value, true, kKind> fit{{reinterpret_cast<Key*>(base + at.key)},
                                    reinterpret_cast<double*>(base + at.sum),
                                    blocks_at(base, at, shift),
                                    facts.m,
                                    facts.eps};
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int p = group.rank() * kItems + j;
    if (p < facts.m) fit.key.at(p) = item[j];
  }
  group.sync();
  fit.solve(group);
  fit.constants(group);
  return fit;
}

}  // namespace kdkernels
