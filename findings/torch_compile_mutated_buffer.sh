#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torch 2.13.0: under torch.compile a gradient uses a buffer as it is after the step, not as it was in the forward pass,
# where forward multiplies by a copy of the buffer and then updates it (a warm-up weight, a running scale, a counter).
# Values agree with eager, so no test of values sees it; without the copy eager refuses ("modified by an inplace
# operation"), which is why the copy is there. Who schedules a loss by a buffer trains with the next step's weight, and
# at step 0 of a warm-up from 0 with a weight that should be 0.
# Where: torch/_functorch/partitioners.py, min_cut_rematerialization_partition (default_partition is right): backward
# makes the cheap copy anew, from a buffer that the forward graph has updated in place by then. A copy made by an
# operator that the partitioner does not know is saved.
# Belief: clone() is a snapshot, compiled or not.
# Seen with torch 2.13.0, Python 3.11 (d sum(x w) / dx at steps 0, 1, 2; w counts the steps):
#   eager [0.0, 1.0, 2.0]
#   aot_eager [1.0, 2.0, 3.0]
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q "torch==2.13.0" "numpy==2.3.5"

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import torch


class Warm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.zeros(()))

    def forward(self, x):
        y = (x * self.w.clone()).sum()
        self.w.add_(1)
        return y


for backend in ("eager", "aot_eager"):
    module, gradients = torch.compile(Warm(), backend=backend), []
    for _ in range(3):
        x = torch.ones(2, requires_grad=True)
        module(x).backward()
        gradients.append(x.grad[0].item())
    print(backend, gradients)
PY
diff "$folder/seen" - <<'TXT'
eager [0.0, 1.0, 2.0]
aot_eager [1.0, 2.0, 3.0]
TXT
