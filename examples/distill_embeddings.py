# SPDX-License-Identifier: Apache-2.0
"""A real sentence-embedding model distilled into a student of 8 or 16 numbers a sentence: no labels, no logits.

    make demo-embeddings                                  or: python examples/distill_embeddings.py
    python examples/distill_embeddings.py --widths 64 --losses kl-05 sp
    python examples/distill_embeddings.py --texts sentences.txt --model FOLDER

Where the student's embedding has another width than the teacher's, a loss either learns a projection, or compares how
the sentences of a batch lie to each other. The test split is read once, after training.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

try:
    import torch
    from embeddings_data import load, prepare
    from embeddings_methods import METHODS, RATES
    from embeddings_report import CAVEAT, against_baseline, save_plot, save_record, table
    from embeddings_student import Run, ceiling, train
    from tqdm import tqdm

    from kdkernels.analysis.command import check_writable
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `make demo-embeddings`, which installs what is needed, or: pip install -e '.[embeddings]'")

TUNING_SEED = 1000  # of --tune: it appears in no table


class Job(NamedTuple):
    method: str
    width: int
    rate: float
    seed: int
    epochs: int
    batch: int


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--losses", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME",
        help=f"any of {', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--widths", nargs="+", type=at_least(1), default=[8, 16], metavar="N", help="of the student (default: 8 16)")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="number of seeds (default: 3)")
    add("--epochs", type=at_least(1), default=12, metavar="N", help="default: 12")
    add("--batch", type=at_least(12), default=256, metavar="N", help="sentences a step (default: 256)")
    add("--count", type=at_least(100), default=12_500, metavar="N", help="sentences, all splits (default: 12,500)")
    add("--texts", type=Path, metavar="FILE", help="sentences, one a line (default: docstrings of what is installed)")
    add("--model", type=Path, metavar="DIR", help="another teacher: config.json, model.safetensors, tokenizer.json")
    add("--threads", type=at_least(1), default=cores(), metavar="N", help="so many runs at once (default: all cores)")
    add("--out", type=Path, default=Path("out/embeddings.png"), metavar="FILE",
        help="the figure (default: out/embeddings.png); a record and the teacher's part go beside it")  # fmt: skip
    add("--tune", action="store_true", help="say which learning rate is best on the validation split, and end")
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out is {options.out}: name a .png, .pdf or .svg file")
    for name in ("texts", "model"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} is {path}: there is no such {'file' if name == 'texts' else 'folder'}")
    return options


def at_least(least: int):
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is too small: give at least {least}")
        return int(text)

    return integer


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments=None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    cache = options.out.with_name("teacher.pt")
    torch.set_num_threads(options.threads)
    try:
        check_writable(
            options.out.parent, [options.out.name, options.out.with_suffix(".json").name, cache.name], "--out"
        )
        print("Sentences and the teacher's embeddings: kept in a file, else a minute or two.", flush=True)
        said = prepare(cache, options.model, options.texts, options.count)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    data = load(cache)
    sizes = " / ".join(str(len(split.tokens)) for split in data[:3])
    print(f"{said}\n{sizes} sentences for training, validation, test ({time.perf_counter() - began:.0f} s)")
    jobs = tuning_jobs(options) if options.tune else comparison_jobs(options)
    runs = run_all(jobs, cache, options.threads)
    if options.tune:
        say_rates(runs)
    else:
        report(options, said, data, runs)
    print(f"Took {time.perf_counter() - began:.0f} s.")
    return 0


def comparison_jobs(options) -> list[Job]:
    seeds, how = range(options.seeds), (options.epochs, options.batch)
    every = itertools.product(options.losses, options.widths, seeds)
    return [Job(name, width, METHODS[name].rate, seed, *how) for name, width, seed in every]


def tuning_jobs(options) -> list[Job]:
    seeds, how = range(TUNING_SEED, TUNING_SEED + options.seeds), (options.epochs, options.batch)
    every = itertools.product(options.losses, options.widths, RATES, seeds)
    return [Job(*which, *how) for which in every]


_data = None  # in a worker


def _start(cache: Path):
    global _data
    _data = load(cache)
    torch.set_num_threads(1)  # so results do not depend on --threads


def _work(job: Job) -> Run:
    name, width, rate, seed, epochs, batch = job
    return train(_data, name, METHODS[name].make, width, rate, seed, epochs, batch)


def run_all(jobs: list[Job], cache: Path, processes: int) -> list[Run]:
    bar = {"total": len(jobs), "unit": "run", "dynamic_ncols": True}
    if min(processes, len(jobs)) == 1:
        _start(cache)
        return list(tqdm(map(_work, jobs), **bar))
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (cache,)) as pool:
        return list(tqdm(pool.map(_work, jobs), **bar))


def say_rates(runs: list[Run]):
    for name in dict.fromkeys(run.method for run in runs):
        scores = {
            rate: [v for run in runs if (run.method, run.rate) == (name, rate) for v in run.validation]
            for rate in RATES
        }
        best = max(scores, key=lambda rate: statistics.mean(scores[rate]))
        tried = ", ".join(f"{rate:g}: {statistics.mean(values):.4f}" for rate, values in scores.items())
        print(f"{METHODS[name].title:30} {best:g}   (mean of rho and recall, validation: {tried})")


def report(options, said: str, data, runs: list[Run]):
    ceilings = {width: ceiling(data, width) for width in options.widths}
    for width in options.widths:
        print(f"\n{table(runs, width, ceilings[width])}\n\n{against_baseline(runs, width)}")
    print(f"\n{CAVEAT}\n")
    facts = {"of": said, "epochs": options.epochs, "batch": options.batch, "torch": torch.__version__}
    record = options.out.with_suffix(".json")
    save_record(record, facts, runs, ceilings)
    save_plot(options.out, runs, ceilings)
    print(f"Saved {options.out}, {record}.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
