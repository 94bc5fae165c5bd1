# SPDX-License-Identifier: Apache-2.0
"""Starts a script of tests/ on several ranks and reads what each found: what the tests over ranks share."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


def launch(ranks, path, *checks, script="over_ranks.py", on="cpu", timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KDK_RANKS": on}
    command += [str(ROOT / "tests" / script), str(path), *checks]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def found(ranks, folder, *checks, **how):
    """What each rank found, one dict a rank."""
    path = folder / "facts.json"
    done = launch(ranks, path, *checks, **how)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def facts_of(script):
    """A fixture: what each rank found, the script run once for each number of ranks, whatever the workers of xdist."""

    @pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} ranks".format)
    def facts(request, tmp_path_factory):
        base = tmp_path_factory.getbasetemp()
        # the folders of xdist's workers lie side by side: what one of them found serves the others
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{script}-{request.param}"
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / "facts.json"
            return json.loads(done.read_text()) if done.exists() else found(request.param, folder, script=script)

    return facts
