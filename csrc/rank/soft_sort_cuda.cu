// SPDX-License-Identifier: Apache-2.0
// sort_rows and the backward passes of both ranking operators for CUDA tensors, as soft_rank_cuda.cu does it. A file of
// its own, so that both compile side by side.
#include <tuple>

#include "arguments.cuh"
#include "schedule.cuh"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> sort_rows_cuda(Tensor s, std::optional<Tensor> strengths, double strength,
                                                  bool relative, bool kl) {
  const Rows rows = rows_of(s, "sort_rows", "s");
  const Strength eps_of = strength_of(strengths, strength, relative, s, "sort_rows");
  const bool wide = rows.dtype == kDouble;
  const int64_t r = s.size(0), n = s.size(1);
  Launch launch(s);
  Tensor value = launch.rows(r, n, wide ? ScalarType::Double : ScalarType::Float);
  Tensor start = launch.rows(r, n, ScalarType::Int);
  Tensor eps = launch.vector(r, ScalarType::Double);
  const SortCall call{rows,
                      eps_of,
                      r,
                      static_cast<int>(n),
                      0,
                      kl,
                      value.mutable_data_ptr(),
                      static_cast<int*>(start.mutable_data_ptr()),
                      static_cast<double*>(eps.mutable_data_ptr()),
                      nullptr};
  sort_rows(call, wide, Device{launch.shared()}, [&](size_t bytes) { return launch.allocate(bytes); },
            launch.stream());
  return {value, start, eps};
}

// what both backward passes share; dx takes the dtype of `like`
BackwardCall backward_of(const Tensor& grad, const Tensor& like, const Tensor& value, const char* value_name,
                         const Tensor& name, const char* name_name, Tensor& dx, const char* op) {
  const Rows u = rows_of(grad, op, "grad"), v = rows_of(value, op, value_name);
  const int64_t name_stride = check_rows(name, op, name_name);
  KDK_CHECK(name.scalar_type() == ScalarType::Int, op, ": ", name_name, " is ",
            torch::headeronly::toString(name.scalar_type()), ": pass int32");
  check_like(grad, like, op, "grad");
  check_like(value, like, op, value_name);
  check_like(name, like, op, name_name);
  return {u,
          v,
          static_cast<const int*>(name.const_data_ptr()),
          name_stride,
          nullptr,
          false,
          like.size(0),
          static_cast<int>(like.size(1)),
          dx.mutable_data_ptr(),
          dtype_of(like, op, "x"),
          nullptr,
          0};
}

Tensor rank_rows_backward_cuda(Tensor grad, Tensor x, Tensor rank, Tensor blocks, Tensor eps, bool kl,
                               bool descending) {
  check_rows(x, "rank_rows_backward", "x");
  KDK_CHECK(eps.scalar_type() == ScalarType::Double && eps.dim() == 1 && eps.size(0) == x.size(0) &&
                eps.is_contiguous() && eps.is_cuda(),
            "rank_rows_backward: eps is not a dense float64 vector with one entry for each row");
  Launch launch(x);
  Tensor dx = launch.rows(x.size(0), x.size(1), x.scalar_type());
  BackwardCall call = backward_of(grad, x, rank, "rank", blocks, "blocks", dx, "rank_rows_backward");
  call.eps = static_cast<const double*>(eps.const_data_ptr());
  call.descending = descending;
  rank_rows_backward(call, call.dtype == kDouble, kl, Device{launch.shared()},
                     [&](size_t bytes) { return launch.allocate(bytes); }, launch.stream());
  return dx;
}

Tensor sort_rows_backward_cuda(Tensor grad, Tensor s, Tensor start, bool kl) {
  check_rows(s, "sort_rows_backward", "s");
  Launch launch(s);
  Tensor dx = launch.rows(s.size(0), s.size(1), s.scalar_type());
  const BackwardCall call = backward_of(grad, s, s, "s", start, "start", dx, "sort_rows_backward");
  sort_rows_backward(call, call.dtype == kDouble, kl, Device{launch.shared()},
                     [&](size_t bytes) { return launch.allocate(bytes); }, launch.stream());
  return dx;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("rank_rows_backward", TORCH_BOX(&kdkernels::rank_rows_backward_cuda));
  m.impl("sort_rows", TORCH_BOX(&kdkernels::sort_rows_cuda));
  m.impl("sort_rows_backward", TORCH_BOX(&kdkernels::sort_rows_backward_cuda));
}
