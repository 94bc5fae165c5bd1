// SPDX-License-Identifier: Apache-2.0
// The state of a launch: warps with their lanes, the memory they reach, and the schedule that decides who goes next.
#pragma once

#include <bit>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "instruction.h"
#include "memory.h"
#include "trace.h"

namespace machine {

constexpr int kLanes = 32;
constexpr std::uint32_t kAllLanes = ~0u;
constexpr int kLocalBytes = 32768;  // a lane's stack
// where shared memory lies among the addresses that may mean any memory: no address of the host
constexpr std::uint64_t kSharedWindow = 0x00ff'0000'0000'0000, kSharedWindowBytes = 1 << 24;
constexpr bool in_shared_window(std::uint64_t address) {
  return address >= kSharedWindow && address - kSharedWindow < kSharedWindowBytes;
}
// what a lane waits for: nothing, a convergence barrier (0 to 15), its whole warp, its block
constexpr int kRunning = -1, kWholeWarp = 16, kBlockBarrier = 17;

struct Schedule {
  enum class Lanes { kLowest, kHighest, kRandom };  // of a diverged warp, the lanes with the lowest pc go first, ...
  enum class Warps { kInTurn, kReversed, kRandom };  // up to the next barrier, or single steps of any
  Lanes lanes = Lanes::kLowest;
  Warps warps = Warps::kInTurn;
  bool early = false;           // asynchronous copies and products end when issued; else when waited for
  bool truncated_sums = false;     // of tensor cores: terms aligned to the largest and cut; else exact
  std::uint64_t seed = 1;
};

struct Copy {
  std::uint32_t to;
  int n;
  std::uint8_t data[16];
};

// of a warpgroup, to be made from what the memory and the registers hold when it is waited for
struct Product {
  const Instruction* at;
  std::uint64_t first, second;  // descriptors
  bool accumulates;
};

struct Warp {
  std::uint32_t registers[256][kLanes], uniforms[64];
  std::uint32_t predicates[8], uniform_predicates;  // a bit a lane; a bit a predicate
  std::uint32_t pc[kLanes];
  int waits_for[kLanes];
  std::uint32_t alive;                           // lanes that have not ended
  std::uint32_t convergence[kWholeWarp][kLanes];  // a barrier and a lane -> the lanes that it converges with
  int id;
  std::vector<Copy> open_copies;                  // issued, in no group yet
  std::vector<std::vector<Copy>> copy_groups;     // in order
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
  std::vector<std::uint8_t> local;                // kLocalBytes a lane, made when first touched

  std::uint32_t running() const;
};

struct Launch {
  std::uint32_t grid[3];
  int warps, shared_bytes;
  std::vector<std::uint32_t> blocks;  // in the order of execution
  std::uint64_t most_steps;
};

class Machine {
 public:
  Machine(const Program& program, Schedule schedule) : schedule(schedule), program_(program) {
    counts.resize(program.code().size());
    random_state_ = schedule.seed * 2654435761u + 88172645463325252ull;
  }
  void run(const Launch& launch);

  std::uint32_t random();
  Region& region(std::uint64_t address, int n);  // a Fault outside of all
  Access access(const Warp& warp, const Instruction& at);
  void report(const std::string& what, const Instruction& at);
  void release_lanes(Warp& warp);  // those whose convergence barrier is complete
  std::uint32_t constant(int bank, std::uint64_t offset, int bytes = 4) const;
  void vote(bool yes, bool all) { ++(yes ? yes_ : no_), all_ = all; }  // of a lane at a barrier that reduces

  Schedule schedule;
  std::map<int, std::vector<std::uint8_t>> constants;
  std::vector<std::shared_ptr<Region>> global;
  std::vector<std::uint8_t> shared_bytes;
  std::vector<Region> shared;  // the one of this block
  std::uint32_t block[3] = {0, 0, 0};
  bool reduced = false;  // whether all lanes, or any, voted yes at the last barrier
  std::map<std::string, std::uint64_t> reports;
  std::vector<std::uint64_t> counts;  // executions of each instruction
  std::uint64_t steps = 0;            // warp instructions
  std::shared_ptr<Trace> trace;       // where one is wanted

 private:
  void start_block(const Launch& launch, std::uint32_t number);
  void run_block();
  bool step(Warp& warp);
  bool step_some(const std::vector<Warp*>& live);
  bool block_barrier_completes();
  std::uint32_t next_pc(const Warp& warp, std::uint32_t running);

  const Program& program_;
  std::vector<Warp> warps_;
  std::uint32_t block_number_ = 0, epoch_ = 0;
  std::uint32_t yes_ = 0, no_ = 0;  // at a barrier that reduces
  bool all_ = false;
  std::uint64_t random_state_, most_steps_ = 0;
};

// f(lane) for each lane of a mask
template <class F>
void each_lane(std::uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

}  // namespace machine
