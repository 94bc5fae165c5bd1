# SPDX-License-Identifier: Apache-2.0
"""The logits cases and what they are measured against.

eager      as training scripts write it: kl_div of log_softmax and softmax; two cross_entropy calls for a mixed label;
           for the full target one-hot rows and cross_entropy of probabilities; indexing and arithmetic for mixup
compiled   torch.compile of that, on CUDA or on request
forward    the forward divergence of this package where a Jensen-Shannon divergence is asked for: not the same number

Labels, lambda, the permutation and the clean teacher are constants of the case; the gradient is that of the student.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.logits import spec

from .case import Target

TAU, ALPHA, FULL = 4.0, 0.9, (0.5, 0.25, 0.25)


class LogitCase(NamedTuple):
    name: str
    op: str
    dims: tuple[int, ...]  # [R, C] logits, or the batch that mixup mixes
    kernel: str = "plain"  # full: a target with every term
    dtype: str = "float32"
    targets: tuple[Target, ...] = ()
    quick: bool = False
    family: str = "logits"
    regime: str = "logits"
    sigma: None = None
    options: dict = {}

    @property
    def rows(self) -> int:
        return self.dims[0]

    @property
    def shape(self) -> dict:
        return {"rows": self.rows, "C": math.prod(self.dims[1:])}

    @property
    def item(self) -> int:
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    def smaller(self) -> LogitCase:
        return self._replace(dims=(max(2, self.dims[0] // 4), *self.dims[1:]))

    def work(self, phase: str) -> tuple[int, int]:
        """Least bytes moved and exponentials; each clean row of a full target is read once more."""
        R, C = self.rows, math.prod(self.dims[1:])
        if self.op == "mixup":
            return {"fwd": 2, "bwd": 2, "step": 4}[phase] * R * C * self.item, 0
        clean = R * C * self.item * (self.kernel == "full")
        forward, step = (spec.bytes_moved(R, C, self.item, b) + (1 + b) * clean for b in (False, True))
        moved = {"fwd": forward, "bwd": step - forward, "step": step}[phase]
        exponentials = {"mixed_distillation": 3}.get(self.op, 2) + 2 * (self.kernel == "full")
        return moved, spec.flops(R, C, exponentials * (2 if phase == "step" else 1))


def draw(case: LogitCase, device: str, seed: int):
    """(student, teacher), the teacher near in part; for mixup the batch and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (4 * torch.randn(case.dims, generator=generator) for _ in range(2))
    pair = (s, t) if case.op == "mixup" else (s, (s + t) / 2)
    return tuple(x.to(device, getattr(torch, case.dtype)) for x in pair)


def names(case: LogitCase, device: str, compiled: bool) -> list[str]:
    return ["eager"] + (["compiled"] if compiled else []) + (["forward"] if case.op == "generalized_jsd" else [])


class Constants(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    lam: torch.Tensor
    order: torch.Tensor
    clean: torch.Tensor


def _with_constants(case: LogitCase, function):
    """function(x, y, constants), the constants made once on the device of the first call."""
    known = {}

    def call(x, y):
        if x.device not in known:
            generator = torch.Generator().manual_seed(1)
            a, b = (torch.randint(x.shape[-1], (len(x),), generator=generator) for _ in range(2))
            clean = 4 * torch.randn(x.shape, generator=generator) if case.kernel == "full" else torch.zeros(0)
            parts = (a, b, torch.tensor(0.3), torch.randperm(len(x), generator=generator), clean.to(x.dtype))
            known[x.device] = Constants(*(t.to(x.device) for t in parts))
        return function(x, y, known[x.device])

    return call


def ours(case: LogitCase, backend: str):
    """f(x, y) -> value through the public function."""
    if case.op in ("distillation_kl", "generalized_jsd"):
        return lambda x, y: getattr(kd, case.op)(x, y, tau=TAU, backend=backend)
    how = {"tau": TAU, "alpha": ALPHA, "backend": backend}

    def loss(x, y, c):
        clean = {"mix": FULL, "teacher_clean": c.clean, "permutation": c.order} if case.kernel == "full" else {}
        return kd.mixed_distillation(x, y, c.a, c.b, c.lam, **how, **clean)

    def mix(x, y, c):
        return kd.mixup(x, c.a, lam=c.lam, backend=backend).x

    return _with_constants(case, mix if case.op == "mixup" else loss)


def contender(case: LogitCase, name: str):
    if name == "forward":
        return lambda x, y: kd.distillation_kl(x, y, tau=TAU)
    plain = _with_constants(case, _EAGER[case.op, case.kernel])
    return torch.compile(plain, dynamic=False) if name == "compiled" else plain


def _divergence(x, y, q=None):
    q = F.softmax(y / TAU, 1) if q is None else q
    return F.kl_div(F.log_softmax(x / TAU, 1), q, reduction="batchmean") * TAU**2


def _jensen_shannon(x, y):
    log_p, log_q = F.log_softmax(x / TAU, 1), F.log_softmax(y / TAU, 1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    both = (F.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_p, log_q))
    return TAU**2 / 2 * sum(both)


def _mixed(x, y, c):
    hard = c.lam * F.cross_entropy(x, c.a) + (1 - c.lam) * F.cross_entropy(x, c.b)
    return (1 - ALPHA) * hard + ALPHA * _divergence(x, y)


def _full(x, y, c):
    label = c.lam * F.one_hot(c.a, x.shape[1]) + (1 - c.lam) * F.one_hot(c.b, x.shape[1])
    p = F.softmax(c.clean / TAU, 1)
    q = FULL[0] * F.softmax(y / TAU, 1) + FULL[1] * (c.lam * p + (1 - c.lam) * p[c.order]) + FULL[2] * label
    return (1 - ALPHA) * F.cross_entropy(x, label.to(x.dtype)) + ALPHA * _divergence(x, y, q.to(x.dtype))


def _mixup(x, y, c):
    order = torch.randperm(len(x), device=x.device)  # drawn in each call, as ours is
    return c.lam.to(x.dtype) * x + (1 - c.lam).to(x.dtype) * x[order]


_EAGER = {
    ("distillation_kl", "plain"): lambda x, y, c: _divergence(x, y),
    ("generalized_jsd", "plain"): lambda x, y, c: _jensen_shannon(x, y),
    ("mixed_distillation", "plain"): _mixed,
    ("mixed_distillation", "full"): _full,
    ("mixup", "plain"): _mixup,
}


def _case(op: str, *dims: int, least: float = 0, beside: float = 0, kernel: str = "plain", **more) -> LogitCase:
    """least: how many times faster than the eager form; beside: than the forward divergence."""
    words = [op, " x ".join(map(str, dims)), "" if kernel == "plain" else kernel, more.get("dtype", "")]
    asked = (("eager", least), ("forward", beside))
    targets = tuple(Target("speed", against, bound) for against, bound in asked if bound)
    return LogitCase(" ".join(filter(None, words)), op, dims, kernel, targets=targets, **more)


def cpu_cases() -> list[LogitCase]:
    """The figures are those of the compiled library; the torch backend is the portable one."""
    cases = [
        _case("mixed_distillation", 1024, 1000, least=2.0, quick=True),
        _case("mixed_distillation", 1024, 1000, kernel="full", least=2.0),
        _case("distillation_kl", 1024, 1000, least=1.0, quick=True),
        _case("distillation_kl", 64, 10, least=1.0),
        _case("distillation_kl", 16, 131072, least=1.0, dtype="bfloat16"),
        _case("generalized_jsd", 1024, 1000, least=2.0, quick=True),
        _case("generalized_jsd", 256, 128256, least=2.0, dtype="bfloat16", beside=1 / 1.3),
        _case("mixup", 256, 3, 32, 32, quick=True),
        _case("mixup", 64, 3, 224, 224),
    ]
    return [c._replace(targets=tuple(t._replace(backend="cpp") for t in c.targets)) for c in cases]


def cuda_cases() -> list[LogitCase]:
    cases = [
        _case("mixed_distillation", 8192, 1000, least=2.0, quick=True),
        _case("mixed_distillation", 8192, 1000, least=2.0, dtype="bfloat16"),
        _case("mixed_distillation", 8192, 1000, kernel="full", least=2.0),
        _case("distillation_kl", 8192, 1000, least=2.0, quick=True),
        _case("distillation_kl", 8192, 1000, least=2.0, dtype="bfloat16"),
        _case("distillation_kl", 256, 100, least=2.0),
        _case("distillation_kl", 4096, 131072, least=2.0, dtype="bfloat16"),
        _case("generalized_jsd", 4096, 131072, least=2.0, dtype="bfloat16", beside=1 / 1.3),
        _case("mixup", 256, 3, 224, 224, least=1.0),
    ]
    roof = Target("roof", "the ceiling", 80.0), Target("launches", "launches", 1)
    asked = [
        c._replace(targets=c.targets + roof) if c.dims == (8192, 1000) and c.kernel == "plain" else c for c in cases
    ]
    return [c._replace(targets=tuple(t._replace(backend="triton") for t in c.targets)) for c in asked]
