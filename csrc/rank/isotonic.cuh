// SPDX-License-Identifier: Apache-2.0
// Isotonic regression of one sorted row by a group of threads, in about 2 leaf + log2(m / leaf) dependent steps where
// the sequential algorithm takes 2 m: every leaf of up to 32 positions is solved by one thread, then halves merge in
// pairs.
// A merge makes at most one new block, a suffix of the left and a prefix of the right; all lanes that a pair can have
// look for its ends, one side after the other (MATH.md, "In parallel").
//
// Positions ascend: p = 0 holds the smallest element, w_p = p + 1. A block is a range [a, b) of positions.
#pragma once

#include <type_traits>

#include "../common/numbers.cuh"
#include "lists.cuh"
#include "scans.cuh"
#include "sorted_keys.cuh"
#include "whole.cuh"

namespace kdkernels {

constexpr int kShortRow = 1024;  // up to here sums in double have digits enough

// what does not fall from block to block:
//   rank, l2: mean s / eps - mean w            kl: log sum exp(s / eps) - log sum w
//   sort, l2: mean w / eps - mean s            kl: log sum exp(w / eps) - log sum exp(s)

// kl is an argument: its branch is uniform, and half as many kernels are compiled. kStaged: `sum` is in global memory,
// and leaves are summed and solved in shared memory first
template <class Value, bool kPadded, bool kSort, bool kShort, bool kStaged>
struct Isotonic {
  using Element = Value;

  SortedKeys<Value, kPadded, kShort> key;  // [m]
  double* sum;                     // padded [m + 1]: sums before each position, of l2 a Prefix
  double* stage;                   // kStaged: [stages, 33], sums of leaves; ranks later
  int stages;
  Blocks blocks;
  int m;
  bool kl;
  double eps;
  double inverse;                  // of eps, ranks alone: a division takes 30 instructions

  // l2: of y over what comes before a position, y the fit's values: gaps / eps so far less positions (sort: positions
  // less gaps * eps). Prefix sums reach m^3 while blocks of a few positions decide: in fixed point their differences
  // are exact, in double they would be off by a quarter of a rank at m = 131,072. At m = 1,024 double is off by 2^-9 of
  // a float rank's last place at most: the sums grow from the smallest element, as the ranks do (COST.md)
  static constexpr bool kWholeSums = !kShort || kSlowDouble;
  static constexpr bool kNoDouble = kShort && kSlowDouble;
  using Prefix = std::conditional_t<kWholeSums, long long, double>;
  using PrefixScan = std::conditional_t<kWholeSums, Whole, Rise>;
  WholeRow whole;                  // kNoDouble, l2

  // s_high - s_low in the units of the exponent
  __device__ __forceinline__ double apart(int low, int high) const {
    const double d = key.value(high) - key.value(low);
    return kSort || d == 0.0 ? d : d * inverse;
  }

  // the gap below p. one that forbids (or, sorting, forces) pooling whatever stands around it is cut, so that sums keep
  // their digits: blocks of c positions pool while their means differ by at most c / 2 <= m / 2
  __device__ __forceinline__ double gap(int p) const {
    if (p == 0) return 0.0;
    const double d = key.value(p) - key.value(p - 1);
    if (kSort) return fmin(d * eps, static_cast<double>(m) * m);
    return d == 0.0 ? 0.0 : fmin(d * inverse, static_cast<double>(m));
  }

  __device__ __forceinline__ static Prefix unpacked(double v) {
    if constexpr (kWholeSums) {
      return __double_as_longlong(v);
    } else {
      return v;
    }
  }
  __device__ __forceinline__ static double packed(Prefix v) {
    if constexpr (kWholeSums) {
      return __longlong_as_double(v);
    } else {
      return v;
    }
  }
  __device__ __forceinline__ Prefix prefix(int p) const { return unpacked(sum[padded(p)]); }
  __device__ __forceinline__ void set_prefix(int p, Prefix v) const { sum[padded(p)] = packed(v); }

  // l2: whether neighbouring blocks of `left` and `right` positions pool, from the sums before, between and after them
  __device__ __forceinline__ static bool falls(Prefix low, Prefix middle, Prefix high, int left, int right) {
    if constexpr (kNoDouble) return product_at_most(high - middle, left, middle - low, right);
    return static_cast<double>(high - middle) * natural(left) <= static_cast<double>(middle - low) * natural(right);
  }

  // whether neighbouring blocks [a, c) and [c, b) pool
  __device__ __forceinline__ bool pools(int a, int c, int b) const {
    if (!kl) {
      return falls(prefix(a), prefix(c), prefix(b), c - a, b - c);
    } else {
      const double left = c - a, right = b - c;
      const double middle = sum[padded(c)], step = apart(c - 1, b - 1), down = exp(-step);
      // sums over the blocks, each relative to its own largest
      const double high = sum[padded(b)] - middle * down;
      const double low = a == 0 ? middle : middle - sum[padded(a)] * exp(-apart(a - 1, c - 1));
      if (!kSort) {
        return high * left * (a + c + 1) <= low * right * (c + b + 1) * down;
      } else {
        const double h = 1.0 / eps;  // sum exp(w / eps) over c positions is geometric
        return -expm1(-right * h) * low * exp(right * h - step) <= -expm1(-left * h) * high;
      }
    }
  }

  // a power of two with which m sums of up to `most` stay under 2^61, and each of them under 2^51
  __device__ __forceinline__ double unit_of(double most) const {
    return power_of_two(60 - exponent_of(most * max(m, 1024)));
  }

  // of y from `first` on, of this thread up to `last`
  template <int T>
  __device__ Terms terms_of(int first, int last, const Group<T>& group) const {
    const double lowest = m > 0 ? key.value(0) : 0.0, scale = kSort ? eps : inverse;
    const double all = m > 0 ? (key.value(m - 1) - lowest) * scale : 0.0, longest = static_cast<double>(m) * m;
    const double least = max(m, 1);
    if (all <= longest) return {lowest, scale, unit_of(fmax(all, least)), false, 0.0};
    Rise own = Rise::none();
#pragma unroll 1
    for (int p = first; p < last; ++p) own.value += gap(p);
    const double u = group.before(own, Rise::none()).value;
    return {lowest, scale, unit_of(fmax(group.sum(own.value), least)), true, u};
  }
  // visit(p, y), with which `terms` goes on to `last`
  template <class Visit>
  __device__ __forceinline__ void each_term(Terms& terms, int first, int last, Visit visit) const {
    double at = first;
    auto add = [&](int p, double u) {
      const double y = kSort ? at - u : u - at;
      if constexpr (kWholeSums) {
        visit(p, rounded(y, terms.unit));
      } else {
        visit(p, y);
      }
      at += 1.0;
    };
    if (!terms.cut) {
#pragma unroll 4
      for (int p = first; p < last; ++p) add(p, (key.value(p) - terms.lowest) * terms.scale);
    } else {
#pragma unroll 1
      for (int p = first; p < last; ++p) add(p, terms.u += gap(p));
    }
  }

  template <int T>
  __device__ void linear_sums(int first, int last, const Group<T>& group) {
    Terms terms = terms_of(first, last, group);
    Prefix total = 0;
    each_term(terms, first, last, [&](int p, Prefix y) { set_prefix(p + 1, total += y); });
    add_before(first, last, total, group);
  }

  // to the sums of this thread, `total` at its last position, those of the threads before
  template <int T>
  __device__ __forceinline__ void add_before(int first, int last, Prefix total, const Group<T>& group) {
    const Prefix lower = group.before(PrefixScan{total}, PrefixScan::none()).value;
#pragma unroll 4
    for (int p = first; p < last; ++p) set_prefix(p + 1, prefix(p + 1) + lower);
  }

  template <int T>
  __device__ void sums(const Group<T>& group) {
    const int chunk = (m + T - 1) / T, first = min(m, group.rank() * chunk), last = min(m, first + chunk);
    if (kl) {
      exponential_sums(group, *this, first, last);
    } else if constexpr (kNoDouble) {
      whole_sums(group, *this, first, last);
    } else {
      linear_sums(first, last, group);
    }
    if (group.rank() == 0) sum[0] = 0.0;
  }

  // blocks of one leaf by their starts, bits from `first` on: those before the last block, and its own
  struct Leaf {
    int first, size;
    const double* staged;  // kStaged: its sums
    unsigned rest = 0;
    int top = 0, end = 1;  // of the last block

    __device__ unsigned starts() const { return rest | 1u << top; }
  };

  // positions enter one by one and the last two blocks pool while they must; one loop, so that lanes stay together
  __device__ __forceinline__ void solve_exponential(Leaf& leaf) const {
    while (true) {
      if (leaf.rest) {
        const int a = 31 - __clz(static_cast<int>(leaf.rest));
        if (pools(leaf.first + a, leaf.first + leaf.top, leaf.first + leaf.end)) {
          leaf.rest ^= 1u << a;
          leaf.top = a;
          continue;
        }
      }
      if (leaf.end == leaf.size) break;
      leaf.rest |= 1u << leaf.top;
      leaf.top = leaf.end++;
    }
  }

  __device__ __forceinline__ Prefix prefix(const Leaf& leaf, int i) const {
    if constexpr (kStaged) {
      return unpacked(leaf.staged[i]);
    } else {
      return prefix(leaf.first + i);
    }
  }

  // the first positions of runs that do not rise, bits: the positions of a run always share a block
  __device__ __forceinline__ unsigned runs_of(const Leaf& leaf) const {
    unsigned starts = 1u;
    Prefix at = prefix(leaf, 1), last = at - prefix(leaf, 0);
#pragma unroll 4
    for (int i = 1; i < leaf.size; ++i) {
      const Prefix next = prefix(leaf, i + 1), y = next - at;
      starts |= y > last ? 1u << i : 0u;
      last = y;
      at = next;
    }
    return starts;
  }

  // the same by runs, and free of branches
  __device__ __forceinline__ void solve_linear(Leaf& leaf) const {
    unsigned pending = runs_of(leaf) & ~1u;  // runs that have not entered
    auto first_of = [&](unsigned runs) { return runs ? lowest_bit(runs) : leaf.size; };
    unsigned rest = 0;
    int top = 0, end = first_of(pending);
    Prefix middle = prefix(leaf, 0), high = prefix(leaf, end);
    bool more = true;
#pragma unroll 1
    while (more) {
      const int a = max(31 - __clz(static_cast<int>(rest)), 0);
      const Prefix low = prefix(leaf, a);
      const unsigned later = pending & (pending - 1);
      const int next = first_of(later);
      const Prefix above = prefix(leaf, next);
      const bool pool = rest != 0 && falls(low, middle, high, top - a, end - top);
      const bool enter = !pool && pending != 0;
      more = pool || enter;
      rest = pool ? rest ^ 1u << a : enter ? rest | 1u << top : rest;
      middle = pool ? low : enter ? high : middle;
      top = pool ? a : enter ? end : top;
      high = enter ? above : high;
      end = enter ? next : end;
      pending = enter ? later : pending;
    }
    leaf.rest = rest;
    leaf.top = top;
  }

  __device__ __forceinline__ Leaf solved_leaf(int index, int shift, const double* staged = nullptr) const {
    Leaf leaf{index << shift, min(m - (index << shift), 1 << shift), staged};
    if (kl) {
      solve_exponential(leaf);
    } else {
      solve_linear(leaf);
    }
    return leaf;
  }
  __device__ __forceinline__ void solve_leaf(int index, const double* staged = nullptr) const {
    const Leaf leaf = solved_leaf(index, blocks.shift, staged);
    blocks.starts[index] = leaf.starts();
    blocks.before[index] = leaf.first;
    blocks.after[index] = leaf.first + leaf.size;
  }

  // the sums, and all leaves solved: a thread sums and solves one leaf after the other in its part of the stage, from
  // where the sums go to global memory side by side
  template <int T>
  __device__ void staged_leaves(const Group<T>& group, int leaves) {
    const int share = (leaves + stages - 1) / stages;
    const int first = min(m, group.rank() * share * kLeaf), last = min(m, first + share * kLeaf);
    Terms terms = terms_of(first, last, group), again = terms;
    Prefix total = 0;
    each_term(again, first, last, [&](int, Prefix y) { total += y; });
    total = group.before(PrefixScan{total}, PrefixScan::none()).value;
    double* own = stage + group.rank() * padded(kLeaf);
#pragma unroll 1
    for (int round = 0; round < share; ++round) {
      const int a = first + round * kLeaf, b = min(last, a + kLeaf);
      if (a < b) {
        own[0] = packed(total);
        each_term(terms, a, b, [&](int p, Prefix y) { own[p + 1 - a] = packed(total += y); });
        solve_leaf(a / kLeaf, own);
        if (b == m) sum[padded(m)] = packed(total);
      }
      group.sync();
      for (int i = group.rank(); i < stages * padded(kLeaf); i += T) {
        const int slot = i / padded(kLeaf), at = i + (slot * (share - 1) + round) * padded(kLeaf);
        if (at < padded(m)) sum[at] = stage[i];
      }
      group.sync();
    }
  }

  // the block that solved halves [first, middle) and [middle, last) make, [middle, middle) if none. Its best end is
  // looked for on the right, then on the left, and again while one of them grew: two to four times, as each end depends
  // on the other's in second order. A side's blocks join up to some position: the team's lanes try one each, near ones
  // first. All lanes of a warp stay until the last team is done (`active`: there is something to merge)
  __device__ Range merge(const Team& team, bool active, int first, int middle, int last) const {
    Range block{active ? blocks.find(middle - 1).a : middle, middle};  // joined so far
    int low = middle, high = last;  // blocks between may join
    int reach = 0;                  // log2 of how far the first lane tries; -1: spread over what is left
    bool right = true, grown = false, done = !active;
    while (true) {
      while (!done && low >= high) {  // this side is done
        (right ? block.b : block.a) = low;
        done = !grown;
        right = !right;
        grown = false;
        reach = 0;
        low = right ? block.b : first;
        high = right ? last : block.a;
      }
      if (!__any_sync(kAllLanes, !done)) return block.b > middle ? block : Range{middle, middle};
      Range tried{middle, middle};
      bool pooled = false;
      if (!done) {
        const int share = (high - low) >> team.shift;
        int away = share > 0 ? share * team.lane + share / 2 : team.lane;
        if (reach >= 0) away = (1 << min(reach + team.lane, 29)) - 1;
        away = min(away, high - low - 1);
        tried = blocks.find<kStaged || kShort>(right ? low + away : high - 1 - away);
        pooled = pools(right ? block.a : tried.a, right ? tried.a : tried.b, right ? tried.b : block.b);
      }
      const int joined = team.joined(pooled);  // of the lanes' candidates
      const int in = team.from(right ? tried.b : tried.a, joined - 1);
      const int out = team.from(right ? tried.a : tried.b, joined);
      if (joined > 0) {
        (right ? low : high) = in;
        grown = true;
      }
      if (joined < team.size) {
        (right ? high : low) = out;
        reach = -1;
      } else if (reach >= 0) {
        reach = min(reach + team.size, 24);
      }
    }
  }

  template <int T>
  __device__ void solve(const Group<T>& group) {
    const int leaves = (m + (1 << blocks.shift) - 1) >> blocks.shift;
    if (kStaged && !kl) {
      staged_leaves(group, leaves);
    } else {
      sums(group);
      group.sync();
      if constexpr (kShort && T > 32) {
        solve_in_lists(group, *this);
        return;
      }
      for (int leaf = group.rank(); leaf < leaves; leaf += T) solve_leaf(leaf);
      group.sync();
    }
    for (int level = 0; 1 << level < leaves; ++level) {
      const int half = 1 << level, pairs = (leaves + half - 1) >> (level + 1);
      const Team team = Team::of(T, pairs);
      for (int done = 0; done < pairs; done += T >> team.shift) {
        const int pair = done + (group.rank() >> team.shift), middle = (2 * min(pair, pairs - 1) + 1) * half;
        const bool active = pair < pairs;
        const Range block = merge(team, active, (middle - half) << blocks.shift, middle << blocks.shift,
                                  min(m, (middle + half) << blocks.shift));
        if (active && team.lane == 0) blocks.merged[pair] = block;
      }
      group.sync();
#pragma unroll 1
      for (int leaf = group.rank(); leaf < leaves; leaf += T) {
        const int pair = leaf >> (level + 1);
        if ((2 * pair + 1) * half >= leaves) continue;
        const Range block = blocks.merged[pair];
        const int first = leaf << blocks.shift, last = min(m, first + (1 << blocks.shift)) - 1;
        if (block.a == block.b || block.b <= first || block.a > last) continue;
        // starts in (block.a, block.b) go
        const unsigned from = block.a < first ? ~0u : ~((2u << (block.a - first)) - 1);
        const unsigned upto = block.b > last ? ~0u : (1u << (block.b - first)) - 1;
        blocks.starts[leaf] &= ~(from & upto);
        if (block.a < first) blocks.before[leaf] = block.a;
        if (block.b > last) blocks.after[leaf] = block.b;
      }
      group.sync();
    }
  }
};

}  // namespace kdkernels
