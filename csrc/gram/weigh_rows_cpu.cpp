// SPDX-License-Identifier: Apache-2.0
// From row sums to the value of CKA or HSIC and the vectors of its gradient in one call, where PyTorch needs sixty
// launches of O(n) float64 work: the letters and formulas of kdkernels/gram/combine.py, without the row norm.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/check.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSide = 6;  // vectors a side: u, p, q, e, f, h

// h(K, L) = c [S_KL - r a.b + s A B]
struct Form {
  double c, r, s;
};

Form estimator(double n, bool unbiased, bool centre) {
  if (unbiased) {
    n = std::max(n, 4.0);  // a smaller masked group is set to 0 afterwards
    return {1 / (n * (n - 3)), 2 / (n - 2), 1 / ((n - 1) * (n - 2))};
  }
  n = std::max(n, 2.0);
  const double c = 1 / ((n - 1) * (n - 1));
  return centre ? Form{c, 2 / n, 1 / (n * n)} : Form{c, 0, 0};
}

struct Group {
  const double* sums[5];  // [n] a, b, kk, kl, ll
  const void* means[2];   // [n] u of x and of y, or null
  int64_t n;
  double count, unit[2];
};

struct Options {
  bool cka, unbiased, centre;
  int64_t need, minimum;  // bits of need: x, y, sigma of x, sigma of y
  double eps;
};

double total(const double* v, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += v[i];
  return sum;
}

double dot(const double* v, const double* w, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += v[i] * w[i];
  return sum;
}

template <class T>
double weigh(const Group& g, const Options& o, T* rows) {
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

template <class T>
const void* means_of(const std::optional<Tensor>& u, int64_t g, int64_t n) {
  return u ? static_cast<const T*>(u->const_data_ptr()) + g * n : nullptr;
}

template <class T>
void run(const Tensor& sums, const std::optional<Tensor>& count, const Tensor (&units)[2],
         const std::optional<Tensor> (&means)[2], const Options& o, Tensor& value, Tensor& rows) {
  const int64_t G = sums.size(1), n = sums.size(2);
  for (int64_t k = 0; k < G; ++k) {
    Group g{};
    g.n = n;
    g.count = count ? static_cast<double>(static_cast<const int64_t*>(count->const_data_ptr())[k]) : n;
    for (int64_t m = 0; m < 5; ++m) {
      g.sums[m] = static_cast<const double*>(sums.const_data_ptr()) + m * sums.stride(0) + k * sums.stride(1);
    }
    for (int side = 0; side < 2; ++side) {
      g.means[side] = means_of<T>(means[side], k, n);
      g.unit[side] = static_cast<const double*>(units[side].const_data_ptr())[k];
    }
    T* out = o.need ? static_cast<T*>(rows.mutable_data_ptr()) + k * 2 * kSide * n : nullptr;
    static_cast<T*>(value.mutable_data_ptr())[k] = static_cast<T>(weigh<T>(g, o, out));
  }
}

// u_x and u_y in the dtype of the work; value and rows are in the dtype of `like`
std::tuple<Tensor, Tensor> weigh_rows(Tensor sums, std::optional<Tensor> count, Tensor unit_x, Tensor unit_y,
                                      std::optional<Tensor> u_x, std::optional<Tensor> u_y, Tensor like, bool cka,
                                      bool unbiased, bool centre, int64_t need, int64_t minimum, double eps) {
  KDK_CHECK(sums.is_cpu() && sums.dim() == 3 && sums.size(0) == 5 && sums.scalar_type() == ScalarType::Double &&
                sums.stride(2) == 1,
            "weigh_rows: sums must be the float64 row sums [5, G, n] on the CPU");
  const ScalarType dtype = like.scalar_type();
  KDK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "weigh_rows: like is ",
            torch::headeronly::toString(dtype), ": pass float32 or float64");
  const int64_t G = sums.size(1), n = sums.size(2);
  for (const auto* u : {&u_x, &u_y}) {
    KDK_CHECK(!*u || ((*u)->is_contiguous() && (*u)->numel() == G * n && (*u)->scalar_type() == dtype),
              "weigh_rows: the row means must be a contiguous [", G, ", ", n, "] in the dtype of like");
  }
  for (const auto* unit : {&unit_x, &unit_y}) {
    KDK_CHECK(unit->is_contiguous() && unit->numel() == G && unit->scalar_type() == ScalarType::Double,
              "weigh_rows: the units must be contiguous float64 [", G, "]");
  }
  KDK_CHECK(!count || (count->is_contiguous() && count->numel() == G && count->scalar_type() == ScalarType::Long),
            "weigh_rows: count must be a contiguous int64 [", G, "]");
  const int64_t groups[1] = {G}, shape[3] = {G, 2 * kSide, n}, none[1] = {0};
  Tensor value = torch::stable::new_empty(like, {groups, 1});
  Tensor rows = need ? torch::stable::new_empty(like, {shape, 3}) : torch::stable::new_empty(like, {none, 1});
  const Options o{cka, unbiased, centre, need, minimum, eps};
  if (dtype == ScalarType::Float) {
    run<float>(sums, count, {unit_x, unit_y}, {u_x, u_y}, o, value, rows);
  } else {
    run<double>(sums, count, {unit_x, unit_y}, {u_x, u_y}, o, value, rows);
  }
  return {value, rows};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "weigh_rows(Tensor sums, Tensor? count, Tensor unit_x, Tensor unit_y, Tensor? u_x, Tensor? u_y, Tensor like, "
      "bool cka, bool unbiased, bool centre, int need, int minimum, float eps) -> (Tensor value, Tensor rows)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("weigh_rows", TORCH_BOX(&kdkernels::weigh_rows)); }
