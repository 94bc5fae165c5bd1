# SPDX-License-Identifier: Apache-2.0
"""Statistics over the batch of all ranks are those of one process: gloo, 2 and 4 ranks, uneven batches, an empty rank.

over_ranks.py runs on the ranks, once for each number of them; here its facts are judged.
"""

import json
import os
import subprocess
import sys
import time

import over_ranks
import pytest
import torch
from conftest import ROOT

import kdkernels as kd
from kdkernels import distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


def launch(ranks, path, *checks, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "tests" / "over_ranks.py"), str(path), *checks]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} ranks".format)
def facts(request, tmp_path_factory):
    """What each rank found."""
    path = tmp_path_factory.mktemp("ranks") / "facts.json"
    done = launch(request.param, path)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("split", over_ranks.SPLITS)
@pytest.mark.parametrize("op", over_ranks.OPS)
def test_value_and_averaged_gradient_are_those_of_one_process(facts, op, split):
    for kind, most in (("float64", 1e-10), ("float32", 1e-5), ("masked", 1e-10)):
        name = f"{op}, {split}, {kind}"
        if kind == "masked" and name not in facts[0]:
            continue
        assert max(facts[0][name]) < most, (name, facts[0][name])


@pytest.mark.parametrize("loss", over_ranks.LOSSES)
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
        ("group", "group is 'all': give None, 'world' or a torch.distributed.ProcessGroup", 0),
    ],
)  # fmt: skip
def test_every_rank_is_told_what_is_wrong(facts, what, message, own):
    said = facts[0][f"refused, {what}"]
    assert len(said) == len(facts)
    for rank, words in enumerate(said):
        assert (own if own and rank == 1 else message) in words


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
    ):
        with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised.*init_process_group.*group=None"):
            call()
