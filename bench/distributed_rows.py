# SPDX-License-Identifier: Apache-2.0
"""Statistics of the rows of all ranks: bytes that reach a rank and the memory it needs, by each way of computing them.

moments    linear kernels: sums over the ranks of p x p products
gather     every rank gets all rows and computes everything
ring       blocks of rows pass by, every rank computes its rows' part

Ranks are processes of this machine with gloo, one thread each. Bytes are counted where torch.distributed is asked for
them (`traffic.py`); the peak is what the system saw a rank use above its own features in forward + backward, the most
of all ranks. Times are not taken: the ranks share the cores and the network is none.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from . import memory, traffic
from .case import Target
from .measure import step

WAYS = {"moments": None, "gather": 2**62, "ring": 0}  # the bytes of features from which the ring is taken


class DistributedCase(NamedTuple):
    name: str
    op: str
    n: int  # rows of a rank
    p: int
    ways: tuple[str, ...]
    kernel: str = "linear"
    options: dict = {}
    ranks: tuple[int, ...] = (2, 4)
    quick: bool = False
    dtype: str = "float32"
    targets: tuple[Target, ...] = ()
    family: str = "distributed"
    regime: str = "randn"
    sigma: str = "number"

    @property
    def rows(self) -> int:
        return self.n

    @property
    def shape(self) -> dict:
        return {"n": self.n, "p": self.p, "q": self.p}

    def smaller(self) -> DistributedCase:
        return self._replace(n=self.n // 16, p=self.p // 16, ranks=(2,))

    def function(self):
        """f(x, y), over all ranks."""
        import kdkernels as kd

        how = {"group": "world", **self.options}
        if self.kernel == "rbf":
            how["kernel"] = kd.RBF((2.0 * self.p) ** 0.5)  # about the median distance of standard normal rows
        return lambda x, y: getattr(kd, self.op)(x, y, **how)


def rows(case: DistributedCase) -> list[dict]:
    """What each way takes on each number of ranks: one launch a number of ranks."""
    found = []
    for ranks in case.ranks:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += ["-m", "bench.distributed_rows", json.dumps(case), str(path)]
            # freed blocks go back to the system, so that each way starts from the same memory
            quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(memory.ROOT)}
            done = subprocess.run(command, cwd=memory.ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(_said(done.stderr) or f"the ranks ended with {done.returncode}")
            found += json.loads(path.read_text())
    return found


def _said(stderr: str) -> str | None:
    """A rank's own error, or the signal that ended it; the launcher's is only that there was one."""
    lines = [line.strip() for line in stderr.splitlines()]
    own = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return next(iter(own + [line for line in lines if "Signal " in line]), None)


def _on_this_rank(case: DistributedCase, path: str) -> None:
    import torch.distributed as dist

    from kdkernels.gram.distributed import ring

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world, found = dist.get_rank(), dist.get_world_size(), []
    generator, function = torch.Generator().manual_seed(rank), case.function()
    y = torch.randn(case.n, case.p, generator=generator)
    x = (y + torch.randn(case.n, case.p, generator=generator)).requires_grad_()
    for way in case.ways:
        if WAYS[way] is not None:
            ring.RING_FROM = WAYS[way]
        step(function, x[:8].detach().requires_grad_(), y[:8])
        mine = {"way": way, "ranks": world, "own_bytes": x.nbytes + y.nbytes} | _taken(function, x, y, world)
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
        if any(one["value"] != mine["value"] for one in everyone):
            raise RuntimeError(f"{way}: the ranks have different values")
        most = max(everyone, key=lambda one: sum(one["received"].values()))
        peaks = [one["peak_bytes"] for one in everyone]
        found.append({**most, "peak_bytes": None if None in peaks else max(peaks)})
    if rank == 0:
        Path(path).write_text(json.dumps(found))
    dist.destroy_process_group()
    # all is written: what torch leaves running now and then aborts the process as Python ends
    sys.stderr.flush()
    os._exit(0)


def _taken(function, x, y, world: int) -> dict:
    """By a step: the bytes that arrive, its value; then by another one the memory at its peak."""
    values = []
    received = traffic.received(lambda: values.append(float(step(function, x, y).detach())), world)
    x.grad = None
    peak = _peak(lambda: step(function, x, y))
    x.grad = None
    return {"value": values[0], "received": received, "peak_bytes": peak}


def _peak(call) -> int | None:
    """Resident bytes above what there was, at the peak of the call."""
    if not memory.supported():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return memory.above(call)


def cpu_cases() -> list[DistributedCase]:
    both = ("gather", "ring")
    return [
        DistributedCase("linear CKA, 512 rows a rank", "cka", 512, 256, ("moments",), quick=True),
        DistributedCase("linear CKA, 4096 rows a rank", "cka", 4096, 256, ("moments",)),
        DistributedCase("Gram-MSE, 512 rows a rank", "gram_mse", 512, 256, ("moments",)),
        DistributedCase("rbf CKA, 512 rows a rank", "cka", 512, 4096, both, "rbf", quick=True),
        DistributedCase("SP, 512 rows a rank", "gram_mse", 512, 4096, both, options={"normalize": "row"}),
        DistributedCase("MMD, 512 rows a rank of each side", "mmd", 512, 4096, both, "rbf"),
    ]


def cuda_cases() -> list[DistributedCase]:
    """None: a machine with one GPU has no ranks to measure between."""
    return []


if __name__ == "__main__":
    _on_this_rank(DistributedCase(*json.loads(sys.argv[1])), sys.argv[2])
