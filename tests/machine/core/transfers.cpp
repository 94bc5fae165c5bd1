// SPDX-License-Identifier: Apache-2.0
// Loads, stores, asynchronous copies, matrices of halves through shared memory, atomic additions.
#include <algorithm>
#include <cstring>

#include "semantics.h"

namespace machine {
namespace {

// hints of caches and scopes: what is in order between blocks is checked as if none were given
const std::string kHints = "E SYS STRONG GPU SM CTA CONSTANT LTC128B LTC256B LU EF EL NA BYPASS ";

void aligned(std::uint64_t address, int n) {
  if (address % n) throw Fault("a misaligned access");
}

Region& shared_at(const Step& x, std::uint64_t address, int n) {
  Region& shared = x.machine.shared.front();
  aligned(address, n);
  if (!shared.holds(address, n)) throw Fault("a shared access beyond the end: " + shared.place(address));
  return shared;
}

Region& global_at(const Step& x, std::uint64_t address, int n) {
  aligned(address, n);
  return x.machine.region(address, n);
}

enum class Space { kShared, kGlobal, kAny };

// an address in any memory becomes one in shared memory, if it lies in its window
template <Space space>
Region& memory_at(const Step& x, std::uint64_t& address, int n) {
  if (space == Space::kAny && in_shared_window(address)) {
    address -= kSharedWindow;
    return shared_at(x, address, n);
  }
  return space == Space::kShared ? shared_at(x, address, n) : global_at(x, address, n);
}

// n bytes into the registers from operand k on; of fewer than four the sign is kept where the type has one
void unpack(Lane& x, int k, const std::uint8_t* bytes, int n) {
  std::uint32_t words[4] = {};
  std::memcpy(words, bytes, n);
  if (x.has("S8")) words[0] = std::int32_t(static_cast<std::int8_t>(words[0]));
  if (x.has("S16")) words[0] = std::int32_t(static_cast<std::int16_t>(words[0]));
  const int base = x.operand(k).index;
  for (int j = 0; base != kZeroRegister && j < std::max(1, n / 4); ++j) x.put(base + j, x.lane, words[j]);
}

void pack(const Lane& x, int k, std::uint8_t* bytes, int n) {
  std::uint32_t words[4] = {};
  const int base = x.operand(k).index;
  for (int j = 0; base != kZeroRegister && j < std::max(1, n / 4); ++j) words[j] = x.get(base + j, x.lane);
  std::memcpy(bytes, words, n);
}

template <Space space>
void load(Lane& x) {
  if (x.count() > 2) throw Fault("a load with a predicate");
  const int n = bytes_of(x);
  std::uint64_t address = x.address(1, space != Space::kShared);
  Region& memory = memory_at<space>(x, address, n);
  std::uint8_t bytes[16];
  if (x.at.checked)
    std::memcpy(bytes, memory.unchecked(address), n);
  else
    memory.read(x.access(), address, bytes, n);
  unpack(x, 0, bytes, n);
}

template <Space space>
void store(Step& step) {
  const int n = bytes_of(step);
  std::uint64_t to[kLanes];
  std::uint8_t bytes[kLanes][16];
  each_lane(step.mask, [&](int l) {
    const Lane x{step, l};
    to[l] = x.address(0, space != Space::kShared);
    pack(x, 1, bytes[l], n);
    memory_at<space>(x, to[l], n).write(x.access(), to[l], bytes[l], n);
    each_lane(step.mask & ((1u << l) - 1), [&](int k) {
      const bool overlap = to[k] < to[l] + n && to[l] < to[k] + n;
      if (overlap && (to[k] != to[l] || std::memcmp(bytes[k], bytes[l], n)))
        step.report("two lanes store different values to one address");
    });
  });
}

// a lane's own stack
std::uint8_t* local_at(Lane& x, int k, int n) {
  const std::uint64_t address = x.address(k, false);
  aligned(address, n);
  if (address + n > kLocalBytes) throw Fault("a local access outside of the stack");
  auto& local = x.warp.local;
  if (local.empty()) {
    local.resize(kLanes * kLocalBytes);
    for (auto& byte : local) byte = static_cast<std::uint8_t>(x.machine.random());
  }
  return &local[x.lane * kLocalBytes + address];
}

void start_copy(Lane& x) {
  const int n = bytes_of(x), last = x.count() - 1;
  const std::uint64_t to = x.address(0, false), from = x.address(1, true);
  Region& shared = shared_at(x, to, n);
  Copy copy{static_cast<std::uint32_t>(to), n, {}};  // zeros where the predicate says that nothing is read
  if (!x.operand(last).is_predicate() || x.p(last)) global_at(x, from, n).read(x.access(), from, copy.data, n);
  shared.copy_starts(x.access(), to, copy.data, n, x.machine.schedule.early);
  x.warp.open_copies.push_back(copy);
}

// until at most `left` groups of copies are in flight
void wait_for_copies(Step& x) {
  if (!x.has("LE")) throw Fault("a wait for scoreboards that is not modelled");
  if (x.count() < 2) return;  // for the scoreboards of loads, which are done when they are issued
  auto& groups = x.warp.copy_groups;
  const auto left = static_cast<std::size_t>(x.operand(1).value);
  for (; groups.size() > left; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front()) x.machine.shared.front().copy_lands(x.access(), copy.to, copy.data, copy.n);
}

int matrices(const Step& x) { return x.has("4") ? 4 : x.has("2") ? 2 : 1; }

// 8 x 8 matrices of halves: lane 8k + r has the address of row r of the k-th, and gets two neighbours of row lane / 4
void load_matrices(Step& step) {
  step.whole_warp();
  const bool transposed = step.has("MT88");
  std::uint32_t out[4][kLanes];
  for (int k = 0; k < matrices(step); ++k) {
    std::uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      const std::uint64_t address = Lane{step, 8 * k + r}.address(1, false);
      shared_at(step, address, 16).read(step.access(), address, rows[r], 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      const auto entry = [&](int i) { return std::uint32_t(transposed ? rows[c + i][r] : rows[r][c + i]); };
      out[k][l] = entry(0) | entry(1) << 16;
    }
  }
  for (int k = 0; k < matrices(step); ++k)
    for (int l = 0; l < kLanes; ++l) step.put(step.operand(0).index + k, l, out[k][l]);
}

void store_matrices(Step& step) {
  step.whole_warp();
  const bool transposed = step.has("MT88");
  for (int k = 0; k < matrices(step); ++k) {
    std::uint16_t rows[8][8];
    for (int l = 0; l < kLanes; ++l)
      for (int h = 0; h < 2; ++h) {
        const int r = l / 4, c = l % 4 * 2 + h;
        const std::uint32_t value = step.get(step.operand(1).index + k, l) >> 16 * h;
        (transposed ? rows[c][r] : rows[r][c]) = static_cast<std::uint16_t>(value);
      }
    for (int r = 0; r < 8; ++r) {
      const std::uint64_t address = Lane{step, 8 * k + r}.address(0, false);
      shared_at(step, address, 16).write(step.access(), address, rows[r], 16);
    }
  }
}

// in any order between lanes, warps and blocks: no race with other atomic operations. its predicate, if it has one,
// says whether it was done: shared memory has no sums of 64 bits
template <Space space>
void atomic_add(Lane& x) {
  const int address_at = x.at.operands[0].kind == Kind::kMemory ? 0 : x.after_predicates(0) + 1;
  const bool f64 = x.has("F64"), f32 = x.has("F32"), wide = x.has("64") || f64, has_predicate = address_at == 2;
  const int n = wide ? 8 : 4;
  std::uint64_t address = x.address(address_at, true);
  const bool done = !(space == Space::kAny && wide && in_shared_window(address));
  if (has_predicate) x.set_p(0, done);
  if (!done) return;
  std::uint8_t* place = memory_at<space>(x, address, n).atomic(x.access(), address, n);
  std::uint64_t old = 0, add = wide ? x.raw_wide(address_at + 1) : x.raw(address_at + 1);
  std::memcpy(&old, place, n);
  std::uint64_t sum = old + add;
  if (f64) sum = std::bit_cast<std::uint64_t>(std::bit_cast<double>(old) + std::bit_cast<double>(add));
  if (f32) sum = std::bit_cast<std::uint32_t>(__uint_as_float(unsigned(old)) + __uint_as_float(unsigned(add)));
  std::memcpy(place, &sum, n);
  if (address_at) wide ? x.set_wide(address_at - 1, old) : x.set(address_at - 1, static_cast<std::uint32_t>(old));
}

// ATOMS adds (POPC.INC: one for each lane), or swaps 64 bits if they are what is expected: its result is then one
void atomic_in_shared(Lane& x) {
  const bool swaps = x.has("CAST");
  const int n = swaps ? 8 : 4;
  if (swaps != x.has("64") || (!swaps && x.operand(0).index != kZeroRegister)) throw Fault("an atomic operation");
  const std::uint64_t address = x.address(1, false);
  std::uint8_t* place = shared_at(x, address, n).atomic(x.access(), address, n);
  std::uint64_t old = 0;
  std::memcpy(&old, place, n);
  if (swaps) {
    const bool same = old == x.raw_wide(2);
    const std::uint64_t now = same ? x.raw_wide(3) : old;
    std::memcpy(place, &now, n);
    return x.set_wide(0, same);
  }
  const std::uint32_t now = static_cast<std::uint32_t>(old) + (x.has("POPC") ? 1 : x.raw(2));
  std::memcpy(place, &now, n);
}

void load_constant(Lane& x) {
  if (x.has("64")) return x.set_wide(0, x.raw_wide(1));
  const Operand& o = x.operand(1);
  x.set(0, x.has("U8") ? x.machine.constant(o.index, x.constant_offset(o), 1) : x.raw(1));
}

// whether an address means shared memory; all 64 bits of it, though only the first register is written
void is_shared(Lane& x) {
  const Operand& o = x.operand(2);
  const std::uint64_t high = x.get(o.index + 1, x.lane);
  x.set_p(0, in_shared_window((high << 32 | x.get(o.index, x.lane)) + o.value));
}

}  // namespace

int bytes_of(const Step& x) {
  if (x.has("128")) return 16;
  if (x.has("64")) return 8;
  return x.has("U8") || x.has("S8") ? 1 : x.has("U16") || x.has("S16") ? 2 : 4;
}

void add_transfers(Table& table) {
  const std::string sizes = "U8 S8 U16 S16 64 128";
  table.lanes("LD", kHints + sizes, load<Space::kAny>);
  table.lanes("LDG", kHints + sizes, load<Space::kGlobal>);
  table.lanes("LDS", sizes, load<Space::kShared>);
  table.warp("ST", kHints + sizes, store<Space::kAny>);
  table.warp("STG", kHints + sizes, store<Space::kGlobal>);
  table.warp("STS", sizes, store<Space::kShared>);
  table.lanes("LDL", kHints + sizes, [](Lane& x) { unpack(x, 0, local_at(x, 1, bytes_of(x)), bytes_of(x)); });
  table.lanes("STL", kHints + sizes, [](Lane& x) { pack(x, 1, local_at(x, 0, bytes_of(x)), bytes_of(x)); });
  table.lanes("LDC ULDC", "64 U8", load_constant);
  table.lanes("LDGSTS", kHints + "64 128", start_copy);
  table.warp("LDGDEPBAR", "", [](Step& x) {
    x.warp.copy_groups.push_back(std::move(x.warp.open_copies));
    x.warp.open_copies.clear();
  });
  table.warp("DEPBAR", "LE", wait_for_copies);
  table.warp("LDSM", "16 M88 MT88 2 4", load_matrices);
  table.warp("STSM", "16 M88 MT88 2 4", store_matrices);
  table.lanes("ATOMG RED REDG", kHints + "ADD F32 F64 64 RN FTZ", atomic_add<Space::kGlobal>);
  table.lanes("ATOM", kHints + "ADD 64", atomic_add<Space::kAny>);
  table.lanes("ATOMS", "ADD POPC INC 32 CAST SPIN 64", atomic_in_shared);
  table.lanes("QSPC", "E S", is_shared);
}

}  // namespace machine
