# SPDX-License-Identifier: Apache-2.0
"""Holds the table of rates.py against a GPU: what to write there instead, and how far the rows were off.

python -m bench.model.fit measure > measured.json    on a GPU: cycles of the kernels of micro.cu
python -m bench.model.fit entries measured.json      anywhere: the entries that give these cycles on the model
python -m bench.model.fit held rows.jsonl ncu.csv    rows of `bench model` against a profile of the same calls
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

from . import micro as micros
from .micro import MICROS, Micro
from .rates import COSTS, H200, Cost, Machine


class Table:
    """The table with other entries."""

    def __init__(self, model: Machine = H200, costs: tuple[Cost, ...] = COSTS):
        self.model, self.costs = model, costs

    def __getitem__(self, entry: str) -> float:
        opcode, _, field = entry.rpartition(".")
        if not opcode:
            return getattr(self.model.rates, field)
        return next(getattr(cost, field) for cost in self.costs if opcode in cost.opcodes.split())

    def with_entry(self, entry: str, value: float) -> Table:
        opcode, _, field = entry.rpartition(".")
        if isinstance(self[entry], int):
            value = round(value)
        if not opcode:
            return Table(self.model._replace(rates=self.model.rates._replace(**{field: value})), self.costs)
        changed = (c._replace(**{field: value}) if opcode in c.opcodes.split() else c for c in self.costs)
        return Table(self.model, tuple(changed))

    def cycles(self, micro: Micro) -> float:
        return micros.predicted(micro, self.model, self.costs)


def fitted(measured: dict[str, float], table: Table) -> Table:
    """The table whose cycles are those measured, entry after entry; one that its kernel does not feel stays."""
    for micro in MICROS:
        if micro.entry in measured:
            table = solved(micro, measured[micro.entry], table)
    return table


def solved(micro: Micro, cycles: float, table: Table) -> Table:
    """By secants: cycles are nearly a straight line in an entry, or in one over it."""
    old = table.with_entry(micro.entry, table[micro.entry] * 1.5 + 2)
    for _ in range(12):
        rise = (table.cycles(micro) - old.cycles(micro)) / ((table[micro.entry] - old[micro.entry]) or 1)
        if not rise or abs(table.cycles(micro) - cycles) < 1e-3 * cycles:
            break
        step = (cycles - table.cycles(micro)) / rise
        old, table = table, table.with_entry(micro.entry, max(1, table[micro.entry] + step))
    return table


def plain(name: str) -> str:
    """Of a kernel, without its namespace and the parameters of a template."""
    return re.match(r"(?:void )?(?:[\w() ]+::)*(\w+)", name)[1]


def held(rows: list[dict], profile: list[dict]) -> list[str]:
    """Lines: a row's time and instructions over those of the first launch of its kernel in a profile of ncu."""
    seen: dict[str, dict[str, float]] = {}
    for line in profile:
        values = seen.setdefault(plain(line["Kernel Name"]), {})
        values.setdefault(line["Metric Name"], float(line["Metric Value"].replace(",", "")))
    lines = []
    for row in rows:
        real = seen.get(row["kernel"])
        if real is None:
            lines.append(f"{row['case']} {row['kernel']}: not in the profile")
            continue
        x, y, z = row["grid"]
        time = row["microseconds"] * 1e3 / real["gpu__time_duration.sum"]
        count = row["instructions"] / row["blocks"] * x * y * z / real["smsp__inst_executed.sum"]
        lines.append(f"{row['case']} {row['shape']} {row['dtype']} {row['kernel']}: {time:.2f} x, counts {count:.3f} x")
    return lines


def main(arguments: list[str]) -> int:
    if arguments == ["measure"]:
        gpu = micros.Gpu()
        json.dump({"clock": gpu.clock, **{m.entry: gpu.measured(m) for m in MICROS}}, sys.stdout, indent=1)
    elif arguments[:1] == ["entries"] and len(arguments) == 2:
        measured = json.loads(Path(arguments[1]).read_text())
        now = Table()
        then = fitted(measured, now)
        print(f"clock {measured['clock'] / 1e9:.3f} GHz")
        for m in MICROS:
            cycles = f"{now.cycles(m):.1f} cycles, measured {measured[m.entry]:.1f}, then {then.cycles(m):.1f}"
            print(f"{m.entry:14} {now[m.entry]:7.1f} -> {then[m.entry]:7.1f}   {m.kernel}: {cycles}")
    elif arguments[:1] == ["held"] and len(arguments) == 3:
        rows = [json.loads(line) for line in Path(arguments[1]).read_text().splitlines()]
        text = [line for line in Path(arguments[2]).read_text().splitlines() if line.startswith('"')]
        print("\n".join(held(rows, list(csv.DictReader(text)))))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
