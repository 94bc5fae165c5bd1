# SPDX-License-Identifier: Apache-2.0
"""Machine code on the CPU: what the CUDA kernels use beyond Triton's. Addresses of any memory, atomic operations,
tables of constants and jumps, barriers that vote; and memory that is only read, or not written yet."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "machine"))

from assembly import START, assembled, of_each_lane
from assembly import run as run_tensors
from decode import instruction
from emulator import SCHEDULES, Lanes, Schedule
from machine_build import core, simt_build

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(simt_build.compiler() is None, reason="no C++ compiler"),
]
# R0 the thread, R2 the address of its word of the first tensor, R5 four times the thread
HEAD = "S2R R0, SR_TID.X\nIMAD.WIDE R2, R0, 0x4, c[0x0][0x160]\nSHF.L.U32 R5, R0, 0x2, RZ\n"


def ran(program: str, *tensors, threads=32, schedule=SCHEDULES[0], **how):
    function = assembled(HEAD + program + "\nEXIT", tensors=len(tensors), **how)
    return run_tensors(function, *tensors, threads=threads, schedule=schedule)


def test_the_extreme_of_three():
    words = np.random.default_rng(0).integers(0, 2**32, (32, 4), np.uint32)
    got = of_each_lane(
        "VIMNMX3 R8, R4, R5, R6, PT; VIMNMX3.U32 R9, R4, R5, R6, !PT", torch.from_numpy(words.view("i4"))
    )
    assert np.array_equal(got[:, 0].numpy(), words[:, :3].view("i4").min(1))
    assert np.array_equal(got[:, 1].numpy().view("u4"), words[:, :3].max(1))


def test_a_packed_sum_carries_nothing_from_one_half_to_the_other():
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (32, 4), np.int64).astype(np.int32)
    got = of_each_lane("VIADD.16x2 R8, R4, R5", torch.from_numpy(words))[:, 0].contiguous().numpy()
    halves = words.view("i2").reshape(32, 4, 2)
    assert np.array_equal(got.view("i2").reshape(32, 2), halves[:, 0] + halves[:, 1])


def test_the_extreme_of_a_sum_may_end_at_zero():
    words = np.random.default_rng(0).integers(-(2**30), 2**30, (32, 4), np.int32)
    got = of_each_lane("VIADDMNMX R8, R4, R5, R6, PT; VIADDMNMX.RELU R9, R4, R5, R6, PT", torch.from_numpy(words))
    least = np.minimum(words[:, 0] + words[:, 1], words[:, 2])
    assert np.array_equal(got[:, 0].numpy(), least) and (least < 0).any()
    assert np.array_equal(got[:, 1].numpy(), np.maximum(least, 0))


def test_the_extreme_of_pairs_takes_the_halves_that_are_named_and_leaves_nan_out():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(32, 8, generator=generator).bfloat16()
    pairs[torch.rand(32, 8, generator=generator) < 0.2] = torch.nan
    got = of_each_lane(
        "HMNMX2.BF16_V2 R8, R4, -R5, PT; VHMNMX.BF16_V2 R9, R4.H0_H0, R5.H1_H1, R6, !PT", pairs.view(torch.int32)
    )
    low, high = pairs.view(32, 4, 2).unbind(-1)
    least = torch.fmin(pairs[:, :2], -pairs[:, 2:4])
    most = torch.stack([torch.fmax(torch.fmax(low[:, 0], high[:, 1]), part[:, 2]) for part in (low, high)], 1)
    assert least.isnan().any() and not most.isnan().all()
    for column, want in enumerate((least, most)):
        found = got[:, column].contiguous().view(torch.bfloat16).view(32, 2)
        assert torch.equal(found.nan_to_num(7), want.nan_to_num(7))


def test_a_half_becomes_a_double_as_it_is():
    halves = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float16)
    for k, (place, sign) in enumerate((("R4.H0_H0", 1), ("-R4.H1_H1", -1))):
        got = of_each_lane(f"F2F.F64.F16 R8, {place}", torch.from_numpy(halves.view("i4"))).view(torch.float64)
        assert np.array_equal(got[:, 0].numpy(), sign * halves[:, k].astype(np.float64))
    values = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = of_each_lane("F2F.F64.BF16 R8, R4", values.view(torch.int32)).view(torch.float64)
    assert torch.equal(got[:, 0], values[:, 0].double())


def test_a_double_becomes_a_half_in_one_rounding():
    halves = np.random.default_rng(0).standard_normal(32).astype(np.float16)
    middles = (halves.astype(np.float64) + np.nextafter(halves, np.float16(9)).astype(np.float64)) / 2
    x = middles * (1 + np.random.default_rng(1).integers(-1, 2, 32) * 2.0**-50)  # a float32 would lose this
    inputs = torch.zeros(32, 4, dtype=torch.int32)
    inputs.view(torch.float64)[:, 0] = torch.from_numpy(x)
    got = of_each_lane("F2F.F16.F64 R8, R4; F2F.BF16.F64 R9, R4", inputs).to(torch.int16).T.contiguous()
    assert np.array_equal(got[0].numpy().view(np.float16), x.astype(np.float16))
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    assert np.array_equal(got[1].view(torch.bfloat16).double().numpy(), np.rint(x / step) * step)


def test_which_nan_is_meant_is_read_from_the_encoding():
    assert instruction(0, "FSEL R37, R2, -QNAN , !P2", 0xFFF0000002257808).operands[2].value == 0xFFF00000
    assert instruction(0, "FADD R8, R4, +INF", 0x7F80000004087421).operands[2].value == 0x7F800000


def test_constants_are_indexed_and_read_by_the_byte():
    bank = np.random.default_rng(0).integers(0, 256, 4 * 33 + 1, np.uint8)
    out = torch.zeros(32, 2, dtype=torch.int32)
    ran(
        "LDC R8, c[0x3][R5+0x4]\nLDC.U8 R9, c[0x3][R5+0x5]\nIMAD.WIDE R2, R0, 0x8, c[0x0][0x160]\nSTG.E.64 [R2.64], R8",
        out, constants={3: bank.tobytes()},
    )  # fmt: skip
    assert np.array_equal(out[:, 0].numpy(), bank[4:132].view("i4")) and np.array_equal(out[:, 1], bank[5:][:128:4])
    with pytest.raises(core().Fault, match="a constant beyond the end of its bank"):
        ran("LDC R8, c[0x3][R5+0x8]", out, constants={3: bank.tobytes()})


JUMPS = """
    LOP3.LUT R6, R0, 0x3, RZ, 0xc0, !PT
    SHF.L.U32 R6, R6, 0x2, RZ
    LDC R8, c[0x2][R6]
    SHF.R.S32.HI R9, RZ, 0x1f, R8
    BRX R8 -0x80
    STG.E [R2.64], R6
    EXIT
    MOV R6, 0x9
    STG.E [R2.64], R6
"""


@pytest.mark.parametrize("lanes", Lanes)
def test_lanes_jump_by_a_table(lanes):
    x, table = torch.zeros(32, dtype=torch.int32), np.array([0x80, 0xA0, 0xA0, 0x80], np.int32)
    ran(JUMPS.strip(), x, schedule=Schedule(lanes=lanes), constants={2: table.tobytes()})
    assert x.tolist() == [0, 9, 9, 12] * 8


def test_lanes_that_jump_only_together_do_not_where_one_stays():
    for jumping in (32, 31):
        x = torch.full((32,), -1, dtype=torch.int32)
        ran(f"ISETP.LT.AND P0, PT, R0, {hex(jumping)}, PT\n@P0 BRA.U 0x60\nSTG.E [R2.64], R0", x)
        assert torch.equal(x, torch.full((32,), -1).int() if jumping == 32 else torch.arange(32).int())


# a third of the lanes is ahead or behind where they meet: those that are together need not
MEET = """
    ISETP.LT.AND P0, PT, R0, {}, PT
    @P0 BRA 0x60
    NOP
    MOV R25, 0xffffffff
    YIELD
    BRA.CONV ~URZ, 0xb0
    MOV R20, 0xb0
    CALL.REL.NOINC 0xf0
    REDUX.SUM UR4, R0
    IMAD.U32 R1, RZ, RZ, UR4
    STG.E [R2.64], R1
    EXIT
    WARPSYNC.EXCLUSIVE R25
    MOV R21, RZ
    RET.REL.NODEC R20 0x0
"""


@pytest.mark.parametrize("lanes", Lanes)
def test_lanes_that_are_not_together_meet_and_the_others_need_not(lanes):
    for behind in (0, 10):
        x = torch.zeros(32, dtype=torch.int32)
        launch = ran(MEET.format(hex(behind)).strip(), x, schedule=Schedule(lanes=lanes))
        assert x.tolist() == [496] * 32
        assert behind or launch.counts[15] == 0  # WARPSYNC


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("votes", [0, 1, 64])
def test_a_barrier_votes(schedule, votes):
    for how, expected in (("AND", votes == 64), ("OR", votes > 0)):
        x = torch.full((64,), -1, dtype=torch.int32)
        program = (
            f"ISETP.LT.AND P0, PT, R0, {hex(votes)}, PT\nBAR.RED.{how}.DEFER_BLOCKING 0x0, P0\nB2R.RESULT RZ, P1\n"
        )
        program += "SEL R8, RZ, 0x1, !P1\nSTG.E [R2.64], R8"
        ran(program, x, threads=64, schedule=SCHEDULES[schedule])
        assert (x == int(expected)).all(), how


WINDOW = {80: "MOV R6, c[0x0][0x18]\nMOV R7, c[0x0][0x1c]\n", 90: "MOV R6, RZ\nS2R R7, SR_SWINHI\n"}


@pytest.mark.parametrize("architecture", [80, 90])
def test_an_address_of_any_memory_is_one_of_shared_or_of_global_memory(architecture):
    x = torch.arange(64, dtype=torch.int32)
    first = 1024 if architecture == 90 else 0
    program = WINDOW[architecture] + f"IADD3 R6, R6, R5, RZ\nIADD3 R6, R6, {hex(first)}, RZ\n"
    program += "LD.E R1, [R2.64]\nST.E [R6.64], R1\nBAR.SYNC 0x0\n"
    program += "LOP3.LUT R6, R6, 0x80, RZ, 0x3c, !PT\nLD.E R1, [R6.64]\nQSPC.E.S P0, RZ, [R6]\nQSPC.E.S P1, RZ, [R2]\n"
    program += "SEL R8, RZ, 0x100, !P0\nSEL R9, RZ, 0x200, !P1\nIADD3 R1, R1, R8, R9\nST.E [R2.64], R1"
    launch = ran(program, x, threads=64, shared_bytes=256, architecture=architecture)
    assert not launch.reports and torch.equal(x, (torch.arange(64).int() ^ 32) + 0x100)
    for line in ("LD.E R1, [R6.64+0x400]", "ST.E [R6.64+0x400], RZ"):
        with pytest.raises(core().Fault, match="a shared access beyond the end"):
            ran(program + "\n" + line, x, threads=64, shared_bytes=256, architecture=architecture)


# sums of the threads' words: `{}` adds R8 (and R9 above it) to shared memory at R20, then one thread stores the sum
SUM = """
    MOV R20, c[0x0][0x18]
    MOV R21, c[0x0][0x1c]
    STS.64 [RZ], RZ
    BAR.SYNC 0x0
    LDG.E R8, [R2.64]
    SHF.R.S32.HI R9, RZ, 0x1f, R8
    {}
    WARPSYNC 0xffffffff
    BAR.SYNC 0x0
    LDS.64 R10, [RZ]
    ISETP.NE.AND P1, PT, R0, RZ, PT
    @!P1 STG.E.64 [R2.64], R10
"""
SWAP = """LDS.64 R12, [RZ]
    IADD3 R14, P0, R12, R8, RZ
    IADD3.X R15, R13, R9, RZ, P0, !PT
    ATOMS.CAST.SPIN.64 R14, [RZ], R12, R14
    ISETP.NE.AND P0, PT, R14, 0x1, PT
    @P0 BRA 0x90"""
ADDITIONS = {
    "ATOMS.ADD RZ, [RZ], R8": 32,
    "ATOM.E.ADD.STRONG.GPU PT, RZ, [R20.64], R8": 32,
    SWAP: 64,
    "ATOMS.POPC.INC.32 RZ, [RZ]": 0,
}


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("addition", ADDITIONS)
def test_atomic_operations_in_shared_memory_add_up(addition, schedule):
    x = torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, 64).astype(np.int32))
    bits = ADDITIONS[addition]
    expected = int(x.long().sum()) if bits else 64
    launch = ran(SUM.format(addition).strip(), x, threads=64, shared_bytes=8, schedule=SCHEDULES[schedule])
    assert not launch.reports
    assert int(x[:2].view(torch.int64)) == (expected if bits == 64 else expected % 2**32)


def test_a_sum_of_64_bits_is_done_in_global_memory_alone():
    program = "MOV R6, c[0x0][0x18]\nMOV R7, c[0x0][0x1c]\nMOV R8, c[0x0][0x160]\nMOV R9, c[0x0][0x164]\nMOV R11, RZ\n"
    program += "MOV R10, R0\nATOM.E.ADD.64.STRONG.GPU P0, RZ, [R6.64], R10\n"
    program += "ATOM.E.ADD.64.STRONG.GPU P1, RZ, [R8.64], R10\n@P0 STG.E [R2.64+0x8], RZ\n@!P1 STG.E [R2.64+0x8], RZ"
    x = torch.full((9,), 2**40, dtype=torch.int64)
    ran(program, x, shared_bytes=8)
    assert x[0] == 2**40 + 496 and (x[1:] == 2**40).all()


def test_a_reduction_adds_to_global_memory():
    x = torch.arange(32, dtype=torch.int32)
    ran("REDG.E.ADD.STRONG.GPU [R2.64], R0", x)
    assert torch.equal(x, 2 * torch.arange(32).int())


# one warp does the first, another adds
PLAIN = "STS [RZ], RZ\nISETP.LT.AND P0, PT, R0, 0x20, PT\nBAR.SYNC 0x0\n{}\n@!P0 ATOMS.ADD RZ, [RZ], R0"
RACES = {
    "a word that is added to and read": (PLAIN.format("@P0 LDS R1, [RZ]"), "a warp (reads|writes) what another"),
    "a word that is stored and added to": (
        PLAIN.format("@P0 STS [RZ], RZ"), "(an atomic operation on what another wrote|two warps write)",
    ),
    "a word that nobody set": ("ATOMS.ADD RZ, [RZ], R0", "shared memory is read before it is written"),
}  # fmt: skip


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("name", RACES)
def test_atomic_operations_have_no_order_with_loads_and_stores(name, schedule):
    program, said = RACES[name]
    x = torch.zeros(64, dtype=torch.int32)
    reports = ran(program, x, threads=64, shared_bytes=8, schedule=SCHEDULES[schedule]).reports
    assert any(re.match(said, line) for line in reports), reports


def test_memory_is_only_read_or_holds_what_an_earlier_launch_wrote():
    x = torch.zeros(32, dtype=torch.int32)
    where = [x.data_ptr().to_bytes(8, "little")]

    def launched(line, region):
        function = assembled(HEAD + line + "\nEXIT", tensors=1)
        return function.run((1, 1, 1), 32, where, [region], SCHEDULES[0]).reports

    assert START == 0x160
    given = core().Region("an input", x.data_ptr(), 128, writable=False)
    with pytest.raises(core().Fault, match="a write to what is only read: an input at byte 0 of 128"):
        launched("STG.E [R2.64], R0", given)
    fresh = core().Region("workspace", x.data_ptr(), 128, written=False)
    assert any("workspace is read before it is written" in line for line in launched("LDG.E R1, [R2.64]", fresh))
    assert not launched("STG.E [R2.64], R0", fresh)
    assert not launched("LDG.E R1, [R2.64]", fresh)
