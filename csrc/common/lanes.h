// SPDX-License-Identifier: Apache-2.0
// Eight double lanes in registers of W doubles each. The lane count, not the register, fixes the order of summation, so
// every instruction set adds in the same order; float products are exact in double, so for float input the bits agree.
#pragma once

#include <cstdint>
#include <cstring>

// helpers must become part of the function that carries the target attribute, or they keep the baseline instructions
#define KDK_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define KDK_X86 1
#define KDK_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define KDK_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace kdkernels {

constexpr int kLanes = 8;

// spelled out for each W: GCC cannot convert a vector type that depends on a template argument
template <int W>
struct Register;
#define KDK_REGISTER(W)                                                                                         \
  template <>                                                                                                   \
  struct Register<W> {                                                                                          \
    typedef double Doubles __attribute__((vector_size(W * sizeof(double))));                                    \
    typedef float Floats __attribute__((vector_size(W * sizeof(float))));                                       \
    static KDK_INLINE void widen(const Floats& x, Doubles& out) { out = __builtin_convertvector(x, Doubles); }  \
  };
KDK_REGISTER(2)
KDK_REGISTER(4)
KDK_REGISTER(8)
#undef KDK_REGISTER

// the same eight lanes in float32
template <int W>
struct FloatLanes {
  using Floats = typename Register<W>::Floats;
  static constexpr int kParts = kLanes / W;
  Floats part[kParts];

  KDK_INLINE void load(const float* p) { std::memcpy(part, p, sizeof(part)); }
  KDK_INLINE void store(float* p) const { std::memcpy(p, part, sizeof(part)); }
  KDK_INLINE void subtract(const FloatLanes& x) {
    for (int h = 0; h < kParts; ++h) part[h] -= x.part[h];
  }
  KDK_INLINE void multiply(float factor) {
    for (int h = 0; h < kParts; ++h) part[h] *= factor;
  }
};

template <int W>
struct Lanes {
  using Doubles = typename Register<W>::Doubles;
  using Floats = typename Register<W>::Floats;
  static constexpr int kParts = kLanes / W;
  Doubles part[kParts];

  KDK_INLINE void load(const float* p) {
    for (int h = 0; h < kParts; ++h) {
      Floats b;
      std::memcpy(&b, p + h * W, sizeof(b));
      Register<W>::widen(b, part[h]);
    }
  }
  KDK_INLINE void set(const FloatLanes<W>& x) {
    for (int h = 0; h < kParts; ++h) Register<W>::widen(x.part[h], part[h]);
  }
  KDK_INLINE void load(const double* p) { std::memcpy(part, p, sizeof(part)); }
  KDK_INLINE void store(double* p) const { std::memcpy(p, part, sizeof(part)); }

  KDK_INLINE void add(const Lanes& x) {
    for (int h = 0; h < kParts; ++h) part[h] += x.part[h];
  }
  KDK_INLINE void set_product(const Lanes& x, const Lanes& y) {
    for (int h = 0; h < kParts; ++h) part[h] = x.part[h] * y.part[h];
  }

  // pairwise over the lanes, so the tree is the same whatever W is
  KDK_INLINE double sum() const {
    double v[kLanes];
    store(v);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
};

// a vector of either precision between -1 and 1; NaN is neither below nor above: it stays
template <class V>
KDK_INLINE V clamped(const V& e) {
  const V one = V{} + 1;
  const V low = e < -one ? -one : e;
  return low > one ? one : low;
}

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa detect_isa() {
#if KDK_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace kdkernels
