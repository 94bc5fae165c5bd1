# SPDX-License-Identifier: Apache-2.0
"""The way of CUDA tensors through the torch backend, on the CPU: merges, fixed-point sums, nothing read by the host."""

import math

import pytest
import torch
from ranking import LARGE, adversarial

import kdkernels as kd
from kdkernels import native, testing
from kdkernels.rank import metrics, torch_impl
from kdkernels.registry import OPS


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch_impl, "may_wait", lambda t: False)


@pytest.mark.parametrize("op", ["soft_rank", "soft_sort", "rank_diagnostics", "spearman", "spearman_corr"])
def test_the_contract_is_kept(op, as_on_a_gpu):
    failed = [result for result in testing.contract(op, "torch", quick=True) if not result.ok]
    assert not failed, failed[:5]


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("n", [1000, *LARGE])
def test_long_rows_are_within_one_unit_in_the_last_place(n, regularization, as_on_a_gpu):
    rows = adversarial(n)
    x = torch.stack([rows["logits"], rows["heavy"]]).float()
    for strength in (1e-9, 1e-3, 1.0):
        want = kd.soft_rank(x.double(), regularization, strength, backend="reference")
        got = kd.soft_rank(x, regularization, strength, backend="torch")
        unit = torch.nextafter(want.float(), torch.tensor(math.inf)).double() - want.float().double()
        assert ((got.double() - want).abs() <= unit).all(), strength


def test_an_upstream_that_is_not_finite_poisons_its_own_row(as_on_a_gpu):
    x = torch.randn(3, 20, requires_grad=True)
    for bad in (math.nan, math.inf):
        u = torch.ones(3, 20)
        u[1, 4] = bad
        for function in (kd.soft_rank, kd.soft_sort):
            (g,) = torch.autograd.grad(function(x, "l2", 100.0, backend="torch"), x, u)
            assert g[[0, 2]].isfinite().all() and not g[1].isfinite().any()


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_nothing_is_read_by_the_host(relative, kl):
    """A meta tensor has no values: reading one, or a size that depends on one, raises."""
    for shape in ((4, 100), (3000, 40), (1, 1), (2, 3000)):
        x = torch.empty(shape, device="meta")
        strengths = torch.empty(shape[0], device="meta", dtype=torch.float64)
        for given in (None, strengths):
            rank, blocks, eps = torch_impl.rank_forward(x, given, 1.0, relative, kl, True, True)
            g = torch_impl.rank_backward(rank, x, rank, blocks, eps, kl, True)
            value, start, eps = torch_impl.sort_forward(x, given, 1.0, relative, kl)
            h = torch_impl.sort_backward(value, x, start, kl)
            assert {t.shape for t in (rank, blocks, g, value, start, h)} == {x.shape}
        torch_impl.rank_strength_gradient(g, g, x, strengths, rank, blocks, eps, kl, True)
        torch_impl.sort_strength_gradient(g, strengths, x, start, eps, kl, True)
        metrics.of_ranks(rank, rank, metrics.drop_pairs(x, x)[2], torch.float32)
        value, moments = metrics.pearson(x, x)
        metrics.pearson_gradient(value, x, x, moments, True, True)
        metrics.diagnose(x, blocks)


@pytest.mark.native
@pytest.mark.skipif(not native.has("cpu"), reason=native.status().cpu_reason or "loaded")
def test_a_compiled_library_has_every_operator_that_an_op_needs():
    """Else the tests of the backend cpp would be skipped without a word."""
    for op in OPS.values():
        assert native.lack("cpu", op.native) is None, op.name
