// SPDX-License-Identifier: Apache-2.0
// The table of what instructions do. A row: opcodes, the modifiers they may carry, an effect. Adding POPC took
//
//   table.lanes("POPC UPOPC", "", [](Lane& x) {
//     x.set(0, std::popcount(x.u(1)));
//   });
//
// An effect of `lanes` runs for each active lane, once where the destination is uniform; one of `warp` for all of them.
// Operands are numbered as they are written. Modifiers that only hint (caches, scopes of one device) are listed, too.
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "machine.h"
#include "numbers.h"

namespace machine {

struct Step {
  Machine& machine;
  Warp& warp;
  const Instruction& at;
  std::uint32_t active, mask;  // lanes at this instruction; those that its guard lets execute

  bool has(Modifier m) const { return at.has(m); }
  const Operand& operand(int k) const { return at.operands.at(k); }
  int count() const { return static_cast<int>(at.operands.size()); }
  // the first operand from k on that is no predicate, as carries out are written before what they come from
  int after_predicates(int k) const {
    while (k < count() && operand(k).is_predicate()) ++k;
    return k;
  }
  Access access() const { return machine.access(warp, at); }
  void report(const std::string& what) const { machine.report(what, at); }
  void whole_warp() const {
    if (mask != kAllLanes) throw Fault("not executed by the whole warp");
  }
  int rounding() const {
    return has("RM") ? FE_DOWNWARD : has("RP") ? FE_UPWARD : has("RZ") ? FE_TOWARDZERO : FE_TONEAREST;
  }
  // register `index`, which the zero register may be
  std::uint32_t get(int index, int lane) const { return index >= kZeroRegister ? 0 : warp.registers[index][lane]; }
  void put(int index, int lane, std::uint32_t value) const {
    if (index < kZeroRegister) warp.registers[index][lane] = value;
  }
};

struct Lane : Step {
  int lane;
  Lane(const Step& step, int lane) : Step(step), lane(lane) {}

  // operand k as an integer, with its ~, - and |.|; as bits of a float with its signs; as numbers
  std::uint32_t u(int k) const;
  std::int32_t s(int k) const { return static_cast<std::int32_t>(u(k)); }
  std::uint64_t wide(int k) const;
  std::uint32_t raw(int k) const { return raw(operand(k)); }
  std::uint64_t raw_wide(int k) const;
  std::uint32_t bits(int k) const;
  float f(int k) const { return flushed(std::bit_cast<float>(bits(k))); }
  double d(int k) const;
  float flushed(float x) const { return has("FTZ") ? flush(x) : x; }
  bool p(int k) const { return p(operand(k)); }
  bool p(const Operand& operand) const;
  std::uint32_t raw(const Operand& operand) const;
  std::uint64_t constant_offset(const Operand& o) const { return std::uint32_t(o.value + get(o.added, lane)); }

  void set(int k, std::uint32_t value);
  void set_wide(int k, std::uint64_t value);
  void set_float(int k, float value) { set(k, std::bit_cast<std::uint32_t>(value)); }
  void set_double(int k, double value) { set_wide(k, std::bit_cast<std::uint64_t>(value)); }
  void set_p(int k, bool value);
  // the address that a memory operand means; shared and local ones have 32 bits
  std::uint64_t address(int k, bool global) const;
};

using LaneEffect = void (*)(Lane&);
using WarpEffect = void (*)(Step&);

struct Row {
  std::vector<std::string> modifiers;
  LaneEffect lanes = nullptr;
  WarpEffect warp = nullptr;
  void execute(Step& step) const;
};

class Table {
 public:
  void lanes(const std::string& opcodes, const std::string& modifiers, LaneEffect effect);
  void warp(const std::string& opcodes, const std::string& modifiers, WarpEffect effect);
  std::vector<std::string> opcodes() const;
  const Row& find(const std::string& opcode, const std::vector<std::string>& modifiers, const std::string& text) const;

 private:
  void add(const std::string& opcodes, const Row& row);
  std::map<std::string, Row> rows_;
};

const Table& table();

int bytes_of(const Step& step);  // that a lane loads or stores

void add_integers(Table& table);
void add_floats(Table& table);
void add_conversions(Table& table);
void add_transfers(Table& table);
void add_control(Table& table);
void add_tensor_cores(Table& table);
void add_warpgroups(Table& table);

}  // namespace machine
