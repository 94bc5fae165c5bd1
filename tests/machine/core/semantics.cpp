// SPDX-License-Identifier: Apache-2.0
#include "semantics.h"

#include <algorithm>
#include <iterator>
#include <sstream>

namespace machine {
namespace {
const Operand& whole(const Operand& o) {
  if (o.part) throw Fault("an operand that is half a register");
  return o;
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}
}  // namespace

const Table& table() {
  static const Table made = [] {
    Table t;
    for (auto add : {add_integers, add_floats, add_conversions, add_transfers, add_control, add_tensor_cores,
                     add_warpgroups})
      add(t);
    return t;
  }();
  return made;
}

void Table::add(const std::string& opcodes, const Row& row) {
  for (const std::string& opcode : words(opcodes))
    if (!rows_.emplace(opcode, row).second) throw std::logic_error(opcode + " stands twice in the table");
}

void Table::lanes(const std::string& opcodes, const std::string& modifiers, LaneEffect effect) {
  add(opcodes, {words(modifiers), effect, nullptr});
}

void Table::warp(const std::string& opcodes, const std::string& modifiers, WarpEffect effect) {
  add(opcodes, {words(modifiers), nullptr, effect});
}

std::vector<std::string> Table::opcodes() const {
  std::vector<std::string> names;
  for (const auto& [name, row] : rows_) names.push_back(name);
  return names;
}

const Row& Table::find(const std::string& opcode, const std::vector<std::string>& modifiers,
                       const std::string& text) const {
  const auto found = rows_.find(opcode);
  if (found == rows_.end()) throw Fault("the opcode " + opcode + " is not modelled: " + text);
  const auto& known = found->second.modifiers;
  for (const std::string& modifier : modifiers)
    if (std::find(known.begin(), known.end(), modifier) == known.end())
      throw Fault("the modifier " + modifier + " of " + opcode + " is not modelled: " + text);
  return found->second;
}

void Row::execute(Step& step) const {
  if (warp) return warp(step);
  const bool once = step.count() && step.operand(0).is_uniform();
  each_lane(once ? step.mask & (0u - step.mask) : step.mask, [&](int l) {
    Lane lane{step, l};
    lanes(lane);
  });
}

std::uint32_t Lane::raw(const Operand& o) const {
  switch (o.kind) {
    case Kind::kRegister: return get(o.index, lane);
    case Kind::kUniform: return o.index == kZeroUniform ? 0 : warp.uniforms[o.index];
    case Kind::kImmediate: return static_cast<std::uint32_t>(o.value);
    case Kind::kConstant: return machine.constant(o.index, constant_offset(o));
    default: throw Fault("an operand that is no number");
  }
}

std::uint32_t Lane::u(int k) const {
  const Operand& o = operand(k);
  std::uint32_t value = raw(whole(o));
  if (o.absolute && value >> 31) value = 0 - value;
  if (o.inverted) value = ~value;
  return o.negated ? 0 - value : value;
}

std::uint64_t Lane::raw_wide(int k) const {
  Operand o = operand(k);
  if (o.kind == Kind::kImmediate) return o.value;
  const std::uint64_t low = raw(o);
  if ((o.kind == Kind::kRegister && o.index == kZeroRegister) || (o.kind == Kind::kUniform && o.index == kZeroUniform))
    return 0;
  if (o.kind == Kind::kConstant)
    o.value += 4;
  else
    ++o.index;
  return low | static_cast<std::uint64_t>(raw(o)) << 32;
}

std::uint64_t Lane::wide(int k) const {
  std::uint64_t value = raw_wide(k);
  if (operand(k).inverted) value = ~value;
  return operand(k).negated ? 0 - value : value;
}

std::uint32_t Lane::bits(int k) const {
  const Operand& o = operand(k);
  std::uint32_t value = raw(whole(o));
  if (o.absolute) value &= 0x7fffffff;
  return o.negated ? value ^ 0x80000000u : value;
}

double Lane::d(int k) const {
  const Operand& o = operand(k);
  // an immediate is the upper half of a double
  std::uint64_t value = o.kind == Kind::kImmediate ? std::uint64_t(raw(o)) << 32 : raw_wide(k);
  if (o.absolute) value &= ~(1ull << 63);
  return std::bit_cast<double>(o.negated ? value ^ 1ull << 63 : value);
}

bool Lane::p(const Operand& o) const {
  const bool value = o.kind == Kind::kPredicate ? warp.predicates[o.index] >> lane & 1
                                                : (warp.uniform_predicates >> o.index & 1);
  return value != o.negated;
}

void Lane::set(int k, std::uint32_t value) {
  const Operand& o = operand(k);
  if (o.kind == Kind::kUniform) {
    if (o.index != kZeroUniform) warp.uniforms[o.index] = value;
  } else {
    put(o.index, lane, value);
  }
}

void Lane::set_wide(int k, std::uint64_t value) {
  const Operand& o = operand(k);
  const auto low = static_cast<std::uint32_t>(value), high = static_cast<std::uint32_t>(value >> 32);
  if (o.kind == Kind::kUniform) {
    if (o.index != kZeroUniform) warp.uniforms[o.index] = low, warp.uniforms[o.index + 1] = high;
  } else if (o.index != kZeroRegister) {
    put(o.index, lane, low), put(o.index + 1, lane, high);
  }
}

void Lane::set_p(int k, bool value) {
  const Operand& o = operand(k);
  if (o.index == kTrue) return;
  std::uint32_t& word = o.kind == Kind::kPredicate ? warp.predicates[o.index] : warp.uniform_predicates;
  const int bit = o.kind == Kind::kPredicate ? lane : o.index;
  word = (word & ~(1u << bit)) | std::uint32_t(value) << bit;
}

std::uint64_t Lane::address(int k, bool global) const {
  const Operand& o = operand(k);
  std::uint64_t index = get(o.index, lane);
  if (o.wide && o.index != kZeroRegister) index |= static_cast<std::uint64_t>(get(o.index + 1, lane)) << 32;
  std::uint64_t sum = o.value + index * o.scale;
  if (o.uniform != kZeroUniform) {
    sum += warp.uniforms[o.uniform];
    if (global) sum += static_cast<std::uint64_t>(warp.uniforms[o.uniform + 1]) << 32;
  }
  return global ? sum : static_cast<std::uint32_t>(sum);
}

}  // namespace machine
