# SPDX-License-Identifier: Apache-2.0
"""Runs spread over processes, one thread each: on small nets that beats threads, and results do not depend on it."""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import queue
import signal
from typing import NamedTuple

import distill_data
import torch
from distill_nets import SETUPS
from distill_train import Run, train_student


class Job(NamedTuple):
    method: str
    weight: float | None
    seed: int


_worker = None  # (data, teacher, setup, epochs, queue of finished epochs), in a worker process


def run_all(jobs: list[Job], data, teacher, key: tuple[str, str], epochs: int, processes: int, bar) -> list[Run]:
    """The runs of all jobs, in their order; `bar` advances by one an epoch."""
    if processes == 1:
        return [_run(job, data, teacher, SETUPS[key], epochs, bar.update) for job in jobs]
    context = multiprocessing.get_context("spawn")
    finished = context.Queue()
    arguments = (_pack(data, teacher), key, epochs, finished)
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start, arguments) as pool:
        futures = [pool.submit(_work, job) for job in jobs]
        try:
            waiting, shown = set(futures), 0
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, timeout=0.1)
                shown += _advance(bar, finished)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        # a result can overtake the last epochs in the queue
        bar.update(len(jobs) * epochs - shown)
        return [future.result() for future in futures]


def _run(job: Job, data, teacher, setup, epochs: int, on_epoch) -> Run:
    return train_student(job.method, job.weight, data, teacher, setup, job.seed, epochs, on_epoch)


def _pack(data, teacher) -> bytes:
    """Tensors as plain bytes: shared memory is small in some containers."""
    file = io.BytesIO()
    splits = {name: tuple(getattr(data, name) or ()) for name in ("train", "validation", "test")}
    facts = {name: getattr(data, name) for name in ("name", "classes", "shift", "flip")}
    torch.save((facts, splits, teacher.state_dict()), file)
    return file.getvalue()


def _start(packed: bytes, key, epochs: int, finished):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    torch.set_num_threads(1)
    facts, splits, state = torch.load(io.BytesIO(packed))
    splits = {name: distill_data.Split(*split) if split else None for name, split in splits.items()}
    data, setup = distill_data.Data(**facts, **splits), SETUPS[key]
    teacher = setup.teacher(data.classes)
    teacher.load_state_dict(state)
    _worker = (data, teacher.eval().requires_grad_(False), setup, epochs, finished)


def _work(job: Job) -> Run:
    data, teacher, setup, epochs, finished = _worker
    return _run(job, data, teacher, setup, epochs, lambda: finished.put(1))


def _advance(bar, finished) -> int:
    """Show the epochs that have ended since the last look, and return how many."""
    count = 0
    try:
        while True:
            count += finished.get_nowait()
    except queue.Empty:
        bar.update(count)
        return count
