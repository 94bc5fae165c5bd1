# SPDX-License-Identifier: Apache-2.0
"""The contract can fail: each of these breaks the Nystrom backend torch in one way, and the named check notices it."""

import pytest
import torch
from broken import one_gradient, rejects, without_last

import kdkernels as kd
from kdkernels import testing
from kdkernels.nystrom import chunks, landmarks, maps, select, statistics, torch_impl

FORWARD, BACKWARD = chunks.features_forward, chunks.features_backward
DX, DZ, DSIGMA = 0, 1, 2


def value(change):
    return {(chunks, "features_forward"): lambda *a: (change(FORWARD(*a)[0]), *FORWARD(*a)[1:])}


def gradient(change, which=DX):
    return {(chunks, "features_backward"): one_gradient(BACKWARD, change, which)}


def single_factor(W, *how):
    """W formed in float64, but factored in float32."""
    factor, spectrum = FACTORED(W.float(), *how)
    return factor.double(), spectrum.double()


def half_rows(spec, x, shift, dtype):
    return ROWS(spec, x, shift, dtype).bfloat16().to(dtype)


def explicit_inverse(s, C):
    return C @ torch.linalg.inv(s.whitener.to(torch.float16).to(s.whitener.dtype)).mT


def test_the_contract_rejects_float32_where_it_does_not_do(monkeypatch):
    monkeypatch.setattr(torch_impl, "TAKES_ANY_DTYPE", False)
    for op in ("nystrom_features", "nystrom_cka"):
        results = testing.contract(op, "torch", quick=True, checks=["accuracy"])
        assert any("scale" in result.case and not result.ok for result in results)


FACTORED, ROWS, W_GRADIENT = landmarks._factored, maps.prepared_rows, landmarks.factor_gradient

FEATURES = {
    "lost last row": ("value", value(without_last(0))),
    "lost last landmark": ("value", value(without_last(1))),
    "rows in bfloat16": ("value", {(maps, "prepared_rows"): half_rows}),
    "a whitener in float16": ("value", {(torch_impl, "whitened"): explicit_inverse}),
    "gradient without the path through W": (
        "gradient landmarks",
        {(landmarks, "factor_gradient"): lambda *a: 0 * W_GRADIENT(*a)},
    ),
    "gradient through W transposed in the product": (
        "gradient landmarks",
        {(landmarks, "factor_gradient"): lambda s, product: W_GRADIENT(s, product.mT)},
    ),
}

LAWS, MOVED, ONLY = statistics._centred_laws, statistics._moved, statistics.only


def law(**change):
    return {
        (statistics, "_centred_laws"): lambda *a: tuple(
            one._replace(**{k: f(getattr(one, k)) for k, f in change.items()}) for one in LAWS(*a)
        )
    }


def masks_ignored(kept, t):
    return t


def masks_by_product(kept, t):
    return t if kept is None else t * kept


STATISTICS = {
    "moments not moved to the mean": ("value", {(statistics, "_moved"): lambda S, sums, near: S}),
    "gradient without the other side": ("gradient x", law(B=lambda t: 0 * t)),
    "gradient without its own side": ("gradient x", law(A=lambda t: 0 * t)),
    "gradient without the diagonal": ("gradient x", law(u=lambda t: 0 * t)),
    "gradient without the diagonal of the other side": ("gradient x", law(v=lambda t: 0 * t)),
    "gradient not centred": ("gradient x", law(w=lambda t: 0 * t)),
    "gradient transposed": ("gradient x", law(B=lambda t: t.mT.reshape(t.shape))),
    "ignored mask": ("value", {(statistics, "only"): masks_ignored}),
    "mask by multiplication": ("masks", {(statistics, "only"): masks_by_product}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_contract_rejects_features(name, monkeypatch):
    assert rejects(monkeypatch, "nystrom_features", *FEATURES[name])


@pytest.mark.parametrize("name", STATISTICS)
def test_the_contract_rejects_statistics(name, monkeypatch):
    assert rejects(monkeypatch, "nystrom_cka", *STATISTICS[name])


def test_the_contract_rejects_a_transfer_without_its_denominators_gradient(monkeypatch):
    right = statistics._transfer_laws

    def without(S, pair, grad):
        return right(S._replace(tt=0 * S.tt + S.tt.square().mean().sqrt()), pair, grad)

    assert rejects(monkeypatch, "nystrom_transfer", "gradient y", {(statistics, "_transfer_laws"): without})


def test_the_contract_rejects_a_selection_that_forgets_what_was_chosen(monkeypatch):
    right = select._pick
    forgetful = lambda weight, free, keep, *rest: right(torch.ones_like(weight), free, keep, *rest)  # noqa: E731
    assert rejects(monkeypatch, "select_landmarks", "value", {(select, "_pick"): forgetful})


def test_a_factor_in_float32_does_not_survive_a_jitter_that_one_in_float64_does(monkeypatch):
    x = torch.randn(200, 3)
    assert kd.nystrom_features(x, x, kernel=kd.RBF(3.0), jitter=1e-8).isfinite().all()
    monkeypatch.setattr(landmarks, "_factored", single_factor)
    with pytest.raises(ValueError, match="no Cholesky factor"):
        kd.nystrom_features(x, x, kernel=kd.RBF(3.0), jitter=1e-8)
