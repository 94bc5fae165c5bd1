# SPDX-License-Identifier: Apache-2.0
"""The rows of bench/results as pages: what `python -m bench report FILE --plots DIR` prints and draws of each file."""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import plots, report  # noqa: E402


def page(file: Path, folder: Path) -> str:
    rows = report.load([file])
    # a caption of the report is a line above its table: here a heading
    text = re.sub(r"^([^|*\n].*)\n\n\|", r"## \1\n\n|", report.markdown(rows), flags=re.MULTILINE)
    drawn = plots.plots(rows, folder, suffixes=(".svg",))
    pictures = "\n\n".join(f"![{path.stem}]({path.name})" for path in drawn)
    return f"# {file.stem}\n\n{text}\n" + (f"\n## Plots\n\n{pictures}\n" if drawn else "")


def write(app):
    folder = Path(app.srcdir) / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in sorted((ROOT / "bench" / "results").glob("*.jsonl")):
        (folder / f"{file.stem}.md").write_text(page(file, folder))


def setup(app):
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
