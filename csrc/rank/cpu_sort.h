// SPDX-License-Identifier: Apache-2.0
// Sorts the entries of one row that are present, in an order where the first rank highest. What is sorted is a key
// above an index, by the digits in which the row's keys differ: least digit first, no comparisons, stable. Short rows
// count instead, for each entry, the entries before it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu_values.h"

namespace kdkernels {

// what one look over a row tells
template <class T>
struct Extent {
  using Key = typename Ordered<T>::Key;
  Key least, greatest;

  bool poisoned() const { return greatest >= Ordered<T>::kInfinity || least < Ordered<T>::kAbsent; }
  bool some_absent() const { return Ordered<T>::absent(least); }
};

template <class T>
KDK_INLINE Extent<T> look_over(const T* x, int64_t n) {
  using Key = typename Ordered<T>::Key;
  Key least = static_cast<Key>(~Key(0)), greatest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = Ordered<T>::key(x[i]);
    least = std::min(least, key);
    greatest = std::max(greatest, key);
  }
  return {least, greatest};
}

// the entry of a sort: 32 bits of index below a key of 32 bits, or beside one of 64
template <class T>
struct Item {
  uint64_t bits;
  static KDK_INLINE Item of(uint64_t key, uint32_t index) { return {key << 32 | index}; }
  KDK_INLINE uint64_t key() const { return bits >> 32; }
  KDK_INLINE uint32_t index() const { return static_cast<uint32_t>(bits); }
};
template <>
struct Item<double> {
  uint64_t bits, place;
  static KDK_INLINE Item of(uint64_t key, uint32_t index) { return {key, index}; }
  KDK_INLINE uint64_t key() const { return bits; }
  KDK_INLINE uint32_t index() const { return static_cast<uint32_t>(place); }
};

constexpr int64_t kShortRow = 128;

// how keys are cut: short rows cannot pay for large tables
struct Digits {
  static constexpr int64_t kShort = 2000;
  static constexpr int kTables = 6 << 11;  // entries of the largest set of tables: 64 bits in digits of 11

  int count, width;
  Digits(int bits, int64_t n) {
    const int widest = n < kShort ? 8 : 11;
    count = (bits + widest - 1) / widest;
    width = count ? (bits + count - 1) / count : 0;
  }
};

// sorts a by its keys, which are below 2^bits; returns a or b, whichever holds the result
template <class T>
Item<T>* sort_items(Item<T>* a, Item<T>* b, int64_t n, int bits) {
  const Digits digits(bits, n);
  uint32_t count[Digits::kTables];
  const uint32_t size = 1u << digits.width, mask = size - 1;
  std::fill_n(count, digits.count * size, 0u);
  for (int64_t i = 0; i < n; ++i) {
    uint64_t key = a[i].key();
    for (int d = 0; d < digits.count; ++d, key >>= digits.width) ++count[d * size + (key & mask)];
  }
  for (int d = 0; d < digits.count; ++d) {
    uint32_t* start = count + d * size;
    const int shift = d * digits.width;
    if (start[a[0].key() >> shift & mask] == n) continue;  // one digit for all: already in order
    uint32_t sum = 0;
    for (uint32_t k = 0; k < size; ++k) sum += std::exchange(start[k], sum);
    for (int64_t i = 0; i < n; ++i) b[start[a[i].key() >> shift & mask]++] = a[i];
    std::swap(a, b);
  }
  return a;
}

// the same for a short row: an entry's place is the number of smaller keys, and of equal ones before it, counted for as
// many entries at once as the registers of every instruction set hold. No key is the greatest of its type, which an
// infinity would have
template <class T>
void place_items(const Item<T>* a, Item<T>* b, int32_t n) {
  typedef int32_t Keys __attribute__((vector_size(16)));
  constexpr int kParts = 4, kTogether = 4 * kParts;
  static_assert(kShortRow % kTogether == 0);
  int32_t key[kShortRow], place[kShortRow];
  // SSE2 compares signed numbers alone
  for (int32_t i = 0; i < n; ++i) key[i] = static_cast<int32_t>(static_cast<uint32_t>(a[i].key()) ^ 0x80000000u);
  std::fill(key + n, key + (n + kTogether - 1) / kTogether * kTogether, INT32_MAX);
  for (int32_t i = 0; i < n; i += kTogether) {
    Keys own[kParts], before[kParts];
    std::memcpy(own, key + i, sizeof(own));
    for (Keys& count : before) count = Keys{} + i;
    for (int64_t j = 0; j < i; ++j) {
      for (int h = 0; h < kParts; ++h) before[h] += own[h] < key[j];
    }
#pragma GCC unroll 16
    for (int32_t j = 0; j < kTogether; ++j) {
#pragma GCC unroll 4
      for (int h = 0; h < kParts; ++h) {
        const Keys later = Keys{0, 1, 2, 3} > j - 4 * h;  // -1 in the lanes of entries behind j
        before[h] -= key[i + j] < own[h] - later;
      }
    }
    for (int64_t j = i + kTogether; j < n; ++j) {
      for (int h = 0; h < kParts; ++h) before[h] -= key[j] < own[h];
    }
    std::memcpy(place + i, before, sizeof(before));
  }
  for (int32_t i = 0; i < n; ++i) b[place[i]] = a[i];
}

inline int bit_width(uint64_t v) { return v ? 64 - __builtin_clzll(v) : 0; }

// the present entries of a row, sorted by theta = x, or -x, greatest first; equal values keep their order
template <class T>
struct Ordering {
  using Key = typename Ordered<T>::Key;
  Item<T>* items;
  int64_t count;
  Key origin;     // the key from which all keys of the items are counted
  bool negated;

  uint32_t index(int64_t e) const { return items[e].index(); }

  // theta of each item
  void values(double* s) const {
    if (negated) {
      for (int64_t e = 0; e < count; ++e) s[e] = -Ordered<T>::value(static_cast<Key>(origin + items[e].key()));
    } else {
      for (int64_t e = 0; e < count; ++e) s[e] = Ordered<T>::value(static_cast<Key>(origin - items[e].key()));
    }
  }
};

// -0 and 0 are one number
template <class T>
KDK_INLINE typename Ordered<T>::Key number_key(T value) {
  const auto key = Ordered<T>::key(value);
  return static_cast<typename Ordered<T>::Key>(key + (key == static_cast<decltype(key)>(Ordered<T>::kSign - 1)));
}

// the row is not poisoned; items [2 n]
template <class T>
Ordering<T> order_row(const T* x, int64_t n, Extent<T> extent, bool negated, Item<T>* items) {
  using Key = typename Ordered<T>::Key;
  if (n == 0) return {items, 0, 0, negated};
  constexpr Key kZero = Ordered<T>::kSign;
  const Key greatest = extent.greatest == kZero - 1 ? kZero : extent.greatest;
  Key least = extent.least;
  int64_t m = n;
  if (extent.some_absent()) {
    least = greatest;
    for (int64_t i = 0; i < n; ++i) {
      const Key key = number_key(x[i]);
      least = std::min(least, Ordered<T>::absent(key) ? greatest : key);
    }
    m = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Key key = number_key(x[i]);
      items[m] = Item<T>::of(static_cast<Key>(negated ? key - least : greatest - key), static_cast<uint32_t>(i));
      m += !Ordered<T>::absent(key);
    }
  } else if (negated) {
    for (int64_t i = 0; i < n; ++i) {
      items[i] = Item<T>::of(static_cast<Key>(number_key(x[i]) - least), static_cast<uint32_t>(i));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      items[i] = Item<T>::of(static_cast<Key>(greatest - number_key(x[i])), static_cast<uint32_t>(i));
    }
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (m <= kShortRow) {
      place_items<T>(items, items + n, static_cast<int32_t>(m));
      return {items + n, m, negated ? least : greatest, negated};
    }
  }
  if (m > 0) items = sort_items(items, items + n, m, bit_width(static_cast<Key>(greatest - least)));
  return {items, m, negated ? least : greatest, negated};
}

}  // namespace kdkernels
