# SPDX-License-Identifier: Apache-2.0
"""The ranking kernels on a GPU: every schedule, their launches, the last digit, and rows beyond 32-bit offsets."""

import pytest
import torch

import kdkernels as kd
from bench import measure, rank_accuracy, rank_schedules

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("point", list(rank_schedules.points(rank_schedules.LONG[-1][1])), ids=str)
def test_every_schedule_gives_what_the_portable_backend_gives_in_float64(point):
    assert rank_schedules.check(point, "cuda") is None


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("op", ["soft_rank", "spearman"])
def test_a_small_step_takes_at_most_three_launches(op, n):
    x, y = torch.randn(256, n, device="cuda", requires_grad=True), torch.randn(256, n, device="cuda")
    function = {"soft_rank": lambda x, y: kd.soft_rank(x, "l2", 0.01), "spearman": kd.spearman}[op]
    assert measure.launches(function, x, y) <= 3


@pytest.mark.parametrize("point", rank_accuracy.points(quick=False), ids=str)
def test_float32_ranks_are_within_one_ulp_of_float64_at_every_strength(point):
    (row,) = [row for row in rank_accuracy.measure(point, ["cuda"], "cuda") if row["contender"] == "kdkernels"]
    assert row["holds"], row


@pytest.mark.parametrize("rows, n, dtype", [(2_200_000, 1000, torch.float32), (17_000, 128_256, torch.bfloat16)])
def test_rows_whose_offset_needs_more_than_32_bits_are_ranked_like_any_other(rows, n, dtype):
    x = torch.randn(rows, n, device="cuda", dtype=dtype)
    last = x[-3:].clone().requires_grad_()
    rank = kd.soft_rank(x, "l2", "auto", backend="cuda")
    alone = kd.soft_rank(last, "l2", "auto", backend="cuda")
    assert rank[-3:].equal(alone)
    del rank
    x.requires_grad_()
    value = kd.soft_rank(x, "l2", "auto", backend="cuda")
    value.backward(value.detach())
    alone.backward(alone.detach())
    assert x.grad[-3:].equal(last.grad)
