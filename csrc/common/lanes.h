// SPDX-License-Identifier: Apache-2.0
// Eight double lanes, whatever the machine's registers hold: the lane count fixes the order of summation, so every
// instruction set adds in the same order. Float products are exact in double, so for float input the bits agree as well.
#pragma once

#include <cstdint>
#include <cstring>

// one copy of a hot function per x86-64 level, chosen when the library loads; elsewhere the plain build
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define KDK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KDK_CLONES
#endif

// the helpers must become part of each clone, or they would keep the baseline instruction set
#define KDK_INLINE inline __attribute__((always_inline))

namespace kdkernels {

constexpr int64_t kLanes = 8;

typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));

KDK_INLINE void load(const float* p, Lanes& out) {
  FloatLanes b;
  std::memcpy(&b, p, sizeof(b));
  out = __builtin_convertvector(b, Lanes);
}

KDK_INLINE void load(const double* p, Lanes& out) { std::memcpy(&out, p, sizeof(out)); }

KDK_INLINE void store(double* p, const Lanes& value) { std::memcpy(p, &value, sizeof(value)); }

// pairwise, so the tree is the same on every machine
KDK_INLINE double sum(const Lanes& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

}  // namespace kdkernels
