// SPDX-License-Identifier: Apache-2.0
// What the stand-ins for the CUDA runtime and for torch's CUDA build know together, and give to machine/cuda_device.py.
#pragma once

#include <cstddef>
#include <vector>

namespace machine {

// memory that an operator asked a tensor for
struct Range {
  const void* begin;
  std::size_t bytes;
  int writable;
};

struct Launch {
  const char* kernel;
  unsigned grid[3], block[3];
  std::size_t shared;  // dynamic
  void** arguments;
  const Range* ranges;
  int range_count;
  unsigned operation;  // one number for all launches of an operator
};

struct Device {
  const char* (*run)(const Launch*);  // null, or why the launch failed
  int architecture;                   // 80, 90
  std::size_t shared;                 // bytes a block may have
  int number;                         // another one for every device that is set
};

Device& device();
std::vector<Range>& ranges();
unsigned operation();

}  // namespace machine
