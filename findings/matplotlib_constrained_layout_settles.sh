#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# matplotlib 3.11.2: a figure with layout="constrained" and a colour bar is drawn differently each time it is saved: the
# second file is not the first, the third not the second; from then on they stay. A salted svg.hashsalt and no date, the
# documented way to equal files, do not help, nor does one draw before the first save. Who commits plots, or compares
# pictures in tests, is hurt: whether a figure was shown, or saved as PNG first, is seen in the bytes of the SVG.
# Where: matplotlib/layout_engine.py, ConstrainedLayoutEngine.execute, runs at every draw, and _constrained_layout.py
# starts from the positions (and so the decorations' sizes) of the draw before; it stops after two passes, not when
# nothing moves.
# Belief: a layout is a function of the figure; saving a figure that nobody touched gives the same file.
# Seen with matplotlib 3.11.2, Python 3.11: equal to the file before: False False True
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q "matplotlib==3.11.2"

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import io

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "a salt"
figure = Figure(layout="constrained")
axes = figure.add_subplot(title="two values", ylabel="row")
figure.colorbar(axes.imshow([[0.5, 0.2]], aspect="auto"), ax=axes, label="value")


def saved():
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


files = [saved() for _ in range(4)]
print("equal to the file before:", *(a == b for a, b in zip(files, files[1:])))
PY
diff "$folder/seen" - <<'TXT'
equal to the file before: False False True
TXT
