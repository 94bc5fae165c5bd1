#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# pytorch-cka 1.1.3: float32 features that are not centred give CKA values without one right digit, all within [0, 1].
# With 2,048 features and batches of 256, a mean of 3 standard deviations costs 0.1, one of 10 everything: a layer does
# not agree with itself, or fully with another that is independent of it. Who is hurt: whoever compares layers with a
# bias, residual streams, outputs before a normalisation; the matrix looks like a matrix.
# Where: cka/hsic.py takes the unbiased HSIC as three terms of uncentred Gram matrices, in the dtype of the features,
# and they cancel to what the mean leaves of 24 bits. cka/cka.py (compute_cka, cka_from_features) clamps the quotient.
# Belief: CKA centres, so a constant added to a layer changes nothing; and what is wrong would be NaN or out of range.
# Seen with pytorch-cka 1.1.3, torch 2.13.0 (x, y independent; worst entry of the 2 x 2 matrix of CKA, eight draws):
#   mean  0: right to 1e-3 in 8 of 8 draws
#   mean 30: off by more than 0.5 in most draws, never out of [0, 1]
#   mean 30, in float64: right to 1e-3 in 8 of 8 draws
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "numpy==2.4.6" "pytorch-cka==1.1.3"

cat >"$folder/offset.py" <<'PY'
import torch
from cka import cka_from_features

DRAWS = 8


def errors(mean, dtype):
    """Of each draw the worst entry against the same package on centred float64 features, which CKA cannot tell."""
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        layers = [torch.randn(256, 2048, generator=generator) + mean for _ in "xy"]
        centred = [x.double() - x.double().mean(0) for x in layers]
        found = cka_from_features(*[[x.to(dtype) for x in layers]] * 2)
        assert ((found >= 0) & (found <= 1)).all()
        yield (found - cka_from_features(centred, centred)).abs().max().item()


for mean, dtype, said in ((0, torch.float32, ""), (30, torch.float32, ""), (30, torch.float64, ", in float64")):
    found = list(errors(mean, dtype))
    right = sum(e < 1e-3 for e in found)
    if sum(e > 0.5 for e in found) > DRAWS / 2:
        print(f"mean {mean:2}{said}: off by more than 0.5 in most draws, never out of [0, 1]")
    else:
        print(f"mean {mean:2}{said}: right to 1e-3 in {right} of {DRAWS} draws")
PY

"$folder/venv/bin/python" "$folder/offset.py" | tee "$folder/seen"
diff "$folder/seen" - <<'TXT'
mean  0: right to 1e-3 in 8 of 8 draws
mean 30: off by more than 0.5 in most draws, never out of [0, 1]
mean 30, in float64: right to 1e-3 in 8 of 8 draws
TXT
