# SPDX-License-Identifier: Apache-2.0
"""The launches of whole calls compile as a GPU would specialise them, though none is here: 1 is a constant there.

`test_compile_only.py` compiles hand-written signatures; this leg runs the launchers on CPU tensors with a driver that
only claims to be an H100, so argument types, dummy pointers and constants are those of a real launch. Results are
meaningless: nothing runs.
"""

import os
import re

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")

pytestmark = pytest.mark.compile_only

HALF, FULL = torch.bfloat16, torch.float32
CASES = {
    "one group, both gradients": dict(x=HALF, need=3),
    "one row, one feature": dict(x=FULL, n=1, p=1, q=1, stat="mse", unbiased=False, center=False, need=3),
    "one row, row norms": dict(x=HALF, n=1, unbiased=False, center=False, row_normalize=True, need=3),
    "one row, distances": dict(x=FULL, n=1, stat="sum", kx="rbf:1.0:2.0", q=2, center=False),
    "mixed dtypes, odd widths, a mask": dict(x=torch.float16, y=FULL, n=200, p=37, q=1, mask=True, need=3),
    "row-normalised, masked": dict(x=FULL, n=200, unbiased=False, center=False, row_normalize=True, mask=True, need=3),
    "rows of gram_mse": dict(x=HALF, n=200, stat="row_mse", unbiased=False, center=False, need=3),
    "gradient of sigma": dict(x=HALF, kx="rbf", ky="laplacian", sigma=1, mask=True, need=15),
    "sigma of each group": dict(x=FULL, kx="laplacian", G=3, sigma=3, need=5),
    "several bandwidths": dict(x=torch.float16, kx="rbf:1.0:2.0:4.0", ky="laplacian:1.0:2.0", need=3),
    "prepared sides": dict(x=HALF, kx="cosine", ky="polynomial:3:1.0:1.0", n=200, mask=True, need=3),
    "prepared, gradient of sigma": dict(x=HALF, kx="rbf", ky="cosine", sigma=1, need=7),
    "tiles, gradient in registers": dict(x=HALF, kx="rbf", n=1040, p=33, q=1, sigma=1, mask=True, need=7),
    "tiles of one feature": dict(x=FULL, n=1040, p=1, q=1, stat="row_mse", unbiased=False, center=False, need=3),
    "panels": dict(x=HALF, kx="polynomial:2:1.0:1.0", n=1040, p=300, mask=True),
    "panels of unscaled rows": dict(x=HALF, n=1040, p=300, stat="mse", unbiased=False, center=False),
    "panels, row norms": dict(
        x=FULL, n=1040, p=300, kx="laplacian:2.0", unbiased=False, center=False, row_normalize=True
    ),
}


class Driver:
    """What a launch asks of a driver before it has a binary."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return -1  # a cache of compiled kernels of its own

    def get_current_stream(self, _device):
        return 0


@pytest.fixture
def launches(monkeypatch):
    """(kernel name, PTX) in the order of their launches; each is compiled, none is run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kdkernels.gram.torch_impl import forms

    seen, run = [], JITFunction.run

    def compiled(self, *arguments, grid, warmup, **options):
        assert all(size > 0 for size in grid) and grid[0] < 2**31 and all(size < 2**16 for size in grid[1:]), grid
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        seen.append((self.__name__, kernel.asm["ptx"]))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(forms, "in_feature_space", lambda *_: False)
    monkeypatch.setattr(driver, "_active", Driver())
    return seen


def call(x, y=None, G=1, n=64, p=32, q=48, mask=False, stat="cka", kx="linear", ky="linear", unbiased=True,
         center=True, row_normalize=False, sigma=0, need=1):  # fmt: skip
    """Forward and backward of the backend, as the operators call them."""
    from kdkernels.gram import triton_impl
    from kdkernels.gram.call import Problem, call_of
    from kdkernels.gram.kernels import spec_from

    problem = Problem(stat, spec_from(kx), spec_from(ky), unbiased, center, row_normalize, True)
    sides = torch.randn(G, n, p, dtype=x), torch.randn(G, n, q, dtype=y or x)
    keep = torch.rand(G, n) > 0.3 if mask else None
    sigmas = [torch.ones(sigma) if sigma and k in ("rbf", "laplacian") else None for k in (kx, ky)]
    whole = call_of(problem, *sides, keep, sigmas, need)
    _, *saved = triton_impl.forward(whole)
    triton_impl.backward(whole, saved, torch.ones(G))


@pytest.mark.parametrize("case", CASES)
def test_every_launch_of_the_call_compiles(case, launches):
    call(**CASES[case])
    assert launches


@pytest.mark.parametrize("kernel", ["linear", "rbf:2.0"])
@pytest.mark.parametrize("n, forward", [(64, 2), (512, 3)])
def test_a_call_is_its_launches_and_no_operator_beside_them(n, forward, kernel, launches):
    from torch.utils._python_dispatch import TorchDispatchMode

    beside = []
    free = {"empty", "new_empty", "view", "slice", "select", "unsqueeze", "alias", "detach", "promote_types", "device"}
    free |= {"randn", "ones"}  # the test's own tensors

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            name = operator._schema.name.split("::")[1]
            if name not in free:
                beside.append(name)
            return operator(*arguments, **(options or {}))

    with Recorder():
        call(x=HALF, n=n, kx=kernel, ky=kernel)
    assert len(launches) == forward + 2, [name for name, _ in launches]
    assert beside == []


def test_rows_of_any_width_are_copied_asynchronously_above_1024_samples(launches):
    """Loads of two bytes each would spill most of the tile."""
    for p in (33, 301):
        call(x=HALF, n=1041, p=p, q=5)
    assert {name for name, _ in launches} == {"tile_sums", "gradient_rows", "weight_panel"}
    assert all("cp.async" in ptx for _, ptx in launches), [name for name, ptx in launches if "cp.async" not in ptx]


def test_factors_of_tf32_products_are_rounded(launches, monkeypatch):
    """Tensor cores would cut them off; what that does to a sum is asked in test_tf32.py."""
    from kdkernels.gram.triton_impl import small, tiles
    from kdkernels.nystrom.kda import triton_impl as landmarks
    from kdkernels.projection import triton_impl as projection

    for schedule in (small, tiles):
        monkeypatch.setattr(schedule, "precision", lambda *_, **__: "tf32")
    call(x=FULL)
    call(x=FULL, n=1040)
    call(x=FULL, n=1040, p=300)
    s, t, basis = torch.randn(64, 32, dtype=HALF), torch.randn(64, 32, dtype=HALF), torch.randn(32, 16)
    value, kept = projection.forward(s, t, basis, None, 1, "mean", True)
    projection.backward(torch.ones_like(value), s, t, basis, None, kept, 1, "mean", 1)
    _, kept, inverse = landmarks.forward(s, t, basis.mT, basis.mT, True)
    landmarks.backward(torch.ones(()), s, t, basis.mT, basis.mT, kept, inverse)
    products = {name for name, ptx in launches if re.search(r"mma.*\.tf32", ptx)}
    assert products == {
        "split_gram", "weighted_rows", "tile_sums", "gradient_rows", "weight_panel", "project", "spread",
        "similarity_sums", "similarity_gradient",
    }  # fmt: skip
    # V is rounded where it is made, before its row sums are taken
    assert products | {"pair_rows"} == {name for name, ptx in launches if "cvt.rna.tf32" in ptx}
