// SPDX-License-Identifier: Apache-2.0
// The sorted keys of a row: where each lies, and its value.
#pragma once

#include "../common/element.cuh"
#include "blocks.cuh"

namespace kdkernels {

// of the keys of a long row, whose searches step over thousands of them
__host__ __device__ __forceinline__ constexpr int key_place(int p) { return padded(p) + (p >> 10); }
__host__ __device__ __forceinline__ constexpr int key_position(int place) {
  const int most = place / key_place(1024), rest = place % key_place(1024);
  return most * 1024 + rest - rest / padded(32);
}

// sorted keys of a row; those in global memory lie densely
template <class Value, bool kPadded, bool kShort>
struct SortedKeys {
  using Key = typename KeyOf<Value>::Key;
  Key* key;
  __device__ __forceinline__ Key& at(int p) const {
    return key[!kPadded ? p : kShort ? padded(p) : key_place(p)];
  }
  __device__ __forceinline__ double value(int p) const { return static_cast<double>(decode<Value>(at(p))); }
};

// of a strength; 0 ranks hard. finite where it can be, so that 0 times it is 0
__device__ __forceinline__ double inverse_of(double eps) {
  return eps == 0.0 ? static_cast<double>(INFINITY) : fmin(1.0 / eps, 1.7e308);
}

}  // namespace kdkernels
