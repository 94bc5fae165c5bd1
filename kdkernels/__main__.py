# SPDX-License-Identifier: Apache-2.0
"""`python -m kdkernels info`: what is loaded and runs where; `validate`: certifies backends; `compare`: two models."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
import textwrap
import time

import torch

from . import __version__, native, testing
from . import backend as backends
from .analysis import command
from .registry import OPS

NAME = max(map(len, OPS))  # the column of op names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdkernels", description=(__doc__ or "").replace("`", ""))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, compiled libraries, and the backend of each op on each device")
    validate = commands.add_parser("validate", help="run the contract; the exit code is 1 if anything fails")
    validate.add_argument("--op", choices=sorted(OPS), action="append", help="default: all; may be repeated")
    validate.add_argument("--backend", choices=backends.BACKENDS, help="default: all that can run on the device")
    validate.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    validate.add_argument("--quick", action="store_true", help="fewer combinations of regimes, kernels and options")
    compare = commands.add_parser("compare", help="CKA between the layers of two models: heat map, CSV")
    command.add_arguments(compare)
    given = parser.parse_args(arguments)
    if given.command == "compare":
        return command.run(given)
    if given.command == "info":
        print(info())
        return 0
    return run_validate(given.op or list(OPS), given.backend, given.device, given.quick)


def info() -> str:
    """What is installed, which compiled libraries are loaded and why not, and what runs on each device type."""
    status = native.status()
    lines = [
        f"kdkernels   {__version__}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch       {torch.__version__}",
        f"triton      {_version('triton')}" + (" (TRITON_INTERPRET=1)" if backends.interpreting() else ""),
        f"CUDA        {_cuda()}",
        "",
        "compiled libraries",
        f"  cpu       {status.cpu_reason or 'loaded'}",
        *([] if status.cpu else [f"{'':12}soft ranks, sorts and Spearman take 10 to 50 times as long without it"]),
        f"  cuda      {status.cuda_reason or ', '.join(['loaded', *native.code()])}",
        *_refusals(),
    ]
    for device in ("cpu", "cuda"):
        lines += ["", f"float32 tensors on {device}" + _absence(device), *_choices(device)]
    return "\n".join(lines)


def _refusals() -> list[str]:
    """Of each device on which the CUDA library does not run, why."""
    said = {f"cuda:{k}": native.refusal(f"cuda:{k}") for k in range(torch.cuda.device_count())}
    indent = {"initial_indent": " " * 12, "subsequent_indent": " " * 12}
    return [line for name, why in said.items() if why for line in textwrap.wrap(f"{name}: {why}", 120, **indent)]


def _choices(device: str) -> list[str]:
    """Each backend with the reason why it cannot run, or with the ops that it runs unless asked otherwise."""
    found, own = backends.available_backends(device), {name: [] for name in backends.BACKENDS}
    said = {"the first choice", *(f"not {name}: {why}" for name, why in found.items())}
    particular = []
    for op in OPS:
        chosen, why = backends.choose(op, "auto", device, (torch.float32,))
        if said.issuperset(why.split("; ")):
            own[chosen].append(op)
        else:
            particular += textwrap.wrap(
                f"{op} runs on {chosen}: {why}", 120, initial_indent="  ", subsequent_indent=" " * 12
            )
    lines = []
    for name in reversed(backends.BACKENDS):
        text = f"{found[name]}; runs {', '.join(own[name])}" if own[name] else found[name]
        lines += textwrap.wrap(text, 120, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
    return lines + particular


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none in this torch"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _absence(device: str) -> str:
    return " (none here)" if device == "cuda" and not torch.cuda.is_available() else ""


def run_validate(ops: list[str], backend: str | None, device: str, quick: bool) -> int:
    """Prints one line for each op, backend and check, then every failure; 0, 1 (failed) or 2 (cannot run)."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        return _refuse(f"device is {device!r}: give cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        return _refuse("device is 'cuda', but torch finds no CUDA device here: pass --device cpu")
    jobs, left_out = [], []
    for op in ops:
        for name in OPS[op].backends if backend is None else (backend,):
            why = backends.obstacle(name, device, op=op) if name in OPS[op].backends else f"{op} has {OPS[op].backends}"
            if why is None:
                jobs.append((op, name))
            else:
                left_out.append(f"{op} on {name} cannot run: {why}")
    if not jobs:
        return _refuse("\n".join(left_out))
    for reason in left_out:
        print(reason)
    failures, start = [], time.perf_counter()
    print(f"{'op':<{NAME}} {'backend':<10} {'check':<15} {'measured':>8} {'failed':>7}  worst error / its budget")
    for op, name in jobs:
        results = testing.contract(op, name, device, quick)
        for check in dict.fromkeys(result.check for result in results):
            failures += [(op, name, result) for result in _print_check(op, name, check, results)]
    for op, name, result in failures:
        print(f"FAILED {op} {name} {result.check}: {result.case}: {_ratio_text(result)} {result.note}".rstrip())
    verdict = f"{len(failures)} measurements failed" if failures else "every measurement is within its budget"
    print(f"{verdict}; {len(jobs)} pairs of op and backend on {device}, {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _print_check(op: str, backend: str, check: str, results) -> list:
    own = [result for result in results if result.check == check]
    failed = [result for result in own if not result.ok]
    worst = max(own, key=lambda result: result.error / result.budget if result.budget else result.error)
    counts = f"{len(own):>8} {len(failed):>7}"
    print(f"{op:<{NAME}} {backend:<10} {check:<15} {counts}  {_ratio_text(worst)}  {worst.case}", flush=True)
    return failed


def _ratio_text(result) -> str:
    return f"{result.error:.1e} / {result.budget:.1e}"


if __name__ == "__main__":
    sys.exit(main())
