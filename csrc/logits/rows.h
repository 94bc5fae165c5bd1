// SPDX-License-Identifier: Apache-2.0
// One row of logits in vectors of W floats: exponential and logarithm, sums, and the loops of loss and gradient.
// Rows come as float32 scratch, padded with -inf to whole vectors: a class that is not there has probability 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/lanes.h"
#include "../common/wide.h"

namespace kdkernels {

constexpr int64_t kPad = 16;     // floats of the widest vector
constexpr int64_t kBlock = 512;  // classes that are summed in float32 before they join a float64 sum

constexpr double kNear = 1. / 64;  // of a divergence: below, its sum is one of differences

// exp(x) for x <= 0 to 2 units in the last place, 0 below -87, NaN for NaN. Cephes' polynomial
template <int W>
KDK_INLINE typename Wide<W>::F exp_of(const typename Wide<W>::F& x) {
  using F = typename Wide<W>::F;
  using I = typename Wide<W>::I;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F shifted = x * 1.44269504088896341f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const I scale = ((I)shifted + (127 - 0x4B400000)) << 23;
  return x < -87.f ? F{} : y * (F)scale;
}

// log(x) for x in [smallest normal, 1]. Cephes' polynomial
template <int W>
KDK_INLINE typename Wide<W>::F log_of(const typename Wide<W>::F& x) {
  using F = typename Wide<W>::F;
  using I = typename Wide<W>::I;
  // mantissa in [sqrt(1/2), sqrt(2)), exponent as a float through the integer trick
  const I bits = (I)x;
  const I e = (bits - 0x3F3504F3) >> 23;
  const F m = (F)(bits - (e << 23)) - 1.f;
  const F n = (F)(e + 0x4B400000) - 12582912.f;
  const F z = m * m;
  F y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + n * -2.12194440e-4f - z * 0.5f;
  return m + y + n * 0.693359375f;
}

// ignores NaN: it enters through the exponentials
template <int W>
KDK_INLINE float maximum(const float* x, int64_t padded) {
  auto m = splat<W>(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < padded; j += W) {
    const auto b = load<W>(x + j);
    m = b > m ? b : m;
  }
  using F = typename Wide<W>::F;
  return folded<W>(m, [](const F& a, const F& b) __attribute__((always_inline)) { return a > b ? a : b; });
}

struct Terms {
  float tau, inverse_tau, alpha;
  int squarings;  // tau = 2^squarings: exp(x) = exp(x / tau)^tau; -1 for another tau
  float mix[3];
  bool hard, soft, labelled, plain, clean;
};

// exp(x) from e = exp(x / tau)
template <int W>
KDK_INLINE typename Wide<W>::F untempered(const typename Wide<W>::F& x, typename Wide<W>::F e, int squarings) {
  if (squarings < 0) return exp_of<W>(x);
  for (int k = 0; k < squarings; ++k) e *= e;
  return e;
}

// a row and what is known of it: maximum, log of its normaliser
struct Side {
  const float* x;
  float top, log;
};

// sum_c exp((x_c - top) / tau) of a block at most
template <int W>
KDK_INLINE double block_sum(const float* x, float top, int64_t padded, float inverse_tau) {
  typename Wide<W>::F s{};
  for (int64_t j = 0; j < padded; j += W) s += exp_of<W>((load<W>(x + j) - top) * inverse_tau);
  return sum_of<W>(s);
}

template <int W>
KDK_INLINE void normalise(Side& side, int64_t padded, float inverse_tau) {
  side.top = maximum<W>(side.x, padded);
  double sum = 0;
  for (int64_t j = 0; j < padded; j += kBlock) {
    sum += block_sum<W>(side.x + j, side.top, std::min(padded - j, kBlock), inverse_tau);
  }
  side.log = static_cast<float>(std::log(sum));
}

struct Sums {
  double s = 0, one = 0, t = 0, cross = 0;
};

// normalisers of the student at tau and 1 and, with `teacher`, those of the teacher and sum exp(dy / tau) (dy - dz):
// dz and dy are logits less their maxima
template <int W>
KDK_INLINE Sums both_sides(const Side& z, const Side& y, int64_t padded, const Terms& of, bool teacher) {
  using F = typename Wide<W>::F;
  Sums total;
  for (int64_t j0 = 0; j0 < padded; j0 += kBlock) {
    F s{}, one{}, t{}, cross{};
    for (int64_t j = j0; j < std::min(padded, j0 + kBlock); j += W) {
      const F dz = load<W>(z.x + j) - z.top;
      const F e = exp_of<W>(dz * of.inverse_tau);
      s += e;
      if (of.hard) one += untempered<W>(dz, e, of.squarings);
      if (teacher) {
        const F dy = load<W>(y.x + j) - y.top;
        const F q = exp_of<W>(dy * of.inverse_tau);
        t += q;
        cross += q == 0.f ? F{} : q * (dy - dz);  // no 0 * inf where a side excludes the class
      }
    }
    total.s += sum_of<W>(s);
    total.one += sum_of<W>(one);
    total.t += sum_of<W>(t);
    total.cross += sum_of<W>(cross);
  }
  return total;
}

// q [padded] of a mixed target, without the labels
template <int W>
KDK_INLINE void mixture(const Side& y, const Side (&clean)[2], float lam, const Terms& of, float* q, int64_t padded) {
  using F = typename Wide<W>::F;
  for (int64_t j = 0; j < padded; j += W) {
    F b = of.mix[0] * exp_of<W>((load<W>(y.x + j) - y.top) * of.inverse_tau - y.log);
    if (of.clean) {
      const F a = exp_of<W>((load<W>(clean[0].x + j) - clean[0].top) * of.inverse_tau - clean[0].log);
      const F c = exp_of<W>((load<W>(clean[1].x + j) - clean[1].top) * of.inverse_tau - clean[1].log);
      b += of.mix[1] * (lam * a + (1 - lam) * c);
    }
    store<W>(q + j, b);
  }
}

// sum_c q_c (log q_c - log p_c)
template <int W>
KDK_INLINE double divergence(const float* q, const Side& z, int64_t padded, float inverse_tau) {
  using F = typename Wide<W>::F;
  double total = 0;
  for (int64_t j0 = 0; j0 < padded; j0 += kBlock) {
    F sum{};
    for (int64_t j = j0; j < std::min(padded, j0 + kBlock); j += W) {
      const F b = load<W>(q + j), log_p = (load<W>(z.x + j) - z.top) * inverse_tau - z.log;
      // NaN is not below: it stays
      sum += b < std::numeric_limits<float>::min() ? F{} : b * (log_of<W>(b) - log_p);
    }
    total += sum_of<W>(sum);
  }
  return total;
}

// the same to the last digits where p is near q: sum_c (p_c - q_c - q_c w_c), w = log(p / q), whose terms are not
// negative and a series where they cancel. What w is off for all classes alike, a = sum_c (p_c - q_c): a^2 / 2 leaves.
// q as above, or null: the teacher's softmax
template <int W>
KDK_INLINE double near_divergence(const float* q, const Side& z, const Side& y, int64_t padded, float inverse_tau) {
  using F = typename Wide<W>::F;
  const float of_p = std::exp(-z.log), of_q = std::exp(-y.log), apart = z.log - y.log;
  double total = 0, moved = 0;
  for (int64_t j0 = 0; j0 < padded; j0 += kBlock) {
    F sum{}, first{};
    for (int64_t j = j0; j < std::min(padded, j0 + kBlock); j += W) {
      const F dz = load<W>(z.x + j) - z.top, p = of_p * exp_of<W>(dz * inverse_tau);
      F b, w;
      if (q) {
        b = load<W>(q + j);
        w = dz * inverse_tau - z.log - log_of<W>(b);
      } else {
        const F dy = load<W>(y.x + j) - y.top;
        b = of_q * exp_of<W>(dy * inverse_tau);
        w = (dz - dy) * inverse_tau - apart;
      }
      w = b < std::numeric_limits<float>::min() ? F{} : w;
      F series = w * (1.f / 5040) + 1.f / 720;
      series = series * w + 1.f / 120;
      series = series * w + 1.f / 24;
      series = series * w + 1.f / 6;
      series = series * w + 0.5f;
      const F of_w = b * w;
      first += of_w;
      const F term = w * w < 0.0625f ? series * w * of_w : p - b - of_w;
      sum += b < std::numeric_limits<float>::min() ? p : term;
    }
    total += sum_of<W>(sum);
    moved += sum_of<W>(first);
  }
  const double a = total + moved;
  return total - (std::abs(a) < 1e-3 ? a * a / 2 : 0);
}

// out = g [alpha tau (p - q) + (1 - alpha) p^1], without the labels; q is a mixture, or null: the teacher's softmax
template <int W>
KDK_INLINE void student_gradient(const Side& z, const Side& y, const float* q, float log_one, const Terms& of, float g,
                                 float* out, int64_t padded) {
  using F = typename Wide<W>::F;
  const float soft = of.soft ? g * of.alpha * of.tau : 0.f, hard = of.hard ? g * (1 - of.alpha) : 0.f;
  const float of_p = soft * std::exp(-z.log), of_q = soft * std::exp(-y.log), of_one = hard * std::exp(-log_one);
  for (int64_t j = 0; j < padded; j += W) {
    const F dz = load<W>(z.x + j) - z.top;
    const F e = exp_of<W>(dz * of.inverse_tau);
    F d{};
    if (of.soft) {
      d = of_p * e;
      d -= q ? soft * load<W>(q + j) : of_q * exp_of<W>((load<W>(y.x + j) - y.top) * of.inverse_tau);
    }
    if (of.hard) d += of_one * untempered<W>(dz, e, of.squarings);
    store<W>(out + j, d);
  }
}

// out = g tau q (log q - log p - KL / tau^2)
template <int W>
KDK_INLINE void teacher_gradient(const Side& z, const Side& y, float kl, const Terms& of, float g, float* out,
                                 int64_t padded) {
  using F = typename Wide<W>::F;
  const float mean = kl * of.inverse_tau * of.inverse_tau;
  for (int64_t j = 0; j < padded; j += W) {
    const F log_p = (load<W>(z.x + j) - z.top) * of.inverse_tau - z.log;
    const F log_q = (load<W>(y.x + j) - y.top) * of.inverse_tau - y.log;
    const F q = exp_of<W>(log_q);
    store<W>(out + j, q == 0.f ? F{} : q * (log_q - log_p - mean) * (g * of.tau));
  }
}

}  // namespace kdkernels
