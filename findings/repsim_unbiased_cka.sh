#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# repsim 0.1.5: cka(..., estimator="song") divides the unbiased HSIC of a pair by the biased HSIC of each side, so it is
# no CKA: a representation and its rotated, scaled copy give 0.80 here, not 1. The diagonal of the matrix says 1 because
# it is not computed. repsim.hsic is right for either estimator. Who is hurt: whoever takes the estimator because the
# biased one grows with the width: all values are too low, and the more so the fewer samples there are.
# Where: repsim.cka, in the compiled repsim._repsim; its numbers are HSIC_song(K, L) over the square root of
# HSIC_gretton(K, K) HSIC_gretton(L, L) to the last digit.
# Belief: cka(x, y) is hsic(x, y) / sqrt(hsic(x, x) hsic(y, y)) of one estimator, 1 for a rotated copy.
# Seen with repsim 0.1.5, numpy 2.4.6 (20 samples, 6 features, x and twice its rotation):
#   gretton: x with itself 1.000, with its rotation 1.000; from repsim.hsic 1.000
#   song: x with itself 1.000, with its rotation 0.802; from repsim.hsic 1.000
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q "numpy==2.4.6" "repsim==0.1.5"

cat >"$folder/rotated.py" <<'PY'
import numpy as np
import repsim

random = np.random.default_rng(0)
x = random.standard_normal((20, 6))
rotation = np.linalg.qr(random.standard_normal((6, 6)))[0]
pair = [x, 2 * x @ rotation]
for estimator in ("gretton", "song"):
    same, rotated = repsim.cka(pair, kernel_type="linear", estimator=estimator)[0]
    hsic = repsim.hsic(pair, kernel_type="linear", estimator=estimator)
    ratio = hsic[0, 1] / np.sqrt(hsic[0, 0] * hsic[1, 1])
    print(f"{estimator}: x with itself {same:.3f}, with its rotation {rotated:.3f}; from repsim.hsic {ratio:.3f}")
PY

"$folder/venv/bin/python" "$folder/rotated.py" | tee "$folder/seen"
diff "$folder/seen" - <<'TXT'
gretton: x with itself 1.000, with its rotation 1.000; from repsim.hsic 1.000
song: x with itself 1.000, with its rotation 0.802; from repsim.hsic 1.000
TXT
