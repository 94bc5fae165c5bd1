// SPDX-License-Identifier: Apache-2.0
// The ranking kernels as Python functions on NumPy arrays, through the same choice of schedules as on a GPU. Half
// formats come as uint16, results go into the caller's arrays. `schedule` forces one; `shared`: bytes of a block.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rank/schedule.cuh"

namespace py = pybind11;
using namespace kdkernels;

namespace {

using Floats64 = py::array_t<double, 0>;
using Ints = py::array_t<int, 0>;

int dtype_of(const std::string& name) {
  if (name == "float16") return kHalf;
  if (name == "bfloat16") return kBfloat16;
  if (name == "float32") return kFloat;
  if (name == "float64") return kDouble;
  throw std::invalid_argument("no such dtype: " + name);
}

Device device_of(const std::string& schedule, size_t shared) {
  if (schedule == "auto") return {shared, Schedule::kAuto};
  if (schedule == "warp") return {shared, Schedule::kWarp};
  if (schedule == "block") return {shared, Schedule::kBlock};
  if (schedule == "big") return {shared, Schedule::kBig};
  if (schedule == "long") return {shared, Schedule::kLong};
  throw std::invalid_argument("no such schedule: " + schedule);
}

Rows rows_of(const py::array& x, int dtype) {
  if (x.itemsize() != bytes_of(dtype)) throw std::invalid_argument("the array's items do not have the dtype's size");
  return {x.data(), x.strides(0) / x.itemsize(), dtype};
}

Strength strength_of(const std::optional<Floats64>& factors, double number, bool relative) {
  if (!factors) return {nullptr, false, number, relative};
  return {factors->data(), factors->size() > 1, number, relative};
}

template <class T>
T* pointer(std::optional<py::array>& array) {
  return array ? static_cast<T*>(array->mutable_data()) : nullptr;
}

// workspace with garbage in it; exact sizes, so that AddressSanitizer guards the ends
struct Workspace {
  std::vector<std::unique_ptr<unsigned char[]>> parts;
  void* operator()(size_t bytes) {
    parts.push_back(std::make_unique<unsigned char[]>(bytes));
    simt::poison(parts.back().get(), bytes, static_cast<unsigned>(parts.size()));
    return parts.back().get();
  }
};
struct Allocate {
  Workspace* workspace;
  void* operator()(size_t bytes) const { return (*workspace)(bytes); }
};

void rank(const py::array& x, const std::string& dtype, const std::optional<Floats64>& factors, double strength,
          bool relative, bool kl, bool descending, py::array out, std::optional<py::array> blocks, Floats64 eps,
          const std::string& schedule, size_t shared) {
  RankCall call{};
  call.x = rows_of(x, dtype_of(dtype));
  call.strength = strength_of(factors, strength, relative);
  call.descending = descending;
  call.rows = x.shape(0), call.n = static_cast<int>(x.shape(1));
  call.rank = out.mutable_data();
  call.blocks = pointer<int>(blocks);
  call.eps = eps.mutable_data();
  const Device device = device_of(schedule, shared);
  Workspace workspace;
  py::gil_scoped_release release;
  call.kl = kl;
  rank_rows(call, dtype == "float64", device, Allocate{&workspace}, nullptr);
}

BackwardCall backward_of(const py::array& grad, const py::array& value, int value_dtype, const Ints& name,
                         py::array& dx, int dtype) {
  BackwardCall call{};
  call.grad = rows_of(grad, dtype == kDouble ? kDouble : kFloat);
  call.value = rows_of(value, value_dtype);
  call.name = name.data(), call.name_stride = name.strides(0) / name.itemsize();
  call.rows = grad.shape(0), call.n = static_cast<int>(grad.shape(1));
  call.dx = dx.mutable_data(), call.dtype = dtype;
  return call;
}

void rank_backward(const py::array& grad, const py::array& ranks, const Ints& blocks, const Floats64& eps, bool kl,
                   bool descending, py::array dx, const std::string& dtype, const std::string& schedule,
                   size_t shared) {
  const int code = dtype_of(dtype);
  BackwardCall call = backward_of(grad, ranks, code == kDouble ? kDouble : kFloat, blocks, dx, code);
  call.eps = eps.data();
  call.descending = descending;
  const Device device = device_of(schedule, shared);
  Workspace workspace;
  py::gil_scoped_release release;
  rank_rows_backward(call, code == kDouble, kl, device, Allocate{&workspace}, nullptr);
}

void sort(const py::array& s, const std::string& dtype, const std::optional<Floats64>& factors, double strength,
          bool relative, bool kl, py::array value, Ints start, Floats64 eps, const std::string& schedule,
          size_t shared) {
  SortCall call{};
  call.s = rows_of(s, dtype_of(dtype));
  call.strength = strength_of(factors, strength, relative);
  call.rows = s.shape(0), call.n = static_cast<int>(s.shape(1));
  call.value = value.mutable_data(), call.start = start.mutable_data(), call.eps = eps.mutable_data();
  const Device device = device_of(schedule, shared);
  Workspace workspace;
  py::gil_scoped_release release;
  call.kl = kl;
  sort_rows(call, dtype == "float64", device, Allocate{&workspace}, nullptr);
}

void sort_backward(const py::array& grad, const py::array& s, const Ints& start, bool kl, py::array ds,
                   const std::string& dtype, const std::string& schedule, size_t shared) {
  const int code = dtype_of(dtype);
  const BackwardCall call = backward_of(grad, s, code, start, ds, code);
  const Device device = device_of(schedule, shared);
  Workspace workspace;
  py::gil_scoped_release release;
  sort_rows_backward(call, code == kDouble, kl, device, Allocate{&workspace}, nullptr);
}

void spearman(const py::array& x, const py::array& y, const std::string& dtype, double strength, bool relative, bool kl,
              bool hard_target, py::array value, std::optional<py::array> dx, std::optional<py::array> dy,
              const std::string& schedule, size_t shared) {
  SpearmanCall call{};
  const bool wide = dtype == "float64" || y.itemsize() == bytes_of(kDouble);  // y may be wider than x
  call.x = rows_of(x, dtype_of(dtype)), call.y = rows_of(y, wide ? kDouble : dtype_of(dtype));
  call.strength = strength, call.relative = relative, call.hard_target = hard_target;
  call.rows = x.shape(0), call.n = static_cast<int>(x.shape(1));
  call.value = value.mutable_data(), call.dx = pointer<void>(dx), call.dy = pointer<void>(dy);
  const Device device = device_of(schedule, shared);
  Workspace workspace;
  py::gil_scoped_release release;
  call.kl = kl;
  spearman_rows(call, wide, device, Allocate{&workspace}, nullptr);
}

}  // namespace

inline void bind_rank(py::module_& m) {
  m.def("rank_rows", &rank);
  m.def("rank_rows_backward", &rank_backward);
  m.def("sort_rows", &sort);
  m.def("sort_rows_backward", &sort_backward);
  m.def("spearman_rows", &spearman);
}
