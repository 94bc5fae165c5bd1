# SPDX-License-Identifier: Apache-2.0
"""The demonstration on sentences, with a random teacher: what it keeps, measures, prints, and refuses."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
transformers = pytest.importorskip("transformers", reason="the teacher is a transformers model")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import distill_embeddings  # noqa: E402
import embeddings_data  # noqa: E402
from embeddings_report import against_baseline  # noqa: E402
from embeddings_student import Quality, Run, ceiling, measure, similarities  # noqa: E402

pytestmark = pytest.mark.demo
WORDS = "red blue old new cat dog tree house runs sleeps falls stands near under behind the a".split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "lines.txt"
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (300, 6), generator=draw).tolist()
    file.write_text("\n".join(" ".join(WORDS[i] for i in line[: 3 + row % 4]) for row, line in enumerate(drawn)))
    return file


@pytest.fixture
def run(teacher, texts, tmp_path, threads):
    threads(1)
    given = ["--model", str(teacher), "--texts", str(texts), "--out", str(tmp_path / "new" / "plot.png")]
    return lambda *more: distill_embeddings.main([*given, "--threads", "1", "--epochs", "1", "--seeds", "2", *more])


def test_every_loss_trains_and_the_table_the_figure_and_the_record_hold_all_runs(run, tmp_path, capsys):
    assert run("--widths", "4", "5") == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "new" / "plot.json").read_text())
    assert len(record["runs"]) == 2 * 2 * len(distill_embeddings.METHODS)
    for method in distill_embeddings.METHODS.values():
        assert said.count(f"\n{method.title}  ") == 2
    for one in record["runs"]:
        assert all(-1 <= value <= 1 for value in (*one["validation"].values(), *one["test"].values()))
        assert (one["projected"] is None) == ("projection" not in distill_embeddings.METHODS[one["method"]].title)
    assert set(record["ceilings"]) == {"4", "5"} and record["of"].startswith("up to 12500 sentences of the lines.txt")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert said.count("best relational loss against best baseline") == 2 and "How to read it" in said


def test_a_run_is_repeated_by_its_seed_whatever_number_of_processes(run, tmp_path):
    ends = []
    for threads in ("1", "2"):
        run("--widths", "4", "--losses", "pca", "sp", "--threads", threads)
        ends.append(json.loads((tmp_path / "new" / "plot.json").read_text())["runs"])
    for one, other in zip(*ends, strict=True):
        assert one["test"] == other["test"] and one["method"] == other["method"]
    assert ends[0][0]["test"] != ends[0][1]["test"]


def test_what_the_teacher_said_is_kept_until_the_teacher_or_the_text_is_another(teacher, texts, tmp_path, monkeypatch):
    asked = []
    encode = embeddings_data.encode
    monkeypatch.setattr(embeddings_data, "encode", lambda folder, text: asked.append(len(text)) or encode(folder, text))
    cache = tmp_path / "teacher.pt"
    for count in (200, 200, 150):
        embeddings_data.prepare(cache, teacher, texts, count)
    assert asked == [200, 150]
    longer = tmp_path / "lines.txt"
    longer.write_text(texts.read_text() + "\nthe old cat sleeps")
    embeddings_data.prepare(cache, teacher, longer, 150)
    assert len(asked) == 3


def test_the_teachers_rows_are_means_over_the_tokens_of_a_sentence_alone(teacher):
    text = ["the old cat sleeps", "a dog", "the red house falls behind the new tree"]
    together = embeddings_data.encode(teacher, text)
    for i, sentence in enumerate(text):
        alone = embeddings_data.encode(teacher, [sentence])
        torch.testing.assert_close(together["embeddings"][i], alone["embeddings"][0], atol=1e-3, rtol=0)
        assert together["ids"][i] == alone["ids"][0] and len(alone["ids"][0]) == len(sentence.split())
    model = transformers.AutoModel.from_pretrained(teacher)
    states = model(input_ids=torch.tensor([[2, *together["ids"][1], 3]])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.mean(0), dim=0)
    torch.testing.assert_close(together["embeddings"][1].float(), expected.detach(), atol=1e-3, rtol=0)


def test_a_side_measures_1_against_itself_scaled_and_turned_and_a_random_one_near_0():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    turned = 3 * x @ torch.linalg.qr(torch.randn(6, 6))[0]
    assert measure(turned, x) == pytest.approx((1.0, 1.0), abs=1e-3)
    rho, recall = measure(torch.randn(200, 6), x)
    assert abs(rho) < 0.05 and abs(recall - 10 / 199) < 0.03
    cosines = torch.nn.functional.cosine_similarity(x[3], x[:50], dim=-1)
    row = similarities(x[:50])[3]
    torch.testing.assert_close(row, torch.cat([cosines[:3], cosines[4:]]))


def test_the_ceiling_rises_with_the_width_to_1(teacher, texts, tmp_path):
    embeddings_data.prepare(tmp_path / "teacher.pt", teacher, texts, 300)
    data = embeddings_data.load(tmp_path / "teacher.pt")
    found = [ceiling(data, width) for width in (2, 8, 24)]
    assert found[0].rho < found[1].rho < found[2].rho and found[2] == pytest.approx((1.0, 1.0), abs=1e-3)


def test_the_best_of_both_kinds_is_chosen_on_validation_and_compared_on_the_test_by_seed():
    def runs(method, validation, tests):
        return [
            Run(method, 8, 0.01, seed, Quality(validation, validation), Quality(test, test / 2), None, 1.0)
            for seed, test in enumerate(tests)
        ]

    # sp is better on the test, but pkt on validation
    every = [*runs("pca", 0.5, (0.4, 0.5)), *runs("sp", 0.5, (0.9, 0.9)), *runs("pkt", 0.6, (0.5, 0.8))]
    said = against_baseline(every, 8)
    assert "PKT against MSE to the teacher's PCA: +0.200 ± 0.100 (+44%)" in said
    assert "+0.100 ± 0.050 (+44%)" in said
    assert against_baseline(runs("sp", 0.5, (0.9, 0.9)), 8) == ""


def test_sentences_are_whole_and_of_6_to_30_words(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""Return the old value of the `cell`. Too short.\n\n    Then: x = 1\n"""\n'
        'def f():\n    "Return the old value of the cell. It is given back as it was. no sentence at all, none"\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b'"""Return the value of this caf\xe9 now."""')
    found = embeddings_data.docstring_sentences([tmp_path])
    assert found == {"Return the old value of the cell."}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0 sentences"), (b"one line\n", "1 sentences"), (b"\xff\xfe\x00binary", "not UTF-8 text")],
)
def test_a_text_that_is_none_is_refused_in_one_line(content, message, teacher, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        distill_embeddings.main(["--model", str(teacher), "--texts", str(file), "--out", str(tmp_path / "plot.png")])


def test_a_teacher_without_weights_and_no_teacher_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    out = ["--out", str(tmp_path / "plot.png")]
    with pytest.raises(SystemExit, match="has no model.safetensors, tokenizer.json: install it again, or give --model"):
        distill_embeddings.main(["--model", str(tmp_path), *out])
    monkeypatch.setattr(embeddings_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no teacher: run `make demo-embeddings`"):
        distill_embeddings.main(out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--widths", "0"], "0 is too small: give at least 1"),
        (["--losses", "kd"], "invalid choice: 'kd'"),
        (["--out", "plot.txt"], "name a .png, .pdf or .svg file"),
        (["--texts", "nowhere.txt"], "there is no such file"),
    ],
)
def test_wrong_options_are_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        distill_embeddings.main(given)
    assert message in capsys.readouterr().err
