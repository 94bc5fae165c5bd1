# SPDX-License-Identifier: Apache-2.0
"""How many landmarks does Nystrom CKA need, and chosen how? Draws kdkernels/nystrom/landmarks.svg.

    python examples/landmarks.py                     (seconds, no GPU; needs matplotlib)

Features of clusters of very different sizes on a decaying spectrum, seen by two layers. For each rule and number of
landmarks m: the error of the kernel matrix, tr(K - K~)/tr K, and of rbf CKA against kd.cka over all pairs, as the mean
over draws. `--table` prints the table of MATH.md without drawing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import kdkernels as kd

PLOT = Path(__file__).resolve().parents[1] / "kdkernels" / "nystrom" / "landmarks.svg"
RULES = ("rpcholesky", "greedy", "kmeans++", "uniform")
SIZES = (8, 16, 32, 64, 128, 256)
ROWS, DRAWS = 2000, 8


def features(seed: int = 0):
    """Two layers' features [n, 32], [n, 24]: 20 clusters, the largest 50 times the smallest."""
    g = torch.Generator().manual_seed(seed)
    share = torch.logspace(0, -1.7, 20)
    label = torch.multinomial(share, ROWS, replacement=True, generator=g)
    spectrum = torch.logspace(0, -1.5, 32)
    centres = 3 * torch.randn(20, 32, generator=g) * spectrum
    x = centres[label] + 0.5 * torch.randn(ROWS, 32, generator=g) * spectrum
    y = (x @ torch.randn(32, 24, generator=g) / 32**0.5).relu() + 0.1 * torch.randn(ROWS, 24, generator=g)
    return x, y


def errors(x, y, rule: str, m: int, exact: float, draws: int = DRAWS) -> tuple[float, float]:
    """(mean tr(K - K~)/tr K of x, mean |CKA~ - CKA|)."""
    trace, cka = [], []
    for seed in range(1 if rule == "greedy" else draws):
        chosen = kd.select_landmarks(x, m, method=rule, generator=torch.Generator().manual_seed(seed))
        phi = kd.nystrom_features(x, x[chosen])
        trace.append(1 - float(phi.square().sum(1).mean()))  # k(x, x) = 1
        cka.append(abs(float(kd.nystrom_cka(x, y, x[chosen], y[chosen])) - exact))
    return sum(trace) / len(trace), sum(cka) / len(cka)


def table(draws: int = DRAWS) -> dict[str, list[tuple[float, float]]]:
    x, y = features()
    exact = float(kd.cka(x, y, kernel="rbf"))
    return {rule: [errors(x, y, rule, m, exact, draws) for m in SIZES] for rule in RULES}


def show(found):
    print("| m | " + " | ".join(RULES) + " |")
    print("|" + "---|" * (len(RULES) + 1))
    for k, m in enumerate(SIZES):
        cells = [f"{found[rule][k][0]:.1e} / {found[rule][k][1]:.1e}" for rule in RULES]
        print(f"| {m} | " + " | ".join(cells) + " |")


def draw(found, path: Path = PLOT):
    import matplotlib

    matplotlib.use("Agg")
    # text as text, the same bytes each time: a small file that can be compared
    matplotlib.rcParams.update({"svg.hashsalt": "kdkernels", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4))
    titles = ("tr(K - K~) / tr K", "|CKA~ - CKA|, rbf")
    for which, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for rule in RULES:
            axis.loglog(SIZES, [pair[which] for pair in found[rule]], marker="o", markersize=3, label=rule)
        axis.set(title=title, xlabel="landmarks m")
        axis.minorticks_off()
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    found = table()
    show(found)
    if not options.table:
        draw(found)


if __name__ == "__main__":
    main()
