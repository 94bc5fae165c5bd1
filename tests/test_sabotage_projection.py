# SPDX-License-Identifier: Apache-2.0
"""The contract can fail for projections and landmark similarity: each of these breaks them, and is noticed."""

import pytest
import torch
from broken import noisy, one_gradient, rejects, without_last

from kdkernels import testing
from kdkernels.nystrom.kda import torch_impl as kda
from kdkernels.projection import torch_impl as projection

MODULES = {"projected_mse": projection, "landmark_similarity_loss": kda}
ORIGINAL = {op: (module.forward, module.backward) for op, module in MODULES.items()}


def value(change):
    """A forward pass whose value is changed."""
    return lambda op: {"forward": lambda *a: (change(ORIGINAL[op][0](*a)[0]), *ORIGINAL[op][0](*a)[1:])}


def gradient(change, which=0):
    """A backward pass with one changed gradient, where it is asked for."""

    def broken(op):
        backward = ORIGINAL[op][1]
        if op == "landmark_similarity_loss":  # it has one gradient
            return {"backward": lambda *a: change(backward(*a))}
        return {"backward": one_gradient(backward, change, which)}

    return broken


def inputs(change):
    """The forward pass sees other features on both sides."""
    return lambda op: {"forward": lambda s, t, *rest: ORIGINAL[op][0](change(s), change(t), *rest)}


def no_mask(op):
    forward, backward = ORIGINAL[op]
    return {
        "forward": lambda s, t, P, mask, *rest: forward(s, t, P, None, *rest),
        "backward": lambda grad, s, t, P, mask, *rest: backward(grad, s, t, P, None, *rest),
    }


BOTH = {
    "lost last sample": ("value", inputs(without_last(0))),
    "lost last column": ("value", inputs(without_last(-1))),
    "gradient of other rows": ("gradient s", gradient(lambda g: g.flip(0))),
    "another gradient each time": ("twice", gradient(noisy)),
}
CASES = [(op, name, *broken) for op in MODULES for name, broken in BOTH.items()]
CASES += [
    ("projected_mse", "teacher's gradient with the student's sign", "gradient t", gradient(torch.neg, 1)),
    ("projected_mse", "dropped gradient of the basis", "gradient basis", gradient(torch.zeros_like, 2)),
    ("projected_mse", "ignored mask", "value", no_mask),
    ("projected_mse", "gradient in masked rows", "masks", gradient(lambda g: g + 1e-4)),
    ("landmark_similarity_loss", "a mean in place of the sum", "value", value(lambda v: v / 91)),
]


@pytest.mark.parametrize("op, name, check, broken", CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_the_contract_rejects(op, name, check, broken, monkeypatch):
    assert rejects(monkeypatch, op, check, broken(op), MODULES[op])


def unclamped(s, t, s_centers, t_centers, loss, square):
    """The slope of the parabola everywhere."""
    T = t @ t_centers.mT
    square += (T * T).sum()
    D = s @ s_centers.mT - T
    loss += torch.nn.functional.smooth_l1_loss(D, torch.zeros_like(D), reduction="sum")
    return D


@pytest.mark.parametrize(
    "module, part, replacement, op, check",
    [
        (kda, "_block", unclamped, "landmark_similarity_loss", "gradient s"),
        (kda, "inverse_norm", lambda square: square.rsqrt(), "landmark_similarity_loss", "value"),
        (projection, "divisors", lambda mask, S, k, r: S.shape[0] * S.shape[2] * k, "projected_mse", "value"),
        (projection, "by_rows", lambda x: True, "projected_mse", None),  # only slower
    ],
)
def test_a_part_that_is_wrong_is_noticed(module, part, replacement, op, check, monkeypatch):
    monkeypatch.setattr(module, part, replacement)
    bad = {result.check for result in testing.measure(op, "torch", quick=True, checks=["accuracy"]) if not result.ok}
    assert check in bad if check else not bad
