// SPDX-License-Identifier: Apache-2.0
// Conversions between integers and floats, and between formats of floats.
#include <algorithm>
#include <limits>

#include "semantics.h"

namespace machine {
namespace {

double to_integral(const Lane& x, double value) {
  if (x.has("TRUNC")) return std::trunc(value);
  if (x.has("FLOOR")) return std::floor(value);
  return x.has("CEIL") ? std::ceil(value) : std::nearbyint(value);
}

// beyond the range of T: its ends
template <class T>
T saturated(double value, T nan) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(value)) return nan;
  if (value <= double(Limits::min())) return Limits::min();
  return value >= std::ldexp(1.0, Limits::digits) ? Limits::max() : static_cast<T>(value);
}

void to_integer(Lane& x) {
  const double value = to_integral(x, x.has("F64") ? x.d(1) : double(x.f(1)));
  constexpr std::uint64_t kNoNumber = 1ull << 63;
  if (x.has("U64")) return x.set_wide(0, saturated<std::uint64_t>(value, kNoNumber));
  if (x.has("S64")) return x.set_wide(0, saturated<std::int64_t>(value, static_cast<std::int64_t>(kNoNumber)));
  if (x.has("U32")) return x.set(0, saturated<std::uint32_t>(value, 0));
  x.set(0, static_cast<std::uint32_t>(saturated<std::int32_t>(value, 0)));
}

std::int64_t integer_operand(const Lane& x) {
  if (x.has("S64")) return static_cast<std::int64_t>(x.wide(1));
  const int part = x.operand(1).part;
  const std::uint32_t value = x.raw(1) >> (part >= 4 ? 8 * (part - 4) : part == 2 ? 16 : 0);
  if (x.has("U8")) return value & 0xff;
  if (x.has("S8")) return static_cast<std::int8_t>(value);
  if (x.has("U16")) return value & 0xffff;
  if (x.has("S16")) return static_cast<std::int16_t>(value);
  if (x.has("U32")) return x.u(1);
  return x.s(1);
}

void from_integer(Lane& x) {
  Rounding rounding(x.rounding());
  if (x.has("U64")) {
    volatile std::uint64_t value = x.wide(1);
    return x.has("F64") ? x.set_double(0, double(value)) : x.set_float(0, float(value));
  }
  volatile std::int64_t value = integer_operand(x);
  if (x.has("F64")) return x.set_double(0, double(value));
  volatile float out = float(value);
  x.set_float(0, out);
}

void between_floats(Lane& x) {
  std::vector<std::string> formats;  // to, from
  for (const std::string& m : x.at.modifiers)
    if (m == "F64" || m == "F32" || m == "F16" || m == "BF16") formats.push_back(m);
  if (formats.size() != 2) throw Fault("a conversion that is not modelled");
  const std::string pair = formats[0] + " " + formats[1];
  if (pair == "F64 F32") return x.set_double(0, x.f(1));
  if (pair == "F32 F64") {
    Rounding rounding(x.rounding());
    volatile double value = x.d(1);
    volatile float out = float(value);
    return x.set_float(0, x.flushed(out));
  }
  if (pair == "F32 F32") return x.set_float(0, static_cast<float>(to_integral(x, x.f(1))));
  if (pair == "BF16 F32" || pair == "F16 F32") return x.set(0, to_half(x.f(1), formats[0] == "BF16"));
  if (pair == "BF16 F64" || pair == "F16 F64") return x.set(0, to_half(x.d(1), formats[0] == "BF16"));
  const bool bfloat = pair == "F64 BF16";
  if (pair != "F32 F16" && pair != "F64 F16" && !bfloat) throw Fault("a conversion that is not modelled");
  const float value = from_half(x.raw(1) >> (x.operand(1).part == 2 ? 16 : 0), bfloat);
  const float out = x.operand(1).negated ? -value : value;
  formats[0] == "F64" ? x.set_double(0, out) : x.set_float(0, out);
}

void pack(Lane& x) {
  if (x.has("TF32")) return x.set(0, to_tf32(x.bits(x.count() - 1)));
  const bool bfloat = x.has("BF16");
  x.set(0, to_half(x.f(1), bfloat) << 16 | to_half(x.f(2), bfloat));
}

}  // namespace

void add_conversions(Table& table) {
  table.lanes("F2I", "FTZ NTZ TRUNC FLOOR CEIL U32 S32 U64 S64 F64", to_integer);
  table.lanes("I2F I2FP", "RN RM RP RZ U8 S8 U16 S16 U32 S32 U64 S64 F32 F64", from_integer);
  table.lanes("F2F", "FTZ RN RM RP RZ TRUNC FLOOR CEIL F64 F32 F16 BF16", between_floats);
  table.lanes("F2FP", "F16 BF16 TF32 F32 PACK_AB PUNPACK_B", pack);
  table.lanes("FRND", "FTZ TRUNC FLOOR CEIL", [](Lane& x) { x.set_float(0, float(to_integral(x, x.f(1)))); });
}

}  // namespace machine
