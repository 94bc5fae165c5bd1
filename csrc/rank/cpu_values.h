// SPDX-License-Identifier: Apache-2.0
// The four dtypes of a row as unsigned keys whose order is that of the numbers: -NaN < -inf < ... < inf < NaN.
// The least and the greatest key of a row tell whether it is poisoned and whether entries are absent.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/lanes.h"

namespace kdkernels {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class T>
struct Bits;
template <>
struct Bits<Half> {
  using Type = uint16_t;
  static constexpr Type kInfinity = 0x7c00;
};
template <>
struct Bits<BFloat16> {
  using Type = uint16_t;
  static constexpr Type kInfinity = 0x7f80;
};
template <>
struct Bits<float> {
  using Type = uint32_t;
  static constexpr Type kInfinity = 0x7f800000;
};
template <>
struct Bits<double> {
  using Type = uint64_t;
  static constexpr Type kInfinity = 0x7ff0000000000000;
};

template <class T>
struct Ordered {
  using Key = typename Bits<T>::Type;
  static constexpr Key kSign = static_cast<Key>(Key(1) << (8 * sizeof(Key) - 1));
  static constexpr Key kInfinity = Bits<T>::kInfinity | kSign;
  static constexpr Key kAbsent = static_cast<Key>(~kInfinity);

  static KDK_INLINE Key key(T value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<Key>(bits & kSign ? ~bits : bits | kSign);
  }
  // -inf and, next to it, the least finite number, by which rows are padded
  static KDK_INLINE bool absent(Key key) { return static_cast<Key>(key - kAbsent) <= 1; }
  static KDK_INLINE double value(Key key) {
    const Key bits = static_cast<Key>(key & kSign ? key ^ kSign : ~key);
    T out;
    std::memcpy(&out, &bits, sizeof(out));
    return static_cast<double>(out);
  }
};

template <class T>
KDK_INLINE bool is_absent(T value) {
  return Ordered<T>::absent(Ordered<T>::key(value));
}

// what ranks, sorted values and correlations of a dtype are returned in
template <class T>
using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
KDK_INLINE T narrow(double value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return static_cast<T>(static_cast<float>(value));
  }
}

}  // namespace kdkernels
