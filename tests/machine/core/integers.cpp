// SPDX-License-Identifier: Apache-2.0
// Integers, logic and predicates. Predicates that an instruction sets stand before what it reads.
#include <algorithm>

#include "semantics.h"

namespace machine {
namespace {

// a boolean function of three variables: bit 4a + 2b + c of `truth` is its value
std::uint32_t lookup(int truth, std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (truth >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

std::uint32_t lowest(std::uint32_t value, int bits) { return bits >= 32 ? value : value & ((1u << bits) - 1); }

bool combined(const Lane& x, bool value, bool other) {
  return x.has("OR") ? value || other : x.has("XOR") ? value != other : value && other;
}

// what a subtrahend adds to a sum that keeps its carry: ~x + 1, of which the one may overflow
std::uint64_t negative(std::uint32_t value) { return std::uint64_t(~value) + 1; }
std::uint64_t addend(const Lane& x, int k) {
  const Operand& o = x.operand(k);
  const std::uint32_t value = x.raw(k);
  return o.negated ? negative(value) : o.inverted ? ~value : value;
}

std::uint64_t product(const Lane& x, int k) {
  if (x.has("U32")) return std::uint64_t(x.u(k)) * x.u(k + 1);
  return static_cast<std::uint64_t>(std::int64_t(x.s(k)) * x.s(k + 1));
}

void multiply_add(Lane& x) {
  if (x.has("WIDE")) {
    const int first = x.after_predicates(1);
    const std::uint64_t p = product(x, first), sum = p + x.wide(first + 2);
    x.set_wide(0, sum);
    if (first == 2) x.set_p(1, sum < p);
  } else if (x.has("HI")) {
    x.set(0, (product(x, 1) + x.wide(3)) >> 32);
  } else {
    x.set(0, x.u(1) * x.u(2) + x.u(3) + (x.has("X") && x.p(4)));
  }
}

void add_three(Lane& x) {
  const int first = x.after_predicates(1);
  if (x.has("64")) {
    if (first != 1 || x.has("X")) throw Fault("64-bit addition with a carry");
    return x.set_wide(0, x.wide(1) + x.wide(2) + x.wide(3));
  }
  if (x.has("16x2")) {
    if (x.operand(1).negated || x.operand(2).negated) throw Fault("a packed difference");
    return x.set(0, ((x.u(1) + x.u(2)) & 0xFFFF) | (((x.u(1) >> 16) + (x.u(2) >> 16)) << 16));
  }
  std::uint64_t sum = 0;
  for (int k = first; k < x.count(); ++k) sum += x.operand(k).is_predicate() ? x.p(k) : addend(x, k);
  x.set(0, static_cast<std::uint32_t>(sum));
  for (int k = 1; k < first; ++k) x.set_p(k, sum >> 32 >= static_cast<unsigned>(k));
}

// (a << shift) + b; .HI takes the upper word of a pair, or of the sign-extended a
void shift_add(Lane& x) {
  const int a = x.after_predicates(1);
  int next = a + 3;
  std::uint64_t shifted;
  if (x.has("HI") && !x.has("SX32"))
    shifted = (x.u(a) | std::uint64_t(x.u(a + 2)) << 32) << x.u(next++) >> 32;
  else if (x.has("HI"))
    shifted = static_cast<std::uint64_t>(std::int64_t(x.s(a))) << x.u(a + 2) >> 32;
  else if (x.operand(a).negated)
    shifted = negative(x.raw(a) << x.u(a + 2));
  else
    shifted = std::uint32_t(x.u(a) << x.u(a + 2));
  const std::uint64_t sum = shifted + addend(x, a + 1) + (x.has("X") && x.p(next));
  x.set(0, static_cast<std::uint32_t>(sum));
  if (a == 2) x.set_p(1, sum >> 32 != 0);
}

// the pair (operand 3, operand 1) shifted; .HI keeps its upper word. one word alone where the type has 32 bits
void funnel_shift(Lane& x) {
  const bool wide = x.has("U64") || x.has("S64"), arithmetic = x.has("S32") || x.has("S64"), high = x.has("HI");
  std::uint32_t count = x.u(2);
  if (x.has("W")) count &= wide ? 63 : 31;
  count = std::min(count, 64u);
  std::uint64_t pair = std::uint64_t(x.u(3)) << 32 | x.u(1);
  if (!wide && high && !x.has("L")) {  // 32 bits to the right: the upper word alone
    const std::int64_t word = arithmetic ? std::int64_t(x.s(3)) : std::int64_t(x.u(3));
    return x.set(0, static_cast<std::uint32_t>(word >> std::min(count, 32u)));
  }
  if (x.has("L")) {
    if (!wide) count = std::min(count, 32u);
    pair = count > 63 ? 0 : pair << count;
  } else {
    pair = arithmetic ? std::uint64_t(std::int64_t(pair) >> std::min(count, 63u)) : count > 63 ? 0 : pair >> count;
  }
  x.set(0, static_cast<std::uint32_t>(high ? pair >> 32 : pair));
}

template <class T>
bool compare(const Lane& x, T a, T b) {
  if (x.has("LT")) return a < b;
  if (x.has("LE")) return a <= b;
  if (x.has("GT")) return a > b;
  if (x.has("GE")) return a >= b;
  return x.has("EQ") ? a == b : a != b;
}

void compare_integers(Lane& x) {
  const std::uint32_t a = x.u(2), b = x.u(3);
  const bool is_unsigned = x.has("U32");
  bool value = is_unsigned ? compare(x, a, b) : compare(x, std::int32_t(a), std::int32_t(b));
  if (x.has("EX")) {  // the upper words; the last operand is the comparison of the lower ones
    const bool lower = x.p(5);
    if (x.has("NE")) value = a != b || lower;
    else if (a == b) value = lower;
    else if (x.has("EQ")) value = false;
  }
  x.set_p(0, combined(x, value, x.p(4)));
  x.set_p(1, combined(x, !value, x.p(4)));
}

std::uint32_t extreme(const Lane& x, std::uint32_t a, std::uint32_t b, bool least) {
  const bool below = x.has("U32") ? a < b : std::int32_t(a) < std::int32_t(b);
  return below == least ? a : b;
}

void permute_bytes(Lane& x) {
  const std::uint64_t bytes = x.u(1) | std::uint64_t(x.u(3)) << 32;
  std::uint32_t out = 0;
  for (int j = 0; j < 4; ++j) {
    const int selector = x.u(2) >> 4 * j & 15;
    std::uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;  // its sign
    out |= byte << 8 * j;
  }
  x.set(0, out);
}

void extend(Lane& x) {
  const std::uint32_t value = x.u(1);
  const int bits = std::min(x.has("W") ? x.u(2) & 31 : x.u(2), 32u);
  if (x.has("U32") || bits == 0) return x.set(0, bits ? lowest(value, bits) : 0);
  x.set(0, static_cast<std::uint32_t>(std::int32_t(value << (32 - bits)) >> (32 - bits)));
}

void leading_one(Lane& x) {
  const int k = x.after_predicates(1);
  std::uint32_t value = x.u(k);
  if (!x.has("U32") && value >> 31) value = ~value;
  const std::uint32_t from_top = std::countl_zero(value);
  x.set(0, !value ? ~0u : x.has("SH") ? from_top : 31 - from_top);
  if (k == 2) x.set_p(1, value == 0);
}

}  // namespace

void add_integers(Table& table) {
  table.lanes("MOV UMOV", "", [](Lane& x) { x.set(0, x.u(1)); });
  table.lanes("IMAD UIMAD", "WIDE U32 S32 HI MOV IADD SHL X", multiply_add);
  table.lanes("IADD3 UIADD3", "X 64", add_three);
  table.lanes("VIADD", "16x2", add_three);
  table.lanes("LEA ULEA", "HI X SX32", shift_add);
  table.lanes("SHF USHF", "L R HI U32 S32 U64 S64 W", funnel_shift);
  table.lanes("SEL USEL", "", [](Lane& x) { x.set(0, x.p(3) ? x.u(1) : x.u(2)); });
  table.lanes("ISETP UISETP", "LT LE GT GE EQ NE AND OR XOR U32 EX", compare_integers);
  table.lanes("IMNMX UIMNMX VIMNMX", "U32", [](Lane& x) { x.set(0, extreme(x, x.u(1), x.u(2), x.p(3))); });
  table.lanes("VIMNMX3", "U32", [](Lane& x) {
    x.set(0, extreme(x, extreme(x, x.u(1), x.u(2), x.p(4)), x.u(3), x.p(4)));
  });
  table.lanes("VIADDMNMX", "U32 RELU", [](Lane& x) {
    const std::uint32_t found = extreme(x, x.u(1) + x.u(2), x.u(3), x.p(4));
    x.set(0, x.has("RELU") && std::int32_t(found) < 0 ? 0 : found);
  });
  table.lanes("IABS", "", [](Lane& x) { x.set(0, x.s(1) < 0 ? 0 - x.u(1) : x.u(1)); });
  table.lanes("PRMT UPRMT", "", permute_bytes);
  table.lanes("SGXT USGXT", "U32 W", extend);
  table.lanes("FLO UFLO", "U32 SH", leading_one);
  table.lanes("POPC UPOPC", "", [](Lane& x) { x.set(0, std::popcount(x.u(1))); });
  table.lanes("BREV UBREV", "", [](Lane& x) {
    std::uint32_t out = 0;
    for (int i = 0; i < 32; ++i) out |= (x.u(1) >> i & 1) << (31 - i);
    x.set(0, out);
  });
  table.lanes("BMSK UBMSK", "W", [](Lane& x) {
    const std::uint32_t wrap = x.has("W") ? 31 : ~0u;
    const std::uint32_t from = std::min(x.u(1) & wrap, 32u), n = std::min(x.u(2) & wrap, 32u);
    x.set(0, static_cast<std::uint32_t>(std::uint64_t(lowest(~0u, n)) << from));
  });
  table.lanes("LOP3 ULOP3", "LUT", [](Lane& x) {
    const int k = x.after_predicates(0);
    const std::uint32_t out = lookup(x.u(k + 4), x.u(k + 1), x.u(k + 2), x.u(k + 3));
    x.set(k, out);
    if (k) x.set_p(0, out != 0 || x.p(k + 5));
  });
  table.lanes("PLOP3 UPLOP3", "LUT", [](Lane& x) {
    const std::uint32_t a = 0u - x.p(2), b = 0u - x.p(3), c = 0u - x.p(4);
    const bool first = lookup(x.u(5), a, b, c) & 1, second = lookup(x.u(6), a, b, c) & 1;
    x.set_p(0, first);
    x.set_p(1, second);
  });
  table.lanes("P2R UP2UR", "", [](Lane& x) {
    std::uint32_t bits = 0;
    for (int k = 0; k < kTrue; ++k) bits |= (x.warp.predicates[k] >> x.lane & 1) << k;
    if (x.operand(0).is_uniform()) bits = x.warp.uniform_predicates & ~(1u << kTrue);
    x.set(0, (x.u(2) & ~x.u(3)) | (bits & x.u(3)));
  });
  table.lanes("R2P", "", [](Lane& x) {
    for (int k = 0; k < kTrue; ++k)
      if (x.u(2) >> k & 1) {
        std::uint32_t& word = x.warp.predicates[k];
        word = (word & ~(1u << x.lane)) | (x.u(1) >> k & 1) << x.lane;
      }
  });
}

}  // namespace machine
