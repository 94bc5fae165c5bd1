// SPDX-License-Identifier: Apache-2.0
// The bandwidth of a Gaussian: numbers, or a rule over the squared distances, which are there once the products are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "strip.h"

namespace kdkernels {

enum Rule : int64_t { kLinear, kNumbers, kMean, kMedian };

struct KernelChoice {
  Rule rule;
  double factor;        // of a rule
  const double* sigma;  // [count]
  int64_t count;
};

inline double middle(std::vector<float>& values, int64_t place, int64_t count) {
  if (place < count || values.empty()) return 0;  // the zeros of the diagonal
  const auto at = values.begin() + std::min<int64_t>((place - count) / 2, values.size() - 1);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

// NumPy's median of the count^2 squared distances, each pair standing for two
inline double median(const Features& f, const float* g, int64_t ld) {
  const int64_t n = f.n, count = f.count;
  std::vector<float> values;
  values.reserve(count * (count - 1) / 2);
  for (int64_t i = 0; i < n; ++i) {
    if (!f.counts(i)) continue;
    for (int64_t j = 0; j < i; ++j) {
      if (!f.counts(j)) continue;
      values.push_back(std::max(0.0f, g[i * ld + i] + g[j * ld + j] - 2 * g[i * ld + j]));
    }
  }
  const int64_t total = count * count;
  return (middle(values, (total - 1) / 2, count) + middle(values, total / 2, count)) / 2;
}

// 1 / sigma^2 of rows that are multiplied by the scale; spread: their mean squared norm
inline std::vector<double> rates_of(const KernelChoice& of, const Features& f, const float* g, int64_t ld,
                                    double spread, double scale) {
  std::vector<double> rates(of.rule == kNumbers ? of.count : 1);
  const double unit = scale * scale;
  if (of.rule == kNumbers) {
    for (int64_t b = 0; b < of.count; ++b) rates[b] = 1 / (of.sigma[b] * of.sigma[b] * unit);
    return rates;
  }
  double square = 2 * spread;
  if (of.rule == kMedian && std::isfinite(square)) {
    const double middle = median(f, g, ld);
    if (middle > 0) square = middle;
  }
  rates[0] = 1 / (of.factor * of.factor * (square == 0 ? unit : square));
  return rates;
}

}  // namespace kdkernels
