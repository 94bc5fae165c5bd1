# SPDX-License-Identifier: Apache-2.0
"""The example that distils on several ranks trains the student of one process: same answers, same weights."""

import re
import sys

import pytest
from conftest import ROOT
from ranked import needs_distributed

pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "examples"))

import ddp_distill

pytestmark = pytest.mark.demo


@needs_distributed
def test_two_ranks_train_what_one_process_trains(python):
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/ddp_distill.py")
    done = python(*run, "--check", "--epochs", "2", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = (
        float(re.search(rf"student, {what} +test +(\S+) %", done.stdout)[1]) for what in ("2 proc.*", "1 proc.*")
    )
    assert two == one > 15
    assert "test images with another answer: 0" in done.stdout
    after = re.search(r"difference of a weight: (\S+) after the first epoch, (\S+) after the last", done.stdout)
    assert float(after[1]) < 1e-12 and float(after[2]) < 1e-9


@pytest.mark.usefixtures("threads")  # the example sets its own
def test_it_also_runs_as_one_process(capsys):
    assert ddp_distill.main(["--epochs", "1"]) == 0
    assert re.search(r"student, 1 process +test", capsys.readouterr().out)


def test_a_check_of_one_process_is_refused(capsys):
    with pytest.raises(SystemExit):
        ddp_distill.main(["--check", "--epochs", "1"])
    assert "start it with torchrun" in capsys.readouterr().err
