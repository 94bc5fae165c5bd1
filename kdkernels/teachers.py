# SPDX-License-Identifier: Apache-2.0
"""Stored teachers: k classes a row in a safetensors file, two bytes a value and four a class, and of what they are.

A row of 64 classes takes 384 bytes, where the logits of 128,256 take 256,512. The package safetensors is an extra:
`pip install "kdkernels[teachers]"`.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import checks
from ._types import FilePath
from .logits import TopKLogits

__all__ = ["load_topk", "save_topk"]

FORMAT = "kdkernels top-k teacher 1"


def save_topk(file: FilePath, teacher: TopKLogits, *, tokenizer: str) -> None:
    """Writes a teacher's classes: values in float16, indices in int32, and a header that says what they are of.

    Args:
        file: a path. teacher: `kd.TopKLogits` with vocab=, the number of classes that its model has.
        tokenizer: a name by which the vocabulary is known again, such as that of its repository.

    The header holds tokenizer, vocabulary, k, temperature and kind. float16 keeps 11 bits of a log-probability l: the
    probability is off by up to 5e-4 |l| of itself. Where that would make those of a row add up to more than 1, all of
    the row are rounded down. Logits are stored less the largest of their row, which no softmax sees.

    Raises:
        ValueError: a teacher without vocab, no rows, values that are NaN or +inf. TypeError: another teacher, a
            tokenizer that is no name. ImportError: safetensors is missing.

    >>> import os, tempfile
    >>> kept = kd.TopKLogits(*torch.randn(4, 1000).log_softmax(-1).topk(64), vocab=1000)
    >>> file = os.path.join(tempfile.mkdtemp(), "teacher.safetensors")
    >>> kd.teachers.save_topk(file, kept, tokenizer="someone/model")
    >>> kd.teachers.load_topk(file, tokenizer="someone/model")
    TopKLogits(64 logprobs of (4,) rows, tail='bucket', tau=1)
    """
    _, save_file = _safetensors()
    if not isinstance(teacher, TopKLogits):
        raise TypeError(f"teacher is a {type(teacher).__name__}: give kd.TopKLogits")
    _check_name(tokenizer)
    if teacher.vocab is None:
        raise ValueError("teacher has no vocab: give TopKLogits the number of classes of its model, which readers ask")
    checks.not_empty(teacher.values, "values of the teacher")
    values = teacher.values.float()
    if bool((values.isnan() | (values == torch.inf)).any()):
        raise ValueError("values of the teacher hold NaN or +inf: leave such rows out")
    if teacher.kind == "logits":
        values = values - values.amax(-1, keepdim=True)
    values = values.half() if teacher.kind == "logits" else _rounded(values)
    tensors = {"values": values, "indices": teacher.indices.int()}
    header = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "vocabulary": str(teacher.vocab),
        "k": str(values.shape[-1]),
        "temperature": repr(teacher.tau),
        "kind": teacher.kind,
    }
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, file, metadata=header)


def load_topk(
    file: FilePath,
    *,
    tokenizer: str,
    vocab: int | None = None,
    tail: Literal["bucket", "renormalize", "ignore"] = "bucket",
    rows: slice | None = None,
) -> TopKLogits:
    """The teacher that `save_topk` wrote: `kd.TopKLogits` on the CPU, with the vocab and tau of its header.

    Args:
        file: a path. tokenizer: the student's, which must be the teacher's.
        vocab: the student's number of classes; where given, it must be the teacher's. Of vocabularies that differ by
            their padding alone leave it out, and give the loss the common vocab=.
        tail: as in `kd.TopKLogits`; rows stored as logits have tail="renormalize" alone.
        rows: which of the first dimension to read, by default all; the others stay on the disk.

    Raises:
        ValueError: another tokenizer or vocabulary, a file that save_topk did not write. ImportError: safetensors is
            missing.
    """
    safe_open, _ = _safetensors()
    _check_name(tokenizer)
    if rows is not None and not isinstance(rows, slice):
        raise TypeError(f"rows is a {type(rows).__name__}: give a slice of the first dimension, or None")
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata() or {}
        if header.get("format") != FORMAT or not {"values", "indices"} <= set(stored.keys()):
            raise ValueError(f"{file} says it is {header.get('format')!r}, not {FORMAT!r}: save_topk writes these")
        _check_header(file, header, tokenizer, vocab)
        read = {name: stored.get_slice(name)[slice(None) if rows is None else rows] for name in ("values", "indices")}
    how = {"kind": header["kind"], "tail": tail, "tau": float(header["temperature"])}
    return TopKLogits(read["values"], read["indices"], vocab=int(header["vocabulary"]), **how)


def _rounded(values):
    """Log-probabilities in float16, of which no row adds up to more than 1 where it did not before."""
    half = values.half()
    below = (half.view(torch.int16) + (half.float() > values)).view(torch.float16)  # of negative numbers, the next one
    return torch.where(half.float().logsumexp(-1, keepdim=True) > 0, below, half)


def _check_name(tokenizer):
    if not (isinstance(tokenizer, str) and tokenizer):
        raise TypeError(f"tokenizer is {tokenizer!r}: give the name by which its vocabulary is known")


def _check_header(file: FilePath, header, tokenizer: str, vocab):
    if header["tokenizer"] != tokenizer:
        raise ValueError(
            f"{file} is of the tokenizer {header['tokenizer']!r}, the student's is {tokenizer!r}: one class is another "
            "token there, and no loss between them means anything"
        )
    if vocab is not None:
        checks.integer(vocab, "vocab")
        if int(header["vocabulary"]) != vocab:
            raise ValueError(
                f"{file} is of {header['vocabulary']} classes, the student has {vocab}: where padding alone is "
                "different, leave vocab out here and give the loss vocab=, the classes that both have"
            )


def _safetensors():
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError('stored teachers need safetensors: pip install "kdkernels[teachers]"') from error
    return safe_open, save_file
