// SPDX-License-Identifier: Apache-2.0
// What scans of a sorted row carry from thread to thread (Group::before), joined from left to right.
#pragma once

#include "blocks.cuh"

namespace kdkernels {

struct Rise {  // of gaps, of values
  double value;
  __device__ static Rise none() { return {0.0}; }
  __device__ static Rise from_lane(const Rise& s, int delta) { return {__shfl_up_sync(kAllLanes, s.value, delta)}; }
  __device__ Rise then(const Rise& next) const { return {value + next.value}; }
};
struct Whole {  // of u in fixed point
  long long value;
  __device__ static Whole none() { return {0}; }
  __device__ static Whole from_lane(const Whole& s, int delta) { return {__shfl_up_sync(kAllLanes, s.value, delta)}; }
  __device__ Whole then(const Whole& next) const { return {value + next.value}; }
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
// kl: of a fit's row, those of this thread [first, last), each relative to its last element
template <class Fit, int T>
__device__ void exponential_sums(const Group<T>& group, const Fit& fit, int first, int last) {
  Exponential own = Exponential::none();
#pragma unroll 1
  for (int p = first; p < last; ++p) {
    const double rise = p > 0 ? fit.apart(p - 1, p) : 0.0;
    own = {own.rise + rise, own.sum * exp(-rise) + 1.0};
  }
  double total = group.before(own, Exponential::none()).sum;
#pragma unroll 1
  for (int p = first; p < last; ++p) {
    if (p > 0) total *= exp(-fit.apart(p - 1, p));
    total += 1.0;
    fit.sum[padded(p + 1)] = total;
  }
}
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

// where a scan of l2's terms y stands: u is y but for the position's number
struct Terms {
  double lowest, scale, unit;
  bool cut;  // gaps are, and u is their sum so far; else it is at hand
  double u;
};

}  // namespace kdkernels
