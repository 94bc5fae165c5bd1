// SPDX-License-Identifier: Apache-2.0
// The blocks of a short row that a block of threads has: halves merge as in `Isotonic`, but each has its blocks' first
// positions in a list, so that the lanes of a pair try one block each, and both of its ends at once. Leaves, and pairs
// up to a warp's, belong to the same warp on every level: only it waits for them.
#pragma once

#include "blocks.cuh"

namespace kdkernels {

// how far a side of a merge is: of its next `left` blocks some may join, no other does
struct Reach {
  int left, step;

  // of `room` blocks that remain, by 2^shift lanes: all of them again, once the last ones are known
  __device__ __forceinline__ void aim(int room, int shift) {
    left = left ? left : room;
    step = (left + (1 << shift) - 1) >> shift;
  }
  // the first `yes` of 2^shift lanes said so. Returns how many blocks join
  __device__ __forceinline__ int join(int yes, int shift) {
    const int joined = yes ? min(step * (yes - 1) + 1, left) : 0;
    left = (yes >> shift ? left : min(step * yes, left)) - joined;
    return joined;
  }
};

// of a list at `first` of `low` blocks and one at `middle` of `high`: the last of the left one that stays, to which
// what pools belongs, and how many of the right one join. All lanes of a warp call, and stay until the last is done
template <class Fit>
__device__ Range joined_ends(const Fit& fit, const Team& team, bool active, int first, int middle, int low, int high) {
  const Place* list = fit.blocks.list;
  // the nearest blocks are tried by the last lanes of each half of a team
  const int shift = team.shift - 1, size = 1 << shift, k = size - 1 - (team.lane & (size - 1));
  const bool right = team.lane >= size;
  const int above_at = 32 - team.first() - team.size, below_at = above_at + size;
  int start = low - 1, end = 0;
  Reach below{0, 0}, above{0, 0};
  while (__any_sync(kAllLanes, active)) {
    below.aim(start, shift);
    above.aim(high - end, shift);
    const int left = right ? above.left : below.left, away = min((right ? above.step : below.step) * k, left - 1);
    bool pools = false;
    if (active && left > 0) {
      const int to_start = first + start, to_end = middle + end;
      const int p = right ? to_end + away : to_start - 1 - away, other = list[right ? to_start : to_end];
      const int a = list[p], b = list[p + 1];
      pools = fit.pools(right ? other : a, right ? a : b, right ? b : other);
    }
    const unsigned no = ~__ballot_sync(kAllLanes, pools);
    const int below_yes = min(__clz(static_cast<int>(no << below_at)), size);
    const int above_yes = min(__clz(static_cast<int>(no << above_at)), size);
    start -= below.join(below_yes, shift);
    end += above.join(above_yes, shift);
    active = active && (below_yes | above_yes);
  }
  return {start, end};
}

template <class Fit, int T>
__device__ void solve_in_lists(const Group<T>& group, const Fit& fit) {
  const Blocks& blocks = fit.blocks;
  const int m = fit.m, shift = blocks.shift + 1, leaves = (m + (1 << shift) - 1) >> shift;
  Place *list = blocks.list, *count = list + m + leaves;
  const int bits = 32 - __clz(max(leaves - 1, 0)), apart = bits_of(T) - bits;  // 2^apart threads a leaf, 2 or more
  auto listed = [&](int leaf) { return (leaf << shift) + leaf; };
  auto settle = [&](int lanes) { lanes < 5 ? __syncwarp() : group.sync(); };
  if (const int leaf = group.rank() >> apart; group.rank() == leaf << apart && leaf < leaves) {
    const int first = leaf << shift;
    int at = listed(leaf);
    for (unsigned starts = fit.solved_leaf(leaf, shift).starts(); starts; starts &= starts - 1) {
      list[at++] = static_cast<Place>(first + lowest_bit(starts));
    }
    list[at] = static_cast<Place>(min(m, first + (1 << shift)));
    count[leaf] = static_cast<Place>(at - listed(leaf));
  }
  settle(apart);
  for (int level = 0; 1 << level < leaves; ++level) {
    const Team team = Team::of(min(5, apart + 1 + level));
    const int pair = group.rank() >> team.shift, left = 2 * pair << level, right = left + (1 << level);
    const bool active = right < leaves;
    const int first = listed(left), middle = listed(right);
    const int low = active ? count[left] : 1, high = active ? count[right] : 0;
    const Range ends = joined_ends(fit, team, active, first, middle, low, high);
    // what is left of the right list, and its end, go behind what is left of the left one
    const int from = middle + ends.b, to = first + ends.a + 1, more = active ? high - ends.b : -1;
    for (int k = team.lane; __any_sync(kAllLanes, k <= more); k += team.size) {
      const int p = k <= more ? list[from + k] : 0;
      __syncwarp();
      if (k <= more) list[to + k] = static_cast<Place>(p);
    }
    if (active && team.lane == 0) count[left] = static_cast<Place>(ends.a + 1 + more);
    settle(apart + 1 + level);
  }
  // by position, for all that looks at them afterwards
  const int leaf = group.rank(), first = leaf << blocks.shift, last = min(m, first + (1 << blocks.shift));
  if (first < last) {
    int found = 0;
    for (int end = count[0]; end - found > 1;) {
      const int half = (found + end) / 2;
      (list[half] <= first ? found : end) = half;
    }
    int p = list[found];
    blocks.before[leaf] = p;
    unsigned starts = p == first;
    while ((p = list[++found]) < last) starts |= 1u << (p - first);
    blocks.starts[leaf] = starts;
    blocks.after[leaf] = p;
  }
  group.sync();
}

}  // namespace kdkernels
