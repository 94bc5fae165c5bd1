# SPDX-License-Identifier: Apache-2.0
"""Nystrom statistics, KDA and its centres, StreamingPCA and RdimKD over the ranks of a group are those of one process.

over_ranks_nystrom.py runs on the ranks (gloo), once for each number of them; here its facts are judged.
"""

import over_ranks
import over_ranks_nystrom
import pytest
import torch
from ranked import facts_of, needs_distributed

import kdkernels as kd

pytestmark = needs_distributed
facts = facts_of("over_ranks_nystrom.py")


@pytest.mark.parametrize("op", over_ranks_nystrom.OPS)
def test_value_and_averaged_gradient_are_those_of_one_process(facts, op):
    """Uneven ranks, an empty one, masked rows that hold NaN; gradients of rows and of landmarks."""
    for split in over_ranks.SPLITS:
        for kind, most in (("float64", 1e-10), ("float32", 1e-5), ("masked", 1e-10)):
            if kind == "masked" and op.startswith("similarity"):
                continue  # it takes no mask: rows of zeros count nothing
            errors = facts[0][f"{op}, {split}, {kind}"]
            assert max(errors) < most, (split, kind, errors)


def test_a_bandwidth_rule_reads_the_rows_of_all_ranks_and_sigma_gets_their_gradient(facts):
    for rule in ("median", "mean"):
        assert facts[0][f"rule {rule}"] < 1e-10
    assert facts[0]["sigma"] < 1e-10


def test_landmarks_gathered_from_the_ranks_pass_their_gradient_on(facts):
    assert all(fact["gathered landmarks"] < 1e-10 for fact in facts)


def test_a_mask_is_judged_by_the_rows_that_it_keeps_on_all_ranks(facts):
    for fact in facts:
        assert fact["few rows on each rank"] < 1e-10
        assert fact["too few rows on all ranks"] == [0, 0]


def test_the_gradient_is_that_of_the_sum_of_what_the_ranks_make_of_the_value(facts):
    for fact in facts:
        assert fact["unlike, nystrom_hsic"] < 1e-10 and fact["unlike, landmark_similarity_loss"] < 1e-10


@pytest.mark.parametrize("loss", over_ranks_nystrom.MODULES)
def test_a_loss_of_all_ranks_is_that_of_one_process_over_two_epochs(facts, loss):
    """Values, gradients of student and adapter, and every buffer, which has the same bits on all ranks."""
    # L-BFGS ends where it ends: a last digit of the covariance becomes one of a float32 of the encoder
    most = 1e-6 if loss == "RdimKDLoss A" else 1e-10
    for split in over_ranks.SPLITS:
        for rows in ("all", "masked"):
            errors = facts[0][f"{loss}, {split}, {rows}"]
            assert max(errors) < most, (split, rows, errors)


def test_principal_directions_of_all_ranks_are_those_of_one_process_far_from_zero_too(facts):
    assert max(facts[0]["pca"]) < 1e-10


def test_what_a_rank_sends_depends_on_no_number_of_rows_or_batches(facts):
    agree, fingerprints, back = 224, 16, 4
    expected = {
        "cka": 8 * (3 * 10 * 10 + 4 * 20 + 9) + agree + 2 * 56 + fingerprints + back,
        "transfer": 8 * 4 * 10 * 10 + agree + 2 * 56 + fingerprints + back,
        "mean": 8 * (3 * 10 * 10 + 4 * 20 + 9) + 4 * (8 + 1 + 6 + 1) + agree + 2 * 56 + fingerprints,
        "similarity": 16 + agree + 56 + fingerprints + back,
        "KDALoss": 16 + agree + back,
        "NystromTransferLoss centers": 8 * 4 * 10 * 10 + 8 + agree + back,  # 8: how many rows the mask keeps
    }
    for fact in facts:
        for what, most in expected.items():
            assert fact[f"bytes, {what}, 64"] == fact[f"bytes, {what}, 512"] == most
        for batches in (1, 5):
            assert fact[f"bytes, centers, {batches}"] == 8 * 10 * (8 + 6 + 1) + agree
            assert fact[f"bytes, pca, {batches}"] == 8 * (8 + 1) + 8 * 8 * 8 + agree
        # the teacher's rows, ten of the student's forward and backward, and their numbers
        landmarks = 4 * 512 * 6 + 4 * 10 * 8 * 2 + 8 * 10
        assert fact["bytes, NystromTransferLoss, 512"] == 8 * 4 * 10 * 10 + agree + back + landmarks


@pytest.mark.parametrize(
    "what, message, own",
    [
        ("landmarks", "s_landmarks holds other numbers on rank 1 of the group than on rank 0", 0),
        ("number of landmarks", "y_landmarks differs between the ranks of the group: rank 0 has float32 [1, 3, 5]", 0),
        ("widths", "x differs between the ranks of the group: rank 0 has float32 [8, 5]; rank 1 has float32 [8, 4]", 0),
        ("dtypes", "s differs between the ranks of the group: rank 0 has float32 [8, 5]; rank 1 has float64", 0),
        ("rows of one rank", "rank 1 of the group refused its arguments", "y has 7 rows, x has 8"),
        ("a mask on one rank", "mask differs between the ranks of the group: rank 0 has None; rank 1 has bool", 0),
        ("too few", "x and y have 2 rows on all ranks: nystrom_cka with unbiased=True needs at least 4", 0),
        ("another statistic", "this rank has nystrom_hsic", "this rank has nystrom_cka"),
        ("centres of the op", "t_centers holds other numbers on rank 1 of the group than on rank 0", 0),
        ("labels", "rank 1 of the group refused its arguments", "labels holds 93"),
        ("classes", "this rank has KDALoss of 4 classes", "this rank has KDALoss of 5 classes"),
        ("widths of the loss", "student_features differs between the ranks of the group: rank 0 has float32 [8, 5]", 0),
        ("rows of the loss", "student_features has shape (8, 1, 5) and rows is not given", 0),
        ("classes at the end", "student_sums differs between the ranks of the group: rank 0 has float64 [1, 4, 5]", 0),
        ("momentum at the end", "ClassCenters of momentum=None, counts='epoch'", "ClassCenters of momentum=0.5"),
        ("channels", "mean differs between the ranks of the group: rank 0 has float64 [1, 4]", 0),
        ("nothing seen", "0 rows were seen: a covariance needs two", 0),
        ("no fit", "variant 'R' with normalizer='mean' has nothing fitted yet", 0),
        ("channels of the loss", "rank 1 of the group refused its arguments", "student_features has 4 channels"),
    ],
)  # fmt: skip
def test_every_rank_is_told_what_is_wrong(facts, what, message, own):
    said = facts[0][f"refused, {what}"]
    assert len(said) == len(facts)
    for rank, words in enumerate(said):
        if what in ("another statistic", "classes", "momentum at the end") and rank > 1:
            continue  # they agree with rank 0
        assert (own if own and rank == 1 else message) in words


def test_a_random_basis_without_a_seed_is_that_of_the_first_rank_once_fitted(facts):
    assert all(fact["R without a seed"] == 0 for fact in facts)


def test_a_batch_that_is_empty_on_all_ranks_is_zero(facts):
    assert all(fact["empty everywhere"] == 0 for fact in facts)


def test_without_a_process_group_the_error_says_what_to_call():
    x, z = torch.randn(8, 4), torch.randn(3, 4)
    for call in (
        lambda: kd.nystrom_cka(x, x, z, z, group="world"),
        lambda: kd.landmark_similarity_loss(x, x, z, z, group="world"),
        lambda: kd.ClassCenters(2, 3, 4).swap("world"),
        lambda: kd.StreamingPCA(4).components(2, group="world"),
        lambda: kd.losses.NystromTransferLoss(group="world")(x, x),
    ):
        with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised.*init_process_group.*group=None"):
            call()
