# SPDX-License-Identifier: Apache-2.0
"""Rows shared out between threads: NumPy lets go of the interpreter's lock in its loops, and rows need no one else."""

from __future__ import annotations

import threading

import numpy as np
import torch

# elements that are worth a thread: below, the interpreter goes to and fro for longer than is gained
LEAST = 2**18  # where they are sorted
LIGHT = 2**20  # where they are passed over a few times
QUIET = {"invalid": "ignore", "over": "ignore", "divide": "ignore", "under": "ignore"}

_here = threading.local()  # a part is not shared out again


def over_rows(run, R: int, n: int, light: bool = False) -> list:
    """run(slice) of all of R rows of n, in as many parts as PyTorch has threads; the results, in order.

    A part has `LEAST` elements or more, `LIGHT` if the work is; a single one runs as the caller does.

    Threads of their own, not a pool: a process that forks keeps none.
    """
    workers = min(R, R * n // (LIGHT if light else LEAST))
    if workers > 1:
        workers = 1 if getattr(_here, "shared_out", False) else min(workers, torch.get_num_threads())
    if workers <= 1:
        return [run(slice(0, R))]
    parts = [slice(R * k // workers, R * (k + 1) // workers) for k in range(workers)]
    results: list = [None] * workers
    errors: list[BaseException] = []

    def work(k: int):
        _here.shared_out = True
        # both are settings of a thread
        with torch.no_grad(), np.errstate(**QUIET):
            try:
                results[k] = run(parts[k])
            except BaseException as error:
                errors.append(error)
        _here.shared_out = False

    others = [threading.Thread(target=work, args=(k,)) for k in range(1, workers)]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]
    return results


def groups(rows: slice, n: int, size: int) -> list[slice]:
    """A slice of rows of n in slices of about `size` elements, so that what is made of one fits a cache."""
    step = max(1, size // max(n, 1))
    return [slice(k, min(k + step, rows.stop)) for k in range(rows.start, rows.stop, step)]
