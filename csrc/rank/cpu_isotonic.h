// SPDX-License-Identifier: Apache-2.0
// Pool-adjacent-violators over entries sorted descending, in float64, one pass with a stack of blocks. An entry is a
// value and the positions it takes: one, or as many as a row repeats that value.
//
// A block [a, b) keeps its greatest value and sums of differences from it, never of the values: blocks are short in
// value, so nothing cancels. kl keeps sums of exponentials, relative to the same value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu_values.h"

namespace kdkernels {

struct Block {
  double top;   // greatest value
  double sum;   // l2: sum of value - top; kl: sum of exp((value - top) / eps), of soft_sort exp(value - top)
  double mean;  // l2: sum / length; kl of soft_sort: sum of exp(z - z_a)
  int32_t begin;  // first position
  int32_t entry;  // first entry
};

// each entry takes one position
struct Single {
  int32_t end(int64_t entry) const { return static_cast<int32_t>(entry + 1); }
};

// entry e takes positions [ends[e - 1], ends[e])
struct Repeated {
  const int32_t* ends;
  int32_t end(int64_t entry) const { return ends[entry]; }
};

// 1 / eps, finite, so that a difference of zero stays zero
inline double inverse(double eps) { return std::min(1 / eps, std::numeric_limits<double>::max()); }

// pools entries while `pool(left block, right block, end of the right one)` merges the right one into the left
template <class Ends, class Start, class Pool>
KDK_INLINE int64_t pool_adjacent(int64_t entries, Ends ends, Start start, Pool pool, Block* blocks) {
  if (entries == 0) return 0;
  int64_t depth = 0;
  Block last = start(0, 0, ends.end(0));  // the newest block stays out of the stack: most merges are with it
  for (int64_t e = 1; e < entries; ++e) {
    const int32_t begin = ends.end(e - 1), end = ends.end(e);
    Block next = start(e, begin, end);
    while (pool(last, next, end)) {
      next = last;
      if (depth == 0) break;
      last = blocks[--depth];
    }
    if (next.begin != last.begin) blocks[depth++] = last;
    last = next;
  }
  blocks[depth++] = last;
  return depth;
}

// ranks, l2: blocks pool unless the mean falls by more than eps a position
template <class Ends>
int64_t pool_l2(const double* s, int64_t entries, Ends ends, double eps, Block* blocks) {
  const double half = eps / 2;
  auto start = [=](int64_t e, int32_t begin, int32_t) { return Block{s[e], 0, 0, begin, static_cast<int32_t>(e)}; };
  auto pool = [=](Block& l, const Block& r, int32_t end) {
    const double fall = l.top - r.top, length = end - l.begin;
    if (fall + (l.mean - r.mean) > half * length) return false;
    l.sum += r.sum - (end - r.begin) * fall;
    l.mean = l.sum / length;
    return true;
  };
  return pool_adjacent(entries, ends, start, pool, blocks);
}

// twice the sum of the weights n - i over [a, b): exact
inline double twice_weight(int64_t n, int32_t a, int32_t b) {
  return static_cast<double>(b - a) * static_cast<double>(2 * n + 1 - a - b);
}

// ranks, kl: blocks pool unless log sum exp(s / eps) - log sum w falls
template <class Ends>
int64_t pool_kl(const double* s, int64_t entries, Ends ends, int64_t n, double eps, Block* blocks) {
  const double rate = inverse(eps);
  auto start = [=](int64_t e, int32_t begin, int32_t end) {
    return Block{s[e], static_cast<double>(end - begin), 0, begin, static_cast<int32_t>(e)};
  };
  auto pool = [=](Block& l, const Block& r, int32_t end) {
    const double fall = (l.top - r.top) * rate;
    const double left = twice_weight(n, l.begin, r.begin), least = l.sum * twice_weight(n, r.begin, end);
    if (r.sum * left < least * (1 + fall)) return false;  // exp(fall) >= 1 + fall settles most, without an exponential
    // where this underflows the blocks are far apart: sums and weights differ by powers of n alone
    const double share = std::exp(-fall) * r.sum;
    if (share * left < least) return false;
    l.sum += share;
    return true;
  };
  return pool_adjacent(entries, ends, start, pool, blocks);
}

// sorted values, l2: the roles of values and weights are exchanged
inline int64_t pool_sorted_l2(const double* s, int64_t n, double eps, Block* blocks) {
  const double half = inverse(eps) / 2;
  auto start = [=](int64_t e, int32_t begin, int32_t) { return Block{s[e], 0, 0, begin, static_cast<int32_t>(e)}; };
  auto pool = [=](Block& l, const Block& r, int32_t end) {
    const double fall = l.top - r.top, length = end - l.begin;
    if (fall + (l.mean - r.mean) < half * length) return false;
    l.sum += r.sum - (end - r.begin) * fall;
    l.mean = l.sum / length;
    return true;
  };
  return pool_adjacent(n, Single{}, start, pool, blocks);
}

// sorted values, kl: z_i = (n - i) / eps
inline int64_t pool_sorted_kl(const double* s, int64_t n, double eps, Block* blocks) {
  const double rate = inverse(eps);
  auto start = [=](int64_t e, int32_t begin, int32_t) { return Block{s[e], 1, 1, begin, static_cast<int32_t>(e)}; };
  auto pool = [=](Block& l, const Block& r, int32_t) {
    const double fall = l.top - r.top, step = (r.begin - l.begin) * rate;
    if (step - fall + std::log((l.mean * r.sum) / (r.mean * l.sum)) > 0) return false;
    l.sum += r.sum * std::exp(-fall);
    l.mean += r.mean * std::exp(-step);
    return true;
  };
  return pool_adjacent(n, Single{}, start, pool, blocks);
}

// the sum of term(0), ..., term(n - 1) in eight interleaved chains
template <class Term>
KDK_INLINE double sum_lanes(int64_t n, Term term) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += term(i + l);
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] += term(i);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// sqrt(12) std / n of the values of a row that are present; 1 for a constant row and for none (strength.py)
template <class Ends>
double spread(const double* s, int64_t entries, Ends ends) {
  if (entries == 0 || s[0] == s[entries - 1]) return 1;
  const double count = ends.end(entries - 1), top = s[0], range = top - s[entries - 1];
  // a power of two: squares neither overflow nor vanish
  const double unit = std::exp2(range > 0x1p-400 && range < 0x1p400 ? 0 : std::min(-std::ilogb(range), 1022));
  auto weight = [&](int64_t e) { return static_cast<double>(ends.end(e) - (e ? ends.end(e - 1) : 0)); };
  const double mean = sum_lanes(entries, [&](int64_t e) { return weight(e) * ((s[e] - top) * unit); }) / count;
  const double square = sum_lanes(entries, [&](int64_t e) {
    const double d = (s[e] - top) * unit - mean;
    return weight(e) * (d * d);
  });
  const double found = std::sqrt(12 * (square / count)) / count / unit;
  return std::max(found, std::numeric_limits<double>::min());  // 1 / eps stays finite
}

}  // namespace kdkernels
