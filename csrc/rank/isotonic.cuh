// SPDX-License-Identifier: Apache-2.0. Over 400 lines: one fit, from its sums to its ranks, in the order of the work.
// Isotonic regression of one sorted row by a group of threads, in about 2 leaf + log2(m / leaf) dependent steps where
// the sequential algorithm takes 2 m: every leaf of up to 32 positions is solved by one thread, then halves merge in
// pairs.
// A merge makes at most one new block, a suffix of the left and a prefix of the right; all lanes that a pair can have
// look for its ends, one side after the other (MATH.md, "In parallel").
//
// Positions ascend: p = 0 holds the smallest element, w_p = p + 1. A block is a range [a, b) of positions.
#pragma once

#include "../common/element.cuh"
#include "../common/group.cuh"

namespace kdkernels {

// what does not fall from block to block:
//   rank, l2: mean s / eps - mean w            kl: log sum exp(s / eps) - log sum w
//   sort, l2: mean w / eps - mean s            kl: log sum exp(w / eps) - log sum exp(s)

constexpr int kLeaf = 32;  // the most positions of a leaf: their block starts are the bits of one word

// one word in 33 stays empty, so that threads a power of two apart do not meet in one bank
__host__ __device__ __forceinline__ constexpr int padded(int p) { return p + (p >> 5); }

struct Range {
  int a, b;
};

// the least b with 2^b >= count
__host__ __device__ constexpr int bits_of(int count) { return count > 1 ? 1 + bits_of((count + 1) / 2) : 0; }

// sorted keys of a row; those in global memory lie densely
template <class Value, bool kPadded>
struct SortedKeys {
  using Key = typename KeyOf<Value>::Key;
  Key* key;
  __device__ __forceinline__ Key& at(int p) const { return key[kPadded ? padded(p) : p]; }
  __device__ __forceinline__ double value(int p) const { return static_cast<double>(decode<Value>(at(p))); }
};

// which block each position is in: of each leaf, the starts inside it and the ends of the blocks that leave it
struct Blocks {
  unsigned* starts;  // [leaves], bit i: a block starts at position leaf << shift + i
  int* before;       // start of the block that holds the leaf's first position
  int* after;        // end of the block that holds its last one
  Range* merged;     // [leaves / 2], what a level of merges found
  int shift;         // log2 of the positions of a leaf

  __device__ __forceinline__ Range find(int p) const {
    const int leaf = p >> shift, first = leaf << shift;
    const unsigned word = starts[leaf], upto = (2u << (p - first)) - 1;  // 2u << 31 is 0
    const unsigned low = word & upto, high = word & ~upto;
    return {low ? first + 31 - __clz(static_cast<int>(low)) : before[leaf],
            high ? first + __ffs(static_cast<int>(high)) - 1 : after[leaf]};
  }
};

// lanes of a warp that look for the ends of one block together, a power of two of them; all lanes of the warp call
struct Team {
  int size, shift, lane;

  // as many as `pairs` leave for each
  __device__ static Team of(int threads, int pairs) {
    int shift = 0;
    while (shift < 5 && pairs << (shift + 1) <= threads) ++shift;
    return {1 << shift, shift, Group<32>::lane() & ((1 << shift) - 1)};
  }
  __device__ __forceinline__ int first() const { return Group<32>::lane() - lane; }
  // lanes of the team before the first that says no
  __device__ __forceinline__ int joined(bool yes) const {
    const unsigned no = ~__ballot_sync(kAllLanes, yes) >> first();
    return no ? min(__ffs(static_cast<int>(no)) - 1, size) : size;
  }
  // what lane `which` of the team holds; anything for one that does not exist
  __device__ __forceinline__ int from(int value, int which) const {
    return __shfl_sync(kAllLanes, value, (first() + which) & 31);
  }
};

// sums over what comes before a position, joined from left to right
struct Rise {  // the gaps so far
  double rise;
  __device__ static Rise none() { return {0.0}; }
  __device__ static Rise from_lane(const Rise& s, int delta) { return {__shfl_up_sync(kAllLanes, s.rise, delta)}; }
  __device__ Rise then(const Rise& next) const { return {rise + next.rise}; }
};
struct Whole {  // of u in fixed point
  long long sum;
  __device__ static Whole none() { return {0}; }
  __device__ static Whole from_lane(const Whole& s, int delta) { return {__shfl_up_sync(kAllLanes, s.sum, delta)}; }
  __device__ Whole then(const Whole& next) const { return {sum + next.sum}; }
};
struct Exponential {  // of exp(s - the last s)
  double rise, sum;
  __device__ static Exponential none() { return {0.0, 0.0}; }
  __device__ static Exponential from_lane(const Exponential& s, int delta) {
    return {__shfl_up_sync(kAllLanes, s.rise, delta), __shfl_up_sync(kAllLanes, s.sum, delta)};
  }
  __device__ Exponential then(const Exponential& next) const {
    return {rise + next.rise, sum * exp(-next.rise) + next.sum};
  }
};
struct Segment {  // of the block that holds the last position
  double sum;
  int started;  // whether it starts within
  __device__ static Segment none() { return {0.0, 0}; }
  __device__ static Segment from_lane(const Segment& s, int delta) {
    return {__shfl_up_sync(kAllLanes, s.sum, delta), __shfl_up_sync(kAllLanes, s.started, delta)};
  }
  __device__ Segment then(const Segment& next) const {
    return {next.started ? next.sum : sum + next.sum, started | next.started};
  }
};

// of a strength; 0 ranks hard. finite where it can be, so that 0 times it is 0
__device__ __forceinline__ double inverse_of(double eps) {
  return eps == 0.0 ? static_cast<double>(INFINITY) : fmin(1.0 / eps, 1.7e308);
}

// kl is an argument: its branch is uniform, and half as many kernels are compiled
template <class Value, bool kPadded, bool kSort>
struct Fit {
  using Element = Value;

  SortedKeys<Value, kPadded> key;  // [m]
  double* sum;                     // padded [m + 1]: sums before each position; then the constants of blocks. l2: int64
  Blocks blocks;
  int m;
  bool kl;
  double eps;
  double inverse;                  // of eps, ranks alone: a division takes 30 instructions

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

  // l2: the sum of y over what comes before p, y the fit's values: gaps / eps so far less positions (sort: positions
  // less gaps * eps). prefix sums reach m^3 while blocks of a few positions decide: in fixed point their differences
  // are exact, in double they would be off by a quarter of a rank at m = 131,072
  __device__ __forceinline__ long long prefix(int p) const { return __double_as_longlong(sum[padded(p)]); }

  // l2: whether neighbouring blocks of `left` and `right` positions pool, from the sums before, between and after them
  __device__ __forceinline__ static bool falls(long long low, long long middle, long long high, int left, int right) {
    return static_cast<double>(high - middle) * left <= static_cast<double>(middle - low) * right;
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

  // a power of two with which m sums of up to `most` stay under 2^61, and each of them under 2^51: see `rounded`
  __device__ __forceinline__ double unit_of(double most) const {
    const long long bits = __double_as_longlong(most * max(m, 1024));
    const int exponent = static_cast<int>(bits >> 52) - 1023;  // of a positive number
    return __longlong_as_double(static_cast<long long>(60 - exponent + 1023) << 52);
  }

  // y * unit to the nearest integer: added to 1.5 * 2^52 it stands in the last bits of the sum
  __device__ __forceinline__ static long long rounded(double y, double unit) {
    return __double_as_longlong(fma(y, unit, 0x1.8p52)) - 0x4338000000000000LL;
  }

  template <int T>
  __device__ void sums(const Group<T>& group) {
    const int chunk = (m + T - 1) / T, first = min(m, group.rank() * chunk), last = min(m, first + chunk);
    if (kl) {
      Exponential own = Exponential::none();
#pragma unroll 1
      for (int p = first; p < last; ++p) {
        const double rise = p > 0 ? apart(p - 1, p) : 0.0;
        own = {own.rise + rise, own.sum * exp(-rise) + 1.0};
      }
      double total = group.before(own, Exponential::none()).sum;
#pragma unroll 1
      for (int p = first; p < last; ++p) {
        if (p > 0) total *= exp(-apart(p - 1, p));
        total += 1.0;
        sum[padded(p + 1)] = total;
      }
    } else {
      const double lowest = m > 0 ? key.value(0) : 0.0, scale = kSort ? eps : inverse;
      const double all = m > 0 ? (key.value(m - 1) - lowest) * scale : 0.0, longest = static_cast<double>(m) * m;
      Whole total = Whole::none();
      double at = first;
      auto add = [&](int p, double u, double unit) {
        total.sum += rounded(kSort ? at - u : u - at, unit);
        at += 1.0;
        sum[padded(p + 1)] = __longlong_as_double(total.sum);
      };
      if (all <= longest) {  // no gap needs to be cut: u is at hand
        const double unit = unit_of(fmax(all, static_cast<double>(max(m, 1))));
#pragma unroll 4
        for (int p = first; p < last; ++p) add(p, (key.value(p) - lowest) * scale, unit);
      } else {
        Rise own = Rise::none();
#pragma unroll 1
        for (int p = first; p < last; ++p) own.rise += gap(p);
        double u = group.before(own, Rise::none()).rise;
        const double unit = unit_of(fmax(group.sum(own.rise), static_cast<double>(max(m, 1))));
#pragma unroll 1
        for (int p = first; p < last; ++p) {
          u += gap(p);
          add(p, u, unit);
        }
      }
      const long long lower = group.before(total, Whole::none()).sum;
      for (int p = first; p < last; ++p) sum[padded(p + 1)] = __longlong_as_double(prefix(p + 1) + lower);
    }
    if (group.rank() == 0) sum[0] = 0.0;
  }

  // positions enter one by one and the last two blocks pool while they must; one loop, so that lanes stay together
  template <bool kKl>
  __device__ __forceinline__ void solve_leaf(int leaf) const {
    const int first = leaf << blocks.shift, size = min(m - first, 1 << blocks.shift);
    const double* here = sum + padded(first);  // a leaf's positions, its end aside, are not interrupted by padding
    unsigned rest = 0;      // starts of the blocks before the last one, `top`; from `first`
    int top = 0, count = 1; // positions that entered
    long long middle = 0, high = 0;  // l2: sums before `top` and `count`
    if (!kKl) middle = prefix(first), high = prefix(first + 1);
    while (true) {
      if (rest) {
        const int a = 31 - __clz(static_cast<int>(rest));
        const long long low = kKl ? 0 : __double_as_longlong(here[a]);
        if (kKl ? pools(first + a, first + top, first + count) : falls(low, middle, high, top - a, count - top)) {
          rest ^= 1u << a;
          top = a;
          middle = low;
          continue;
        }
      }
      if (count == size) break;
      rest |= 1u << top;
      top = count++;
      if (!kKl) middle = high, high = prefix(first + count);
    }
    blocks.starts[leaf] = rest | 1u << top;
    blocks.before[leaf] = first;
    blocks.after[leaf] = first + size;
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
        tried = blocks.find(right ? low + away : high - 1 - away);
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
    sums(group);
    group.sync();
    const int leaves = (m + (1 << blocks.shift) - 1) >> blocks.shift;
    if (kl) {
      for (int leaf = group.rank(); leaf < leaves; leaf += T) solve_leaf<true>(leaf);
    } else {
      for (int leaf = group.rank(); leaf < leaves; leaf += T) solve_leaf<false>(leaf);
    }
    group.sync();
    for (int half = 1; half < leaves; half *= 2) {
      const int pairs = (leaves + half - 1) / (2 * half);
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
        const int pair = leaf / (2 * half);
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

  // what an element at p adds to the sum over its block
  __device__ __forceinline__ double term(int p, Range block) const {
    return kl ? exp(-apart(p, block.b - 1)) : key.value(p) - key.value(block.a);
  }

  // what the elements of a block share, from the sum of their terms; see `rank_at` and `sorted_at`
  __device__ __forceinline__ double constant(Range block, double total) const {
    const double c = block.b - block.a, mean_w = 0.5 * (block.a + block.b + 1);
    if (kSort) return kl ? log(total) : total / c;
    if (kl) return c * mean_w / total;
    return eps == 0.0 ? mean_w : mean_w - total * inverse / c;
  }

  // a constant for every block of two or more, over `sum` at its start. terms are summed afresh, relative to the block:
  // a difference of the long sums has lost digits
  template <int T>
  __device__ void constants(const Group<T>& group) const {
    const int chunk = (m + T - 1) / T, first = min(m, group.rank() * chunk), last = min(m, first + chunk);
    Segment own = Segment::none();
    Range early{0, 0};  // the block that came in from below and ends here
    double early_sum = 0.0;
    for (int p = first; p < last;) {
      const Range block = blocks.find(p);
      const int stop = min(block.b, last);
      double total = 0.0;
      if (block.b - block.a > 1) {
#pragma unroll 1
        for (; p < stop; ++p) total += term(p, block);
      }
      p = stop;
      own = {total, own.started | (block.a >= first)};
      if (stop < block.b || block.b - block.a == 1) continue;
      if (block.a >= first) {
        sum[padded(block.a)] = constant(block, total);
      } else {
        early = block;
        early_sum = total;
      }
    }
    const double carried = group.before(own, Segment::none()).sum;
    if (early.b > 0) sum[padded(early.a)] = constant(early, carried + early_sum);
    group.sync();
  }

  // l2: mean_w + (s - mean_B s) / eps;  kl: R_B exp(s / eps) / Z_B
  __device__ __forceinline__ double rank_at(int p, Range block, double shared) const {
    if (block.b - block.a == 1) return block.b;
    if (kl) return shared * exp(-apart(p, block.b - 1));
    return eps == 0.0 ? shared : shared + (key.value(p) - key.value(block.a)) * inverse;
  }

  // each position's rank, less `centre`, and block name take the place of `sum`: what is asked of a position later is
  // one load (of a double the name is left to `blocks`). A block is named by its start; -1: alone, or hard
  template <int T>
  __device__ void record(const Group<T>& group, double centre) const {
    const int chunk = (m + T - 1) / T, first = min(m, group.rank() * chunk), last = min(m, first + chunk);
    Range block{0, 0};
    double shared = 0.0;
    if (first < last) {
      block = blocks.find(first);
      shared = sum[padded(block.a)];
    }
    group.sync();  // the last block of the chunk before may have its constant in this one: all have read theirs
#pragma unroll 1
    for (int p = first; p < last; ++p) {
      if (p == block.b) {
        block = {p, blocks.find(p).b};
        shared = sum[padded(p)];
      }
      store_record(p, rank_at(p, block, shared) - centre, name_of(block));
    }
    group.sync();
  }
  __device__ __forceinline__ int name_of(Range block) const {
    return block.b - block.a > 1 && eps != 0.0 ? block.a : -1;
  }
  __device__ __forceinline__ void store_record(int p, double rank, int name) const {
    if constexpr (sizeof(Value) == 8) {
      sum[padded(p)] = rank;
    } else {
      const long long low = __float_as_uint(static_cast<float>(rank));
      sum[padded(p)] = __longlong_as_double(static_cast<long long>(name) << 32 | low);
    }
  }
  struct Record {
    Value rank;
    int name;
  };
  __device__ __forceinline__ Record record_at(int p) const {
    const double found = sum[padded(p)];
    if constexpr (sizeof(Value) == 8) {
      return {found, name_of(blocks.find(p))};
    } else {
      const long long bits = __double_as_longlong(found);
      return {__uint_as_float(static_cast<unsigned>(bits)), static_cast<int>(bits >> 32)};
    }
  }

  // l2: mean_B s + (w_p - mean_B w) / eps;  kl: w_p / eps - log sum_B exp(w / eps) + log sum_B exp(s)
  __device__ __forceinline__ double sorted_at(int p, Range block) const {
    const int c = block.b - block.a;
    if (c == 1) return key.value(p);
    const double shared = sum[padded(block.a)];
    if (!kl) return key.value(block.a) + (shared + (p - 0.5 * (block.a + block.b - 1)) / eps);
    const double h = 1.0 / eps;
    return key.value(block.b - 1) + ((p + 1 - block.b) * h - log(expm1(-c * h) / expm1(-h)) + shared);
  }

  // the first position of an element of the row, m <= 2^kSteps. A position is looked for by its bits, so that its
  // padding adds up like them
  template <int kSteps>
  __device__ __forceinline__ int position(typename KeyOf<Value>::Key wanted) const {
    static_assert(kPadded);
    const int end = padded(m - 1);  // its key is not below `wanted`
    int q = 0;
#pragma unroll
    for (int half = 1 << kSteps >> 1; half > 0; half /= 2) {
      if (key.key[min(q + padded(half - 1), end)] < wanted) q += padded(half);
    }
    return q - q / 33;
  }
  // the first position from `low` on, before `high`
  __device__ __forceinline__ int position(typename KeyOf<Value>::Key wanted, int low, int high) const {
    while (low < high) {
      const int p = (low + high) / 2;
      if (key.at(p) < wanted) {
        low = p + 1;
      } else {
        high = p;
      }
    }
    return low;
  }
};

}  // namespace kdkernels
