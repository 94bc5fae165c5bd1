// SPDX-License-Identifier: Apache-2.0
// Gradients of soft ranks and soft sorts from block membership alone: no permutation, no sort, one launch. The row is
// read three times, twice from cache: largest element, block sums, result.
#pragma once

#include "pool.cuh"
#include "row.cuh"

namespace kdkernels {

struct BackwardCall {
  Rows grad;
  Rows value;          // rank: the ranks, kl alone; sort: s
  const int* name;     // [R, n] block ids of the ranks, or starts of the sort's blocks
  int64_t name_stride;
  const double* eps;   // rank alone, [R]
  bool descending;
  int64_t rows;
  int n;
  void* dx;            // [R, n]
  int dtype;           // of dx
  unsigned char* pool; // workspace [gridDim.x, bytes] where a row's sums do not fit into shared memory
  size_t pool_bytes;   // of a row
};

// visits with as many calls in each lane of a warp
template <int T, class Visit>
__device__ __forceinline__ void each_of(const Group<T>& group, int n, Visit visit) {
  for (int first = 0; first < n; first += T) visit(first + group.rank());
}

inline size_t pool_bytes_of(int n, bool exponential_sort) {
  const size_t slots = pool_slots(n);
  return (slots * (exponential_sort ? 20 : kPoolSlotBytes) + 15) / 16 * 16;
}

template <class Value, bool kKl, bool kWide, int T>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 4 : 1) rank_rows_backward_kernel(BackwardCall call) {
  KDK_DYNAMIC_SHARED(memory);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  const size_t bytes = Group<T>::kBytes + (call.pool ? 0 : call.pool_bytes);
  unsigned char* base = memory + slot * bytes;
  const Group<T> group{base};
  void* where = call.pool ? call.pool + blockIdx.x * call.pool_bytes : base + Group<T>::kBytes;
  const auto pool = Pool<kWide>::at(where, call.n);
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    const int* name = call.name + row * call.name_stride;
    rank_gradient<kKl>(
        group, pool, call.eps[row],
        [&](auto visit) {
          each_of(group, call.n, [&](int i) {
            const int id = i < call.n ? name[i] : -1;
            const bool counts = id >= 0;
            visit(i, counts ? static_cast<double>(call.grad.template at<Value>(row, i)) : 0.0,
                  kKl && counts ? static_cast<double>(call.value.template at<Value>(row, i)) : 0.0, id);
          });
        },
        [&](int i, double g) {
          if (i < call.n) store(call.dx, call.dtype, row * call.n + i, call.descending ? -g : g);
        });
    group.sync();
  }
}

// d value / ds: the block mean of u (l2), or the softmax of s within the block times the block sum of u (kl)
template <class Value, bool kKl, bool kWide, int T>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 4 : 1) sort_rows_backward_kernel(BackwardCall call) {
  KDK_DYNAMIC_SHARED(memory);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  const size_t bytes = Group<T>::kBytes + (call.pool ? 0 : call.pool_bytes);
  unsigned char* base = memory + slot * bytes;
  const Group<T> group{base};
  unsigned char* where = call.pool ? call.pool + blockIdx.x * call.pool_bytes : base + Group<T>::kBytes;
  const auto pool = Pool<kWide>::at(where, call.n);
  // the sums of exp(s - s_start); its count is not used and lies over that of `pool`
  const Pool<kWide> weights{reinterpret_cast<unsigned long long*>(where) + pool.slots, nullptr, pool.slots, pool.bits};
  const Pool<kWide> sums{pool.sum, kKl ? reinterpret_cast<int*>(weights.sum + pool.slots) : pool.count, pool.slots,
                         pool.bits};
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    const int* start = call.name + row * call.name_stride;
    auto s = [&](int i) { return static_cast<double>(call.value.template at<Value>(row, i)); };
    auto u = [&](int i) { return static_cast<double>(call.grad.template at<Value>(row, i)); };
    // the first position of the block, -1 where an element stands alone
    auto block = [&](int i) {
      if (i >= call.n) return -1;
      const int a = start[i];
      return a < i || (i + 1 < call.n && start[i + 1] == a) ? a : -1;
    };
    if (!(s(0) < static_cast<double>(INFINITY))) {  // NaN or +inf stands first
      for (int i = group.rank(); i < call.n; i += T) store(call.dx, call.dtype, row * call.n + i, NAN);
      continue;
    }
    sums.clear(group);
    if (kKl) {
      for (int i = group.rank(); i < pool.slots; i += T) weights.sum[i] = 0;
      group.sync();
    }
    double largest = 0.0;
    bool finite = true;
    each_of(group, call.n, [&](int i) {
      if (block(i) < 0) return;
      finite = finite && isfinite(u(i));
      largest = fmax(largest, fabs(u(i)));
    });
    largest = group.reduce(largest, [](double a, double b) { return fmax(a, b); });
    const double unit = group.any(!finite) ? static_cast<double>(NAN) : largest > 0.0 ? largest : 1.0;
    each_of(group, call.n, [&](int i) {
      const int a = block(i);
      sums.template add<!kKl, true>(a >> 1, a >= 0, a >= 0 && isfinite(unit) ? u(i) / unit : 0.0);
      if (kKl) weights.template add<false, true>(a >> 1, a >= 0, a >= 0 ? exp(s(i) - s(a)) : 0.0);
    });
    group.sync();
    each_of(group, call.n, [&](int i) {
      if (i >= call.n) return;
      const int a = block(i);
      double g = is_absent(s(i)) ? 0.0 : u(i);
      if (a >= 0) {
        g = sums.total(a >> 1) * unit;
        g *= kKl ? exp(s(i) - s(a)) / weights.total(a >> 1) : 1.0 / sums.count[a >> 1];
      }
      store(call.dx, call.dtype, row * call.n + i, g);
    });
    group.sync();
  }
}

}  // namespace kdkernels
