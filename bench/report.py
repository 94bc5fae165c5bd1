# SPDX-License-Identifier: Apache-2.0
"""`python -m bench report`: rows to Markdown on standard output, losses first and nothing dropped; plots on request.

Speed is the median over rounds of (their ms / our ms) of one round, so above 1 is faster. A row that was refused,
failed or not reached stands in the table with its reason.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

from .plots import RANKING, plots

# columns of speed in the table of each family; the first contenders are rivals, FLOORS do less than the op
AGAINST = {"gram": ("eager", "algebra", "compiled"), "rank": ("torchsort", "eager", "reference", "sort", "cpp")}
FLOORS = ("sort", "cpp", "torch", "cuda", "triton")
# what every row has for the heading of its run
HEADING = {"kind", "run", "device", "gpu", "cpu", "threads", "commit", "dirty", "python", "torch", "triton"}


def load(paths) -> list[dict]:
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                rows.append(_row(line, f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}")
    return rows


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not row.keys() >= HEADING:
        raise ValueError(f"{where} is no row that `python -m bench run` or accuracy wrote")
    return row


def run(options) -> int:
    try:
        rows = load(options.rows)
        text = markdown(rows)
        drawn = plots(rows, Path(options.plots)) if options.plots else None
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    for path in drawn or ():
        print(f"![{path.stem}]({path.name})")
    if drawn == []:
        print("no plots: no cases differ in n alone at three sizes or more", file=sys.stderr)
    return 0


def markdown(rows: list[dict]) -> str:
    parts = []
    for _, group in _by_run(rows):
        parts += [_heading(group[0]), _targets(group), _times(group), _ranking(group)]
        parts += [
            _traffic(group),
            _misfits(group),
            _accuracy(group),
            _rank_accuracy(group),
            _roofs(group),
            _predicted(group),
            _held(group),
        ]
    return "\n\n".join(part for part in parts if part)


def _by_run(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row["run"], row["device"], row["commit"]].append(row)
    return sorted(groups.items(), key=lambda item: item[0][0])


def _heading(row: dict) -> str:
    where = row["gpu"] or f"{row['cpu']}, {row['threads']} threads"
    extra = f", driver {row['driver']}, clocks {row['clocks']}, CUDA {row['cuda']}" if row["gpu"] else ""
    state = " (with uncommitted changes)" if row["dirty"] else ""
    versions = f"Python {row['python']}, torch {row['torch']}, triton {row['triton']}"
    timed = {"cpu": "; processor time", "wall": "; wall time"}.get(row.get("clock"), "")
    busy = f", load {row['load']} at the start" if timed else ""
    return f"**{where}**{extra}{timed}{busy}; {versions}; commit {row['commit']}{state}; {row['run']}"


def _table(head, rows, caption) -> str:
    if not rows:
        return ""
    lines = [caption, "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


UNITS = {"speed": " x", "memory": " x", "overhead": " us", "microseconds": " us", "launches": "", "graph": " x"}
UNITS |= {"ms": " ms", "bytes": " bytes", "roof": " %"}


def _targets(rows) -> str:
    found = [(row, target) for row in rows for target in row.get("targets") or ()]
    found.sort(key=lambda pair: pair[1]["holds"])
    body = []
    for row, target in found:
        sign = ">=" if target["figure"] in ("speed", "roof") else "<="
        unit = UNITS[target["figure"]]
        body.append(
            [
                "reached" if target["holds"] else "**missed**",
                f"{row['case']} ({row['backend']}, {row.get('method') or 'eager'})",
                f"{target['figure']} against {target['against']}",
                f"{sign} {target['bound']:.3g}{unit}",
                f"{target['value']:.3g}{unit}",
            ]
        )
    return _table(["", "case", "figure", "target", "measured"], body, "Figures the project set itself")


def speed(row: dict) -> float:
    """Against the fastest of the others: what a user would give up by not using us."""
    return min((ratio[1] for name, ratio in row["ratios"].items() if name not in FLOORS), default=math.inf)


def _ours(rows):
    return [r for r in rows if r["kind"] == "time" and r["status"] == "ok" and r["contender"] == "kdkernels"]


def _times(rows) -> str:
    caption = "Forward + backward, gradient to x; the slowest against the fastest contender first"
    return _time_table([r for r in rows if r.get("op") not in RANKING], AGAINST["gram"], caption) if rows else ""


def _ranking(rows) -> str:
    caption = "Ranking: forward + backward, gradient to x; sort is torch.sort alone; the slowest against a rival first"
    return _time_table([r for r in rows if r.get("op") in RANKING], AGAINST["rank"], caption) if rows else ""


def _time_table(rows, against, caption) -> str:
    peaks = {
        (r["case"], r["contender"]): r["peak_bytes"]
        for r in rows
        if r["kind"] == "time" and r["status"] == "ok" and r["contender"] != "kdkernels"
    }
    body = []
    for row in sorted((r for r in _ours(rows) if r["phase"] == "step"), key=speed):
        shape = " ".join(f"{k}={v}" for k, v in row["shape"].items() if k != "groups" or v > 1)
        theirs = peaks.get((row["case"], "eager"))
        memory = "" if row["peak_bytes"] is None else _bytes(row["peak_bytes"])
        if memory and theirs:
            memory += f" (eager {_bytes(theirs)})"
        body.append(
            [
                row["case"],
                f"{shape} {row['dtype']}",
                f"{row['backend']}, {row['method']}",
                f"{row['ms_p50']:.3g} ({row['ms_p20']:.3g} to {row['ms_p80']:.3g})",
                *(_ratio(row["ratios"].get(name)) for name in against),
                "" if row["roof_percent"] is None else f"{row['roof_percent']:.0f} % of {row['roof']}",
                memory,
                "" if row["launches"] is None else str(row["launches"]),
            ]
        )
    head = ["case", "shape", "backend", "ms p50 (p20 to p80)", *(f"speed vs {a}" for a in against)]
    return _table([*head, "roof", "peak extra", "launches"], body, caption)


def _ratio(ratio) -> str:
    if ratio is None:
        return ""
    text = f"{ratio[1]:.2f} x"
    return f"**{text}**" if ratio[1] < 1 else text


def _bytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _traffic(rows) -> str:
    body = []
    for row in rows:
        if row["kind"] == "traffic":
            shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
            parts = ", ".join(f"{what} {_bytes(count)}" for what, count in row["received"].items() if count >= 2**10)
            peak = "" if row["peak_bytes"] is None else _bytes(row["peak_bytes"])
            total = _bytes(sum(row["received"].values()))
            body.append(
                [row["case"], shape, str(row["ranks"]), row["way"], total, parts, peak, _bytes(row["own_bytes"])]
            )
    head = ["case", "of a rank", "ranks", "way", "received a rank", "by", "peak extra", "its own features"]
    return _table(head, body, "Over all ranks, forward + backward, gradient to x: bytes and memory of a rank")


def _misfits(rows) -> str:
    body = [
        [row["case"], row.get("contender") or "kdkernels", row.get("backend") or "", row["status"], row["note"] or ""]
        for row in rows
        if row["kind"] == "time" and row["status"] != "ok"
    ]
    return _table(["case", "contender", "backend", "", "why"], body, "Not measured")


def _accuracy(rows) -> str:
    """The worst of each kernel, bandwidth, dtype and contender over sizes and regimes."""
    groups = defaultdict(list)
    for row in rows:
        if row["kind"] == "accuracy":
            key = (row["dtype"], row["kernel"], row["sigma"] or "", row["backend"] or f"{row['contender']} (naive)")
            groups[key].append(row)
    body = []
    for (dtype, kernel, sigma, who), group in groups.items():
        worst = max(group, key=lambda r: math.inf if math.isnan(r["error"]) else r["error"])
        missed = sum(not r["holds"] for r in group)
        body.append(
            (
                missed > 0 and worst["contender"] == "kdkernels",
                [
                    f"{kernel} {sigma}".strip(),
                    dtype,
                    who,
                    f"{worst['error']:.1e} (n={worst['shape']['n']}, {worst['regime']})",
                    f"{worst['bound']:.0e}",
                    *(_worst(group, name) for name in ("gradient_error", "gradient_floor", "gradient_excess")),
                    f"**{missed} of {len(group)} missed**" if missed else f"{len(group)} of {len(group)}",
                ],
            )
        )
    body = [cells for _, cells in sorted(body, key=lambda item: not item[0])]
    head = [
        "kernel",
        "dtype",
        "backend",
        "worst error of CKA",
        "bound",
        "gradient error",
        "of its rounding",
        "beyond it",
        "within",
    ]
    return _table(head, body, "Error against float64 of the same rounded inputs")


def _rank_accuracy(rows) -> str:
    """The worst of each regularization, dtype and contender over sizes and strengths."""
    groups = defaultdict(list)
    for row in rows:
        if row["kind"] == "rank accuracy":
            groups[row["kernel"], row["dtype"], row["backend"] or row["contender"]].append(row)
    body = []
    for (kernel, dtype, who), group in groups.items():
        worst = max(group, key=lambda r: math.inf if math.isnan(r["error_ulp"]) else r["error_ulp"])
        missed = sum(not r["holds"] for r in group)
        where = f"n={worst['shape']['n']}, strength {worst['worst_strength']:g}"
        held = f"**{missed} of {len(group)} missed**" if missed else f"{len(group)} of {len(group)}"
        body.append([kernel, dtype, who, f"{worst['error_ulp']:.3g} ({where})", f"{worst['bound']:g}", held])
    head = ["", "dtype", "", "worst error, float32 ulp of the rank", "bound", "within"]
    return _table(head, body, "Soft ranks against float64 of the same rounded rows")


def _worst(group, name: str) -> str:
    found = [row[name] for row in group if row[name] is not None]
    return f"{max(found, key=lambda e: math.inf if math.isnan(e) else e):.1e}" if found else ""


def _predicted(rows) -> str:
    body = [
        [
            f"{row['case']} {row['shape']} {row['dtype']}",
            f"{row['kernel']} (sm_{row['architecture']})" + (f", {n} x" if (n := row["launches"]) > 1 else ""),
            *(f"{row[key]:.1f}" for key in ("microseconds", "memory_floor", "arithmetic_floor")),
            f"{row['cycles']:.0f}",
            f"{row['instructions'] / row['blocks']:.0f}",
            f"{row['issue_rate']:.2f}",
            f"{row['resident']['warps']} ({row['resident']['limit']})",
        ]
        for row in rows
        if row["kind"] == "model"
    ]
    head = [
        "case",
        "kernel",
        "us",
        "memory floor",
        "arithmetic floor",
        "cycles",
        "instructions a block",
        "a cycle",
        "warps",
    ]
    caption = "Predicted, **not measured**, a launch: by a model (version {version}) of {modelled}"
    return _table(head, body, caption.format_map(defaultdict(str, rows[0])))


def _held(rows) -> str:
    body = []
    for row in rows:
        if row["kind"] == "held":
            predicted, seen = row["predicted_us"], row["measured_us"]
            times = ["" if t is None else f"{t:.1f}" for t in (predicted, seen)]
            ratio = f"{seen / predicted:.2f} x" if predicted and seen else ""
            body.append([f"{row['case']} {row['shape']} {row['dtype']}", row["kernel"], *times, ratio])
    head = ["case", "kernel", "predicted us", "measured us", "measured / predicted"]
    return _table(head, body, "The model of an H200 held against this GPU, a launch")


def _roofs(rows) -> str:
    body = []
    for row in rows:
        if row["kind"] == "roof":
            unit = {"copy": (1e9, "GB/s"), "gemm": (1e9, "GFLOP/s")}.get(row["case"])
            rate = f"{row['rate'] / unit[0]:.4g} {unit[1]}" if unit else f"{row['ms_p50'] * 1e3:.3g} us"
            body.append([f"{row['case']} {row['dtype'] or ''}".strip(), rate])
    return _table(["ceiling", "measured in this run"], body, "Roofs")
