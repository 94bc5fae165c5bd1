# SPDX-License-Identifier: Apache-2.0
"""The model of time: programs whose cycles follow by hand from their control codes and the table, and from a changed
table; control codes of real machine code; a row of the bench."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "machine"))

from assembly import assembled, run
from decode import Control
from machine_build import core, simt_build

from bench.model import lines, multiprocessor, rates
from bench.model.rates import COSTS, H200
from bench.report import markdown

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(simt_build.compiler() is None, reason="no C++ compiler"),
]
START = H200.rates.start


def played(text: str, size: int = 128, machine=H200, costs=COSTS, threads: int = 32, blocks: int = 1, **made):
    """Of a launch with so many blocks for each multiprocessor."""
    tensors, grid = (torch.zeros(size), torch.zeros(size)), (132 * (blocks - 1) + 1, 1, 1)
    launch = run(assembled(text, **made), *tensors, grid=grid, threads=threads, schedule=multiprocessor.SHARE)
    return multiprocessor.play(core(), launch, machine, costs)


def until_exit(*lines: str, **how) -> float:
    """Cycles from the first instruction until that of EXIT, which waits for scoreboard 0."""
    return played("\n".join([*lines, "EXIT // waits=1"]), **how).cycles - START - 1


def with_cost(opcode: str, **changes) -> tuple:
    """The table with another entry for the row that an opcode stands in."""
    return tuple(cost._replace(**changes) if opcode in cost.opcodes.split() else cost for cost in COSTS)


def cost_of(opcode: str, costs) -> rates.Cost:
    return next(cost for cost in costs if opcode in cost.opcodes.split())


def with_rates(**changes):
    return H200._replace(rates=H200.rates._replace(**changes))


@pytest.mark.parametrize(
    "word, control",
    [  # as the disassembler prints them; the fields by hand
        (0x000FC80000000F00, Control(4, True)),
        (0x000FE20000010000, Control(1, False)),
        (0x000E220000000000, Control(1, False, writes=0)),
        (0x001FCA0000000F00, Control(5, True, waits=0b000001)),
        (0x0003E20000100C04, Control(1, False, reads=1)),
        (0x020EA20000300800, Control(1, False, writes=2, waits=0b100000)),
    ],
)
def test_a_control_code_is_read_and_written(word, control):
    assert Control.of(word) == control
    assert control.word() == word >> 41 << 41 & ~(-1 << 63)


def test_every_opcode_that_can_be_executed_has_a_cost_once():
    named = [opcode for cost in COSTS for opcode in cost.opcodes.split()]
    assert sorted(named) == sorted(core().opcodes())


def test_dependent_products_take_their_stall_counts():
    assert until_exit(*["FFMA R0, R0, R0, R0 // stall=4"] * 50) == 200


def test_a_second_warp_of_a_partition_hides_the_latency_of_the_first():
    chain = ["FFMA R0, R0, R0, R0 // stall=4"] * 50
    costs = with_cost("EXIT", interval=1)
    assert until_exit(*chain, threads=4 * 32, costs=costs) == 200  # one in each partition
    assert until_exit(*chain, threads=8 * 32, costs=costs) == 201  # the second's EXIT is a cycle later
    assert until_exit(*chain, threads=32 * 32, costs=costs) == 8 * 51 - 1  # eight: no cycle without an instruction


def test_a_warp_stays_in_its_partition():
    text = ["FFMA R0, R1, R1, R1"] * 50
    costs = with_cost("EXIT", interval=1)
    assert until_exit(*text, threads=4 * 32, costs=costs) == 50
    assert until_exit(*text, threads=5 * 32, costs=costs) == 2 * 51 - 1  # the fifth shares with the first


@pytest.mark.parametrize("interval", [2, 6])
def test_a_pipe_takes_the_next_after_its_interval(interval):
    costs = with_cost("IMAD", interval=interval)
    assert until_exit(*["IMAD R0, R1, R1, R1"] * 50, costs=costs) == 49 * interval + 1


@pytest.mark.parametrize("interval", [2, 8])
def test_two_pipes_take_turns(interval):
    costs = with_cost("FFMA", interval=interval)
    assert until_exit(*["FFMA R0, R1, R1, R1"] * 50, costs=costs) == 24 * interval + 2


@pytest.mark.parametrize("latency", [22, 40])
def test_a_scoreboard_is_waited_for_as_long_as_the_table_says(latency):
    costs = with_cost("MUFU", latency=latency)
    assert until_exit(*["MUFU.EX2 R0, R0 // writes=0 waits=1"] * 50, costs=costs) == 50 * latency


ADDRESS = ("S2R R0, SR_TID.X // writes=0", "IMAD R0, R0, {}, RZ // stall=5 waits=1", "STS [R0], R1")


@pytest.mark.parametrize("latency", [29, 50])
@pytest.mark.parametrize("stride, passes", [(4, 1), (8, 2), (32, 8), (128, 32), (0, 1)])
def test_words_of_one_bank_are_read_one_after_the_other(stride, passes, latency):
    costs = with_cost("LDS", latency=latency)
    address = [line.format(hex(stride)) for line in ADDRESS]
    loads = ["LDS R2, [R0] // writes=0"] * 40
    before = until_exit(*address, shared_bytes=4096, costs=costs)
    stored = passes  # the store's own passes, which the first load waits for where they take longer than its issue
    interval = max(passes, cost_of("LDS", costs).interval)
    spent = until_exit(*address, *loads, shared_bytes=4096, costs=costs)
    first = max(stored, cost_of("STS", costs).interval) - 1
    assert spent == before + first + 39 * interval + passes - 1 + latency


@pytest.mark.parametrize("queue", [24, 8])
def test_an_access_waits_for_room_in_the_queue(queue):
    address, passes = [line.format(hex(128)) for line in ADDRESS], 32
    stored = until_exit(*address, shared_bytes=4096) - 1  # when STS goes
    loads = ["LDS R2, [R0]"] * 10
    spent = until_exit(*address, *loads, shared_bytes=4096, machine=with_rates(queue=queue))
    assert spent == stored + 10 * passes - queue + 1


@pytest.mark.parametrize("operands_read", [8, 20])
def test_a_register_may_be_overwritten_when_a_store_has_read_it(operands_read):
    address = [line.format("0x4") for line in ADDRESS]
    stored = until_exit(*address, shared_bytes=4096) - 1
    address[-1] += " // reads=1"
    spent = until_exit(*address, "NOP // waits=2", shared_bytes=4096, machine=with_rates(operands_read=operands_read))
    assert spent == stored + operands_read + 1


# bytes between lanes, width -> passes: 32 lanes of 8 bytes fill the banks twice, of 16 four times, and no broadcast
# reaches from one half or quarter of the warp to the next
@pytest.mark.parametrize("stride, width, passes", [(8, 64, 2), (16, 128, 4), (32, 128, 8), (0, 64, 2), (0, 128, 4)])
def test_wide_accesses_go_by_halves_and_quarters_of_a_warp(stride, width, passes):
    load = f"LDS.{width} R4, [R0]"
    with_load, without = (
        played("\n".join([*(line.format(hex(stride)) for line in ADDRESS), *loads, "EXIT"]), shared_bytes=4096)
        for loads in ([load], [])
    )
    assert with_load.wavefronts - without.wavefronts == passes


LOADS = ("S2R R0, SR_TID.X // writes=0", "IMAD.WIDE R2, R0, 0x10, c[0x0][0x160] // stall=5 waits=1")


@pytest.mark.parametrize("rate", [H200.rates.dram_bytes, H200.rates.dram_bytes / 2])
def test_what_is_read_comes_no_faster_than_from_dram(rate):
    loads = [f"LDG.E.128 R4, [R2.64+{hex(4096 * k)}] // writes=0" for k in range(16)]
    own = 256 * 16 * 16  # bytes that the block reads: its multiprocessor's share of the tensor
    cycles = until_exit(*LOADS, *loads, threads=256, size=132 * own // 4, machine=with_rates(dram_bytes=rate))
    first_and_last = 512 / rate  # a load waits for those before it
    assert own / rate - first_and_last <= cycles - H200.rates.dram < own / rate + 100
    # all multiprocessors read the same: each brings its part of it from DRAM, and the rest from L2
    shared = played("\n".join([*LOADS, *loads, "EXIT // waits=1"]), threads=256, size=own // 4)
    assert shared.dram_bytes == pytest.approx(own / 132) and shared.l2_bytes == own


@pytest.mark.parametrize("rate", [H200.rates.l2_bytes, H200.rates.l2_bytes / 2])
def test_a_launch_ends_when_what_it_stored_has_gone(rate):
    stores = [f"STG.E.128 [R2.64+{hex(4096 * k)}], R4" for k in range(16)]
    stored = 256 * 16 * 16
    machine = with_rates(l2_bytes=rate, dram_bytes=1e9)
    cycles = until_exit(*LOADS, *stores, threads=256, size=132 * stored // 4, machine=machine)
    assert stored / rate < cycles < stored / rate + 100


@pytest.mark.parametrize("changes", [{}, {"dram": 600, "l2": 300, "l1": 50}])
def test_a_load_takes_as_long_as_the_place_it_comes_from(changes):
    machine = with_rates(**changes)
    load = "LDG.E R4, [R2.64] // writes=0 waits=1"
    counts = [until_exit(*LOADS, *[load] * k, machine=machine) for k in range(4)]
    first, *others = (b - a for a, b in zip(counts, counts[1:], strict=False))
    lines = 4  # of 128 bytes, one a cycle
    assert first == machine.rates.dram + lines - 1 and others == [machine.rates.l1 + lines - 1] * 2
    stored = [until_exit(*LOADS, "STG.E [R2.64], R4", *[load] * k, machine=machine) for k in (0, 1)]
    assert stored[1] - stored[0] == pytest.approx(machine.rates.l2, abs=30)  # EXIT alone ends before what is stored
    for scope, rate in (("GPU", machine.rates.l2), ("SM", machine.rates.l1)):
        again = until_exit(*LOADS, load, load.replace("LDG.E", f"LDG.E.STRONG.{scope}"), machine=machine) - counts[1]
        assert again == rate + lines - 1


def test_l1_holds_what_a_block_read_last_and_shared_memory_leaves_room_for():
    loads = [f"LDG.E.128 R4, [R2.64+{hex(16384 * (k % 3))}]\nBAR.SYNC 0x0" for k in range(4)]  # 16 KB each
    text = "\n".join([*LOADS, *loads, "EXIT"])
    asked = {
        shared: played(text, 3 * 4096, threads=1024, shared_bytes=shared << 10).l2_bytes / 16384 for shared in (10, 227)
    }
    assert asked == {10: 3, 227: 4}
    one = "\n".join([*LOADS, loads[0], "EXIT"])
    assert played(one, 4096, threads=1024, blocks=2).l2_bytes == 2 * 16384  # each block brings its own
    copy = "LDGSTS.E{}.128 [R0], [R2.64] // stall=2"
    address = "IMAD R0, R0, 0x10, RZ // stall=5"
    for bypass, times in (("", 1), (".BYPASS", 2)):
        text = "\n".join([*LOADS, address, *[copy.format(bypass)] * 2, "EXIT"])
        assert played(text, shared_bytes=512).l2_bytes == times * 512


@pytest.mark.parametrize("dram", [479, 700])
def test_copies_are_waited_for_by_groups(dram):
    copy = [*LOADS, "IMAD R0, R0, 0x10, RZ // stall=5", "LDGSTS.E [R0], [R2.64]", "LDGDEPBAR // writes=0"]
    machine = with_rates(dram=dram, dram_bytes=1e9, l2_bytes=1e9)  # nothing is left to come when EXIT has been issued
    cycles = [
        played("\n".join([*copy, f"DEPBAR.LE SB0, {left}", "EXIT"]), machine=machine, shared_bytes=512).cycles
        for left in ("0x1", "0x0")
    ]
    # DEPBAR comes 3 cycles after the copy, and waits for its 4 lines and their way
    assert cycles[1] - cycles[0] == dram + 3 - 3


TAKEN = 16 * 128 * 16 / 512  # cycles of a partition's tensor core, which makes 512 products in one
HALF_GROUP = "HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR4], R24"
DESCRIPTORS = [f"UMOV UR{k}, {value}" for k, value in ((4, "0x0"), (5, "0x40000000"), (6, "0x0"), (7, "0x40000000"))]


@pytest.mark.parametrize("latency", [16, 30])
def test_products_of_a_warpgroup_take_the_tensor_cores_one_after_the_other(latency):
    costs = with_cost("HGMMA", latency=latency)
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0 // stall=1"
    cycles = [
        until_exit(*DESCRIPTORS, *[HALF_GROUP] * k, HALF_GROUP + ", gsb0", wait, architecture=90, threads=128,
                   shared_bytes=4096, costs=costs) for k in (0, 3)
    ]  # fmt: skip
    assert cycles[1] - cycles[0] == 3 * TAKEN
    assert cycles[0] == 2 * len(DESCRIPTORS) - 1 + TAKEN + latency + 1  # an issue of UMOV each second cycle; DEPBAR


def test_groups_of_products_are_waited_for_by_their_number():
    group = [HALF_GROUP, HALF_GROUP + ", gsb0"]
    cycles = [
        until_exit(*DESCRIPTORS, *group, *group, f"WARPGROUP.DEPBAR.LE gsb0, {left}", architecture=90, threads=128,
                   shared_bytes=4096) for left in ("0x2", "0x1", "0x0")
    ]  # fmt: skip
    assert cycles[2] - cycles[1] == 2 * TAKEN and cycles[1] > cycles[0]


def test_narrow_products_wait_for_shared_memory():
    both_in_shared = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    cycles = [
        until_exit(*DESCRIPTORS, *[both_in_shared] * k, wait, architecture=90, threads=128, shared_bytes=4096)
        for k in (10, 20)
    ]
    of_a_warp = 16 * 32 / 128 + 1  # its rows of A, 32 bytes each, and its quarter of B, less than a pass
    assert cycles[1] - cycles[0] == 10 * 4 * of_a_warp


@pytest.mark.parametrize("barrier, branch", [(20, 6), (50, 15)])
def test_barriers_and_jumps_cost_what_the_table_says(barrier, branch):
    machine = with_rates(barrier=barrier, branch=branch)
    assert until_exit("BAR.SYNC 0x0 // stall=5", "NOP", machine=machine) == barrier + 1
    assert until_exit("BRA 0x20 // stall=5", "NOP", "NOP", machine=machine) == 5 + branch + 1


def test_a_warp_goes_on_until_it_yields():
    def waited(code: str) -> float:
        text = "\n".join([f"FFMA R0, R1, R1, R1 // {code}"] * 50 + ["EXIT"])
        return played(text, threads=8 * 32).instructions[0].waited / 4  # of the second warp of each partition

    assert waited("stall=1 yields=0") >= 50
    assert waited("stall=1 yields=1") == 1


# registers of a lane, shared bytes, warps of a block -> resident blocks, as the vendor's occupancy calculator has them
@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [(32, 0, 8, 8), (32, 0, 1, 32), (128, 0, 4, 4), (33, 0, 4, 12), (168, 0, 4, 3), (255, 0, 8, 1),
     (32, 51 << 10, 4, 4), (32, 227 << 10, 4, 1)],
)  # fmt: skip
def test_registers_and_shared_memory_bound_the_resident_blocks(registers, shared, warps, blocks):
    for architecture in (80, 90):
        function = assembled("EXIT", shared, architecture, registers=registers)
        assert multiprocessor.occupancy(function, warps).blocks == blocks


def test_blocks_that_are_not_resident_wait_for_one_that_ends():
    text = "\n".join(["FFMA R0, R0, R0, R0 // stall=4"] * 50 + ["EXIT"])
    many = assembled(text, 227 << 10)
    tensors = torch.zeros(4), torch.zeros(4)
    one, three = (run(many, *tensors, grid=(grid, 1, 1), schedule=multiprocessor.SHARE) for grid in (132, 2 * 132 + 1))
    assert (one.trace.blocks, three.trace.blocks) == (1, 3)
    times = [multiprocessor.play(core(), launch).cycles for launch in (one, three)]
    assert times == [START + 201, 3 * (START + 200) + 1]


def test_an_opcode_without_a_cost_is_named():
    with pytest.raises(KeyError, match="FFMA has no row in bench/model/rates.py: FFMA R0, R0, R0, R0"):
        played("FFMA R0, R0, R0, R0\nEXIT", costs=tuple(c for c in COSTS if "FFMA" not in c.opcodes.split()))


@pytest.mark.parametrize(
    "path, functions",
    [
        ("kdkernels/logits/triton_kl.py", {"kl_rows", "whole_rows", "terms"}),
        ("csrc/rank/isotonic.cuh", {"solve", "merge"}),
        ("csrc/rank/soft_rank.cuh", {"rank_rows_kernel", "emit_ranks"}),
    ],
)
def test_a_line_is_told_by_the_function_it_stands_in(path, functions):
    path = ROOT / path
    found = {lines.function_at(str(path), k + 1) for k, _ in enumerate(path.read_text().splitlines())}
    assert functions < found and not found & {"if", "for", "while", "switch", "return"}
    assert lines.function_at("nowhere.cuh", 1) == ""


LISTING = """//--------------------- .text.other --------------------------
	//## File "a.cuh", line 9
        /*0000*/                   NOP ;
//--------------------- .text.kernel --------------------------
	//## File "a.cuh", line 1 inlined at "b.cuh", line 2
	//## File "b.cuh", line 2 inlined at "c.cuh", line 3
	//## File "c.cuh", line 3
        /*0000*/                   NOP ;
        /*0010*/                   NOP ;
	//## File "c.cuh", line 4
        /*0020*/                   EXIT ;
"""


def test_an_instruction_has_its_line_and_those_it_was_inlined_at():
    found = lines.parsed(LISTING, "kernel")
    assert {pc: [(f.file, f.number) for f in frames] for pc, frames in found.items()} == {
        0x00: [("a.cuh", 1), ("b.cuh", 2), ("c.cuh", 3)],
        0x10: [("a.cuh", 1), ("b.cuh", 2), ("c.cuh", 3)],
        0x20: [("c.cuh", 4)],
    }
    frames = [lines.Frame("x", name, 1) for name in ("find", "merge", "merge", "solve", "kernel")]
    assert lines.phase(frames) == "solve > merge > find" and lines.phase(frames[-1:]) == "kernel"


def test_the_library_that_is_modelled_is_built_from_all_that_cmake_reads():
    from bench.model import built

    read = re.findall(r"\{CMAKE_CURRENT_SOURCE_DIR\}/(\w[\w.]*)", (ROOT / "CMakeLists.txt").read_text())
    assert {"csrc", "pyproject.toml"} <= set(read) <= {*built.LINKED, "kdkernels"}  # where the package's goes


def test_a_row_says_what_it_is_and_repeats(python, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels that are modelled")
    out = tmp_path / "rows"
    case = ("--case", "kl 8192x1000 bfloat16", "--architecture", "80", "--lines", "2")
    done = python("-m", "bench", "model", *case, "--against", str(ROOT), "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    head = f"MODEL {multiprocessor.VERSION}, not measured: H200, 132 multiprocessors at 1.75 GHz, code for sm_80, 20"
    assert done.stdout.startswith(head)
    assert done.stdout.count("now 1.00 x its time, 1.00 x its instructions") == 2
    assert "    whole_rows " in done.stdout
    row, again, *_ = map(json.loads, out.read_text().splitlines())
    assert (row["kind"], row["version"]) == ("model", multiprocessor.VERSION)
    assert (row["kernel"], row["blocks"], row["launches"]) == ("kl_rows", 63, 1)
    assert row["cycles"] == again["cycles"] and row["triton"] and row["run"]
    assert row["memory_floor"] == pytest.approx(3 * 8192 * 1000 * 2 / 4.3e12 * 1e6)
    assert row["microseconds"] > row["memory_floor"] and 0 < row["issue_rate"] <= 4
    assert sum(row["idle"].values()) + row["issue_rate"] / 4 == pytest.approx(1, abs=1e-3)
    report = markdown([row, again])
    assert f"**not measured**, a launch: by a model (version {row['version']}) of H200, 132 multiproc" in report
    assert report.count("| kl 8192x1000 bfloat16 | kl_rows (sm_80) | ") == 2
    assert row["dram_bytes"] * 132 == pytest.approx(3 * 8192 * 1000 * 2, rel=0.02)  # each byte is read or written once
