# SPDX-License-Identifier: Apache-2.0
"""What is measured: one record a case, with the figure it has to reach where the project states one."""

from __future__ import annotations

from typing import NamedTuple

from kdkernels.gram import spec

from . import analysis_rows, distributed_rows, head_rows, logit_rows, loss_rows, nystrom_rows, projecting, ranking
from .case import Target


class Case(NamedTuple):
    name: str
    op: str
    n: int
    p: int
    q: int
    kernel: str = "linear"
    options: dict = {}
    dtype: str = "float32"
    regime: str = "relu:3:1"
    groups: int = 0
    sigma: str = "number"  # number: the float64 median, given to all contenders; rule: each finds its own median
    transpose: bool = False  # the op sees x.mT, y.mT: class x class on logits
    targets: tuple[Target, ...] = ()
    quick: bool = False  # part of --quick
    family: str = "gram"

    def smaller(self) -> Case:
        """For --quick."""
        return self._replace(n=self.n // 4, p=self.p // 4, q=self.q // 4)

    @property
    def rows(self) -> int:
        """Samples as the op sees them."""
        return self.p if self.transpose else self.n

    @property
    def widths(self) -> tuple[int, int]:
        return (self.n, self.n) if self.transpose else (self.p, self.q)

    @property
    def shape(self) -> dict:
        return {"groups": max(self.groups, 1), "n": self.rows, "p": self.widths[0], "q": self.widths[1]}

    @property
    def item(self) -> int:
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    def eager_bytes(self) -> int:
        """About what the obvious PyTorch holds at its peak in a step: 12 matrices n x n (2n x 2n for mmd)."""
        n = self.rows * (2 if self.op == "mmd" else 1)
        return 12 * n * n * self.item

    def work(self, phase: str) -> tuple[int, int]:
        """Least bytes moved and floating-point operations of the cheapest exact form (`kdkernels.gram.spec`)."""
        groups, n, (p, q) = max(self.groups, 1), self.rows, self.widths
        linear = self.kernel in ("linear", "cosine")
        if self.op == "mmd":  # one Gram matrix of 2n rows
            n, q, linear = 2 * n, 0, False
        backward = phase != "fwd"
        moved = spec.bytes_moved(groups, n, p, q, self.item, backward)
        flops = spec.flops(groups, n, p, q, linear, backward)
        if phase == "bwd":
            flops -= spec.flops(groups, n, p, q, linear)
        return moved, flops


RCKA = {"unbiased": False, "center": False, "row_normalize": True}


def kd_batches(widths, batches=(64, 256, 512), targets=(), dtype="float32"):
    """Knowledge-distillation batches: launch-bound on a GPU, dispatch-bound on a CPU."""
    full = dtype == "float32"
    return [
        Case(
            f"cka {kernel} batch {n} width {p}" + ("" if full else f" {dtype}"),
            "cka",
            n,
            p,
            p,
            kernel,
            dtype=dtype,
            targets=targets,
            quick=full and n == 64 and p == 512,
        )  # fmt: skip
        for kernel in ("linear", "rbf")
        for p in widths
        for n in batches
    ]


def shared() -> list[Case]:
    rcka = {"op": "cka", "options": RCKA, "regime": "logits"}
    return [
        Case("rcka rows, logits", n=256, p=1000, q=1000, quick=True, **rcka),
        Case("rcka classes, logits", n=256, p=1000, q=1000, transpose=True, **rcka),
        Case("cka rbf median rule", "cka", 256, 512, 512, "rbf", sigma="rule"),
        Case("cka polynomial", "cka", 256, 512, 512, "polynomial", regime="randn"),
        Case("cka biased", "cka", 256, 512, 512, options={"unbiased": False}),
        Case("cka 32 groups", "cka", 64, 128, 128, groups=32),
        Case("hsic rbf", "hsic", 512, 256, 256, "rbf"),
        Case("gram_mse batch", "gram_mse", 256, 512, 512, regime="randn", quick=True),
        Case("gram_mse rows (SP)", "gram_mse", 256, 2048, 2048, options={"normalize": "row"}, regime="randn"),
        Case("gram_mse long", "gram_mse", 8192, 256, 256, regime="randn"),
        Case("mmd rbf", "mmd", 512, 256, 256, "rbf", regime="randn", quick=True),
    ]


def cpu_cases() -> list[Case]:
    long = [
        Case("cka linear long", "cka", 8192, 512, 512, targets=(Target("speed", "eager", 10.0),)),
        Case(
            "cka rbf long",
            "cka",
            8192,
            256,
            256,
            "rbf",
            targets=(Target("speed", "eager", 1.0), Target("memory", "eager", 1 / 8)),
        ),
    ]
    series = [Case(f"cka {k} n {n}", "cka", n, 256, 256, k) for k in ("linear", "rbf") for n in (1024, 2048, 4096)]
    return long + kd_batches((512, 2048, 50176)) + shared() + series


def cuda_cases() -> list[Case]:
    triton = {"backend": "triton"}
    kd_targets = (
        Target("speed", "eager", 5.0),
        Target("speed", "compiled", 2.0),
        Target("launches", "launches", 4, **triton),
    )
    half = {"dtype": "bfloat16"}
    roofs = Target("roof", "the ceiling", 50.0, "fwd", **triton), Target("roof", "the ceiling", 45.0, **triton)
    in_space = (Target("roof", "the ceiling", 60.0, "fwd", **triton),)
    large = [
        *(
            Case(name, "cka", 16384, 512, 512, "rbf", targets=(Target("memory", "eager", 0.1), *roofs), **dtype)
            for name, dtype in (("cka rbf 16384 bf16", half), ("cka rbf 16384", {}))
        ),
        Case("cka linear long", "cka", 8192, 512, 512),
        Case("cka rbf long", "cka", 8192, 256, 256, "rbf"),
        Case("cka linear 131072", "cka", 131072, 512, 512, targets=in_space),
        Case("cka linear 131072 bf16", "cka", 131072, 512, 512, targets=in_space, **half),
        Case("cka rbf 131072 bf16", "cka", 131072, 512, 512, "rbf", **half),
        Case("mmd rbf 8192", "mmd", 8192, 256, 256, "rbf", regime="randn"),
    ]
    series = [Case(f"cka {k} n {n}", "cka", n, 256, 256, k) for k in ("linear", "rbf") for n in (1024, 2048, 4096)]
    batches = kd_batches((512, 2048, 50176), targets=kd_targets)
    batches += kd_batches((512, 50176), (64, 512), kd_targets, **half)
    return batches + large + shared() + series


def cases(device: str) -> list:
    """All cases of a device: the Gram family, ranking, Nystrom, projections and KDA, logits, losses, ranks."""
    modules = (ranking, nystrom_rows, projecting, logit_rows, head_rows, analysis_rows, loss_rows, distributed_rows)
    if device == "cuda":
        return [*cuda_cases(), *(case for module in modules for case in module.cuda_cases())]
    return [*cpu_cases(), *(case for module in modules for case in module.cpu_cases())]
