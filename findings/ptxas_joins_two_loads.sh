#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ptxas 13.5.37 (12.0.76, 12.4.131, 12.6.85, 13.0.88, 13.2.86 too; -O3 and -O2): a load at p + 4 and one at either p or
# p + 8, whichever a comparison with the first picks, become one load of the 8 bytes at p: the comparison is gone and p
# + 8 is never read. That is the end of every unrolled branchless binary search in shared memory (`if (q[1] < w) q +=
# 2; if (q[0] < w) ++q`), which then answers one too much wherever q moved by 2 and should have stayed there. The PTX
# is right, so is -O1, and so is the search by an index, whose addresses are computed anew. No sanitizer sees it: every
# address is in the array.
# Seen in a kernel that looked up ranks of 32 keys, where a float64 reference disagreed.
# Where: ptxas, between PTX and machine code, where two loads off one base are made one vector load; sm_80 to sm_120.
# Belief: optimisation levels change the speed of a program without undefined behaviour, not its result.
# Seen with nvidia-cuda-nvcc 13.5.37, nvidia-cuda-nvdisasm 13.5.37 (loads of shared memory, comparisons):
#   sm_80 -O3, tried at 4: 1 0
#   sm_90 -O3, tried at 4: 1 0
#   sm_100 -O3, tried at 4: 1 0
#   sm_120 -O3, tried at 4: 1 0
#   sm_90 -O2, tried at 4: 1 0
#   sm_90 -O1, tried at 4: 2 1
#   sm_90 -O3, tried at 64: 2 1
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q --no-deps \
  "nvidia-cuda-nvcc==13.5.37" "nvidia-cuda-nvdisasm==13.5.37"
tool() { find "$folder/venv" -type f -name "$1" -path "*bin*" | head -1; }
ptxas=$(tool ptxas)
nvdisasm=$(tool nvdisasm)
chmod +x "$ptxas" "$nvdisasm"

# key[0..63] = source[0..63]; q = 2 start; target = key[q + 1] < wanted ? key[q + 2] : key[q]
cat >"$folder/step.ptx" <<'PTX'
.version 8.8
.target ARCHITECTURE
.address_size 64
.visible .entry step(.param .u64 source, .param .u32 start, .param .u32 wanted, .param .u64 target)
{
  .reg .pred %less;
  .reg .b32 %thread, %word, %base, %own, %q, %next, %moved, %first, %second, %w;
  .reg .b64 %from, %to, %offset;
  .shared .align 8 .b8 key[256];
  ld.param.u64 %from, [source];
  ld.param.u64 %to, [target];
  ld.param.u32 %q, [start];
  ld.param.u32 %w, [wanted];
  cvta.to.global.u64 %from, %from;
  cvta.to.global.u64 %to, %to;
  mov.u32 %thread, %tid.x;
  mul.wide.u32 %offset, %thread, 4;
  add.s64 %from, %from, %offset;
  ld.global.u32 %word, [%from];
  mov.u32 %base, key;
  shl.b32 %own, %thread, 2;
  add.s32 %own, %base, %own;
  st.shared.u32 [%own], %word;
  bar.sync 0;
  shl.b32 %q, %q, 3;
  add.s32 %q, %base, %q;
  ld.shared.u32 %first, [%q+TRIED];
  setp.lt.u32 %less, %first, %w;
  add.s32 %next, %q, 8;
  selp.b32 %moved, %next, %q, %less;
  ld.shared.u32 %second, [%moved];
  st.global.u32 [%to], %second;
  ret;
}
PTX

counted() { # architecture, optimisation, byte that is tried
  sed "s/ARCHITECTURE/$1/; s/TRIED/$3/" "$folder/step.ptx" >"$folder/one.ptx"
  "$ptxas" -arch="$1" "-O$2" "$folder/one.ptx" -o "$folder/one.cubin"
  "$nvdisasm" "$folder/one.cubin" >"$folder/one.sass"
  echo "$1 -O$2, tried at $3: $(grep -c "LDS" "$folder/one.sass") $(grep -c "ISETP" "$folder/one.sass" || true)"
}
for architecture in sm_80 sm_90 sm_100 sm_120; do
  counted "$architecture" 3 4
done | tee "$folder/seen"
{
  counted sm_90 2 4
  counted sm_90 1 4
  counted sm_90 3 64 # not in the same 8 bytes
} | tee -a "$folder/seen"
diff "$folder/seen" - <<'TXT'
sm_80 -O3, tried at 4: 1 0
sm_90 -O3, tried at 4: 1 0
sm_100 -O3, tried at 4: 1 0
sm_120 -O3, tried at 4: 1 0
sm_90 -O2, tried at 4: 1 0
sm_90 -O1, tried at 4: 2 1
sm_90 -O3, tried at 64: 2 1
TXT
