// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <algorithm>

#include "semantics.h"

namespace machine {

std::size_t Program::index_at(std::uint32_t pc) const {
  const auto found = at_.find(pc);
  if (found == at_.end()) throw Fault("a jump to " + std::to_string(pc) + ", where no instruction is");
  return found->second;
}

namespace {
// whether a load goes to the registers that a compare-and-swap compares, from where it swaps
bool same_word(const Instruction& load, const Instruction& swap) {
  const Operand &to = load.operands.at(0), &from = load.operands.at(1), &at = swap.operands.at(1);
  return to.index == swap.operands.at(2).index && from.index == at.index && from.value == at.value;
}
}  // namespace

void Program::add(Instruction instruction) {
  instruction.row = &table().find(instruction.opcode, instruction.modifiers, instruction.text);
  if (instruction.modifiers.size() > instruction.hashes.size()) throw Fault("too many modifiers: " + instruction.text);
  std::transform(instruction.modifiers.begin(), instruction.modifiers.end(), instruction.hashes.begin(), hash);
  // of a loop that adds by comparing and swapping: what it loads may change before it swaps
  if (instruction.opcode == "ATOMS" && instruction.has("CAST"))
    for (std::size_t k = code_.size(), first = k < 6 ? 0 : k - 6; k > first; --k) {
      Instruction& load = code_[k - 1];
      if (load.opcode != "LDS" || !load.has("64") || !same_word(load, instruction)) continue;
      load.checked = true;
      break;
    }
  at_[instruction.pc] = code_.size();
  code_.push_back(std::move(instruction));
  skipped_.push_back(false);
}

void Program::set_skipped(std::uint32_t pc, bool skipped) { skipped_[index_at(pc)] = skipped; }

std::uint32_t Warp::running() const {
  std::uint32_t mask = 0;
  each_lane(alive, [&](int l) { mask |= std::uint32_t(waits_for[l] == kRunning) << l; });
  return mask;
}

std::uint32_t Machine::random() {  // xorshift
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<std::uint32_t>(random_state_ >> 24);
}

void Machine::report(const std::string& what, const Instruction& at) {
  char pc[8];
  std::snprintf(pc, sizeof pc, "%04x", at.pc);
  ++reports[what + ", by " + pc + ": " + at.text];
}

Access Machine::access(const Warp& warp, const Instruction& at) {
  return {block_number_ + 1, static_cast<std::uint32_t>(warp.id + 1), epoch_,
          [this, &at](const std::string& what) { report(what, at); }};
}

Region& Machine::region(std::uint64_t address, int n) {
  std::string near;
  for (const auto& region : global) {
    if (region->holds(address, n)) return *region;
    if (region->is_near(address)) near = "; near " + region->place(address);
  }
  throw Fault("an access outside of every argument" + near);
}

std::uint32_t Machine::constant(int bank, std::uint64_t offset, int bytes) const {
  const auto found = constants.find(bank);
  if (found == constants.end() || offset + bytes > found->second.size())
    throw Fault("a constant beyond the end of its bank");
  std::uint32_t value = 0;
  std::copy_n(found->second.data() + offset, bytes, reinterpret_cast<std::uint8_t*>(&value));
  return value;
}

void Machine::start_block(const Launch& launch, std::uint32_t number) {
  block_number_ = number;
  block[0] = number % launch.grid[0];
  block[1] = number / launch.grid[0] % launch.grid[1];
  block[2] = number / launch.grid[0] / launch.grid[1];
  ++epoch_;
  if (trace) trace->start_block(launch.warps);
  shared_bytes.resize(launch.shared_bytes);
  for (auto& byte : shared_bytes) byte = static_cast<std::uint8_t>(random());
  shared.clear();
  shared.emplace_back("shared memory", 0, shared_bytes.data(), shared_bytes.size(), false, true);
  warps_.resize(launch.warps);
  for (int id = 0; id < launch.warps; ++id) {  // nothing may depend on what a register held before
    Warp& warp = warps_[id];
    for (auto& row : warp.registers) std::generate(std::begin(row), std::end(row), [this] { return random(); });
    for (auto& value : warp.uniforms) value = random();
    for (auto& value : warp.predicates) value = random();
    warp.predicates[kTrue] = kAllLanes;
    warp.uniform_predicates = random() | 1u << kTrue;
    std::fill_n(warp.pc, kLanes, 0);
    std::fill_n(warp.waits_for, kLanes, kRunning);
    for (auto& barrier : warp.convergence) std::fill_n(barrier, kLanes, 0);
    warp.alive = kAllLanes;
    warp.id = id;
    warp.open_copies.clear(), warp.copy_groups.clear();
    warp.open_products.clear(), warp.product_groups.clear();
    warp.local.clear();
  }
}

void Machine::run(const Launch& launch) {
  most_steps_ = launch.most_steps;
  for (std::uint32_t number : launch.blocks) {
    start_block(launch, number);
    try {
      run_block();
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + " (block " + std::to_string(number) + ")");
    }
  }
}

void Machine::run_block() {
  while (true) {
    std::vector<Warp*> live;
    for (Warp& warp : warps_)
      if (warp.alive) live.push_back(&warp);
    if (live.empty()) return;
    if (schedule.warps == Schedule::Warps::kReversed) std::reverse(live.begin(), live.end());
    const bool moved = step_some(live);
    if (!block_barrier_completes() && !moved) throw Fault("a deadlock: every lane waits");
  }
}

bool Machine::step_some(const std::vector<Warp*>& live) {
  bool moved = false;
  if (schedule.warps == Schedule::Warps::kRandom)
    for (int i = 0; i < 64; ++i) moved |= step(*live[random() % live.size()]);
  for (Warp* warp : live)
    do {
      if (!step(*warp)) break;
      moved = true;
    } while (schedule.warps != Schedule::Warps::kRandom);
  return moved;
}

bool Machine::block_barrier_completes() {
  bool any = false;
  for (const Warp& warp : warps_)
    for (int l = 0; l < kLanes; ++l)
      if (warp.alive >> l & 1) {
        if (warp.waits_for[l] != kBlockBarrier) return false;
        any = true;
      }
  if (!any) return false;
  for (Warp& warp : warps_) std::fill_n(warp.waits_for, kLanes, kRunning);
  ++epoch_;
  reduced = all_ ? !no_ : yes_ != 0;
  yes_ = no_ = 0;
  return true;
}

std::uint32_t Machine::next_pc(const Warp& warp, std::uint32_t running) {
  if (schedule.lanes == Schedule::Lanes::kRandom) {
    for (int skip = random() % std::popcount(running); skip; --skip) running &= running - 1;
    return warp.pc[std::countr_zero(running)];
  }
  std::uint32_t low = ~0u, high = 0;
  each_lane(running, [&](int l) { low = std::min(low, warp.pc[l]), high = std::max(high, warp.pc[l]); });
  return schedule.lanes == Schedule::Lanes::kHighest ? high : low;
}

// one instruction of the lanes that are at one pc; false where all wait
bool Machine::step(Warp& warp) {
  const std::uint32_t running = warp.running();
  if (!running) return false;
  const std::uint32_t pc = next_pc(warp, running);
  const std::size_t index = program_.index_at(pc);
  const Instruction& at = program_.code()[index];
  std::uint32_t active = 0;
  each_lane(running, [&](int l) {
    if (warp.pc[l] != pc) return;
    active |= 1u << l;
    warp.pc[l] = pc + 16;
  });
  ++counts[index];
  if (++steps > most_steps_)
    throw Fault("more than " + std::to_string(most_steps_) + " warp instructions: the grid is too large to emulate");
  if (program_.skipped(index)) return true;
  Step step{*this, warp, at, active, active};
  each_lane(active, [&](int l) {
    if (at.guard.kind != Kind::kNone && !Lane{step, l}.p(at.guard)) step.mask &= ~(1u << l);
  });
  try {
    if (trace) trace->add(step, index);
    at.row->execute(step);
  } catch (const Fault& fault) {
    throw Fault(std::string(fault.what()) + ", by " + at.text);
  }
  return true;
}

void Machine::release_lanes(Warp& warp) {
  for (int barrier = 0; barrier <= kWholeWarp; ++barrier) {
    std::uint32_t there = 0;
    each_lane(warp.alive, [&](int l) { there |= std::uint32_t(warp.waits_for[l] == barrier) << l; });
    each_lane(there, [&](int l) {
      const std::uint32_t expected = barrier == kWholeWarp ? kAllLanes : warp.convergence[barrier][l];
      if (!(expected & warp.alive & ~there)) warp.waits_for[l] = kRunning;
    });
  }
}

}  // namespace machine
