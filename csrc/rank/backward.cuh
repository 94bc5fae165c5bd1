// SPDX-License-Identifier: Apache-2.0
// Gradients of soft ranks and soft sorts from block membership alone: no permutation, no sort, one launch. The row is
// read three times, twice from cache: largest element, block sums, result.
#pragma once

#include <type_traits>

#include "rank_gradient.cuh"
#include "row.cuh"

namespace kdkernels {

constexpr int kOutsideThreads = 512;  // of a row whose sums do not fit into shared memory

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
  unsigned char* pool; // workspace [gridDim.x, pool_bytes] of kernels of kOutsideThreads
  size_t pool_bytes;   // of a row
};

// visits with as many calls in each lane of a warp
template <int T, class Visit>
__device__ __forceinline__ void each_of(const Group<T>& group, int n, Visit visit) {
  for (int first = 0; first < n; first += T) visit(first + group.rank());
}

template <bool kWide, int T, bool kKl>
using PoolOf = std::conditional_t<kWide, WidePool, std::conditional_t<T == 32 && !kKl, SmallPool, NarrowPool>>;

// the size of a row that its sums have room for. One size for all small ones: its addresses are constants
template <class Pool>
__host__ __device__ inline int room_of(int n) {
  return std::is_same_v<Pool, SmallPool> ? kSmallRow : n;
}

// upstream gradients and names of the elements of a row, in registers: lane l has l, l + 32, ...
template <int kItems>
struct HeldRow {
  static constexpr int kStep = 4;  // elements between two looks at the end of the row
  int left;                        // elements from this lane's first one to the end
  float u[kItems];
  unsigned names[kItems / 2];      // 16 bits each

  __device__ __forceinline__ void load(const BackwardCall& call, int64_t row, int named) {
    const int lane = Group<32>::lane();
    const int* name = call.name + row * call.name_stride + lane;
    const float* grad = static_cast<const float*>(call.grad.p) + row * call.grad.stride + lane;
    const bool as_is = call.grad.dtype == kFloat;
    left = call.n - lane;
#pragma unroll
    for (int first = 0; first < kItems; first += kStep) {
      if (32 * first >= call.n) break;
#pragma unroll
      for (int j = first; j < first + kStep; ++j) {
        const int own = named - lane > 32 * j ? name[32 * j] : -1;
        float v = 0.0f;
        if (left > 32 * j) v = as_is ? grad[32 * j] : call.grad.template at<float>(row, lane + 32 * j);
        u[j] = own >= 0 ? v : 0.0f;
        const unsigned half = static_cast<unsigned>(own) & 0xFFFFu;
        names[j / 2] = j % 2 ? names[j / 2] | half << 16 : half;
      }
    }
  }
  __device__ __forceinline__ int name(int j) const {
    return static_cast<int>(j % 2 ? names[j / 2] : names[j / 2] << 16) >> 16;
  }
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int first = 0; first < kItems; first += kStep) {
      if (32 * first >= left + Group<32>::lane()) break;
#pragma unroll
      for (int j = first; j < first + kStep; ++j) visit(32 * j, u[j], 0.0, name(j));
    }
  }
};

// those of a row of any length, from memory
template <class Value, bool kKl, int T>
struct ReadRow {
  const BackwardCall& call;
  int64_t row;
  int named, rank;

  __device__ __forceinline__ int name(int i) const {
    return i < named - rank ? call.name[row * call.name_stride + rank + i] : -1;
  }
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const bool as_is = call.grad.dtype == KeyOf<Value>::kDtype;
    const Value* u = static_cast<const Value*>(call.grad.p) + row * call.grad.stride + rank;
    for (int i = 0; i < call.n - rank; i += T) {
      const int id = name(i);
      double own = 0.0, r = 0.0;
      if (id >= 0) {
        own = as_is ? u[i] : call.grad.template at<Value>(row, rank + i);
        if (kKl) r = call.value.template at<Value>(row, rank + i);
      }
      visit(i, own, r, id);
    }
  }
};

template <class Value, bool kKl, bool kWide, int T>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 5 : 1) rank_rows_backward_kernel(BackwardCall call) {
  KDK_DYNAMIC_SHARED(memory);
  using Pool = PoolOf<kWide, T, kKl>;
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  unsigned char* base = memory + slot * (Group<T>::kBytes + (T >= kOutsideThreads ? 0 : call.pool_bytes));
  const Group<T> group{base};
  unsigned char* where = T >= kOutsideThreads ? call.pool + blockIdx.x * call.pool_bytes : base + Group<T>::kBytes;
  const Pool pool = Pool::at(where, room_of<Pool>(call.n));
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    const double eps = call.eps[row];
    const int named = eps == 0.0 ? 0 : call.n;
    auto finish = [&](auto run) {
      typed<Value>(call.dx, call.dtype, [&](auto* dx) {
        dx += row * call.n + group.rank();
        const int left = call.n - group.rank();
        run([&](int i, auto g) {
          if (i < left) put(dx[i], call.descending ? -g : g);
        });
      });
    };
    if constexpr (T == 32 && !kKl) {
      HeldRow<kSmallRow / 32> held;
      held.load(call, row, named);
      const auto each = [&](auto visit) { held.each(visit); };
      if constexpr (kSlowDouble) {
        whole_gradient(group, pool, pool_slots(call.n), eps, held.name(0), each, finish);
      } else {
        rank_gradient<Value, kKl>(group, pool, pool_slots(call.n), eps, held.name(0), each, finish);
      }
    } else {
      const ReadRow<Value, kKl, T> read{call, row, named, group.rank()};
      rank_gradient<Value, kKl>(group, pool, pool_slots(call.n), eps, read.name(0),
                                [&](auto visit) { read.each(visit); }, finish);
    }
    group.sync();
  }
}

// d value / ds: the block mean of u (l2), or the softmax of s within the block times the block sum of u (kl)
template <class Value, bool kKl, bool kWide, int T>
__global__ void __launch_bounds__(T == 32 ? 128 : T, T <= 128 ? 4 : 1) sort_rows_backward_kernel(BackwardCall call) {
  KDK_DYNAMIC_SHARED(memory);
  using Pool = PoolOf<kWide, T, kKl>;
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  const int places = pool_slots(call.n);
  unsigned char* base = memory + slot * (Group<T>::kBytes + (T >= kOutsideThreads ? 0 : call.pool_bytes));
  const Group<T> group{base};
  unsigned char* where = T >= kOutsideThreads ? call.pool + blockIdx.x * call.pool_bytes : base + Group<T>::kBytes;
  const Pool sums = Pool::at(where, room_of<Pool>(call.n));
  const Pool weights = Pool::at(where + call.pool_bytes / 2, room_of<Pool>(call.n));  // kl: of exp(s - s_start)
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
    sums.clear(group, places, !kKl);
    if (kKl) weights.clear(group, places, false);
    double largest = 0.0;
    bool finite = true;
    each_of(group, call.n, [&](int i) {
      if (block(i) < 0) return;
      finite = finite && isfinite(u(i));
      largest = fmax(largest, fabs(u(i)));
    });
    finite = !group.any(!finite);
    const auto unit = Unit<Value>::of(group.reduce(largest, [](double a, double b) { return fmax(a, b); }));
    Frequent<Pool> frequent(sums, -1), heavy(weights, -1);
    each_of(group, call.n, [&](int i) {
      const int a = block(i), last = __shfl_sync(kAllLanes, a >> 1, 31);  // the block that goes on
      frequent.template follow<!kKl, true>(last);
      frequent.template add<!kKl, true>(a >> 1, sums.part(a >= 0 && finite ? u(i) : 0.0, unit.to));
      if constexpr (kKl) {
        heavy.template follow<false, true>(last);
        heavy.template add<false, true>(a >> 1, weights.part(a >= 0 ? exp(s(i) - s(a)) : 0.0, 1.0));
      }
    });
    frequent.template finish<!kKl, true>();
    if constexpr (kKl) heavy.template finish<false, true>();
    group.sync();
    const double back = finite ? unit.back : static_cast<double>(NAN);
    if constexpr (kKl) {
      for (int i = group.rank(); i < places; i += T) sums.settle(i, sums.total(i).sum / weights.total(i).sum * back);
    } else {
      settle_means(group, sums, places, back);
    }
    group.sync();
    each_of(group, call.n, [&](int i) {
      if (i >= call.n) return;
      const int a = block(i);
      double g = is_absent(s(i)) ? 0.0 : u(i);
      if (a >= 0) g = sums.shared(a >> 1) * (kKl ? exp(s(i) - s(a)) : 1.0);
      store(call.dx, call.dtype, row * call.n + i, g);
    });
    group.sync();
  }
}

}  // namespace kdkernels
