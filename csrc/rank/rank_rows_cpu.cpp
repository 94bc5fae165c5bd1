// SPDX-License-Identifier: Apache-2.0
// Soft ranks of rows and their gradient on the CPU: kdkernels/rank/native_impl.py has the schemas, MATH.md the letters.
// Forward reads x and writes ranks and block ids; backward reads the upstream gradient and the ids, no order.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "cpu_rank_row.h"
#include "cpu_rows.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> rank_rows(Tensor x, std::optional<Tensor> strengths, double strength, bool relative,
                                             bool kl, bool descending, bool need_blocks) {
  const char* op = "rank_rows";
  check_rows(x, op, "x");
  const int64_t R = x.size(0), n = x.size(1);
  const Strengths given = strengths_of(strengths, strength, R, op);
  return with_dtype(x, op, "x", [&](auto zero) {
    using T = decltype(zero);
    using Out = Result<T>;
    Tensor rank = empty_like_rows(x, true, kType<Out>);
    Tensor blocks = empty_like_rows(x, need_blocks, ScalarType::Int);
    Tensor eps = empty_per_row(x, ScalarType::Double);
    const auto from = rows<T>(x);
    const auto to = new_rows<Out>(rank);
    const auto ids = new_rows<int32_t>(blocks);
    double* used = static_cast<double*>(eps.mutable_data_ptr());
    for_rows(R, n, [&] { return Ranker<T>(n); }, [&](Ranker<T>& ranker, int64_t r) {
      used[r] = ranker(from[r], n, {relative, kl, descending}, given[r], to[r], need_blocks ? ids[r] : nullptr);
    });
    return std::make_tuple(rank, blocks, eps);
  });
}

Tensor rank_rows_backward(Tensor grad, Tensor x, Tensor rank, Tensor blocks, Tensor eps, bool kl, bool descending) {
  const char* op = "rank_rows_backward";
  check_rows(x, op, "x");
  check_like(blocks, x, ScalarType::Int, op, "blocks");
  const int64_t R = x.size(0), n = x.size(1);
  KDK_CHECK(eps.is_cpu() && eps.scalar_type() == ScalarType::Double && eps.dim() == 1 && eps.size(0) == R &&
                eps.is_contiguous(), op, ": eps must be float64 [", R, "] on the CPU");
  return with_dtype(x, op, "x", [&](auto zero) {
    using T = decltype(zero);
    using U = Result<T>;
    check_like(grad, x, kType<U>, op, "grad");
    check_like(rank, x, kType<U>, op, "rank");
    const auto u = rows<U>(grad), r = rows<U>(rank);
    const auto ids = rows<int32_t>(blocks);
    const double* used = static_cast<const double*>(eps.const_data_ptr());
    Tensor result = empty_like_rows(x, true, kType<T>);
    const auto g = new_rows<T>(result);
    std::atomic<bool> inside = true;
    for_rows(R, n, [&] { return RankGradient(n); }, [&](RankGradient& gradient, int64_t i) {
      if (!gradient(u[i], r[i], ids[i], n, used[i], kl, descending, g[i])) inside = false;
    });
    KDK_CHECK(inside, op, ": blocks must hold ids below the length of a row, ", n);
    return result;
  });
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("rank_rows", TORCH_BOX(&kdkernels::rank_rows));
  m.impl("rank_rows_backward", TORCH_BOX(&kdkernels::rank_rows_backward));
}
