# SPDX-License-Identifier: Apache-2.0
"""Whether what is public has types: `python tools/typed.py [--list]`, a part of `make lint`; needs no network.

basedpyright, which brings its own node, verifies the types of all symbols. Those of the public modules, by their
`__all__`, with all members and bases, must be known: 100 %. Of the modules inside, the share that is known is held.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = (
    "kdkernels",
    "kdkernels.analysis",
    "kdkernels.distributed",
    "kdkernels.gram",
    "kdkernels.logits",
    "kdkernels.losses",
    "kdkernels.nystrom",
    "kdkernels.projection",
    "kdkernels.rank",
    "kdkernels.relation",
    "kdkernels.teachers",
    "kdkernels.types",
)
HELD = 0.69  # of all symbols, the modules inside included


def verified() -> tuple[list[dict], float]:
    """What basedpyright says of each symbol, and the share of known ones."""
    # it takes the first python on the PATH for the one that has torch
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--verifytypes", "kdkernels", "--ignoreexternal", "--outputjson"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    try:
        report = json.loads(run.stdout)["typeCompleteness"]
    except (ValueError, KeyError):
        sys.exit(f"basedpyright gave no report: {run.stderr or run.stdout}")
    if Path(report["packageRootDirectory"]) != ROOT / "kdkernels":
        sys.exit(
            f"basedpyright looked at {report['packageRootDirectory'] or 'no package'}, not at {ROOT / 'kdkernels'}"
        )
    return report["symbols"], report["completenessScore"]


def public_names() -> set[str]:
    sys.path.insert(0, str(ROOT))
    return {f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the symbols inside without a known type too")
    listed, (symbols, score) = parser.parse_args().list, verified()
    names = public_names()
    # a name that stands for a module has no type of its own
    seen = [symbol for symbol in symbols if symbol["name"] in names]
    unknown = [symbol for symbol in symbols if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    untyped = [symbol for symbol in unknown if symbol["name"] in names]
    for symbol in unknown if listed else untyped:
        print(symbol["name"], *(found["message"].replace("\n", " ") for found in symbol["diagnostics"]), sep="\n  ")
    print(f"types: {len(seen) - len(untyped)} of {len(seen)} public names, {100 * score:.1f} % of all symbols")
    if not seen or untyped or score < HELD:
        sys.exit(f"asked: all public names, {100 * HELD:g} % of all symbols (--list shows them)")


if __name__ == "__main__":
    main()
