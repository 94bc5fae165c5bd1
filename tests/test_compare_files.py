# SPDX-License-Identifier: Apache-2.0
"""What a comparison becomes: a table that comes back, a difference with its error, a picture that says what it is."""

import csv
import dataclasses
import re

import pytest
import torch
from test_compare_models import MEMBERS, compare, images, nets  # noqa: F401

import kdkernels as kd


def comparison(cka, error=None, labels=None, **more) -> kd.Comparison:
    cka = torch.as_tensor(cka, dtype=torch.float64)
    error = torch.full_like(cka, 0.1) if error is None else torch.as_tensor(error, dtype=torch.float64)
    labels = labels or [tuple(f"block.{side}.{k}" for k in range(n)) for side, n in zip("ab", cka.shape, strict=True)]
    facts = {"rows": 1200, "batches": 10, "kernel": "'linear'", "unbiased": True, **more}
    return kd.Comparison(cka, error, *labels, **facts)


@pytest.fixture
def axes():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def test_the_table_holds_the_matrix_and_comes_back(nets, tmp_path):  # noqa: F811
    found = compare(*nets, images(), kernel=kd.RBF(2.0))
    path = found.to_csv(tmp_path / "cka.csv")
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 25
    for line in lines:
        place = MEMBERS.index(line["layer_a"]), MEMBERS.index(line["layer_b"])
        assert float(line["cka"]) == found.cka[place] and float(line["standard_error"]) == found.standard_error[place]
    again = kd.Comparison.load(path)
    assert torch.equal(again.cka, found.cka) and torch.equal(again.standard_error, found.standard_error)
    for field in dataclasses.fields(found)[2:]:
        assert getattr(again, field.name) == getattr(found, field.name)
    unknown = comparison([[torch.nan, 0.5]], [[torch.nan, torch.nan]], unbiased=False)
    again = kd.Comparison.load(unknown.to_csv(path))
    assert again.cka.isnan().tolist() == [[True, False]] and again.unbiased is False


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: "layer_a,layer_b\n1,2\n", lambda text: text.replace("0.25", "a lot"),
    lambda text: text[: text.rindex("block.a.1")], lambda text: text.replace("True", "maybe"),
    lambda text: text.replace("1200", "many"), lambda text: "\n".join(reversed(text.splitlines())),
])  # fmt: skip
def test_a_file_that_is_no_such_table_is_refused(damage, tmp_path):
    path = comparison([[0.25, 0.5], [0.75, 1.0]]).to_csv(tmp_path / "cka.csv")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"cka.csv is no table that Comparison.to_csv wrote"):
        kd.Comparison.load(path)


def test_a_difference_has_the_error_of_two_independent_values():
    one, other = comparison([[0.5, 0.2]], [[0.03, 0.3]], rows=900), comparison([[0.1, 0.6]], [[0.04, 0.4]])
    found = one - other
    torch.testing.assert_close(found.cka, torch.tensor([[0.4, -0.4]], dtype=torch.float64))
    torch.testing.assert_close(found.standard_error, torch.tensor([[0.05, 0.5]], dtype=torch.float64))
    assert repr(found).endswith("CKA difference -0.400 to 0.400 +- 0.500)") and found.rows == 900
    for change in ({"kernel": "'rbf'"}, {"unbiased": False}, {"labels": [("other",), other.labels_b]}):
        with pytest.raises(ValueError, match=r"a - b: (kernel|unbiased|labels_a) is .* in a and .* in b"):
            one - comparison([[0.1, 0.6]], **change)
    with pytest.raises(TypeError):
        one - 0.5


def test_two_runs_on_independent_data_differ_as_the_error_of_their_difference_says(nets):  # noqa: F811
    one, other = (compare(*nets, images(60, 12, seed), ["conv*", "fc"]) for seed in (5, 6))
    found = one - other
    assert 0.1 < (found.cka / found.standard_error).square().mean() < 4


def test_the_text_shows_the_matrix_and_the_nearest_layer():
    found = comparison([[0.5, -0.004, 1.0], [0.25, torch.nan, 0.1]])
    assert found.table().splitlines()[1].split() == ["0", "0.50", "0.00", "1.00"]
    assert found.table().splitlines()[2].split() == ["1", "0.25", "nan", "0.10"]
    assert [line.split()[-1] for line in found.nearest().splitlines()] == ["block.b.2", "block.b.0"]


def test_a_picture_says_what_it_shows(axes):
    found = comparison([[0.5, -0.25, 1.0], [0.25, torch.nan, 0.1]])
    image = found.draw(axes)
    assert axes.get_title() == "unbiased CKA, kernel linear\n1,200 rows in 10 batches"
    assert [t.get_text() for t in axes.texts] == ["0.50", "-0.25", "1.00", "0.25", "nan", "0.10"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("model_b, block.b.*", "model_a, block.a.*")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert image.get_clim() == (-0.25, 1.0)


def colour(image, value):
    return [round(part, 2) for part in image.cmap(image.norm(value))[:3]]


def test_zero_is_white_and_negative_values_are_blue_whatever_the_range(axes):
    for values in ([[0.5, -0.01]], [[-0.3, 0.02]], [[0.2, 0.9]]):
        image = comparison(values).draw(axes)
        assert min(colour(image, 0.0)) > 0.95
        for value in (v for v in values[0] if v):
            red, _, blue = colour(image, value)
            assert (red > blue) == (value > 0)
    image = comparison([[0.2, 0.7, 0.9]]).draw(axes, limits=(0.6, 0.8))
    assert image.get_clim() == (0.6, 0.8) and image.cmap.colorbar_extend == "both"
    assert comparison([[torch.nan]]).draw(axes).get_clim() == (0.0, 1.0)
    with pytest.raises(ValueError, match="limits is .*lowest, highest"):
        comparison([[0.2]]).draw(axes, limits=(1.0, 0.0))


def test_of_many_layers_some_are_named_and_the_picture_says_so(axes):
    comparison(torch.rand(13, 200)).draw(axes, title="", names=("a", "b"))
    assert axes.get_title() == "" and not axes.texts
    assert axes.get_xlabel() == "b, block.b.*, 1 of 3 layers named" and axes.get_ylabel() == "a, block.a.*"
    assert [t.get_text() for t in axes.get_xticklabels()][:3] == ["0", "3", "6"] and len(axes.get_yticks()) == 13


def test_the_files_are_a_png_and_an_svg_of_text_that_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    found = comparison([[0.5, 0.2]])
    png, svg = found.plot(tmp_path / "map", title="two nets")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5_000
    text = svg.read_text()
    assert {"two nets", "0.50", "CKA", "model_b, block.b.*"} <= set(re.findall(r">([^<>\n]+)</text>", text))
    assert "dc:date" not in text and (png.name, svg.name) == ("map.png", "map.svg")
    (only,) = found.plot(tmp_path / "one.svg", title="two nets")
    assert only.read_text() == text and not (tmp_path / "one.png").exists()
