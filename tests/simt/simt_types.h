// SPDX-License-Identifier: Apache-2.0
// CUDA's scalar and vector types, half formats and arithmetic intrinsics, in plain C++ with the same rounding.
// The approximate ones (__expf, rsqrtf, ...) are exact here, so an error they bring is not seen in this leg.
#pragma once

#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#define __align__(n) alignas(n)

using cudaStream_t = void*;

// [name]2 and [name]4 with CUDA's alignment
#define SIMT_VECTORS(T, name)                                                                           \
  struct alignas(2 * sizeof(T)) name##2 {                                                               \
    T x, y;                                                                                             \
  };                                                                                                    \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) name##4 {                                         \
    T x, y, z, w;                                                                                       \
  };                                                                                                    \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                                         \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(unsigned short, ushort)
SIMT_VECTORS(unsigned char, uchar)
SIMT_VECTORS(long long, longlong)
SIMT_VECTORS(unsigned long long, ulonglong)
#undef SIMT_VECTORS

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// bfloat16 keeps float's exponent: round to nearest even on the upper 16 bits, NaN stays NaN
struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    const unsigned u = std::bit_cast<unsigned>(x);
    bits = x != x ? 0x7FFF : static_cast<std::uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(unsigned(bits) << 16); }
};

struct __half {
  std::uint16_t bits;
  __half() = default;
  __half(float x) {
    const unsigned u = std::bit_cast<unsigned>(x);
    const unsigned sign = u >> 16 & 0x8000;
    const float magnitude = std::bit_cast<float>(u & 0x7FFFFFFF);
    if (x != x) {
      bits = 0x7FFF;
    } else if (magnitude >= 65520.0f) {  // rounds to a value above the largest, 65504
      bits = static_cast<std::uint16_t>(sign | 0x7C00);
    } else if (magnitude < 0x1p-14f) {
      // adding 0.5 puts the spacing of the subnormals, 2^-24, at the last bit of the sum
      bits = static_cast<std::uint16_t>(sign | (std::bit_cast<unsigned>(magnitude + 0.5f) - 0x3F000000u));
    } else {
      const unsigned m = (u & 0x7FFFFFFF) - (112u << 23);
      bits = static_cast<std::uint16_t>(sign | ((m + 0xFFF + (m >> 13 & 1)) >> 13));
    }
  }
  operator float() const {
    const unsigned sign = unsigned(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    if (rest >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000u | (rest & 0x3FF) << 13);
    if (rest < 0x400) return std::copysign(static_cast<float>(rest) * 0x1p-24f, std::bit_cast<float>(sign | 1u));
    return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
  }
};
using half = __half;
using nv_bfloat16 = __nv_bfloat16;

// CUDA rounds a double once; going through float would round twice. the float is rounded to odd, then to half
namespace simt {
inline float round_to_odd(double x) {
  const float near = static_cast<float>(x);
  if (static_cast<double>(near) == x || x != x || std::isinf(near)) return near;
  unsigned u = std::bit_cast<unsigned>(near);
  if ((std::fabs(static_cast<double>(near)) > std::fabs(x))) u -= 1;  // towards zero
  return std::bit_cast<float>(u | 1);
}
}  // namespace simt

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __double2half(double x) { return __half(simt::round_to_odd(x)); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __double2bfloat16(double x) { return __nv_bfloat16(simt::round_to_odd(x)); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return std::bit_cast<__half>(x); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return std::bit_cast<__nv_bfloat16>(x); }

// loads and stores with a cache hint
#define SIMT_LOAD(name)             \
  template <class T>                \
  T name(const T* p) {              \
    return *p;                      \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name)                            \
  template <class T>                                \
  void name(T* p, std::type_identity_t<T> value) {  \
    *p = value;                                     \
  }
SIMT_STORE(__stwb)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)
#undef SIMT_STORE

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t(high) << 32 | low) >> (shift & 31));
}

// the device's min and max drop a NaN, as fmin and fmax do
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(T(a), T(b));
  } else {
    return T(b) < T(a) ? T(b) : T(a);
  }
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(T(a), T(b));
  } else {
    return T(a) < T(b) ? T(b) : T(a);
  }
}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
// never contracted into a fused multiply-add: the build sets -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
