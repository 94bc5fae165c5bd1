// SPDX-License-Identifier: Apache-2.0
// Spearman's correlation of rows with its gradients: one launch that reads both rows and writes value and gradients, or,
// for rows longer than kFused, soft ranks of both sides, `spearman_tail_kernel` and their backward kernels.
//   rho = <r - mu, t - mu> / (|r - mu| |t - mu|),  mu = (m + 1) / 2
//   d rho / dr = ((t - mu) / |t - mu| - rho (r - mu) / |r - mu|) / |r - mu|, then the Jacobian of the ranks
#pragma once

#include "pool.cuh"
#include "soft_rank.cuh"

namespace kdkernels {

struct SpearmanCall {
  Rows x, y;
  double strength;
  bool relative;
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
  double rho, of_r, of_t, mixed_r, mixed_t;  // d rho / dr = mixed_r t - of_r r, d rho / dt = mixed_t r - of_t t
};
__device__ __forceinline__ Correlation correlate(double rr, double tt, double rt) {
  if (!(rr > 0.0) || !(tt > 0.0)) return {0.0, 0.0, 0.0, 0.0, 0.0};
  const double mixed = 1.0 / (sqrt(rr) * sqrt(tt)), rho = rt * mixed;
  return {rho, rho / rr, rho / tt, mixed, mixed};
}

template <class Value, Kind kKind, int T, int kItems>
__global__ void __launch_bounds__(T == 32 ? 128 : T, 1) spearman_rows_kernel(SpearmanCall call) {
  constexpr bool kKl = kKind == kRankExponentials, kWide = sizeof(Value) == 8;
  KDK_DYNAMIC_SHARED(memory);
  const Layout at = layout_of<Value>(call.n, call.shift, true, true);
  const int slot = static_cast<int>(threadIdx.x) / T, slots = static_cast<int>(blockDim.x) / T;
  unsigned char* base = memory + slot * row_bytes<Value, T, kItems>(call.n, call.shift);
  const Group<T> group{base};
  base += Group<T>::kBytes;
  const auto pool = Pool<kWide>::at(base, call.n);
  const int64_t step = static_cast<int64_t>(gridDim.x) * slots;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * slots + slot; row < call.rows; row += step) {
    Value rank[2][kItems];
    int name[2][kItems];
    double eps[2];
    bool poisoned = false;
    int m = 0;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const bool hard = side == 1 && call.hard_target;
      const Rows own = side ? call.y : call.x, other = side ? call.x : call.y;
      typename KeyOf<Value>::Key item[kItems], mine[kItems];
      const Strength strength{nullptr, false, hard ? 0.0 : call.strength, !hard && call.relative};
      const RowFacts facts = load_row<Value>(group, own, other, strength, row, call.n, false, item);
      poisoned = facts.poisoned;
      m = facts.m;
      eps[side] = facts.eps;
      if (poisoned) break;
#pragma unroll
      for (int j = 0; j < kItems; ++j) mine[j] = item[j];
      const auto fit = solve_row<Value, kKind>(group, item, facts, base, at, call.shift);
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        rank[side][j] = 0;
        name[side][j] = -1;
        if (mine[j] == kAbsent<Value>) continue;
        const Range block = fit.blocks.find(fit.position(mine[j]));
        rank[side][j] = static_cast<Value>(fit.rank_at(decode<Value>(mine[j]), block));
        name[side][j] = block_name(block, facts.eps);
      }
      group.sync();
    }
    Value* dx = call.dx ? static_cast<Value*>(call.dx) + row * call.n : nullptr;
    Value* dy = call.dy ? static_cast<Value*>(call.dy) + row * call.n : nullptr;
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
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      // rank 0 alone is absent: kl may underflow to 0, but only within a block
      if (rank[0][j] == 0 && name[0][j] < 0) continue;
      const double r = rank[0][j] - mu, t = rank[1][j] - mu;
      rr += r * r;
      tt += t * t;
      rt += r * t;
    }
    const Correlation c = correlate(group.sum(rr), group.sum(tt), group.sum(rt));
    if (group.rank() == 0) static_cast<Value*>(call.value)[row] = static_cast<Value>(c.rho);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      Value* out = side ? dy : dx;
      if (!out) continue;
      const double mixed = side ? c.mixed_t : c.mixed_r, own = side ? c.of_t : c.of_r;
      rank_gradient<kKl>(
          group, pool, eps[side],
          [&](auto visit) {
#pragma unroll
            for (int j = 0; j < kItems; ++j) {
              const double r = rank[side][j], u = mixed * (rank[1 - side][j] - mu) - own * (r - mu);
              visit(group.rank() + j * T, u, r, name[side][j]);
            }
          },
          [&](int i, double g) {
            if (i < call.n) out[i] = static_cast<Value>(g);
          });
      group.sync();
    }
  }
}

struct TailCall {
  const void* r;      // Value [R, n], ranks of x where y is there, 0 elsewhere
  const void* t;
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
    const Value* r = static_cast<const Value*>(call.r) + row * call.n;
    const Value* t = static_cast<const Value*>(call.t) + row * call.n;
    auto there = [&](int i) {
      return !is_absent(call.x.template at<Value>(row, i)) && !is_absent(call.y.template at<Value>(row, i));
    };
    int count = 0;
    for (int i = group.rank(); i < call.n; i += T) count += there(i);
    const double mu = 0.5 * (group.sum(count) + 1);
    double rr = 0.0, tt = 0.0, rt = 0.0;
    for (int i = group.rank(); i < call.n; i += T) {
      if (!there(i)) continue;
      const double a = r[i] - mu, b = t[i] - mu;
      rr += a * a;
      tt += b * b;
      rt += a * b;
    }
    const Correlation c = correlate(group.sum(rr), group.sum(tt), group.sum(rt));
    const bool poisoned = call.eps[row] != call.eps[row];
    if (group.rank() == 0) static_cast<Value*>(call.value)[row] = static_cast<Value>(poisoned ? NAN : c.rho);
    for (int i = group.rank(); i < call.n; i += T) {
      const double a = r[i] - mu, b = t[i] - mu;
      if (call.u) static_cast<Value*>(call.u)[row * call.n + i] = static_cast<Value>(c.mixed_r * b - c.of_r * a);
      if (call.v) static_cast<Value*>(call.v)[row * call.n + i] = static_cast<Value>(c.mixed_t * a - c.of_t * b);
    }
  }
}

}  // namespace kdkernels
