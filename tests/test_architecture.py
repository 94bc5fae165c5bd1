# SPDX-License-Identifier: Apache-2.0
"""The house keeps its order: import arrows, file lengths, a skeleton for each family, documented names, no machine."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import kdkernels as kd
from kdkernels.registry import OPS

PACKAGE = ROOT / "kdkernels"
FAMILIES = sorted({op.family for op in OPS.values()})
FOUNDATIONS = {"accumulator", "autograd", "checks", "backend", "differentiable", "native", "_types"}
FOUNDATIONS |= {"triton_launch", "triton_tf32"}
# what each part may import from the rest of the package; a family's own modules are free to import each other
ARROWS = {
    "accumulator": {"autograd", "distributed"},
    "autograd": set(),
    "checks": set(),
    "differentiable": {"autograd", "checks"},
    "registry": set(),
    "native": set(),
    "triton_launch": set(),
    "triton_tf32": {"backend"},
    "warm": set(),
    "_types": set(),
    "types": {"_types", "distributed", "gram", "losses"},
    "backend": {"_types", "checks", "native", "registry"},
    "testing": {"backend", "registry"},
    "losses": {*FOUNDATIONS, *FAMILIES, "distributed"},
    "compat": {*FOUNDATIONS, *FAMILIES, "losses"},
    "distributed": {*FOUNDATIONS},
    "teachers": {*FOUNDATIONS, "logits"},
    "analysis": {*FOUNDATIONS, "distributed", "gram", "losses"},
    **{family: FOUNDATIONS for family in FAMILIES},
    "logits": {*FOUNDATIONS, "distributed"},
    "nystrom": {*FOUNDATIONS, "gram", "distributed"},
    "projection": {*FOUNDATIONS, "distributed"},
    "gram": {*FOUNDATIONS, "distributed"},
    "relation": {*FOUNDATIONS, "gram", "distributed"},
}
# the modules of a family that others may name: its functions, its kernel objects (and what they do to a Triton tile),
# the rules about their arguments
INTERFACE = (
    [],
    ["op"],
    ["kda"],
    ["kda", "op"],
    ["checks"],
    ["kernels"],
    ["triton_impl", "maps"],
    ["call"],
    ["problem"],
    ["bandwidth"],
    ["both_ways"],
    ["patches"],
    ["scores"],
)
# all layers at once: sums over the same tiles, made from the same prepared rows
REUSED = {
    "analysis": [["torch_impl", part] for part in ("combine", "panels", "prepared")],
    # values and slopes of kernels in PyTorch, as those on Triton tiles
    "nystrom": [["torch_impl", "prepared"]],
}
WHOLE_PACKAGE = ("__init__", "__main__")  # they gather names and commands


def in_triton(path: Path) -> bool:
    return path.name.startswith("triton_") or path.parent.name == "triton_impl" or path.name == "signatures.py"


def folder_of(family: str) -> Path:
    return PACKAGE.joinpath(*family.split("."))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if part_of(p) not in WHOLE_PACKAGE)


def imports(path: Path):
    """(module path in absolute form, names, whether at module level) of each import statement."""
    tree = ast.parse(path.read_text())
    package = ["kdkernels", *path.relative_to(PACKAGE).parent.parts]
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [alias.name for alias in node.names]
            yield ".".join([*base, *(node.module.split(".") if node.module else [])]), names, id(node) in top


def parts_imported(path: Path):
    """(part, the dotted rest) of what a module takes from the package."""
    for module, names, _ in imports(path):
        first, *rest = module.split(".")
        if first != "kdkernels":
            continue
        # `from .. import backend` and `from ..gram import panels` name modules after the word import
        here = PACKAGE.joinpath(*rest)
        for name in names or [""]:
            is_module = (here / f"{name}.py").is_file() or (here / name / "__init__.py").is_file()
            dotted = [*rest, name] if is_module or not rest else rest
            yield dotted[0], dotted[1:]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    own = part_of(path)
    assert own in ARROWS, f"{own} is new: say in ARROWS what it may import"
    allowed = ARROWS[own] | {own} | ({"testing"} if path.name in ("spec.py", "signatures.py") else set())
    for part, rest in parts_imported(path):
        assert part in allowed, f"{path.relative_to(ROOT)} imports {part}"
        if part in FAMILIES and part != own:
            assert rest in (*INTERFACE, *REUSED.get(own, ())), (
                f"{path.relative_to(ROOT)} reaches into {part}/{'/'.join(rest)}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_textbook_imports_only_torch(family):
    found = {module for module, _, _ in imports(folder_of(family) / "reference.py")}
    assert found - {"__future__", "math"} == {"torch"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_triton_files_need_triton_to_be_imported(path):
    if in_triton(path):
        return
    for module, names, at_module_level in imports(path):
        if at_module_level:
            assert "triton" not in " ".join([module, *names]), f"{path.relative_to(ROOT)} imports {module} {names}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_skeleton(family):
    backends = {backend for op in OPS.values() if op.family == family for backend in op.backends}
    kernels = [file for backend, file in (("triton", "triton_impl"), ("cuda", "native_impl")) if backend in backends]
    assert kernels
    for name in ("op", "reference", "torch_impl", *kernels, "spec"):  # a file, or a folder of several
        module = folder_of(family) / name
        assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), f"{family}/{name} is missing"
    for name in ("__init__.py", "MATH.md"):
        assert (folder_of(family) / name).is_file(), f"{family}/{name} is missing"


def test_every_op_of_the_registry_is_public_and_in_its_family():
    for op in OPS.values():
        assert op.name in kd.__all__
        assert getattr(kd, op.name).__module__ == f"kdkernels.{op.family}.op"
        assert op.backends[-1] == "reference"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_gives_a_constant_one_value(path):
    targets = (node.targets for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
    names = [target.id for one in targets for target in one if isinstance(target, ast.Name)]
    assert len(names) == len(set(names)), f"set twice: {sorted(n for n in set(names) if names.count(n) > 1)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_float32_or_wider_is_said_once(path):
    said = re.search(r"promote_types\(.*float32", path.read_text())
    # a textbook imports only torch
    allowed = path.name in ("autograd.py", "reference.py") or part_of(path) == "testing"
    assert not said or allowed, f"{path.relative_to(ROOT)} has its own: use autograd.at_least_float32"


SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}


def files():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / line for line in listed.splitlines()]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        folders = ("kdkernels", "csrc", "tests", "bench", "examples", "tools")
        paths = [p for folder in folders for p in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    endings = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".sh", ".txt", ".in", ".yaml", ".yml", ""}
    return [p for p in paths if p.is_file() and p.suffix in endings]


def test_no_file_is_longer_than_400_lines():
    for path in files():
        lines = path.read_text().splitlines() if path.suffix in SOURCES else []
        kernels = path.suffix == ".cuh" or in_triton(path)
        said = any("ver 400 lines" in line for line in lines[:2])  # and why
        limit = 600 if kernels and said else 400
        assert len(lines) <= limit, f"{path.relative_to(ROOT)} has {len(lines)} lines, {limit} are allowed"


def test_no_line_is_wider_than_120_columns():
    for path in files():
        for number, line in enumerate(path.read_text().splitlines() if path.suffix in SOURCES else [], 1):
            assert len(line) <= 120, f"{path.relative_to(ROOT)}:{number} has {len(line)} columns"


def test_every_source_names_its_licence_first():
    for path in files():
        if path.suffix in SOURCES:
            first = path.read_text().splitlines()[:2]  # the second where the first is #!
            assert any("SPDX-License-Identifier: Apache-2.0" in line for line in first), path.relative_to(ROOT)


def test_nothing_committed_speaks_of_the_machine_it_was_written_on():
    machine = re.compile(
        r"(?<![\w.])/(work|home|root|Users)/(?!someone)|/tmp/\w+/|localhost|\b(?:10|127|192\.168)(?:\.\d+){2,3}\b"
    )
    for path in files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert path.name == Path(__file__).name or not machine.search(line), f"{path.relative_to(ROOT)}:{number}"


def public():
    yield from ((f"kd.{name}", getattr(kd, name)) for name in kd.__all__)
    for part in ("losses", "distributed", "teachers"):
        module = getattr(kd, part)
        yield from ((f"kd.{part}.{name}", getattr(module, name)) for name in module.__all__)


def test_every_public_name_is_documented():
    for name, value in public():
        assert inspect.getdoc(value), name
        own = inspect.getdoc(value) != inspect.getdoc(torch.nn.Module) if inspect.isclass(value) else True
        assert own, f"{name} inherits its docstring from nn.Module"


def explained(value) -> str:
    """The words about an object: its docstring, and those of the objects whose arguments it says it shares."""
    text, named = inspect.getdoc(value), {name.split(".")[-1]: other for name, other in public()}
    shared = re.findall(r"(?:rguments|Shapes)\b[^.]*?as\s+in\s+`(?:kd\.)?(?:losses\.)?(\w+)`", text)
    return " ".join([text, *(inspect.getdoc(named[name]) for name in shared)])


@pytest.mark.parametrize("name, value", [pytest.param(*pair, id=pair[0]) for pair in public() if callable(pair[1])])
def test_a_docstring_says_what_every_argument_is(name, value):
    parameters = inspect.signature(value).parameters.values()
    for argument in (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)):
        assert re.search(rf"\b{argument}\b", explained(value)), f"{name} does not explain {argument}"


def test_every_op_takes_its_backend_last_and_shows_an_example():
    for op in OPS:
        function = getattr(kd, op)
        parameters = list(inspect.signature(function).parameters.values())
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        assert positional in (
            ["x", "y"],
            ["x", "regularization", "regularization_strength"],
            ["x", "regularization_strength"],
            ["s", "t", "basis"],
            ["s", "t", "s_centers", "t_centers"],
            ["x", "landmarks"],
            ["x", "m"],
            ["s", "t", "s_landmarks", "t_landmarks"],
            ["x", "y", "x_landmarks", "y_landmarks"],
            ["s", "t"],
            ["x", "labels"],
            ["student", "teacher"],
            ["student", "teacher", "labels", "permuted_labels", "lam"],
        )
        assert parameters[-1].name == "backend" and parameters[-1].default == "auto"
        assert ">>>" in function.__doc__


def test_it_imports_and_runs_without_triton(python):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kdkernels as kd\n"
        "x = torch.randn(8, 4, requires_grad=True)\n"
        "kd.cka(x, x.detach() + 1, kernel='rbf').backward()\n"
        "assert x.grad.isfinite().all()\n"
        "assert kd.available_backends()['triton'] == 'the package triton is not installed'\n"
        "assert not any(name.split('.')[-1].startswith('triton_') for name in sys.modules if 'kdkernels' in name)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_importing_it_loads_no_kernel_and_no_test_code(python):
    code = (
        "import sys, kdkernels\n"
        "loaded = [n for n in sys.modules if n.startswith('kdkernels')]\n"
        "heavy = ('kdkernels.testing', 'kdkernels.gram.spec', 'kdkernels.gram.triton_impl')\n"
        "assert not set(heavy) & set(loaded), loaded\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
