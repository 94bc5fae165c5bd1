// SPDX-License-Identifier: Apache-2.0
// Soft ranks of one row and their gradient. Float32 and float64 rows are sorted; long half rows are counted, for they
// have few distinct values, and then each entry looks its rank up by its own bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu_isotonic.h"
#include "cpu_sort.h"

namespace kdkernels {

struct Rule {
  bool relative, kl, descending;
};

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// ranks in place of the sorted values s; number[e] is the block's, -1 for an entry alone
template <class Ends>
void ranks_of_blocks(const Block* blocks, int64_t depth, int64_t entries, Ends ends, double eps, bool kl, double* s,
                     int32_t* number) {
  const int32_t n = ends.end(entries - 1);
  const double rate = inverse(eps);
  int32_t next = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const Block& block = blocks[k];
    const int64_t e0 = block.entry, e1 = k + 1 < depth ? blocks[k + 1].entry : entries;
    const int32_t a = block.begin, b = ends.end(e1 - 1);
    if (b - a == 1) {
      s[e0] = n - a;
      if (number) number[e0] = -1;
      continue;
    }
    const double top = block.top;
    if (eps == 0) {
      for (int64_t e = e0; e < e1; ++e) s[e] = twice_weight(n, a, b) / (2.0 * (b - a));
    } else if (kl) {
      const double share = twice_weight(n, a, b) / 2 / block.sum;
      for (int64_t e = e0; e < e1; ++e) s[e] = share * std::exp((s[e] - top) * rate);
    } else {
      const double mean = block.mean, middle = n - (static_cast<double>(a) + b - 1) / 2;
      for (int64_t e = e0; e < e1; ++e) s[e] = middle + ((s[e] - top) - mean) * rate;
    }
    if (number) {
      const int32_t own = eps == 0 ? -1 : next++;
      for (int64_t e = e0; e < e1; ++e) number[e] = own;
    }
  }
}

// one thread's buffers for rows of up to n entries, and the work on one row
template <class T>
class Ranker {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int64_t kKeys = int64_t(1) << 16;
  static constexpr int64_t kCounted = 4096;  // half rows from here on are counted rather than sorted

 public:
  explicit Ranker(int64_t n) : counting_(kHalf && n >= kCounted) {
    const int64_t entries = counting_ ? std::min(n, kKeys) : n;
    s_ = scratch<double>(entries);
    blocks_ = scratch<Block>(entries);
    number_ = scratch<int32_t>(entries);
    if (counting_) {
      key_ = scratch<uint16_t>(entries);
      ends_ = scratch<int32_t>(entries);
      count_ = std::make_unique<uint32_t[]>(kKeys);
      rank_of_ = scratch<float>(kKeys);
      number_of_ = scratch<int32_t>(kKeys);
    } else {
      items_ = scratch<Item<T>>(2 * n);
    }
  }

  // rank [n]; number [n] or null: block ids; returns eps, NaN for a poisoned row
  template <class Out>
  double operator()(const T* x, int64_t n, const Rule& rule, double eps, Out* rank, int32_t* number) {
    const Extent<T> extent = look_over(x, n);
    if (n > 0 && extent.poisoned()) {
      std::fill_n(rank, n, static_cast<Out>(kNaN));
      if (number) std::fill_n(number, n, -1);
      return kNaN;
    }
    return counting_ ? count(x, n, rule, eps, rank, number) : sort(x, n, extent, rule, eps, rank, number);
  }

 private:
  using Key = typename Ordered<T>::Key;

  template <class Ends>
  double solve(int64_t entries, Ends ends, const Rule& rule, double eps, bool numbered) {
    if (rule.relative) eps *= spread(s_.get(), entries, ends);
    if (entries == 0) return eps;
    const int64_t depth = rule.kl && eps > 0
                              ? pool_kl(s_.get(), entries, ends, ends.end(entries - 1), eps, blocks_.get())
                              : pool_l2(s_.get(), entries, ends, eps, blocks_.get());
    ranks_of_blocks(blocks_.get(), depth, entries, ends, eps, rule.kl, s_.get(), numbered ? number_.get() : nullptr);
    return eps;
  }

  template <class Out>
  double sort(const T* x, int64_t n, Extent<T> extent, const Rule& rule, double eps, Out* rank, int32_t* number) {
    if (extent.some_absent()) {
      std::fill_n(rank, n, Out(0));
      if (number) std::fill_n(number, n, -1);
    }
    const Ordering<T> order = order_row(x, n, extent, rule.descending, items_.get());
    const int64_t m = order.count;
    order.values(s_.get());
    eps = solve(m, Single{}, rule, eps, number != nullptr);
    for (int64_t e = 0; e < m; ++e) rank[order.index(e)] = narrow<Out>(s_[e]);
    if (number) {
      for (int64_t e = 0; e < m; ++e) number[order.index(e)] = number_[e];
    }
    return eps;
  }

  template <class Out>
  double count(const T* x, int64_t n, const Rule& rule, double eps, Out* rank, int32_t* number) {
    for (int64_t i = 0; i < n; ++i) ++count_[Ordered<T>::key(x[i])];
    int64_t entries = 0;
    int32_t end = 0;
    for (int64_t step = 0; step < kKeys; ++step) {
      const Key key = static_cast<Key>(rule.descending ? step : kKeys - 1 - step);
      const uint32_t found = std::exchange(count_[key], 0u);
      if (found == 0 || Ordered<T>::absent(key)) continue;
      key_[entries] = key;
      ends_[entries] = end += static_cast<int32_t>(found);
      s_[entries++] = rule.descending ? -Ordered<T>::value(key) : Ordered<T>::value(key);
    }
    eps = solve(entries, Repeated{ends_.get()}, rule, eps, number != nullptr);
    std::fill_n(&rank_of_[Ordered<T>::kAbsent], 2, 0.f);
    std::fill_n(&number_of_[Ordered<T>::kAbsent], 2, -1);
    for (int64_t e = 0; e < entries; ++e) rank_of_[key_[e]] = static_cast<float>(s_[e]);
    for (int64_t i = 0; i < n; ++i) rank[i] = rank_of_[Ordered<T>::key(x[i])];
    if (number) {
      for (int64_t e = 0; e < entries; ++e) number_of_[key_[e]] = number_[e];
      for (int64_t i = 0; i < n; ++i) number[i] = number_of_[Ordered<T>::key(x[i])];
    }
    return eps;
  }

  bool counting_;
  std::unique_ptr<double[]> s_;
  std::unique_ptr<Block[]> blocks_;
  std::unique_ptr<int32_t[]> number_;
  std::unique_ptr<Item<T>[]> items_;
  std::unique_ptr<uint16_t[]> key_;
  std::unique_ptr<int32_t[]> ends_;
  std::unique_ptr<uint32_t[]> count_;
  std::unique_ptr<float[]> rank_of_;
  std::unique_ptr<int32_t[]> number_of_;
};

// one thread's buffers for the gradient of rows of up to n entries
class RankGradient {
  struct Sum {
    double value, weight;
  };
  static constexpr int64_t kCopies = 4;  // of the sums: a chain of additions into one block would wait for itself

 public:
  explicit RankGradient(int64_t n) : sum_(scratch<Sum>(n + kCopies + 1)), mean_(scratch<double>(n + 1)) {}

  // the largest block id of a row, -1 if nothing is pooled
  static int32_t last_block(const int32_t* number, int64_t n) {
    int32_t last = -1;
    for (int64_t i = 0; i < n; ++i) last = std::max(last, number[i]);
    return last;
  }

  // g_i = (u_i - mean u) / eps of the block, kl: r_i (u_i - sum r u / sum r) / eps; false if an id is not below n
  template <class T, class U>
  bool operator()(const U* u, const U* r, const int32_t* number, int64_t n, double eps, bool kl, bool descending,
                  T* g) {
    const int64_t blocks = last_block(number, n) + int64_t(1);
    if (blocks > n) return false;
    if (!(eps > 0) || blocks == 0) {
      std::fill_n(g, n, narrow<T>(eps == eps ? 0 : kNaN));
      return true;
    }
    const double rate = descending ? -inverse(eps) : inverse(eps);
    if (kl) {
      apply<true>(u, r, number, n, blocks, rate, g);
    } else {
      apply<false>(u, r, number, n, blocks, rate, g);
    }
    return true;
  }

 private:
  // 0 for an element alone, by its bits: a branch is a coin toss here, beside a gather
  static KDK_INLINE double unless_alone(double value, int32_t number) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= ~static_cast<uint64_t>(static_cast<int64_t>(number) >> 63);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  template <bool kKl, class T, class U>
  void apply(const U* u, const U* r, const int32_t* number, int64_t n, int64_t blocks, double rate, T* g) {
    double* mean = mean_.get() + 1;
    mean[-1] = 0;
    if (blocks == 1) {
      one_block<kKl>(u, r, number, n, mean);
      const double centre = *mean;
      for (int64_t i = 0; i < n; ++i) {
        const double slope = (u[i] - centre) * rate, found = kKl ? r[i] * slope : slope;
        g[i] = narrow<T>(number[i] < 0 ? 0 : found);
      }
      return;
    }
    sum_blocks<kKl>(u, r, number, n, blocks, mean);
    for (int64_t i = 0; i < n; ++i) {
      const double slope = (u[i] - mean[number[i]]) * rate;
      g[i] = narrow<T>(unless_alone(kKl ? r[i] * slope : slope, number[i]));
    }
  }

  template <bool kKl, class U>
  static void one_block(const U* u, const U* r, const int32_t* number, int64_t n, double* mean) {
    auto weight = [=](int64_t i) {
      const double w = kKl ? static_cast<double>(r[i]) : 1.0;
      return number[i] < 0 ? 0.0 : w;
    };
    auto value = [=](int64_t i) {
      const double v = kKl ? static_cast<double>(r[i]) * u[i] : static_cast<double>(u[i]);
      return number[i] < 0 ? 0.0 : v;
    };
    *mean = sum_lanes(n, value) / sum_lanes(n, weight);
  }

  template <bool kKl, class U>
  void sum_blocks(const U* u, const U* r, const int32_t* number, int64_t n, int64_t blocks, double* mean) {
    const int64_t copies = blocks * kCopies <= n ? kCopies : 1;
    // before the blocks' sums lies one of the elements alone, never read: which they are no branch predictor can tell
    Sum* sums = sum_.get() + kCopies;
    std::fill_n(sum_.get(), blocks * copies + kCopies, Sum{0, 0});
    for (int64_t i = 0; i < n; ++i) {
      Sum& sum = sums[number[i] * copies + (i & (copies - 1))];
      const double weight = kKl ? static_cast<double>(r[i]) : 1.0;
      sum.value += weight * u[i];
      sum.weight += weight;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      Sum total{0, 0};
      for (int64_t c = 0; c < copies; ++c) {
        total.value += sums[b * copies + c].value;
        total.weight += sums[b * copies + c].weight;
      }
      mean[b] = total.value / total.weight;
    }
  }

  std::unique_ptr<Sum[]> sum_;
  std::unique_ptr<double[]> mean_;
};

}  // namespace kdkernels
