// SPDX-License-Identifier: Apache-2.0
// From row sums to the value of CKA or HSIC and the vectors of its gradient in one call, where PyTorch needs sixty
// launches of O(n) float64 work.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/check.h"
#include "weigh.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const void* means_of(const std::optional<Tensor>& u, int64_t g, int64_t n) {
  return u ? static_cast<const T*>(u->const_data_ptr()) + g * n : nullptr;
}

template <class T>
void run(const Tensor& sums, const std::optional<Tensor>& count, const Tensor (&units)[2],
         const std::optional<Tensor> (&means)[2], const Estimator& o, Tensor& value, Tensor& rows) {
  const int64_t G = sums.size(1), n = sums.size(2);
  for (int64_t k = 0; k < G; ++k) {
    GroupSums g{};
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
  const Estimator o{cka, unbiased, centre, need, minimum, eps};
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
