// SPDX-License-Identifier: Apache-2.0
// One row of the n x n products of samples: from products to relations, their loss, and the weights of its gradient.
// float64 in vectors of W; rows are padded to eight samples, and a sample that is not there is one with keep = 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../common/doubles.h"

namespace kdkernels {

constexpr double kEps = 1e-7;                  // of PKT, as in its reference implementation
constexpr double kSame = 64 * 2.220446049250313e-16;  // squared distances below this share of the norms are rounding
constexpr double kClose = 1.0 / 64;            // below this share a product with float32 rows would lose digits

// pairs (k, weight) that are too close for that product
using Close = std::vector<std::pair<int64_t, double>>;

// ---- similarities

// products to cosines, in place; returns their sum
template <int W>
KDK_INLINE double cosine_row(double* row, const double* inverse, double own, int64_t n) {
  typename Register<W>::Doubles sum{};
  for (int64_t k = 0; k < n; k += W) {
    const auto c = fetch<W>(row + k) * fetch<W>(inverse + k) * own;
    put<W>(row + k, c);
    sum += c;
  }
  return sum_of<W>(sum);
}

// sum_k T log((T + eps) / (P + eps)) - (T - P), whose last part is 0 and takes the first order out of each term, not
// out of their sum; and of each side asked for h = dvalue/d(cos), less what the row sum takes back
template <int W>
KDK_INLINE double divergence_row(const double* const* cos, const double* share, const double* keep, double* const* h,
                                 int64_t n) {
  using V = typename Register<W>::Doubles;
  V value{}, of_p{}, of_t{};
  for (int64_t k = 0; k < n; k += W) {
    const V kept = fetch<W>(keep + k);
    const V p = (fetch<W>(cos[0] + k) + 1.0) * share[0] * kept, t = (fetch<W>(cos[1] + k) + 1.0) * share[1] * kept;
    const V above = t + kEps, below = 1.0 / (p + kEps);
    const V log = log_ratio<W>(above, p + kEps, above * below);
    value += t * log - (t - p);
    if (h[0]) {
      const V d = -t * below;
      of_p += d * p;
      put<W>(h[0] + k, d);
    }
    if (h[1]) {
      const V d = log + t / above;
      of_t += d * t;
      put<W>(h[1] + k, d);
    }
  }
  const double means[2] = {sum_of<W>(of_p), sum_of<W>(of_t)};
  for (int side = 0; side < 2; ++side) {
    if (!h[side]) continue;
    for (int64_t k = 0; k < n; k += W) {
      put<W>(h[side] + k, (fetch<W>(h[side] + k) - means[side]) * share[side] * fetch<W>(keep + k));
    }
  }
  return sum_of<W>(value);
}

// eight rows from `first` of V = h + h' as weights of float32; sum_k V_ik, and sum_k V_ik cos_ik
template <int W>
KDK_INLINE void weight_rows(const double* h, const double* cos, int64_t first, int64_t n, float* weights, double* sums,
                            double* along) {
  using V = typename Register<W>::Doubles;
  V total[8] = {}, radial[8] = {};
  for (int64_t k = 0; k < n; k += 8) {
    double turned[8][8];
    for (int b = 0; b < 8; ++b) {
      for (int a = 0; a < 8; ++a) turned[a][b] = h[(k + b) * n + first + a];
    }
    for (int a = 0; a < 8; ++a) {
      const int64_t row = (first + a) * n + k;
      for (int b = 0; b < 8; b += W) {
        const V v = fetch<W>(h + row + b) + fetch<W>(turned[a] + b);
        radial[a] += v * fetch<W>(cos + row + b);
        total[a] += v;
        put<W>(weights + row + b, v);
      }
    }
  }
  for (int a = 0; a < 8; ++a) sums[first + a] = sum_of<W>(total[a]), along[first + a] = sum_of<W>(radial[a]);
}

// ---- distances

struct Counted {
  double sum, count;
};

// products to distances, in place, 0 where samples are one or not there; their sum, and how many are not 0
template <int W>
KDK_INLINE Counted distance_row(double* row, const double* norms, double own, const double* keep, int64_t n) {
  using V = typename Register<W>::Doubles;
  for (int64_t k = 0; k < n; k += W) {
    const V size = fetch<W>(norms + k) + own, square = size - 2.0 * fetch<W>(row + k);
    // NaN is a distance: it shows
    const V apart = square <= size * kSame ? V{} : square;
    put<W>(row + k, fetch<W>(keep + k) == 0.0 ? V{} : apart);
  }
  for (int64_t k = 0; k < n; ++k) row[k] = std::sqrt(row[k]);
  V sum{}, count{};
  for (int64_t k = 0; k < n; k += W) {
    const V d = fetch<W>(row + k);
    sum += d;
    count += d == 0.0 ? V{} : V{} + 1.0;
  }
  return {sum_of<W>(sum), sum_of<W>(count)};
}

struct Slopes {
  double value, mean[2];  // sum_k of smooth-L1; of its slope times each side's distance
};

template <int W>
KDK_INLINE Slopes smooth_row(const double* const* d, const double* scale, int64_t n) {
  using V = typename Register<W>::Doubles;
  V value{}, mean[2] = {};
  for (int64_t k = 0; k < n; k += W) {
    const V u = fetch<W>(d[0] + k) * scale[0], v = fetch<W>(d[1] + k) * scale[1], e = u - v, g = clamped(e);
    value += g * (e - 0.5 * g);
    mean[0] += g * u;
    mean[1] += g * v;
  }
  return {sum_of<W>(value), {sum_of<W>(mean[0]), sum_of<W>(mean[1])}};
}

// weights -V of float32 for one side, in units of its mean distance, and the pairs that they leave out; returns sum V
template <int W>
KDK_INLINE double apart_row(const double* const* d, const double* scale, int side, double mean, const double* norms,
                            double own, int64_t n, float* weights, Close& close) {
  using V = typename Register<W>::Doubles;
  const double sign = side ? -2.0 : 2.0;
  V sum{}, near{};
  const auto weight = [&](int64_t k, V& square) __attribute__((always_inline)) {
    const V u = fetch<W>(d[0] + k) * scale[0], v = fetch<W>(d[1] + k) * scale[1], at = side ? v : u;
    const V own_d = fetch<W>(d[side] + k);
    square = own_d * own_d;
    return at == 0.0 ? V{} : (clamped(u - v) - mean) * sign / at;
  };
  for (int64_t k = 0; k < n; k += W) {
    V square;
    const V w = weight(k, square);
    const auto lost = (square < (fetch<W>(norms + k) + own) * kClose) & (square > 0.0);
    const V kept = lost ? V{} : w;
    near += lost ? V{} + 1.0 : V{};
    sum += kept;
    put<W>(weights + k, -kept);
  }
  if (sum_of<W>(near) > 0) {
    for (int64_t k = 0; k < n; k += W) {
      V square;
      const V w = weight(k, square);
      for (int b = 0; b < W; ++b) {
        if (square[b] > 0 && square[b] < (norms[k + b] + own) * kClose) close.emplace_back(k + b, w[b]);
      }
    }
  }
  return sum_of<W>(sum);
}

}  // namespace kdkernels
