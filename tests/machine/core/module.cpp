// SPDX-License-Identifier: Apache-2.0
// machine_core: programs, launches and what was seen in them, for Python. Memory is the caller's own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cycles.h"
#include "machine.h"
#include "semantics.h"

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
  o.added = t[10].cast<int>();
  return o;
}

void add_instruction(Program& program, std::uint32_t pc, const std::string& text, const std::string& opcode,
                     const std::vector<std::string>& modifiers, const py::object& guard,
                     const std::vector<py::tuple>& operands, std::uint32_t target) {
  Instruction made;
  made.pc = pc, made.text = text, made.opcode = opcode, made.modifiers = modifiers, made.target = target;
  if (!guard.is_none()) made.guard = operand_of(guard);
  for (const py::tuple& operand : operands) made.operands.push_back(operand_of(operand));
  program.add(std::move(made));
}

std::vector<std::uint8_t> bytes_of(const py::bytes& data) {
  const std::string_view view = data;
  return {view.begin(), view.end()};
}

// the fields of bench/model/rates.py's Operation and Rates, in order
Operation operation_of(const py::tuple& t) {
  const auto whole = [&](int k) { return t[k].cast<int>(); };
  return {whole(0), t[1].cast<bool>(), whole(2), whole(3), whole(4), t[5].cast<std::uint32_t>(), t[6].cast<double>(),
          whole(7), static_cast<Effect>(whole(8)), whole(9), whole(10)};
}

Rates rates_of(const py::tuple& t) {
  const auto whole = [&](int k) { return t[k].cast<int>(); };
  return {whole(0), t[1].cast<double>(), t[2].cast<double>(), whole(3), whole(4), whole(5),
          whole(6), whole(7), whole(8), whole(9), whole(10)};
}

Played play_trace(const Trace& trace, const std::vector<py::tuple>& program, const py::tuple& rates, int resident) {
  std::vector<Operation> operations;
  for (const py::tuple& one : program) operations.push_back(operation_of(one));
  return play(trace, operations, rates_of(rates), resident);
}

}  // namespace

PYBIND11_MODULE(machine_core, m) {
  m.attr("SHARED_WINDOW") = kSharedWindow;
  py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
  py::class_<Program>(m, "Program")
      .def(py::init())
      .def("add", &add_instruction)
      .def("set_skipped", &Program::set_skipped);
  py::class_<Trace, std::shared_ptr<Trace>>(m, "Trace")
      .def_readonly("warps", &Trace::per_block)
      .def_property_readonly("blocks", [](const Trace& self) { return self.warps.size() / self.per_block; });
  py::class_<OfInstruction>(m, "OfInstruction")
      .def_readonly("executions", &OfInstruction::executions)
      .def_readonly("lanes", &OfInstruction::lanes)
      .def_readonly("wavefronts", &OfInstruction::wavefronts)
      .def_readonly("sectors", &OfInstruction::sectors)
      .def_readonly("fresh", &OfInstruction::fresh)
      .def_readonly("waited", &OfInstruction::waited);
  py::class_<Played>(m, "Played")
      .def_readonly("cycles", &Played::cycles)
      .def_readonly("issued", &Played::issued)
      .def_readonly("wavefronts", &Played::wavefronts)
      .def_readonly("l2_bytes", &Played::l2_bytes)
      .def_readonly("dram_bytes", &Played::dram_bytes)
      .def_readonly("idle", &Played::idle)
      .def_readonly("instructions", &Played::instructions);
  m.def("play", &play_trace);
  m.def("opcodes", [] { return table().opcodes(); });
  py::class_<Region, std::shared_ptr<Region>>(m, "Region")
      .def(py::init([](const std::string& name, std::uint64_t base, std::uint64_t size, bool written, bool writable) {
             auto* bytes = reinterpret_cast<std::uint8_t*>(base);
             return std::make_shared<Region>(name, base, bytes, size, written, writable);
           }),
           py::arg("name"), py::arg("address"), py::arg("size"), py::arg("written") = true, py::arg("writable") = true);
  py::class_<Machine>(m, "Machine")
      .def(py::init([](const Program& program, int lanes, int warps, bool early, bool truncated, std::uint64_t seed) {
             return std::make_unique<Machine>(
                 program, Schedule{Schedule::Lanes(lanes), Schedule::Warps(warps), early, truncated, seed});
           }),
           py::keep_alive<1, 2>())
      .def("set_constants",
           [](Machine& self, int bank, const py::bytes& data) { self.constants[bank] = bytes_of(data); })
      .def("add_global",
           [](Machine& self, std::shared_ptr<Region> region) {
             region->start_launch(!self.trace);
             self.global.push_back(std::move(region));
           })
      // the arguments added after it are not checked for races
      .def("start_trace", [](Machine& self, std::size_t l1_sectors) {
        return self.trace = std::make_shared<Trace>(l1_sectors);
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
