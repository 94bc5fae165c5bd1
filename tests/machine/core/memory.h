// SPDX-License-Identifier: Apache-2.0
// Memory with a shadow for each byte: which block and warp wrote and read it last, and in which epoch. An epoch ends
// when a barrier of the block completes; accesses of two warps in one epoch, or of two blocks, have no order.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

namespace machine {

struct Access {
  std::uint32_t block, warp, epoch;  // block and warp from 1
  std::function<void(const std::string&)> report;
};

struct Shadow {
  std::uint32_t write_block = 0, write_epoch = 0, read_block = 0, read_epoch = 0;  // 0: none, kMany: several
  std::uint16_t write_warp = 0, read_warp = 0;
  std::uint8_t in_flight = 0;  // asynchronous copies that have not landed on it
  bool atomic = false;         // its last writes were atomic operations
  bool known = false;          // an earlier launch wrote it
};

class Region {
 public:
  // `written`: its bytes have values already
  Region(std::string name, std::uint64_t base, std::uint8_t* bytes, std::uint64_t size, bool written, bool writable)
      : name_(std::move(name)), base_(base), size_(size), bytes_(bytes), written_(written), writable_(writable) {}

  bool holds(std::uint64_t address, std::uint64_t n) const {
    return address >= base_ && address - base_ <= size_ && n <= size_ - (address - base_);
  }
  bool is_near(std::uint64_t address) const { return address + 4096 >= base_ && address < base_ + size_ + 4096; }
  std::uint64_t base() const { return base_; }
  std::uint64_t size() const { return size_; }
  std::string place(std::uint64_t address) const;
  void read(const Access& by, std::uint64_t address, void* to, int n);
  void write(const Access& by, std::uint64_t address, const void* from, int n);
  // the place of an atomic operation, which has an order with other ones, but none with loads and stores
  std::uint8_t* atomic(const Access& by, std::uint64_t address, int n);
  // everything of earlier launches has happened. not `checked`: without shadows, which take 28 bytes for each
  void start_launch(bool checked);
  // of what is in order by other means
  std::uint8_t* unchecked(std::uint64_t address) { return bytes_ + (address - base_); }
  void copy_starts(const Access& by, std::uint64_t address, const void* from, int n, bool lands);
  void copy_lands(const Access& by, std::uint64_t address, const void* from, int n);
  void copy_dropped(std::uint64_t address, int n);

 private:
  Shadow& shadow(std::uint64_t address);
  void check_write(const Access& by, std::uint64_t address, const void* from, int n);
  void check_read_by_others(const Access& by, const Shadow& byte) const;
  void check_writable(std::uint64_t address) const;

  std::string name_;
  std::uint64_t base_, size_;
  std::uint8_t* bytes_;
  bool written_, writable_, checked_ = true;
  // made at the first access, and pages of it as they are touched
  std::unique_ptr<Shadow[], decltype(&std::free)> shadows_{nullptr, &std::free};
};

}  // namespace machine
