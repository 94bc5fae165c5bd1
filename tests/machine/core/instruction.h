// SPDX-License-Identifier: Apache-2.0
// A decoded instruction: what decode.py read from a line of the disassembly, and the row of the table that executes it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace machine {

// a launch that cannot go on: an unknown instruction, an access out of bounds, a deadlock
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr std::uint64_t hash(std::string_view text) {
  std::uint64_t h = 14695981039346656037ull;
  for (char c : text) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return h;
}

// a modifier in a call like has("FTZ"), hashed by the compiler
struct Modifier {
  std::uint64_t value;
  consteval Modifier(const char* name) : value(hash(name)) {}
};

// the order of decode.py's Kind
enum class Kind {
  kRegister, kUniform, kImmediate, kConstant, kPredicate, kUniformPredicate, kMemory, kDescriptor, kNone
};

constexpr int kZeroRegister = 255, kZeroUniform = 63, kTrue = 7;

// the fields of decode.py's Operand
struct Operand {
  Kind kind = Kind::kNone;
  int index = 0;                                            // register, predicate or constant bank
  std::int64_t value = 0;                                   // immediate, offset of a constant or an address
  bool negated = false, absolute = false, inverted = false;
  int part = 0;                                             // 1 low half, 2 high half, 4 + b byte b; 0 all
  int uniform = kZeroUniform, scale = 1;                    // of an address: added register, factor of the index
  bool wide = false;                                        // of an address: the index is a pair of registers
  int added = kZeroRegister;                                // of a constant: added to its offset

  bool is_predicate() const { return kind == Kind::kPredicate || kind == Kind::kUniformPredicate; }
  bool is_uniform() const { return kind == Kind::kUniform || kind == Kind::kUniformPredicate; }
};

struct Row;  // semantics.h

struct Instruction {
  std::uint32_t pc = 0;
  std::string text, opcode;
  const Row* row = nullptr;
  Operand guard;  // kNone, or a predicate
  std::vector<Operand> operands;
  std::vector<std::string> modifiers;  // in the order written
  std::array<std::uint64_t, 12> hashes{};
  std::uint32_t target = 0;  // of a jump
  bool checked = false;      // a load whose value a compare-and-swap compares: it need not be in order

  bool has(Modifier m) const {
    for (std::size_t i = 0; i < modifiers.size(); ++i)
      if (hashes[i] == m.value) return true;
    return false;
  }
};

class Program {
 public:
  // finds the row of its opcode; a Fault names an opcode, or a modifier, that the table does not have
  void add(Instruction instruction);
  const std::vector<Instruction>& code() const { return code_; }
  std::size_t index_at(std::uint32_t pc) const;
  // replaces an instruction by one that does nothing, and back
  void set_skipped(std::uint32_t pc, bool skipped);
  bool skipped(std::size_t index) const { return skipped_[index]; }

 private:
  std::vector<Instruction> code_;
  std::vector<bool> skipped_;
  std::map<std::uint32_t, std::size_t> at_;
};

}  // namespace machine
