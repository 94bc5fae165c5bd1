# SPDX-License-Identifier: Apache-2.0
"""Plots of `python -m bench report --plots`: time against n for cases that differ in n alone, the roof as a line."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

RANKING = ("soft_rank", "soft_sort", "spearman")
# one colour a contender in every file, ours by backend; and what the legend says it is
OURS = {"cpp": "#4477aa", "torch": "#66ccee", "triton": "#228833", "cuda": "#aa3377", "reference": "#999999"}
THEIRS = {
    "eager": ("#ee7733", "the textbook in eager PyTorch"),
    "algebra": ("#cc3311", "the best algebra in eager PyTorch"),
    "compiled": ("#ccbb44", "that algebra, torch.compile"),
    "torchsort": ("#000000", "torchsort"),
    "sort": ("#bbbbbb", "torch.sort alone"),
    "reference": ("#999999", "the definition"),
    "products": ("#bb5566", "its matrix products alone"),
    "liger": ("#117733", "liger-kernel"),
    "liger128": ("#44aa99", "liger-kernel, chunks of 128 rows"),
}


def plots(rows: list[dict], folder: Path, suffixes=(".svg", ".png")) -> list[Path]:
    """A file of each suffix for each series; the paths of the SVGs."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (device, op, kernel, rest, dtype, method), one in sorted(series(rows).items()):
        sizes = ", ".join(f"{name} = {size}" for name, size in rest)
        title = f"{op} {kernel}, {sizes}, {dtype}, {method}\n{one['where']}"
        stem = f"{device}-{op}-{kernel}-{rest[0][0]}{rest[0][1]}-{dtype}-{method}"
        written += _draw(one, title, [folder / (stem + suffix) for suffix in suffixes])
    return [path for path in written if path.suffix == ".svg"]


def _draw(one: dict, title: str, paths: list[Path]) -> list[Path]:
    import matplotlib
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for (contender, backend), points in sorted(one["lines"].items()):
        n, ms = zip(*sorted(points), strict=True)
        ours = contender == "kdkernels"
        colour, said = (OURS[backend], f"kdkernels ({backend})") if ours else THEIRS.get(contender, (None, contender))
        axes.plot(n, ms, "o-" if ours else "s--", label=said, color=colour, linewidth=2 if ours else 1)
    sizes, ms = zip(*sorted(one["roof"].items()), strict=True)
    axes.plot(sizes, ms, "k:", label="roof (measured)")
    axes.set(xscale="log", yscale="log", xlabel="n", ylabel="ms, forward + backward")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    axes.grid(True, which="both", alpha=0.25)
    # beside the lines, of which it then hides none
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kdkernels"}):  # text stays text
        for path in paths:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)
    return paths


def series(rows) -> dict:
    """Lines of (n, ms), the roof by n and the machine, by what else they share; three sizes or more."""
    found = defaultdict(lambda: {"lines": defaultdict(list), "roof": {}, "where": ""})
    for row in rows:
        if row["kind"] != "time" or row["status"] != "ok" or row["phase"] != "step":
            continue
        # of the ranking cases those with one strength relative to the row are a series
        if row["options"].get("relative") is None if row["op"] in RANKING else row["options"]:
            continue
        shape = row["shape"]
        if "n" not in shape:
            continue
        rest = tuple((name, size) for name, size in shape.items() if name not in ("n", "groups"))
        key = (row["device"], row["op"], row["kernel"], rest, row["dtype"], row["method"])
        found[key]["lines"][row["contender"], row["backend"]].append((shape["n"], row["ms_p50"]))
        found[key]["where"] = row["gpu"] or f"{row['cpu']}, {row['threads']} threads, {row.get('clock')} clock"
        if row["roof_percent"]:
            found[key]["roof"][shape["n"]] = row["ms_p50"] * row["roof_percent"] / 100
    return {key: one for key, one in found.items() if len(one["roof"]) >= 3}
