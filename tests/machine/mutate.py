# SPDX-License-Identifier: Apache-2.0
"""Are the checks sharp? Each barrier and each wait of a kernel is taken out in turn: is that seen?

    python tests/machine/mutate.py distillation_kl soft_rank --architectures 80 90

Prints a line for each that is executed, `sm_80 loss_rows 0a40 BAR.SYNC 0x0: reported | wrong result | harmless`.
What no schedule reports and no result shows is harmless. Of a barrier that is a proof, for what these calls execute:
two warps on a byte, one of which writes, are reported in whatever order they come, unless a barrier is left between
them (`core/memory.h`), so what the missing one ordered is ordered by others. They stand before the first use of shared
memory, as Triton puts them; at the end of a reduction, where another comes before its memory is used again; and at the
end of a block's last row. So is it of a wait: its copies and products are waited for again before they are touched.
Where lanes of one warp meet (WARPSYNC) it is none, as lanes have an order here that a GPU need not keep: such a line
ends in `harmless here`. In the ranking kernels they stand before a barrier of the block or, of rows and of merges that
a warp does alone, before its lanes read what others of them wrote.
"""

import argparse
import re

import contract
import torch
from emulator import ARCHITECTURES, SCHEDULES, Report
from machine_build import core

import kdkernels as kd


def calls() -> dict:
    """Forward and backward of an op, at a size whose tiles are not full."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 1500, requires_grad=True), torch.randn(2, 1500)
    x, y = torch.randn(70, 96, requires_grad=True), torch.randn(70, 64)
    half, other = x.detach().bfloat16().requires_grad_(), y.bfloat16()
    # a block for each row, and a warp, of values with ties
    wide, narrow = (torch.randn(3, n).mul(4).round().div(4).requires_grad_() for n in (200, 40))
    z, w, basis = torch.randn(2, 2, 64, 64).bfloat16().unbind() + (torch.randn(64, 32),)
    z.requires_grad_()
    return {
        "distillation_kl": lambda: both(kd.distillation_kl(s, t, backend="triton"), s),
        "generalized_jsd": lambda: both(kd.generalized_jsd(s, t, backend="triton"), s),
        "cka": lambda: both(kd.cka(half, other, backend="triton"), half),
        "projected_mse": lambda: both(kd.projected_mse(z, w, basis, backend="triton"), z),
        "soft_rank": lambda: both(kd.soft_rank(wide, "kl", 0.1, backend="cuda"), wide),
        "soft_sort": lambda: both(kd.soft_sort(wide, "l2", 0.1, backend="cuda"), wide),
        "spearman": lambda: tuple(t for x in (wide, narrow) for t in correlated(x)),
    }


def correlated(x):
    y = x.detach().roll(1, 1)
    return both(kd.spearman(x, y, regularization_strength=0.1, backend="cuda"), x)


def both(value, leaf):
    return value.detach(), *torch.autograd.grad(value.sum(), leaf)


def waits(launches) -> list:
    """(function, line): each barrier of a block or a warp, and wait for copies or products that names a count, that a
    launch executed."""
    found = {}
    for launch in launches:
        for line, count in zip(launch.function.code, launch.counts, strict=True):
            names_count = "LE" in line.modifiers and len(line.operands) > 1
            if count and (
                line.opcode in ("BAR", "WARPSYNC") or (line.opcode in ("DEPBAR", "WARPGROUP") and names_count)
            ):
                found[launch.function.name, line.pc] = launch.function, line
    return list(found.values())


def seen(device, call, right, line) -> str:
    """What removing a line changes, under every schedule."""
    worst = "harmless here" if line.opcode == "WARPSYNC" else "harmless"
    for schedule in SCHEDULES:
        device.schedules = (schedule,)
        try:
            got = call()
        except (Report, core().Fault):
            return "reported"
        except RuntimeError as error:  # of an operator, whose launch failed
            if not re.search("Fault, |Report, ", str(error)):
                raise
            return "reported"
        if not all(torch.equal(a, b) for a, b in zip(got, right[schedule], strict=True)):
            worst = "wrong result"
    return worst


def results(device, call) -> dict:
    out = {}
    for schedule in SCHEDULES:
        device.schedules = (schedule,)
        out[schedule] = call()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", default=list(calls()))
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    options = parser.parse_args()
    contract.allow_cpu_tensors()
    for architecture in options.architectures:
        for op in options.ops:
            device = contract.install(contract.kinds_of(op)[0], architecture)
            call = calls()[op]
            device.launches.clear()
            right = results(device, call)
            for function, line in waits(device.launches):
                function.program.set_skipped(line.pc, True)
                outcome = seen(device, call, right, line)
                function.program.set_skipped(line.pc, False)
                print(f"sm_{architecture} {function.name} {line.pc:04x} {line.text}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
