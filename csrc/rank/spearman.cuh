// SPDX-License-Identifier: Apache-2.0
// Spearman's correlation of rows with its gradients: one launch that reads both rows and writes value and gradients,
// or, for many rows of more than 128 and any of more than 1,024, soft ranks of both sides, `spearman_tail_kernel` and
// their backward kernels.
//   rho = <r - mu, t - mu> / (|r - mu| |t - mu|),  mu = (m + 1) / 2
//   d rho / dr = ((t - mu) / |t - mu| - rho (r - mu) / |r - mu|) / |r - mu|, then the Jacobian of the ranks
#pragma once

#include <type_traits>

#include "../common/pairs.cuh"
#include "rank_gradient.cuh"
#include "soft_rank.cuh"

namespace kdkernels {

struct SpearmanCall {
  Rows x, y;
  double strength;
  bool relative, kl;
  bool hard_target;
  int64_t rows;
  int n;
  int shift;
  void* value;  // Value [R]
  void* dx;     // Value [R, n] or null
  void* dy;
};

// of rows r and t, from their second moments about mu; both vectors zero where a side is constant
struct Correlation {
  double rho, of_r, of_t, mixed;  // d rho / dr = mixed t - of_r r, d rho / dt = mixed r - of_t t
};
__device__ __forceinline__ Correlation correlate(double rr, double tt, double rt) {
  if (!(rr > 0.0) || !(tt > 0.0)) return {0.0, 0.0, 0.0, 0.0};
  const double mixed = 1.0 / (sqrt(rr) * sqrt(tt)), rho = rt * mixed;
  return {rho, rho / rr, rho / tt, mixed};
}

// a row pair keeps both sides' ranks and block names beside what one side needs while it is solved
template <class Value, int T, int kItems>
__host__ __device__ inline size_t pair_bytes(int n, int shift) {
  return row_bytes<Value, T, kItems>(n, shift) + (2 * n * (sizeof(Value) + sizeof(int)) + 15) / 16 * 16;
}

// of one side: its ranks and the other's, both less mu
template <class Value>
struct Side {
  const Value *own, *other;
  const int* name;
  double eps, mu, mixed, along;
};

template <class Value, bool kKl, int T>
__device__ void gradient_of_side(const Group<T>& group, void* memory, int n, const Side<Value>& side, Value* out) {
  using Pool = std::conditional_t<sizeof(Value) == 8, WidePool, std::conditional_t<kKl, NarrowPool, SmallPool>>;
  rank_gradient<Value, kKl>(
      group, Pool::at(memory, n), pool_slots(n), side.eps, group.rank() < n ? side.name[group.rank()] : -1,
      [&](auto visit) {
        for (int i = group.rank(); i < n; i += T) {
          const int id = side.name[i];
          const double r = side.own[i];
          visit(i - group.rank(), id >= 0 ? side.mixed * side.other[i] - side.along * r : 0.0, r + side.mu, id);
        }
      },
      [&](auto run) { run([&](int i, double g) { out[group.rank() + i] = static_cast<Value>(g); }); });
}

template <class Value, int T, int kItems>
__global__ void __launch_bounds__(T == 32 ? 128 : T, 3) spearman_rows_kernel(SpearmanCall call) {
  KDK_DYNAMIC_SHARED(memory);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  unsigned char* base = memory + slot * pair_bytes<Value, T, kItems>(call.n, call.shift);
  const Group<T> group{base};
  Value* rank = reinterpret_cast<Value*>(base + row_bytes<Value, T, kItems>(call.n, call.shift));  // [2, n]
  int* name = reinterpret_cast<int*>(rank + 2 * call.n);                                           // [2, n]
  base += Group<T>::kBytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    double eps_x = 0.0, eps_y = 0.0;
    bool poisoned = false;
    int m = 0;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool hard = side == 1 && call.hard_target;
      const Rows own = side ? call.y : call.x, other = side ? call.x : call.y;
      const Strength strength{nullptr, false, hard ? 0.0 : call.strength, !hard && call.relative};
      typename KeyOf<Value>::Key item[kItems];
      const RowFacts facts = load_row<Value>(group, own, other, row, 0, call.n, false, base, item);
      poisoned = facts.poisoned;
      m = facts.m;
      if (poisoned) break;
      // minus mu before it is rounded: with a large eps all ranks are close to mu
      const auto fit = solve_row<Value>(group, strength, row, m, call.kl, base, call.n, call.shift, 0.5 * (m + 1),
                                        item);
      (side ? eps_y : eps_x) = fit.eps;
      emit_ranks(group, fit, own, other, row, call.n, false,
                 Destination<Value>{rank + side * call.n, name + side * call.n},
                 [&](auto key) { return fit.template place<bits_of(T * kItems)>(key); });
      group.sync();
    }
    Value* const dx = call.dx ? static_cast<Value*>(call.dx) + row * call.n : nullptr;
    Value* const dy = call.dy ? static_cast<Value*>(call.dy) + row * call.n : nullptr;
    if (poisoned) {
      if (group.rank() == 0) static_cast<Value*>(call.value)[row] = static_cast<Value>(NAN);
      for (int i = group.rank(); i < call.n; i += T) {
        if (dx) dx[i] = static_cast<Value>(NAN);
        if (dy) dy[i] = static_cast<Value>(NAN);
      }
      continue;
    }
    const double mu = 0.5 * (m + 1);
    double rr = 0.0, tt = 0.0, rt = 0.0;
    for (int i = group.rank(); i < call.n; i += T) {
      const double r = rank[i], t = rank[call.n + i];
      rr += r * r;
      tt += t * t;
      rt += r * t;
    }
    const Correlation c = correlate(group.sum(rr), group.sum(tt), group.sum(rt));
    if (group.rank() == 0) static_cast<Value*>(call.value)[row] = static_cast<Value>(c.rho);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      Value* const out = side ? dy : dx;
      if (!out) continue;
      const Side<Value> one{rank + side * call.n, rank + (1 - side) * call.n, name + side * call.n,
                            side ? eps_y : eps_x, mu, c.mixed, side ? c.of_t : c.of_r};
      if (call.kl) {
        gradient_of_side<Value, true>(group, base, call.n, one, out);
      } else {
        gradient_of_side<Value, false>(group, base, call.n, one, out);
      }
      group.sync();
    }
  }
}

// what every element of a pair of rows needs of their correlation; in pairs of floats where float64 is slow, unless one
// is so large or small that these overflow or lose digits
template <class Value>
struct Slopes {
  static constexpr bool kPairs = kSlowDouble && sizeof(Value) == 4;
  using Factor = std::conditional_t<kPairs, Pair, double>;
  Correlation of;
  Factor mixed, of_r, of_t;
  bool paired;

  __device__ static Slopes from(const Correlation& c) {
    if constexpr (kPairs) {
      const double most = fmax(c.mixed, fmax(fabs(c.of_r), fabs(c.of_t)));
      return {c, pair_of(c.mixed), pair_of(c.of_r), pair_of(c.of_t), most < 0x1p60 && c.mixed > 0x1p-60};
    } else {
      return {c, c.mixed, c.of_r, c.of_t, false};
    }
  }
  // d rho / dr of an element, d rho / dt where not `of_x`
  __device__ __forceinline__ Value along(Value other, Value own, bool of_x) const {
    if constexpr (kPairs) {
      if (paired) {
        const Pair q = product_of(own, of_x ? of_r : of_t);
        return rounded_sum(product_of(other, mixed), {-q.high, -q.low});
      }
    }
    return static_cast<Value>(of.mixed * other - (of_x ? of.of_r : of.of_t) * own);
  }
};

// sums of squares and products, joined by warps
struct Products {
  double rr, tt, rt;
  __device__ __forceinline__ Products plus(const Products& o) const { return {rr + o.rr, tt + o.tt, rt + o.rt}; }
};
__device__ __forceinline__ Products from_partner(const Products& p, int step) {
  return {from_partner(p.rr, step), from_partner(p.tt, step), from_partner(p.rt, step)};
}

struct TailCall {
  void* r;            // Value [R, n], ranks of x where y is there less mu, 0 elsewhere; mu is put back
  void* t;
  const double* eps;  // [R] of x, NaN for a poisoned row
  Rows x, y;
  int64_t rows;
  int n;
  void* value;
  void* u;            // Value [R, n] or null: d rho / dr
  void* v;            // d rho / dt
};

template <class Value, int T>
__global__ void __launch_bounds__(T, 1) spearman_tail_kernel(TailCall call) {
  KDK_DYNAMIC_SHARED(memory);
  const Group<T> group{memory};
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    Value* r = static_cast<Value*>(call.r) + row * call.n;
    Value* t = static_cast<Value*>(call.t) + row * call.n;
    auto there = [&](int i) {
      return !is_absent(call.x.template entry<Value>(row, i)) && !is_absent(call.y.template entry<Value>(row, i));
    };
    int count = 0;
    for (int i = group.rank(); i < call.n; i += T) count += there(i);
    const double mu = 0.5 * (group.sum(count) + 1);
    Products own{0.0, 0.0, 0.0};
    for (int i = group.rank(); i < call.n; i += T) {
      const double a = r[i], b = t[i];
      own = own.plus({a * a, b * b, a * b});
    }
    // one thread joins the warps' sums and divides: the others would take as long
    own = Group<32>{nullptr}.reduce(own, [](const Products& a, const Products& b) { return a.plus(b); });
    auto* const part = reinterpret_cast<Products*>(group.scratch);
    auto* const shared = reinterpret_cast<Slopes<Value>*>(part + Group<T>::kWarps);
    static_assert(Group<T>::kWarps * sizeof(Products) + sizeof(Slopes<Value>) <= kScratchBytes);
    if (group.lane() == 0) part[group.warp()] = own;
    group.sync();
    if (group.rank() == 0) {
      for (int w = 1; w < Group<T>::kWarps; ++w) own = own.plus(part[w]);
      const Slopes<Value> made = Slopes<Value>::from(correlate(own.rr, own.tt, own.rt));
      *shared = made;
      const bool poisoned = call.eps[row] != call.eps[row];
      static_cast<Value*>(call.value)[row] = static_cast<Value>(poisoned ? NAN : made.of.rho);
    }
    group.sync();
    const Slopes<Value> slopes = *shared;
    for (int i = group.rank(); i < call.n; i += T) {
      const Value a = r[i], b = t[i];
      r[i] = a + static_cast<Value>(mu);
      t[i] = b + static_cast<Value>(mu);
      if (call.u) static_cast<Value*>(call.u)[row * call.n + i] = slopes.along(b, a, true);
      if (call.v) static_cast<Value*>(call.v)[row * call.n + i] = slopes.along(a, b, false);
    }
  }
}

}  // namespace kdkernels
