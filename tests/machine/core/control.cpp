// SPDX-License-Identifier: Apache-2.0
// Jumps, convergence and block barriers, and what lanes tell each other.
#include <algorithm>
#include <array>

#include "semantics.h"

namespace machine {
namespace {

void wait(Step& x, int barrier) {
  each_lane(x.mask, [&](int l) { x.warp.waits_for[l] = barrier; });
  x.machine.release_lanes(x.warp);
}

void jump(Step& x) {
  // only where the lanes that are here together are not those of the mask, or only where they are
  if (x.has("DIV") || x.has("CONV"))
    if ((Lane{x, std::countr_zero(x.active)}.u(0) == x.active) == x.has("DIV")) return;
  std::uint32_t jumping = 0;
  each_lane(x.mask, [&](int l) {
    jumping |= std::uint32_t(!x.count() || !x.operand(0).is_predicate() || Lane{x, l}.p(0)) << l;
  });
  if (x.has("U") && jumping != x.active) return;  // all or none
  each_lane(jumping, [&](int l) { x.warp.pc[l] = x.at.target; });
}

void block_barrier(Step& x) {
  const bool reduces = x.has("RED");
  if (x.count() != 1 + reduces || x.operand(0).value != 0) throw Fault("a barrier of part of a block");
  if (x.active != x.warp.alive) x.report("a barrier is reached by part of a warp");
  if (reduces) each_lane(x.mask, [&](int l) { x.machine.vote(Lane{x, l}.p(1), x.has("AND")); });
  wait(x, kBlockBarrier);
}

void end(Step& x) {
  Warp& warp = x.warp;
  warp.alive &= ~x.mask;
  if (!warp.alive) {
    warp.copy_groups.push_back(std::move(warp.open_copies));
    for (auto& group : warp.copy_groups)
      for (const Copy& copy : group) x.machine.shared.front().copy_dropped(copy.to, copy.n);
    warp.copy_groups.clear(), warp.open_copies.clear();
  }
  x.machine.release_lanes(warp);
}

// decode.py's SPECIAL. the last but one is the block's number in its cluster, which has one block
enum Special { kThread, kBlockX, kBlockY, kBlockZ, kLane, kSpecialZero, kClusterBlock, kWindowHigh };

void special_register(Lane& x) {
  switch (x.operand(1).value) {
    case kThread: return x.set(0, x.warp.id * kLanes + x.lane);
    case kBlockX: case kBlockY: case kBlockZ: return x.set(0, x.machine.block[x.operand(1).value - kBlockX]);
    case kLane: return x.set(0, x.lane);
    case kWindowHigh: return x.set(0, kSharedWindow >> 32);
    default: return x.set(0, 0);
  }
}

void shuffle(Step& step) {
  std::uint32_t from[kLanes], out[kLanes];
  std::array<bool, kLanes> inside{};
  for (int l = 0; l < kLanes; ++l) from[l] = Lane{step, l}.u(2);
  each_lane(step.mask, [&](int l) {
    const Lane x{step, l};
    // lanes move within segments; the last operand holds their mask and the last lane's number in one
    const int by = x.u(3) & 31, last = x.u(4) & 31, segment = x.u(4) >> 8 & 31, first = l & segment;
    const int bound = first | (last & ~segment);
    int source = l ^ by;
    if (step.has("IDX")) source = first | (by & ~segment);
    if (step.has("UP")) source = l - by;
    if (step.has("DOWN")) source = l + by;
    inside[l] = step.has("UP") ? source >= bound : source <= bound;
    if (!inside[l]) source = l;
    if (!(step.mask >> source & 1)) step.report("a shuffle from a lane that does not take part");
    out[l] = from[source];
  });
  each_lane(step.mask, [&](int l) {
    Lane x{step, l};
    x.set(1, out[l]);
    x.set_p(0, inside[l]);
  });
}

void vote(Step& step) {
  const int k = step.operand(0).is_predicate() ? 0 : 1;  // the ballot stands first, if it is asked for
  std::uint32_t ballot = 0;
  each_lane(step.mask, [&](int l) { ballot |= std::uint32_t(Lane{step, l}.p(k + 1)) << l; });
  const bool all = ballot == step.mask;
  const bool value = step.has("ANY") ? ballot != 0 : step.has("ALL") ? all : all || !ballot;
  each_lane(step.mask, [&](int l) {
    Lane x{step, l};
    if (k) x.set(0, ballot);
    x.set_p(k, value);
  });
}

void reduce(Step& step) {
  std::uint32_t out = 0;
  bool first = true;
  each_lane(step.mask, [&](int l) {
    const std::uint32_t v = Lane{step, l}.u(1);
    const bool below = step.has("S32") ? std::int32_t(v) < std::int32_t(out) : v < out;
    if (first) out = v;
    else if (step.has("SUM")) out += v;
    else if (step.has("OR")) out |= v;
    else if (step.has("AND")) out &= v;
    else if (step.has("XOR")) out ^= v;
    else if (step.has("MAX") != below) out = v;
    first = false;
  });
  each_lane(step.mask, [&](int l) { Lane{step, l}.set(0, out); });
}

void to_uniform(Step& step) {
  if (!step.operand(0).is_uniform()) throw Fault("R2UR with a predicate");
  if (!step.mask) return;
  const std::uint32_t value = Lane{step, std::countr_zero(step.mask)}.u(1);
  each_lane(step.mask, [&](int l) {
    if (Lane{step, l}.u(1) != value) step.report("R2UR of a register that differs between lanes");
  });
  Lane{step, 0}.set(0, value);
}

}  // namespace

void add_control(Table& table) {
  auto nothing = [](Step&) {};
  table.warp("NOP YIELD", "", nothing);
  table.warp("MEMBAR", "ALL SC CTA GPU SYS", nothing);  // accesses happen in the order they are executed
  table.warp("FENCE", "VIEW ASYNC S", nothing);
  table.warp("BRA", "U DIV CONV", jump);
  table.warp("BRX", "", [](Step& x) {  // by a table of constants: from the next instruction on
    each_lane(x.mask, [&](int l) { x.warp.pc[l] = x.at.pc + 16 + x.at.target + Lane{x, l}.u(0); });
  });
  table.warp("CALL", "REL NOINC", jump);
  table.warp("RET", "REL NODEC", [](Step& x) {
    each_lane(x.mask, [&](int l) { x.warp.pc[l] = Lane{x, l}.u(0) + x.at.target; });
  });
  table.warp("EXIT", "", end);
  table.warp("BSSY", "", [](Step& x) {
    each_lane(x.mask, [&](int l) { x.warp.convergence[x.operand(0).index][l] = x.mask; });
  });
  table.warp("BSYNC", "", [](Step& x) { wait(x, x.operand(0).index); });
  table.warp("BREAK", "", [](Step& x) {
    for (auto& lanes : x.warp.convergence[x.operand(0).index]) lanes &= ~x.mask;
    x.machine.release_lanes(x.warp);
  });
  table.warp("WARPSYNC", "ALL COLLECTIVE EXCLUSIVE", [](Step& x) {
    each_lane(x.mask, [&](int l) {
      if (!x.has("ALL") && Lane{x, l}.u(0) != kAllLanes) throw Fault("a barrier of part of a warp");
    });
    wait(x, kWholeWarp);
  });
  table.warp("ENDCOLLECTIVE", "", nothing);  // the lanes that WARPSYNC brought together stay so
  table.warp("BAR", "SYNC RED AND OR DEFER_BLOCKING", block_barrier);
  table.lanes("B2R", "RESULT", [](Lane& x) {
    if (x.operand(0).index != kZeroRegister) throw Fault("a count at a barrier");
    x.set_p(1, x.machine.reduced);
  });
  table.lanes("S2R S2UR", "", special_register);
  table.lanes("CS2R", "32", [](Lane& x) {
    if (x.operand(1).value != kSpecialZero) throw Fault("a special register that is not modelled");
    x.has("32") ? x.set(0, 0) : x.set_wide(0, 0);
  });
  table.warp("SHFL", "IDX UP DOWN BFLY", shuffle);
  table.warp("VOTE VOTEU", "ANY ALL EQ", vote);
  table.warp("REDUX", "SUM OR AND XOR MAX MIN S32", reduce);
  table.warp("R2UR", "", to_uniform);
}

}  // namespace machine
