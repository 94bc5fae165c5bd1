// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cstring>

#include "instruction.h"

namespace machine {
namespace {
constexpr std::uint32_t kMany = ~0u;
constexpr std::uint16_t kManyWarps = 0xffff;
}  // namespace

std::string Region::place(std::uint64_t address) const {
  const auto offset = static_cast<std::int64_t>(address - base_);
  return name_ + " at byte " + std::to_string(offset) + " of " + std::to_string(size_);
}

Shadow& Region::shadow(std::uint64_t address) {
  if (!shadows_) shadows_.reset(static_cast<Shadow*>(std::calloc(size_, sizeof(Shadow))));
  return shadows_[address - base_];
}

void Region::read(const Access& by, std::uint64_t address, void* to, int n) {
  for (int i = 0; checked_ && i < n; ++i) {
    Shadow& byte = shadow(address + i);
    if (byte.in_flight) by.report(name_ + " is touched while an asynchronous copy into it is in flight");
    if (!written_ && !byte.write_block && !byte.known) by.report(name_ + " is read before it is written");
    if (byte.write_block && byte.write_block != by.block)
      by.report("a block reads what another wrote: " + name_);
    else if (byte.write_block && byte.write_warp != by.warp && byte.write_epoch == by.epoch)
      by.report("a warp reads what another wrote, no barrier between: " + name_);
    const bool again = byte.read_block == by.block && byte.read_epoch == by.epoch;
    byte.read_warp = again && byte.read_warp != by.warp ? kManyWarps : static_cast<std::uint16_t>(by.warp);
    byte.read_block = byte.read_block && byte.read_block != by.block ? kMany : by.block;
    byte.read_epoch = by.epoch;
  }
  std::memcpy(to, unchecked(address), n);
}

void Region::check_read_by_others(const Access& by, const Shadow& byte) const {
  if (byte.read_block && byte.read_block != by.block)
    by.report("a block writes what another read: " + name_);
  else if (byte.read_block && byte.read_warp != by.warp && byte.read_epoch == by.epoch)
    by.report("a warp writes what another reads, no barrier between: " + name_);
}

void Region::check_writable(std::uint64_t address) const {
  if (!writable_) throw Fault("a write to what is only read: " + place(address));
}

void Region::check_write(const Access& by, std::uint64_t address, const void* from, int n) {
  check_writable(address);
  for (int i = 0; checked_ && i < n; ++i) {
    Shadow& byte = shadow(address + i);
    if (byte.in_flight) by.report(name_ + " is touched while an asynchronous copy into it is in flight");
    // the warps of a Triton program may all store a value that all of them hold
    const bool same = unchecked(address)[i] == static_cast<const std::uint8_t*>(from)[i];
    if (byte.write_block && byte.write_block != by.block)
      by.report("two blocks write " + name_);
    else if (byte.write_block && byte.write_warp != by.warp && byte.write_epoch == by.epoch &&
             (!same || byte.atomic))
      by.report("two warps write different values, no barrier between: " + name_);
    check_read_by_others(by, byte);
    byte.write_block = by.block, byte.write_warp = static_cast<std::uint16_t>(by.warp), byte.write_epoch = by.epoch;
    byte.atomic = false;
  }
}

std::uint8_t* Region::atomic(const Access& by, std::uint64_t address, int n) {
  check_writable(address);
  for (int i = 0; checked_ && i < n; ++i) {
    Shadow& byte = shadow(address + i);
    if (!written_ && !byte.write_block && !byte.known) by.report(name_ + " is read before it is written");
    const bool other_block = byte.write_block && byte.write_block != by.block;
    const bool other_warp = byte.write_block && byte.write_warp != by.warp && byte.write_epoch == by.epoch;
    if (!byte.atomic && (other_block || other_warp))
      by.report("an atomic operation on what another wrote, no barrier between: " + name_);
    check_read_by_others(by, byte);
    byte.write_block = other_block ? kMany : by.block;
    byte.write_warp = other_warp ? kManyWarps : static_cast<std::uint16_t>(by.warp);
    byte.write_epoch = by.epoch, byte.atomic = true;
  }
  return unchecked(address);
}

void Region::start_launch(bool checked) {
  checked_ = checked;
  for (std::uint64_t i = 0; shadows_ && i < size_; ++i) {
    Shadow& byte = shadows_[i];
    if (!byte.write_block && !byte.read_block) continue;
    const bool known = byte.known || byte.write_block;
    byte = Shadow{};
    byte.known = known;
  }
}

void Region::write(const Access& by, std::uint64_t address, const void* from, int n) {
  check_write(by, address, from, n);
  std::memcpy(unchecked(address), from, n);
}

void Region::copy_starts(const Access& by, std::uint64_t address, const void* from, int n, bool lands) {
  check_write(by, address, from, n);
  if (lands) std::memcpy(unchecked(address), from, n);
  for (int i = 0; i < n; ++i) ++shadow(address + i).in_flight;
}

void Region::copy_lands(const Access& by, std::uint64_t address, const void* from, int n) {
  copy_dropped(address, n);
  check_write(by, address, from, n);
  std::memcpy(unchecked(address), from, n);
}

void Region::copy_dropped(std::uint64_t address, int n) {
  for (int i = 0; i < n; ++i) --shadow(address + i).in_flight;
}

}  // namespace machine
