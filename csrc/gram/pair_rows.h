// SPDX-License-Identifier: Apache-2.0
// Rows of K and L in float64, a vector of W at a time: from products to kernel values, sums over a row, pair weights.
// Matrices are float32 with rows of whole vectors; what stands behind the last column is 0 and stays out of every sum.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/lanes.h"

namespace kdkernels {

template <int W>
struct DoubleBits;
#define KDK_DOUBLE_BITS(W)                                             \
  template <>                                                          \
  struct DoubleBits<W> {                                               \
    typedef int64_t I __attribute__((vector_size(W * sizeof(int64_t)))); \
  };
KDK_DOUBLE_BITS(2)
KDK_DOUBLE_BITS(4)
KDK_DOUBLE_BITS(8)
#undef KDK_DOUBLE_BITS

template <int W>
KDK_INLINE typename Register<W>::Doubles widened(const float* p) {
  typename Register<W>::Floats x;
  std::memcpy(&x, p, sizeof(x));
  typename Register<W>::Doubles out;
  Register<W>::widen(x, out);
  return out;
}

template <int W>
KDK_INLINE typename Register<W>::Doubles doubles(const double* p) {
  typename Register<W>::Doubles x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <int W>
KDK_INLINE void narrow(float* p, const typename Register<W>::Doubles& x) {
  const auto rounded = __builtin_convertvector(x, typename Register<W>::Floats);
  std::memcpy(p, &rounded, sizeof(rounded));
}

template <int W>
KDK_INLINE double sum_of_doubles(const typename Register<W>::Doubles& x) {
  double v[W];
  std::memcpy(v, &x, sizeof(v));
  for (int half = W / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// exp(x) for x <= 0 to 1e-15, about 0 below -700, NaN for NaN
template <int W>
KDK_INLINE typename Register<W>::Doubles exp_of_doubles(typename Register<W>::Doubles x) {
  using D = typename Register<W>::Doubles;
  using I = typename DoubleBits<W>::I;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const D zero{};
  x = x < zero - 700.0 ? zero - 700.0 : x;
  const D shifted = x * 1.44269504088896340736 + kRound;
  const D n = shifted - kRound;
  const D r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  D y = r * (1.0 / 39916800) + 1.0 / 3628800;  // the series: |r| <= log(2) / 2
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const I scale = ((I)shifted - 0x4338000000000000LL + 1023) << 52;
  return y * (D)scale;
}

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
  const D t = widened<W>(s.g + i * s.ld + j) - doubles<W>(s.half + j) - s.half[i];
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
      const D e = exp_of_doubles<W>(t * s.rates[b]);
      k += e;
      slope += e * s.rates[b];
    }
    narrow<W>(s.k + i * s.ld + j, k - s.level);
    if (s.slope) narrow<W>(s.slope + i * s.ld + j, slope);
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
    const D x = widened<W>(k + j), y = widened<W>(l + j);
    sum[0] += x;
    sum[1] += y;
    sum[2] += x * x;
    sum[3] += x * y;
    sum[4] += y * y;
  }
  for (int m = 0; m < 5; ++m) out[m] = sum_of_doubles<W>(sum[m]);
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
    D c = widened<W>(l + j) * p + widened<W>(k + j) * q + (doubles<W>(w.e + j) + w.e[i]) * inverse;
    if (own.rbf) {
      c *= widened<W>(own.slope + i * own.ld + j);
      sum += c;
      if (w.sigma) moved += c * exponents<W>(own, i, j);
    }
    narrow<W>(v + j, c);
  }
  sums[0] = sum_of_doubles<W>(sum);
  sums[1] = -2 * sum_of_doubles<W>(moved);
}

}  // namespace kdkernels
