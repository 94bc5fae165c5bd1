# SPDX-License-Identifier: Apache-2.0
"""The tables and the picture of README.md, which the site takes from there: `python tools/readme.py` writes them.

Losses: from their classes, the first line of the docstring and what the call takes. Speed: from rows in bench/results.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402
from kdkernels import losses  # noqa: E402
from kdkernels.losses.maps import MapLoss  # noqa: E402

README, PICTURE = ROOT / "README.md", ROOT / "docs" / "speed.svg"
# of each the rival that a user would otherwise take
CASES = (
    ("nystrom_transfer n 256, p 512, m 64", "eager"),
    ("gram_mse batch", "eager"),
    ("PKTLoss 256 x 512", "eager"),
    ("KDLoss 64 x 10", "eager"),
    ("cka linear batch 64 width 512", "eager"),
    ("cka rbf batch 256 width 512", "eager"),
    ("cka linear long", "eager"),
    ("distillation_kl 1024 x 1000", "eager"),
    ("RCKALoss 256 x 1000", "eager"),
    ("RKDAngleLoss 256 x 512", "eager"),
    ("NSTLoss 64 x 256 x 8 x 8", "eager"),
    ("ranking soft_rank 64 x 32", "torchsort"),
    ("ranking soft_rank 256 x 1000", "torchsort"),
    ("ranking spearman 256 x 1000", "torchsort"),
)


def takes(loss: type, call, made) -> str:
    if "student_logits" in call:
        what = ["logits"] + ["features of stages"] * ("student_features" in call)
        what += ["`kd.LinearLogits`"] * loss.takes_heads + ["`kd.TopKLogits`"] * loss.takes_topk
    else:
        levels = issubclass(loss, losses.base.FeatureLoss)
        rows = "features" if "rows" in made or not levels else "maps"
        what = ["maps or tokens" if issubclass(loss, MapLoss) else rows] + ["levels"] * levels
    return ", ".join(what)


def losses_table() -> str:
    lines = ["| `kd.losses.` | what it is | takes | labels | mask | token_weights | group |", "|" + "---|" * 7]
    for name in losses.__all__:
        loss = getattr(losses, name)
        call, made = (inspect.signature(f).parameters for f in (loss.forward, loss))
        if not issubclass(loss, losses.base.Loss):
            cells = ["the loss it holds", *[""] * 4]
        else:
            needed = call.get("labels", inspect.Parameter("none", inspect.Parameter.KEYWORD_ONLY, default=None))
            labels = "needed" if needed.default is needed.empty or "mixup_batch" in call else "yes" * ("labels" in call)
            flags = ["yes" * (argument in found) for argument, found in
                     (("mask", call), ("token_weights", call), ("group", made))]  # fmt: skip
            cells = [takes(loss, call, made), labels, *flags]
        lines.append("| " + " | ".join([f"`{name}`", inspect.getdoc(loss).split("\n")[0].rstrip("."), *cells]) + " |")
    return "\n".join(lines)


def short(number: float) -> str:
    return f"{number:.2g}" if number < 1 else f"{number:.1f}" if number < 10 else f"{number:.0f}"


def time(ms: float) -> str:
    return f"{short(ms)} ms" if ms < 100 else f"{short(ms / 1e3)} s"


def label(row: dict) -> str:
    """The case by what was measured: the op and its sizes, where the name of the case does not say them."""
    if "groups" not in row["shape"]:
        return row["case"].removeprefix("ranking ")
    kernel = f" {row['kernel']}" if row["op"] == "cka" else ""
    return f"{row['op']}{kernel} {row['shape']['n']} x {row['shape']['p']}"


def measured() -> list[tuple[dict, dict, str]]:
    """Our row, the rival's and the rival's name for each of the cases."""
    rows = report.load(sorted((ROOT / "bench" / "results").glob("*-rows.jsonl")))
    steps = [row for row in rows if row["kind"] == "time" and row["status"] == "ok" and row["phase"] == "step"]
    found = []
    for case, rival in CASES:
        of_case = [row for row in steps if row["case"] == case]
        ours = [row for row in of_case if row["contender"] == "kdkernels"]
        (theirs,) = (row for row in of_case if row["contender"] == rival)
        found.append((next((row for row in ours if row["backend"] == "cpp"), ours[0]), theirs, rival))
    return sorted(found, key=lambda case: case[0]["ratios"][case[2]][1])


def speed_table() -> str:
    lines = ["| case | against | theirs | here | speed | peak extra memory |", "|" + "---|" * 6]
    for ours, theirs, rival in measured():
        peaks = [theirs["peak_bytes"], ours["peak_bytes"]]
        memory = "" if None in peaks else " -> ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks)
        times = time(theirs["ms_p50"]), time(ours["ms_p50"]), f"{short(ours['ratios'][rival][1])} x"
        lines.append("| " + " | ".join([label(ours), rival, *times, memory]) + " |")
    return "\n".join(lines)


def draw(path: Path):
    """The speeds of the table as bars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "kdkernels", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    found = measured()
    speeds = [ours["ratios"][rival][1] for ours, _, rival in found]
    labels = [f"{label(ours)} vs {rival}" for ours, _, rival in found]
    figure, axes = plt.subplots(figsize=(8, 4))
    colours = {"eager": "#4477aa", "torchsort": "#ee7733"}
    bars = axes.barh(labels, [s - 1 for s in speeds], left=1, color=[colours[rival] for _, _, rival in found])
    axes.bar_label(bars, [f"{short(s)} x" for s in speeds], padding=3, fontsize=8)
    axes.set(xscale="log", xlim=(0.25, 500), xlabel="speed, forward + backward: right of 1 we are faster")
    axes.set_xticks([0.5, 1, 2, 5, 10, 50, 200], ["0.5", "1", "2", "5", "10", "50", "200"])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def written(text: str) -> str:
    for name, table in (("losses", losses_table()), ("speed", speed_table())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md needs one {begin} and, after it, one {end}")
        text = pattern.sub(lambda _, new=f"{begin}\n\n{table}\n\n{end}": new, text)
    return text


def main():
    README.write_text(written(README.read_text()))
    draw(PICTURE)


if __name__ == "__main__":
    main()
