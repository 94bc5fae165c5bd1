# SPDX-License-Identifier: Apache-2.0
"""What a comparison of two networks gives: the matrix, its errors and labels, as a picture and as a table."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

LABELS = 60  # layers up to which each has its name at the axis


@dataclass(frozen=True, eq=False)
class Comparison:
    """CKA of the layers of two networks, from `kd.compare_models`.

    cka [La, Lb] and standard_error [La, Lb] (NaN for one batch): float64, on the CPU. labels_a, labels_b: names of the
    layers. rows: how many rows were compared, in how many batches.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh()).eval()
    >>> kd.compare_models(model, model, torch.randn(10, 32, 8), "0", progress=False)
    Comparison(1 x 1 layers, 320 rows in 10 batches, kernel='linear', unbiased=True: CKA 1.000 to 1.000 +- 0.000)
    """

    cka: torch.Tensor
    standard_error: torch.Tensor
    labels_a: tuple[str, ...]
    labels_b: tuple[str, ...]
    rows: int
    batches: int
    kernel: str
    unbiased: bool

    def __repr__(self) -> str:
        shape = f"{len(self.labels_a)} x {len(self.labels_b)} layers, {self.rows:,} rows in {self.batches:,} batches"
        how = f"kernel={self.kernel}, unbiased={self.unbiased}"
        known = self.cka[~self.cka.isnan()]
        if not len(known):
            return f"Comparison({shape}, {how}: CKA nan)"
        error = self.standard_error[~self.cka.isnan()].max()
        return f"Comparison({shape}, {how}: CKA {known.min():.3f} to {known.max():.3f} +- {error:.3f})"

    def nearest(self) -> str:
        """One line a layer of the first network: the layer of the second that is most like it."""
        width = max(map(len, self.labels_a))
        lines = []
        for name, row, errors in zip(self.labels_a, self.cka, self.standard_error, strict=True):
            best = int(row.nan_to_num(-torch.inf).argmax())
            lines.append(f"{name:{width}}  {row[best]:6.3f} +- {errors[best]:.3f}  {self.labels_b[best]}")
        return "\n".join(lines)

    def to_csv(self, path) -> Path:
        """One line a pair of layers: layer_a, layer_b, cka, standard_error."""
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["layer_a", "layer_b", "cka", "standard_error"])
            for name, row, errors in zip(self.labels_a, self.cka.tolist(), self.standard_error.tolist(), strict=True):
                for other, value, error in zip(self.labels_b, row, errors, strict=True):
                    writer.writerow([name, other, repr(value), repr(error)])
        return path

    def plot(self, path, *, title: str | None = None, names=("model_a", "model_b")) -> list[Path]:
        """A heat map: to `path` if it ends in .png, .svg or .pdf, else to path.png and path.svg. Needs matplotlib."""
        figure_of = _matplotlib()
        path = Path(path)
        paths = [path] if path.suffix else [path.with_name(path.name + end) for end in (".png", ".svg")]
        size = [min(14.0, 2.5 + 0.22 * len(labels)) for labels in (self.labels_b, self.labels_a)]
        figure = figure_of(figsize=(size[0] + 1.2, size[1] + 0.6), layout="constrained")
        axes = figure.add_subplot()
        figure.colorbar(self.draw(axes, title=title, names=names), ax=axes, label="CKA")
        for one in paths:
            figure.savefig(one, dpi=150)
        return paths

    def draw(self, axes, *, title: str | None = None, names=("model_a", "model_b")):
        """The heat map in a matplotlib Axes, first layers at the lower left; returns the image, for a colour bar."""
        image = axes.imshow(self.cka.numpy(), origin="lower", vmin=0, vmax=1, cmap="magma", aspect="auto")
        sides = ((axes.xaxis, self.labels_b, names[1]), (axes.yaxis, self.labels_a, names[0]))
        for axis, labels, name in sides:
            step = -(-len(labels) // LABELS)
            axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=7)
            axis.set_label_text(name)
        axes.tick_params(axis="x", labelrotation=90)
        axes.set_title(title or f"{'unbiased' if self.unbiased else 'biased'} CKA, {self.rows:,} rows", fontsize=9)
        return image


def _matplotlib():
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no display
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plot needs matplotlib: pip install matplotlib; to_csv does without") from None
    return Figure
