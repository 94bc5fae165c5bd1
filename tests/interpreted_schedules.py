# SPDX-License-Identifier: Apache-2.0
"""Every Triton schedule in the interpreter, on small tiles, against the float64 reference. Run by test_schedules.py.

Tile sizes and thresholds are lowered so that a few dozen rows already take the schedules meant for thousands, with
several bands, panels and partial last tiles. `--break` plants a wrong gradient weight, which must be reported.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

import kdkernels as kd
from kdkernels.gram.torch_impl import forms, panels
from kdkernels.gram.triton_impl import schedule, small, tile_kernels, tiles

TINY = tiles.TileConfig(16, 16, 16, 4, 1)
OPTIONS = (  # unbiased, center, row_normalize
    (True, True, False),
    (False, True, False),
    (False, False, False),
    (False, False, True),
    (False, True, True),
)
failures, checks = [], 0


def relative(a, b, floor=0.0):
    return ((a - b).abs().max() / b.abs().max().clamp(min=floor or 1e-300)).item()


def compare(name, function, x, y, dtype=torch.float32, budget=2e-5, **options):
    """Value and both gradients of the Triton backend against float64 on the same rounded inputs.

    What a gradient loses by being stored in the dtype of its input is not counted.
    """
    global checks
    seen = {}
    for backend, work in (("reference", torch.float64), ("triton", dtype)):
        a, b = (t.to(dtype).to(work).requires_grad_() for t in (x, y))
        value = function(a, b, backend=backend, **options)
        seen[backend] = (value.detach().double(), *(g.double() for g in torch.autograd.grad(value.sum(), (a, b))))
    floor = 1.0 if function is kd.cka else 0.0
    errors = [relative(seen["triton"][0], seen["reference"][0], floor)]
    for got, want in zip(seen["triton"][1:], seen["reference"][1:], strict=True):
        errors.append(relative(got, want) - relative(want.to(dtype).double(), want))
    checks += 1
    if not all(error < budget for error in errors):  # NaN too
        failures.append(f"{name} {options}: {errors}")


def data(n, p, q, *groups):
    x = torch.randn(*groups, n, p) + 1
    y = torch.randn(*groups, n, q) + 0.5 * x[..., :1]
    return x, y, torch.rand(*groups, n) > 0.3


def family(name, kernels, x, y, mask):
    """Each kernel meets each estimator, each estimator rows with and without a mask."""
    for i, kernel in enumerate(kernels):
        for k, (unbiased, center, row_normalize) in enumerate(OPTIONS):
            how = dict(kernel=kernel, unbiased=unbiased, center=center, row_normalize=row_normalize)
            compare(name, kd.cka, x, y, mask=(None, mask)[(i + k) % 2], **how)
        compare(f"{name} hsic", kd.hsic, x, y, kernel=kernel, mask=mask)
    for normalize in (None, "row"):
        compare(f"{name} gram_mse", kd.gram_mse, x, y, normalize=normalize, mask=mask)
    other, keep = data(x.shape[-2] + 3, x.shape[-1], 1, *x.shape[:-2])[::2]
    compare(f"{name} mmd", kd.mmd, x, other, kernel=kd.RBF(sigma=(1.0, 2.0)), mask=(mask, keep))
    # the small schedule keeps both terms of a difference of rows, the others round it to float16
    half = 1e-4 if x.shape[-2] <= panels.SMALL else 2e-3
    for kernel in ("linear", kd.RBF(3.0), "laplacian", kd.RBF(300.0), kd.Laplacian(0.5)):
        compare(f"{name} float16", kd.cka, x + 20, y, torch.float16, half, kernel=kernel)
    for kernel in (kd.RBF, kd.Laplacian):
        sigma_gradient(name, kernel, x, y)


def sigma_gradient(name, kernel, x, y):
    global checks
    got, true = (torch.tensor(2.0, dtype=t, requires_grad=True) for t in (torch.float32, torch.float64))
    kd.cka(x, y, kernel=kernel(got), backend="triton").sum().backward()
    kd.cka(x.double(), y.double(), kernel=kernel(true), backend="reference").sum().backward()
    checks += 1
    if not relative(got.grad.double(), true.grad) < 2e-5:
        failures.append(f"{name} sigma of {kernel.__name__}: {got.grad} {true.grad}")


def unscaled_rows(name, x, y):
    """gram_mse keeps the caller's units: its pair weights have to fit float16 all the same."""
    global checks
    for size, upstream in ((130.0, 1e-4), (1e-3, 1e9)):
        seen = []
        for backend, work in (("triton", torch.float16), ("reference", torch.float64)):
            a, b = ((t * size).half().to(work).requires_grad_() for t in (x, y))
            (kd.gram_mse(a, b, backend=backend) * upstream).backward()
            seen.append(a.grad.double())
        checks += 1
        if not relative(*seen) < 2e-3:
            failures.append(f"{name} rows of size {size}: {relative(*seen)}")


@triton.jit
def broken_weights(K, L, p_i, q_i, e_i, p_j, q_j, e_j, ROWWISE: tl.constexpr):
    return 2 * p_i * L + 2 * q_i * K + e_i[:, None]


def shrink_small():
    """Several programs from 17 rows on, of tiles of 16, and columns split among as many as fill a large machine."""
    small.FUSED_ROWS, small.SUMS_COLUMNS = 16, 32
    small.machine = lambda device: (1 << 12, small.LARGE_SHARED[1])
    small.SPLIT_CONFIGS = ((1024, *[small.Config(16, 16, 4, 1)] * 2),)


def shrink(flash_width: int, band_bytes: int):
    panels.SMALL = schedule.SMALL = 8
    tiles.SUMS = tiles.PANEL = (TINY, TINY)
    tiles.FLASH = ((1 << 20, TINY, TINY),)
    tiles.FLASH_WIDTH, tiles.BAND_BYTES = flash_width, band_bytes
    forms.in_feature_space = lambda *_: False


def main():
    torch.manual_seed(0)
    if "--break" in sys.argv:
        shrink(256, 64 << 20)
        tile_kernels.pair_weights = broken_weights
        x, y, _ = data(41, 5, 18)
        compare("broken", kd.cka, x, y)
    elif "--large" in sys.argv:
        kernels = ("linear", "polynomial", ("rbf", "linear"), ("laplacian", "cosine"))
        shrink(256, 1 << 9)  # flash-style, one row tile a band
        family("flash", kernels[:3], *data(41, 5, 18))
        shrink(4, 64 << 20)  # panels of a few rows, and two groups
        family("panels", kernels, *data(37, 5, 18, 2))
        shrink(4, 5000)  # panels of two row blocks, of which the last has one
        compare("last panel", kd.cka, *data(37, 5, 18)[:2])
        unscaled_rows("panels", *data(37, 5, 18)[:2])
    else:
        family("one program", ("linear", "polynomial", ("rbf", "cosine"), ("laplacian", "linear")), *data(17, 5, 7, 2))
        shrink_small()
        family("several programs", ("linear", "rbf"), *data(37, 10, 40))
        for kernel in ("linear", kd.RBF(20.0)):  # of 38 steps: more splits than are read at once
            compare("splits", kd.cka, *data(37, 10, 600)[:2], kernel=kernel)
    print(*failures, f"{checks} comparisons, {len(failures)} failed", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
