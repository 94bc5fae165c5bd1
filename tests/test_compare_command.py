# SPDX-License-Identifier: Apache-2.0
"""`python -m kdkernels compare`: files and text it leaves, and one line for what is wrong, before any work."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from kdkernels import __main__ as command
from kdkernels.analysis.comparison import Comparison

MODULE = """
import torch
from torch import nn

def teacher():
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 5))

student = teacher()

def loader():
    return torch.randn(5, 20, 12)

def nothing():
    pass

def unknown():
    return torch.full((5, 20, 12), torch.nan)

def stopped():
    yield torch.randn(20, 12)
    raise KeyboardInterrupt

def padded():
    return [{"input": torch.randn(8, 6, 12), "real": (torch.arange(6) < 2).expand(8, 6)} for _ in range(3)]

def half(batch):
    return batch["input"][..., 0] > 0
"""


@pytest.fixture(autouse=True)
def nets_module(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*more, loader="nets:loader", models=("nets:teacher", "nets:student")) -> int:
    return command.main(["compare", *models, loader, *more])


def test_it_compares_two_importable_models_into_a_folder(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the command puts the models into evaluation mode
        assert run("--out", str(out), "--layers", "[02]") == 0
    done = capsys.readouterr()
    assert "2 x 2 layers, 100 rows in 5 batches" in done.out and "comparing" in done.err
    assert {path.name for path in out.iterdir()} == {"cka.csv", "cka.png", "cka.svg"}
    assert Comparison.load(out / "cka.csv").table() in done.out


@pytest.mark.parametrize(("mask", "rows"), [("real", 48), ("none", 144), ("nets:half", None)])
def test_it_takes_masks(mask, rows, capsys):
    assert run("--rows", "tokens", "--mask", mask, "--quiet", loader="nets:padded") == 0
    seen = int(capsys.readouterr().out.split(" layers, ")[1].split(" rows")[0])
    assert seen == rows or (rows is None and 48 < seen < 96)


@pytest.mark.parametrize(
    ("first", "more", "message"),
    [
        ("nets", [], "'nets' is no import path: give module:name"),
        ("nets:techer", [], "nets has no techer; it has torch, nn, teacher, student, loader"),
        ("nets:loader", [], "nets:loader is a Tensor: name an nn.Module"),
        ("no_such_module:x", [], "No module named 'no_such_module'"),
        ("nets:teacher", ["--layers", "7"], "model_a has no layer '7'; it has 0, 1, 2"),
        ("nets:teacher", ["--mask", "real"], "mask is 'real', and loader's batch is a Tensor"),
    ],
)
def test_it_names_what_is_wrong(first, more, message, capsys):
    assert run("--quiet", *more, models=(first, "nets:student")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda"], "error: --device cuda: this PyTorch sees no such CUDA device"),
        (["--device", "gpu"], "error: --device gpu: give cpu, cuda, or cuda:1"),
        (["--out", "nets.py/out"], "error: --out: nets.py/out cannot be written: Not a directory"),
        (["--out", "nets.py"], "error: --out: nets.py cannot be written: File exists"),
        (["--out", "taken"], "error: --out: taken/cka.csv cannot be written"),
    ],
)
def test_device_and_folder_are_looked_at_before_anything_is_made(more, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("taken/cka.csv").mkdir(parents=True)
    assert run(*more, models=("no_such_module:x", "nets:student")) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message) and shown.err.count("\n") == 1 and shown.out == ""


def test_a_loader_of_none_and_a_stop_are_one_line(capsys):
    assert run("--quiet", loader="nets:nothing") == 2
    assert capsys.readouterr().err.startswith("error: nets:nothing gives None: name an iterable of batches")
    assert run("--quiet", loader="nets:stopped") == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_matrix_is_printed_before_files_are_written(monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Comparison, "to_csv", full)
    assert run("--quiet") == 2
    shown = capsys.readouterr()
    assert "most alike of nets:student" in shown.out and shown.err == "error: No space left on device\n"


def test_features_that_are_nan_end_non_zero_and_are_named(capsys):
    pytest.importorskip("matplotlib")
    assert run("--quiet", loader="nets:unknown") == 1
    assert capsys.readouterr().err == "error: CKA is NaN: the features hold NaN in 0, 1, 2\n"
