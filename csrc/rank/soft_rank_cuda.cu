// SPDX-License-Identifier: Apache-2.0
// rank_rows, its backward pass and spearman_rows for CUDA tensors: arguments checked, results allocated, the schedules
// of schedule.cuh launched on the current stream. The schemas stand in kdkernels/rank/native_impl.py.
#include <tuple>

#include "arguments.cuh"
#include "schedule.cuh"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> rank_rows_cuda(Tensor x, std::optional<Tensor> strengths, double strength,
                                                  bool relative, bool kl, bool descending, bool need_blocks) {
  const Rows rows = rows_of(x, "rank_rows", "x");
  const Strength eps_of = strength_of(strengths, strength, relative, x, "rank_rows");
  const bool wide = rows.dtype == kDouble;
  const int64_t r = x.size(0), n = x.size(1);
  Launch launch(x);
  Tensor rank = launch.rows(r, n, wide ? ScalarType::Double : ScalarType::Float);
  Tensor blocks = need_blocks ? launch.rows(r, n, ScalarType::Int) : launch.vector(0, ScalarType::Int);
  Tensor eps = launch.vector(r, ScalarType::Double);
  const RankCall call{rows,
                      Rows{nullptr, 0, kFloat},
                      eps_of,
                      kl,
                      descending,
                      r,
                      static_cast<int>(n),
                      0,
                      rank.mutable_data_ptr(),
                      need_blocks ? static_cast<int*>(blocks.mutable_data_ptr()) : nullptr,
                      static_cast<double*>(eps.mutable_data_ptr())};
  rank_rows(call, wide, Device{launch.shared()}, [&](size_t bytes) { return launch.allocate(bytes); },
            launch.stream());
  return {rank, blocks, eps};
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

std::tuple<Tensor, Tensor, Tensor> spearman_rows_cuda(Tensor x, Tensor y, double strength, bool relative, bool kl,
                                                      bool hard_target, bool grad_x, bool grad_y) {
  const Rows left = rows_of(x, "spearman_rows", "x"), right = rows_of(y, "spearman_rows", "y");
  check_like(y, x, "spearman_rows", "y");
  const bool wide = left.dtype == kDouble || right.dtype == kDouble;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t r = x.size(0), n = x.size(1);
  Launch launch(x);
  Tensor value = launch.vector(r, dtype);
  Tensor dx = grad_x ? launch.rows(r, n, dtype) : launch.vector(0, dtype);
  Tensor dy = grad_y ? launch.rows(r, n, dtype) : launch.vector(0, dtype);
  const SpearmanCall call{left,
                          right,
                          strength,
                          relative,
                          kl,
                          hard_target,
                          r,
                          static_cast<int>(n),
                          0,
                          value.mutable_data_ptr(),
                          grad_x ? dx.mutable_data_ptr() : nullptr,
                          grad_y ? dy.mutable_data_ptr() : nullptr};
  spearman_rows(call, wide, Device{launch.shared()}, [&](size_t bytes) { return launch.allocate(bytes); },
                launch.stream());
  return {value, dx, dy};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("rank_rows", TORCH_BOX(&kdkernels::rank_rows_cuda));
  m.impl("rank_rows_backward", TORCH_BOX(&kdkernels::rank_rows_backward_cuda));
  m.impl("spearman_rows", TORCH_BOX(&kdkernels::spearman_rows_cuda));
}
