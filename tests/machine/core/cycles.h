// SPDX-License-Identifier: Apache-2.0
// A model of the time of one multiprocessor: four partitions that issue an instruction a cycle, in order within a warp,
// as stall counts, scoreboards and busy pipes let them; one path to shared memory and L1; L2 and DRAM as rates. What
// the instructions cost comes from the caller's table (bench/model/rates.py).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "trace.h"

namespace machine {

constexpr int kPartitions = 4, kScoreboards = 7;  // the last counts products of a warpgroup

// the order of the table's Effect
enum class Effect {
  kNone, kShared, kLoad, kStore, kCopy, kCommit, kWait, kBarrier, kProduct, kProductWait
};

// an instruction of the program: its control code, and its row in the table
struct Operation {
  int stall;
  bool yields;
  int writes, reads, waits;  // scoreboards, kScoreboards where there is none; a mask of them
  std::uint32_t pipes;  // a bit for each that can take it
  double interval;      // cycles until the pipe takes another
  int latency;          // until the result can be read, of instructions that a scoreboard counts
  Effect effect;
  int scoreboard, left;  // of kWait: until at most `left` are counted. of kProduct: whether a group ends
};

// the order of the table's Rates
struct Rates {
  int multiprocessors;
  double l2_bytes, dram_bytes;     // a cycle, the multiprocessor's share
  int l1, l2, dram;                // cycles until a load's data are there
  int queue;                       // wavefronts that may wait for shared memory and L1
  int operands_read;               // cycles after an instruction leaves the queue
  int barrier, branch, start;      // cycles after the last warp arrives; a jump; until a block begins
};

// why a partition issued nothing in a cycle: the first of these that holds for one of its warps
enum Idle { kPipe, kQueue, kScoreboard, kStalled, kAtBarrier, kNoWarp, kReasons };

struct OfInstruction {
  std::uint64_t executions = 0, lanes = 0, wavefronts = 0, sectors = 0, fresh = 0;
  double waited = 0;  // cycles of warps between its control code's word and its issue
};

struct Played {
  double cycles = 0, l2_bytes = 0, dram_bytes = 0, wavefronts = 0;
  std::uint64_t issued = 0;
  std::array<double, kReasons> idle{};  // partition cycles
  std::vector<OfInstruction> instructions;
};

// the blocks of a trace one after the other, `resident` at a time
Played play(const Trace& trace, const std::vector<Operation>& program, const Rates& rates, int resident);

}  // namespace machine
