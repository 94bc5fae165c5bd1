# SPDX-License-Identifier: Apache-2.0
"""`python -m kdkernels compare`: two models and a loader by their import paths; heat map and CSV into a folder."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch

from ..gram.kernels import names
from .compare import compare_models
from .comparison import Comparison
from .masks import KEY
from .network import ROWS
from .picture import CELLS

FILES = ("cka.csv", "cka.png", "cka.svg")
EXAMPLE = """\
Each of the three is module:name, importable from the current folder: the object itself, or a function without
arguments that makes it. For example, with a file nets.py that defines teacher(), student() and loader():

  python -m kdkernels compare nets:teacher nets:student nets:loader --layers "layer?" fc --rows gap --out out

Models are put into evaluation mode. Written to the folder: cka.png, cka.svg (with matplotlib) and cka.csv.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.description, parser.epilog = (__doc__ or "").partition(":")[2].strip().capitalize(), EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model_a", metavar="module:model_a")
    add("model_b", metavar="module:model_b")
    add("loader", metavar="module:loader")
    add("--layers", nargs="+", metavar="NAME", help="names or quoted patterns (default: all without children)")
    add("--layers-b", nargs="+", metavar="NAME", help="those of the second model, where they differ")
    add("--rows", choices=ROWS, help="how convolution and token features become rows (default for images: flatten)")
    mask = f"which tokens or positions count: a key of the batch, or module:function of it (default: {KEY} for tokens)"
    add("--mask", help=f"{mask}; none: all")
    add("--kernel", default="linear", choices=names(), help="default: linear")
    add("--biased", action="store_true", help="HSIC_0, which depends on the batch size, in place of HSIC_1")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the files (default: out)")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    try:
        device = device_of(options.device)
        check_writable(options.out, FILES, "--out")
        found = _compared(options, device)
        print(_text(found, options))
        files = _saved(found, options)
    except KeyboardInterrupt:
        print("stopped" if options.quiet else "\nstopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Saved {', '.join(map(str, files))}.")
    unknown = found.cka.isnan()
    if unknown.any():
        layers = [name for name, row in zip(found.labels_a, unknown, strict=True) if row.all()]
        layers += [name for name, column in zip(found.labels_b, unknown.T, strict=True) if column.all()]
        print(f"error: CKA is NaN: the features hold NaN in {', '.join(dict.fromkeys(layers))}", file=sys.stderr)
    return int(unknown.all())


def device_of(name: str | None) -> torch.device:
    """Of --device; cuda where there is one without it."""
    there = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if there else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name}: give cpu, cuda, or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if there else 0):
        raise ValueError(f"--device {name}: this PyTorch sees no such CUDA device; python -m kdkernels info says more")
    return device


def check_writable(folder: Path, names, option: str):
    """Makes the folder; OSError where it, or a file of these names in it, cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{option}: {folder} cannot be written: {error.strerror}") from None
    for path in (folder / name for name in names):
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise OSError(f"{option}: {path} cannot be written")


def _compared(options, device) -> Comparison:
    models = [_model(getattr(options, name)) for name in ("model_a", "model_b")]
    loader = _made(options.loader)
    if loader is None:
        raise TypeError(f"{options.loader} gives None: name an iterable of batches, or a function that returns one")
    return compare_models(
        *models,
        loader,
        options.layers if options.layers_b is None else (options.layers, options.layers_b),
        rows=options.rows,
        mask=_mask(options.mask),
        kernel=options.kernel,
        unbiased=not options.biased,
        device=device,
        progress=not options.quiet,
    )


def _mask(given: str | None):
    if given is None or ":" not in given:
        return False if given == "none" else given
    return _found(given)


def _text(found: Comparison, options) -> str:
    matrix = f"\n\n{found.table()}" if max(found.cka.shape) <= CELLS else ""
    nearest = f"most alike of {options.model_b}, for each layer of {options.model_a}:\n{found.nearest()}"
    return f"{found}{matrix}\n\n{nearest}\n"


def _saved(found: Comparison, options) -> list[Path]:
    files = [found.to_csv(options.out / "cka.csv")]
    if importlib.util.find_spec("matplotlib") is None:
        print("no heat map: matplotlib is not installed", file=sys.stderr)
        return files
    return files + found.plot(options.out / "cka", names=(options.model_a, options.model_b))


def _model(path: str) -> torch.nn.Module:
    model = _made(path)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{path} is a {type(model).__name__}: name an nn.Module or a function that makes one")
    return model.eval()


def _made(path: str):
    """The object at module:name; a function or a class is called."""
    found = _found(path)
    callable_without_being_a_model = callable(found) and not isinstance(found, torch.nn.Module)
    return found() if callable_without_being_a_model else found


def _found(path: str):
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{path!r} is no import path: give module:name, e.g. nets:teacher for teacher in nets.py")
    found = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join(n for n in vars(found) if not n.startswith("_"))
            raise AttributeError(f"{path}: {module} has no {name}; it has {public}")
        found = getattr(found, part)
    return found
