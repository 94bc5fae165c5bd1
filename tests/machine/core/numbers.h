// SPDX-License-Identifier: Apache-2.0
// Formats of numbers and the rounding of the instructions that make them.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>

#include "../../simt/simt_types.h"

namespace machine {

constexpr float kLeastNormal = 0x1p-126f;

inline float flush(float x) { return std::fabs(x) < kLeastNormal ? std::copysign(0.0f, x) : x; }

inline float from_half(std::uint32_t bits, bool bfloat) {
  const auto low = static_cast<std::uint16_t>(bits);
  return bfloat ? float(__ushort_as_bfloat16(low)) : float(__ushort_as_half(low));
}

// rounded once; a float is a double
inline std::uint32_t to_half(double x, bool bfloat) {
  return bfloat ? __double2bfloat16(x).bits : __double2half(x).bits;
}

// tensor cores drop the last 13 bits of a float, cvt.rna rounds them (ties away from zero)
inline std::uint32_t cut_to_tf32(std::uint32_t bits) { return bits & 0xffffe000u; }
inline std::uint32_t to_tf32(std::uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? cut_to_tf32(bits + 0x1000) : bits;
}

// the direction of rounding while it lives
class Rounding {
 public:
  explicit Rounding(int mode) : changed_(mode != FE_TONEAREST) {
    if (changed_) std::fesetround(mode);
  }
  ~Rounding() {
    if (changed_) std::fesetround(FE_TONEAREST);
  }
  Rounding(const Rounding&) = delete;

 private:
  bool changed_;
};

}  // namespace machine
