# SPDX-License-Identifier: Apache-2.0
"""The Nystrom ops are good citizens of PyTorch: opcheck, torch.compile without breaks or recompiles, torch.func."""

import pytest
import torch

import kdkernels as kd
from kdkernels.gram.kernels import spec_of
from kdkernels.nystrom.call import Question
from kdkernels.nystrom.operator import encode

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")
CALLS = {
    "features": lambda x, y, m: kd.nystrom_features(x, y[:4], kernel="rbf"),
    "features sqrt": lambda x, y, m: kd.nystrom_features(x, y[:4], kernel=kd.Laplacian(2.0), whiten="sqrt"),
    "cka": lambda x, y, m: kd.nystrom_cka(x, y, x[:4], y[:3], mask=m),
    "hsic": lambda x, y, m: kd.nystrom_hsic(x, y, x[:4], y[:3], kernel=("polynomial", "cosine"), unbiased=False),
    "transfer": lambda x, y, m: kd.nystrom_transfer(x, y, x[:4], y[:4], kernel=kd.RBF(2.0), mask=m),
    "selected": lambda x, y, m: kd.nystrom_features(x, x[kd.select_landmarks(x, 4, method="greedy", mask=m)]),
    "quality": lambda x, y, m: kd.transfer_quality(x, y, kernel="rbf"),
}


def arguments(n=12, dtype=torch.float32):
    x, y = torch.randn(n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype) + 0.5
    mask = torch.rand(n) > 0.2
    mask[:5] = True
    return x.requires_grad_(), y.requires_grad_(), mask


def value_and_gradients(f, x, y, mask):
    value = f(x, y, mask)
    return value, *torch.autograd.grad(value.square().sum(), (x, y), allow_unused=True)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_one_graph_and_equals_the_eager_one(name):
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    sides = arguments()
    same(value_and_gradients(compiled, *sides), value_and_gradients(CALLS[name], *sides))


def problem(stat, kernels, whiten, unbiased=True):
    return encode(Question(stat, spec_of(kernels), whiten, 1e-3, unbiased, True, "torch"))


def test_a_bandwidth_tensor_reaches_the_operators_and_gets_its_gradient_when_compiled():
    x, y, _ = arguments()
    sigma = torch.tensor(2.0, requires_grad=True)

    def f(x, y, sigma):
        return kd.nystrom_cka(x, y, x[:4], y[:4], kernel=kd.RBF(sigma))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(g(x, y, sigma), (x, sigma)) for g in (compiled, f))
    same(got, want)
