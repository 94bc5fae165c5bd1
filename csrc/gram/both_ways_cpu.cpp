// SPDX-License-Identifier: Apache-2.0
// CKA between the rows and between the columns of a pair, one call a direction: the products are the BLAS's, of the
// symmetric ones only the upper blocks, and all that stands between two products is one pass. PyTorch makes about 40.
// The roof is arithmetic: 10 products of n x n with n x C, four of them symmetric; 8.5 where those are cut into four.
//
// Threads share out blocks of products, each a call of its own: products of this size run up to a sixth faster side by
// side than one after the other on all threads. Formulas and names are those of kdkernels/gram/both_ways.py, which
// serves every other dtype and device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "../common/blas.h"
#include "../common/check.h"
#include "both_ways_passes.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 128;       // of a task of a product
constexpr int64_t kBlock = 64;       // the same of a symmetric one: half a block on the diagonal is work for nothing
constexpr int64_t kMost = 8;         // blocks of a product
constexpr int64_t kTile = 16;        // rows that are summed together; blocks begin at a multiple
constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread
constexpr int64_t kWorth = 1 << 21;  // multiplications that are

// where a block of about `rows` rows begins
struct Blocks {
  int64_t n, count;

  Blocks(int64_t n, int64_t rows) : n(n), count(std::clamp<int64_t>(n / rows, 1, kMost)) {}
  int64_t begin(int64_t block) const { return block >= count ? n : n * block / count / kTile * kTile; }
};

// f(t) for t below `tasks`, each of `size` elements
template <class F>
void over(int64_t tasks, int64_t size, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// f(t) for t below `tasks`, each by the next thread that is free: for tasks whose results do not meet
template <class F>
void share_out(int64_t tasks, double work, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, work < kWorth ? threads : 1, [&](int64_t, int64_t) {
    for (int64_t t = next++; t < tasks; t = next++) f(t);
  });
}

struct Shape {
  int64_t n, C, D;  // columns of x, of y: one number where columns are compared
  bool columns;
  int64_t tiles() const { return (n + kTile - 1) / kTile; }
};

// rows [i0, i1) left of their block are the columns above it
void mirror(float* out, int64_t n, int64_t i0, int64_t i1, int64_t width) {
  for (int64_t j0 = 0; j0 < width; j0 += kTile) {
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = j0; j < j0 + kTile; ++j) out[i * n + j] = out[j * n + i];
    }
  }
}

struct Group {
  const float *x, *y;          // [n, C], [n, D]
  float* product[kProducts];   // [n, n]; two of them where columns are not compared
  float* weights[3];           // [n] r^2, r s, s^2
  float* norms[2];             // [C]
};

struct Task {
  Matrix out, a, b;
  double factor;
};

// out = factor a b' in blocks of rows; of a symmetric product those on the diagonal and right of it
void add_tasks(std::vector<Task>& tasks, bool symmetric, float* out, double factor, const Matrix& a, const Matrix& b) {
  const Blocks blocks(a.rows, symmetric ? kBlock : kRows);
  for (int64_t k = 0; k < blocks.count; ++k) {
    const int64_t i = blocks.begin(k), m = blocks.begin(k + 1) - i, j = symmetric ? i : 0;
    tasks.push_back({dense(out, a.rows, a.rows).block(i, m, j, a.rows - j), a.block(i, m, 0, a.columns),
                     b.block(j, a.rows - j, 0, a.columns).turned(), factor});
  }
}

struct Values {
  double value[2], a[2], g[2], scale[2];
};

Values forward_group(const Group& group, const Shape& shape) {
  const auto [n, C, D, columns] = shape;
  const std::unique_ptr<float[]> normed(new float[columns ? 2 * n * C : 0]);
  const int64_t strips[2] = {strips_of(C), strips_of(D)};
  std::vector<double> squares(strips[0] + strips[1]);
  float *xn = normed.get(), *yn = columns ? xn + n * C : xn;
  const Side sides[2] = {{group.x, C, xn, group.norms[0], squares.data()},
                         {group.y, D, yn, group.norms[1], squares.data() + strips[0]}};
  over(strips[0] + strips[1], n * kStrip, [&](int64_t t) {
    const bool second = t >= strips[0];
    passes().norm(sides[second], n, second ? t - strips[0] : t);
  });
  Values out{};
  for (int s = 0; s < 2; ++s) {
    double total = 0;
    for (int64_t t = 0; t < strips[s]; ++t) total += sides[s].squares[t];
    // rows of length one or so: no product of two sums leaves float32. a side whose products underflow is zero, and a
    // factor of 0 would hide an infinity
    const double mean = total / n;
    const bool finite = total < std::numeric_limits<float>::infinity();
    out.scale[s] = mean < kLeast ? 0 : finite ? 1 / std::sqrt(mean) : std::numeric_limits<float>::quiet_NaN();
  }
  const Matrix X = dense(group.x, n, C), Y = dense(group.y, n, D), Xn = dense(xn, n, C), Yn = dense(yn, n, C);
  std::vector<Task> tasks;
  if (columns) {
    add_tasks(tasks, false, group.product[kM], out.scale[0] * out.scale[1], X, Y);
    add_tasks(tasks, false, group.product[kMn], 1, Xn, Yn);
    add_tasks(tasks, true, group.product[kKn], 1, Xn, Xn);
    add_tasks(tasks, true, group.product[kLn], 1, Yn, Yn);
  }
  add_tasks(tasks, true, group.product[kK], out.scale[0] * out.scale[0], X, X);
  add_tasks(tasks, true, group.product[kL], out.scale[1] * out.scale[1], Y, Y);
  share_out(tasks.size(), 2.0 * n * n * (C + D), [&](int64_t t) {
    const Task& task = tasks[t];
    multiply(task.out, 0, task.factor, task.a, task.b);
  });
  const Blocks blocks(n, kBlock);
  std::vector<double> sums(6 * n);
  over(shape.tiles(), 6 * n * kTile, [&](int64_t tile) {
    const int64_t i0 = tile * kTile, i1 = std::min(n, i0 + kTile);
    int64_t begin = 0;
    for (int64_t k = 1; blocks.begin(k) <= i0; ++k) begin = blocks.begin(k);
    for (const int which : {kK, kL, kKn, kLn}) {
      if (columns || which < kKn) mirror(group.product[which], n, i0, i1, begin);
    }
    for (int64_t i = i0; i < i1; ++i) {
      const float* row[kProducts];
      for (int which = 0; which < kProducts; ++which) row[which] = group.product[which] + i * n;
      double* sum = sums.data() + 6 * i;
      passes().sum(row, n, columns, sum);
      const double k = row[kK][i], l = row[kL][i];
      const double r = k >= kLeast ? 1 / std::sqrt(k) : 0, s = l >= kLeast ? 1 / std::sqrt(l) : 0;
      group.weights[0][i] = static_cast<float>(r * r);
      group.weights[1][i] = static_cast<float>(r * s);
      group.weights[2][i] = static_cast<float>(s * s);
      sum[kRowsKK] *= r * r, sum[kRowsKL] *= r * s, sum[kRowsLL] *= s * s;
    }
  });
  double total[6] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int s = 0; s < 6; ++s) total[s] += sums[6 * i + s];
  }
  for (int way = 0; way < 1 + columns; ++way) {
    const double kk = total[3 * way], kl = total[3 * way + 1], ll = total[3 * way + 2];
    const bool undefined = kk <= 0 || ll <= 0;
    out.a[way] = undefined ? 0 : 1 / std::sqrt(kk * ll);
    out.value[way] = out.a[way] * kl;
    out.g[way] = undefined ? 0 : out.value[way] / kk;
  }
  return out;
}

// a and g times the upstream gradient
void backward_group(const Group& group, const Shape& shape, const Values& of, float* dx) {
  const int64_t n = shape.n, C = shape.C;
  const bool columns = shape.columns;
  const std::unique_ptr<float[]> scratch(new float[n * n + (columns ? n * C : 0)]);
  float *weights = scratch.get(), *kx = weights + n * n;  // [n, n], [n, C]
  const Slope slope{of.a[0], of.g[0], of.g[1], of.scale[0] * of.scale[0], group.weights[0], group.weights[1]};
  over(n, 2 * n, [&](int64_t i) {
    const float *k = group.product[kK] + i * n, *l = group.product[kL] + i * n;
    passes().weigh(slope, k, l, columns ? group.product[kKn] + i * n : nullptr, i, n, weights + i * n);
  });
  auto product = [&](int which) { return dense(group.product[which], n, n); };
  const int64_t strips = strips_of(C), threads = torch::stable::get_num_threads();
  // as few tasks as there are threads: each packs its n x n factors anew
  const int64_t each = (strips + threads - 1) / threads;
  share_out((strips + each - 1) / each, 4.0 * n * n * C, [&](int64_t t) {
    const int64_t begin = t * each * kStrip, width = std::min(each * kStrip, C - begin);
    auto part = [&](const float* of) { return dense(of, n, C).block(0, n, begin, width); };
    const Matrix X = part(group.x), out = part(dx);
    if (columns) {
      multiply(out, 0, 1, product(kM), part(group.y));
      multiply(part(kx), 0, 1, product(kK), X);
      for (int64_t strip = begin / kStrip; strip * kStrip < begin + width; ++strip) {
        passes().turn(group.x, kx, dx, group.norms[0], group.norms[1], static_cast<float>(of.a[1]),
                      static_cast<float>(of.g[1]), n, C, strip);
      }
      multiply(out, 1, of.a[1] * of.scale[0] * of.scale[1], product(kMn), part(group.y));
    }
    multiply(out, columns ? 1 : 0, 1, dense(weights, n, n), X);
  });
}

// what both directions see of the tensors: x [..., n, C], y [..., n, D], products [6 or 2, ..., n, n], weights
// [3, ..., n], norms [2, ..., C] or empty, numbers [2 ways + 2, ...]
struct Batch {
  const float *x, *y;
  float *products, *weights, *norms, *numbers;
  int64_t groups;
  Shape shape;

  int64_t ways() const { return 1 + shape.columns; }
  Group group(int64_t k) const {
    const auto [n, C, D, columns] = shape;
    Group of{x + k * n * C, y + k * n * D, {}, {}, {}};
    const int slots[2][kProducts] = {{kK, kL}, {kK, kM, kL, kKn, kMn, kLn}};
    for (int m = 0; m < (columns ? kProducts : 2); ++m) {
      of.product[slots[columns][m]] = products + (m * groups + k) * n * n;
    }
    for (int m = 0; m < 3; ++m) of.weights[m] = weights + (m * groups + k) * n;
    for (int m = 0; m < 2 && columns; ++m) of.norms[m] = norms + (m * groups + k) * C;
    return of;
  }
  float& number(int64_t row, int64_t k) const { return numbers[row * groups + k]; }
};

void check(const Tensor& t, const std::vector<int64_t>& sizes, const char* op, const char* name) {
  bool fits = t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
              t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = t.size(d) == sizes[d];
  KDK_CHECK(fits, op, ": ", name, " must be float32 on the CPU, contiguous and of the shape of its operator's result");
}

using Sizes = std::vector<int64_t>;

// first, the leading dimensions of x, then last
Sizes around(int64_t first, const Tensor& x, std::initializer_list<int64_t> last) {
  Sizes sizes{first};
  for (int64_t d = 0; d < x.dim() - 2; ++d) sizes.push_back(x.size(d));
  sizes.insert(sizes.end(), last);
  return sizes;
}

Shape shape_of(const Tensor& x, const Tensor& y, bool columns, const char* op) {
  KDK_CHECK(x.dim() >= 2, op, ": x has ", x.dim(), " dimensions: pass [..., n, C]");
  const int64_t n = x.size(-2), C = x.size(-1), D = columns || y.dim() != x.dim() ? C : y.size(-1);
  Sizes sizes = around(0, x, {n, C});
  sizes.erase(sizes.begin());
  check(x, sizes, op, "x");
  sizes.back() = D;
  check(y, sizes, op, "y");
  return {n, C, D, columns};
}

float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

Tensor empty(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()});
}

// groups side by side where there are several; the passes and products of a single one share its work out
template <class F>
void over_groups(int64_t groups, const F& f) {
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k);
  });
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward both_ways(Tensor x, Tensor y, bool columns) {
  const Shape shape = shape_of(x, y, columns, "both_ways");
  const int64_t n = shape.n, ways = 1 + columns, G = x.numel() / std::max<int64_t>(1, n * shape.C);
  Tensor value = empty(x, around(ways, x, {})), products = empty(x, around(columns ? kProducts : 2, x, {n, n}));
  Tensor weights = empty(x, around(3, x, {n})), numbers = empty(x, around(2 * ways + 2, x, {}));
  Tensor norms = columns ? empty(x, around(2, x, {shape.C})) : empty(x, {0});
  const Batch batch{read(x), read(y), data(products), data(weights), data(norms), data(numbers), G, shape};
  float* values = data(value);
  over_groups(G, [&](int64_t k) {
    const Values of = forward_group(batch.group(k), shape);
    for (int64_t way = 0; way < ways; ++way) {
      values[way * G + k] = static_cast<float>(of.value[way]);
      batch.number(way, k) = static_cast<float>(of.a[way]);
      batch.number(ways + way, k) = static_cast<float>(of.g[way]);
    }
    for (int s = 0; s < 2; ++s) batch.number(2 * ways + s, k) = static_cast<float>(of.scale[s]);
  });
  return {value, products, weights, norms, numbers};
}

Tensor both_ways_backward(Tensor grad, Tensor x, Tensor y, Tensor products, Tensor weights, Tensor norms,
                          Tensor numbers, bool columns) {
  const char* op = "both_ways_backward";
  const Shape shape = shape_of(x, y, columns, op);
  const int64_t n = shape.n, ways = 1 + columns, G = x.numel() / std::max<int64_t>(1, n * shape.C);
  check(grad, around(ways, x, {}), op, "grad");
  check(products, around(columns ? kProducts : 2, x, {n, n}), op, "products");
  check(weights, around(3, x, {n}), op, "weights");
  if (columns) check(norms, around(2, x, {shape.C}), op, "norms");
  check(numbers, around(2 * ways + 2, x, {}), op, "numbers");
  const Batch batch{read(x), read(y), data(products), data(weights), data(norms), data(numbers), G, shape};
  Tensor dx = torch::stable::empty_like(x);
  float* out = data(dx);
  const float* slopes = read(grad);
  over_groups(G, [&](int64_t k) {
    Values of{};
    for (int64_t way = 0; way < ways; ++way) {
      of.a[way] = static_cast<double>(batch.number(way, k)) * slopes[way * G + k];
      of.g[way] = static_cast<double>(batch.number(ways + way, k)) * slopes[way * G + k];
    }
    for (int s = 0; s < 2; ++s) of.scale[s] = batch.number(2 * ways + s, k);
    backward_group(batch.group(k), shape, of, out + k * n * shape.C);
  });
  return dx;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "both_ways(Tensor x, Tensor y, bool columns) -> "
      "(Tensor value, Tensor products, Tensor weights, Tensor norms, Tensor numbers)");
  m.def(
      "both_ways_backward(Tensor grad, Tensor x, Tensor y, Tensor products, Tensor weights, Tensor norms, "
      "Tensor numbers, bool columns) -> Tensor dx");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("both_ways", TORCH_BOX(&kdkernels::both_ways));
  m.impl("both_ways_backward", TORCH_BOX(&kdkernels::both_ways_backward));
}
