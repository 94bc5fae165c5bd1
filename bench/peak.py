# SPDX-License-Identifier: Apache-2.0
"""The process in which `memory.cpu_peak` measures one step of one contender: it prints the bytes."""

from __future__ import annotations

import json
import sys

import torch

from . import memory
from .drive import build, draw, listed
from .measure import leaves, step


def main(case_index: str, quick: str, contender: str, backend: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    case = listed("cpu", bool(int(quick)))[int(case_index)]
    inputs, sigma = draw(case, "cpu", seed=0)
    function = build(case, sigma, contender, backend or None).function
    x, y = leaves([inputs])[0]
    del inputs
    few = getattr(case, "few", lambda t: t[..., :64, :])
    step(function, *leaves([(few(x), few(y))])[0])
    print(json.dumps(memory.above(lambda: step(function, x, y))))


if __name__ == "__main__":
    main(*sys.argv[1:])
