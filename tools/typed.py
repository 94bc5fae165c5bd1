# SPDX-License-Identifier: Apache-2.0
"""Whether what is public has types: `python tools/typed.py [--list]`, a part of `make lint`; needs no network.

basedpyright, which brings its own node, verifies the types of all symbols. Those of the public modules, by their
`__all__`, with all members and bases, must be known: 100 %. Of the modules inside, the share that is known is held.
And what the documentation shows, in pages and docstrings, must pass as a user's code does: basic mode, no error.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
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


BEFORE = "import torch\nimport kdkernels as kd\n"  # as tests/test_examples_in_docs.py gives them
OF_OTHERS = ("reportPrivateImportUsage",)  # torch.distributed has no __all__


def report(*arguments: str) -> dict:
    # it takes the first python on the PATH for the one that has torch
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", *arguments, "--outputjson"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    try:
        return json.loads(run.stdout)
    except ValueError:
        sys.exit(f"basedpyright gave no report: {run.stderr or run.stdout}")


def verified() -> tuple[list[dict], float]:
    """What basedpyright says of each symbol, and the share of known ones."""
    said = report("--verifytypes", "kdkernels", "--ignoreexternal")["typeCompleteness"]
    if Path(said["packageRootDirectory"]) != ROOT / "kdkernels":
        sys.exit(f"basedpyright looked at {said['packageRootDirectory'] or 'no package'}, not at {ROOT / 'kdkernels'}")
    return said["symbols"], said["completenessScore"]


def snippets() -> dict[str, str]:
    """The Python blocks of each page, and the examples of each public name."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "kdkernels").rglob("*.md")]
    blocks = {
        str(page.relative_to(ROOT)): re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
        for page in pages
    }
    for name in public_names():
        module, _, attribute = name.rpartition(".")
        found = doctest.DocTestFinder(exclude_empty=True).find(getattr(sys.modules[module], attribute), name)
        blocks[name] = [example.source for test in found for example in test.examples]
    return {name: "".join(found) for name, found in blocks.items() if found}


def misused() -> tuple[int, list[str]]:
    """How many snippets there are, and what basedpyright finds wrong in them."""
    with tempfile.TemporaryDirectory() as folder:
        every = snippets()
        for name, text in every.items():
            (Path(folder) / (re.sub(r"\W", "_", name) + ".py")).write_text(BEFORE + text)
        # missing imports: what a page shows beside an optional package
        settings = {
            "include": [folder],
            "typeCheckingMode": "basic",
            "extraPaths": [str(ROOT)],
            "reportMissingImports": False,
        }
        (Path(folder) / "pyrightconfig.json").write_text(json.dumps(settings))
        said = report("-p", folder)["generalDiagnostics"]
    wrong = [found for found in said if found["severity"] == "error" and found.get("rule") not in OF_OTHERS]
    return len(every), [f"{Path(found['file']).stem}: {found['message']} ({found['rule']})" for found in wrong]


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
    count, wrong = misused()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"snippets of the documentation: {count}, errors: {len(wrong)}")
    print(f"types: {len(seen) - len(untyped)} of {len(seen)} public names, {100 * score:.1f} % of all symbols")
    if wrong or not count:
        sys.exit("asked: no error in what the documentation shows")
    if not seen or untyped or score < HELD:
        sys.exit(f"asked: all public names, {100 * HELD:g} % of all symbols (--list shows them)")


if __name__ == "__main__":
    main()
