# SPDX-License-Identifier: Apache-2.0
"""`python -m kdkernels compare`: two models and a loader by their import paths; heat map and CSV into a folder."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

import torch

from ..gram.kernels import names
from ..losses.base import ROWS
from .compare import compare_models

EXAMPLE = """\
Each of the three is module:name, importable from the current folder: the object itself, or a function without
arguments that makes it. For example, with a file nets.py that defines teacher(), student() and loader():

  python -m kdkernels compare nets:teacher nets:student nets:loader --layers "layer?" fc --rows gap --out out

Models are put into evaluation mode. Written to the folder: cka.png, cka.svg (with matplotlib) and cka.csv.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.description, parser.epilog = __doc__.split(":", 1)[1].strip().capitalize(), EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model_a", metavar="module:model_a")
    add("model_b", metavar="module:model_b")
    add("loader", metavar="module:loader")
    add("--layers", nargs="+", metavar="NAME", help="names or patterns, quoted (default: every layer without children)")
    add("--layers-b", nargs="+", metavar="NAME", help="those of the second model, where they differ")
    rows = [name for name in ROWS if name != "groups"]
    add("--rows", choices=rows, help="how convolution and token features become rows (default for images: flatten)")
    add("--kernel", default="linear", choices=names(), help="default: linear")
    add("--biased", action="store_true", help="HSIC_0, which depends on the batch size, in place of HSIC_1")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the files (default: out)")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    try:
        models = [_model(getattr(options, name)) for name in ("model_a", "model_b")]
        loader = _made(options.loader)
        layers = options.layers if options.layers_b is None else (options.layers, options.layers_b)
        found = compare_models(
            *models,
            loader,
            layers,
            rows=options.rows,
            kernel=options.kernel,
            unbiased=not options.biased,
            device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            progress=not options.quiet,
        )
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    files = [found.to_csv(options.out / "cka.csv")]
    if importlib.util.find_spec("matplotlib") is None:
        print("no heat map: matplotlib is not installed", file=sys.stderr)
    else:
        files += found.plot(options.out / "cka", names=(options.model_a, options.model_b))
    print(f"{found}\n\nmost alike of {options.model_b}, for each layer of {options.model_a}:\n{found.nearest()}\n")
    print(f"Saved {', '.join(map(str, files))}.")
    return 0


def _model(path: str) -> torch.nn.Module:
    model = _made(path)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{path} is a {type(model).__name__}: name an nn.Module or a function that makes one")
    return model.eval()


def _made(path: str):
    """The object at module:name; a function or a class is called."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{path!r} is no import path: give module:name, e.g. nets:teacher for teacher in nets.py")
    found = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join(n for n in vars(found) if not n.startswith("_"))
            raise AttributeError(f"{path}: {module} has no {name}; it has {public}")
        found = getattr(found, part)
    callable_without_being_a_model = callable(found) and not isinstance(found, torch.nn.Module)
    return found() if callable_without_being_a_model else found
