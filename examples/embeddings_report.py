# SPDX-License-Identifier: Apache-2.0
"""What distill_embeddings.py says at its end: a table a width, the best relation beside the best baseline, a figure."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from embeddings_methods import METHODS
from embeddings_student import NEAREST, Quality, Run

HEADER = ("method", "rho", f"R@{NEAREST}", "projected rho", f"R@{NEAREST}", "s a run")
TITLES = {
    "rho": "rank correlation of the cosines with the teacher's",
    "recall": f"share of the teacher's {NEAREST} nearest found",
}
CAVEAT = f"""\
How to read it: rho is Spearman's correlation of a test sentence's cosines to the others with the teacher's,
R@{NEAREST} the share of its {NEAREST} nearest that the student finds; mean ± standard deviation over seeds. The last
row is what the teacher's own principal components of that width reach. The two measures disagree about the best loss,
and a projection, where there is one, is a second embedding as wide as the teacher's. One small student, one text."""


def spread(values) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def grouped(runs: list[Run], width: int) -> dict[str, list[Run]]:
    own = [run for run in runs if run.width == width]
    return {name: found for name in METHODS if (found := [run for run in own if run.method == name])}


def table(runs: list[Run], width: int, ceiling: Quality) -> str:
    lines = [HEADER]
    for name, own in grouped(runs, width).items():
        projected = [run.projected for run in own if run.projected is not None]
        lines.append((
            METHODS[name].title,
            *(spread([getattr(run.test, key) for run in own]) for key in TITLES),
            *(spread([getattr(quality, key) for quality in projected]) if projected else "-" for key in TITLES),
            f"{statistics.mean(run.seconds for run in own):.1f}",
        ))  # fmt: skip
    lines.append(("the teacher's own PCA", *(f"{value:.3f}" for value in ceiling), "-", "-", "-"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(
            cell.rjust(wide) if i else cell.ljust(wide) for i, (cell, wide) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([f"width {width}", text[0], "-" * len(text[0]), *text[1:]])


def against_baseline(runs: list[Run], width: int) -> str:
    """The best relational loss and the best baseline, each chosen on the validation split; differences on the test."""
    methods, said = grouped(runs, width), []
    for key, title in TITLES.items():
        best = {}
        for baseline in (True, False):
            names = [name for name in methods if METHODS[name].baseline == baseline]
            if not names:
                return ""
            best[baseline] = max(
                names, key=lambda n: statistics.mean(getattr(run.validation, key) for run in methods[n])
            )
        ours, theirs = ([getattr(run.test, key) for run in methods[best[kind]]] for kind in (False, True))
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        gain = statistics.mean(gains)
        error = "" if len(gains) < 2 else f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.3f}"
        said.append(
            f"  {title}: {METHODS[best[False]].title} against {METHODS[best[True]].title}: {gain:+.3f}{error} "
            f"({gain / statistics.mean(theirs):+.0%})"
        )
    return "\n".join([f"width {width}, best relational loss against best baseline, paired by seed:", *said])


def save_record(path: Path, facts: dict, runs: list[Run], ceilings: dict[int, Quality]):
    rows = [
        {**run._asdict(), **{k: v and v._asdict() for k, v in run._asdict().items() if k in QUALITIES}} for run in runs
    ]
    content = {**facts, "ceilings": {width: q._asdict() for width, q in ceilings.items()}, "runs": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


QUALITIES = ("validation", "test", "projected")


def save_plot(path: Path, runs: list[Run], ceilings: dict[int, Quality]):
    """A panel a measure, a colour a width: each method's mean and seeds, the best baseline, the teacher's own PCA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in METHODS if any(run.method == name for run in runs)]
    figure, panels = plt.subplots(1, 2, figsize=(12, 0.36 * len(names) + 2), sharey=True)
    for axes, (key, title) in zip(panels, TITLES.items(), strict=True):
        for i, width in enumerate(sorted(ceilings)):
            colour, best, methods = f"C{i}", [], grouped(runs, width)
            for row, name in enumerate(names):
                values = [getattr(run.test, key) for run in methods.get(name, [])]
                if values:
                    axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.3, markersize=4)
                    axes.plot(statistics.mean(values), row, "D", color=colour, markersize=6, label=f"width {width}")
                    best += [statistics.mean(values)] * METHODS[name].baseline
            if best:
                axes.axvline(max(best), color=colour, linestyle="--", linewidth=1, label="best baseline (grey names)")
            axes.axvline(
                getattr(ceilings[width], key), color=colour, linestyle=":", linewidth=1.5, label="teacher's PCA"
            )
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [METHODS[name].title for name in names])
    for label, name in zip(panels[0].get_yticklabels(), names, strict=True):
        label.set_color("0.5" if METHODS[name].baseline else "black")
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))  # of each label the last
    figure.legend(shown.values(), shown, fontsize=9, loc="lower center", ncols=len(shown), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
