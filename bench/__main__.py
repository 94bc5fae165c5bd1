# SPDX-License-Identifier: Apache-2.0
"""Measures this machine: every row with its provenance, losses first, nothing dropped.

python -m bench run        time, launches, memory and percent of roof of every case      -> JSON lines
python -m bench accuracy   error of CKA and of soft ranks against float64                -> JSON lines
python -m bench model      predicted times of kernels: executed on the CPU, played on a model of a GPU
python -m bench held       measured times of the same kernels beside the predicted ones
python -m bench report     Markdown from rows, and plots with the roof drawn in
python -m bench list       the cases of a device
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

import torch

FAMILIES = ("gram", "rank", "nystrom", "projection", "logits", "heads", "analysis", "losses", "distributed")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(
        dest="command", required=True, metavar="run | accuracy | model | held | report | list"
    )
    run = commands.add_parser("run", help="time the cases", description=_doc("drive"), formatter_class=raw)
    accuracy = commands.add_parser(
        "accuracy", help="error against float64", description=_doc("accuracy"), formatter_class=raw
    )
    report = commands.add_parser("report", help="Markdown and plots", description=_doc("report"), formatter_class=raw)
    listing = commands.add_parser("list", help="the cases of a device")
    for command in (run, accuracy):
        command.add_argument("--out", help="file of rows; default bench/results/MACHINE-THREADS-thread-rows.jsonl")
        command.add_argument("--threads", type=int, help="torch.set_num_threads; default: as torch finds it")
        command.add_argument("--backends", nargs="+", metavar="B", help="default: torch cpp | triton torch")
    for command in (run, accuracy, listing):
        command.add_argument("--family", choices=FAMILIES, nargs="+", help="only the ops of these families")
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
        command.add_argument("--quick", action="store_true", help="a few small cases: to try the driver, not to quote")
    run.add_argument("--case", help="only the cases with this in their name")
    run.add_argument("--reps", type=int, default=200, help="rounds a case at most (default 200)")
    run.add_argument("--seconds", type=float, default=480.0, help="of the whole run; later cases say so (default 480)")
    run.add_argument("--case-seconds", type=float, default=12.0, help="of timed rounds a case (default 12)")
    run.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="CPU: cpu for one thread on a shared machine"
    )
    run.add_argument("--memory", action="store_true", help="CPU: peak memory of the small cases too (a process each)")
    run.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile of the best plain PyTorch; default on CUDA only: it is slow to compile",
    )
    model = commands.add_parser("model", help="predicted times", description=_doc("model"), formatter_class=raw)
    model.add_argument("--case", default="", help="only those with this in what is printed: 'kl 8192x1000 bfloat16'")
    model.add_argument("--architecture", type=int, default=90, help="that the code is compiled for: 80 or 90 (default)")
    model.add_argument("--lines", type=int, default=0, metavar="N", help="print the N largest phases of each kernel")
    model.add_argument("--against", metavar="CHECKOUT", help="predict the package of another checkout too")
    model.add_argument("--out", help="append the rows to this file")
    held = commands.add_parser("held", help="measured beside predicted", formatter_class=raw)
    held.add_argument("rows", nargs="*", help="files of predicted rows; default bench/results/model-*.jsonl")
    held.add_argument("--out", help="append the rows to this file")
    report.add_argument("rows", nargs="+", help="files written by run and accuracy")
    report.add_argument("--plots", metavar="DIR", help="also write SVG and PNG plots there (needs matplotlib)")
    return top


def _doc(name: str) -> str:
    return import_module(f"bench.{name}").__doc__


def main(arguments: list[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if options.command == "model":
        if find_spec("triton") is None:
            top.error("model: it executes what Triton compiles: pip install triton")
        from .model import rows

        return rows.run(options)
    if options.command == "held":
        if find_spec("triton") is None or not torch.cuda.is_available():
            top.error("held: it measures Triton's kernels on a CUDA device, and there is none, or no package triton")
        from .model import held

        return held.run(options)
    if options.command == "report":
        from . import report

        return report.run(options)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: torch sees no CUDA device")
    if options.command == "list":
        return _list(options)
    from . import accuracy, drive

    return (drive if options.command == "run" else accuracy).run(options)


def _list(options) -> int:
    from . import drive

    for case in drive.listed(options.device, options.quick):
        if not drive.asked(case.family, options):
            continue
        shape = " ".join(f"{k}={v}" for k, v in case.shape.items() if k != "groups" or v > 1)
        wanted = "; ".join(f"{t.figure} against {t.against}: {t.bound:g}" for t in case.targets)
        print(f"{case.name:34} {case.op:9} {case.kernel:11} {shape:28} {case.dtype:9} {case.regime:10} {wanted}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
