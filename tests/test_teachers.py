# SPDX-License-Identifier: Apache-2.0
"""Stored teachers: what comes back, with which header, what is refused, and what half precision leaves of the loss."""

import json
import sys

import pytest
import torch

import kdkernels as kd

safetensors = pytest.importorskip("safetensors")


def stored(tmp_path, rows=(6,), k=4, **how):
    torch.manual_seed(0)
    values, indices = (2 * torch.randn(*rows, 11)).log_softmax(-1).topk(k)
    teacher = kd.TopKLogits(values, indices, **({"vocab": 11} | how))
    file = str(tmp_path / "teacher.safetensors")
    kd.teachers.save_topk(file, teacher, tokenizer="someone/model")
    return teacher, file


def test_a_teacher_comes_back_in_half_precision_with_what_it_is_of(tmp_path):
    teacher, file = stored(tmp_path, (3, 5), tau=2.0)
    again = kd.teachers.load_topk(file, tokenizer="someone/model", vocab=11)
    assert (again.values.dtype, again.indices.dtype) == (torch.float16, torch.int32)
    assert again.values.equal(teacher.values.half()) and again.indices.equal(teacher.indices.int())
    assert (again.kind, again.tail, again.vocab, again.tau) == ("logprobs", "bucket", 11, 2.0)
    part = kd.teachers.load_topk(file, tokenizer="someone/model", tail="ignore", rows=slice(1, 3))
    assert part.values.equal(again.values[1:]) and part.indices.equal(again.indices[1:]) and part.tail == "ignore"


def test_the_file_says_what_it_is_to_any_reader_of_the_format(tmp_path):
    _, file = stored(tmp_path, tau=1.5)
    with open(file, "rb") as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    assert header["__metadata__"] == {
        "format": "kdkernels top-k teacher 1",
        "tokenizer": "someone/model",
        "vocabulary": "11",
        "k": "4",
        "temperature": "1.5",
        "kind": "logprobs",
    }
    assert (header["values"]["dtype"], header["values"]["shape"]) == ("F16", [6, 4])
    assert (header["indices"]["dtype"], header["indices"]["shape"]) == ("I32", [6, 4])


def test_large_logits_keep_their_differences(tmp_path):
    values = torch.tensor([[70_000.0, 69_999.5, 69_990.0]])
    teacher = kd.TopKLogits(values, torch.arange(3)[None], kind="logits", tail="renormalize", vocab=11)
    file = tmp_path / "teacher.safetensors"
    kd.teachers.save_topk(file, teacher, tokenizer="t")
    again = kd.teachers.load_topk(file, tokenizer="t", tail="renormalize")
    assert again.kind == "logits" and again.values.tolist() == [[0.0, -0.5, -10.0]]
    with pytest.raises(ValueError, match="tail is 'bucket': logits of k classes do not say"):
        kd.teachers.load_topk(file, tokenizer="t")


def test_half_precision_moves_the_loss_by_what_it_rounds():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 64, 5000, dtype=torch.float64)
    values, indices = teacher.log_softmax(-1).topk(64)
    loss = kd.losses.KDLoss(tau=1.0)
    exact, half = (loss(student, kd.TopKLogits(v, indices)) for v in (values, values.half()))
    assert 0 < (half - exact).abs() < 1e-3 * exact


def test_rounding_makes_no_row_of_many_alike_more_than_1(tmp_path):
    file, student = tmp_path / "teacher.safetensors", torch.randn(1, 500)
    nearest = []
    for n in range(1, 200):
        values = torch.full((1, n), 1 / n).log()
        kd.teachers.save_topk(file, kd.TopKLogits(values, torch.arange(n)[None], vocab=500), tokenizer="t")
        again = kd.teachers.load_topk(file, tokenizer="t")
        assert again.values.double().exp().sum() <= 1 + 1e-6 and (again.values - values).abs().max() <= 4e-3
        assert kd.losses.KDLoss(tau=1.0)(student, again).isfinite()
        nearest.append(values.half().double().exp().sum().item())
    assert max(nearest) > 1.001  # what TopKLogits would refuse


def test_another_vocabulary_is_refused(tmp_path):
    _, file = stored(tmp_path)
    for how, text in (
        ({"tokenizer": "other/model"}, "is of the tokenizer 'someone/model', the student's is 'other/model'"),
        ({"tokenizer": "someone/model", "vocab": 12}, "is of 11 classes, the student has 12"),
    ):
        with pytest.raises(ValueError, match=text):
            kd.teachers.load_topk(file, **how)
    teacher = kd.teachers.load_topk(file, tokenizer="someone/model")
    with pytest.raises(ValueError, match="vocab is 11, student_logits has 10 classes"):
        kd.losses.KDLoss(tau=1.0)(torch.randn(6, 10), teacher)
    assert kd.losses.KDLoss(tau=1.0)(torch.randn(6, 12), teacher).isfinite()  # its padding has no part


def test_what_cannot_be_written_or_read_is_refused(tmp_path):
    teacher, file = stored(tmp_path)
    save = kd.teachers.save_topk
    for given, tokenizer, error, text in (
        (teacher.values, "t", TypeError, "teacher is a Tensor: give kd.TopKLogits"),
        (teacher, None, TypeError, "tokenizer is None: give the name"),
        (teacher, "", TypeError, "tokenizer is ''"),
        (kd.TopKLogits(teacher.values, teacher.indices), "t", ValueError, "teacher has no vocab"),
        (teacher[:0], "t", ValueError, "values of the teacher is empty"),
        (kd.TopKLogits(teacher.values * torch.nan, teacher.indices, vocab=11), "t", ValueError, r"hold NaN or \+inf"),
    ):
        with pytest.raises(error, match=text):
            save(tmp_path / "none.safetensors", given, tokenizer=tokenizer)
    assert not (tmp_path / "none.safetensors").exists()
    with pytest.raises(TypeError, match="rows is a int: give a slice"):
        kd.teachers.load_topk(file, tokenizer="someone/model", rows=3)
    from safetensors.torch import save_file

    save_file({"values": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="says it is None, not 'kdkernels top-k teacher 1'"):
        kd.teachers.load_topk(tmp_path / "other.safetensors", tokenizer="t")


def test_without_safetensors_the_line_says_what_to_install(monkeypatch, tmp_path):
    teacher, file = stored(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (
        lambda: kd.teachers.save_topk(file, teacher, tokenizer="t"),
        lambda: kd.teachers.load_topk(file, tokenizer="t"),
    ):
        with pytest.raises(
            ImportError, match=r"stored teachers need safetensors: pip install \"kdkernels\[teachers\]\""
        ):
            call()


def test_rows_and_devices_of_a_teacher():
    values, indices = torch.randn(3, 5, 11).log_softmax(-1).topk(4)
    teacher = kd.TopKLogits(values, indices, tail="ignore", vocab=11, tau=2.0)
    keep = torch.rand(3, 5) > 0.5
    for rows in (1, slice(0, 2), keep, torch.tensor([2, 0])):
        part = teacher[rows]
        assert part.values.equal(values[rows]) and part.indices.equal(indices[rows])
        assert (part.tail, part.vocab, part.tau) == ("ignore", 11, 2.0)
    assert teacher.to("meta").values.is_meta and teacher.to("meta").indices.is_meta
