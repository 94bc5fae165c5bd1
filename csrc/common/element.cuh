// SPDX-License-Identifier: Apache-2.0
// Elements of any dtype and their sort keys. The dtype is an argument, not a template: the switch is uniform, a load
// costs the same, and a kernel is compiled once for 32-bit keys (half, bfloat16, float) and once for 64-bit (double).
#pragma once

#include <cfloat>

#include "device.cuh"

namespace kdkernels {

enum Dtype : int { kHalf, kBfloat16, kFloat, kDouble };

__host__ __device__ inline bool is_half(int dtype) { return dtype == kHalf || dtype == kBfloat16; }
inline int bytes_of(int dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }

// Key: unsigned of Value's size whose order is Value's; the largest key belongs to no number and means absent
template <class Value>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Key = unsigned;
  using Signed = int;
  static constexpr int kDtype = kFloat;
  __device__ static unsigned bits(float v) { return __float_as_uint(v); }
  __device__ static float value(unsigned u) { return __uint_as_float(u); }
};
template <>
struct KeyOf<double> {
  using Key = unsigned long long;
  using Signed = long long;
  static constexpr int kDtype = kDouble;
  __device__ static unsigned long long bits(double v) {
    return static_cast<unsigned long long>(__double_as_longlong(v));
  }
  __device__ static double value(unsigned long long u) { return __longlong_as_double(static_cast<long long>(u)); }
};

template <class Value>
constexpr typename KeyOf<Value>::Key kAbsent = ~typename KeyOf<Value>::Key(0);

// all ones of a key whose first bit is set
template <class Value>
__device__ __forceinline__ typename KeyOf<Value>::Key spread_sign(typename KeyOf<Value>::Key key) {
  using Signed = typename KeyOf<Value>::Signed;
  return static_cast<typename KeyOf<Value>::Key>(static_cast<Signed>(key) >> (8 * sizeof(key) - 1));
}

// -0.0 takes the key of 0.0
template <class Value>
__device__ __forceinline__ typename KeyOf<Value>::Key encode(Value v) {
  using Key = typename KeyOf<Value>::Key;
  const Key u = KeyOf<Value>::bits(v + Value(0)), sign = Key(1) << (8 * sizeof(Key) - 1);
  return u ^ (spread_sign<Value>(u) | sign);
}
template <class Value>
__device__ __forceinline__ Value decode(typename KeyOf<Value>::Key key) {
  using Key = typename KeyOf<Value>::Key;
  const Key sign = Key(1) << (8 * sizeof(Key) - 1);
  return KeyOf<Value>::value(key ^ (~spread_sign<Value>(key) | sign));
}

// last bits of a float's key that follow from its sign where it holds a number of this dtype
__device__ __forceinline__ int constant_bits(int dtype) { return dtype == kBfloat16 ? 16 : dtype == kHalf ? 13 : 0; }

template <class Value>
__device__ __forceinline__ Value load(const void* p, int dtype, int64_t at) {
  switch (dtype) {
    case kHalf:
      return static_cast<Value>(__half2float(static_cast<const __half*>(p)[at]));
    case kBfloat16:
      return static_cast<Value>(__bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]));
    case kFloat:
      return static_cast<Value>(static_cast<const float*>(p)[at]);
    default:
      return static_cast<Value>(static_cast<const double*>(p)[at]);
  }
}

__device__ __forceinline__ void put(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void put(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void put(float& to, float v) { to = v; }
// a double is rounded once
__device__ __forceinline__ void put(__half& to, double v) { to = __double2half(v); }
__device__ __forceinline__ void put(__nv_bfloat16& to, double v) { to = __double2bfloat16(v); }
__device__ __forceinline__ void put(float& to, double v) { to = static_cast<float>(v); }
__device__ __forceinline__ void put(double& to, double v) { to = v; }

__device__ __forceinline__ float wider(__half v) { return __half2float(v); }
__device__ __forceinline__ float wider(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float wider(float v) { return v; }
__device__ __forceinline__ double wider(double v) { return v; }

// the least finite number of a dtype, by which rows are padded: absent, as -inf is
__device__ __forceinline__ float least_of(__half) { return -65504.0f; }
__device__ __forceinline__ float least_of(__nv_bfloat16) { return -0x1.FEp127f; }
__device__ __forceinline__ float least_of(float) { return -FLT_MAX; }
__device__ __forceinline__ double least_of(double) { return -DBL_MAX; }

// go(p), p the typed elements or results of rows that are worked on in Value: the dtype is looked at once, not for each
// element
template <class Value, class Go>
__device__ __forceinline__ void typed(void* p, int dtype, Go go) {
  if constexpr (sizeof(Value) == 8) {
    go(static_cast<double*>(p));
  } else if (dtype == kFloat) {
    go(static_cast<float*>(p));
  } else if (dtype == kBfloat16) {
    go(static_cast<__nv_bfloat16*>(p));
  } else {
    go(static_cast<__half*>(p));
  }
}

__device__ __forceinline__ void store(void* p, int dtype, int64_t at, double v) {
  if (dtype == kDouble) {
    put(static_cast<double*>(p)[at], v);
  } else {
    typed<float>(p, dtype, [&](auto* to) { put(to[at], v); });
  }
}

template <class Value>
__device__ __forceinline__ bool is_absent(Value v) {
  return v == -static_cast<Value>(INFINITY);
}
template <class Value>
__device__ __forceinline__ bool is_poison(Value v) {
  return v != v || v == static_cast<Value>(INFINITY);
}

}  // namespace kdkernels
