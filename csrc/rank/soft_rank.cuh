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

// of a key that was found at `place`. An absent element has rank 0 and no block
template <class Fit, class Key>
__device__ __forceinline__ typename Fit::Record record_of(const Fit& fit, Key key, int place) {
  using Value = typename Fit::Element;
  const bool there = key != kAbsent<Value>;
  const auto found = fit.record_at(place);
  return {there ? found.rank : 0, there ? found.name : -1};
}

// where the ranks and the names of a row go, names null: nowhere
template <class Value>
struct Destination {
  Value* rank;
  int* name;
  template <class Record>
  __device__ __forceinline__ void put(int i, const Record& found) const {
    rank[i] = found.rank;
    if (name) name[i] = found.name;
  }
};

// every thread looks up its own elements in a recorded fit, kBatch at a time: their searches do not wait for each
// other. place(key) finds one among the sorted, for `record_at`; anywhere for an absent one
template <class Fit, int T, class Place>
__device__ void emit_ranks(const Group<T>& group, const Fit& fit, const Rows& x, const Rows& partner, int64_t row,
                           int n, bool descending, Destination<typename Fit::Element> to, Place place) {
  using Value = typename Fit::Element;
  constexpr int kBatch = T == 32 ? 8 : T > 256 && !Fit::kInStage ? 8 / sizeof(Value) : 4;  // as registers allow
  bool ignored = false;
  if (fit.m == 0) {
    for (int i = group.rank(); i < n; i += T) to.put(i, typename Fit::Record{0, -1});
    return;
  }
  if (is_plain<Value>(x, partner)) {
#pragma unroll 1
    for (int first = 0; first < n; first += kBatch * T) {
      typename KeyOf<Value>::Key key[kBatch];
      own_keys<Value>(group, x, partner, row, first, n, descending, ignored, key);
      int at[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) at[j] = place(key[j]);
      typename Fit::Record found[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) found[j] = record_of(fit, key[j], at[j]);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = first + group.rank() + j * T;
        if (i < n) to.put(i, found[j]);
      }
    }
  } else {
#pragma unroll 1
    for (int i = group.rank(); i < n; i += T) {
      const auto key = key_of<Value>(x, partner, row, i, descending, ignored);
      to.put(i, record_of(fit, key, place(key)));
    }
  }
}
template <class Fit, int T, class Place>
__device__ void emit_ranks(const Group<T>& group, const Fit& fit, const RankCall& call, int64_t row, Place place) {
  using Value = typename Fit::Element;
  const Destination<Value> to{static_cast<Value*>(call.rank) + row * call.n,
                              call.blocks ? call.blocks + row * call.n : nullptr};
  emit_ranks(group, fit, call.x, call.partner, row, call.n, call.descending, to, place);
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
  const size_t solve = row_layout<Value, T, kItems>(n, shift).total;
  return Group<T>::kBytes + (solve > kSort ? solve : (kSort + 15) / 16 * 16);
}

template <class Value, int T, int kItems>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 4 : 1) rank_rows_kernel(RankCall call) {
  KDK_DYNAMIC_SHARED(memory);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  unsigned char* base = memory + slot * row_bytes<Value, T, kItems>(call.n, call.shift);
  const Group<T> group{base};
  base += Group<T>::kBytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    typename KeyOf<Value>::Key item[kItems];
    const RowFacts facts = load_row<Value>(group, call.x, call.partner, row, 0, call.n, call.descending, base,
                                            item);
    if (facts.poisoned) {
      if (group.rank() == 0) call.eps[row] = facts.eps;
      emit_poison<Value>(group, call, row);
      continue;
    }
    const auto fit = solve_row<Value>(group, call.strength, row, facts.m, call.kl, base, call.n, call.shift,
                                      call.centre(facts.m), item);
    if (group.rank() == 0) call.eps[row] = fit.eps;
    emit_ranks(group, fit, call, row, [&](auto key) { return fit.template place<bits_of(T * kItems)>(key); });
    group.sync();
  }
}

}  // namespace kdkernels
