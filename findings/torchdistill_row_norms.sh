#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# torchdistill 1.1.5: SPKDLoss divides the rows of the Gram matrices by their L1 norms. The paper (Tung and Mori 2019)
# and the code that its author checked (RepDistiller's Similarity) have L2 norms. After a ReLU the entries of a row are
# alike, its L1 norm is nearly sqrt(B) times the L2 norm, and the loss nearly B times too small. Who is hurt: whoever
# takes a weight from the paper or another library: at a batch of 128 the term is all but off, and it changes with B.
# Where: torchdistill/losses/mid_level.py, SPKDLoss.matmul_and_normalize: normalize(gram, 1). The second positional
# argument of torch.nn.functional.normalize is p, the order of the norm; dim is the third, and 1 by default.
# Belief: SPKDLoss is the paper's loss.
# Seen with torchdistill 1.1.5, torch 2.13.0 (torchdistill's value, then the formula with either norm):
#   B =   8: 0.000483, L1 norms 0.000483, L2 norms 0.00266: 6 times as large
#   B = 128: 2.42e-06, L1 norms 2.42e-06, L2 norms 0.000293: 121 times as large
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "torchvision==0.28.0" "torchdistill==1.1.5"

cat >"$folder/rows.py" <<'PY'
import torch
from torchdistill.losses.mid_level import SPKDLoss


def by_formula(student, teacher, p):
    """|G_s - G_t|_F^2 / B^2, rows of G over their Lp norms."""
    grams = [f @ f.T for f in (student, teacher)]
    a, b = (g / g.abs().pow(p).sum(1, keepdim=True).pow(1 / p) for g in grams)
    return (a - b).square().sum().item() / len(student) ** 2


for batch in (8, 128):
    torch.manual_seed(0)
    student, teacher = torch.randn(batch, 256).relu().double(), torch.randn(batch, 512).relu().double()
    loss = SPKDLoss(student_output_path="layer", teacher_output_path="layer", reduction="batchmean")
    found = loss({"layer": {"output": student}}, {"layer": {"output": teacher}}).item()
    one, two = (by_formula(student, teacher, p) for p in (1, 2))
    print(f"B = {batch:3}: {found:.3g}, L1 norms {one:.3g}, L2 norms {two:.3g}: {two / found:.0f} times as large")
PY

"$folder/venv/bin/python" "$folder/rows.py" | tee "$folder/seen"
diff "$folder/seen" - <<'TXT'
B =   8: 0.000483, L1 norms 0.000483, L2 norms 0.00266: 6 times as large
B = 128: 2.42e-06, L1 norms 2.42e-06, L2 norms 0.000293: 121 times as large
TXT
