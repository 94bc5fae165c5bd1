#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# liger-kernel 0.8.5, LigerFusedLinearJSDLoss(return_soft_hard_loss=True), as all on its base class: the soft and the
# hard part that come back beside the total say requires_grad, and their backward pass runs, but every gradient is
# exactly 0. Who weighs the parts anew in the training loop (a schedule, uncertainty weights, one of them alone) trains
# nothing, without an error; who adds one of them to the total gets the total's gradient alone. Weights belong in the
# constructor.
# Where: liger_kernel/chunked_loss/fused_linear_distillation.py, backward: of the upstream gradients the first alone is
# read; the others are taken in and dropped, and the parts are not marked as not differentiable.
# Belief: a tensor that requires grad has the gradient of its value.
# Seen with liger-kernel 0.8.5, torch 2.13.0, Python 3.11 on a CPU:
#   total: requires grad True, largest gradient above 0.1 True
#   soft: requires grad True, gradient all 0 True
#   hard: requires grad True, gradient all 0 True
#   half of soft and half of hard: the total's value True, gradient all 0 True
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "triton==3.7.1" "liger-kernel==0.8.5" "numpy==2.4.0"

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

torch.manual_seed(0)
hidden, head = torch.randn(8, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
teacher, teacher_head, labels = torch.randn(8, 5), torch.randn(11, 5), torch.randint(0, 11, (8,))
half = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5}
loss = LigerFusedLinearJSDLoss(**half, compiled=False, return_soft_hard_loss=True)


def parts():
    return loss(hidden, head, teacher, teacher_head, labels)


def most(value):
    return max(g.abs().max().item() for g in torch.autograd.grad(value, (hidden, head)))


total = parts()[0]
print(f"total: requires grad {total.requires_grad}, largest gradient above 0.1 {most(total) > 0.1}")
for name, k in (("soft", 1), ("hard", 2)):
    part = parts()[k]
    print(f"{name}: requires grad {part.requires_grad}, gradient all 0 {most(part) == 0}")
_, soft, hard = parts()
mixed = (soft + hard) / 2
same = torch.allclose(mixed, total)
print(f"half of soft and half of hard: the total's value {same}, gradient all 0 {most(mixed) == 0}")
PY
diff "$folder/seen" - <<'TXT'
total: requires grad True, largest gradient above 0.1 True
soft: requires grad True, gradient all 0 True
hard: requires grad True, gradient all 0 True
half of soft and half of hard: the total's value True, gradient all 0 True
TXT
