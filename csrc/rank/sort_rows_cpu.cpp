// SPDX-License-Identifier: Apache-2.0
// Softly sorted values of rows, and their gradient, on the CPU: kdkernels/rank/native_impl.py has the schemas, MATH.md
// the letters. sort_rows takes rows that are sorted already, soft_sort_rows sorts them itself and undoes the order in
// its backward pass: one call each way, where PyTorch's sort alone takes longer. Blocks are runs of positions.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <tuple>

#include "cpu_isotonic.h"
#include "cpu_rows.h"
#include "cpu_sort.h"

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

  template <class Out>
  static double spoil(int64_t n, Out* value, int32_t* start) {
    std::fill_n(value, n, std::numeric_limits<Out>::quiet_NaN());
    for (int64_t i = 0; i < n; ++i) start[i] = static_cast<int32_t>(i);
    return std::numeric_limits<double>::quiet_NaN();
  }

  // value [n], times sign, and start [n] of s [m], the m entries that are present; returns eps
  template <class Out>
  double operator()(int64_t m, int64_t n, bool relative, bool kl, double eps, double sign, Out* value, int32_t* start) {
    for (int64_t i = 0; i < n; ++i) start[i] = static_cast<int32_t>(i);
    std::fill(value + m, value + n, static_cast<Out>(-kInfinity));
    if (relative) eps *= spread(s.get(), m, Single{});
    if (eps == 0) {
      for (int64_t i = 0; i < m; ++i) value[i] = static_cast<Out>(sign * s[i]);
      return eps;
    }
    const int64_t depth =
        kl ? pool_sorted_kl(s.get(), m, eps, blocks.get()) : pool_sorted_l2(s.get(), m, eps, blocks.get());
    const double rate = inverse(eps);
    for (int64_t k = 0; k < depth; ++k) {
      const Block& block = blocks[k];
      const int32_t a = block.begin, b = static_cast<int32_t>(k + 1 < depth ? blocks[k + 1].begin : m);
      if (b - a == 1) {
        value[a] = static_cast<Out>(sign * block.top);
        continue;
      }
      // l2: mean s + ((a + b - 1) / 2 - i) / eps; kl: LSE s + z_i - LSE z
      const double middle = kl ? a : (static_cast<double>(a) + b - 1) / 2;
      const double level = block.top + (kl ? std::log(block.sum) - std::log(block.mean) : block.mean);
      for (int32_t i = a; i < b; ++i) {
        value[i] = static_cast<Out>(sign * (level + (middle - i) * rate));
        start[i] = a;
      }
    }
    return eps;
  }
};

// l2: the mean of u over the block; kl: softmax of s within the block times the sum of u
// g(i) is where position i goes
template <class T, class U, class Place>
void gradient(const U* u, const T* s, const int32_t* start, int64_t n, bool kl, double* share, Place g) {
  if (poisoned(s, n)) {
    for (int64_t i = 0; i < n; ++i) g(i) = narrow<T>(std::numeric_limits<double>::quiet_NaN());
    return;
  }
  int64_t a = 0;
  while (a < n && static_cast<double>(s[a]) > -kInfinity) {
    int64_t b = a + 1;
    while (b < n && start[b] == start[a]) ++b;
    if (b - a == 1) {
      g(a) = narrow<T>(u[a]);
    } else {
      const double total = sum_lanes(b - a, [=](int64_t i) { return static_cast<double>(u[a + i]); });
      double length = static_cast<double>(b - a);
      if (kl) {
        const double top = static_cast<double>(s[a]);
        for (int64_t i = a; i < b; ++i) share[i] = std::exp(static_cast<double>(s[i]) - top);
        length = sum_lanes(b - a, [=](int64_t i) { return share[a + i]; });
      }
      for (int64_t i = a; i < b; ++i) g(i) = narrow<T>((kl ? share[i] : 1.0) * (total / length));
    }
    a = b;
  }
  for (; a < n; ++a) g(a) = narrow<T>(0);
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
      const T* x = from[r];
      if (poisoned(x, n)) {
        used[r] = Sorted::spoil(n, to[r], first[r]);
        return;
      }
      int64_t m = n;
      while (m > 0 && static_cast<double>(x[m - 1]) == -kInfinity) --m;
      for (int64_t i = 0; i < m; ++i) sorted.s[i] = static_cast<double>(x[i]);
      used[r] = sorted(m, n, relative, kl, given[r], 1, to[r], first[r]);
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
      T* to = g[r];
      gradient(u[r], from[r], first[r], n, kl, share.get(), [=](int64_t i) -> T& { return to[i]; });
    });
    return result;
  });
}

template <class T>
struct Sorter {
  Sorted sorted;
  std::unique_ptr<Item<T>[]> items;
  explicit Sorter(int64_t n) : sorted(n), items(new Item<T>[2 * n]) {}

  // s [n]: theta = x or -x, greatest first, absent entries last; order [n]: where each stood
  template <class Out>
  double operator()(const T* x, int64_t n, bool relative, bool kl, bool descending, double eps, Out* value, T* s,
                    int64_t* order, int32_t* start) {
    const Extent<T> extent = look_over(x, n);
    if (n > 0 && extent.poisoned()) {
      std::fill_n(s, n, narrow<T>(std::numeric_limits<double>::quiet_NaN()));
      for (int64_t i = 0; i < n; ++i) order[i] = i;
      return Sorted::spoil(n, value, start);
    }
    const Ordering<T> sorting = order_row(x, n, extent, !descending, items.get());
    const int64_t m = sorting.count;
    sorting.values(sorted.s.get());
    for (int64_t e = 0; e < m; ++e) order[e] = sorting.index(e);
    for (int64_t e = 0; e < m; ++e) s[e] = narrow<T>(sorted.s[e]);
    for (int64_t i = 0, e = m; e < n; ++i) {
      if (is_absent(x[i])) s[e] = narrow<T>(-kInfinity), order[e++] = i;
    }
    return sorted(m, n, relative, kl, eps, descending ? 1 : -1, value, start);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_sort_rows(Tensor x, std::optional<Tensor> strengths,
                                                                  double strength, bool relative, bool kl,
                                                                  bool descending) {
  const char* op = "soft_sort_rows";
  check_rows(x, op, "x");
  const int64_t R = x.size(0), n = x.size(1);
  const Strengths given = strengths_of(strengths, strength, R, op);
  return with_dtype(x, op, "x", [&](auto zero) {
    using T = decltype(zero);
    using Out = Result<T>;
    Tensor value = empty_like_rows(x, true, kType<Out>), s = empty_like_rows(x, true, kType<T>);
    Tensor order = empty_like_rows(x, true, ScalarType::Long), start = empty_like_rows(x, true, ScalarType::Int);
    Tensor eps = empty_per_row(x, ScalarType::Double);
    const auto from = rows<T>(x);
    const auto to = new_rows<Out>(value);
    const auto sorted = new_rows<T>(s);
    const auto place = new_rows<int64_t>(order);
    const auto first = new_rows<int32_t>(start);
    double* used = static_cast<double*>(eps.mutable_data_ptr());
    for_rows(R, n, [&] { return Sorter<T>(n); }, [&](Sorter<T>& sorter, int64_t r) {
      used[r] =
          sorter(from[r], n, relative, kl, descending, given[r], to[r], sorted[r], place[r], first[r]);
    });
    return std::make_tuple(value, s, order, start, eps);
  });
}

Tensor soft_sort_rows_backward(Tensor grad, Tensor s, Tensor order, Tensor start, bool kl) {
  const char* op = "soft_sort_rows_backward";
  check_rows(s, op, "s");
  check_like(order, s, ScalarType::Long, op, "order");
  check_like(start, s, ScalarType::Int, op, "start");
  const int64_t R = s.size(0), n = s.size(1);
  return with_dtype(s, op, "s", [&](auto zero) {
    using T = decltype(zero);
    using U = Result<T>;
    check_like(grad, s, kType<U>, op, "grad");
    const auto u = rows<U>(grad);
    const auto from = rows<T>(s);
    const auto place = rows<int64_t>(order);
    const auto first = rows<int32_t>(start);
    Tensor result = empty_like_rows(s, true, kType<T>);
    const auto g = new_rows<T>(result);
    auto make = [&] { return std::unique_ptr<double[]>(new double[kl ? n : 0]); };
    std::atomic<bool> inside = true;  // an exception would lose its text on the way through torch's threads
    for_rows(R, n, make, [&](std::unique_ptr<double[]>& share, int64_t r) {
      T* to = g[r];
      const int64_t* at = place[r];
      bool all = true;
      for (int64_t i = 0; i < n; ++i) all &= static_cast<uint64_t>(at[i]) < static_cast<uint64_t>(n);
      if (!all) {
        inside = false;
        return;
      }
      gradient(u[r], from[r], first[r], n, kl, share.get(), [=](int64_t i) -> T& { return to[at[i]]; });
    });
    KDK_CHECK(inside, op, ": order must hold positions of a row, below ", n);
    return result;
  });
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("sort_rows", TORCH_BOX(&kdkernels::sort_rows));
  m.impl("sort_rows_backward", TORCH_BOX(&kdkernels::sort_rows_backward));
  m.impl("soft_sort_rows", TORCH_BOX(&kdkernels::soft_sort_rows));
  m.impl("soft_sort_rows_backward", TORCH_BOX(&kdkernels::soft_sort_rows_backward));
}
