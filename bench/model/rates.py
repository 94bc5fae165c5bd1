# SPDX-License-Identifier: Apache-2.0
"""What instructions cost on the machine that is modelled, an H200: the one table of latencies and rates.

Nothing here has been measured by this project: README.md says how it will be. Sources, and what of them was looked up:
[guide] CUDA C++ Programming Guide, throughput of native arithmetic instructions, compute capability 9.0. Seen as
        others quote the edition of CUDA 12.6: 128 float32, 256 half, 64 integer additions, logic, shifts and
        comparisons, 16 conversions, 32 shuffles. [guide?]: not seen again, from memory or as of capability 8.0
[sheet] data sheets of H100 and H200, seen: multiprocessors, bytes, and the peaks of FP64, FP32, TF32 and FP16 without
        sparsity, over their clocks. [sheet?]: not seen again
[luo?]  Luo et al. 2024, arXiv 2402.13499, and 2025, arXiv 2501.12084: measured on an H100. From memory; their tables
        were not seen. Others' GH200: L1 40, L2 281, DRAM 690 cycles
[codes] the stall counts that the compiler writes for these instructions
[none]  assumed
Latencies of instructions without a scoreboard are in their code's stall counts and need no entry.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

PIPES = ("alu", "heavy", "lite", "fp64", "xu", "uniform", "tensor", "mio", "branch")  # of each of the four partitions
# cycles.h's Effect
Effect = IntEnum("Effect", "NONE SHARED LOAD STORE COPY COMMIT WAIT BARRIER PRODUCT PRODUCT_WAIT", start=0)


class Cost(NamedTuple):
    opcodes: str
    pipes: str  # any of them takes it; none: it is only issued
    interval: float  # cycles until the pipe takes another
    latency: int = 1  # until the result can be read, where a scoreboard waits for it
    effect: Effect = Effect.NONE


COSTS = (
    # 32 lanes in two halves of 16, of which one multiplies integers [guide: 128 a cycle and multiprocessor; guide?: 64]
    Cost("FADD FMUL FFMA HADD2 HMUL2 HFMA2", "heavy lite", 2),
    Cost("IMAD", "heavy", 2),
    # 16 lanes [guide: 64]
    Cost("IADD3 LEA SHF SEL ISETP IMNMX VIADD VIMNMX VIMNMX3 VIADDMNMX IABS PRMT", "alu", 2),
    Cost("SGXT BMSK LOP3 PLOP3 MOV P2R R2P", "alu", 2),
    Cost("FSETP FSEL FMNMX HMNMX2 VHMNMX FCHK F2FP I2FP VOTE CS2R", "alu", 2),
    Cost("DADD DMUL DFMA DSETP", "fp64", 2, 16),  # [sheet: 64; latency: none]
    # 4 lanes [guide: 16 conversions; guide?: 16 functions]; latency [none], between what papers say of its functions
    Cost("MUFU F2I I2F F2F FRND FLO POPC BREV", "xu", 8, 22),
    # once for a warp; rate [none]
    Cost("UMOV UIMAD UIADD3 ULEA USHF USEL UISETP UIMNMX UPRMT USGXT ULOP3 UPLOP3 UP2UR UBMSK VOTEU", "uniform", 2, 12),
    Cost("ULDC UFLO UPOPC UBREV R2UR", "uniform", 2, 12),
    # through the queue before shared memory and L1, which 32 lanes of a multiprocessor pass in a cycle [guide]
    Cost("SHFL", "mio", 2, 24, Effect.SHARED),  # latency [none]
    Cost("LDS", "mio", 2, 29, Effect.SHARED),  # [luo?]
    Cost("LDSM", "mio", 2, 33, Effect.SHARED),  # [none]
    Cost("STS STSM", "mio", 2, 20, Effect.SHARED),  # [none]
    Cost("ATOMS", "mio", 2, 29, Effect.SHARED),  # [none]
    Cost("LDG LD", "mio", 2, effect=Effect.LOAD),  # latencies: RATES
    Cost("STG ST RED REDG", "mio", 2, effect=Effect.STORE),
    Cost("ATOMG ATOM", "mio", 2, effect=Effect.LOAD),
    Cost("LDL STL", "mio", 2, 40, Effect.SHARED),  # a lane's stack, as if always in L1 [luo?]
    Cost("LDGSTS", "mio", 2, effect=Effect.COPY),
    Cost("LDC S2R S2UR B2R QSPC", "mio", 2, 28),  # [none]
    Cost("REDUX", "mio", 8, 30),  # [guide?: 16; latency: none]
    Cost("LDGDEPBAR", "mio", 2, effect=Effect.COMMIT),
    Cost("DEPBAR", "", 1, effect=Effect.WAIT),
    Cost("BRA BRX CALL RET EXIT BSSY BSYNC BREAK WARPSYNC ENDCOLLECTIVE", "branch", 2),  # [none]
    Cost("NOP YIELD MEMBAR FENCE", "", 1),
    Cost("BAR", "branch", 2, effect=Effect.BARRIER),
    Cost("HMMA", "tensor", 6.5, 33),  # interval: tensor()
    Cost("HGMMA", "tensor", 32, 16, Effect.PRODUCT),  # latency after the pipe has taken it: 18 of the smallest [luo?]
    Cost("WARPGROUP", "", 1, effect=Effect.PRODUCT_WAIT),
)


class Rates(NamedTuple):
    """cycles.h's Rates."""

    multiprocessors: int = 132  # [sheet]
    l2_bytes: float = 5120 / 132  # of one multiprocessor a cycle [sheet?: A100's 5,120 a cycle; H200: none]
    dram_bytes: float = 4.3e12 / 132 / 1.75e9  # 4.8 TB/s [sheet], of which copies reach nine tenths [none]
    l1: int = 40  # [luo?]
    l2: int = 263  # [luo?]
    dram: int = 479  # [luo?]
    queue: int = 24  # [none]
    operands_read: int = 8  # [none]
    barrier: int = 20  # [none]
    branch: int = 6  # [none]
    start: int = 200  # [none]


class Machine(NamedTuple):
    name: str = "H200, 132 multiprocessors at 1.75 GHz"
    clock: float = 1.75e9
    rates: Rates = Rates()
    # of a multiprocessor [sheet, registers: guide?]
    warps: int = 64
    blocks: int = 32
    registers: int = 65536  # given to warps in pieces of 256, a quarter of them to each partition
    shared_bytes: int = 228 << 10  # with 1 KB for each block
    l1_and_shared_bytes: int = 256 << 10
    # products of a multiprocessor in a cycle: what the arithmetic floor is made from [sheet]
    float64: int = 64
    float32: int = 128
    tf32: int = 1024
    float16: int = 2048
    special: int = 16  # reciprocals, exponentials and their like


H200 = Machine()
MMA_OF_PEAK = 0.63  # of the rate of sm_90's tensor cores that mma instructions reach [luo?]; of wgmma: all


def tensor(opcode: str, modifiers: list[str]) -> float:
    """Cycles that a product takes its partition's tensor core, which makes 512 products of halves in one."""
    tf32 = 2 if "TF32" in modifiers else 1
    if opcode == "HGMMA":
        _, columns, depth = map(int, modifiers[0].split("x"))
        return 16 * columns * depth * tf32 / 512
    depth = {"16816": 16, "1688": 8, "1684": 4}[modifiers[0]]
    return 16 * 8 * depth * tf32 / 512 / MMA_OF_PEAK
