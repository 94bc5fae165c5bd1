# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs: Python blocks of the Markdown files, and the examples in docstrings."""

import doctest
import importlib
import importlib.util
import pkgutil
import re

import pytest
import torch
from conftest import ROOT, load_by_path

import kdkernels as kd
from kdkernels.registry import OPS

readme = load_by_path(ROOT / "tools" / "readme.py")

MARKDOWN = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "generated"),
    *(ROOT / "kdkernels").rglob("*.md"),
]
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in MARKDOWN
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_documentation_runs(block):
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation", "torch": torch, "kd": kd})


def test_the_first_block_of_the_readme_runs_as_it_stands():
    exec(compile(BLOCKS[0].values[0], "documentation", "exec"), {"__name__": "documentation"})


PAGES = [path for path in MARKDOWN if ROOT / "kdkernels" not in path.parents]


def test_a_file_that_a_page_names_exists():
    named = {page: re.findall(r"[` ]((?:[\w.]+/)+\w+\.(?:md|py|cpp|json))[` ]", page.read_text()) for page in PAGES}
    linked = {page: re.findall(r"\]\(([^)#:]+)\)", page.read_text()) for page in PAGES}
    assert len(named[ROOT / "CONTRIBUTING.md"]) > 4 and len(linked[ROOT / "README.md"]) > 4
    for page in PAGES:
        for name in named[page]:
            assert (ROOT / name).is_file() or (ROOT / "kdkernels" / name).is_file(), f"{page} names {name}"
        for name in linked[page]:
            assert (page.parent / name).is_file(), f"{page} links to {name}"


def test_the_readme_is_short_and_its_tables_are_what_the_package_and_the_rows_give():
    text = (ROOT / "README.md").read_text()
    assert readme.written(text) == text, "python tools/readme.py writes them"
    assert all(f"| `{name}` |" in text for name in kd.losses.__all__)
    assert len(text.splitlines()) <= 150
    picture = (ROOT / "docs" / "speed.svg").read_text()
    assert all(readme.label(ours) in picture for ours, _, _ in readme.measured())


def test_a_loss_says_first_what_it_is():
    for name in kd.losses.__all__:
        first, empty, *_ = getattr(kd.losses, name).__doc__.split("\n")
        assert first.endswith(".") and not set(first) & set("=|^_") and not empty, name


def test_the_reference_has_every_public_name_and_no_other():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^\.\. auto(?:function|class):: (kdkernels[\w.]+)$", text, re.MULTILINE)
    modules = {"": kd, "losses.": kd.losses, "distributed.": kd.distributed, "teachers.": kd.teachers}
    public = [f"kdkernels.{at}{name}" for at, module in modules.items() for name in module.__all__]
    assert sorted(shown) == sorted(set(public) - {f"kdkernels.{at[:-1]}" for at in modules})


def test_the_reference_lists_every_op_with_its_backends():
    section = (ROOT / "docs" / "reference" / "ops.md").read_text().split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    shown = {op: backends for ops, _, _, backends in rows for op in re.findall(r"`(\w+)`", ops)}
    assert set(shown) == set(OPS)
    for name, op in OPS.items():
        assert set(shown[name].split(", ")) == set(op.backends), f"{name} runs on {op.backends}"


EXTRAS = {"kdkernels.teachers": ("safetensors",)}  # an environment that was given by PYTHON= may lack them


def documented():
    names = [m.name for m in pkgutil.walk_packages(kd.__path__, "kdkernels.")]
    # the triton files need triton, and __main__ would run
    names = [n for n in names if not any(p.startswith(("triton_", "signatures", "__main__")) for p in n.split("."))]
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("kdkernels", *names):
        if any(importlib.util.find_spec(package) is None for package in EXTRAS.get(name, ())):
            continue
        module = importlib.import_module(name)
        for test in finder.find(module, name, globs={"kd": kd, "torch": torch}):
            if test.examples:
                yield test


EXAMPLES = list(documented())


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_an_example_of_a_docstring_prints_what_it_says(test):
    failures = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_the_readme_shows_the_package_in_use_and_every_op_has_an_example():
    assert any("README" in block.id for block in BLOCKS)
    shown = {test.name.split(".")[-1] for test in EXAMPLES}
    assert {"cka", "hsic", "mmd", "gram_mse", "explain", "contract"} <= shown
