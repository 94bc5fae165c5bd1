// SPDX-License-Identifier: Apache-2.0
// Arithmetic of floats, doubles and packed halves, each rounded once as its modifier says.
#include "semantics.h"

namespace machine {
namespace {

constexpr std::uint32_t kNaN = 0x7fffffff;

void finish(Lane& x, float value) {
  value = x.flushed(value);
  if (x.has("SAT")) value = value > 0 ? std::fmin(value, 1.0f) : 0.0f;
  x.set(0, std::isnan(value) ? kNaN : std::bit_cast<std::uint32_t>(value));
}

template <class T>
bool compare(const Lane& x, T a, T b) {
  const bool unordered = std::isnan(a) || std::isnan(b);
  if (x.has("NAN")) return unordered;
  if (x.has("NUM")) return !unordered;
  if (x.has("LT") || x.has("LTU")) return unordered ? x.has("LTU") : a < b;
  if (x.has("LE") || x.has("LEU")) return unordered ? x.has("LEU") : a <= b;
  if (x.has("GT") || x.has("GTU")) return unordered ? x.has("GTU") : a > b;
  if (x.has("GE") || x.has("GEU")) return unordered ? x.has("GEU") : a >= b;
  if (x.has("EQ") || x.has("EQU")) return unordered ? x.has("EQU") : a == b;
  return unordered ? x.has("NEU") : a != b;
}

void set_comparison(Lane& x, bool value) {
  auto with = [&](bool v) { return x.has("OR") ? v || x.p(4) : x.has("XOR") ? v != x.p(4) : v && x.p(4); };
  const bool first = with(value), second = with(!value);
  x.set_p(0, first);
  x.set_p(1, second);
}

void compare_doubles(Lane& x) {
  const double a = x.d(2), b = x.d(3);
  if (!x.has("MAX") && !x.has("MIN")) return set_comparison(x, compare(x, a, b));
  // which operand is the extreme one, and whether there is none
  x.set_p(0, !std::isnan(a) && (std::isnan(b) || (x.has("MAX") ? a > b : a < b)));
  x.set_p(1, std::isnan(a) && std::isnan(b));
}

void extreme(Lane& x) {
  const float a = x.f(1), b = x.f(2);
  const bool least = x.p(3), nan_a = std::isnan(a), nan_b = std::isnan(b);
  if ((nan_a && nan_b) || (x.has("NAN") && (nan_a || nan_b))) return x.set(0, kNaN);
  const bool first = nan_b || (!nan_a && (a == b ? std::signbit(a) == least : (a < b) == least));
  std::uint32_t out = std::bit_cast<std::uint32_t>(first ? a : b);
  // the product of the signs, as written before |x|
  if (x.has("XORSIGN")) out = (out & 0x7fffffff) | ((x.raw(1) ^ x.raw(2)) & 0x80000000u);
  x.set(0, out);
}

// of a product, before it is rounded
double scale(const Lane& x) {
  if (x.has("D2")) return 0.5;
  if (x.has("D4")) return 0.25;
  if (x.has("D8")) return 0.125;
  return x.has("M2") ? 2 : x.has("M4") ? 4 : x.has("M8") ? 8 : 1;
}

// the last bit of the special function unit is not modelled: these round correctly
void special_function(Lane& x) {
  if (x.has("RCP64H") || x.has("RSQ64H")) {  // from the upper half of a double to the upper half
    const double v = std::bit_cast<double>(std::uint64_t(x.bits(1)) << 32);
    const double out = x.has("RCP64H") ? 1 / v : 1 / std::sqrt(v);
    return x.set(0, std::bit_cast<std::uint64_t>(out) >> 32);
  }
  const double v = flush(std::bit_cast<float>(x.bits(1)));
  double out = v;
  if (x.has("RCP")) out = 1 / v;
  else if (x.has("RSQ")) out = 1 / std::sqrt(v);
  else if (x.has("SQRT")) out = std::sqrt(v);
  else if (x.has("EX2")) out = std::exp2(v);
  else if (x.has("LG2")) out = std::log2(v);
  else if (x.has("TANH")) out = std::tanh(v);
  else throw Fault("a special function that is not modelled");
  finish(x, flush(static_cast<float>(out)));
}

// whether a quotient needs the slow path: exponents near the ends, or far apart
void check_division(Lane& x) {
  const int a = x.bits(1) >> 23 & 255, b = x.bits(2) >> 23 & 255;
  x.set_p(0, !(a > 30 && a < 255 && b > 1 && b < 253 && std::abs(a - b) < 120));
}

// half `h` (0 low) of operand k of packed halves
float half_of(const Lane& x, int k, int h, bool bfloat) {
  const Operand& o = x.operand(k);
  const bool upper = o.part ? o.part == 2 : h == 1;
  float value = from_half(x.raw(k) >> (upper ? 16 : 0), bfloat);
  if (o.absolute) value = std::fabs(value);
  return o.negated ? -value : value;
}

template <class F>
void packed(Lane& x, F exact) {  // exact(half): a double that holds the unrounded result of 11-bit or 8-bit numbers
  const bool bfloat = x.has("BF16_V2") || x.has("BF16");
  std::uint32_t out = 0;
  for (int h = 0; h < 2; ++h) {
    const auto operand = [&](int k) { return double(half_of(x, k, h, bfloat)); };
    out |= to_half(exact(operand), bfloat) << 16 * h;
  }
  x.set(0, out);
}

double extreme_of(bool least, double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  return (a == b ? std::signbit(a) == least : (a < b) == least) ? a : b;
}

// of two pairs, or of three
void packed_extreme(Lane& x) {
  const int last = x.count() - 1;
  packed(x, [&](auto operand) {
    double out = operand(1);
    for (int k = 2; k < last; ++k) out = extreme_of(x.p(last), out, operand(k));
    return out;
  });
}

}  // namespace

void add_floats(Table& table) {
  const char* kRounded = "FTZ SAT RN RM RP RZ";
  // volatile: the operation must happen between the two changes of the rounding direction
  table.lanes("FADD", kRounded, [](Lane& x) {
    Rounding rounding(x.rounding());
    volatile float a = x.f(1), b = x.f(2), sum = a + b;
    finish(x, sum);
  });
  table.lanes("FMUL", std::string(kRounded) + " D2 D4 D8 M2 M4 M8", [](Lane& x) {
    Rounding rounding(x.rounding());
    volatile double product = double(x.f(1)) * double(x.f(2)) * scale(x);  // exact
    volatile float value = static_cast<float>(product);
    finish(x, value);
  });
  table.lanes("FFMA", kRounded, [](Lane& x) {
    Rounding rounding(x.rounding());
    volatile float value = std::fma(x.f(1), x.f(2), x.f(3));
    finish(x, value);
  });
  table.lanes("DADD", "RN RM RP RZ", [](Lane& x) {
    Rounding rounding(x.rounding());
    volatile double a = x.d(1), b = x.d(2), sum = a + b;
    x.set_double(0, sum);
  });
  table.lanes("DMUL", "RN RM RP RZ", [](Lane& x) {
    Rounding rounding(x.rounding());
    volatile double a = x.d(1), b = x.d(2), product = a * b;
    x.set_double(0, product);
  });
  table.lanes("DFMA", "RN RM RP RZ", [](Lane& x) {
    Rounding rounding(x.rounding());
    volatile double value = std::fma(x.d(1), x.d(2), x.d(3));
    x.set_double(0, value);
  });
  const std::string comparisons = "LT LE GT GE EQ NE LTU LEU GTU GEU EQU NEU NAN NUM AND OR XOR ";
  table.lanes("FSETP", comparisons + "FTZ", [](Lane& x) { set_comparison(x, compare(x, x.f(2), x.f(3))); });
  table.lanes("DSETP", comparisons + "MAX MIN", compare_doubles);
  table.lanes("FSEL", "FTZ", [](Lane& x) { x.set(0, x.p(3) ? x.bits(1) : x.bits(2)); });
  table.lanes("FMNMX", "FTZ NAN XORSIGN", extreme);
  table.lanes("MUFU", "RCP RSQ SQRT EX2 LG2 TANH RCP64H RSQ64H", special_function);
  table.lanes("FCHK", "DIVIDE", check_division);
  table.lanes("HADD2", "F32 BF16_V2 BF16", [](Lane& x) {
    if (x.has("F32")) return x.set_float(0, half_of(x, 1, 0, false) + half_of(x, 2, 0, false));
    packed(x, [](auto operand) { return operand(1) + operand(2); });
  });
  table.lanes("HMUL2", "BF16_V2 BF16", [](Lane& x) {
    packed(x, [](auto operand) { return operand(1) * operand(2); });
  });
  table.lanes("HFMA2", "MMA BF16_V2 BF16", [](Lane& x) {
    packed(x, [](auto operand) { return std::fma(operand(1), operand(2), operand(3)); });
  });
  table.lanes("HMNMX2 VHMNMX", "BF16_V2", packed_extreme);
}

}  // namespace machine
