// SPDX-License-Identifier: Apache-2.0
// u KL(q || m) + v KL(p || m), m = b q + (1 - b) p, or half the sum of |p - q|, of one row, in vectors of W floats: the
// term of each class and its derivative by w = log(p / q), as they stand or, near w = 0 where they cancel, by their
// series. Formulas: kdkernels/logits/MATH.md, section 8.
#pragma once

#include "rows.h"

namespace kdkernels {

enum class Form { kMixture, kForward, kReverse, kVariation };  // b between 0 and 1; 0; 1; u = v = 0

constexpr int kTerms = 8;      // of a series
constexpr float kSmall = 0.4;  // of |w|: below, the series is exact

// (exp(w) - 1) / w
constexpr float kExponential[] = {1.f, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
// log((1 + x) / (1 - x)) / x by x^2, x <= 1/3: 4e-9 off
constexpr float kLogarithm[] = {2.f, 0.66666317f, 0.40024853f, 0.27961418f, 0.28174657f};

struct Divergence {
  Form form;
  float b, c, u, v;                     // c = 1 - b
  float tilt, bend, curvature;          // u c - v b; c (u c - v b); u c^2 + v b^2
  float log_b, log_c;
  float value[kTerms], slope[kTerms];  // term / (q w^2) and slope / (p w), by powers of w

  Divergence(double b, double u, double v);
};

inline Divergence::Divergence(double b, double u, double v)
    : form(u == 0 && v == 0 ? Form::kVariation : b == 0 ? Form::kForward : b == 1 ? Form::kReverse : Form::kMixture),
      b(static_cast<float>(b)), c(static_cast<float>(1 - b)), u(static_cast<float>(u)), v(static_cast<float>(v)),
      tilt(static_cast<float>(u * (1 - b) - v * b)), bend(static_cast<float>((1 - b) * (u * (1 - b) - v * b))),
      curvature(static_cast<float>(u * (1 - b) * (1 - b) + v * b * b)), log_b(static_cast<float>(std::log(b))),
      log_c(static_cast<float>(std::log1p(-b))) {
  constexpr int n = kTerms + 2;
  // exp(w), exp(-w), c exp(w) / (b + c exp(w)) and its integral, the log of m / q; the term by q
  double up[n] = {1}, down[n] = {1}, share[n] = {1 - b}, log[n] = {}, term[n] = {};
  for (int k = 0; k + 1 < n; ++k) {
    up[k + 1] = up[k] / (k + 1);
    down[k + 1] = -down[k] / (k + 1);
    double square = 0;
    for (int i = 0; i <= k; ++i) square += share[i] * share[k - i];
    share[k + 1] = (share[k] - square) / (k + 1);
    log[k + 1] = share[k] / (k + 1);
  }
  for (int k = 2; k < n; ++k) {
    term[k] = (u * (1 - b) - v * b) * up[k] - u * log[k];
    for (int i = 0; i < k; ++i) term[k] -= v * up[i] * (log[k - i] - (k - i == 1));
  }
  for (int k = 0; k < kTerms; ++k) {
    value[k] = static_cast<float>(term[k + 2]);
    double sum = 0;
    for (int i = 0; i <= k; ++i) sum += down[i] * (k - i + 2) * term[k - i + 2];
    slope[k] = static_cast<float>(sum);
  }
}

// of a class: its term; p - q; p d term / dp
template <int W>
struct Class {
  typename Wide<W>::F term, apart, slope;
};

template <int W, int count>
KDK_INLINE typename Wide<W>::F series(const float (&of)[count], const typename Wide<W>::F& w) {
  auto sum = of[count - 1] * w + of[count - 2];  // no vector of a number: GCC fills it lane by lane
  for (int k = count - 3; k >= 0; --k) sum = sum * w + of[k];
  return sum;
}

// w is infinite, or NaN, where sides exclude the class: it is then multiplied by nothing
template <int W, Form form>
KDK_INLINE Class<W> class_of(const Divergence& d, const typename Wide<W>::F& p, const typename Wide<W>::F& q,
                             const typename Wide<W>::F& w) {
  using F = typename Wide<W>::F;
  const auto near = w * w < kSmall * kSmall;
  const F moved = q * w, more = w * series<W>(kExponential, w);  // exp(w) - 1
  const F apart = near ? q * more : p - q;
  if constexpr (form == Form::kVariation) {
    const F half = 0.5f * p;
    return {0.5f * (apart < 0.f ? -apart : apart), apart, w == 0.f ? F{} : w < 0.f ? -half : half};
  } else if constexpr (form == Form::kForward) {
    const F term = apart - (q == 0.f ? F{} : moved);
    return {near ? moved * w * series<W>(d.value, w) : term, apart, apart};
  } else if constexpr (form == Form::kReverse) {
    const F slope = p == 0.f ? F{} : p * w;
    return {near ? moved * w * series<W>(d.value, w) : slope - apart, apart, slope};
  } else {
    const F from_p = d.c * p, from_q = d.b * q;
    const auto mine = from_p > from_q;
    const F most = mine ? from_p : from_q, least = mine ? from_q : from_p;
    const F x = least / (2.f * most + least + std::numeric_limits<float>::min());
    const F part = x * series<W>(kLogarithm, x * x), log_p = part + d.log_c, log_q = part + d.log_b;  // of m / p, m / q
    const F open = p * q == 0.f ? F{} : w;
    const F of_p = d.v * p * (mine ? log_p : log_q - open), of_q = d.u * q * (mine ? log_p + open : log_q);
    const F term = near ? moved * w * series<W>(d.value, w) : d.tilt * apart - of_q - of_p;
    F slope = -of_p;
    if (d.bend != 0) slope += d.bend * apart * p / (most + least + std::numeric_limits<float>::min());
    return {term, apart, near ? p * w * series<W>(d.slope, w) : slope};
  }
}

}  // namespace kdkernels
