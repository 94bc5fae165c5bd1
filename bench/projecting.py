# SPDX-License-Identifier: Apache-2.0
"""The projection and KDA cases and what they are measured against.

eager      as one writes it from the papers: permute, two projections, mse_loss; two similarity matrices, smooth_l1_loss
algebra    the difference first, then one permute and one projection (KDA: the same as eager: nothing to gain)
compiled   torch.compile of `algebra`, on CUDA

Basis and landmarks are constants of the case; the gradient is that of the student alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.nystrom.kda import spec as kda_spec
from kdkernels.projection import spec

from .case import Target


class FeatureCase(NamedTuple):
    name: str
    op: str
    dims: tuple[int, ...]  # of the student's features; landmark_similarity_loss: B, d
    inner: int  # k of the basis; landmarks C
    kernel: str = "nchw"  # channels_last, tokens; of features in general: rows
    width: int = 0  # of the teacher's features where it is another one
    dtype: str = "float32"
    targets: tuple[Target, ...] = ()
    quick: bool = False
    family: str = "projection"
    regime: str = "randn"
    sigma: None = None
    options: dict = {}

    @property
    def channel_dim(self) -> int:
        return len(self.dims) - 1 if self.kernel == "tokens" else 1

    @property
    def channels(self) -> int:
        return self.dims[self.channel_dim]

    @property
    def rows(self) -> int:
        return math.prod(self.dims) // self.channels

    @property
    def shape(self) -> dict:
        if self.op == "landmark_similarity_loss":
            return {"B": self.dims[0], "C": self.inner, "d": self.dims[1], "e": self.width}
        return {"rows": self.rows, "c": self.channels, "k": self.inner}

    @property
    def item(self) -> int:
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    def smaller(self) -> FeatureCase:
        return self._replace(dims=(max(2, self.dims[0] // 4), *self.dims[1:]))

    def work(self, phase: str) -> tuple[int, int]:
        """Least bytes moved and floating-point operations, by the specs of the two families."""
        if self.op == "landmark_similarity_loss":
            size = (self.dims[0], self.inner, self.dims[1], self.width)
            moved = [kda_spec.bytes_moved(*size, self.item, step) for step in (False, True)]
            flops = [kda_spec.flops(*size, step) for step in (False, True)]
        else:
            size = (self.rows, self.channels, self.inner)
            moved = [spec.bytes_moved(*size, self.item, self.item, step) for step in (False, True)]
            flops = [spec.flops(*size, step) for step in (False, True)]
        both = {"fwd": 0, "step": 1}
        if phase == "bwd":
            return moved[1] - moved[0], flops[1] - flops[0]
        return moved[both[phase]], flops[both[phase]]


def draw(case: FeatureCase, device: str, seed: int):
    """(student, teacher) in the layout of the case; the teacher is near, as it is in training."""
    generator = torch.Generator().manual_seed(seed)
    if case.op == "landmark_similarity_loss":
        pair = (torch.randn(case.dims[0], width, generator=generator) for width in (case.dims[1], case.width))
    else:
        s, noise = (torch.randn(case.dims, generator=generator) for _ in range(2))
        pair = (s, s + 0.3 * noise)
    pair = (x.to(device, getattr(torch, case.dtype)) for x in pair)
    last = case.kernel == "channels_last"
    return tuple(x.contiguous(memory_format=torch.channels_last) if last else x for x in pair)


def names(case: FeatureCase, device: str, compiled: bool) -> list[str]:
    return ["eager", "algebra"] + (["compiled"] if compiled else [])


def _constants(case: FeatureCase, device):
    """The basis, or both sides' landmarks; float32, as a module's buffers are."""
    generator = torch.Generator().manual_seed(1)
    if case.op == "projected_mse":
        return (kd.random_basis(case.channels, case.inner, generator=generator, device=device),)
    return tuple(torch.randn(case.inner, w, generator=generator).to(device) for w in (case.dims[1], case.width))


def _with_constants(case: FeatureCase, function):
    """function(x, y, *constants), the constants made once on the device of the first call."""
    known = {}

    def call(x, y):
        if x.device not in known:
            known[x.device] = _constants(case, x.device)
        return function(x, y, *known[x.device])

    return call


def ours(case: FeatureCase, backend: str):
    """f(x, y) -> value through the public function."""
    if case.op == "landmark_similarity_loss":
        return _with_constants(case, lambda *a: kd.landmark_similarity_loss(*a, backend=backend))
    how = {"channel_dim": case.channel_dim, "backend": backend}
    return _with_constants(case, lambda x, y, P: kd.projected_mse(x, y, P, **how))


def contender(case: FeatureCase, name: str):
    if name == "compiled":
        return torch.compile(_with_constants(case, _PLAIN[case.op]["algebra"](case)), dynamic=False)
    return _with_constants(case, _PLAIN[case.op][name](case))


def _rows(x, case):
    return x.movedim(case.channel_dim, -1).reshape(-1, case.channels)


def _two_projections(case):
    return lambda x, y, P: F.mse_loss(_rows(x, case) @ P.to(x.dtype), _rows(y, case) @ P.to(x.dtype))


def _one_projection(case):
    return lambda x, y, P: (_rows(x - y, case) @ P.to(x.dtype)).square().mean()


def _similarities(case):
    def loss(x, y, x_centers, y_centers):
        S, T = x @ x_centers.to(x.dtype).mT, y @ y_centers.to(y.dtype).mT
        return F.smooth_l1_loss(S, T, reduction="sum") / T.norm()

    return loss


_PLAIN = {
    "projected_mse": {"eager": _two_projections, "algebra": _one_projection},
    "landmark_similarity_loss": {"eager": _similarities, "algebra": _similarities},
}


def _maps(dims, k, least, kernel="nchw", **more) -> FeatureCase:
    words = ["projected_mse", " x ".join(map(str, dims)), f"k {k}", "" if kernel == "nchw" else kernel]
    words.append(more.get("dtype", ""))
    targets = (Target("speed", "eager", least),) if least else ()
    return FeatureCase(" ".join(filter(None, words)), "projected_mse", dims, k, kernel, targets=targets, **more)


def _landmarks(B, C, d, e, targets=(), **more) -> FeatureCase:
    name = f"kda {B} x {d}, {C} classes" + (f" {more['dtype']}" if "dtype" in more else "")
    return FeatureCase(name, "landmark_similarity_loss", (B, d), C, "rows", e, targets=targets, **more)


def cpu_cases() -> list[FeatureCase]:
    """The figures are those of the compiled library; the torch backend is the portable one."""
    speed = (Target("speed", "eager", 1.0),)
    cases = [
        _maps((32, 256, 28, 28), 64, 1.5, quick=True),
        _maps((32, 256, 28, 28), 64, 1.0, "channels_last"),
        _maps((32, 256, 28, 28), 64, 1.0, dtype="bfloat16"),
        _maps((64, 512, 7, 7), 128, 1.0),
        _maps((32, 197, 384), 64, 1.0, "tokens"),
        _maps((256, 512), 64, 1.0, "rows"),
        _landmarks(256, 100, 512, 512, speed, quick=True),
        _landmarks(1024, 1000, 2048, 2048, speed),
    ]
    return [c._replace(targets=tuple(t._replace(backend="cpp") for t in c.targets)) for c in cases]


def cuda_cases() -> list[FeatureCase]:
    kda = (Target("speed", "eager", 3.0), Target("launches", "launches", 3, "fwd", "triton"))
    roof = (Target("roof", "the ceiling", 80.0, backend="triton"),)
    both, half = ({}, {"dtype": "bfloat16"}), {"dtype": "bfloat16"}
    maps = [
        *(_maps((32, 256, 28, 28), 64, 2.0, **dtype, quick=not dtype) for dtype in both),
        _maps((32, 256, 28, 28), 64, 2.0, "channels_last", **half),
        *(_maps((128, 512, 28, 28), 128, 2.0, **dtype) for dtype in both),
    ]
    return [
        *(case._replace(targets=case.targets + roof) for case in maps),
        _maps((64, 197, 768), 64, 1.0, "tokens", **half),
        _landmarks(256, 100, 512, 512, kda, quick=True),
        *(_landmarks(1024, 1000, 2048, 2048, kda, **dtype) for dtype in both),
    ]
