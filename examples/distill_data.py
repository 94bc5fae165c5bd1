# SPDX-License-Identifier: Apache-2.0
"""The images of the demonstration: scikit-learn's digits, which come with it, or CIFAR-100 from files on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CIFAR_FILES = ("train", "test", "meta")
CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class Split(NamedTuple):
    images: torch.Tensor  # [N, channels, height, width], float32
    labels: torch.Tensor  # [N], int64

    def to(self, device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Data(NamedTuple):
    name: str
    classes: int
    shift: int  # augmentation: random shifts of up to so many pixels
    flip: bool  # augmentation: random left-right flips
    train: Split
    validation: Split  # weights are chosen here
    test: Split | None  # read once, after training; None while weights are chosen

    def first(self, count: int) -> Data:
        """Only so many images of each split."""
        parts = {name: Split(*(t[:count] for t in getattr(self, name))) for name in ("train", "validation", "test")}
        return self._replace(**parts)

    def to(self, device) -> Data:
        test = None if self.test is None else self.test.to(device)
        return self._replace(train=self.train.to(device), validation=self.validation.to(device), test=test)


def load(name: str, root: str | None = None) -> Data:
    if name == "digits":
        return digits()
    if root is None:
        raise FileNotFoundError(f"--data cifar100 needs --root DIR, the folder with its files. {_where()}")
    return cifar100(Path(root))


def digits() -> Data:
    """1797 images of 8 x 8 pixels: 898 train, 269 validation, 630 test, the same for every seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, rest = _stratified(np.arange(len(labels)), labels, 0.5)
    validation, test = _stratified(rest, labels[rest], 0.3)
    splits = [_split(images[part], labels[part]) for part in (train, validation, test)]
    return Data("digits", 10, 1, False, *splits)


def cifar100(folder: Path, validation_size: int | float = 0.1) -> Data:
    """CIFAR-100 from the files of its Python version; a tenth of the training images is the validation split."""
    if not (folder / "train").exists() and (folder / "cifar-100-python").is_dir():
        folder = folder / "cifar-100-python"
    missing = [name for name in CIFAR_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no file named {' or '.join(missing)}. {_where()}")
    images, labels = _cifar_file(folder / "train")
    classes = len(_unpickle(folder / "meta")[b"fine_label_names"])
    mean, std = images.mean((0, 2, 3), keepdims=True), images.std((0, 2, 3), keepdims=True)
    validation, train = _stratified(np.arange(len(labels)), labels, validation_size)
    parts = [(images[train], labels[train]), (images[validation], labels[validation]), _cifar_file(folder / "test")]
    splits = [_split((x - mean) / std, y) for x, y in parts]
    return Data("cifar100", classes, 4, True, *splits)


def _where() -> str:
    return (
        f"The Python version of CIFAR-100 has three files, {', '.join(CIFAR_FILES)}: get cifar-100-python.tar.gz from "
        f"{CIFAR_PAGE}, unpack it, and pass the folder that holds them as --root"
    )


def _cifar_file(path: Path):
    content = _unpickle(path)
    if b"data" not in content or b"fine_labels" not in content:
        raise ValueError(f"{path} has no 'data' and 'fine_labels': it is not of the Python version of CIFAR-100")
    images, labels = np.asarray(content[b"data"], dtype=np.uint8), np.asarray(content[b"fine_labels"])
    if images.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{path} has {len(labels)} labels and images {images.shape}: it is cut short. {_where()}")
    return (images.reshape(-1, 3, 32, 32) / 255).astype(np.float32), labels


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run code; these files need numpy arrays and nothing else."""

    allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"}

    def find_class(self, module, name):
        if module == "_codecs" and name == "encode":
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy" and name in self.allowed:
            # the published files were written by an old numpy, whose private module has another name today
            if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
                module = module.replace("numpy.core", "numpy._core")
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not what a CIFAR file holds")


def _unpickle(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a file of CIFAR-100 ({error}). {_where()}") from None
    # keys are bytes in the published files, text where Python 3 wrote them
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _stratified(indices, labels, size):
    from sklearn.model_selection import train_test_split

    return train_test_split(indices, train_size=size, stratify=labels, random_state=0)


def _split(images, labels) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.asarray(labels, dtype=np.int64)))


def draw_labelled(labels: torch.Tensor, count: int | None, seed: int) -> torch.Tensor:
    """Indices of the images whose label the student may see: all, or `count`, as many of each class as possible."""
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.zeros(len(labels), dtype=torch.int64)  # how many of its class come before
    for c in labels.unique().cpu():
        own = order[(labels.cpu()[order] == c)]
        rank[own] = torch.arange(len(own))
    return order[rank[order].argsort(stable=True)][:count]


def augment(images: torch.Tensor, data: Data, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by its own up to `data.shift` pixels, zeros coming in, and perhaps flipped."""
    n, _, height, width = images.shape
    s, device = data.shift, images.device
    dy, dx = torch.randint(2 * s + 1, (2, n, 1), generator=generator)
    rows = (dy + torch.arange(height)).to(device)
    columns = dx + torch.arange(width)
    if data.flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    columns = columns.to(device)
    padded = F.pad(images, (s, s, s, s)).permute(0, 2, 3, 1)
    each = torch.arange(n, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
