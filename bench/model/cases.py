# SPDX-License-Identifier: Apache-2.0
"""What is predicted: calls of the package, the kernels of each that are wanted, and what these cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch

import kdkernels as kd

from .built import Kernel, compiled
from .incumbent import isotonic


class Work(NamedTuple):
    """Of a kernel: bytes that DRAM has to move, and operations at a rate of rates.Machine."""

    bytes: int
    operations: int = 0
    rate: str = "float32"  # multiply-adds; special: exponentials and their like


class Case(NamedTuple):
    name: str
    shape: str  # 8192x1000
    dtype: str
    call: Callable[[object], object]  # given what executes it
    kernels: dict[str, Work]  # by the name that they have without parameters of templates
    backend: str = "triton"  # or cuda; nvcc: kernels compiled for the model alone


def cases() -> list[Case]:
    """In the order they are printed; nothing is drawn or run before its call."""
    return [
        make(name, shape, dtype)
        for make, name, shape in (
            (_kl, "kl", (8192, 1000)),
            (_kl, "kl", (1024, 32000)),
            (_project, "projected_mse", (32, 256, 32, 32, 64)),
            (_cka, "cka", (66, 128, 512)),
            (_rank, "soft_rank", (8192, 1000)),
            (_rank, "soft_rank", (256, 1000)),
            (_rank, "soft_rank", (64, 21841)),
            (_rank_in_triton, "soft_rank in triton", (8192, 1000)),
            (_spearman, "spearman", (8192, 1000)),
        )
        for dtype in ("float32", "bfloat16")
    ] + [_sort(8192, 1000), _torchsort(8192, 1000)]


@contextmanager
def plausible_memory():
    """Memory that starts with numbers about one, the same in each run: the kernels read results of which only a part
    has been computed, and garbage takes other paths than numbers."""
    names = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in names]
    generator = torch.Generator().manual_seed(1)

    def filled(original):
        def make(*arguments, **options):
            made = original(*arguments, **options)
            return made.uniform_(0.5, 1.5, generator=generator) if made.is_floating_point() else made.zero_()

        return make

    for (owner, name), original in zip(names, originals, strict=True):
        setattr(owner, name, filled(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(names, originals, strict=True):
            setattr(owner, name, original)


def _draw(*shape: int, dtype: str) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), device="cpu")
    return drawn.to(torch.get_default_device(), getattr(torch, dtype))


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _kl(name: str, shape: tuple[int, ...], dtype: str) -> Case:
    elements = shape[0] * shape[1]
    read = 2 * elements * _size(dtype)

    def call(_):
        student, teacher = _draw(*shape, dtype=dtype).requires_grad_(), _draw(*shape, dtype=dtype)
        kd.distillation_kl(student, teacher, tau=4.0, backend="triton").backward()

    # the gradient is made in the forward pass; for an upstream of 1 the backward pass only looks at that
    kernels = {"kl_rows": Work(read * 3 // 2, 2 * elements, "special"), "kl_again": Work(elements // shape[1])}
    return Case(name, "x".join(map(str, shape)), dtype, call, kernels)


def _project(name: str, shape: tuple[int, ...], dtype: str) -> Case:
    *maps, k = shape
    batch, channels, height, width = maps
    rows = batch * height * width

    def call(_):
        s, t = _draw(*maps, dtype=dtype).requires_grad_(), _draw(*maps, dtype=dtype)
        kd.projected_mse(s, t, _draw(channels, k, dtype="float32") / channels**0.5, backend="triton").backward()

    terms = 3 if dtype == "float32" else 1  # float32 factors are split in two
    products, side = terms * rows * channels * k, rows * channels * _size(dtype)
    kernels = {
        "project": Work(2 * side + rows * k * 4, products, "tf32"),
        "spread": Work(side + rows * k * 4, products, "tf32"),
    }
    return Case(name, "x".join(map(str, shape)), dtype, call, kernels)


def _cka(name: str, shape: tuple[int, ...], dtype: str) -> Case:
    groups, n, p = shape
    matrices = 2 * groups * n * n * 4
    features = 2 * groups * n * p * _size(dtype)

    def call(_):
        x, y = _draw(*shape, dtype=dtype).requires_grad_(), _draw(*shape, dtype=dtype)
        kd.cka(x, y, backend="triton").sum().backward()

    # of two terms each are three products, of a symmetric tile two
    kernels = {
        "split_gram": Work(features + matrices, 2 * groups * n * (n + 1) * p, "tf32"),
        "row_sums": Work(matrices, 2 * groups * n * n * 4, "float64"),
        "pair_rows": Work(3 * matrices // 2, 2 * groups * n * n),
        "weighted_rows": Work(features + matrices // 2, 3 * groups * n * n * p, "tf32"),
    }
    return Case(name, "x".join(map(str, shape)), dtype, call, kernels)


def _rank(name: str, shape: tuple[int, ...], dtype: str) -> Case:
    elements = shape[0] * shape[1]

    def call(_):
        kd.soft_rank(_draw(*shape, dtype=dtype).requires_grad_(), "l2", "auto", backend="cuda").sum().backward()

    # ranks and what the backward pass is told of the blocks are 4 bytes each
    kernels = {
        "rank_rows_kernel" if shape[1] <= 4096 else "rank_big_kernel": Work(elements * (_size(dtype) + 4 + 4)),
        "rank_rows_backward_kernel": Work(elements * (4 + 4 + _size(dtype))),
    }
    return Case(name, "x".join(map(str, shape)), dtype, call, kernels, "cuda")


def _rank_in_triton(name: str, shape: tuple[int, ...], dtype: str) -> Case:
    """What a GPU without the CUDA library launches beside torch.sort, which comes first."""
    elements = shape[0] * shape[1]

    def call(_):
        kd.soft_rank(_draw(*shape, dtype=dtype).requires_grad_(), "l2", "auto", backend="triton").sum().backward()

    # of what torch.sort left, int64 places too; sums of blocks are made where there were zeros
    kernels = {
        "fit_rows": Work(elements * (_size(dtype) + 8 + 4 + 4)),
        "spread_rows": Work(elements * (4 + 4 + 8 + _size(dtype))),
    }
    return Case(name, "x".join(map(str, shape)), dtype, call, kernels)


def _spearman(name: str, shape: tuple[int, ...], dtype: str) -> Case:
    elements, size = shape[0] * shape[1], _size(dtype)

    def call(_):
        x = _draw(*shape, dtype=dtype)
        kd.spearman(x.requires_grad_(), x.detach().flip(-1).requires_grad_(), backend="cuda").sum().backward()

    # ranks of a side, its gradient: launched for each. a side's ranks see which of the other's elements are absent
    kernels = {
        "rank_rows_kernel": Work(elements * (2 * size + 4 + 4)),
        "spearman_tail_kernel": Work(elements * (2 * size + 4 * 4 + 2 * 4)),
        "rank_rows_backward_kernel": Work(elements * (4 + 4 + size)),
    }
    return Case(name, "x".join(map(str, shape)), dtype, call, kernels, "cuda")


def _sort(rows: int, n: int) -> Case:
    """What PyTorch runs for torch.sort, the floor of ranking."""

    def call(on):
        x, places = _draw(rows, n, dtype="float32"), torch.arange(n).repeat(rows, 1)
        values = [n.to_bytes(4, "little"), *(t.data_ptr().to_bytes(8, "little") for t in (x, places))]
        kernel = Kernel("sort_kernel", "sort_kernel", compiled("sort.cu", on.architecture))
        on.launch(kernel, rows, 32, values, {"x": x, "places": places})

    return Case("torch.sort", f"{rows}x{n}", "float32", call, {"sort_kernel": Work(rows * n * 2 * 12)}, "nvcc")


def _torchsort(rows: int, n: int) -> Case:
    """What torchsort launches for the rows of soft_rank beside torch.sort and passes of PyTorch's own."""

    def call(on):
        x = _draw(rows, n, dtype="float32")
        eps = 12**0.5 * x.std(-1, correction=0, keepdim=True) / n  # "auto"
        y = (x / eps).sort(-1, descending=True).values - torch.arange(n, 0, -1.0)
        sol, sums, target, c = (torch.zeros_like(y) for _ in range(4))
        isotonic(on, "isotonic_l2_kernel", s=y, sol=sol, sums=sums, target=target, c=c)
        grad, ret, sizes = torch.ones_like(y), torch.zeros_like(y), torch.zeros_like(y)
        isotonic(on, "isotonic_l2_backward_kernel", s=y, sol=sol, grad=grad, ret=ret, sizes=sizes)

    kernels = {"isotonic_l2_kernel": Work(rows * n * 8), "isotonic_l2_backward_kernel": Work(rows * n * 12)}
    return Case("torchsort", f"{rows}x{n}", "float32", call, kernels, "nvcc")
