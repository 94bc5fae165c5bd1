# SPDX-License-Identifier: Apache-2.0
"""KDLoss straight from hidden states, and what it is measured against.

eager      logits of both sides, whole, then the formula by kl_div; half heads give half logits, made float32
liger      liger-kernel's fused linear loss with its defaults (chunks of 1024 rows; not compiled), where installed; of
           the forward divergence, for which it has no class, its base with F.kl_div
liger128   the same in chunks of 128 rows
products   the four matrix products alone, in the dtype of the head: the part that cannot shrink

Gradients are those of the student's hidden states and, unless it is frozen, of its head. The first input of a case is
the student's hidden states, the second the teacher's; heads are constants of the case, and their gradients are dropped
as soon as they are whole.
"""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kdkernels as kd

from .case import Target

WIDTH = 512


class HeadCase(NamedTuple):
    name: str
    rows: int
    classes: int
    kernel: str = "jsd"  # the divergence
    dtype: str = "float32"
    frozen: bool = False
    targets: tuple[Target, ...] = ()
    quick: bool = False
    op: str = "generalized_jsd"  # whose contract has to hold
    family: str = "heads"
    regime: str = "randn"
    sigma: None = None
    options: dict = {}

    @property
    def shape(self) -> dict:
        return {"rows": self.rows, "classes": self.classes, "H": WIDTH}

    @property
    def item(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    def smaller(self) -> HeadCase:
        return self._replace(rows=32, classes=max(64, self.classes // 64))

    def few(self, t):
        return t[:64]

    def work(self, phase: str) -> tuple[int, int]:
        """Heads and hidden states read once, gradients written once; the products."""
        head, hidden = self.classes * WIDTH * self.item, self.rows * WIDTH * self.item
        product = 2 * self.rows * self.classes * WIDTH
        if phase == "bwd":  # all is done in the forward pass
            return 0, 0
        made = 0 if phase == "fwd" else 1
        learned = 0 if self.frozen else 1
        return 2 * (head + hidden) + made * (hidden + learned * head), (2 + made * (1 + learned)) * product


def draw(case: HeadCase, device: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    return tuple(torch.randn(case.rows, WIDTH, generator=generator).to(device, dtype) for _ in range(2))


def names(case: HeadCase, device: str, compiled: bool) -> list[str]:
    liger = ["liger", "liger128"] if importlib.util.find_spec("liger_kernel") else []
    return ["eager", *liger, "products"]


def _dropped(head):
    head.grad = None


def _with_heads(case: HeadCase, function):
    """function(student, teacher, W, W_t), the heads made once on the device of the first call."""
    known = {}

    def call(x, y):
        if x.device not in known:
            generator = torch.Generator().manual_seed(7)
            shape = case.classes, WIDTH
            pair = (2 * WIDTH**-0.5 * torch.randn(shape, generator=generator) for _ in range(2))
            heads = [head.to(x.device, x.dtype) for head in pair]
            if not case.frozen:
                heads[0].requires_grad_().register_post_accumulate_grad_hook(_dropped)
            known[x.device] = heads
        return function(x, y, *known[x.device])

    return call


def ours(case: HeadCase, backend: str):
    loss = kd.losses.KDLoss(1.0, divergence=case.kernel, backend=backend)
    return _with_heads(case, lambda x, y, W, W_t: loss(kd.LinearLogits(x, W), kd.LinearLogits(y, W_t)))


def contender(case: HeadCase, name: str):
    if name.startswith("liger"):
        return _with_heads(case, _liger(case, 128 if name == "liger128" else 1024))
    return _with_heads(case, _products if name == "products" else _eager(case))


def _eager(case: HeadCase):
    def loss(x, y, W, W_t):
        with torch.no_grad():
            log_q = F.log_softmax((y @ W_t.T).float(), -1)
        log_p = F.log_softmax((x @ W.T).float(), -1)
        if case.kernel == "forward":
            return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        log_m = torch.logsumexp(torch.stack([log_p, log_q]) - math.log(2), 0)  # as TRL writes it
        return sum(F.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_p, log_q)) / 2

    return loss


def _liger(case: HeadCase, chunk: int):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase as Base

    class Forward(Base):
        @staticmethod
        def distillation_loss_fn(student, teacher, **_):
            log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
            return F.kl_div(log_p, log_q, reduction="sum", log_target=True)

        @classmethod
        def forward(cls, ctx, *tensors):
            how = {"chunk_size": chunk, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}
            return Base.forward(cls, ctx, *tensors, **how)

        @staticmethod
        def backward(ctx, grad):
            return Base.backward(ctx, grad)[:5]

    made = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, chunk_size=chunk)

    def loss(x, y, W, W_t):
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return (made if case.kernel == "jsd" else Forward.apply)(x, W, y, W_t, labels)

    return loss


def _products(x, y, W, W_t):
    """In chunks of 128 rows, as the losses take them; the logits stand for their gradient."""
    with torch.no_grad():
        found, total = torch.empty_like(x), torch.zeros_like(W) if W.requires_grad else None
        for k in range(0, len(x), 128):
            part = slice(k, k + 128)
            z, _ = x[part] @ W.T, y[part] @ W_t.T
            torch.mm(z, W, out=found[part])
            if total is not None:
                total.addmm_(z.T, x[part])
    return found


def _case(rows: int, classes: int, *targets, **more) -> HeadCase:
    words = ["heads", more.get("kernel", "jsd"), f"{rows} x {classes}", more.get("dtype", "")]
    words.append("frozen" if more.get("frozen") else "")
    listed = tuple(Target(figure, against, bound) for figure, against, bound in targets)
    return HeadCase(" ".join(filter(None, words)), rows, classes, targets=listed, **more)


def cpu_cases() -> list[HeadCase]:
    """As asked: time, and extra memory at the peak."""
    cases = [
        _case(
            512, 32000, ("speed", "eager", 2.0), ("speed", "liger", 2.2), ("speed", "liger128", 1.5),
            ("speed", "products", 1 / 1.25), ("memory", "eager", 1 / 5), ("memory", "liger", 1 / 8),
            ("memory", "liger128", 1 / 2), quick=True,
        ),
        _case(
            2048, 32000, ("speed", "eager", 2.0), ("speed", "liger128", 1.5), ("memory", "eager", 1 / 20),
            ("memory", "liger", 1 / 15),
        ),
        _case(512, 32000, ("speed", "liger128", 1.7), ("memory", "liger128", 1 / 4), frozen=True),
        _case(
            512, 32000, ("speed", "eager", 1.25), ("speed", "liger", 1.3), ("speed", "products", 1 / 1.15),
            ("memory", "eager", 1 / 2), ("memory", "liger", 1 / 4), kernel="forward",
        ),
        _case(256, 32000, ("speed", "liger128", 1.0), ("memory", "liger128", 1.0), dtype="bfloat16"),
        _case(64, 128256, ("speed", "liger", 1.0), ("memory", "liger", 1.2), dtype="bfloat16"),
    ]  # fmt: skip
    return [c._replace(targets=tuple(t._replace(backend="cpp") for t in c.targets)) for c in cases]


def cuda_cases() -> list[HeadCase]:
    cases = [
        _case(8192, 128256, ("speed", "liger", 1.3), dtype="bfloat16"),
        _case(2048, 32000, ("speed", "liger", 1.3), quick=True),
    ]
    return [c._replace(targets=tuple(t._replace(backend="triton") for t in c.targets)) for c in cases]
