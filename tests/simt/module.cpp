// SPDX-License-Identifier: Apache-2.0
// simt_kernels: the CUDA kernels of csrc/, compiled for the host, called with NumPy arrays. Test-only: pybind11 ties a
// binary to one Python, so nothing of this is in the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "simt.h"

#include "planted.h"
#include "rank_module.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <Plant plant>
void run_planted(const Array<float>& x, Array<double>& sum, Array<float>& maximum, int threads) {
  const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(x.shape(1));
  const float* p_x = x.data();
  double* p_sum = sum.mutable_data();
  float* p_max = maximum.mutable_data();
  py::gil_scoped_release release;
  simt::launch(dim3(rows), dim3(threads), threads * sizeof(SumMax), planted_row_stats<plant>, p_x, p_sum, p_max, n);
}

void planted(const std::string& plant, const Array<float>& x, Array<double> sum, Array<float> maximum, int threads) {
  if (plant == "none") return run_planted<Plant::kNone>(x, sum, maximum, threads);
  if (plant == "no_barrier") return run_planted<Plant::kNoBarrier>(x, sum, maximum, threads);
  if (plant == "out_of_bounds") return run_planted<Plant::kOutOfBounds>(x, sum, maximum, threads);
  if (plant == "wrong_merge") return run_planted<Plant::kWrongMerge>(x, sum, maximum, threads);
  if (plant == "unwritten") return run_planted<Plant::kUnwritten>(x, sum, maximum, threads);
  if (plant == "divergent") return run_planted<Plant::kDivergent>(x, sum, maximum, threads);
  if (plant == "deadlock") return run_planted<Plant::kDeadlock>(x, sum, maximum, threads);
  if (plant == "bad_lane") return run_planted<Plant::kBadLane>(x, sum, maximum, threads);
  throw std::invalid_argument("no such plant: " + plant);
}

void run_primitives(const Array<int>& x, Array<long long> out, int early) {
  const int* p_x = x.data();
  long long* p_out = out.mutable_data();
  py::gil_scoped_release release;
  simt::launch(1, 64, 0, primitives<64>, p_x, p_out, early);
}

Array<float> convert_half(const Array<float>& x, bool bfloat) {
  Array<float> y(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    const float v = x.data()[i];
    y.mutable_data()[i] = bfloat ? __bfloat162float(__float2bfloat16_rn(v)) : __half2float(__float2half_rn(v));
  }
  return y;
}

}  // namespace

PYBIND11_MODULE(simt_kernels, m) {
  bind_rank(m);
  m.def("planted", &planted);
  m.def("primitives", &run_primitives);
  m.def("convert_half", &convert_half);
  m.def("reverse_blocks", [](bool on) { simt::reverse_blocks = on; });
  m.def("sorted_segments", [] { return std::exchange(simt::sorted_segments, {}); });
  m.def("skip_barrier", [](const std::string& at) { simt::skipped_barrier = at; });
}
