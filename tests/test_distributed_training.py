# SPDX-License-Identifier: Apache-2.0
"""A loss over the ranks inside DDP, FSDP2 and a compiled step trains as one process does; gloo, and NCCL on GPUs."""

import pytest
import torch
from ranked import found, needs_distributed

pytestmark = needs_distributed
SCRIPT = "over_ranks_training.py"

NCCL = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks"),
    ],
)


@pytest.mark.parametrize("on", ["cpu", NCCL])
def test_parameters_get_the_gradient_of_one_process_inside_ddp_and_fsdp2(tmp_path, on):
    facts = found(2, tmp_path, "wrapped", script=SCRIPT, on=on)
    assert len(facts[0]) == 2 * 3 * 2  # wrappers, losses, splits
    for rank in facts:
        for name, errors in rank.items():
            assert len(errors) == 4 and max(errors) < 1e-10, (name, errors)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["cpu", NCCL])
def test_a_compiled_step_gives_the_same_numbers_and_settles_whatever_the_ranks_hold(tmp_path, on):
    for rank in found(2, tmp_path, "compiled", script=SCRIPT, on=on):
        steps = {name: errors for name, errors in rank.items() if name.startswith("compiled")}
        assert len(steps) == 4
        for name, errors in steps.items():
            assert max(errors) < 1e-10, (name, errors)
        # what the ranks hold is compared on the host: it does break the graph, and other sizes compile once more
        assert rank["breaks"] > 0 and rank["graphs"][0] > 0 and len(set(rank["graphs"][1:])) == 1


# what test_distributed*.py and test_ring.py judge over gloo
@pytest.mark.parametrize("on", [NCCL])
@pytest.mark.parametrize(
    ("script", "check", "least"),
    [
        ("over_ranks.py", "equal_to_one_process", 81),
        ("over_ranks.py", "losses_equal_to_one_process", 150),
        ("over_ranks_nystrom.py", "ops_equal_to_one_process", 100),
        ("over_ranks_ring.py", "equal_to_one_process", 45),
    ],
)
def test_over_nccl_every_family_gives_what_one_process_gives(tmp_path, script, check, least, on):
    facts = found(2, tmp_path, check, script=script, on=on)
    assert len(facts[0]) >= least
    for name, errors in facts[0].items():
        assert max(errors) < (1e-5 if "float32" in name else 1e-10), (name, errors)
