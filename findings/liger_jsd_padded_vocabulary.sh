#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# liger-kernel 0.8.5: where the teacher has more vocabulary entries than the student, LigerFusedLinearJSDLoss pads the
# student's logits with 0. A zero is a logit like another: the padding takes probability, and the same student with a
# constant added to its logits, so with the same probabilities, has another loss. Who distils between models of one
# tokenizer whose heads are padded to different sizes (32,000 and 32,064) is hurt: the loss pushes logits up or down as
# a whole, and its value depends on where they lie.
# Where: liger_kernel/chunked_loss/fused_linear_distillation.py, forward_output: zeros are joined to the smaller logits.
# Belief: entries that a model does not have are absent, with logit -inf and probability 0.
# Seen with liger-kernel 0.8.5, torch 2.13.0, Python 3.11 (forward KL of 50 entries to 60, and of 50 to 50 beside it):
#   teacher of 60: logits + 0 1.0745, logits + 5 1.8528, logits - 5 2.9380
#   teacher of 50: logits + 0 1.1087, logits + 5 1.1087, logits - 5 1.1087
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "triton==3.7.1" "liger-kernel==0.8.5"

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

torch.manual_seed(0)
student, teacher = torch.randn(8, 50), torch.randn(8, 60)
labels = torch.zeros(8, dtype=torch.long)
loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
for size in (60, 50):
    found = []
    for added in (0, 5, -5):
        value = loss(student + added, torch.eye(50), teacher[:, :size], torch.eye(size), labels)
        found.append(f"logits {'-' if added < 0 else '+'} {abs(added)} {value.item():.4f}")
    print(f"teacher of {size}: {', '.join(found)}")
PY
diff "$folder/seen" - <<'TXT'
teacher of 60: logits + 0 1.0745, logits + 5 1.8528, logits - 5 2.9380
teacher of 50: logits + 0 1.1087, logits + 5 1.1087, logits - 5 1.1087
TXT
