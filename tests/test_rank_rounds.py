# SPDX-License-Identifier: Apache-2.0
"""Pooling by rounds, the torch backend's way on the CPU, finds the blocks of pooling one after the other."""

import pytest
import torch
from ranking import adversarial

import kdkernels as kd
from kdkernels.rank import counted, rounds, torch_impl

both = pytest.mark.parametrize("regularization", ["l2", "kl"])


def deep(n: int) -> dict[str, torch.Tensor]:
    """Rows [n], float64, whose blocks meet late: one site swallows single neighbours, many sites meet, gaps explode."""
    i = torch.arange(n, dtype=torch.float64)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    middle = (i - n // 2).abs()
    outliers = noise.clone()
    outliers[:: max(n // 3, 1)] = 1e9
    outliers[1 :: max(n // 3, 1)] = -1e9
    absent = noise.clone()
    absent[::3] = -torch.inf
    return {
        "geometric": 2.0 ** (i % 40),
        "geometric from the middle": 1.1 ** middle.clamp(max=300) * (i - n // 2).sign(),
        "dense in the middle": (i - n // 2).sign() * middle**1.5,
        "a pair now and then": i * 1.05 - (i % 7 == 0).double(),
        "every other gap": i.div(2, rounding_mode="floor") * 2.1,
        "waves": i + 5 * (i / 11).sin(),
        "sums": noise.cumsum(0),
        "outliers": outliers,
        "absent": absent,
        "all absent": torch.full_like(i, -torch.inf),
        "all equal": torch.zeros_like(i),
        "one apart": torch.cat([torch.zeros(n - 1, dtype=torch.float64), i[-1:] + 1]),
    }


def same_gradients(got, want, x, u):
    (g,), (h,) = (torch.autograd.grad(value, x, u.to(value.dtype)) for value in (got, want))
    torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-9 * float(h.abs().max()))


@both
@pytest.mark.parametrize("sites", [False, True], ids=["as it is", "sites alone"])
@pytest.mark.parametrize("n", [2, 3, 8, 33, 150, 601])
def test_deep_rows_are_ranked_and_sorted_as_by_pooling_one_after_the_other(n, sites, regularization, monkeypatch):
    if sites:  # no round over all, small windows, and a new list as soon as a site settles
        for name, value in {"SHRINKS": 2.0, "FEW": 0, "SMALL": 0, "FEWER": 1.1, "WINDOW": (1, 3)}.items():
            monkeypatch.setattr(rounds, name, value)
    x = torch.stack([*deep(n).values(), *adversarial(n).values()]).requires_grad_()
    u = torch.linspace(-1, 1, n, dtype=torch.float64).expand_as(x)
    for strength in (1e-9, 0.07, 0.93, 30.3, ("auto", 1.7)):
        got, want = (kd.soft_rank(x, regularization, strength, backend=b) for b in ("torch", "reference"))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)
        same_gradients(got, want, x, u)
        got, want = (kd.soft_sort(x, regularization, strength, backend=b) for b in ("torch", "reference"))
        scale = x.detach().masked_fill(x == -torch.inf, 0.0).abs().amax(-1, keepdim=True).clamp(min=1.0)
        torch.testing.assert_close(got / scale, want / scale, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("n", [3, 17, 100, 1000, 5000])
def test_rounds_and_merges_find_the_same_blocks(n, regularization, monkeypatch):
    """CPU tensors are pooled by rounds and hardly ever come to the merges, which CUDA tensors always do."""
    kinds = {**adversarial(n), **deep(n)}
    x = torch.stack([*kinds.values()])
    scale = x.masked_fill(x == -torch.inf, 0.0).abs().amax(-1, keepdim=True).clamp(min=1.0)
    marginal = [name in ("wider and wider gaps", "waves") for name in kinds]  # gaps that equal the strength
    for strength in (1e-3, 0.1, 1.0, 100.0):
        outcomes = []
        for by_rounds in (True, False):
            monkeypatch.setattr(torch_impl, "may_wait", lambda t, by_rounds=by_rounds: by_rounds)
            outcomes.append([kd.soft_rank(x, regularization, strength, backend="torch")])
            found = kd.rank_diagnostics(x, strength, regularization=regularization, backend="torch")
            outcomes[-1].append(found.blocks[~torch.tensor(marginal)])
            value = kd.soft_sort(x, regularization, strength, backend="torch")
            outcomes[-1].append(value / scale)
        torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-9)


@both
def test_rows_that_take_too_many_rounds_are_merged(regularization, monkeypatch):
    x = torch.stack([*deep(300).values()])[[2, 6, 8]].requires_grad_()
    u = torch.linspace(-1, 1, 300, dtype=torch.float64).expand_as(x)
    pooled, turns = rounds.pooled, []

    def hurried(*a):
        monkeypatch.setattr(rounds, "ROUNDS", 1)
        monkeypatch.setattr(rounds, "FEW", 0)
        turns.append(pooled(*a) is None)
        return pooled(*a)

    for function in (kd.soft_rank, kd.soft_sort):
        for strength in (0.02, 0.9, 5.0):
            want = function(x, regularization, strength, backend="torch")
            monkeypatch.setattr(rounds, "pooled", hurried)
            got = function(x, regularization, strength, backend="torch")
            monkeypatch.undo()
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
            same_gradients(got, want, x, u)
        assert any(turns)
        turns.clear()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counted_half_rows_have_the_ranks_and_gradients_of_sorted_ones(dtype, regularization, monkeypatch):
    """Rows of 16,384 and more are counted on the CPU; here short ones are, with all that a row can hold."""
    n = 400
    x = torch.stack([*adversarial(n).values(), *deep(n).values(), *adversarial(n).values()]).to(dtype)
    x[:4, ::5], x[4, 7], x[9, 3], x[2, ::2] = -torch.inf, torch.nan, torch.inf, -0.0
    x.requires_grad_()
    u = torch.linspace(-1e-3, 1e-3, n).expand_as(x)
    for strength in (0.0, 1e-9, 0.07, 5.0, "auto", torch.linspace(0.1, 9, len(x)).double()):
        for descending in (False, True):
            outcomes = []
            for length in (1, 16384):
                monkeypatch.setattr(counted, "LENGTH", length)
                r = kd.soft_rank(x, regularization, strength, descending=descending, backend="torch")
                outcomes.append([r, *torch.autograd.grad(r, x, u)])
            torch.testing.assert_close(*outcomes, rtol=1.3e-7, atol=0, equal_nan=True)


def test_counted_rows_correlate_as_sorted_ones_where_all_ranks_are_close(monkeypatch):
    x, y = (torch.randn(3, 200, generator=torch.Generator().manual_seed(k)).half() for k in (0, 1))
    want = kd.spearman(x.double(), y.double(), regularization_strength=1e4, backend="torch")
    monkeypatch.setattr(counted, "LENGTH", 1)
    got = kd.spearman(x, y, regularization_strength=1e4, backend="torch")
    torch.testing.assert_close(got, want.float(), rtol=0, atol=5e-7)
