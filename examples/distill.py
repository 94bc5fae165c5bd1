# SPDX-License-Identifier: Apache-2.0
"""A small student learns from a teacher on real images, once by each loss, over several seeds: table, plot, record.

    make demo                                             or: python examples/distill.py
    python examples/distill.py --setup B --losses rcka
    python examples/distill.py --data cifar100 --root DIR --device cuda

The weight of each loss was chosen on the validation split (`--tune`) and stands, with what it was chosen from, in
examples/weights.json; the test split is read once, after training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

try:
    import torch
    from distill_data import load
    from distill_methods import CONTROLS, METHODS
    from distill_nets import SETUPS, parameters
    from distill_parallel import Job, run_all
    from distill_report import CAVEAT, against_control, legend, make_row, save_plot, save_records, table
    from distill_train import accuracy, time_method, train_teacher
    from tqdm import tqdm

    from kdkernels.analysis.command import check_writable, device_of
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `make demo`, which installs what is needed, or: pip install -e '.[demo]'")

WEIGHTS = Path(__file__).with_name("weights.json")
TUNING_SEED = 1000  # the seeds of --tune start here: none of them appears in a table


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    names = f"all (default), or any of {', '.join(METHODS)}; {', '.join(CONTROLS)} always take part"
    add("--losses", nargs="+", default=["all"], metavar="NAME", help=names)
    add("--seeds", type=int, metavar="N", help="number of seeds (default: 5; 3 with --tune)")
    add("--seed", type=int, metavar="N", help=f"the first seed (default: 0; {TUNING_SEED} with --tune)")
    add(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of a student (default: 30 on digits, 15 in set-up B; 240 on CIFAR)",
    )
    setups = "A: few labels, the rest of the images without (default); B: all labels, on digits a smaller student"
    add("--setup", choices=("A", "B"), default="A", help=setups)
    add("--data", choices=("digits", "cifar100"), default="digits", help="which images (default: digits)")
    add("--root", metavar="DIR", help="the folder with the CIFAR-100 files")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--threads", type=int, metavar="N", help="CPU cores to use: so many runs at once (default: all)")
    add("--out", type=Path, default=Path("out/distill.png"), metavar="FILE",
        help="the plot (default: out/distill.png); a .json and a .csv file go beside it")  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="record of the weights (default: examples/weights.json)")
    add("--tune", action="store_true", help="choose the weights on the validation split and write them to --weights")
    add("--dry-run", action="store_true", help="one seed, one epoch, 256 images: does everything run?")
    options = parser.parse_args(arguments)
    finish(parser, options)
    return options


def finish(parser, options):
    names = [name for item in options.losses for name in item.split(",") if name]
    names = list(METHODS) if names == ["all"] else names
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"--losses: no loss is named {', '.join(unknown)}; there are {', '.join(METHODS)}")
    options.losses = [name for name in METHODS if name in names or name in CONTROLS]
    setup = SETUPS[options.data, options.setup]
    options.teacher_epochs = 1 if options.dry_run else setup.teacher_epochs
    if options.dry_run:
        options.seeds, options.epochs = options.seeds or 1, options.epochs or 1
    options.epochs = setup.epochs if options.epochs is None else options.epochs
    options.seeds = (3 if options.tune else 5) if options.seeds is None else options.seeds
    options.seed = (TUNING_SEED if options.tune else 0) if options.seed is None else options.seed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.threads = cores if options.threads is None else options.threads
    for name in ("seeds", "epochs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: give at least 1")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}: give 0 or more")
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out is {options.out}: name a .png, .pdf or .svg file")
    # a dry run must not replace the committed record
    options.record = options.weights or (options.out.with_suffix(".weights.json") if options.dry_run else WEIGHTS)
    try:
        options.device = device_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    options.processes = 1 if options.device.type != "cpu" or options.dry_run else options.threads


def main(arguments=None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    # one thread a run: results then do not depend on --threads
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    written = options.record if options.tune else options.out
    try:
        check_writable(written.parent, [written.with_suffix(end).name for end in (written.suffix, ".json", ".csv")],
                       "--weights" if options.tune else "--out")  # fmt: skip
        data = load(options.data, options.root)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.dry_run:
        data = data.first(256)
    data, key = data.to(options.device), (options.data, options.setup)
    setup = SETUPS[key]
    if options.tune:
        data = data._replace(test=None)
    jobs = tuning_jobs(options) if options.tune else comparison_jobs(options)
    options.processes = min(options.processes, len(jobs))
    print(describe(options, data, setup, len(jobs)))
    total = options.teacher_epochs + len(jobs) * options.epochs
    with tqdm(total=total, unit="epoch", desc="teacher", dynamic_ncols=True, smoothing=0.1) as bar:
        teacher = train_teacher(data, setup, options.seed, options.teacher_epochs, bar.update)
        bar.set_description(f"{len(jobs)} students")
        runs = run_all(jobs, data, teacher, key, options.epochs, options.processes, bar)
    if options.tune:
        record_weights(options, runs)
    else:
        report(options, data, teacher, setup, runs)
    print(f"Took {time.perf_counter() - began:.0f} s.")
    return 0


def describe(options, data, setup, count: int) -> str:
    labels = setup.labels or len(data.train.labels)
    sizes = f"{len(data.train.labels)} training images, {labels} of them with labels"
    sizes += f", {len(data.validation.labels)} validation"
    sizes += " images, no test images" if data.test is None else f" and {len(data.test.labels)} test images"
    nets = [parameters(net(data.classes)) for net in (setup.teacher, setup.student)]
    return (
        f"{data.name}, set-up {options.setup}: {sizes}\n"
        f"teacher {nets[0]:,} parameters, student {nets[1]:,}; {plural(options.seeds, 'seed')}, "
        f"{plural(options.epochs, 'epoch')}; {plural(count, 'run')} on {options.device}, {options.processes} at a time"
    )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def comparison_jobs(options) -> list[Job]:
    options.chosen = {name: weight_of(options, name) for name in options.losses}
    seeds = range(options.seed, options.seed + options.seeds)
    return [Job(name, options.chosen[name], seed) for name in options.losses for seed in seeds]


def weight_of(options, name: str) -> float | None:
    """The recorded weight, else the first of the method's grid: the value of the papers and libraries."""
    if not METHODS[name].grid:
        return None
    entry = read_record(options.weights or WEIGHTS).get(options.data, {}).get(options.setup, {}).get(name)
    if entry is None:
        print(
            f"note: no weight was tuned for {name} on {options.data} {options.setup}: using {METHODS[name].grid[0]:g}"
        )
        return METHODS[name].grid[0]
    return float(entry["weight"])


def report(options, data, teacher, setup, runs):
    by_method = {name: [run for run in runs if run.method == name] for name in options.losses}
    rows = []
    for name, own in by_method.items():
        timing = time_method(name, options.chosen[name], data, teacher, setup, 3 if options.dry_run else 60)
        rows.append(make_row(name, METHODS[name].title, options.chosen[name], own, by_method["ce"], timing))
    teacher_test = accuracy(teacher, data.test)
    where = "CPU time of one thread"
    if options.device.type == "cuda":
        where = f"on {torch.cuda.get_device_name(options.device)}"
    print(f"\n{table(rows)}\n\n{legend(options.seeds > 1, where)}\n")
    print(f"The teacher reaches {teacher_test:.1f} %.\n{against_control(rows)}\n\n{CAVEAT}\n")
    if options.dry_run:
        print("This was a dry run: one epoch on 256 images, so the figures mean nothing.\n")
    facts = {
        "data": options.data, "setup": options.setup, "seeds": options.seeds, "seed": options.seed,
        "epochs": options.epochs, "device": str(options.device), "torch": torch.__version__,
        "teacher_test": teacher_test,
    }  # fmt: skip
    heading = (
        f"{options.data}, set-up {options.setup}, {plural(options.seeds, 'seed')}, {plural(options.epochs, 'epoch')}"
    )
    save_plot(options.out, heading, rows, teacher_test)
    files = [options.out, *save_records(options.out, facts, rows)]
    print(f"Saved {', '.join(map(str, files))}.")


def tuning_jobs(options) -> list[Job]:
    seeds = range(options.seed, options.seed + options.seeds)
    return [Job(name, w, seed) for name in options.losses for w in METHODS[name].grid for seed in seeds]


def record_weights(options, runs):
    record = read_record(options.record)
    entries = record.setdefault(options.data, {}).setdefault(options.setup, {})
    print()
    for name in (name for name in options.losses if METHODS[name].grid):
        scores = {}
        for weight in sorted(METHODS[name].grid):
            own = [run.curve[-1] for run in runs if (run.method, run.weight) == (name, weight)]
            scores[weight] = round(statistics.mean(own), 2)
        # of equals the smallest
        best = max(scores, key=scores.get)
        tried = ", ".join(f"{weight:g}: {score:.2f}" for weight, score in scores.items())
        print(f"{METHODS[name].title:28} weight {best:g}   (validation accuracy by weight: {tried})")
        entries[name] = {
            "weight": best,
            "validation_accuracy": {f"{weight:g}": score for weight, score in scores.items()},
            "seeds": [options.seed + i for i in range(options.seeds)],
            "epochs": options.epochs,
            "command": f"python examples/distill.py --tune --data {options.data} --setup {options.setup}",
        }
    record[options.data][options.setup] = {name: entries[name] for name in METHODS if name in entries}
    whole = options.record.with_name(options.record.name + ".new")
    whole.write_text(json.dumps(record, indent=1) + "\n")
    whole.replace(options.record)  # what is there stays until all is written
    print(f"Saved {options.record}.")


def read_record(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        sys.exit(f"error: {path} is not JSON ({error}): restore it, or make it again with --tune")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
