#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# trl 1.16.0 (GKD) and liger-kernel 0.8.5: the generalised Jensen-Shannon divergence takes beta in 0 to 1, and at 0 and
# 1 gives the forward and the reverse KL divergence. The formula between tends to 0 at both ends, as beta KL and
# (1 - beta) KL do: the value jumps by three orders of magnitude from beta = 0.001 to 0, and with it the gradient. Who
# moves beta by a schedule, or searches it on a grid with its ends, is hurt: the learning rate, or the weight beside
# another loss, that fits one beta fits no other.
# Where: trl/experimental/gkd/gkd_trainer.py, generalized_jsd_loss; liger_kernel/chunked_loss/jsd_loss.py,
# LigerFusedLinearJSDFunction.distillation_loss_fn: the ends are branches of their own.
# Belief: a loss with a parameter in [0, 1] is continuous there, so that a small beta is nearly the forward divergence.
# Seen with trl 1.16.0, liger-kernel 0.8.5, torch 2.13.0, Python 3.11 (mean over 8 rows of 50 entries):
#   trl: beta 0 1.1376, 0.001 0.0011, 0.5 0.2230, 0.999 0.0011, 1 1.1359
#   liger-kernel: beta 0 1.1376, 0.001 0.0011, 0.5 0.2230, 0.999 0.0011, 1 1.1359
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "triton==3.7.1" "liger-kernel==0.8.5" "trl==1.16.0"

"$folder/venv/bin/python" - <<'PY' 2> "$folder/errors" | tee "$folder/seen" || { cat "$folder/errors"; exit 1; }
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from trl.experimental.gkd import GKDTrainer

torch.manual_seed(0)
student, teacher = torch.randn(8, 50), torch.randn(8, 50)
labels = torch.zeros(8, dtype=torch.long)


def of_trl(beta):
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=beta)


def of_liger(beta):
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    return loss(student, torch.eye(50), teacher, torch.eye(50), labels)


for name, loss in (("trl", of_trl), ("liger-kernel", of_liger)):
    print(f"{name}: beta " + ", ".join(f"{beta:g} {loss(beta).item():.4f}" for beta in (0.0, 0.001, 0.5, 0.999, 1.0)))
PY
diff "$folder/seen" - <<'TXT'
trl: beta 0 1.1376, 0.001 0.0011, 0.5 0.2230, 0.999 0.0011, 1 1.1359
liger-kernel: beta 0 1.1376, 0.001 0.0011, 0.5 0.2230, 0.999 0.0011, 1 1.1359
TXT
