# SPDX-License-Identifier: Apache-2.0
"""What does distillation move? CKA between the layers of the digits teacher and its students, before and after.

    python examples/compare_models.py                       (under a minute on two cores; needs the demo packages)
    python examples/compare_models.py --losses kd cka dist --seed 1

All students start from the same weights and see the same batches: one as it starts, one trained on the labels alone,
and one for each loss (set-up A of examples/distill.py, with its weights). Each is compared with the teacher, layer by
layer, on test images that nobody trained on; below stands what training and what a loss changed. CKA is the unbiased
estimate over batches, with its standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

try:
    import matplotlib
    import torch
    from distill_data import load
    from distill_methods import METHODS
    from distill_nets import SETUPS
    from distill_train import Student, accuracy, train_teacher
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `make demo` once, which installs what is needed, or: pip install -e '.[demo]'")

import kdkernels as kd
from kdkernels.analysis.command import check_writable

WEIGHTS = Path(__file__).with_name("weights.json")
BATCH = 63  # ten batches of the 630 test images
LAYERS = {
    "body.0": "conv 1", "body.1": "norm 1", "body.2": "relu 1", "body.3": "conv 2", "body.4": "norm 2",
    "body.5": "relu 2", "body.6": "pool", "body.8": "linear", "body.9": "norm 3", "body.10": "features",
    "head": "logits",
}  # fmt: skip


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    losses = [name for name, method in METHODS.items() if method.make]
    parser.add_argument("--losses", nargs="+", default=["kd", "cka"], choices=losses, metavar="NAME",
                        help=f"any of {', '.join(losses)} (default: kd cka)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="of teacher and students (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("out/compare_models.png"), metavar="FILE",
                        help="the picture; a .csv file of each student goes beside it")  # fmt: skip
    return parser.parse_args(arguments)


def train(options, data, setup):
    """The teacher, and {what it is: student}: as it starts, by the labels alone, by each loss."""
    epochs = options.epochs or setup.epochs
    weights = json.loads(WEIGHTS.read_text())["digits"]["A"]
    students = {}
    with tqdm(total=epochs * (2 + len(options.losses)), unit="epoch", desc="training", dynamic_ncols=True) as bar:
        teacher = train_teacher(data, setup, options.seed, epochs, bar.update)
        students["as it starts"] = Student("ce", None, data, teacher, setup, options.seed, epochs).net
        for name in ("ce", *options.losses):
            weight = weights[name]["weight"] if name in weights else None
            student = Student(name, weight, data, teacher, setup, options.seed, epochs)
            for _ in range(epochs):
                student.epoch()
                bar.update()
            students["labels alone" if name == "ce" else METHODS[name].title] = student.net
    return teacher, {what: net.eval() for what, net in students.items()}


def compared(teacher, student, images) -> kd.Comparison:
    """Rows are the teacher's layers, columns the student's."""
    found = kd.compare_models(teacher, student, images.split(BATCH), list(LAYERS), progress=False)
    names = tuple(LAYERS[label] for label in found.labels_a)
    return dataclasses.replace(found, labels_a=names, labels_b=names)


def draw(path: Path, found: dict[str, kd.Comparison], tests: dict[str, float]):
    """Above the heat maps, below what each loss changed against the labels alone."""
    from matplotlib.figure import Figure

    columns, start, labels = len(found), found["as it starts"], found["labels alone"]
    limits = min(0.0, *(float(one.cka.min()) for one in found.values())), 1.0
    figure = Figure(figsize=(5.4 * columns + 1, 11.4), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False)
    for place, (what, one) in enumerate(found.items()):
        title = f"{what}\ntest accuracy {tests[what]:.1f} %"
        image = one.draw(panels[0][place], title=title, names=("teacher", "student"), limits=limits)
        if one is start:
            panels[1][place].set_axis_off()
            continue
        against, what = (start, "the start") if one is labels else (labels, "labels alone")
        how = {"title": f"change against {what}", "names": ("teacher", "student"), "limits": (-0.3, 0.3)}
        change = (one - against).draw(panels[1][place], **how)
    figure.colorbar(image, ax=panels[0].tolist(), label="CKA")
    figure.colorbar(change, ax=panels[1].tolist(), label="change of CKA")
    figure.savefig(path, dpi=100)


def table(found: dict[str, kd.Comparison], tests: dict[str, float]) -> str:
    """CKA of each layer with the teacher's layer of the same name."""
    width = max(map(len, found))
    shown = ("relu 1", "relu 2", "features", "logits")
    lines = [f"{'student':{width}}  test, %" + "".join(f"{name:>16}" for name in shown)]
    for what, one in found.items():
        places = [one.labels_a.index(name) for name in shown]
        cells = [f"{one.cka[k, k]:.3f} +- {one.standard_error[k, k]:.3f}" for k in places]
        lines.append(f"{what:{width}}  {tests[what]:7.1f}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main(arguments=None) -> int:
    options, began = parse(arguments), time.perf_counter()
    try:
        check_writable(options.out.parent, [options.out.name], "--out")
    except OSError as error:
        sys.exit(f"error: {error}")
    matplotlib.use("Agg")
    torch.set_num_threads(1)  # the nets are small: a second thread only waits
    data, setup = load("digits"), SETUPS["digits", "A"]
    teacher, students = train(options, data, setup)
    images = data.test.images[torch.randperm(len(data.test.images), generator=torch.Generator().manual_seed(0))]
    found = {what: compared(teacher, student, images) for what, student in students.items()}
    tests = {what: accuracy(student, data.test) for what, student in students.items()}
    print(f"\nUnbiased CKA of each layer with the same layer of the teacher, {len(images)} test images:\n")
    print(f"{table(found, tests)}\n")
    draw(options.out, found, tests)
    files = [options.out]
    for what, one in found.items():
        name = f"{options.out.stem}-{what.replace(' ', '-').replace(',', '')}.csv"
        files.append(one.to_csv(options.out.with_name(name)))
    print(f"Saved {', '.join(map(str, files))}.\nTook {time.perf_counter() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
