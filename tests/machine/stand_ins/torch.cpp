// SPDX-License-Identifier: Apache-2.0
// In the place of torch's CUDA build: the operators of csrc/ are registered for CPU tensors, which pass for CUDA's, and
// the memory that an operator asks its tensors for is remembered. The linker (--wrap) sends the calls here.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "launches.h"

namespace machine {

Device& device() {
  static Device made{};
  return made;
}
std::vector<Range>& ranges() {
  static std::vector<Range> made;
  return made;
}
static unsigned operations = 0;
unsigned operation() { return operations; }

// from the first element to the last
static void remember(AtenTensorHandle tensor, const void* begin, bool writable) {
  int64_t dimensions = 0, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dimensions);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t d = 0; d < dimensions; ++d) {
    int64_t size = 0, stride = 0;
    aoti_torch_get_size(tensor, d, &size);
    aoti_torch_get_stride(tensor, d, &stride);
    if (size == 0) return;
    last += (size - 1) * stride;
  }
  const std::size_t bytes = static_cast<std::size_t>(last + 1) * aoti_torch_dtype_element_size(dtype);
  std::vector<Range>& known = ranges();
  const auto* first = static_cast<const char*>(begin);
  // an operator that threw before it held a guard has left ranges of memory that is now another's
  std::erase_if(known, [&](const Range& range) {
    const auto* other = static_cast<const char*>(range.begin);
    return range.writable != writable && other < first + bytes && first < other + range.bytes;
  });
  for (const Range& range : known)
    if (range.begin == begin && range.bytes >= bytes) return;
  known.push_back({begin, bytes, writable});
}

}  // namespace machine

extern "C" {

__attribute__((visibility("default"))) void machine_set_device(const char* (*run)(const machine::Launch*),
                                                               int architecture, std::size_t shared) {
  machine::Device& now = machine::device();
  const bool same = now.architecture == architecture && now.shared == shared;
  now = {run, architecture, shared, now.number + !same};
}

int32_t __wrap_aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                   TorchLibraryHandle*);
AOTITorchError __wrap_aoti_torch_library_init_impl(const char* names, const char*, const char* file, uint32_t line,
                                                   TorchLibraryHandle* made) {
  return __real_aoti_torch_library_init_impl(names, "CPU", file, line, made);
}

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (!error) machine::remember(tensor, *data, false);
  return error;
}
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (!error) machine::remember(tensor, *data, true);
  return error;
}

// held by an operator as long as it runs
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* made) {
  *made = reinterpret_cast<DeviceGuardHandle>(&machine::operations);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  machine::ranges().clear();
  ++machine::operations;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
