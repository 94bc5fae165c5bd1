# SPDX-License-Identifier: Apache-2.0
"""Which layers of two networks are compared: patterns, default layers of a language model, what is left out."""

import warnings

import pytest
import torch
from test_compare_models import Net, compare, images
from torch import nn


class Attention(nn.Module):
    """Its dropout stands there and is not called, as where an attention kernel does the dropout itself."""

    def __init__(self, width):
        super().__init__()
        self.query, self.dropout = nn.Linear(width, width), nn.Dropout()

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(self.query(x), x, x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.output = Attention(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.output(self.attention(x)).tanh()


class Encoder(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layer = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return x


class LikeBert(nn.Module):
    """A BERT's parts that no comparison can take: positions are one row for all samples, the pooler has no tokens."""

    def __init__(self, width, seed, depth=5):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.positions = nn.Embedding(50, width), nn.Embedding(8, width)
        self.encoder, self.pooler = Encoder(width, depth), nn.Linear(width, width)
        self.eval()

    def forward(self, input_ids):
        x = self.encoder(self.words(input_ids) + self.positions(torch.arange(8)[None]))
        return {"last_hidden_state": x, "pooler_output": self.pooler(x[:, 0])}


@pytest.fixture
def berts():
    return LikeBert(12, 0), LikeBert(16, 1)


def tokens():
    return ({"input_ids": ids} for ids in torch.randint(50, (3, 10, 8), generator=torch.Generator().manual_seed(0)))


BLOCKS = [f"encoder.layer.{k}.{part}" for k in range(5) for part in ("attention.query", "output")]


@pytest.mark.parametrize(("rows", "more"), [("tokens", []), ("mean", ["pooler"])])
def test_default_layers_are_all_that_can_be_compared_and_the_rest_is_named_once(berts, rows, more):
    with pytest.warns(UserWarning, match="left out of the comparison: of both models ") as caught:
        found = compare(*berts, tokens(), rows=rows)
    assert found.labels_a == found.labels_b == ("words", *BLOCKS, *more)
    assert len(caught) == 1 and found.cka.isfinite().all()
    text = str(caught[0].message)
    assert "positions (one row for all samples)" in text
    assert "encoder.layer.*.attention.dropout (5) (not called)" in text
    assert ("pooler (no tokens)" in text) == (rows == "tokens")


def test_a_layer_that_once_gave_rows_is_not_left_out():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(6, 6), nn.Tanh()

        def forward(self, x):
            return self.linear(self.act(x)) * self.act(self.linear.bias[None])

    net = Shared().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(net, net, torch.randn(3, 10, 6)).labels_a == ("linear", "act")


def test_a_star_stays_within_dots_and_two_cross_them(berts):
    blocks = tuple(f"encoder.layer.{k}" for k in range(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(*berts, tokens(), "encoder.layer.*", rows="tokens").labels_a == blocks
        inside = compare(*berts, tokens(), "encoder.**.query", rows="tokens").labels_a
        assert inside == compare(*berts, tokens(), "**.query", rows="tokens").labels_b == tuple(BLOCKS[::2])
        assert compare(*berts, tokens(), "w?rd[s]", rows="tokens").labels_a == ("words",)
    with pytest.warns(UserWarning, match=r"encoder.layer, encoder.layer.\*.attention.dropout \(5\) \(not called\)"):
        everything = compare(*berts, tokens(), "encoder.**", rows="tokens").labels_a
    assert len(everything) == 5 * 4 and "encoder" not in everything


def test_what_is_named_must_be_called_and_have_rows(berts):
    for name, message in (
        ("encoder.layer.0.attention.dropout", "model_a does not call encoder.layer.0.attention.dropout"),
        ("positions", "model_a.positions gives 8 rows .* one row for all samples: leave it out"),
        ("pooler", r"gives 10 rows with rows='tokens', another layer 80: .* 'gap' \(maps\) or 'mean' \(tokens\)"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(*berts, tokens(), ["words", name], rows="tokens")


def test_a_list_for_both_models_may_name_what_one_of_them_lacks(berts):
    other = Net(4, 0)
    layers, rows = ["encoder.layer.*", "conv?"], ("mean", "gap")
    pairs = [{"input_ids": ids["input_ids"], "x": x[:10]} for ids, x in zip(tokens(), images(), strict=False)]
    found = compare(berts[0], other, pairs, layers, rows=rows)
    assert len(found.labels_a) == 5 and found.labels_b == ("conv1", "conv2")
    with pytest.raises(ValueError, match=r"model_b has none of encoder.layer.\*; it has conv1, act"):
        compare(berts[0], other, pairs, "encoder.layer.*", rows=rows)
    with pytest.raises(ValueError, match=r"no layer 'nowhere'; it has words, .*encoder.layer.\* \(5\)"):
        compare(berts[0], other, pairs, [*layers, "nowhere"], rows=rows)
    with pytest.raises(ValueError, match=r"model_b has no layer 'encoder.layer.\*'"):
        compare(berts[0], other, pairs, (["encoder.layer.*"], layers), rows=rows)


def test_rows_that_a_comparison_refuses_are_not_recommended(berts):
    with pytest.raises(ValueError, match="rows is 'groups'") as refused:
        compare(*berts, tokens(), rows="groups")
    with pytest.raises(ValueError, match="pass rows='tokens', 'mean' or 'flatten'") as without:
        compare(*berts, tokens(), "words")
    with pytest.raises(ValueError, match=r"model_a.words has shape \(10, 8, 12\) with rows='gap'") as gap:
        compare(*berts, tokens(), "words", rows="gap")
    for error in (refused, without, gap):
        assert "groups" not in str(error.value).replace("rows is 'groups'", "")


def test_a_loader_that_is_no_iterable_is_named(berts):
    with pytest.raises(TypeError, match="loader is a NoneType: give an iterable of batches"):
        compare(*berts, None)
