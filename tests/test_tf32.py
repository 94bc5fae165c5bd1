# SPDX-License-Identifier: Apache-2.0
"""TF32 products of Triton kernels, of half inputs or of float32 where the user allows it, are not biased.

In the interpreter, in a process of its own, with the truncation of tensor cores emulated, as in the contract; but its
caps are for the worst product, not for the mean of many.
"""

import sys

import pytest
import torch

import kdkernels as kd
from kdkernels.gram import spec
from kdkernels.testing.tensor_cores import truncated_tf32

# cut off, each of two factors would be too small by 3.5e-4 at the mean, and the square of their product by 1.4e-3
BIAS = 2e-4
GRAM = {
    "gram_mse": lambda x, y, **how: kd.gram_mse(x, y, **how),
    "hsic": lambda x, y, **how: kd.hsic(x, y, center=False, unbiased=False, **how),
    "hsic rbf": lambda x, y, **how: kd.hsic(x, y, kernel=kd.RBF(3.0), center=False, unbiased=False, **how),
}
# x - 0.01 x' has more digits than either
HALF = {
    "projected_mse": lambda x, y, basis, **how: kd.projected_mse(x, 0.01 * x.detach().flip(0), basis, **how),
    "landmarks": lambda x, y, *centers, **how: kd.landmark_similarity_loss(0.02 * x, 0.02 * y, *centers, **how),
}


def bias(call, *tensors, dtype=torch.float32):
    """Relative, of the value and of the gradients along the true ones; rows in dtype, other tensors in float32."""
    seen = []
    for backend in ("triton", "reference"):
        x, y, *others = (t.to(dtype) if i < 2 else t for i, t in enumerate(tensors))
        if backend == "reference":
            x, y, *others = (t.double() for t in (x, y, *others))
        x.requires_grad_(), y.requires_grad_()
        value = call(x, y, *others, backend=backend)
        gradients = torch.autograd.grad(value, (x, y), allow_unused=True)
        seen.append([t.detach().double() for t in (value, *gradients) if t is not None])
    return [((got * want).sum() / (want * want).sum() - 1).item() for got, want in zip(*seen, strict=True)]


def cases():
    x, y = torch.rand(48, 64) + 0.5, 1.5 * torch.rand(48, 40) + 0.5
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for name, call in GRAM.items():
        yield name, bias(call, x, y)
        with spec.small_tiles("triton"):
            yield f"{name} in tiles", bias(call, x, y)
    others = {"projected_mse": [torch.rand(64, 24)], "landmarks": [torch.rand(20, 64), torch.rand(20, 40)]}
    for name, call in HALF.items():
        yield name, bias(call, x, y, *others[name], dtype=torch.float16)


def main():
    torch.manual_seed(0)
    with truncated_tf32():
        seen = dict(cases())
    wrong = [f"{name}: {numbers}" for name, numbers in seen.items() if not max(map(abs, numbers)) < BIAS]
    print(*seen.items(), sep="\n")
    sys.exit("\n".join(wrong) or 0)


@pytest.mark.interpret
def test_products_of_tf32_factors_are_not_biased(python):
    done = python("tests/test_tf32.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    main()
