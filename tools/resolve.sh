#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Whether all that tools/env.sh installs has a solution on each machine that [tool.uv] of pyproject.toml lists, with
# wheels from the public index alone: sh tools/resolve.sh PYTHON, which has uv. Reads metadata, installs nothing; half
# a minute. pip on one machine cannot tell: it takes what lies on that disk too, and markers of its own Python only.
set -eu
cd "$(dirname "$0")/.."
report=$(mktemp)
trap 'rm -f "$report"' EXIT

# what else the machine would offer is left out; a mirror named by UV_DEFAULT_INDEX is the public index
for setting in UV_CONFIG_FILE UV_INDEX UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER \
  UV_PRERELEASE UV_RESOLUTION UV_OFFLINE; do
  unset "$setting"
done
export XDG_CONFIG_HOME=/dev/null XDG_CONFIG_DIRS=/dev/null UV_PYTHON_DOWNLOADS=never UV_HTTP_RETRIES=5

python=$1
resolve() { # requirements on the standard input, more of them and constraints as arguments
  "$python" -m uv --quiet pip compile --universal --python-version 3.10 --only-binary :all: --no-header --no-annotate \
    "$@" - >>"$report" 2>&1
}

# the oldest Triton lies beside the pinned one
if ! sh tools/env.sh build-tools | resolve --constraint constraints.txt --all-extras pyproject.toml ||
  ! sh tools/env.sh oldest-triton | resolve; then
  cat "$report" >&2
  echo "kdkernels: what make installs does not resolve from the public index, or that cannot be reached: see above" >&2
  exit 1
fi
echo "what make installs resolves on every machine that pyproject.toml lists: $(grep -c '==' "$report") packages"
