#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torchdistill 1.1.5, KDLoss: with alpha = 0, or without targets, it returns the divergence alone, not times beta nor
# temperature^2, which every alpha above 0 is given. At temperature 4 the loss of a student that learns from its teacher
# alone is a 16th of that of one whose alpha is 1e-6. Who turns the labels off, or distils unlabelled data, trains with
# a learning rate that is 16 times lower than meant, and beta does nothing.
# Where: torchdistill/losses/mid_level.py, KDLoss.forward returns before the weights.
# Belief: loss = alpha CE + (1 - alpha) temperature^2 KL, also at alpha = 0.
# Seen with torchdistill 1.1.5, torch 2.13.0, Python 3.11 (temperature 4):
#   alpha 1e-06 with labels 0.7985
#   alpha 0 with labels 0.0499
#   alpha 0.5 without labels 0.0499
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "torchvision==0.28.0" "torchdistill==1.1.5"

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
student, teacher = ({"head": {"output": torch.randn(16, 10)}} for _ in range(2))
labels = torch.arange(16) % 10
for alpha, given in ((1e-6, labels), (0.0, labels), (0.5, None)):
    loss = KDLoss("head", "output", "head", "output", temperature=4.0, alpha=alpha)
    with_labels = "without" if given is None else "with"
    print(f"alpha {alpha:g} {with_labels} labels {loss(student, teacher, given).item():.4f}")
PY
diff "$folder/seen" - <<'TXT'
alpha 1e-06 with labels 0.7985
alpha 0 with labels 0.0499
alpha 0.5 without labels 0.0499
TXT
