# SPDX-License-Identifier: Apache-2.0
"""Float32 rows on the CPU are pooled by running sums, in parts that threads share: no rank and no bit shows it."""

import pytest
import torch
from ranking import adversarial
from test_rank_rounds import deep

import kdkernels as kd
from kdkernels.rank import prefix
from kdkernels.rank import threads as threads_of_rows


def rows(n):
    return torch.stack([*deep(n).values(), *adversarial(n).values()]).float()


def ulps(got, want):
    """In units of the last place of float32, of float64 ranks `want`."""
    place = torch.nextafter(want.float(), torch.tensor(torch.inf)) - want.float()
    return float(((got.double() - want).abs() / place.double()).max())


@pytest.mark.parametrize("n", [2, 3, 33, 601, 4097])
def test_ranks_by_running_sums_are_within_one_ulp_alone_and_among_other_rows(n):
    x = rows(n)
    for strength in (1e-9, 1e-6, 1e-3, 0.07, 1.0, 30.3, 1e3, ("auto", 1.7)):
        want = kd.soft_rank(x.double(), "l2", strength, backend="torch")  # without such sums
        assert ulps(kd.soft_rank(x, "l2", strength, backend="torch"), want) <= 1, strength
        for k in range(0, len(x), 1 if n == 601 else 5):
            assert ulps(kd.soft_rank(x[k : k + 1], "l2", strength, backend="torch"), want[k : k + 1]) <= 1, (
                strength,
                k,
            )


def test_positions_stay_out_of_sums_that_would_round_them():
    x = torch.cat([torch.ones(2048), -2e-7 * torch.arange(2049)])[None]  # sums of 2048 where ranks are low
    want = kd.soft_rank(x.double(), "l2", 1e-7, backend="torch")
    assert ulps(kd.soft_rank(x, "l2", 1e-7, backend="torch"), want) <= 1


@pytest.mark.parametrize("n", [9, 6000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_have_the_ranks_of_their_values(n, dtype):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, ::3], x[2, ::2], x[3, 4:] = 0.0, -0.0, -torch.inf
    x[4] = torch.finfo(dtype).max * torch.linspace(-1, 1, n)
    for strength in (0.0, 1e-3, "auto", 30.0):
        want = kd.soft_rank(x.double(), "l2", strength, backend="torch")
        assert ulps(kd.soft_rank(x, "l2", strength, backend="torch"), want) <= 1, strength


def seen(monkeypatch):
    """Whether each batch of rows was fit for sums, as it comes."""
    found, centred = [], prefix.centred

    def seen_by(*arguments):
        found.append(centred(*arguments))
        return found[-1]

    monkeypatch.setattr(prefix, "centred", seen_by)
    return found


def test_rows_too_wide_for_their_strength_are_pooled_without_sums_beside_others(monkeypatch, threads):
    fit = seen(monkeypatch)
    x = rows(300)[:11]
    x = torch.cat([x.clamp(-100, 100), x])  # the second half has outliers, and powers
    want = kd.soft_rank(x.double(), "l2", 1e-2, backend="torch")
    assert ulps(kd.soft_rank(x[:11], "l2", 1e-2, backend="torch"), want[:11]) <= 1 and len(fit) == 1 and fit[0] > 0
    monkeypatch.setattr(threads_of_rows, "LEAST", 300 * 11)
    threads(2)  # one part has sums, the other has not
    assert ulps(kd.soft_rank(x, "l2", 1e-2, backend="torch"), want) <= 1 and [fit.count(None), len(fit)] == [1, 3]


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, threads, dtype, regularization):
    for name in ("LEAST", "LIGHT"):
        monkeypatch.setattr(threads_of_rows, name, 2**14)
    x = torch.cat([rows(2000)] * 4).to(dtype)
    x[5, 3], x[40, 7], x[61] = torch.nan, torch.inf, -torch.inf
    x.requires_grad_()
    u = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    for strength in (0.0, 0.5, "auto", torch.linspace(0.1, 9, len(x)).double()):
        outcomes = []
        for number in (1, 2, 3):
            threads(number)
            r = kd.soft_rank(x, regularization, strength, backend="torch")
            outcomes.append((r, *torch.autograd.grad(r, x, u.to(r.dtype))))
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(outcomes[2], outcomes[0], rtol=0, atol=0, equal_nan=True)


def test_a_kl_row_alone_has_the_bits_it_has_among_others():
    x = rows(65).double()
    u = torch.linspace(-1, 1, x.shape[-1], dtype=torch.float64)
    for strength in (0.0, 0.07, 3.0, ("auto", 1.7)):

        def ranked(part, strength=strength):
            part = part.clone().requires_grad_()
            r = kd.soft_rank(part, "kl", strength, backend="torch")
            return r.detach(), torch.autograd.grad(r, part, u.expand_as(r))[0]

        together = ranked(x)
        for k in range(len(x)):
            torch.testing.assert_close(ranked(x[k : k + 1]), tuple(t[k : k + 1] for t in together), rtol=0, atol=0)


@pytest.mark.parametrize("hard_target", [False, True])
def test_spearman_of_full_rows_is_that_of_rows_with_pairs_to_drop(hard_target):
    x, y = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[2], x[4] = 1.0, torch.arange(40.0)  # a constant side
    sides = [t.requires_grad_() for t in (x, y)]
    found = []
    for absent in (0, 3):
        padded = [torch.cat([t, t.new_full((6, absent), -torch.inf)], -1) for t in sides]
        for need in (sides, sides[:1], sides[1:]):
            rho = kd.spearman(*padded, regularization_strength=2.0, hard_target=hard_target, backend="torch")
            found.append((rho, *torch.autograd.grad(rho, need, torch.arange(1.0, 7.0, dtype=torch.float64))))
    for full, masked in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(full, masked, rtol=1e-12, atol=1e-12)
