// SPDX-License-Identifier: Apache-2.0. Over 400 lines: one fit, from its sums to its ranks, in the order of the work.
// Isotonic regression of one sorted row by a group of threads, in about 2 leaf + log2(m / leaf) dependent steps where
// the sequential algorithm takes 2 m: every leaf of up to 32 positions is solved by one thread, then halves merge in
// pairs.
// A merge makes at most one new block, a suffix of the left and a prefix of the right; its ends are found by walking a
// few blocks and then by bisection over positions (MATH.md, "In parallel").
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
constexpr int kWalk = 6;   // blocks that a merge looks at on either side before it bisects

// one word in 33 stays empty, so that threads a power of two apart do not meet in one bank
__host__ __device__ __forceinline__ constexpr int padded(int p) { return p + (p >> 5); }

struct Range {
  int a, b;
};

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
  double unit = 0.0;               // of l2 sums: what a gap of eps is in fixed point; set by `sums`

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

  // l2: the sum of u over what comes before p. prefix sums reach m^3 while blocks of a few positions decide: in fixed
  // point their differences are exact, in double they would be off by a quarter of a rank at m = 131,072
  __device__ __forceinline__ long long prefix(int p) const { return __double_as_longlong(sum[padded(p)]); }

  // whether neighbouring blocks [a, c) and [c, b) pool
  __device__ __forceinline__ bool pools(int a, int c, int b) const {
    const double left = c - a, right = b - c;
    if (!kl) {
      const long long middle = prefix(c);
      const double fall =
          static_cast<double>(prefix(b) - middle) * left - static_cast<double>(middle - prefix(a)) * right;
      const double limit = 0.5 * left * right * (b - a) * unit;
      return kSort ? fall >= limit : fall <= limit;
    } else {
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

  // the largest power of two with which m sums of up to `rise` stay under 2^62
  __device__ __forceinline__ double unit_of(double rise) const {
    const long long bits = __double_as_longlong(fmax(rise, 1.0) * m);
    const int exponent = static_cast<int>(bits >> 52) - 1023;  // of a positive number
    return __longlong_as_double(static_cast<long long>(61 - exponent + 1023 - 1) << 52);
  }

  template <int T>
  __device__ void sums(const Group<T>& group) {
    const int chunk = (m + T - 1) / T, first = min(m, group.rank() * chunk), last = min(m, first + chunk);
    if (kl) {
      Exponential own = Exponential::none();
      for (int p = first; p < last; ++p) {
        const double rise = p > 0 ? apart(p - 1, p) : 0.0;
        own = {own.rise + rise, own.sum * exp(-rise) + 1.0};
      }
      double total = group.before(own, Exponential::none()).sum;
      for (int p = first; p < last; ++p) {
        if (p > 0) total *= exp(-apart(p - 1, p));
        total += 1.0;
        sum[padded(p + 1)] = total;
      }
    } else {
      Rise own = Rise::none();
      for (int p = first; p < last; ++p) own.rise += gap(p);
      double u = group.before(own, Rise::none()).rise;
      unit = unit_of(group.sum(own.rise));
      Whole total = Whole::none();
      for (int p = first; p < last; ++p) {
        u += gap(p);
        total.sum += llrint(u * unit);
        sum[padded(p + 1)] = __longlong_as_double(total.sum);
      }
      const long long lower = group.before(total, Whole::none()).sum;
      for (int p = first; p < last; ++p) sum[padded(p + 1)] = __longlong_as_double(prefix(p + 1) + lower);
    }
    if (group.rank() == 0) sum[0] = 0.0;
  }

  // positions enter one by one and the last two blocks pool while they must; one loop, so that lanes stay together
  __device__ void solve_leaf(int leaf) const {
    const int first = leaf << blocks.shift, last = min(m, first + (1 << blocks.shift));
    unsigned starts = 1;
    int top = first, b = first + 1;
    while (true) {
      const unsigned rest = starts ^ (1u << (top - first));
      if (rest) {
        const int a = first + 31 - __clz(static_cast<int>(rest));
        if (pools(a, top, b)) {
          starts = rest;
          top = a;
          continue;
        }
      }
      if (b == last) break;
      top = b++;
      starts |= 1u << (top - first);
    }
    blocks.starts[leaf] = starts;
    blocks.before[leaf] = first;
    blocks.after[leaf] = last;
  }

  // the block that solved halves [first, middle) and [middle, last) make, [middle, middle) if none. one loop around one
  // comparison, whatever a lane is at: lanes stay together, and the comparison is compiled once
  __device__ Range merge(int first, int middle, int last) const {
    enum Step { kTouch, kRight, kLeft, kInner, kJudge } step = kTouch;
    Range block{blocks.find(middle - 1).a, blocks.find(middle).b};  // joined so far
    Range tried{0, 0};        // a left block: joins if it pools with all between it and the best end on the right
    int low = first;          // left blocks before `low` do not join, those from block.a on do
    int from = 0, end = 0, beyond = 0;  // the best end for a start `from` is in [end, beyond]
    int walked = 0, x = block.a, c = middle, y = block.b;
    bool grown = false, settled = false;
    while (true) {
      const bool pooled = pools(x, c, y);
      switch (step) {
        case kTouch:
          if (!pooled) return {middle, middle};
          break;
        case kRight:
          if (pooled) block.b = y, grown = true;
          break;
        case kLeft:
          if (pooled) block.a = x, grown = true;
          break;
        case kInner:
          if (pooled) {
            end = y;
          } else {
            beyond = c;
          }
          break;
        case kJudge:
          if (pooled) {
            block.a = tried.a;
          } else {
            low = tried.b;
          }
      }
      // the next comparison
      if (step == kTouch || step == kLeft) {
        if (step == kLeft && !grown) return block;
        if (step == kTouch || ++walked < kWalk) {
          grown = false;
          step = kRight;
          if (block.b < last) {
            x = block.a, c = block.b, y = blocks.find(c).b;
            continue;
          }
        }
      }
      if (step == kRight) {
        step = kLeft;
        if (block.a > first) {
          c = block.a, x = blocks.find(c - 1).a, y = block.b;
          continue;
        }
        if (!grown) return block;
      }
      // the walk is over: bisect, from the left block in the middle of those in doubt, over positions on the right
      if (step != kInner || end >= beyond) {
        if (step == kInner && settled) return {block.a, end};
        if (step == kInner) {
          step = kJudge;
          x = tried.a, c = tried.b, y = end;
          continue;
        }
        settled = low >= block.a;
        if (!settled) tried = blocks.find((low + block.a) / 2);
        from = settled ? block.a : tried.b;
        end = block.b, beyond = last;
        step = kInner;
        if (end >= beyond) {
          if (settled) return {block.a, end};
          step = kJudge;
          x = tried.a, c = tried.b, y = end;
          continue;
        }
      }
      const Range next = blocks.find((end + beyond) / 2);
      x = from, c = next.a, y = next.b;
    }
  }

  template <int T>
  __device__ void solve(const Group<T>& group) {
    sums(group);
    group.sync();
    const int leaves = (m + (1 << blocks.shift) - 1) >> blocks.shift;
    for (int leaf = group.rank(); leaf < leaves; leaf += T) solve_leaf(leaf);
    group.sync();
    for (int half = 1; half < leaves; half *= 2) {
      for (int pair = group.rank(); (2 * pair + 1) * half < leaves; pair += T) {
        const int middle = (2 * pair + 1) * half;
        blocks.merged[pair] =
            merge((middle - half) << blocks.shift, middle << blocks.shift, min(m, (middle + half) << blocks.shift));
      }
      group.sync();
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
    return eps == 0.0 ? mean_w : mean_w - total / c / eps;
  }

  // a constant for every block of two or more, over `sum` at its end. terms are summed afresh, relative to the block: a
  // difference of the long sums has lost digits
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
        for (; p < stop; ++p) total += term(p, block);
      }
      p = stop;
      own = {total, own.started | (block.a >= first)};
      if (stop < block.b || block.b - block.a == 1) continue;
      if (block.a >= first) {
        sum[padded(block.b)] = constant(block, total);
      } else {
        early = block;
        early_sum = total;
      }
    }
    const double carried = group.before(own, Segment::none()).sum;
    if (early.b > 0) sum[padded(early.b)] = constant(early, carried + early_sum);
    group.sync();
  }

  // l2: mean_w + (s - mean_B s) / eps;  kl: R_B exp(s / eps) / Z_B
  __device__ __forceinline__ double rank_at(double s, Range block) const {
    if (block.b - block.a == 1) return block.b;
    const double shared = sum[padded(block.b)];
    if (kl) {
      const double below = s - key.value(block.b - 1);
      return below == 0.0 ? shared : shared * exp(below * inverse);
    }
    return eps == 0.0 ? shared : shared + (s - key.value(block.a)) * inverse;
  }

  // l2: mean_B s + (w_p - mean_B w) / eps;  kl: w_p / eps - log sum_B exp(w / eps) + log sum_B exp(s)
  __device__ __forceinline__ double sorted_at(int p, Range block) const {
    const int c = block.b - block.a;
    if (c == 1) return key.value(p);
    const double shared = sum[padded(block.b)];
    if (!kl) return key.value(block.a) + (shared + (p - 0.5 * (block.a + block.b - 1)) / eps);
    const double h = 1.0 / eps;
    return key.value(block.b - 1) + ((p + 1 - block.b) * h - log(expm1(-c * h) / expm1(-h)) + shared);
  }

  // the position of an element of the row, any of those that tie
  __device__ __forceinline__ int position(typename KeyOf<Value>::Key wanted) const {
    int low = 0, high = m - 1;
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
