# SPDX-License-Identifier: Apache-2.0
"""One kernel in one configuration, as ahead-of-time compilation needs it: what a family's `signatures.py` lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

ALL = (80, 90, 100)
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64", "uint8": "*u8"}
POINTERS |= {"int64": "*i64"}


class CompileCase(NamedTuple):
    name: str
    kernel: object
    signature: dict
    attributes: dict  # divisibility by 16 of pointers and widths, as a launch finds it
    constants: dict
    warps: int
    stages: int
    tensor_cores: bool  # half-precision products: on sm_90 they must become wgmma
    architectures: tuple[int, ...]  # compute capabilities this configuration is chosen on


def compile_case(
    name: str,
    kernel,
    type_of: Callable[[str], str],
    aligned: tuple[str, ...],
    warps: int,
    stages: int,
    tensor_cores: bool = False,
    architectures: tuple[int, ...] = ALL,
    **constants,
) -> CompileCase:
    """type_of(argument) is a dtype's name for a pointer, else a Triton type; pointers and `aligned` divide by 16."""
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        found = "constexpr" if argument in constants else type_of(argument)
        signature[argument] = POINTERS[found] if argument.endswith("_ptr") else found
        if argument not in constants and (argument.endswith("_ptr") or argument in aligned):
            attributes[(i,)] = [["tt.divisibility", 16]]
    name += "" if architectures == ALL else f"-sm{architectures[0]}"
    return CompileCase(name, kernel, signature, attributes, constants, warps, stages, tensor_cores, architectures)
