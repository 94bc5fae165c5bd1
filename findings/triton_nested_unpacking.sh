#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Triton 3.7.1 (3.6.0 too; right in 3.8.0): a @triton.jit function that takes a nested tuple apart fails at its first
# compilation, TypeError: unhashable type: 'list'; tried again in the same process it compiles, now under a cache key
# that says nothing of its source. Who retries, falls back or catches is hurt: after an edit of the kernel the cache on
# disk hands out the binary of the old source, without a word. torch 2.13.0 for CUDA requires exactly this Triton.
# Where: triton/runtime/jit.py. DependenciesFinder.visitAssnTarget makes a set of the names of a target, but those of a
# nested target are a list of lists; JITFunction.cache_key has stored "recursion:MODULE.NAME" by then and keeps it.
# Belief: a kernel compiles or does not, whichever attempt it is; and an edited kernel is compiled anew.
# Seen with triton 3.7.1, Python 3.11:
#   adds 1: first TypeError: unhashable type: 'list'; then compiles, cache key recursion:__main__.total, adds 1
#   adds 2: first TypeError: unhashable type: 'list'; then compiles, cache key recursion:__main__.total, adds 1
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q "triton==3.7.1"

cat >"$folder/kernel.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def pairs(x_ptr):
    return (tl.load(x_ptr), tl.load(x_ptr + 1)), (tl.load(x_ptr + 2), tl.load(x_ptr + 3))


@triton.jit
def total(x_ptr, out_ptr):
    (a, b), (c, d) = pairs(x_ptr)
    tl.store(out_ptr, a * b + c * d + ADDED)


def compiled():
    source = ASTSource(fn=total, signature={"x_ptr": "*fp32", "out_ptr": "*fp32"})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]


try:
    compiled()
    first = "compiles"
except TypeError as error:
    first = f"TypeError: {error}"
added = re.search(r"constant (\d)\.0+e\+00 : f32", compiled())[1]
key = total.cache_key
key = key if key.startswith("recursion") else "of its source"
print(f"adds ADDED: first {first}; then compiles, cache key {key}, adds {added}")
PY

export TRITON_CACHE_DIR="$folder/cache"
for added in 1 2; do # one file, edited between two processes
  sed "s/ADDED/$added/" "$folder/kernel.py" >"$folder/edited.py"
  "$folder/venv/bin/python" "$folder/edited.py"
done | tee "$folder/seen"
diff "$folder/seen" - <<'TXT'
adds 1: first TypeError: unhashable type: 'list'; then compiles, cache key recursion:__main__.total, adds 1
adds 2: first TypeError: unhashable type: 'list'; then compiles, cache key recursion:__main__.total, adds 1
TXT
