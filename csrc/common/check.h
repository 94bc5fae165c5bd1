// SPDX-License-Identifier: Apache-2.0
// One check for every native op: a failed condition throws std::invalid_argument, which Python sees as a ValueError
// that names the op, the argument and the fix. (STD_TORCH_CHECK would prefix the source path and raise RuntimeError.)
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kdkernels {

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace kdkernels

#define KDK_CHECK(condition, ...)                                      \
  do {                                                                 \
    if (!(condition)) {                                                \
      throw std::invalid_argument(::kdkernels::join(__VA_ARGS__));     \
    }                                                                  \
  } while (0)
