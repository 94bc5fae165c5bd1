// SPDX-License-Identifier: Apache-2.0
// Soft ranks of rows: one launch, x read twice (the second time from cache), ranks and block ids written once.
// Each thread keeps its own element and looks it up among the sorted keys: equal elements share rank and block, so no
// permutation is needed, and the sort moves keys alone. Ranks are made in sorted order and looked up.
#pragma once

#include "sorted_row.cuh"

namespace kdkernels {

struct RankCall {
  Rows x;
  Rows partner;  // spearman: the other side, whose absent elements are dropped here too
  Strength strength;
  bool kl, descending;
  int64_t rows;
  int n;
  int shift;      // log2 of the positions of a leaf
  void* rank;     // Value [R, n]
  int* blocks;    // [R, n] or null
  double* eps;    // [R]
  bool centred = false;  // ranks less (m + 1) / 2, for correlations: they keep their digits where all are close

  __device__ double centre(int m) const { return centred ? 0.5 * (m + 1) : 0.0; }
};

// every thread looks up its own elements in a recorded fit; position(key) finds one among the sorted
template <class Fit, int T, class Position>
__device__ void emit_ranks(const Group<T>& group, const Fit& fit, const RankCall& call, int64_t row,
                           Position position) {
  using Value = typename Fit::Element;
  Value* rank = static_cast<Value*>(call.rank) + row * call.n;
  int* blocks = call.blocks ? call.blocks + row * call.n : nullptr;
  bool ignored = false;
  each_key<Value>(group, call.x, call.partner, row, call.n, call.descending, ignored, [&](int i, auto key) {
    typename Fit::Record found{Value(0), -1};
    if (key != kAbsent<Value>) found = fit.record_at(position(key));
    rank[i] = found.rank;
    if (blocks) blocks[i] = found.name;
  });
}

template <class Value, int T>
__device__ void emit_poison(const Group<T>& group, const RankCall& call, int64_t row) {
  for (int i = group.rank(); i < call.n; i += T) {
    static_cast<Value*>(call.rank)[row * call.n + i] = static_cast<Value>(NAN);
    if (call.blocks) call.blocks[row * call.n + i] = -1;
  }
}

template <class Value, int T, int kItems>
__host__ __device__ inline size_t row_bytes(int n, int shift) {
  constexpr size_t kSort = sort_bytes<typename KeyOf<Value>::Key, T, kItems>();
  const size_t solve = layout_of<Value>(n, shift, true, true).total;
  return Group<T>::kBytes + (solve > kSort ? solve : (kSort + 15) / 16 * 16);
}

template <class Value, int T, int kItems>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 4 : 1) rank_rows_kernel(RankCall call) {
  KDK_DYNAMIC_SHARED(memory);
  const Layout at = layout_of<Value>(call.n, call.shift, true, true);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  unsigned char* base = memory + slot * row_bytes<Value, T, kItems>(call.n, call.shift);
  const Group<T> group{base};
  base += Group<T>::kBytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    const RowFacts facts =
        load_row<Value>(group, call.x, call.partner, call.strength, row, call.n, call.descending, base);
    if (group.rank() == 0) call.eps[row] = facts.eps;
    if (facts.poisoned) {
      emit_poison<Value>(group, call, row);
      continue;
    }
    const double centre = call.centre(facts.m);
    const auto fit = solve_row<Value, T, kItems>(group, facts, call.kl, base, call.n, at, call.shift, centre);
    emit_ranks(group, fit, call, row, [&](auto key) { return fit.template position<bits_of(T * kItems)>(key); });
    group.sync();
  }
}

}  // namespace kdkernels
