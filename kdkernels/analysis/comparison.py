# SPDX-License-Identifier: Apache-2.0
"""What a comparison of two networks gives: the matrix, its errors and labels, as a picture and as a table."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .._types import FilePath
from . import picture

FACTS = {
    "rows": int,
    "batches": int,
    "kernel": str,
    "unbiased": {"True": True, "False": False}.__getitem__,
    "quantity": str,
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """CKA of the layers of two networks, from `kd.compare_models`.

    cka [La, Lb] and standard_error [La, Lb] (NaN for one batch): float64, on the CPU. labels_a, labels_b: names of the
    layers. rows: how many rows were compared, in how many batches. quantity: "CKA", of a difference "CKA difference".

    `a - b` of two comparisons of the same layers: the difference, with the error of two independent values (too large
    where both saw the same batches and move together). `Comparison.load(path)` reads what `to_csv(path)` wrote.

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
    quantity: str = "CKA"

    def __repr__(self) -> str:
        shape = f"{len(self.labels_a)} x {len(self.labels_b)} layers, {self.rows:,} rows in {self.batches:,} batches"
        how = f"kernel={self.kernel}, unbiased={self.unbiased}"
        known = self.cka[~self.cka.isnan()]
        if not len(known):
            return f"Comparison({shape}, {how}: {self.quantity} nan)"
        error = self.standard_error[~self.cka.isnan()].max()
        return f"Comparison({shape}, {how}: {self.quantity} {known.min():.3f} to {known.max():.3f} +- {error:.3f})"

    def nearest(self) -> str:
        """One line a layer of the first network: the layer of the second that is most like it."""
        width = max(map(len, self.labels_a))
        lines = []
        for name, row, errors in zip(self.labels_a, self.cka, self.standard_error, strict=True):
            best = int(row.nan_to_num(-torch.inf).argmax())
            lines.append(f"{name:{width}}  {row[best]:6.3f} +- {errors[best]:.3f}  {self.labels_b[best]}")
        return "\n".join(lines)

    def table(self) -> str:
        """The matrix, a line a layer of the first network; common beginnings of names are left out."""
        rows, columns = picture.shortened(self.labels_a)[1], picture.shortened(self.labels_b)[1]
        first, width = max(map(len, rows)), max(5, *map(len, columns))
        lines = [" " * first + "".join(f"  {name:>{width}}" for name in columns)]
        for name, line in zip(rows, self.cka.tolist(), strict=True):
            lines.append(f"{name:{first}}" + "".join(f"  {picture.two_digits(value):>{width}}" for value in line))
        return "\n".join(lines)

    def __sub__(self, other: Comparison) -> Comparison:
        if not isinstance(other, Comparison):
            return NotImplemented
        for name in ("labels_a", "labels_b", "kernel", "unbiased", "quantity"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"a - b: {name} is {mine!r} in a and {theirs!r} in b: compare the same layers in the same way "
                    "(dataclasses.replace renames labels)"
                )
        error = (self.standard_error.square() + other.standard_error.square()).sqrt()
        least = {name: min(getattr(self, name), getattr(other, name)) for name in ("rows", "batches")}
        return replace(self, cka=self.cka - other.cka, standard_error=error, quantity="CKA difference", **least)

    def to_csv(self, path: FilePath) -> Path:
        """One line a pair of layers: layer_a, layer_b, cka, standard_error, and how they were found."""
        path = Path(path)
        facts = [getattr(self, name) for name in FACTS]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["layer_a", "layer_b", "cka", "standard_error", *FACTS])
            for name, row, errors in zip(self.labels_a, self.cka.tolist(), self.standard_error.tolist(), strict=True):
                for other, value, error in zip(self.labels_b, row, errors, strict=True):
                    writer.writerow([name, other, repr(value), repr(error), *facts])
        return path

    @classmethod
    def load(cls, path: FilePath) -> Comparison:
        """What `to_csv` wrote; ValueError if `path` is anything else."""
        with Path(path).open(newline="", encoding="utf-8") as file:
            try:
                return cls._of(list(csv.DictReader(file)))
            except (csv.Error, KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{path} is no table that Comparison.to_csv wrote: {error!r}") from None

    @classmethod
    def _of(cls, lines: list[dict]) -> Comparison:
        pairs = [(line["layer_a"], line["layer_b"]) for line in lines]
        labels = [tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True)]
        if pairs != list(product(*labels)):
            raise ValueError("lines are missing, or in another order")
        values = [[float(line[name]) for name in ("cka", "standard_error")] for line in lines]
        cka, error = torch.tensor(values, dtype=torch.float64).view(*map(len, labels), 2).unbind(-1)
        facts = {name: read(lines[0][name]) for name, read in FACTS.items()}
        return cls(cka.contiguous(), error.contiguous(), *labels, **facts)

    def plot(
        self,
        path: FilePath,
        *,
        title: str | None = None,
        names: tuple[str, str] = ("model_a", "model_b"),
        limits: tuple[float, float] | None = None,
    ) -> list[Path]:
        """A heat map: to `path` if it ends in .png, .svg or .pdf, else to path.png and path.svg. Needs matplotlib.

        limits: (lowest, highest) of the colours; None: the range of the values with zero, which is white. Up to 12 x 12
        layers the values stand in the cells, NaN is grey. Equal comparisons give equal files.
        """
        return picture.save(self, path, title=title, names=names, limits=limits)

    def draw(
        self,
        axes: Any,
        *,
        title: str | None = None,
        names: tuple[str, str] = ("model_a", "model_b"),
        limits: tuple[float, float] | None = None,
    ) -> Any:
        """The heat map in a matplotlib Axes, first layers at the lower left; returns the image, for a colour bar."""
        return picture.draw(self, axes, title=title, names=names, limits=limits)
