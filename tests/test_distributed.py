# SPDX-License-Identifier: Apache-2.0
"""Statistics over the batch of all ranks are those of one process: gloo, 2 and 4 ranks, uneven batches, an empty rank.

over_ranks.py runs on the ranks, once for each number of them; here its facts are judged.
"""

import time

import over_ranks
import over_ranks_losses
import pytest
import torch
from ranked import facts_of, launch, needs_distributed

import kdkernels as kd
from kdkernels import distributed

pytestmark = needs_distributed
facts = facts_of("over_ranks.py")


@pytest.mark.parametrize("split", over_ranks.SPLITS)
@pytest.mark.parametrize("op", over_ranks.OPS)
def test_value_and_averaged_gradient_are_those_of_one_process(facts, op, split):
    for kind, most in (("float64", 1e-10), ("float32", 1e-5), ("masked", 1e-10)):
        name = f"{op}, {split}, {kind}"
        if kind == "masked" and name not in facts[0]:
            continue
        assert max(facts[0][name]) < most, (name, facts[0][name])


@pytest.mark.parametrize("loss", over_ranks_losses.LOSSES)
def test_a_loss_of_all_ranks_is_that_of_one_process(facts, loss):
    for split in over_ranks.SPLITS:
        for kind, most in (("float64", 1e-10), ("float32", 1e-5)):
            errors = facts[0][f"{loss}, {split}, {kind}"]
            assert max(errors) < most, (split, kind, errors)  # total, parts, gradients


def test_gathered_rows_come_in_the_order_of_the_ranks_and_gradients_add_up(facts):
    for rank, own in enumerate(fact["gather"] for fact in facts):
        assert own["rows"] == own["expected"]
        assert own["gradient"] == own["expected gradient"] and len(own["gradient"]) == 2 * (
            rank + 1 if rank != 1 else 0
        )
        assert own["bools"] == [value > 0.5 for value in own["expected"]]


def test_linear_kernels_send_as_much_for_any_batch_and_others_their_rows(facts):
    for fact in facts:
        assert fact["bytes, linear, 64"] == fact["bytes, linear, 512"] < 2000
        # x and y forward, x's rows of all ranks backward
        assert fact["bytes, rbf, 512"] == pytest.approx(512 * 4 * (8 + 6 + 8 * len(facts)), rel=0.01)


@pytest.mark.parametrize(
    "what, message, own",
    [
        ("widths", "x differs between the ranks of the group: rank 0 has float32 [8, 4]; rank 1 has float32 [8, 5]", 0),
        ("dtypes", "x differs between the ranks of the group: rank 0 has float32 [8, 4]; rank 1 has float64", 0),
        ("rows of one rank", "rank 1 of the group refused its arguments", "y has 7 rows, x has 8"),
        ("integers on one rank", "rank 1 of the group refused its arguments", "TypeError: x is torch.int64"),
        ("a mask on one rank", "mask differs between the ranks of the group: rank 0 has None; rank 1 has bool", 0),
        ("too few", "x and y have 2 rows on all ranks: cka needs at least 4", 0),
        ("kernel", "rank 1 of the group has other options, this rank has cka: kernel='linear'", "kernel='rbf'"),
        ("bandwidth", "this rank has mmd: kernel=RBF(sigma=[1.0])", "this rank has mmd: kernel=RBF(sigma=[2.0])"),
        ("bandwidth with a gradient", "RBF(sigma=torch.float32 [] 1.0)", "sigma=torch.float32 [] with a gradient 1.0)"),
        ("unbiased", "rank 1 of the group has other options, this rank has hsic", "unbiased=False"),
        ("option that does not exist", "this rank has gram_mse: normalize=None", "normalize='rows'"),
        ("backend", "backend='torch'; every rank makes the same call", "backend='reference'"),
        ("unknown backend", "backend is 'gpu'", 0),
        ("another op", "rank 1 of the group has another call, this rank has rkd_distance", "this rank has pkt"),
        ("one mask for two samples", "rank 1 of the group refused its arguments", "mask: mmd takes a pair"),
        ("group", "group is 'all': give None, 'world' or a torch.distributed.ProcessGroup", 0),
    ],
)  # fmt: skip
def test_every_rank_is_told_what_is_wrong(facts, what, message, own):
    said = facts[0][f"refused, {what}"]
    assert len(said) == len(facts)
    for rank, words in enumerate(said[: 2 if own else None]):  # of more ranks, rank 0 names the first that is unlike it
        assert (own if own and rank == 1 else message) in words
    assert "nothing" not in said


def test_float32_moments_keep_their_digits_far_from_zero_and_between_sides_of_other_sizes(facts):
    found = {name: max(errors) for name, errors in facts[0].items() if name.startswith("out of scale")}
    assert len(found) == 12 and max(found.values()) < 2e-6, found


def test_the_textbook_backend_has_second_derivatives_over_the_ranks(facts):
    assert all(fact["penalty"] < 1e-10 for fact in facts)


def test_two_samples_may_have_other_numbers_of_rows_on_each_rank(facts):
    assert all(fact["samples of other numbers"] < 1e-10 for fact in facts)


def test_ranks_may_have_other_numbers_of_tokens_and_groups_smaller_than_the_world(facts):
    for rank, fact in enumerate(facts):
        for how, (found, expected) in fact["other tokens"].items():
            assert found == pytest.approx(expected, rel=1e-5), how
        found, expected = fact["pairs of ranks"]
        assert found == pytest.approx(expected, rel=1e-5)
        # of rank 1 alone: its samples have two tokens
        assert ["2 rows a sample and needs 4" in said for said in fact["warned of tokens"]] == [True] * (rank == 1)
    assert len({tuple(fact["pairs of ranks"]) for fact in facts}) == len(facts) // 2
    refused = facts[0]["refused, not a member"]
    assert refused[:2] == ["nothing"] * 2 and all("ProcessGroup this rank is in" in said for said in refused[2:])


def test_a_batch_too_small_on_all_ranks_together_is_zero_and_each_rank_says_so_once(facts):
    for fact in facts:
        *zeros, said = fact["too small"]
        assert zeros == [0, 0, 0] and len(said) == 1 and "a batch of 2 rows on all ranks and needs 4" in said[0]


def test_a_class_that_is_constant_on_one_rank_alone_keeps_its_gradient(facts):
    for fact in facts:
        found, expected = map(torch.tensor, fact["rows at the mean"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert (expected != 0).all()


def test_what_ddp_and_fsdp_average_is_the_gradient_of_one_process(facts):
    for fact in facts:
        assert max(fact["ddp"]) < 1e-10 and max(fact["fsdp"]) < 1e-10


def test_a_compiled_loss_leaves_the_graph_for_its_collectives(facts):
    for fact in facts:
        assert max(fact["compiled"]) < 1e-12
        assert all("ranks compare shapes on the host" in said for said in fact["refused, one graph"])


def test_a_loss_sends_what_its_op_sends_and_losses_within_samples_no_feature(facts):
    for fact in facts:
        for n in (64, 512):
            assert fact[f"bytes, loss, {n}"] == fact[f"bytes, op, {n}"] == fact["bytes, loss, 64"]
        assert fact["bytes, groups"] < 300


@pytest.mark.parametrize(
    "what, message, own",
    [
        ("a width", "student_features differs between the ranks of the group: rank 0 has float32 [8, 4]", 0),
        ("a width of level 1", "student_features[1] differs between the ranks of the group: rank 0 has float32", 0),
        ("a dtype", "teacher_features differs between the ranks of the group: rank 0 has float32 [8, 4]; rank 1", 0),
        ("levels", "rank 1 of the group has 9 tensors, this rank has CKALoss with rows=None of 6", "has 6 tensors"),
        ("classes", "student_logits differs between the ranks of the group", 0),
        ("stages", "rank 1 of the group has 6 tensors, this rank has RCKALoss", "rank 0 of the group has 3 tensors"),
        ("rows=", "rank 1 of the group has another call, this rank has CKALoss with rows='mean'", "rows='tokens'"),
        ("no rows=", "rows is not given", "rank 0 of the group refused its arguments"),
        ("losses", "rank 1 of the group has another call, this rank has CKALoss", "this rank has SPLoss"),
        ("a mask", "mask of student_features differs between the ranks of the group: rank 0 has None; rank 1 has", 0),
        ("a gradient", "rank 0 has float32 [8, 4]; rank 1 has float32 [8, 4] with a gradient", 0),
        ("a kernel", "other options, this rank has CKALoss with rows=None: rows=None, kernel='linear'", "kernel='rbf'"),
        ("a bandwidth", "kernel=RBF(sigma=[1.0])", "kernel=RBF(sigma=[2.0])"),
        ("a tensor as bandwidth", "sigma=torch.float32 [] 1.0)", "sigma=torch.float32 [] 2.0)"),
        ("one of mmd", "=torch.float32 [1] with a gradient [1.0])", "=torch.float32 [1] with a gradient [2.0])"),
        ("one of a transfer", "sigma=torch.float32 [] 1.0)", "sigma=torch.float32 [] 2.0)"),
        ("a weight", "rank 1 of the group has other options, this rank has SPLoss", "weight=2.0"),
        ("weights", "weights=None; every rank makes the same call", "weights=[1.0]"),
        ("a preset", "factors=None", "factors=[0.25, 0.5"),
        ("a term", "this rank has DISTLoss: beta=1.0", "this rank has DISTLoss: beta=0.0"),
        ("a normalizer", "has another call, this rank has DISTLoss of", "DISTLoss with normalizer"),
        ("landmarks", "NystromTransferLoss with rows=None: num_landmarks=3", "num_landmarks=4"),
        ("a part", "centers.count_rule='first'", "centers.count_rule='epoch'"),
        ("a fit", "k=2, variant='P'", "k=3, variant='P'"),
        ("a metric", "this rank has CKAMetric: kernel='linear', unbiased=True", "CKAMetric: kernel='rbf'"),
        ("no tensor", "rank 1 of the group refused its arguments", "student_features is a ndarray"),
    ],
)  # fmt: skip
def test_every_rank_is_told_what_is_wrong_with_the_arguments_of_a_loss(facts, what, message, own):
    said = facts[0][f"loss refused, {what}"]
    assert len(said) == len(facts)
    for rank, words in enumerate(said[:2]):
        assert (own if own and rank == 1 else message) in words
    assert "nothing" not in said


def test_when_a_rank_dies_the_others_end_within_the_timeout(tmp_path):
    start = time.monotonic()
    done = launch(2, tmp_path / "facts.json", "dies", timeout=120)
    assert done.returncode != 0 and not (tmp_path / "facts.json").exists()
    assert time.monotonic() - start < 90


def test_without_a_process_group_the_error_says_what_to_call():
    x = torch.randn(8, 4)
    for call in (
        lambda: kd.cka(x, x, group="world"),
        lambda: distributed.gather(x),
        lambda: kd.mmd(x, x, group="world"),
        lambda: kd.losses.CKALoss(group="world")(x, x),
        lambda: kd.losses.RCKALoss(group="world")(x, x),
    ):
        with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised.*init_process_group.*group=None"):
            call()


def test_a_group_that_is_none_is_refused_when_the_loss_is_made():
    with pytest.raises(ValueError, match="group is 'all': give None, 'world' or a torch.distributed.ProcessGroup"):
        kd.losses.CKALoss(group="all")
    with pytest.raises(TypeError, match="group is 3: give None"):
        kd.losses.RCKALoss(group=3)
