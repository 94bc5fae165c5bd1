# SPDX-License-Identifier: Apache-2.0
"""When does a differentiable Spearman correlation become Pearson's? Draws kdkernels/rank/strength.svg.

    python examples/strength.py                      (seconds, no GPU; needs matplotlib)

Rows of a normal and a log-normal side, n = 10 to 10,000; for each strength the fraction of elements that pool
with others and the number of blocks (`kd.rank_diagnostics`), and the distances of the soft Spearman correlation to
Pearson's and to the hard Spearman's. Left: the strength itself, where 1.0 is the usual default. Right: the same over
the relative strength c of ("auto", c), on which all n fall together.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import kdkernels as kd

PLOT = Path(__file__).resolve().parents[1] / "kdkernels" / "rank" / "strength.svg"
SIZES = (10, 100, 1000, 10000)
ENTRIES = 40_000  # of the rows of one size
POINTS = 33


def sides(n: int):
    """Student and teacher [rows, n]: normal and log-normal, correlated 0.36 before the exponential."""
    generator = torch.Generator().manual_seed(n)
    common, own, noise = torch.randn(3, max(ENTRIES // n, 4), n, dtype=torch.float64, generator=generator)
    return 0.6 * common + 0.8 * own, (0.6 * common + 0.8 * noise).exp()


def standardised(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)


def measure(n: int, strength: float) -> dict:
    """Means over the rows at one strength, a number in standard deviations of the row."""
    x, y = (standardised(side) for side in sides(n))
    pooled, blocks = kd.rank_diagnostics(x, strength)
    soft, pearson, hard = kd.spearman(x, y, regularization_strength=strength), kd.pearson(x, y), kd.spearman_corr(x, y)
    return {
        "pooled": pooled.mean().item(),
        "blocks": blocks.double().mean().item(),
        "to_pearson": (soft - pearson).abs().mean().item(),
        "to_hard": (soft - hard).abs().mean().item(),
    }


def curve(n: int, points: int = POINTS) -> list[tuple[float, float, dict]]:
    """(strength, c, what was measured) from hard ranks to one block."""
    found = []
    for c in torch.logspace(-3, 1.5 + 0.5 * math.log10(n), points).tolist():
        strength = c * math.sqrt(12) / n
        found.append((strength, c, measure(n, strength)))
    return found


ROWS = (
    ("pooled", "fraction of elements pooled", {}),
    ("blocks", "number of blocks", {"yscale": "log"}),
    ("to_pearson", "|soft Spearman - Pearson|", {}),
    ("to_hard", "|soft Spearman - hard Spearman|", {}),
)


def draw(path: Path, sizes=SIZES, points: int = POINTS):
    import matplotlib

    matplotlib.use("Agg")
    # text as text, the same bytes each time: a small file that can be compared
    matplotlib.rcParams.update({"svg.hashsalt": "kdkernels", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(ROWS), 2, figsize=(8.5, 9), sharex="col", sharey="row")
    for i, n in enumerate(sizes):
        found = curve(n, points)
        for (what, _, _), pair in zip(ROWS, axes, strict=True):
            for place, panel in enumerate(pair):
                x, y = zip(*((point[place], point[2][what]) for point in found), strict=True)
                panel.plot(x, y, color=f"C{i}", label=f"n = {n:,}")
    for (_, label, scale), pair in zip(ROWS, axes, strict=True):
        pair[0].set(ylabel=label, xscale="log", **scale)
        pair[1].set(xscale="log")
        for panel in pair:
            panel.axvline(1.0, color="0.4", linestyle="--", linewidth=1)
            panel.minorticks_off()
    axes[0][0].legend(fontsize=8)
    axes[0][0].set_title("dashed: strength 1.0, the usual default")
    axes[0][1].set_title('dashed: "auto", c = 1')
    axes[-1][0].set_xlabel("strength, standard deviations of the row")
    axes[-1][1].set_xlabel('c of ("auto", c): strength = c sqrt(12) / n')
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PLOT, metavar="FILE", help="the plot, .svg or .png")
    parser.add_argument("--table", action="store_true", help="print the figures of the page instead")
    options = parser.parse_args(arguments)
    if not options.table:
        draw(options.out)
        print(f"Saved {options.out.name}.")
        return
    print("| n | strength | pooled | blocks | to Pearson | to hard Spearman |\n|---|---|---|---|---|---|")
    for n in SIZES:
        for name, strength in (("1.0", 1.0), ("auto", math.sqrt(12) / n)):
            m = measure(n, strength)
            last = f"{m['to_pearson']:.4f} | {m['to_hard']:.4f}"
            print(f"| {n:,} | {name} | {100 * m['pooled']:.0f} % | {m['blocks']:.1f} | {last} |")


if __name__ == "__main__":
    main()
