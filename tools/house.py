# SPDX-License-Identifier: Apache-2.0
"""Figures of the house, counted: `python tools/house.py [FOLDER] [--list] [--check]`.

FOLDER is a checkout, this one where none is given. --list names the places behind each figure; --check, a part of
`make lint`, exits with 1 where a figure is worse than it is held at: what is asked of it or, where that is not reached,
what is. Totals of lines are not held. What each figure counts is the docstring of the function that counts it.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

PARAMETERS = 10
BACKENDS = {"cpp", "triton", "torch", "cuda"}
TEST_CODE = ("spec.py", "signatures.py")  # stand beside an op, run only under test
MAKER = (Path("kdkernels/differentiable.py"), Path("kdkernels/autograd.py"))  # and what it is made from

# every function of the package that one forward and backward pass of the portable cka runs
FOLLOW = """
import sys, torch, kdkernels as kd
x, y = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
seen = set()
sys.setprofile(lambda frame, event, _: seen.add(frame.f_code.co_filename) if event == "call" else None)
kd.cka(x, y, backend="torch").backward()
sys.setprofile(None)
print(*(name for name in seen if name.startswith(kd.__path__[0])), sep="\\n")
"""


class Figure(NamedTuple):
    name: str
    value: int
    before: int | None  # when the house was first counted; None: not counted then
    asked: int | None  # at most
    held: int | None  # at most, by --check
    places: list[str]

    @property
    def worse(self) -> bool:
        return self.held is not None and self.value > self.held


class House:
    def __init__(self, root: Path):
        self.root, self.package = root, root / "kdkernels"

    @cached_property
    def trees(self) -> dict[Path, ast.Module]:
        files = (path for part in ("kdkernels", "bench") for path in sorted((self.root / part).rglob("*.py")))
        return {path.relative_to(self.root): ast.parse(path.read_text()) for path in files}

    def of_package(self) -> Iterator[tuple[Path, ast.Module]]:
        return ((path, tree) for path, tree in self.trees.items() if path.parts[0] == "kdkernels")

    def lines(self, *paths: Path) -> int:
        return sum(len((self.root / path).read_text().splitlines()) for path in paths)

    @cached_property
    def modules(self) -> dict[str, Path]:
        return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in self.trees}

    def imported(self, path: Path) -> Iterator[tuple[str, str]]:
        """(module, name or "") of each import, in functions too; a name that is a module itself is that module."""
        for node in ast.walk(self.trees[path]):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
                module = ".".join([*base, *([node.module] if node.module else [])])
                for name in (alias.name for alias in node.names):
                    yield (f"{module}.{name}", "") if f"{module}.{name}" in self.modules else (module, name)

    @cached_property
    def operator_files(self) -> list[Path]:
        """The maker, what imports and calls it, and what registers by hand an operator and its autograd.Function."""
        return [path for path, tree in self.of_package() if path in MAKER or self._makes_operators(path, tree)]

    def _makes_operators(self, path: Path, tree) -> bool:
        called = {ast.unparse(node.func).split(".")[-1] for node in _all(tree, ast.Call)}
        bases = {ast.unparse(base).split(".")[-1] for node in _all(tree, ast.ClassDef) for base in node.bases}
        by_hand = "register" in called and not bases.isdisjoint({"Function", "NoSecondDerivative"})
        return by_hand or "operator" in called and any("differentiable" in module for module, _ in self.imported(path))

    def wide_functions(self) -> list[Figure]:
        """Functions with ten parameters or more that run on the host and whose signature is ours to choose: no Triton
        kernel, no test code, nothing that an __init__.py exports (nor its constructor or call), no other library's."""
        inits = [path for path in self.trees if path.name == "__init__.py"]
        public = {(self.modules[m], name) for path in inits for m, name in self.imported(path) if m in self.modules}
        found = []
        for path, tree in self.of_package():
            if path.name in TEST_CODE or path.parts[1] in ("testing", "compat"):
                continue
            owner = {f: c.name for c in _all(tree, ast.ClassDef) for f in c.body}
            for f in _all(tree, ast.FunctionDef):
                a, known = f.args, owner.get(f, f.name) if f.name in ("__init__", "forward") else f.name
                count = sum(map(len, (a.posonlyargs, a.args, a.kwonlyargs))) + bool(a.vararg) + bool(a.kwarg)
                jitted = any(ast.unparse(d).split("(")[0].endswith("jit") for d in f.decorator_list)
                if count >= PARAMETERS and not jitted and (path, known) not in public:
                    found.append((count, f"{path}:{f.lineno} {f.name}, {count}"))
        places, longest = [place for _, place in sorted(found, reverse=True)], max((n for n, _ in found), default=0)
        title = f"host functions with >= {PARAMETERS} parameters"
        most = Figure("longest parameter list", longest, 17, 10, 10, places[:1])
        return [Figure(title, len(found), 33, 6, 6, places), most]

    def backend_names(self) -> list[Figure]:
        """Comparisons with the name of a backend: in a family's PyTorch code, that is all of its folder but the public
        functions (op.py), the operators, Triton and test code; and elsewhere, outside backend.py, which chooses."""
        families = {path.parent for path in self.trees if path.name == "op.py"}
        inside, elsewhere = [], []
        for path, tree in self.of_package():
            if path == Path("kdkernels/backend.py") or path.name in TEST_CODE or path.parts[1] == "testing":
                continue
            family = any(folder in families for folder in path.parents)
            apart = path.name == "op.py" or path in self.operator_files or "triton" in str(path)
            named = filter(_names_backend, _all(tree, ast.Compare))
            places = inside if family and not apart else elsewhere
            places += [f"{path}:{node.lineno} {ast.unparse(node)}" for node in named]
        return [
            Figure("backend names inside the families' PyTorch code", len(inside), 6, 0, 0, inside),
            Figure("backend names elsewhere, backend.py aside", len(elsewhere), None, None, 2, elsewhere),
        ]

    def circles(self) -> list[Figure]:
        """Sets of modules of the package or of bench that import each other, in functions or not."""
        graph = {m: {to for to, _ in self.imported(path)} & {*self.modules} for m, path in self.modules.items()}
        reach = {module: _reached(graph, module) for module in graph}
        circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph} - {frozenset()}
        places = [f"{len(circle)}: {', '.join(sorted(circle))}" for circle in circles]
        return [Figure("import circles", len(circles), 2, 0, 0, places)]

    def files_to_follow(self) -> list[Figure]:
        """Files with a function that runs in one `kd.cka(x, y, backend="torch")` and its backward pass."""
        how = {"cwd": self.root, "env": {**os.environ, "PYTHONPATH": str(self.root)}}
        done = subprocess.run([sys.executable, "-c", FOLLOW], stdout=subprocess.PIPE, text=True, check=True, **how)
        places = sorted(str(Path(line).relative_to(self.root)) for line in done.stdout.splitlines())
        return [Figure("files to follow cka, portable way", len(places), 15, 10, 12, places)]

    def sizes(self) -> list[Figure]:
        """Lines of `operator_files`, of the package's Python without kdkernels/testing, and of tests/*.py."""
        files, tests = self.operator_files, sorted((self.root / "tests").glob("*.py"))
        package = [path for path, _ in self.of_package() if path.parts[1] != "testing"]
        places = [f"{path}, {self.lines(path)}" for path in files]
        return [
            Figure("lines of operator files", self.lines(*files), 1886, 1200, 2270, places),
            Figure("lines of the package", self.lines(*package), 22511, 20500, None, []),
            Figure("lines of tests", self.lines(*tests), 18897, 18297, None, []),
        ]

    def figures(self) -> list[Figure]:
        of_code = [*self.wide_functions(), *self.backend_names(), *self.circles()]
        return [*of_code, *self.files_to_follow(), *self.sizes()]


def _all(tree, kind):
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def _names_backend(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    listed = [s.elts if isinstance(s, ast.Tuple | ast.List | ast.Set) else [s] for s in sides]
    names = {constant.value for side in listed for constant in side if isinstance(constant, ast.Constant)}
    # "cuda" is a type of device as well
    devices = "cpu" in names or any(word in ast.unparse(node) for word in ("device", "kind", "library"))
    return bool(names & BACKENDS) and not devices


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    figures = House(options.folder.resolve()).figures()
    print(f"{'':52}{'now':>8}{'before':>8}{'asked':>8}{'held':>8}")
    for f in figures:
        before, asked, held = ("" if value is None else f"{value:,}" for value in (f.before, f.asked, f.held))
        print(f"{f.name:52}{f.value:>8,}{before:>8}{asked:>8}{held:>8}{'  worse' if f.worse else ''}")
        if options.list:
            print(*(f"    {place}" for place in f.places), sep="\n", end="\n" if f.places else "")
    return int(options.check and any(f.worse for f in figures))


if __name__ == "__main__":
    sys.exit(main())
