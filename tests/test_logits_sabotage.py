# SPDX-License-Identifier: Apache-2.0
"""The contract of the logits ops can fail: each of these breaks the torch backend once, and a check must notice it."""

import pytest
import torch
from broken import rejects

from kdkernels import testing
from kdkernels.logits import call, torch_impl

FORWARD, BACKWARD, LERP = torch_impl.forward, torch_impl.backward, torch_impl.lerp_rows
KL, MIXED, MIXUP = "distillation_kl", "mixed_distillation", "mixup"


def value(change):
    return {"forward": lambda *a: (change(FORWARD(*a)[0]), FORWARD(*a)[1])}


def gradient(change, which=0):
    def backward(*a):
        out = list(BACKWARD(*a))
        out[which] = change(out[which]) if out[which].numel() else out[which]
        return tuple(out)

    return {"backward": backward}


def posed(**change):
    """Both passes solve another call."""

    def forward(s, t, p, *rest):
        return FORWARD(s, t, p._replace(**change), *rest)

    def backward(g, factor, s, t, statistics, p, *rest):
        return BACKWARD(g, factor, s, t, statistics, p._replace(**change), *rest)

    return {"forward": forward, "backward": backward}


def extras(change):
    def forward(s, t, p, e, need):
        return FORWARD(s, t, p, change(e), need)

    def backward(g, factor, s, t, statistics, p, e, need):
        return BACKWARD(g, factor, s, t, statistics, p, change(e), need)

    return {"forward": forward, "backward": backward}


def statistic(row, change):
    def backward(g, factor, s, t, statistics, *rest):
        statistics = statistics.clone()
        statistics[row] = change(statistics[row])
        return BACKWARD(g, factor, s, t, statistics, *rest)

    return {"backward": backward}


def no_maximum(*a):
    """exp of the logits as they are."""
    shifted = torch_impl._shifted

    def plain(logits, tau, dtype):
        x = logits.to(dtype)
        log = (x / tau).exp().sum(-1, keepdim=True).log()
        return x, x / tau, (x / tau - log).exp(), torch.zeros_like(log), log

    torch_impl._shifted = plain
    try:
        return FORWARD(*a)
    finally:
        torch_impl._shifted = shifted


SABOTAGE = {
    "rows in another order": (KL, "value", value(lambda v: v.flip(0))),
    "another temperature": (KL, "value", posed(tau=1.01)),
    "no maximum subtracted": (KL, "value", {"forward": no_maximum}),
    "a last class not read": (KL, "value", {"forward": lambda s, t, *r: FORWARD(s[:, :-1], t[:, :-1], *r)}),
    "sides swapped": (KL, "value", {"forward": lambda s, t, *r: FORWARD(t, s, *r)}),
    "logs of probabilities subtracted": (KL, "value", {"kl": lambda p, q, w: -torch.where(q == 0, 0, q * w).sum(-1)}),
    "a term that cancels": (KL, "value", {"kl": lambda p, q, w: (p - q - torch.where(q == 0, 0, q * w)).sum(-1)}),
    "inf * 0": (KL, "value", value(lambda v: v + 0 * v.log())),
    "teacher's gradient without its mean": (KL, "gradient teacher", statistic(call.K, torch.zeros_like)),
    "normaliser off by 1 %": (KL, "gradient student", statistic(call.L_S, lambda t: t + 0.01)),
    "hard term only": (MIXED, "value", posed(alpha=0.0)),
    "soft term only": (MIXED, "value", posed(alpha=1.0)),
    "labels swapped": (MIXED, "value", extras(lambda e: e._replace(labels=e.permuted, permuted=e.labels))),
    "one label for both": (MIXED, "value", extras(lambda e: e._replace(permuted=e.labels))),
    "clean rows not permuted": (
        MIXED,
        "value",
        extras(lambda e: e._replace(permutation=e.permutation if e.clean is None else torch.arange(len(e.clean)))),
    ),
    "target without the labels": (
        MIXED,
        "value",
        {"forward": lambda s, t, p, *r: FORWARD(s, t, p._replace(k3=0.0), *r)},
    ),
    "gradient without the labels": (
        MIXED,
        "gradient student",
        {"backward": lambda g, f, s, t, k, p, e, n: BACKWARD(g, f, s, t, k, p._replace(mixed=False), e, n)},
    ),
    "normaliser at temperature 1 off": (MIXED, "gradient student", statistic(call.L_1, lambda t: t + 0.01)),
    "rows not mixed": (MIXUP, "value", {"lerp_rows": lambda x, w, o, i: x.clone()}),
    "shares swapped": (MIXUP, "value", {"lerp_rows": lambda x, w, o, i: LERP(x, o, w, i)}),
    "permutation inverted": (MIXUP, "value", {"lerp_rows": lambda x, w, o, i: LERP(x, w, o, i.argsort())}),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_contract_rejects(name, monkeypatch):
    assert rejects(monkeypatch, *SABOTAGE[name], torch_impl)


def test_the_contract_rejects_a_gradient_of_mixup_on_the_wrong_permutation(monkeypatch):
    from kdkernels.logits import lerp

    def straight(grad, weight, other, index, backend):
        return lerp.lerp_rows(grad, weight, other, index, backend)

    monkeypatch.setattr(lerp, "transposed", straight)
    results = testing.measure("mixup", "torch", quick=True, checks=["accuracy"])
    assert any(result.check == "gradient x" and not result.ok for result in results)
