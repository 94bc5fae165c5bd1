# SPDX-License-Identifier: Apache-2.0
"""One kernel in one configuration, as ahead-of-time compilation needs it: what a family's `signatures.py` lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

ALL = (80, 90, 100)
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64", "uint8": "*u8"}
POINTERS |= {"int64": "*i64", "int32": "*i32"}


class CompileCase(NamedTuple):
    name: str
    kernel: object
    signature: dict
    attributes: dict  # divisibility by 16 of pointers and widths, as a launch finds it
    always: dict  # what of that no caller's size takes away: of pointers, and of numbers that a launch rounds up
    constants: dict
    odd: dict  # constants that a launch takes instead where sizes do not divide by 16
    warps: int
    stages: int
    tensor_cores: bool  # half-precision products: on sm_90 they must become wgmma
    architectures: tuple[int, ...]  # compute capabilities this configuration is chosen on
    registers: int | None = None  # at most so many a thread, as a launch asks whose loads are wide

    def unaligned(self) -> CompileCase:
        """The same for sizes and strides that do not divide by 16."""
        return self._replace(attributes=self.always, constants=self.constants | self.odd, registers=None)


def compile_case(
    name: str,
    kernel,
    type_of: Callable[[str], str],
    aligned: tuple[str, ...],
    warps: int,
    stages: int,
    tensor_cores: bool = False,
    architectures: tuple[int, ...] = ALL,
    odd: dict | None = None,
    registers: int | None = None,
    **given,
) -> CompileCase:
    """type_of(argument) is a dtype's name for a pointer, else a Triton type; pointers and `aligned` divide by 16.

    given: constants of the kernel, or what a tuple argument holds: types as type_of gives them (":16" where a number
    divides by 16, ":rounded" where a launch sees to that), constants as tl.constexpr or None. odd: constants of a
    launch whose numbers do not divide.
    """
    types, attributes, always, constants = {}, {}, {}, {}

    def typed(path: tuple, value):
        """The type at a place of the signature; its attribute and its constant go on the lists."""
        if isinstance(value, tuple):
            parts = [typed((*path, i), part) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if not isinstance(value, str):
            constants[path] = getattr(value, "value", value)
            return "constexpr"
        kind, _, divides = value.partition(":")
        if divides or kind in POINTERS:
            attributes[path] = [["tt.divisibility", 16]]
            if divides != "16":
                always[path] = attributes[path]
        return POINTERS.get(kind, kind)

    for i, argument in enumerate(kernel.arg_names):
        if argument in given and isinstance(given[argument], tuple):
            types[argument] = typed((i,), given[argument])
        elif argument in given:
            types[argument], constants[i,] = "constexpr", given[argument]
        else:
            types[argument] = typed((i,), type_of(argument) + ":16" * (argument in aligned))
    odd = {(kernel.arg_names.index(argument),): value for argument, value in (odd or {}).items()}
    name += "" if architectures == ALL else f"-sm{architectures[0]}"
    return CompileCase(
        name, kernel, types, attributes, always, constants, odd, warps, stages, tensor_cores, architectures, registers
    )
