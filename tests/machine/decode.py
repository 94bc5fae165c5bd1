# SPDX-License-Identifier: Apache-2.0
"""The text of `cuobjdump -sass` -> instructions with typed operands. What a line does is the table's, core/semantics.h.

    /*0a40*/  @!P0 IADD3.X R103, R5, -UR5, RZ, P5, !PT ;

is `IADD3` with the modifier `X`, the guard `!P0` and six operands. A text that is not understood is a `DecodeError`.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from functools import cache
from typing import NamedTuple


class DecodeError(ValueError):
    """A line of the disassembly that this decoder does not know."""


Kind = IntEnum(
    "Kind", "REGISTER UNIFORM IMMEDIATE CONSTANT PREDICATE UNIFORM_PREDICATE MEMORY DESCRIPTOR NONE", start=0
)
ZERO_REGISTER, ZERO_UNIFORM, TRUE = 255, 63, 7
SPECIAL = ("SR_TID.X", "SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z", "SR_LANEID", "SRZ", "SR_CgaCtaId", "SR_SWINHI")
PARTS = {"H0": 1, "H0_H0": 1, "H1": 2, "H1_H1": 2, "B0": 4, "B1": 5, "B2": 6, "B3": 7}
JUMPS = ("BRA", "BRX", "CALL", "BSSY", "RET")  # their last number is an address in the function, or a distance
NO_SCOREBOARD = 7
PACKED = ("HADD2", "HMUL2", "HFMA2", "HMNMX2", "VHMNMX")  # pairs of halves


class Operand(NamedTuple):
    kind: Kind
    index: int = 0  # register, predicate, constant bank or convergence barrier
    value: int = 0  # immediate, offset of a constant or an address, number of a special register
    negated: bool = False
    absolute: bool = False
    inverted: bool = False
    part: int = 0  # of a register: see PARTS; of a descriptor: 1 the first matrix is transposed, 2 the second
    uniform: int = ZERO_UNIFORM  # of an address: added to it
    scale: int = 1  # of an address: factor of its register
    wide: bool = False  # of an address: a pair of registers
    added: int = ZERO_REGISTER  # of a constant: a register added to its offset


class Control(NamedTuple):
    """What the compiler tells the scheduler: the upper bits of an instruction's second word, from bit 41."""

    stall: int = 1  # cycles before the next instruction of the warp
    yields: bool = False  # another warp goes first, if one can
    writes: int = NO_SCOREBOARD  # counts up now, and down when the result is written
    reads: int = NO_SCOREBOARD  # counts up now, and down when the operands are read
    waits: int = 0  # a bit for each scoreboard that has to be at zero

    @classmethod
    def of(cls, word: int) -> Control:
        bits = word >> 41
        return cls(bits & 15, not bits >> 4 & 1, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)

    def word(self) -> int:
        return (self.stall | (not self.yields) << 4 | self.writes << 5 | self.reads << 8 | self.waits << 11) << 41


class Instruction(NamedTuple):
    pc: int
    text: str
    opcode: str
    modifiers: list[str]
    guard: Operand | None
    operands: list[Operand]
    target: int
    control: Control = Control()


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each function of a disassembly."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            code = found.setdefault(name[1], [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;?\s+/\* 0x([0-9a-f]+)", line):
            code.append(instruction(int(m[1], 16), m[2], int(m[3], 16)))
        elif code and (m := re.match(r"\s+/\* (0x[0-9a-f]{16}) \*/", line)):  # the second word, on a line of its own
            code[-1] = code[-1]._replace(control=Control.of(int(m[1], 16)))
    return found


def instruction(pc: int, text: str, word: int = 0) -> Instruction:
    """`word`: the first of the two that encode it."""
    guard, name, rest = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", text).groups()
    opcode, *modifiers = name.split(".")
    if (
        word and opcode not in PACKED
    ):  # which NaN, the text does not say: it may be the upper half of an infinite double
        rest = re.sub(r"[+-]?[QS]NAN", hex(word >> 32), rest)
    texts = _split(re.sub(r"\{[^}]*\}|\.reuse\b", "", rest))
    target = 0
    if opcode in JUMPS and texts:
        *before, last = texts.pop().split()  # RET.REL.NODEC R18 0x0, BRX R10 -0x680
        texts, target = [*texts, *before], int(last, 16) & 0xFFFFFFFF
    try:
        operands = [_operand(t, _format(opcode, modifiers)) for t in texts]
        wanted = _operand(guard, None) if guard else None
    except DecodeError as error:
        raise DecodeError(f"{error}: {text}") from None
    return Instruction(pc, text, opcode, modifiers, wanted, _paired(operands) if opcode in PACKED else operands, target)


def _split(text: str) -> list[str]:
    """At commas; brackets hold none."""
    return [word for word in map(str.strip, text.split(",")) if word]


def _paired(operands: list[Operand]) -> list[Operand]:
    """Two immediates, upper half first, are one operand."""
    out = []
    for operand in operands:
        if operand.kind is Kind.IMMEDIATE and out and out[-1].kind is Kind.IMMEDIATE:
            operand = operand._replace(value=out.pop().value << 16 | operand.value)
        out.append(operand)
    return out


def _format(opcode: str, modifiers: list[str]) -> str | None:
    """How a decimal immediate of an instruction is stored."""
    if opcode in PACKED:
        return "bf16" if "BF16_V2" in modifiers or "BF16" in modifiers else "fp16"
    if opcode[0] == "D" and opcode != "DEPBAR":
        return "fp64"
    return "fp32" if opcode == "MUFU" or re.match(r"F(?!LO)", opcode) else None


def _number(text: str, form: str | None) -> int:
    if hexadecimal := re.fullmatch(r"(-?)(0x[0-9a-f]+)", text):
        return int("".join(hexadecimal.groups()), 16) & 0xFFFFFFFF
    value = float(text.replace("QNAN", "nan"))
    if form is None:
        raise DecodeError(f"a decimal number, {text}, where none is expected")
    if form == "fp64":  # the upper half of a double
        return struct.unpack("<q", struct.pack("<d", value))[0] + (1 << 31) >> 32 & 0xFFFFFFFF
    if form == "fp16":
        return int.from_bytes(struct.pack("<e", value), "little")
    return int.from_bytes(struct.pack("<f", value), "little") >> (16 if form == "bf16" else 0)


def _register(name: str) -> tuple[Kind, int]:
    if name.startswith("U"):
        return Kind.UNIFORM, ZERO_UNIFORM if name == "URZ" else int(name[2:])
    return Kind.REGISTER, ZERO_REGISTER if name == "RZ" else int(name[1:])


REGISTER = r"U?R(?:\d+|Z)"


@cache
def _operand(text: str, form: str | None) -> Operand:
    if m := re.fullmatch(r"(!?)(U?)P(\d|T)", text):
        kind = Kind.UNIFORM_PREDICATE if m[2] else Kind.PREDICATE
        return Operand(kind, TRUE if m[3] == "T" else int(m[3]), negated=bool(m[1]))
    if text in SPECIAL:
        return Operand(Kind.NONE, value=SPECIAL.index(text))
    if m := re.fullmatch(r"(?:B|SB|gsb)(\d+)|U?PR", text):  # barriers; all predicates
        return Operand(Kind.NONE, int(m[1] or 0))
    if m := re.fullmatch(r"gdesc\[UR(\d+)\](\.tnspA)?(\.tnspB)?", text):
        return Operand(Kind.DESCRIPTOR, uniform=int(m[1]), part=bool(m[2]) + 2 * bool(m[3]))
    if m := re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", text):
        return _address(m[1])
    if re.fullmatch(r"[+-]?(0x[0-9a-f]+|[\d.]+(e[+-]?\d+)?|INF|QNAN)", text):
        return Operand(Kind.IMMEDIATE, value=_number(text, form))
    m = re.fullmatch(rf"(-?)(~?)(\|?)({REGISTER}|c\[.*\])(?:\.(\w+))?(\|?)(?:\.(\w+))?", text)
    if not m or m[3] != m[6] or (m[5] or m[7] or "H0") not in PARTS:
        raise DecodeError(f"an operand that is not known, {text}")
    signs = dict(negated=bool(m[1]), inverted=bool(m[2]), absolute=bool(m[3]), part=PARTS.get(m[5] or m[7], 0))
    if constant := re.fullmatch(r"c\[(0x[0-9a-f]+)\]\[(R\d+|RZ)?\+?(0x[0-9a-f]+)?\]", m[4]):
        bank, added, offset = constant.groups()
        added = _register(added)[1] if added else ZERO_REGISTER
        return Operand(Kind.CONSTANT, int(bank, 16), int(offset or "0", 16), **signs, added=added)
    if m[4][0] == "c":
        raise DecodeError(f"a constant with an index of this kind, {text}")
    return Operand(*_register(m[4]), **signs)


def _address(text: str) -> Operand:
    """[R17.X4+UR9+0x40]: the sum of a register (a pair with .64) times a scale, a uniform register and an offset."""
    out = Operand(Kind.MEMORY, ZERO_REGISTER)
    for sign, term in re.findall(r"([+-]*)([^+-]+)", text):
        if re.fullmatch(r"0x[0-9a-f]+", term):
            out = out._replace(value=out.value + int(term, 16) * (-1 if "-" in sign else 1))
            continue
        m = re.fullmatch(rf"({REGISTER})(?:\.(64|U32))?(?:\.X(4|8|16))?", term)
        if not m or "-" in sign:
            raise DecodeError(f"an address that is not known, [{text}]")
        kind, index = _register(m[1])
        if kind is Kind.UNIFORM:
            out = out._replace(uniform=index)
        else:
            out = out._replace(index=index, wide=m[2] == "64", scale=int(m[3] or 1))
    return out
