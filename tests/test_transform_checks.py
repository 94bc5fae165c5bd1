# SPDX-License-Identifier: Apache-2.0
"""The checks about PyTorch itself can fail: each call is wrong in one way, and the named check must notice it."""

import warnings

import pytest
import torch

from kdkernels import differentiable
from kdkernels.testing import Caps, Case
from kdkernels.testing.probe import probe_of
from kdkernels.testing.transforms import CHECKS


def reference(x, y):
    return (x.square() * y).sum(-1)


def made(name, **change):
    """`reference` of rows through the maker, with something changed."""
    parts = {
        "forward": lambda x, y, need: (reference(x, y),),
        "backward": lambda grad, x, y, need: (
            g.contiguous() for g in (2 * grad[..., None] * x * y, grad[..., None] * x**2)
        ),
        "fake": lambda x, y, need: (x.new_empty(x.shape[:-1]),),
        "tangent": differentiable.of_rows(0, 1),
    }
    return differentiable.operator(f"test_broken_{name}", "x y", "", "", wanted="x y", **(parts | change)).value


class Plain(torch.autograd.Function):
    """As it would be written without the maker."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return reference(x.detach(), y.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y = (t.detach() for t in ctx.saved_tensors)
        grad = grad.detach()[..., None]
        return 2 * grad * x * y, grad * x.square()


class Untransformable(Plain):
    generate_vmap_rule = False


def warns(x, y):
    warnings.warn("something", stacklevel=1)
    return reference(x, y)


def unrolled(x, y):
    return torch.stack([reference(x[i], y[i]) for i in range(len(x))])


def read(x, y):
    return reference(x, y) * (1.0 if x.detach().sum().item() > -1e9 else 2.0)


def fixed(x, y):
    return reference(x, y) * float(x.shape[0]) / x.shape[0]


def counted(x, y):
    return reference(x, y) * torch.get_num_threads()


wrong_shape = made("shape", fake=lambda x, y, need: (x.new_empty(x.shape[:-1], dtype=torch.float64),))
twice_the_tangent = made("tangent", tangent=lambda *a: 2 * differentiable.of_rows(0, 1)(*a))
no_tangent = made("zero", tangent=lambda run, tangents, value, *a: torch.zeros_like(value))
BROKEN = {
    "a fake of another dtype": ("operators", wrong_shape),
    "a tangent that is twice as large": ("forward mode", twice_the_tangent),
    "a tangent of 0": ("forward mode", no_tangent),
    "no tangent at all": ("forward mode", Plain.apply),
    "a second derivative that is lost": ("second derivative", Plain.apply),
    "no vmap": ("func", Untransformable.apply),
    "a teacher that cannot be saved": ("inference mode", Plain.apply),
    "a number read": ("traced", read),
    "a warning": ("compiled", warns),
    "a graph for each number of rows": ("compiled", unrolled),
    "a size that is fixed": ("exported", fixed),
    "a value that goes with the threads": ("threads", counted),
}
RIGHT = made("right")


def right(x, y):
    return RIGHT(x, y)


def probe(call, textbook=reference, backend="torch"):
    x, y = torch.randn(2, 5, 4).double()
    caps = lambda dtype: Caps(1e-6, 1e-6)  # noqa: E731
    run = lambda t, backend: (textbook if backend == "reference" else call)(t["x"], t["y"])  # noqa: E731
    case = Case("rows", {"x": x, "y": y}, run, caps, lambda t: 1.0, probe=True)
    return probe_of(case, backend, "cpu")


def rejected(check, call):
    try:
        return not all(result.ok for result in CHECKS[check](probe(call)))
    except Exception:  # the contract reports it as a failed measurement
        return True


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_rejects(name):
    assert rejected(*BROKEN[name])


def test_a_textbook_that_loses_its_second_derivative_is_noticed():
    (right,) = CHECKS["second derivative"](probe(None, backend="reference"))
    (wrong,) = CHECKS["second derivative"](probe(None, lambda x, y: (x * x.detach() * y).sum(-1), "reference"))
    assert right.ok and not wrong.ok


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_accepts_what_the_maker_makes(check):
    failed = [result for result in CHECKS[check](probe(right)) if not result.ok]
    assert not failed, failed[0]
