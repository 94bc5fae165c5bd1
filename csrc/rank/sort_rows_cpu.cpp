// SPDX-License-Identifier: Apache-2.0
// Softly sorted values of rows that are sorted already, and their gradient, on the CPU: kdkernels/rank/native_impl.py
// has the schemas, MATH.md the letters. Each pass reads a row once; blocks are runs of positions.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <tuple>

#include "cpu_isotonic.h"
#include "cpu_rows.h"

namespace kdkernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// a row sorted descending is poisoned from its first entry: NaN stands before +inf
template <class T>
bool poisoned(const T* s, int64_t n) {
  return n > 0 && !(static_cast<double>(s[0]) < kInfinity);
}

struct Sorted {
  std::unique_ptr<double[]> s;
  std::unique_ptr<Block[]> blocks;
  explicit Sorted(int64_t n) : s(new double[n]), blocks(new Block[n]) {}

  // value [n], start [n]; returns eps, NaN for a poisoned row
  template <class T, class Out>
  double operator()(const T* x, int64_t n, bool relative, bool kl, double eps, Out* value, int32_t* start) {
    for (int64_t i = 0; i < n; ++i) start[i] = static_cast<int32_t>(i);
    if (poisoned(x, n)) {
      std::fill_n(value, n, std::numeric_limits<Out>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    int64_t m = n;
    while (m > 0 && static_cast<double>(x[m - 1]) == -kInfinity) --m;
    std::fill(value + m, value + n, static_cast<Out>(-kInfinity));
    for (int64_t i = 0; i < m; ++i) s[i] = static_cast<double>(x[i]);
    if (relative) eps *= spread(s.get(), m, Single{});
    if (eps == 0) {
      for (int64_t i = 0; i < m; ++i) value[i] = static_cast<Out>(s[i]);
      return eps;
    }
    const int64_t depth =
        kl ? pool_sorted_kl(s.get(), m, eps, blocks.get()) : pool_sorted_l2(s.get(), m, eps, blocks.get());
    const double rate = inverse(eps);
    for (int64_t k = 0; k < depth; ++k) {
      const Block& block = blocks[k];
      const int32_t a = block.begin, b = static_cast<int32_t>(k + 1 < depth ? blocks[k + 1].begin : m);
      if (b - a == 1) {
        value[a] = static_cast<Out>(block.top);
        continue;
      }
      // l2: mean s + ((a + b - 1) / 2 - i) / eps; kl: LSE s + z_i - LSE z
      const double middle = kl ? a : (static_cast<double>(a) + b - 1) / 2;
      const double level = block.top + (kl ? std::log(block.sum) - std::log(block.mean) : block.mean);
      for (int32_t i = a; i < b; ++i) {
        value[i] = static_cast<Out>(level + (middle - i) * rate);
        start[i] = a;
      }
    }
    return eps;
  }
};

// l2: the mean of u over the block; kl: softmax of s within the block times the sum of u
template <class T, class U>
void gradient(const U* u, const T* s, const int32_t* start, int64_t n, bool kl, double* share, T* g) {
  if (poisoned(s, n)) {
    std::fill_n(g, n, narrow<T>(std::numeric_limits<double>::quiet_NaN()));
    return;
  }
  int64_t a = 0;
  for (; a < n && static_cast<double>(s[a]) > -kInfinity;) {
    int64_t b = a + 1;
    while (b < n && start[b] == start[a]) ++b;
    if (b - a == 1) {
      g[a] = narrow<T>(u[a]);
    } else {
      const double total = sum_lanes(b - a, [=](int64_t i) { return static_cast<double>(u[a + i]); });
      double length = static_cast<double>(b - a);
      if (kl) {
        const double top = static_cast<double>(s[a]);
        for (int64_t i = a; i < b; ++i) share[i] = std::exp(static_cast<double>(s[i]) - top);
        length = sum_lanes(b - a, [=](int64_t i) { return share[a + i]; });
      }
      for (int64_t i = a; i < b; ++i) g[i] = narrow<T>((kl ? share[i] : 1.0) * (total / length));
    }
    a = b;
  }
  std::fill(g + a, g + n, narrow<T>(0));
}

std::tuple<Tensor, Tensor, Tensor> sort_rows(Tensor s, std::optional<Tensor> strengths, double strength, bool relative,
                                             bool kl) {
  const char* op = "sort_rows";
  check_rows(s, op, "s");
  const int64_t R = s.size(0), n = s.size(1);
  const Strengths given = strengths_of(strengths, strength, R, op);
  return with_dtype(s, op, "s", [&](auto zero) {
    using T = decltype(zero);
    using Out = Result<T>;
    Tensor value = empty_like_rows(s, true, kType<Out>);
    Tensor start = empty_like_rows(s, true, ScalarType::Int);
    Tensor eps = empty_per_row(s, ScalarType::Double);
    const auto from = rows<T>(s);
    const auto to = new_rows<Out>(value);
    const auto first = new_rows<int32_t>(start);
    double* used = static_cast<double*>(eps.mutable_data_ptr());
    for_rows(R, n, [&] { return Sorted(n); }, [&](Sorted& sorted, int64_t r) {
      used[r] = sorted(from[r], n, relative, kl, given[r], to[r], first[r]);
    });
    return std::make_tuple(value, start, eps);
  });
}

Tensor sort_rows_backward(Tensor grad, Tensor s, Tensor start, bool kl) {
  const char* op = "sort_rows_backward";
  check_rows(s, op, "s");
  check_like(start, s, ScalarType::Int, op, "start");
  const int64_t R = s.size(0), n = s.size(1);
  return with_dtype(s, op, "s", [&](auto zero) {
    using T = decltype(zero);
    using U = Result<T>;
    check_like(grad, s, kType<U>, op, "grad");
    const auto u = rows<U>(grad);
    const auto from = rows<T>(s);
    const auto first = rows<int32_t>(start);
    Tensor result = empty_like_rows(s, true, kType<T>);
    const auto g = new_rows<T>(result);
    auto make = [&] { return std::unique_ptr<double[]>(new double[kl ? n : 0]); };
    for_rows(R, n, make, [&](std::unique_ptr<double[]>& share, int64_t r) {
      gradient(u[r], from[r], first[r], n, kl, share.get(), g[r]);
    });
    return result;
  });
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("sort_rows", TORCH_BOX(&kdkernels::sort_rows));
  m.impl("sort_rows_backward", TORCH_BOX(&kdkernels::sort_rows_backward));
}
