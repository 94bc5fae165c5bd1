// SPDX-License-Identifier: Apache-2.0
// Spearman's correlation of two rows and its gradient in one visit, on the CPU: ranks stay in the thread's buffers, in
// float64, and only the value and the gradient are written. kdkernels/rank/native_impl.py has the schema.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <tuple>

#include "cpu_rank_row.h"
#include "cpu_rows.h"

namespace kdkernels {
namespace {

struct Options {
  Rule rule;
  double strength;
  bool hard_target, grad_x, grad_y;
};

// one row of one input: its pairs, their ranks about the mean, and the gradient
template <class T>
struct Side {
  std::unique_ptr<T[]> dense;
  std::unique_ptr<double[]> rank, grad;
  std::unique_ptr<int32_t[]> number;
  const T* x = nullptr;
  double eps = 0, norm = 0;

  explicit Side(int64_t n)
      : dense(scratch<T>(n)), rank(scratch<double>(n)), grad(scratch<double>(n)), number(scratch<int32_t>(n)) {}
};

template <class T>
struct Correlation {
  using Out = Result<T>;
  Ranker<T> ranker;
  RankGradient gradient;
  Side<T> x, y;
  std::unique_ptr<double[]> upstream, whole;
  std::unique_ptr<int32_t[]> place;  // of each pair in the row

  explicit Correlation(int64_t n)
      : ranker(n), gradient(n), x(n), y(n), upstream(scratch<double>(n)),
        whole(scratch<double>(n)), place(scratch<int32_t>(n)) {}

  // value of the rows; dx, dy [n] or null
  Out operator()(const T* row_x, const T* row_y, int64_t n, const Options& o, Out* dx, Out* dy) {
    x.x = row_x, y.x = row_y, m = n;
    Extent<T> at_x = look_over(row_x, n), at_y = look_over(row_y, n);
    some_absent = n > 0 && (at_x.some_absent() || at_y.some_absent());
    if (some_absent) {
      drop_pairs(n);
      at_x = look_over(x.x, m), at_y = look_over(y.x, m);
      if (dx) std::fill_n(dx, n, Out(0));
      if (dy) std::fill_n(dy, n, Out(0));
    }
    // what was dropped may hold anything; a NaN or +inf among the pairs spoils their gradient, not that of the dropped
    if (m > 0 && (at_x.poisoned() || at_y.poisoned())) return without_slope(kNaN, dx, dy);
    if (m < 2) return without_slope(0, dx, dy);
    rank(x, o.rule, o.strength);
    rank(y, o.hard_target ? Rule{false, false, false} : o.rule, o.hard_target ? 0 : o.strength);
    if (!(x.norm > 0) || !(y.norm > 0)) return without_slope(0, dx, dy);
    const double* r = x.rank.get();
    const double* t = y.rank.get();
    const double rho = sum_lanes(m, [=](int64_t i) { return r[i] * t[i]; }) / (x.norm * y.norm);
    if (dx) differentiate(x, y, rho, o.rule.kl, dx);
    if (dy && o.hard_target) {
      write(dy, [](int64_t) { return 0.0; });
    } else if (dy) {
      differentiate(y, x, rho, o.rule.kl, dy);
    }
    return static_cast<Out>(rho);
  }

 private:
  int64_t m = 0;  // pairs
  bool some_absent = false;

  template <class Value>
  void write(Out* g, Value value) {
    if (some_absent) {
      for (int64_t i = 0; i < m; ++i) g[place[i]] = static_cast<Out>(value(i));
    } else {
      for (int64_t i = 0; i < m; ++i) g[i] = static_cast<Out>(value(i));
    }
  }

  Out without_slope(double value, Out* dx, Out* dy) {
    for (Out* g : {dx, dy}) {
      if (g) write(g, [=](int64_t) { return value; });
    }
    return static_cast<Out>(value);
  }

  // keeps the pairs with both entries present
  void drop_pairs(int64_t n) {
    m = 0;
    for (int64_t i = 0; i < n; ++i) {
      x.dense[m] = x.x[i], y.dense[m] = y.x[i], place[m] = static_cast<int32_t>(i);
      m += !is_absent(x.x[i]) && !is_absent(y.x[i]);
    }
    x.x = x.dense.get(), y.x = y.dense.get();
  }

  double middle() const { return (static_cast<double>(m) + 1) / 2; }

  void rank(Side<T>& side, const Rule& rule, double strength) {
    double* r = side.rank.get();
    side.eps = ranker(side.x, m, rule, strength, r, side.number.get());
    const double mean = middle();
    for (int64_t i = 0; i < m; ++i) r[i] -= mean;
    side.norm = std::sqrt(sum_lanes(m, [=](int64_t i) { return r[i] * r[i]; }));
  }

  // d rho / dr = (t / |t| - rho r / |r|) / |r|, through the ranks of this side
  void differentiate(Side<T>& side, const Side<T>& other, double rho, bool kl, Out* g) {
    const double* r = side.rank.get();
    const double* t = other.rank.get();
    double* d = side.grad.get();
    const double own = rho / (side.norm * side.norm), cross = 1 / (side.norm * other.norm);
    for (int64_t i = 0; i < m; ++i) upstream[i] = cross * t[i] - own * r[i];
    if (kl) {  // its gradient needs the ranks themselves
      const double mean = middle();
      for (int64_t i = 0; i < m; ++i) whole[i] = r[i] + mean;
      r = whole.get();
    }
    gradient(upstream.get(), r, side.number.get(), m, side.eps, kl, false, d);
    write(g, [=](int64_t i) { return d[i]; });
  }
};

std::tuple<Tensor, Tensor, Tensor> spearman_rows(Tensor x, Tensor y, double strength, bool relative, bool kl,
                                                 bool hard_target, bool grad_x, bool grad_y) {
  const char* op = "spearman_rows";
  check_rows(x, op, "x");
  check_like(y, x, x.scalar_type(), op, "y");
  const int64_t R = x.size(0), n = x.size(1);
  const Options options{{relative, kl, false}, strengths_of(std::nullopt, strength, R, op).factor, hard_target, grad_x,
                        grad_y};
  return with_dtype(x, op, "x", [&](auto zero) {
    using T = decltype(zero);
    using Out = Result<T>;
    Tensor value = empty_per_row(x, kType<Out>);
    Tensor dx = empty_like_rows(x, grad_x, kType<Out>), dy = empty_like_rows(x, grad_y, kType<Out>);
    const auto from_x = rows<T>(x), from_y = rows<T>(y);
    const auto to_x = new_rows<Out>(dx), to_y = new_rows<Out>(dy);
    Out* found = static_cast<Out*>(value.mutable_data_ptr());
    for_rows(R, n, [&] { return Correlation<T>(n); }, [&](Correlation<T>& correlation, int64_t r) {
      found[r] = correlation(from_x[r], from_y[r], n, options, grad_x ? to_x[r] : nullptr, grad_y ? to_y[r] : nullptr);
    });
    return std::make_tuple(value, dx, dy);
  });
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("spearman_rows", TORCH_BOX(&kdkernels::spearman_rows)); }
