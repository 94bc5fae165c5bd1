# SPDX-License-Identifier: Apache-2.0
"""Rows that go round the ring give value and averaged gradient of one process, in memory linear in a rank's own rows.

over_ranks_ring.py runs on the ranks, gloo, 2 and 4 of them; here its facts are judged.
"""

import time

import over_ranks_ring
import pytest
import torch
from ranked import facts_of, launch, needs_distributed

from kdkernels.distributed import Agreed
from kdkernels.gram.distributed import ring

pytestmark = needs_distributed
facts = facts_of("over_ranks_ring.py")


@pytest.mark.parametrize("op", over_ranks_ring.OPS)
def test_value_and_averaged_gradient_are_those_of_one_process(facts, op):
    for kind, most in (("float64", 1e-10), ("masked", 1e-10), ("float32", 1e-5)):
        assert max(facts[0][f"{op}, {kind}"]) < most, kind


@pytest.mark.parametrize("op", over_ranks_ring.OF_GROUPS)
def test_groups_have_masks_and_bandwidths_of_their_own(facts, op):
    assert max(facts[0][f"groups, {op}"]) < 1e-10
    assert max(facts[0][f"groups, {op}, masked"]) < 1e-10


def test_a_bandwidth_that_learns_gets_the_gradient_of_one_process_on_every_rank(facts):
    assert max(facts[0]["bandwidth"]) < 1e-10


def test_row_means_are_taken_out_of_the_kernel_before_it_is_rounded(facts):
    assert max(facts[0]["wide bandwidth"]) < 3e-6


def test_half_rows_travel_as_they_are_and_autocast_rounds_nothing(facts):
    assert max(facts[0]["bfloat16"]) < 1e-5
    assert max(facts[0]["autocast"]) < 1e-10


def test_a_second_derivative_is_refused(facts):
    assert "the second derivative of this op is not written out" in facts[0]["second derivative"]


def test_features_travel_once_forward_and_once_backward_and_no_gradient_does(facts):
    ranks = len(facts)
    for fact in facts:
        for n in (128, 256):
            found = fact[f"bytes, ring, {n}"]
            # forward two row means beside the features, backward three pair weights of x as well
            assert found["ring"] == (ranks - 1) * n * (2 * (40 + 24) + 2 + 5) * 4
            assert found["all_reduce"] < 2000 and "reduce_scatter" not in found
            assert found["all_gather"] < 128 * (40 + 24) * 4 + 1000  # landmarks, at most 127 rows
            gathered = fact[f"bytes, gather, {n}"]
            assert gathered["all_gather"] + gathered["reduce_scatter"] == pytest.approx(
                (ranks - 1) * n * (2 * 40 + 24) * 4, rel=0.01
            )
        assert fact["bytes, ring, 128"]["all_reduce"] == fact["bytes, ring, 256"]["all_reduce"]


def test_no_tensor_is_larger_than_two_messages_whatever_the_number_of_ranks(facts):
    for fact in facts:
        for n in (128, 256):
            assert 0 < fact[f"largest, ring, {n}"] == n * (40 + 24 + 5) * 4
            assert fact[f"largest, gather, {n}"] >= (len(facts) * n) ** 2 * 4


def test_when_a_rank_dies_on_the_way_the_others_end_within_the_timeout(tmp_path):
    start = time.monotonic()
    done = launch(2, tmp_path / "facts.json", "dies", script="over_ranks_ring.py", timeout=120)
    assert done.returncode != 0 and "rank 0 was told: " in done.stderr, done.stderr[-2000:]
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("rows, groups, taken", [(1024, 0, False), (8192, 0, True), (512, 16, True)])
def test_rows_are_gathered_while_they_are_few(rows, groups, taken):
    shape = (groups, 1, 2048) if groups else (1, 2048)
    x, y = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    assert (max(groups, 1) * rows * 2048 * (4 + 2) >= ring.RING_FROM) == taken
    assert ring.chosen(x, y, Agreed(None, [rows // 2, rows // 2])) == taken
    assert not ring.chosen(x, y, Agreed(None, [rows]))
