# SPDX-License-Identifier: Apache-2.0
"""What the demonstration says at its end: a table, a plot, and the same figures as .json and .csv."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

CAVEAT = """\
How to read it: the control only copies the teacher's argmax as a label, and on images this easy it beats or comes close
to every method. So the table shows usable gradients and honest plumbing, not that a loss beats vanilla KD: that takes
CIFAR-100 and a GPU. Weights were chosen on the validation split; no row was left out."""

HEADER = ("method", "weight", "test accuracy, %", "gain over CE", "ms a step", "loss share", "backend")
PHASES = ("forward", "loss", "backward", "rest")


class Row(NamedTuple):
    name: str
    title: str
    weight: float | None
    tests: list[float]  # test accuracy by seed
    mean: float
    deviation: float | None  # standard deviation over the seeds
    gain: float | None  # mean over seeds of the difference to cross-entropy with the same seed
    gain_error: float | None  # its standard error
    step_ms: float
    forward_ms: float  # of it: the nets
    loss_ms: float  # all losses, forward
    backward_ms: float  # everything
    loss_share: float | None  # of a step: forward and backward of the added loss alone
    backend: str
    curve: list[float]  # validation accuracy by epoch, mean over seeds


def make_row(name: str, title: str, weight, runs, baseline, timing) -> Row:
    tests = [run.test for run in runs]
    gains = [run.test - ce.test for run, ce in zip(runs, baseline, strict=True)]
    several, is_ce = len(runs) > 1, runs is baseline
    return Row(
        name,
        title,
        weight,
        tests,
        statistics.mean(tests),
        statistics.stdev(tests) if several else None,
        None if is_ce else statistics.mean(gains),
        None if is_ce else standard_error(gains),
        timing.step_ms,
        *timing.phases_ms,
        None if timing.loss_ms is None else timing.loss_ms / timing.step_ms,
        timing.backend,
        [statistics.mean(epoch) for epoch in zip(*(run.curve for run in runs), strict=True)],
    )


def spread(value, error, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def cells(row: Row) -> tuple[str, ...]:
    share = "-" if row.loss_share is None else f"{100 * row.loss_share:.0f} %"
    return (
        row.title,
        "-" if row.weight is None else f"{row.weight:g}",
        spread(row.mean, row.deviation),
        spread(row.gain, row.gain_error, "+"),
        f"{row.step_ms:.1f}",
        share,
        row.backend,
    )


def table(rows: list[Row]) -> str:
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = []
    for line in lines:
        first, *middle, last = (
            cell.ljust(w) if i in (0, 6) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        text.append("  ".join((first, *middle, last)).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)


def legend(several: bool, where: str) -> str:
    spreads = "One seed, so no spread."
    if several:
        spreads = "Accuracy: mean ± standard deviation over seeds. Gain: points, paired by seed, ± its standard error."
    return f"{spreads}\nStep, and the share of it that the added loss takes forward and backward: medians, {where}."


def against_control(rows: list[Row]) -> str:
    """Each method's mean difference to the pseudo-label control, paired by seed."""
    control = next(row for row in rows if row.name == "pseudo")
    said = []
    for row in rows:
        if row.name not in ("ce", "pseudo"):
            gains = [own - other for own, other in zip(row.tests, control.tests, strict=True)]
            said.append(f"{row.title} {spread(statistics.mean(gains), standard_error(gains), '+')}")
    return f"Against the control, paired by seed: {'; '.join(said)}."


def standard_error(values) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def save_records(path: Path, facts: dict, rows: list[Row]) -> list[Path]:
    """path.json holds everything, path.csv the table."""
    record, sheet = path.with_suffix(".json"), path.with_suffix(".csv")
    record.write_text(json.dumps({**facts, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    columns = [name for name in Row._fields if name not in ("tests", "curve")]
    with sheet.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([getattr(row, name) for name in columns] for row in rows)
    return [record, sheet]


def save_plot(path: Path, heading: str, rows: list[Row], teacher: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (17, 0.55 * len(rows) + 2.6)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=size, width_ratios=(3, 2, 2))
    colours = [plt.get_cmap("tab20")(i % 20) for i in range(len(rows))]
    for i, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        left.plot(row.tests, [i] * len(row.tests), "o", color=colour, alpha=0.35, markersize=6)
        left.errorbar(row.mean, i, xerr=row.deviation or 0, fmt="D", color=colour, capsize=4, markersize=7)
        left.annotate(spread(row.mean, row.deviation), (row.mean, i), (0, 9), textcoords="offset points", ha="center")
        middle.plot(
            range(1, len(row.curve) + 1),
            row.curve,
            color=colour,
            label=row.title,
            linewidth=1.6,
            marker="o" if len(row.curve) == 1 else None,
        )
    left.axvline(teacher, color="0.4", linestyle="--", linewidth=1)
    left.annotate(
        f"teacher {teacher:.1f}",
        (teacher, len(rows) - 0.45),
        (-4, 0),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color="0.4",
    )
    left.set_yticks(range(len(rows)), [row.title for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.7)
    left.set_xlabel("test accuracy, % (dots: seeds; diamond: mean ± standard deviation)")
    middle.set_xlabel("epoch")
    middle.set_ylabel("validation accuracy, %")
    middle.legend(fontsize=8, loc="lower right")
    plot_times(right, rows)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_times(axes, rows: list[Row]):
    """A bar a method: where a training step goes."""
    ends = [0.0] * len(rows)
    for phase, shade in zip(PHASES, ("C0", "C3", "C1", "0.8"), strict=True):
        parts = [getattr(row, f"{phase}_ms", row.step_ms - end) for row, end in zip(rows, ends, strict=True)]
        axes.barh(range(len(rows)), parts, left=ends, color=shade, label=phase, height=0.6)
        ends = [end + part for end, part in zip(ends, parts, strict=True)]
    axes.set_yticks(range(len(rows)), [])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel("ms a step: nets forward, losses forward, backward, rest")
    axes.legend(fontsize=8)
