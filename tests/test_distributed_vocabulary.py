# SPDX-License-Identifier: Apache-2.0
"""Losses on logits whose vocabulary, or rows, lie on the ranks of a group are those of one process: gloo, 2 and 4.

over_ranks_vocabulary.py runs on the ranks, once for each number of them; here its facts are judged.
"""

import over_ranks_vocabulary
import pytest
import torch
from ranked import facts_of, needs_distributed

import kdkernels as kd

pytestmark = needs_distributed
facts = facts_of("over_ranks_vocabulary.py")


@pytest.mark.parametrize("name", [*over_ranks_vocabulary.CASES, *over_ranks_vocabulary.TOPK])
def test_slices_of_a_vocabulary_give_the_value_and_the_gradients_of_one_process(facts, name):
    """Stored slices, heads, and either beside a side that is whole; weighed rows, a padded vocabulary, two passes."""
    kinds = ("stored", "heads", *(() if name in over_ranks_vocabulary.TOPK else ("whole teacher", "whole student")))
    for how in kinds:
        for dtype, most in (("float64", 1e-10), ("float32", 1e-5)):
            errors = facts[0][f"{name}, {how}, {dtype}"]
            assert len(errors) == 4 and max(errors) < most, (how, dtype, errors)


def test_dtensors_give_it_however_their_classes_and_rows_lie(facts):
    """Every pair of placements, tensors beside them, and meshes of two dimensions."""
    found = {name: max(errors) for name, errors in facts[0].items() if "Shard" in name or "Replicate" in name}
    assert len(found) >= 240 and max(found.values()) < 1e-10, max(found.items(), key=lambda item: item[1])


def test_a_head_inside_ddp_and_fsdp2_trains_as_in_one_process_and_outside_of_it_says_what_to_give(facts):
    for name in ("inside ddp", "inside fsdp2", "outside fsdp2"):
        assert max(facts[0][name]) < 1e-10, name
    assert all("full_tensor(grad_placements=[Partial()])" in said for said in facts[0]["a sharded weight"])


def test_what_is_sent_does_not_depend_on_the_vocabulary(facts):
    for fact in facts:
        # to agree on shapes; a maximum, a sum of each side and three sums of each of 32 rows; the hidden gradient
        most = 4 * 7 * 8 * 2 + 32 * 4 * (2 + 2 + 3) + 32 * over_ranks_vocabulary.H * 4
        assert fact["bytes, 64"] == fact["bytes, 512"] <= most


@pytest.mark.parametrize(
    "what, words",
    [
        ("rows", "Only the rows may differ"),
        ("slices of other classes", "vocab=n takes the first n of both"),
        ("a padded teacher", "vocab=n takes the first n of both"),
        ("a vocabulary that is too large", "vocab is 42, student_logits has 41 classes"),
        ("a rank without classes", "give slices of which each has some"),
        ("a mask on one rank", "every rank makes the same call"),
        ("a mask of another length", "student_logits: rank 1 of the group refused its arguments"),
        ("another divergence", "has other options"),
        ("the textbook", "leave it out, or group="),
        ("vocab of a slice", "give the loss vocab=, of all"),
        ("a loss of whole rows", "DISTLoss takes no slices of a vocabulary"),
        ("a loss of whole rows, mesh", "CMKDLoss takes tensors"),
        ("stkd, cut", "STKDLoss takes the vocabulary whole"),
        ("sums to be made", "redistribute it to Replicate() or Shard(dim)"),
        ("a head beside a mesh", "give what this rank holds"),
    ],
)
def test_every_rank_is_told_what_is_wrong(facts, what, words):
    said = facts[0][f"refused, {what}"]
    assert words in said[0] and "nothing" not in said, said


def test_a_group_is_checked_when_a_head_is_made_and_without_ranks():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="group is 'all'"):
        kd.LinearLogits(hidden, weight, group="all")
    with pytest.raises(RuntimeError, match="init_process_group"):
        kd.losses.KDLoss()(kd.LinearLogits(hidden, weight, group="world"), torch.randn(3, 5))
    assert kd.LinearLogits(hidden, weight, group="world").detach().group == "world"
