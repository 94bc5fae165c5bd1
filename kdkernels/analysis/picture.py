# SPDX-License-Identifier: Apache-2.0
"""The heat map of a comparison, in matplotlib, which only this needs."""

from __future__ import annotations

from os.path import commonprefix
from pathlib import Path

LABELS = 90  # layers up to which each has its name at the axis
CELLS = 12  # layers up to which each pair has its value in its cell
COLOURS = "RdBu_r"  # white is zero
WITHOUT_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # equal pictures are equal files


def save(found, path, **how) -> list[Path]:
    """To `path`, or to path.png and path.svg where it has no suffix."""
    figure_of, context = _matplotlib()
    path = Path(path)
    paths = [path] if path.suffix else [path.with_name(path.name + end) for end in (".png", ".svg")]
    cell = 0.42 if _few(found) else 0.22
    width, height = (min(14.0, 2.8 + cell * len(labels)) for labels in (found.labels_b, found.labels_a))
    figure = figure_of(figsize=(width + 1.2, height + 0.6), layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(draw(found, axes, **how), ax=axes, label=found.quantity)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # each file would be laid out a little further
    with context({"svg.fonttype": "none", "svg.hashsalt": "kdkernels"}):  # text stays text
        for one in paths:
            figure.savefig(one, dpi=150, metadata=WITHOUT_DATE.get(one.suffix))
    return paths


def draw(found, axes, *, title: str | None, names: tuple[str, str], limits: tuple[float, float] | None):
    """`Comparison.draw`."""
    low, high = _range(found) if limits is None else limits
    if not low < high:
        raise ValueError(f"limits is {limits!r}: give (lowest, highest) of the colours")
    colours = _colours(low, high)
    below, above = (found.cka < low).any(), (found.cka > high).any()
    colours.colorbar_extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
        (bool(below), bool(above)), "neither"
    )
    image = axes.imshow(found.cka.numpy(), origin="lower", vmin=low, vmax=high, cmap=colours, aspect="auto")
    axes.set_facecolor("0.75")  # shows where a value is NaN
    for axis, labels, name in ((axes.xaxis, found.labels_b, names[1]), (axes.yaxis, found.labels_a, names[0])):
        _label(axis, labels, name)
    axes.tick_params(axis="x", labelrotation=90)
    axes.set_title(_title(found) if title is None else title, fontsize=9)
    if _few(found):
        _write_values(axes, image, found.cka)
    return image


def _few(found) -> bool:
    return max(found.cka.shape) <= CELLS


def _range(found) -> tuple[float, float]:
    """From the lowest to the highest value, zero included."""
    known = found.cka[found.cka.isfinite()]
    low, high = (min(0.0, float(known.min())), max(0.0, float(known.max()))) if len(known) else (0.0, 0.0)
    return (low, high) if low < high else (0.0, 1.0)


def _colours(low: float, high: float):
    """Zero is white and both signs are as strong; above zero alone, white is the lowest value."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    most = max(-low, high)
    start = 0.5 if low >= 0 else 0.5 + 0.5 * low / most
    end = 0.5 if high <= 0 else 0.5 + 0.5 * high / most
    return ListedColormap([colormaps[COLOURS](start + (end - start) * k / 255) for k in range(256)])


def _label(axis, labels, name: str):
    step = -(-len(labels) // LABELS)
    prefix, short = shortened(labels)
    axis.set_ticks(range(0, len(labels), step), short[::step], fontsize=7)
    said = [name] + [f"{prefix}*"] * bool(prefix) + [f"1 of {step} layers named"] * (step > 1)
    axis.set_label_text(", ".join(said))


def shortened(labels) -> tuple[str, list[str]]:
    """What all labels begin with, whole parts of it, and what is left of each."""
    prefix = commonprefix(labels) if len(labels) > 1 else ""
    prefix = prefix[: prefix.rfind(".") + 1]
    return prefix, [label[len(prefix) :] for label in labels]


def _title(found) -> str:
    how = "unbiased" if found.unbiased else "biased"
    rows = f"{found.rows:,} rows in {found.batches:,} batches"
    return f"{how} {found.quantity}, kernel {found.kernel.strip(chr(39))}\n{rows}"


def _write_values(axes, image, values):
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = value == value and 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
            axes.text(column, row, two_digits(value), **text)


def two_digits(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if value == value else "nan"  # never -0.00


def _matplotlib():
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # without pyplot: no global state, no display
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plot needs matplotlib: pip install matplotlib; to_csv does without") from None
    return Figure, rc_context
