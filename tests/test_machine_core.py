# SPDX-License-Identifier: Apache-2.0
"""Machine code on the CPU: the decoder, single instructions against NumPy, and every check of memory, each seen red."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

MACHINE = Path(__file__).resolve().parent / "machine"
sys.path.insert(0, str(MACHINE))

import cubin  # noqa: E402
import emulator  # noqa: E402
from assembly import assembled, of_each_lane, run  # noqa: E402
from decode import DecodeError, Kind, Operand, instruction  # noqa: E402
from emulator import SCHEDULES, Lanes, Schedule, Warps  # noqa: E402
from machine_build import core, simt_build  # noqa: E402

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(simt_build.compiler() is None, reason="no C++ compiler"),
]
R, U, P = Kind.REGISTER, Kind.UNIFORM, Kind.PREDICATE


def test_a_line_becomes_typed_operands():
    line = instruction(0xA40, "@!P0 IADD3.X R103, R5.reuse, -UR5, RZ, P5, !PT")
    assert (line.opcode, line.modifiers, line.guard) == ("IADD3", ["X"], Operand(P, 0, negated=True))
    assert line.operands == [
        Operand(R, 103), Operand(R, 5), Operand(U, 5, negated=True), Operand(R, 255), Operand(P, 5),
        Operand(P, 7, negated=True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, operand",
    [
        ("LDS R0, [R17.X4+UR9+-0x40]", Operand(Kind.MEMORY, 17, -64, uniform=9, scale=4)),
        ("LDG.E R0, desc[UR12][R102.64+0x8]", Operand(Kind.MEMORY, 102, 8, wide=True)),
        ("MOV R0, c[0x3][0x1ac]", Operand(Kind.CONSTANT, 3, 0x1AC)),
        ("FADD R0, |R27|.reuse", Operand(R, 27, absolute=True)),
        ("HADD2.F32 R0, -R56.H1_H1", Operand(R, 56, negated=True, part=2)),
        ("FMUL R0, -3.814697265625e-06", Operand(Kind.IMMEDIATE, value=0xB6800000)),
        ("FADD R0, -INF", Operand(Kind.IMMEDIATE, value=0xFF800000)),
        ("DADD R0, 4", Operand(Kind.IMMEDIATE, value=0x40100000)),
        ("HFMA2.MMA R0, 1.875, 1", Operand(Kind.IMMEDIATE, value=0x3F803C00)),
        ("HFMA2.BF16_V2 R0, 1, 1", Operand(Kind.IMMEDIATE, value=0x3F803F80)),
        ("IADD3 R0, -0x1", Operand(Kind.IMMEDIATE, value=0xFFFFFFFF)),
        ("S2R R0, SR_CTAID.Y", Operand(Kind.NONE, value=2)),
        ("HGMMA R0, gdesc[UR8].tnspB", Operand(Kind.DESCRIPTOR, uniform=8, part=2)),
    ],
)
def test_an_operand_is_read(text, operand):
    assert instruction(0, text).operands[1] == operand


@pytest.mark.parametrize(
    "text", ["IADD3 R0, R1, 5", "LDG R0, [R1.64+R2.128]", "MOV R0, SR_CLOCKLO", "MOV R0, c[0x3][UR2]"]
)
def test_a_line_that_is_not_understood_is_named(text):
    with pytest.raises(DecodeError, match="R0, "):
        instruction(0, text)


@pytest.mark.parametrize(
    "text, named", [("BMMA R0, R1", "opcode BMMA"), ("IADD3.SAT R0, R1, R2, R3", "modifier SAT of IADD3")]
)
def test_what_is_not_modelled_is_named_before_it_runs(text, named):
    with pytest.raises(core().Fault, match=f"the {named} is not modelled: {text}"):
        assembled(text)


def words():
    """[32, 4] of every kind of word: random ones, and the ends of the ranges."""
    generator = np.random.default_rng(0)
    ends = np.array([0, 1, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    out = generator.integers(0, 2**32, (32, 4), np.uint32)
    out[16:] = generator.choice(ends, (16, 4))
    return out


def floats():
    """Bits of floats of every size: infinities, subnormals, NaN."""
    generator = np.random.default_rng(1)
    out = (generator.standard_normal((32, 4)) * 10.0 ** generator.integers(-9, 9, (32, 4))).astype(np.float32)
    out[20:] = generator.choice(np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, 3e9], np.float32), (12, 4))
    return out.view(np.uint32)


def u64(x):
    return x.astype(np.uint64)


def as_f(x):
    return x.view(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def clipped(x, low, high):
    return np.where(np.isnan(x), 0, np.clip(np.trunc(np.nan_to_num(x, posinf=1e30, neginf=-1e30)), low, high))


SEL = "SEL R9, RZ, 0x1, !P0"
INTEGERS = {
    "IADD3 R8, P0, R4, -R5, RZ; " + SEL: lambda a, b, c, d: (a - b, a >= b),
    "IADD3 R8, P0, R4, R5, RZ; IADD3.X R9, R6, ~R7, RZ, P0, !PT": lambda a, b, c, d: (
        a + b, c + ~d + (u64(a) + u64(b) >> 32).astype(np.uint32)
    ),
    "IMAD R8, R4, R5, -R6; IMAD.HI.U32 R9, R4, R5, RZ": lambda a, b, c, d: (a * b - c, u64(a) * u64(b) >> 32),
    "IMAD.WIDE R8, R4, R5, R6": lambda a, b, c, d: (
        a * b + c,
        (a.view(np.int32).astype(np.int64) * b.view(np.int32) + (u64(c) | u64(d) << 32).view(np.int64)) >> 32,
    ),
    "LEA R8, P0, R4, R5, 0x3; LEA.HI.X R9, R4, R6, R7, 0x3, P0": lambda a, b, c, d: (
        (a << 3) + b, (d << 3 | a >> 29) + c + (u64(a << 3) + u64(b) >> 32).astype(np.uint32)
    ),
    "LEA R8, P0, -R4, R5, 0x1e; " + SEL: lambda a, b, c, d: (b - (a << 30), b >= a << 30),
    "LEA.HI.X.SX32 R8, R4, R5, 0x2, PT; SGXT R9, R4, 0x5": lambda a, b, c, d: (
        (a.view(np.int32).astype(np.int64) << 2 >> 32) + b + 1, (a << 27).view(np.int32) >> 27
    ),
    "SHF.R.U64 R8, R4, 0xd, R5; SHF.L.U64.HI R9, R4, 0xd, R5": lambda a, b, c, d: (
        (u64(a) | u64(b) << 32) >> 13, (u64(a) | u64(b) << 32) << 13 >> 32
    ),
    "SHF.R.S32.HI R8, RZ, 0x1f, R4; SHF.L.U32 R9, R4, 0x21, RZ": lambda a, b, c, d: (
        a.view(np.int32) >> 31, 0 * a
    ),
    "LOP3.LUT P0, R8, R4, R5, R6, 0x96, !PT; " + SEL: lambda a, b, c, d: (a ^ b ^ c, (a ^ b ^ c) != 0),
    "PRMT R8, R4, 0x7632, R5; PRMT R9, R4, 0x8880, RZ": lambda a, b, c, d: (
        a >> 16 | b & 0xFFFF0000, (a & 255) | np.where(a & 128, 0xFFFFFF00, 0).astype(np.uint32)
    ),
    "ISETP.GE.U32.AND P0, PT, R4, R6, PT; ISETP.GE.AND.EX P0, PT, R5, R7, PT, P0; MOV R8, RZ; " + SEL:
        lambda a, b, c, d: (0 * a, (u64(a) | u64(b) << 32).view(np.int64) >= (u64(c) | u64(d) << 32).view(np.int64)),
    "IMNMX R8, R4, R5, PT; IMNMX.U32 R9, R4, R5, !PT": lambda a, b, c, d: (
        np.minimum(a.view(np.int32), b.view(np.int32)), np.maximum(a, b)
    ),
    "FLO.U32 R8, R4; POPC R9, R4": lambda a, b, c, d: (
        [int(v).bit_length() - 1 for v in a], [int(v).bit_count() for v in a]
    ),
    "I2F R8, R4; I2F.U32.RP R9, R4": lambda a, b, c, d: (
        bits(a.view(np.int32).astype(np.float32)),
        [bits(f if int(f) >= int(v) else np.nextafter(f, np.float32(np.inf))) for v in a for f in [np.float32(v)]],
    ),
}  # fmt: skip
FLOATS = {
    "FADD R8, R4, -R5; FMUL R9, R4, |R5|": lambda a, b, c, d: (a - b, a * np.abs(b)),
    "FFMA R8, R4, R5, R6; FMUL.FTZ R9, R4, 1": lambda a, b, c, d: (
        a.astype(np.float64) * b + c, np.where(np.abs(a) < 2**-126, np.copysign(0, a), a)
    ),
    "FMUL.D2 R8, R4, R5; FMUL.M8 R9, R4, R5": lambda a, b, c, d: (
        a.astype(np.float64) * b / 2, a.astype(np.float64) * b * 8
    ),
    "FMNMX R8, R4, R5, PT; FMNMX.NAN R9, R4, R5, !PT": lambda a, b, c, d: (np.fmin(a, b), np.maximum(a, b)),
    "FSETP.GTU.AND P0, PT, R4, R5, PT; FSEL R8, -R6, R7, P0; MOV R9, RZ": lambda a, b, c, d: (
        np.where(~(a <= b), -c, d), 0 * np.nan_to_num(a, posinf=0, neginf=0)
    ),
    "F2F.F64.F32 R8, R4": lambda a, b, c, d: a.astype(np.float64),
    "MUFU.EX2 R8, R4; MUFU.RCP R9, R4": lambda a, b, c, d: (
        np.exp2(a.astype(np.float64)), 1 / np.where(np.abs(a) < 2**-126, np.copysign(0, a), a)
    ),
}  # fmt: skip


@pytest.mark.parametrize("lines", INTEGERS)
def test_an_integer_instruction_does_what_numpy_does(lines):
    inputs = words()
    got = of_each_lane(lines, torch.from_numpy(inputs.view(np.int32)))
    for k, want in enumerate(INTEGERS[lines](*inputs.T)):
        want = np.asarray(want).astype(np.int64).astype(np.uint64).astype(np.uint32)
        np.testing.assert_array_equal(got[:, k].numpy().view(np.uint32), want)


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("lines", FLOATS)
def test_a_float_instruction_rounds_as_numpy_does(lines):
    inputs = floats()
    got = of_each_lane(lines, torch.from_numpy(inputs.view(np.int32))).numpy()
    want = FLOATS[lines](*inputs.view(np.float32).T)
    if isinstance(want, tuple):  # flushed: of the special function unit
        got, want = got.view(np.float32), np.stack([np.asarray(w).astype(np.float32) for w in want], 1)
        want = np.where(np.abs(want) < 2**-126, np.copysign(0, want), want) if "MUFU" in lines else want
    else:
        got = got.view(np.float64)[:, 0]
    np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_conversions_saturate_and_halves_round_once():
    inputs = floats()
    a, b, *_ = inputs.view(np.float32).T
    got = of_each_lane("F2I.TRUNC.NTZ R8, R4; F2I.U32.TRUNC.NTZ R9, R4", torch.from_numpy(inputs.view(np.int32)))
    np.testing.assert_array_equal(got[:, 0].numpy(), clipped(a.astype(np.float64), -(2**31), 2**31 - 1))
    np.testing.assert_array_equal(got[:, 1].numpy().view(np.uint32), clipped(a.astype(np.float64), 0, 2**32 - 1))
    got = of_each_lane("F2FP.BF16.PACK_AB R8, R5, R4; F2FP.PACK_AB R9, R5, R4", torch.from_numpy(inputs.view(np.int32)))
    for column, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        want = torch.tensor(np.stack([a, b], 1)).to(dtype)
        assert torch.equal(got[:, column].contiguous().view(dtype).view(32, 2).nan_to_num(7), want.nan_to_num(7))


def test_a_shuffle_moves_within_its_segment():
    inputs = torch.arange(128, dtype=torch.int32).view(32, 4)
    got = of_each_lane("SHFL.BFLY PT, R8, R4, 0x2, 0x1f; SHFL.UP PT, R9, R4, 0x1, 0x1800", inputs) // 4
    lanes = torch.arange(32)
    assert torch.equal(got[:, 0], (lanes ^ 2).int())
    assert torch.equal(got[:, 1], torch.where(lanes % 8 == 0, lanes, lanes - 1).int())


HEAD = "S2R R0, SR_TID.X\nIMAD.WIDE R2, R0, 0x4, c[0x0][0x160]\nMOV R4, R0\nSHF.L.U32 R5, R0, 0x2, RZ\n"
TAIL = "\nEXIT"
# program, threads, blocks, what is said
FAULTS = {
    "out of bounds": ("STG.E [R2.64+0x4], R0", 32, 1, "an access outside of every argument; near tensor 0 at byte"),
    "misaligned": ("LDG.E R1, [R2.64+0x2]", 32, 1, "a misaligned access"),
    "beyond shared memory": ("STS [R5+0x400], R0", 32, 1, "beyond the end: shared memory at byte 1024 of 1024"),
    "a jump away": ("BRA 0x4000", 32, 1, "where no instruction is"),
    "a barrier that some lanes never reach": (
        "ISETP.LT.AND P0, PT, R0, 0x10, PT\nBSSY B0, 0xd0\n@P0 BRA 0x80\nBSYNC B0\nBAR.SYNC 0x0\nBRA 0x60", 32, 1,
        "a deadlock",
    ),
}  # fmt: skip
REPORTS = {
    "an uninitialised shared word": ("LDS R1, [R5]", 32, 1, "shared memory is read before it is written"),
    "no barrier": (
        "STS [R5], R0\nLOP3.LUT R6, R5, 0x80, RZ, 0x3c, !PT\nLDS R1, [R6]", 64, 1,
        "a warp reads what another wrote, no barrier between",
    ),
    "a word read before all have read it": (
        "STS [R5], R0\nBAR.SYNC 0x0\nLOP3.LUT R6, R5, 0x80, RZ, 0x3c, !PT\nLDS R1, [R6]\nSTS [R5], RZ", 64, 1,
        "a warp writes what another reads, no barrier between",
    ),
    "two warps, one word": ("STS [RZ], R0", 64, 1, "two warps write different values"),
    "two lanes, one word": ("STS [RZ], R0", 32, 1, "two lanes store different values to one address"),
    "two blocks, one word": ("STG.E [R2.64], R0", 32, 2, "two blocks write tensor 0"),
    "a block adds to another's sum": (
        "LDG.E R1, [R2.64]\nIADD3 R1, R1, 0x1, RZ\nSTG.E [R2.64], R1", 32, 2, "a block reads what another wrote",
    ),
    "a copy that nobody waited for": (
        "LDGSTS.E [R5], [R2.64]\nLDGDEPBAR\nDEPBAR.LE SB0, 0x1\nLDS R1, [R5]", 32, 1,
        "while an asynchronous copy into it is in flight",
    ),
    "the wrong lane": ("@!P6 SHFL.IDX PT, R1, R0, 0x1f, 0x1f", 32, 1, "a shuffle from a lane that does not take part"),
    "one lane's register for all": ("R2UR UR4, R0", 32, 1, "R2UR of a register that differs between lanes"),
    "a barrier within a branch": (
        "ISETP.LT.AND P0, PT, R0, 0x10, PT\n@P0 BRA 0x80\nBAR.SYNC 0x0\nEXIT\nBAR.SYNC 0x0", 32, 1,
        "a barrier is reached by part of a warp",
    ),
}  # fmt: skip


def planted(program, threads, blocks, schedule):
    if "P6" in program:
        program = "ISETP.GT.AND P6, PT, R0, 0xf, PT\n" + program
    function = assembled(HEAD + program + TAIL, shared_bytes=1024, tensors=1)
    return run(
        function, torch.zeros(threads, dtype=torch.int32), grid=(blocks, 1, 1), threads=threads, schedule=schedule
    )


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("name", FAULTS)
def test_a_launch_that_cannot_go_on_says_why(name, schedule):
    *program, said = FAULTS[name]
    with pytest.raises(core().Fault, match=said):
        planted(*program, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("name", REPORTS)
def test_a_planted_fault_is_reported_under_every_schedule(name, schedule):
    *program, said = REPORTS[name]
    reports = planted(*program, SCHEDULES[schedule]).reports
    assert any(said in line for line in reports), reports


@pytest.mark.parametrize("schedule", range(5))
def test_what_is_in_order_is_not_reported(schedule):
    exchange = "LDGSTS.E [R5], [R2.64]\nLDGDEPBAR\nDEPBAR.LE SB0, 0x0\nBAR.SYNC 0x0\n"
    exchange += "LOP3.LUT R6, R5, 0x80, RZ, 0x3c, !PT\nLDS R1, [R6]\nBAR.SYNC 0x0\nSTS [R5], R1\nSTG.E [R2.64], R1"
    function = assembled(HEAD + exchange + TAIL, shared_bytes=1024, tensors=1)
    x = torch.arange(64, dtype=torch.int32)
    launch = run(function, x, threads=64, schedule=SCHEDULES[schedule])
    assert not launch.reports and torch.equal(x, torch.arange(64).int() ^ 32)


def test_diverged_lanes_go_in_the_order_of_the_schedule():
    program = HEAD + "ISETP.LT.AND P0, PT, R0, 0x10, PT\n@P0 BRA 0x80\nSTG.E [R8.64], R0\nEXIT\nSTG.E [R8.64], R0\nEXIT"
    last = {}
    for lanes in Lanes:
        x = torch.zeros(1, dtype=torch.int32)
        function = assembled(program.replace("MOV R4, R0", "IMAD.WIDE R8, RZ, 0x4, c[0x0][0x160]"), tensors=1)
        run(function, x, schedule=Schedule(lanes=lanes, warps=Warps.RANDOM))
        last[lanes] = int(x)
    # the lanes that jumped are at the higher pc
    assert (last[Lanes.LOWEST], last[Lanes.HIGHEST]) == (15, 31) and last[Lanes.RANDOM] in (15, 31)


BRANCHES = """
    ISETP.LT.AND P0, PT, R0, 0x10, PT
    LOP3.LUT P1, RZ, R0, 0x1, RZ, 0xc0, !PT
    @P0 BRA 0xd0
    BSSY B0, 0xa0
    @P1 BRA 0xa0
    NOP
    BSYNC B0
    SHFL.BFLY PT, R1, R0, 0x1, 0x1f
    BRA 0x120
    BSSY B0, 0x100
    @P1 BRA 0x100
    NOP
    BSYNC B0
    SHFL.BFLY PT, R1, R0, 0x1, 0x1f
    STG.E [R2.64], R1
    EXIT
"""


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lanes", Lanes)
def test_two_branches_converge_each_by_itself_on_one_barrier(lanes, seed):
    x = torch.zeros(32, dtype=torch.int32)
    launch = run(assembled(HEAD.strip() + BRANCHES, tensors=1), x, schedule=Schedule(lanes=lanes, seed=seed))
    assert not launch.reports and torch.equal(x, torch.arange(32).int() ^ 1)


PATHS = """
    ISETP.LT.AND P0, PT, R0, {}, PT
    @P0 BRA 0x70
    NOP
    MOV R25, 0xffffffff
    UMOV UR6, 0xffffffff
    BRA.DIV {}
    SHFL.BFLY PT, R1, R0, 0x10, 0x1f
    BRA 0xf0
    {}
    SHFL.BFLY PT, R1, R0, 0x10, 0x1f
    ENDCOLLECTIVE
    STG.E [R2.64], R1
    EXIT
"""
FAST, SLOW = 0xA0 // 16, 0xD0 // 16


@pytest.mark.parametrize(
    "division, meeting", [("~URZ, 0xc0", "WARPSYNC R25"), ("UR6, 0xc0", "WARPSYNC.COLLECTIVE R25, 0xf0")]
)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lanes", Lanes)
def test_only_diverged_lanes_take_the_path_on_which_they_meet(lanes, seed, division, meeting):
    for jumping in (32, 16):
        x = torch.zeros(32, dtype=torch.int32)
        function = assembled(HEAD.strip() + PATHS.format(hex(jumping), division, meeting), tensors=1)
        launch = run(function, x, schedule=Schedule(lanes=lanes, seed=seed))
        assert not launch.reports and torch.equal(x, torch.arange(32).int() ^ 16)
        paths = (launch.counts[FAST], launch.counts[SLOW])
        # half of the lanes go ahead: who is behind goes first, or last
        diverges = {Lanes.LOWEST: [(1, 0)], Lanes.HIGHEST: [(0, 1)], Lanes.RANDOM: [(1, 0), (0, 1)]}[lanes]
        assert paths in (diverges if jumping == 16 else [(1, 0)])


def test_a_skipped_instruction_does_nothing():
    function = assembled(HEAD + "STG.E [R2.64], R0" + TAIL, tensors=1)
    x = torch.full((32,), -1, dtype=torch.int32)
    function.program.set_skipped(0x40, True)
    run(function, x)
    assert (x == -1).all()
    function.program.set_skipped(0x40, False)
    run(function, x)
    assert torch.equal(x, torch.arange(32).int())


def test_what_cannot_be_executed_is_refused_in_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(cubin.MachineError, match="compiled for sm_75: what is modelled is sm_80, sm_86, sm_90"):
        assembled("EXIT", architecture=75)
    with pytest.raises(cubin.MachineError, match="a grid of 16777216 blocks is too large to emulate"):
        run(assembled("EXIT", tensors=0), grid=(4096, 4096, 1))
    monkeypatch.setattr(emulator, "MOST_STEPS", 1000)
    with pytest.raises(core().Fault, match="more than 1000 warp instructions: the grid is too large to emulate"):
        run(assembled("BRA 0x0", tensors=0))
    with pytest.raises(cubin.MachineError, match="it does not begin like a 64-bit ELF file"):
        cubin.Cubin("kernel", b"nothing")
    monkeypatch.setattr(cubin.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cubin.MachineError, match="cuobjdump is neither in the triton package nor on the PATH: pip"):
        cubin.tool("cuobjdump")


def test_what_the_disassembler_does_not_know_is_an_error(monkeypatch, tmp_path):
    refusing = tmp_path / "cuobjdump"
    refusing.write_text("#!/bin/sh\necho 'cuobjdump fatal : unknown architecture sm_999' >&2; exit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(cubin, "tool", lambda name: str(refusing))
    monkeypatch.setattr(cubin, "KEPT", tmp_path)
    assert subprocess.run([str(refusing)], capture_output=True).returncode == 1
    with pytest.raises(cubin.MachineError, match="cannot read this kernel: .* unknown architecture sm_999"):
        cubin.disassembly(b"anything", "kernel")
