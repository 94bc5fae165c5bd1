// SPDX-License-Identifier: Apache-2.0
// One row from its elements to its solved blocks, in one group of threads: load, strength, sort, isotonic fit. Shared
// memory of a row of n floats: 12 n bytes and a little; neither a permutation nor anything in global memory.
#pragma once

#include "../common/block_sort.cuh"
#include "row.cuh"

namespace kdkernels {

// the row at `memory`, as in `layout_of`, its keys on the way to their places
template <class Value>
__device__ __forceinline__ typename KeyOf<Value>::Key* staged_keys(unsigned char* memory) {
  return reinterpret_cast<typename KeyOf<Value>::Key*>(memory);
}

// keys of row `row` into memory, and what else is to be known of it
template <class Value, int T>
__device__ RowFacts load_row(const Group<T>& group, const Rows& x, const Rows& partner, const Strength& strength,
                             int64_t row, int n, bool descending, unsigned char* memory) {
  auto* keys = staged_keys<Value>(memory);
  bool poisoned = false;
  int count = 0;
  each_key<Value>(group, x, partner, row, n, descending, poisoned, [&](int i, auto key) {
    keys[i] = key;
    count += key != kAbsent<Value>;
  });
  return facts_of<Value>(group, strength, row, poisoned, count, [&](auto visit) {
    for (int i = group.rank(); i < n; i += T) visit(keys[i]);
  });
}

// a loaded row, sorted, solved and its ranks recorded, less `centre`
template <class Value, int T, int kItems>
__device__ Fit<Value, true, false> solve_row(const Group<T>& group, const RowFacts& facts, bool kl,
                                             unsigned char* memory, int n, const Layout& at, int shift,
                                             double centre) {
  using Key = typename KeyOf<Value>::Key;
  Key item[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int i = group.rank() + j * T;
    item[j] = i < n ? staged_keys<Value>(memory)[i] : kAbsent<Value>;
  }
  group.sync();
  sort_keys<T>(item, memory);
  Fit<Value, true, false> fit{{reinterpret_cast<Key*>(memory + at.key)},
                              reinterpret_cast<double*>(memory + at.sum),
                              blocks_at(memory, at, shift),
                              facts.m,
                              kl,
                              facts.eps,
                              inverse_of(facts.eps)};
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int p = group.rank() * kItems + j;
    if (p < facts.m) fit.key.at(p) = item[j];
  }
  group.sync();
  fit.solve(group);
  fit.constants(group);
  fit.record(group, centre);
  return fit;
}

}  // namespace kdkernels
