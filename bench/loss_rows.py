# SPDX-License-Identifier: Apache-2.0
"""The loss modules and what they are measured against: `naive_losses.py`, the public implementations' way.

eager      that form; the gradient is the student's

A module runs on the backends of the op behind it, or on `torch` alone where it is plain PyTorch. Several levels of
features are one flat tensor, cut into views by both contenders.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

import kdkernels as kd
from kdkernels import losses

from . import naive_losses
from .case import Target

LEVELS = tuple((2, 256, *size) for size in ((100, 168), (50, 84), (25, 42), (13, 21)))  # P2 to P5 of 400 x 672 pixels


class LossCase(NamedTuple):
    name: str
    loss: str  # of naive_losses
    module: str  # of kd.losses
    op: str  # of the registry; empty: plain PyTorch
    dims: tuple[tuple[int, ...], ...]  # of each level
    targets: tuple[Target, ...] = ()
    quick: bool = False
    dtype: str = "float32"
    kernel: str = "plain"
    family: str = "losses"
    regime: str = "randn"
    sigma: None = None
    options: dict = {}  # of the module

    @property
    def rows(self) -> int:
        return self.dims[0][0]

    @property
    def shape(self) -> dict:
        return {"levels": len(self.dims), "B": self.rows, "width": sum(math.prod(d[1:]) for d in self.dims)}

    @property
    def item(self) -> int:
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    def smaller(self) -> LossCase:
        return self._replace(dims=tuple((max(2, B // 8), *rest) for B, *rest in self.dims))

    def few(self, x):
        """A little of the input, to load what a step needs."""
        return x if len(self.dims) > 1 else x[:2]

    def work(self, phase: str) -> tuple[int, int]:
        """Least bytes moved: both sides read, the gradient written; the operations are not counted."""
        size = sum(map(math.prod, self.dims)) * self.item
        return {"fwd": 2, "bwd": 1, "step": 3}[phase] * size, 0


def draw(case: LossCase, device: str, seed: int):
    """(student, teacher), the teacher near in part; flat where there are several levels."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(math.prod, case.dims))
    s, noise = (torch.randn(count, generator=generator) for _ in range(2))
    pair = (s, (s + noise) / 2)
    shaped = (x if len(case.dims) > 1 else x.reshape(case.dims[0]) for x in pair)
    return tuple(x.to(device, getattr(torch, case.dtype)) for x in shaped)


def names(case: LossCase, device: str, compiled: bool) -> list[str]:
    return ["eager"]


def cut(case: LossCase, x):
    """The levels as views."""
    parts = x.split([math.prod(d) for d in case.dims])
    return [part.view(d) for part, d in zip(parts, case.dims, strict=True)]


def ours(case: LossCase, backend: str):
    """f(x, y) -> value through the module."""
    how = {"backend": backend} if case.op else {}
    made = {}

    def call(x, y):
        if x.device not in made:
            made[x.device] = getattr(losses, case.module)(**how, **case.options).to(x.device)
        return made[x.device](*((x, y) if len(case.dims) == 1 else (cut(case, x), cut(case, y))))

    return call


def contender(case: LossCase, name: str):
    loss = getattr(naive_losses, case.loss)
    if len(case.dims) == 1:
        return loss
    return lambda x, y: sum(loss(s, t) for s, t in zip(cut(case, x), cut(case, y), strict=True))


def _case(loss, module, op, *dims, speed=0, memory=0, against="", **more) -> LossCase:
    size = " x ".join(map(str, dims[0])) if len(dims) == 1 else f"{len(dims)} levels"
    targets = (Target("speed", "eager", speed),) if speed else ()
    targets += (Target("memory", "eager", memory),) if memory else ()
    return LossCase(f"{module} {size}{against}", loss, module, op, dims, targets, **more)


def cases(map_size=(64, 256, 8, 8), logits=(256, 1000), rows=(256, 512)) -> list[LossCase]:
    transfer = losses.mmd.PRESETS["transfer"]
    return [
        _case("nst", "NSTLoss", "gram_mse", map_size, speed=30, memory=1 / 50, quick=True),
        _case("pcka", "PCKALoss", "cka", LEVELS[0], speed=15),
        _case("pcka", "PCKALoss", "cka", *LEVELS, speed=15),
        _case("rcka", "RCKALoss", "cka", logits, speed=10, quick=True),
        _case("kd", "KDLoss", "distillation_kl", (64, 10), speed=1),
        _case("dist", "DISTLoss", "", logits, speed=1),
        _case("sp", "SPLoss", "gram_mse", map_size, speed=1),
        _case("at", "ATLoss", "", map_size, speed=1),
        _case("ickd", "ICKDLoss", "gram_mse", map_size, speed=1),
        _case("mmd", "MMDLoss", "mmd", rows, speed=1, options=transfer),
        _case("mmd_products", "MMDLoss", "mmd", rows, speed=1, against=", products", options=transfer),
        _case("rkd_angle", "RKDAngleLoss", "rkd_angle", rows, speed=10, memory=1 / 50, quick=True),
        _case("rkd_distance", "RKDDistanceLoss", "rkd_distance", rows, speed=1),
        _case("pkt", "PKTLoss", "pkt", rows, speed=1),
        _case("cc", "CCLoss", "", rows, speed=1),
    ]


def _held_by(cases, backend: str) -> list[LossCase]:
    """The figures are those of the compiled backend, where the op has one."""

    def one(case):
        held = backend if case.op and backend in kd.registry.OPS[case.op].backends else "torch"
        return case._replace(targets=tuple(target._replace(backend=held) for target in case.targets))

    return [one(case) for case in cases]


def cpu_cases() -> list[LossCase]:
    return _held_by(cases(), "cpp")


def cuda_cases() -> list[LossCase]:
    """Those of all levels have another figure on a GPU, where a loop over channels waits for its launches."""
    found = _held_by(cases(), "triton")
    held = (Target("speed", "eager", 20.0, backend="triton"),)
    return [case._replace(targets=held) if case.dims == LEVELS else case for case in found]
