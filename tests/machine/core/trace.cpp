// SPDX-License-Identifier: Apache-2.0
#include "trace.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <set>

#include "semantics.h"

namespace machine {
namespace {

bool one_of(const std::string& opcode, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), opcode) != names.end();
}

std::array<std::uint64_t, kLanes> addresses(const Step& step, int operand, bool global, std::uint32_t lanes) {
  std::array<std::uint64_t, kLanes> out{};
  each_lane(lanes, [&](int l) { out[l] = Lane{step, l}.address(operand, global); });
  return out;
}

// a warp's part of a warpgroup's product: its 16 rows of A, unless in registers, and a quarter of B, 32 bytes a row
int product_passes(const Step& step) {
  int rows, columns, depth;
  if (std::sscanf(step.at.modifiers[0].c_str(), "%dx%dx%d", &rows, &columns, &depth) != 3) return 0;
  return (columns + 15) / 16 + (step.operand(1).kind == Kind::kRegister ? 0 : 4);
}

int first_address(const Step& step) {
  for (int k = 0; k < step.count(); ++k)
    if (step.operand(k).kind == Kind::kMemory) return k;
  throw Fault("no address");
}

}  // namespace

int bank_passes(const std::uint64_t* addresses, std::uint32_t lanes, int bytes, bool words_shared) {
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  int passes = 0;
  for (int first = 0; first < kLanes; first += together) {
    std::set<std::uint64_t> words;
    int of_bank[kBanks] = {}, most = 0;
    each_lane(lanes & static_cast<std::uint32_t>(((1ull << together) - 1) << first), [&](int l) {
      for (int j = 0; j < std::max(1, bytes / 4); ++j) {
        const std::uint64_t word = addresses[l] / 4 + j;
        if (words.insert(word).second || !words_shared) most = std::max(most, ++of_bank[word % kBanks]);
      }
    });
    passes += most;
  }
  return std::max(passes, 1);
}

bool RecentSectors::touch(std::uint64_t sector) {
  const auto found = places_.find(sector);
  if (found != places_.end()) {
    order_.splice(order_.begin(), order_, found->second);
    return true;
  }
  order_.push_front(sector);
  places_[sector] = order_.begin();
  if (order_.size() > most_) {
    places_.erase(order_.back());
    order_.pop_back();
  }
  return false;
}

void Trace::start_block(int count) {
  per_block = count;
  warps.resize(warps.size() + count);
  l1_.forget();
}

void Trace::global(const Step& step, int operand, int bytes, std::uint32_t lanes, Event& event) {
  if (!lanes) return;
  const auto at = addresses(step, operand, true, lanes);
  const auto& all = step.machine.global;
  const auto& region = step.machine.region(at[std::countr_zero(lanes)], bytes);
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& other) { return other.get() == &region; });
  event.region = static_cast<std::uint8_t>(found - all.begin());
  std::set<std::uint64_t> sectors, lines;
  each_lane(lanes, [&](int l) {
    // on a GPU memory begins at a line; here it may lie otherwise in each process
    const std::uint64_t place = at[l] - region.base() + (std::uint64_t(event.region) << 40);
    sectors.insert(place / kSectorBytes);
    lines.insert(place / kLineBytes);
  });
  event.wavefronts = static_cast<std::uint16_t>(std::max<std::size_t>(event.wavefronts, lines.size()));
  const std::string& opcode = step.at.opcode;
  const bool write = !one_of(opcode, {"LDG", "LDGSTS", "LD"});
  // STRONG.SM is what a block may keep to itself
  const bool shared = step.has("STRONG") && !step.has("SM");
  const bool cached = !write && !shared && !step.has("BYPASS");
  regions_.resize(std::max(regions_.size(), all.size()));
  Touched& touched = regions_[event.region];
  touched.bytes = region.size();
  for (std::uint64_t sector : sectors) {
    if (cached && l1_.touch(sector)) continue;
    ++event.sectors;
    if (!known_.insert(sector * 2 + write).second) continue;
    if (write) known_.insert(sector * 2);  // what is written is read from L2
    ++event.fresh;
    ++touched.sectors[write];
  }
}

void Trace::add(const Step& step, std::size_t index) {
  Event event{static_cast<std::uint32_t>(index), static_cast<std::uint8_t>(std::popcount(step.mask)), 0, 0, 0, 0};
  const std::string& opcode = step.at.opcode;
  const bool copies = opcode == "LDGSTS", matrices = one_of(opcode, {"LDSM", "STSM"});
  if (step.mask && (copies || matrices || one_of(opcode, {"LDS", "STS", "ATOMS"}))) {
    const int count = step.has("4") ? 32 : step.has("2") ? 16 : 8;
    const std::uint32_t lanes = matrices ? static_cast<std::uint32_t>((1ull << count) - 1) : step.mask;
    const auto at = addresses(step, first_address(step), false, lanes);
    const int bytes = matrices ? 16 : bytes_of(step);
    event.wavefronts = static_cast<std::uint16_t>(bank_passes(at.data(), lanes, bytes, opcode != "ATOMS"));
  }
  if (opcode == "HGMMA") event.wavefronts = static_cast<std::uint16_t>(product_passes(step));
  if (copies) {
    std::uint32_t reading = step.mask;
    const int last = step.count() - 1;
    if (step.operand(last).is_predicate())
      each_lane(step.mask, [&](int l) {
        if (!Lane{step, l}.p(last)) reading &= ~(1u << l);
      });
    global(step, 1, bytes_of(step), reading, event);
  } else if (one_of(opcode, {"LDG", "STG", "ATOMG", "RED", "REDG"})) {
    global(step, first_address(step), bytes_of(step), step.mask, event);
  } else if (one_of(opcode, {"LD", "ST", "ATOM"})) {  // of any memory
    const auto at = addresses(step, first_address(step), true, step.mask);
    std::uint32_t shared = 0;
    each_lane(step.mask, [&](int l) { shared |= std::uint32_t(in_shared_window(at[l])) << l; });
    if (shared)
      event.wavefronts = static_cast<std::uint16_t>(bank_passes(at.data(), shared, bytes_of(step), opcode != "ATOM"));
    global(step, first_address(step), bytes_of(step), step.mask & ~shared, event);
  }
  warps[warps.size() - per_block + step.warp.id].push_back(event);
}

double Trace::own(int region, bool write, int multiprocessors) const {
  const Touched& touched = regions_.at(region);
  const double all = double(touched.sectors[write]) * kSectorBytes * multiprocessors;
  return std::min(1.0, touched.bytes / all);
}

}  // namespace machine
