# SPDX-License-Identifier: Apache-2.0
"""The contract can fail: each of these breaks the torch backend in one way, and the named check must notice it.

A wrong stream needs a GPU: `side stream` and `graph` are the checks for it there.
"""

import contextlib

import pytest
import torch
from broken import one_gradient, rejects, without_last

from kdkernels import differentiable, testing
from kdkernels.gram import bandwidth, torch_impl
from kdkernels.gram.torch_impl import combine, forms, prepared

FORWARD, BACKWARD = torch_impl.forward, torch_impl.backward
# rows of one side in what forward saves: u, p, q, e, f, h (SIDE_ROWS)
P, Q, E = 1, 2, 3
DX, DY, DSIGMA = 0, 1, 2


def value(change):
    """A forward pass whose value is changed."""
    return {"forward": lambda *a: (change(FORWARD(*a)[0]), *FORWARD(*a)[1:])}


def gradient(change, which=DX):
    return {"backward": one_gradient(BACKWARD, change, which)}


def saved(row):
    """A gradient without one of its terms, on both sides."""

    def backward(call, saved, grad):
        rows = saved[0].clone()
        rows[:, [row, combine.SIDE_ROWS + row]] = 0
        return BACKWARD(call, (rows, *saved[1:]), grad)

    return {"backward": backward}


def inputs(change):
    """Both passes see other features."""

    def changed(call):
        x, y = (side._replace(features=change(side.features)) for side in call.sides)
        return call._replace(x=x, y=y)

    return {
        "forward": lambda call: FORWARD(changed(call)),
        "backward": lambda call, *rest: BACKWARD(changed(call), *rest),
    }


def transposed(t):
    return t.mT.reshape(t.shape)


def no_mask_forward(call):
    return FORWARD(call._replace(mask=None))


def no_mask_backward(call, *rest):
    return BACKWARD(call._replace(mask=None), *rest)


def mask_by_product(call):
    out = FORWARD(call)
    leak = 0 if call.mask is None else (call.x.features * call.mask[..., None]).sum((1, 2)) * 0
    return (out[0] + leak, *out[1:])


SABOTAGE = {
    "wrong group": ("value", value(lambda v: v.roll(1, 0))),
    "lost last row": ("value", inputs(without_last(1))),
    "lost last column": ("value", inputs(without_last(2))),
    "ignored mask": ("value", {"forward": no_mask_forward, "backward": no_mask_backward}),
    "gradient without the other side's term": ("gradient x", saved(P)),
    "gradient without its own side's term": ("gradient x", saved(Q)),
    "gradient without the row sums": ("gradient x", saved(E)),
    "transposed gradient": ("gradient x", gradient(transposed)),
    "gradient of the wrong group": ("gradient x", gradient(lambda g: g.roll(1, 0))),
    "mask by multiplication": ("masks", {"forward": mask_by_product}),
    "gradient in masked rows": ("masks", gradient(lambda g: g + 1e-4)),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_contract_rejects(name, monkeypatch):
    assert rejects(monkeypatch, "cka", *SABOTAGE[name], torch_impl)


def test_the_contract_rejects_products_rounded_by_autocast(monkeypatch):
    monkeypatch.setattr(differentiable, "without_autocast", lambda device: contextlib.nullcontext())
    numbers = [check for check in testing.checks_for("torch", "cpu") if check not in testing.transforms.CHECKS]
    results = testing.contract("cka", "torch", quick=True, checks=numbers)
    assert {result.check for result in results if not result.ok} == {"autocast"}


@pytest.mark.parametrize(
    "owner, name, broken",
    [
        (forms, "far_apart", lambda pairs: False),
        (forms, "outgrown", lambda *a: False),
        (prepared, "outside", lambda *a: False),
        (bandwidth, "_rounded", lambda *a: False),
    ],
)
def test_the_contract_rejects_float32_where_it_does_not_do(owner, name, broken, monkeypatch):
    monkeypatch.setattr(owner, name, broken)
    results = testing.contract("gram_mse" if name == "outgrown" else "mmd", "torch", quick=True, checks=["accuracy"])
    assert any(not result.ok for result in results)


def test_an_exception_is_a_failed_measurement(monkeypatch):
    def backward(*a):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch_impl, "backward", backward)
    results = testing.contract("mmd", "torch", quick=True)
    assert any("RuntimeError: no such thing" in result.note for result in results)


def test_poison_fills_what_nobody_wrote_and_is_taken_back():
    before = torch.are_deterministic_algorithms_enabled()
    with testing.poison():
        x = torch.ones(3)
        for fresh in (torch.empty(5), x.new_empty(2, 2), torch.empty_like(x), torch.empty_strided((2, 2), (1, 2))):
            assert fresh.isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
