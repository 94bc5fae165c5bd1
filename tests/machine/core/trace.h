// SPDX-License-Identifier: Apache-2.0
// What a launch did, for the model of its time (cycles.h): each instruction of each warp, its lanes, what it moves.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace machine {

struct Step;
struct Warp;

constexpr int kSectorBytes = 32, kLineBytes = 128, kBanks = 32;

struct Event {
  std::uint32_t instruction;  // its place in the program
  std::uint8_t active;        // lanes that execute it
  std::uint8_t region;        // the argument that a global access touches
  std::uint16_t wavefronts;   // passes through the banks of shared memory, or lines looked up in L1
  std::uint16_t sectors;      // asked of L2
  std::uint16_t fresh;        // of them, those that no block of the trace had touched
};

// the L1 cache that a block sees: the sectors used last
class RecentSectors {
 public:
  explicit RecentSectors(std::size_t most) : most_(most) {}
  bool touch(std::uint64_t sector);  // whether it was there
  void forget() { order_.clear(), places_.clear(); }

 private:
  std::size_t most_;
  std::list<std::uint64_t> order_;
  std::unordered_map<std::uint64_t, std::list<std::uint64_t>::iterator> places_;
};

class Trace {
 public:
  explicit Trace(std::size_t l1_sectors) : l1_(l1_sectors) {}
  void start_block(int warps);
  void add(const Step& step, std::size_t index);  // before it is executed
  // of the bytes that this multiprocessor is first to touch, the part that is its own where `multiprocessors` touch
  // the whole region: a matrix that all of them read comes from DRAM once
  double own(int region, bool write, int multiprocessors) const;

  std::vector<std::vector<Event>> warps;  // of all blocks, in the order of execution
  int per_block = 0;

 private:
  void global(const Step& step, int operand, int bytes, std::uint32_t lanes, Event& event);

  struct Touched {
    std::uint64_t bytes = 0, sectors[2] = {0, 0};  // read, written
  };
  RecentSectors l1_;
  std::unordered_set<std::uint64_t> known_;
  std::vector<Touched> regions_;
};

// passes through the banks: those of one pass lie in different banks or in one word. lanes of 8 bytes go by halves of
// the warp, of 16 by quarters
int bank_passes(const std::uint64_t* addresses, std::uint32_t lanes, int bytes, bool words_shared);

}  // namespace machine
