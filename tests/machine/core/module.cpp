// SPDX-License-Identifier: Apache-2.0
// machine_core: programs, launches and what was seen in them, for Python. Memory is the caller's own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;

namespace machine {
namespace {

// the fields of decode.py's Operand, in order
Operand operand_of(const py::tuple& t) {
  Operand o;
  o.kind = static_cast<Kind>(t[0].cast<int>());
  o.index = t[1].cast<int>();
  o.value = t[2].cast<std::int64_t>();
  o.negated = t[3].cast<bool>(), o.absolute = t[4].cast<bool>(), o.inverted = t[5].cast<bool>();
  o.part = t[6].cast<int>();
  o.uniform = t[7].cast<int>(), o.scale = t[8].cast<int>(), o.wide = t[9].cast<bool>();
  return o;
}

void add_instruction(Program& program, std::uint32_t pc, const std::string& text, const std::string& opcode,
                     const std::vector<std::string>& modifiers, const py::object& guard,
                     const std::vector<py::tuple>& operands, std::uint32_t target) {
  Instruction made;
  made.pc = pc, made.text = text, made.modifiers = modifiers, made.target = target;
  if (!guard.is_none()) made.guard = operand_of(guard);
  for (const py::tuple& operand : operands) made.operands.push_back(operand_of(operand));
  program.add(std::move(made), opcode);
}

std::vector<std::uint8_t> bytes_of(const py::bytes& data) {
  const std::string_view view = data;
  return {view.begin(), view.end()};
}

}  // namespace

PYBIND11_MODULE(machine_core, m) {
  py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
  py::class_<Program>(m, "Program")
      .def(py::init())
      .def("add", &add_instruction)
      .def("set_skipped", &Program::set_skipped);
  py::class_<Machine>(m, "Machine")
      .def(py::init([](const Program& program, int lanes, int warps, bool early, bool truncated, std::uint64_t seed) {
             return std::make_unique<Machine>(
                 program, Schedule{Schedule::Lanes(lanes), Schedule::Warps(warps), early, truncated, seed});
           }),
           py::keep_alive<1, 2>())
      .def("set_constants",
           [](Machine& self, int bank, const py::bytes& data) { self.constants[bank] = bytes_of(data); })
      .def("add_global",
           [](Machine& self, const std::string& name, std::uint64_t address, std::uint64_t size) {
             self.global.emplace_back(name, address, reinterpret_cast<std::uint8_t*>(address), size, true);
           })
      .def("run",
           [](Machine& self, std::array<std::uint32_t, 3> grid, int warps, int shared_bytes,
              std::vector<std::uint32_t> blocks, std::uint64_t most_steps) {
             py::gil_scoped_release release;
             self.run({{grid[0], grid[1], grid[2]}, warps, shared_bytes, std::move(blocks), most_steps});
           })
      .def_readonly("reports", &Machine::reports)
      .def_readonly("counts", &Machine::counts)
      .def_readonly("steps", &Machine::steps);
}

}  // namespace machine
