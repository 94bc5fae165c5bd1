// SPDX-License-Identifier: Apache-2.0
// From row sums to the value of CKA or HSIC and the vectors of its gradient: the letters and formulas of
// kdkernels/gram/torch_impl/combine.py, without the row norm.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace kdkernels {

constexpr int64_t kSide = 6;  // vectors a side: u, p, q, e, f, h

// h(K, L) = c [S_KL - r a.b + s A B]
struct Form {
  double c, r, s;
};

inline Form estimator(double n, bool unbiased, bool centre) {
  if (unbiased) {
    n = std::max(n, 4.0);  // a smaller masked group is set to 0 afterwards
    return {1 / (n * (n - 3)), 2 / (n - 2), 1 / ((n - 1) * (n - 2))};
  }
  n = std::max(n, 2.0);
  const double c = 1 / ((n - 1) * (n - 1));
  return centre ? Form{c, 2 / n, 1 / (n * n)} : Form{c, 0, 0};
}

struct GroupSums {
  const double* sums[5];  // [n] a, b, kk, kl, ll
  const void* means[2];   // [n] u of x and of y, or null
  int64_t n;
  double count, unit[2];
};

struct Estimator {
  bool cka, unbiased, centre;
  int64_t need, minimum;  // bits of need: x, y, sigma of x, sigma of y
  double eps;
};

inline double total(const double* v, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += v[i];
  return sum;
}

inline double dot(const double* v, const double* w, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += v[i] * w[i];
  return sum;
}

template <class T>
double weigh(const GroupSums& g, const Estimator& o, T* rows) {
  const int64_t n = g.n;
  const double *a = g.sums[0], *b = g.sums[1];
  if (rows) std::fill(rows, rows + 2 * kSide * n, T(0));
  if (g.count < o.minimum) return 0;
  const Form form = estimator(g.count, o.unbiased, o.centre);
  const double A = total(a, n), B = total(b, n);
  const double skk = total(g.sums[2], n), skl = total(g.sums[3], n), sll = total(g.sums[4], n);
  const double kl = form.c * (skl - form.r * dot(a, b, n) + form.s * A * B);
  double value = kl * g.unit[0] * g.unit[1], alpha = g.unit[0] * g.unit[1], beta[2] = {0, 0};
  if (o.cka) {
    const double kk = form.c * (skk - form.r * dot(a, a, n) + form.s * A * A);
    const double ll = form.c * (sll - form.r * dot(b, b, n) + form.s * B * B);
    // below its own rounding a side has no direction: CKA is 0 there, with zero gradient
    const double floor = 64 * o.eps * o.eps * form.c;
    const bool defined = !(kk <= floor * skk || ll <= floor * sll);
    alpha = defined ? 1 / (std::sqrt(kk) * std::sqrt(ll)) : 0;
    value = defined ? kl * alpha : kl * 0;
    beta[0] = defined ? -value / kk : -value;
    beta[1] = defined ? -value / ll : -value;
  }
  if (!rows) return value;
  const double totals[2] = {A, B};
  for (int side = 0; side < 2; ++side) {
    T* out = rows + side * kSide * n;
    if (g.means[side]) std::copy_n(static_cast<const T*>(g.means[side]), n, out);
    if (!(o.need >> side & 0b101)) continue;
    const double *own = g.sums[side], *other = g.sums[1 - side];
    const double p = form.c * alpha, q = form.c * beta[side];
    const double mean = form.s * (p * totals[1 - side] + q * totals[side]);
    for (int64_t i = 0; i < n; ++i) {
      out[n + i] = static_cast<T>(p);
      out[2 * n + i] = static_cast<T>(q);
      out[3 * n + i] = static_cast<T>(mean - form.r * (p * other[i] + q * own[i]));
    }
  }
  return value;
}

}  // namespace kdkernels
