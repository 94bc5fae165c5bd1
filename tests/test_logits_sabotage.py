# SPDX-License-Identifier: Apache-2.0
"""The contract of the logits ops can fail: each of these breaks the torch backend once, and a check must notice it."""

import pytest
import torch
from broken import rejects

from kdkernels import testing
from kdkernels.logits import call, torch_impl

FORWARD, BACKWARD, LERP = torch_impl.forward, torch_impl.backward, torch_impl.lerp_rows
KL, MIXED, MIXUP, JSD = "distillation_kl", "mixed_distillation", "mixup", "generalized_jsd"
VALUES, SLOPES, CLASSES = torch_impl.divergence, torch_impl.divergence_gradient, torch_impl._classes_of


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


def of_classes(term=lambda how, p, q, w, t: t, slope=lambda how, p, q, w, s: s):
    """What is found of each class, with another term or another slope."""

    def classes(how, p, q, w):
        found, apart, slopes = CLASSES(how, p, q, w)
        return term(how, p, q, w, found), apart, slope(how, p, q, w, slopes)

    return {"_classes_of": classes}


def another(**change):
    return {
        "divergence": lambda s, t, r, how, *rest: VALUES(s, t, r, how._replace(**change), *rest),
        "divergence_gradient": lambda *a: SLOPES(*a[:-1], a[-1]._replace(**change)),
    }


def of_kept(row, change):
    def gradient(grad, s, t, taus, statistics, how):
        statistics = statistics.clone()
        statistics[row] = change(statistics[row])
        return SLOPES(grad, s, t, taus, statistics, how)

    return {"divergence_gradient": gradient}


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
    "another share": (JSD, "value", another(b=0.45)),
    "another temperature of a mixture": (JSD, "value", another(tau=1.51)),
    "sides of a mixture swapped": (JSD, "value", {"divergence": lambda s, t, *r: VALUES(t, s, *r)}),
    "terms that cancel": (
        JSD,
        "value",
        of_classes(term=lambda how, p, q, w, t: t if how.b != 0 else p - q - torch.where(q == 0, 0, q * w)),
    ),
    "no choice of the maxima": (
        JSD,
        "gradient student",
        {"_log_ratio": lambda z, y, m_s, m_t, tau, r: ((z - m_s - (y - m_t)) / tau + r).nan_to_num(0.0, 1e30, -1e30)},
    ),
    "slopes without their mean": (JSD, "gradient student", of_kept(call.MEAN_S, torch.zeros_like)),
    "a teacher's mean that is the student's": (JSD, "gradient teacher", of_kept(call.MEAN_S, lambda mean: 0.9 * mean)),
    "a slope of total variation by its size": (
        JSD,
        "gradient student",
        of_classes(slope=lambda how, p, q, w, s: p * w.clamp(-0.5, 0.5) if how.variation else s),
    ),
    "a slope without its bend": (
        JSD,
        "gradient student",
        of_classes(slope=lambda how, p, q, w, s: s - how.tilt * 0.05 * (p - q)),
    ),
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
