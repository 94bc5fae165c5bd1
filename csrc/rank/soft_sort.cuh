// SPDX-License-Identifier: Apache-2.0
// Soft sort of rows that are sorted already, descending, absent entries (-inf) last: one launch, s read twice. The fit
// runs over ascending positions p = m - 1 - i.
#pragma once

#include "row.cuh"

namespace kdkernels {

struct SortCall {
  Rows s;
  Strength strength;
  int64_t rows;
  int n;
  int shift;
  bool kl;
  void* value;            // Value [R, n]
  int* start;             // [R, n]
  double* eps;            // [R]
  unsigned char* memory;  // workspace [gridDim.x, layout] where a row does not fit into shared memory
};

template <class Value, int T, bool kOutside>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 4 : 1) sort_rows_kernel(SortCall call) {
  using Key = typename KeyOf<Value>::Key;
  KDK_DYNAMIC_SHARED(memory);
  const Layout at = layout_of<Value>(call.n, call.shift, true, call.n);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  unsigned char* base = memory + slot * (Group<T>::kBytes + (kOutside ? 0 : at.total));
  const Group<T> group{base};
  base = kOutside ? call.memory + blockIdx.x * at.total : base + Group<T>::kBytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    Value* value = static_cast<Value*>(call.value) + row * call.n;
    int* start = call.start + row * call.n;
    int count = 0;
    for (int i = group.rank(); i < call.n; i += T) count += !is_absent(call.s.template at<Value>(row, i));
    const int m = group.sum(count);
    const bool poisoned = call.n > 0 && is_poison(call.s.template at<Value>(row, 0));
    Fit<Value, true, true> fit;
    fit.key.key = reinterpret_cast<Key*>(base + at.key), fit.sum = reinterpret_cast<double*>(base + at.sum);
    fit.blocks = blocks_at(base, at, call.shift);
    fit.m = m, fit.kl = call.kl, fit.eps = static_cast<double>(NAN), fit.inverse = 0.0;
    if (!poisoned) {
      for (int p = group.rank(); p < m; p += T) fit.key.at(p) = encode(call.s.template at<Value>(row, m - 1 - p));
      group.sync();
      fit.eps = call.strength.of(row, call.strength.relative ? spread_of_sorted(group, fit) : 1.0);
      fit.solve(group);
      fit.constants(group);
    }
    if (group.rank() == 0) call.eps[row] = fit.eps;
    for (int i = group.rank(); i < call.n; i += T) {
      double v = poisoned ? static_cast<double>(NAN) : -static_cast<double>(INFINITY);
      int first = i;
      if (!poisoned && i < m) {
        const int p = m - 1 - i;
        const Range block = fit.blocks.find(p);
        v = fit.sorted_at(p, block);
        first = m - block.b;
      }
      value[i] = static_cast<Value>(v);
      start[i] = first;
    }
    group.sync();
  }
}

}  // namespace kdkernels
