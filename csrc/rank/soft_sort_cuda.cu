// SPDX-License-Identifier: Apache-2.0
// sort_rows and its backward pass for CUDA tensors, as soft_rank_cuda.cu does it. A file of its own, so that both
// compile side by side; no kernel is in both.
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
  m.impl("sort_rows", TORCH_BOX(&kdkernels::sort_rows_cuda));
  m.impl("sort_rows_backward", TORCH_BOX(&kdkernels::sort_rows_backward_cuda));
}
