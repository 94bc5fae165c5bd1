# SPDX-License-Identifier: Apache-2.0
"""NaN or infinity in a row that counts reaches the value and the gradients of the Triton kernels, as on backend torch.

Triton's minimum, maximum and max drop NaN where they are not told otherwise, and exp(-inf) is 0: a kernel that is
written as on paper returns a finite number. Interpreted in a process of its own: `python tests/test_nonfinite.py`.
"""

import itertools
import math
import sys

import pytest
import torch

import kdkernels as kd
from kdkernels.gram import spec
from kdkernels.logits.op import DIVERGENCES, any_divergence, measure_of
from kdkernels.registry import OPS

N, WIDTH, ROW = 9, 4, 5  # the row that is spoilt
MASK = torch.arange(N) != 2
KERNELS = ("linear", "polynomial", "cosine", kd.RBF(2.0), kd.Laplacian((1.0, 2.0)))
LABELS = torch.arange(N) % WIDTH


def calls():
    """(op, what is asked, a function of x, y, backend)."""
    for kernel in KERNELS:
        for op, more in (("cka", {}), ("hsic", {"unbiased": False, "center": False})):
            how = {"kernel": kernel, "mask": MASK, **more}
            yield op, f"{kernel}", lambda x, y, b, op=op, how=how: getattr(kd, op)(x, y, backend=b, **how)
        yield "mmd", f"{kernel}", lambda x, y, b, k=kernel: kd.mmd(x, y, kernel=k, mask=(MASK, None), backend=b)
        for whiten in ("cholesky", "sqrt"):
            how = {"kernel": kernel, "whiten": whiten}
            yield (
                "nystrom_features", f"{kernel} {whiten}",
                lambda x, y, b, how=how: kd.nystrom_features(x, y[:5], backend=b, **how),
            )  # fmt: skip
        for op in ("nystrom_cka", "nystrom_hsic", "nystrom_transfer"):
            yield (
                op, f"{kernel}",
                lambda x, y, b, op=op, k=kernel: getattr(kd, op)(x, y, x[:4], y[:4], kernel=k, mask=MASK, backend=b),
            )  # fmt: skip
    how = {"unbiased": False, "center": False, "row_normalize": True}
    yield "cka", "row norms", lambda x, y, b: kd.cka(x, y, kernel=kd.RBF(2.0), backend=b, **how)
    for normalize in (None, "row"):
        yield "gram_mse", f"{normalize}", lambda x, y, b, n=normalize: kd.gram_mse(x, y, normalize=n, backend=b)
    yield "projected_mse", "", lambda x, y, b: kd.projected_mse(x, y, torch.eye(WIDTH)[:, :3], mask=MASK, backend=b)
    yield "soft_rank", "", lambda x, y, b: kd.soft_rank(x, backend=b).square()
    yield "spearman", "", lambda x, y, b: kd.spearman(x, y, backend=b)
    yield "rkd_angle", "", lambda x, y, b: kd.rkd_angle(x, y, mask=MASK, backend=b)
    yield (
        "landmark_similarity_loss", "",
        lambda x, y, b: kd.landmark_similarity_loss(x, y.detach(), x[:3].detach(), y[:3].detach(), backend=b),
    )  # fmt: skip
    yield "distillation_kl", "", lambda x, y, b: kd.distillation_kl(x, y, backend=b)
    for form in (measure_of(name, 2.0) for name in DIVERGENCES):
        yield "generalized_jsd", f"{form}", lambda x, y, b, f=form: any_divergence(x, y, f, None, "none", b)
    lam, mix = torch.full((N,), 0.3), {"tau": 2.0, "alpha": 0.5, "permutation": torch.arange(N).flip(0)}
    for what, more in (("", {}), ("clean", {"mix": (0.5, 0.3, 0.2)})):
        yield (
            "mixed_distillation", what,
            lambda x, y, b, how={**mix, **more}: kd.mixed_distillation(
                x, y, LABELS, LABELS.flip(0), lam, teacher_clean=y.detach() if "mix" in how else None, backend=b, **how
            ),
        )  # fmt: skip
    yield (
        "mixup", "",
        lambda x, y, b: kd.mixup(x, LABELS, lam=0.3, generator=torch.Generator().manual_seed(0), backend=b).x + 0 * y,
    )  # fmt: skip


def data():
    x = torch.randn(N, WIDTH)
    return x, x + torch.randn(N, WIDTH)


def finite(call, x, y, backend):
    """Which groups of the value, and which rows of both gradients, hold nothing but finite numbers."""
    x, y = (t.clone().requires_grad_() for t in (x, y))
    value = call(x, y, backend)
    grads = torch.autograd.grad(value.sum(), (x, y), allow_unused=True)
    rows = [None if g is None else g.isfinite().all(-1) for g in grads]
    return value.isfinite().all(-1) if value.dim() else value.isfinite(), *rows


def spoilt(op, turns):
    """(whether in tiles, what is bad, on which side): a call of a Gram op, which has two schedules, meets one half, the
    next one, of another op or kernel, the other."""
    bad, sides = (math.nan, math.inf, -math.inf), (0, 1)
    if OPS[op].family != "gram":
        return [(False, *case) for case in itertools.product(bad, sides)]
    turn = next(turns)
    return [
        (tiles, b, s) for tiles in (False, True) for i, b in enumerate(bad) for s in sides if (turn + tiles + i + s) % 2
    ]


def main():
    wrong, asked, turns = [], set(), itertools.count()
    for op, what, call in calls():
        asked.add(op)
        for tiles, bad, side in spoilt(op, turns):
            torch.manual_seed(0)
            pair = data()
            pair[side][ROW, 1] = bad
            want = finite(call, *pair, "torch")
            with spec.small_tiles("triton") if tiles else torch.enable_grad():
                got = finite(call, *pair, "triton")
            for name, a, b in zip(("value", "gradient x", "gradient y"), got, want, strict=True):
                if a is not None and (a & ~b).any():
                    where = f"{op} {what} {'tiles ' * tiles}{bad} in {'xy'[side]}: {name}"
                    wrong.append(f"{where}: finite {a.tolist()}, torch {b.tolist()}")
    print(*wrong, sep="\n")
    missing = {op.name for op in OPS.values() if "triton" in op.backends} - asked
    sys.exit(f"{len(wrong)} wrong, not asked: {sorted(missing)}" if wrong or missing else 0)


@pytest.mark.interpret
def test_what_is_not_finite_is_not_hidden_by_a_triton_kernel(python):
    done = python("-W", "ignore", "tests/test_nonfinite.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


if __name__ == "__main__":
    main()
