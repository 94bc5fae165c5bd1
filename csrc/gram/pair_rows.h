// SPDX-License-Identifier: Apache-2.0
// Rows of K and L in float64, a vector of W at a time: from products to kernel values, sums over a row, pair weights.
// Matrices are float32 with rows of whole vectors; what stands behind the last column is 0 and stays out of every sum.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/doubles.h"

namespace kdkernels {

// one side as the rows of its matrices
struct Kernel {
  bool rbf = false;
  int64_t n = 0, ld = 0;
  float* g = nullptr;             // [n, ld] products of the prepared rows; linear: also K
  float* k = nullptr;             // [n, ld] K^; rbf: less `level`
  float* slope = nullptr;         // [n, ld] rbf: dK^/dg^, where a gradient is asked for
  const double* half = nullptr;   // [ld] half the squared norms
  const double* rates = nullptr;  // [bandwidths] 1 / sigma^2
  int64_t bandwidths = 0;
  double level = 0;               // the kernel of a typical pair, so that neither k near 1 nor near 0 loses digits
};

template <int W>
KDK_INLINE typename Register<W>::Doubles exponents(const Kernel& s, int64_t i, int64_t j) {
  using D = typename Register<W>::Doubles;
  const D t = fetch<W>(s.g + i * s.ld + j) - fetch<W>(s.half + j) - s.half[i];
  return t > D{} ? D{} : t;
}

// K^_ij = sum exp(-d2 / (2 sigma^2)) - level and its slope, on row i; the diagonal is the caller's
template <int W>
KDK_INLINE void kernel_row(const Kernel& s, int64_t i) {
  using D = typename Register<W>::Doubles;
  for (int64_t j = 0; j < s.n; j += W) {
    const D t = exponents<W>(s, i, j);
    D k{}, slope{};
    for (int64_t b = 0; b < s.bandwidths; ++b) {
      const D e = exp_of<W>(t * s.rates[b]);
      k += e;
      slope += e * s.rates[b];
    }
    put<W>(s.k + i * s.ld + j, k - s.level);
    if (s.slope) put<W>(s.slope + i * s.ld + j, slope);
  }
  for (int64_t j = s.n; j < s.ld; ++j) {
    s.k[i * s.ld + j] = 0;
    if (s.slope) s.slope[i * s.ld + j] = 0;
  }
}

// sums over row i of K, L, K^2, K L, L^2
template <int W>
KDK_INLINE void sum_row(const float* k, const float* l, int64_t n, double* out) {
  using D = typename Register<W>::Doubles;
  D sum[5] = {};
  for (int64_t j = 0; j < n; j += W) {
    const D x = fetch<W>(k + j), y = fetch<W>(l + j);
    sum[0] += x;
    sum[1] += y;
    sum[2] += x * x;
    sum[3] += x * y;
    sum[4] += y * y;
  }
  for (int m = 0; m < 5; ++m) out[m] = sum_of<W>(sum[m]);
}

// of dL/dK: c_ij + c_ji = 2 p L_ij + 2 q K_ij + e_i + e_j
struct PairWeights {
  double p, q;
  const double* e;  // [ld]
  double unit;      // V is divided by this power of two: its size is then about 1
  bool sigma;       // whether dL/dsigma is asked for
};

// V_ij = (c_ij + c_ji) slope_ij / unit on row i; returns {sum_j V_ij, sum_j V_ij d2_ij}
template <int W>
KDK_INLINE void weigh_row(const Kernel& own, const float* l, const PairWeights& w, int64_t i, float* v, double* sums) {
  using D = typename Register<W>::Doubles;
  const double p = 2 * w.p / w.unit, q = 2 * w.q / w.unit, inverse = 1 / w.unit;
  const float* k = own.k + i * own.ld;
  D sum{}, moved{};
  for (int64_t j = 0; j < own.n; j += W) {
    D c = fetch<W>(l + j) * p + fetch<W>(k + j) * q + (fetch<W>(w.e + j) + w.e[i]) * inverse;
    if (own.rbf) {
      c *= fetch<W>(own.slope + i * own.ld + j);
      sum += c;
      if (w.sigma) moved += c * exponents<W>(own, i, j);
    }
    put<W>(v + j, c);
  }
  sums[0] = sum_of<W>(sum);
  sums[1] = -2 * sum_of<W>(moved);
}

}  // namespace kdkernels
