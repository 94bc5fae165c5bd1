# SPDX-License-Identifier: Apache-2.0
"""CKA between the layers of two networks: its value and error, layers, rows, batches, bad input."""

import weakref
from collections import namedtuple

import pytest
import torch
from torch import nn

import kdkernels as kd

MEMBERS = ("conv1", "act", "conv2", "norm", "fc")


class Net(nn.Module):
    """Convolutions with an activation that is in place and called twice, and a head."""

    def __init__(self, channels, seed, side=6):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(2, channels, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, 3 * channels, 3, stride=2)
        self.norm = nn.BatchNorm2d(3 * channels)
        self.fc = nn.Linear(3 * channels, 7)
        self.eval()

    def forward(self, x):
        x = self.norm(self.conv2(self.act(self.conv1(x))))
        return self.fc(self.act(x).mean((2, 3)))


@pytest.fixture
def nets():
    return Net(4, 0), Net(6, 1)


def images(batches=6, n=16, seed=5):
    """Images of varied strength, so that layers have something in common."""
    generator = torch.Generator().manual_seed(seed)
    strength = 3 * torch.rand(batches, n, 2, 1, 1, generator=generator)
    return torch.randn(batches, n, 2, 6, 6, generator=generator) * strength


def outputs(model, names, x):
    """Copies of what the layers give for x, of the last call."""
    kept = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kept.update({name: out.clone()}))
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return [kept[name] for name in names]


def by_hand(a, b, batches, names, rows=lambda out: out.flatten(1), **how):
    """Ratio of the sums over batches, pair by pair, from the textbook."""
    total = 0
    for x in batches:
        sides = [[rows(out).double() for out in outputs(net, names, x)] for net in (a, b)]
        one = lambda x, y: kd.hsic(x, y, backend="reference", **how)  # noqa: E731
        total = total + torch.stack(
            [torch.stack([torch.stack([one(x, y), one(x, x), one(y, y)]) for y in sides[1]]) for x in sides[0]]
        )
    kl, kk, ll = total.unbind(-1)
    return kl / (kk * ll).sqrt()


def compare(*arguments, **options):
    return kd.compare_models(*arguments, **{"progress": False, **options})


@pytest.mark.parametrize("how", [{}, {"kernel": "rbf"}, {"unbiased": False}, {"kernel": kd.Polynomial()}])
def test_it_is_the_ratio_of_sums_of_every_pair_of_layers(nets, how):
    data = images()
    found = compare(*nets, data, list(MEMBERS), **how)
    assert found.labels_a == found.labels_b == MEMBERS and found.cka.shape == (5, 5)
    assert (found.rows, found.batches) == (96, 6)
    torch.testing.assert_close(found.cka, by_hand(*nets, data, MEMBERS, **how), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rows", "as_rows"),
    [
        ("gap", lambda out: out.mean((2, 3)) if out.dim() == 4 else out),
        ("flatten", lambda out: out.flatten(1)),
        ("positions", lambda out: out.flatten(2).mT.flatten(0, 1)),
    ],
)
def test_convolution_features_become_rows_as_asked(nets, rows, as_rows):
    names = ("conv2", "norm")
    found = compare(*nets, images(), names, rows=rows)
    torch.testing.assert_close(found.cka, by_hand(*nets, images(), names, as_rows), rtol=0, atol=2e-6)


def test_narrow_layers_of_a_large_batch_take_feature_space_and_agree(nets):
    data = images(2, 400)
    found = compare(*nets, data, list(MEMBERS), rows="gap")
    pooled = lambda out: out.mean((2, 3)) if out.dim() == 4 else out  # noqa: E731
    torch.testing.assert_close(found.cka, by_hand(*nets, data, MEMBERS, pooled), rtol=0, atol=2e-6)
    # a wide layer among them takes all of them to Gram matrices
    mixed = compare(*nets, data[:, :40], ["conv1", "fc"])
    torch.testing.assert_close(mixed.cka, by_hand(*nets, data[:, :40], ("conv1", "fc")), rtol=0, atol=2e-6)


def test_a_network_beside_a_tokens_network_has_rows_of_its_own(nets):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(12, 10)

        def forward(self, x):
            return self.embed(x.flatten(2).reshape(len(x), 6, 12))

    tokens = Tokens().eval()
    found = compare(nets[0], tokens, images(), (["conv1"], "embed"), rows=("gap", "mean"))
    assert found.labels_a == ("conv1",) and found.labels_b == ("embed",) and found.cka.isfinite().all()
    with pytest.raises(ValueError, match="the output of model_b.embed has shape .* pass rows='tokens'"):
        compare(nets[0], tokens, images(), (["conv1"], "embed"))
    with pytest.raises(ValueError, match="model_a's layers give 16 rows, model_b's 96"):
        compare(nets[0], tokens, images(), (["conv1"], "embed"), rows=("gap", "tokens"))


def test_it_is_within_its_error_of_the_value_of_all_data():
    a, b, data = Net(4, 0), Net(6, 1), images(60, 12)
    found = compare(a, b, data, ["conv*", "fc"])
    every = [outputs(net, found.labels_a, data.flatten(0, 1)) for net in (a, b)]
    everything = kd.cka_matrix(*([out.flatten(1) for out in side] for side in every))
    distance = (found.cka - everything).abs() / found.standard_error
    assert found.standard_error.max() < 0.05
    assert distance.max() < 4 and distance.square().mean() < 3
    biased = compare(a, b, data, ["conv*", "fc"], unbiased=False).cka
    assert ((biased - everything) > 4 * found.standard_error).any()


def test_two_data_sets_differ_as_the_standard_error_says():
    a, b = Net(4, 0), Net(6, 1)
    one, other = (compare(a, b, images(60, 12, seed), ["conv*", "fc"]) for seed in (5, 6))
    scaled = (one.cka - other.cka) / (one.standard_error.square() + other.standard_error.square()).sqrt()
    assert 0.1 < scaled.square().mean() < 4
    assert compare(a, b, images(1), "fc").standard_error.isnan().all()


def test_a_model_and_itself_are_one_on_the_diagonal_and_run_once(nets):
    a, calls = nets[0], []
    a.register_forward_hook(lambda *_: calls.append(1))
    found = compare(a, a, images())
    torch.testing.assert_close(found.cka.diagonal(), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.cka, found.cka.T)
    assert len(calls) == 6
    other = compare(a, a, images(), (["conv1"], ["fc"]))
    torch.testing.assert_close(other.cka[0, 0], found.cka[0, 4], rtol=0, atol=1e-6)


def test_layers_are_named_matched_or_all_leaves_in_the_order_of_the_model(nets):
    assert compare(*nets, images()).labels_a == MEMBERS
    assert compare(*nets, images(), ["fc", "conv?"]).labels_b == ("conv1", "conv2", "fc")
    assert compare(*nets, images(), "norm").labels_a == ("norm",)
    pair = compare(*nets, images(), (["conv*"], ["fc", "act"]))
    assert pair.labels_a == ("conv1", "conv2") and pair.labels_b == ("act", "fc")


def test_labels_follow_the_model_where_layers_are_called_in_another_order():
    class Backwards(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.last, self.first, self.unused = nn.Linear(8, 3), nn.Linear(72, 8), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)).tanh())

    a, b, data = Backwards(0).eval(), Backwards(1).eval(), images()
    with pytest.warns(UserWarning, match=r"of both models unused \(not called\)"):
        found = compare(a, b, data)
    assert found.labels_a == found.labels_b == ("last", "first")
    torch.testing.assert_close(found.cka, by_hand(a, b, data, found.labels_a), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="does not call unused"):
        compare(a, b, data, ["first", "unused"])


def test_unknown_layers_are_named_with_those_that_exist(nets):
    with pytest.raises(ValueError, match=r"model_b has no layer 'head\*'; it has conv1, act, conv2, norm, fc"):
        compare(*nets, images(), (["fc"], ["head*"]))
    for wrong, error in (([], ValueError), (3, TypeError), (["fc", 3, "act"], TypeError)):
        with pytest.raises(error, match="layers"):
            compare(*nets, images(), wrong)


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: Pair(x, torch.zeros(len(x))),
        lambda x: {"x": x, "label": torch.zeros(len(x))},
        lambda x: ({"x": x}, torch.zeros(len(x))),
    ],
)
def test_batches_may_be_tuples_or_dicts(nets, wrap):
    expected = compare(*nets, images(), "fc").cka
    assert torch.equal(compare(*nets, map(wrap, images()), "fc").cka, expected)


def test_inputs_picks_from_a_batch_that_fits_nothing_else(nets):
    batches = [{"image": x, "label": 0} for x in images()]
    with pytest.raises(ValueError, match="dicts of image, label, and model_a.forward takes x: pass inputs="):
        compare(*nets, batches, "fc")
    found = compare(*nets, batches, "fc", inputs=lambda batch: batch["image"])
    assert torch.equal(found.cka, compare(*nets, images(), "fc").cka)
    with pytest.raises(TypeError, match="loader gives a str"):
        compare(*nets, ["x"], "fc")


def test_of_an_output_that_is_a_tuple_or_a_dict_the_first_tensor_counts():
    class Odd(nn.Module):
        def forward(self, x):
            return {"nothing": None, "pair": (x.flatten(1), x.mean())}

    class Empty(nn.Module):
        def forward(self, x):
            return "no tensor"

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.odd, self.empty = nn.Identity(), Odd(), Empty()

        def forward(self, x):
            return self.odd(self.plain(x)), self.empty(x)

    net = Holder().eval()
    with pytest.warns(UserWarning, match=r"of model_a empty \(no features\)"):
        found = compare(net, net, images())
    assert found.labels_a == ("plain", "odd")
    assert found.cka[0, 1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(TypeError, match="the output of model_a.empty is a str without a tensor"):
        compare(net, net, images(), "empty")


def test_a_small_later_batch_is_left_out_with_one_warning_and_a_small_first_one_is_an_error(nets):
    whole = images()
    with pytest.warns(UserWarning, match="batch 4 gives 3 rows and 4 are needed.*drop_last=True") as caught:
        found = compare(*nets, [*whole[:3], whole[0, :3], *whole[3:], whole[1, :2]], "fc")
    expected = compare(*nets, whole, "fc")
    assert [w.filename for w in caught] == [compare.__code__.co_filename] and found.batches == 6 and found.rows == 96
    assert torch.equal(found.cka, expected.cka) and torch.equal(found.standard_error, expected.standard_error)
    with pytest.raises(ValueError, match="first batch gives 2 rows, .* at least 4: use a larger batch_size"):
        compare(*nets, whole[:, :2], "fc")
    with pytest.raises(ValueError, match="loader gave no batch"):
        compare(*nets, [], "fc")


def test_models_in_training_mode_warn_and_stay_in_it(nets):
    nets[1].train()
    with pytest.warns(UserWarning, match=r"model_b is in training mode.*model_b.eval\(\)") as caught:
        compare(*nets, images(), "fc")
    assert len(caught) == 1 and nets[1].training and nets[1].conv1.training and not nets[0].training


def test_hooks_are_gone_afterwards_also_after_an_error(nets):
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("the model itself fails")

    compare(*nets, images())
    nets[1].act = Failing()
    with pytest.raises(RuntimeError, match="the model itself fails"):
        compare(*nets, images(), "conv1")
    for net in nets:
        assert all(not module._forward_hooks for module in net.modules())


def test_outputs_of_all_layers_never_exist_together():
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10))).eval()
    alive, most = [], []

    def watch(_module, _inputs, output):
        alive.append(weakref.ref(output))
        most.append(sum(ref() is not None for ref in alive))

    for layer in net:
        layer.register_forward_hook(watch)
    compare(net, net, torch.randn(3, 32, 64))
    assert max(most) <= 2


def test_layers_with_other_rows_than_the_rest_are_named(nets):
    with pytest.raises(ValueError, match="model_a.conv2 gives 64 rows with rows='positions', another layer 576"):
        compare(*nets, images(), "conv?", rows="positions")
    with pytest.raises(ValueError, match="rows is 'groups'"):
        compare(*nets, images(), "conv?", rows="groups")
    with pytest.raises(ValueError, match="rows is 'pixels'"):
        compare(*nets, images(), "conv?", rows="pixels")


def test_autocast_rounds_in_the_models_and_not_in_the_comparison(nets):
    with torch.autocast("cpu", torch.bfloat16):
        found = compare(*nets, images(), ["conv1", "fc"])
        expected = by_hand(*nets, images(), ("conv1", "fc"))
    torch.testing.assert_close(found.cka, expected, rtol=0, atol=2e-6)


def test_a_nan_stays_in_its_layer(nets):
    expected = compare(*nets, images(), ["conv1", "fc"])
    with torch.no_grad():
        nets[1].fc.weight[0, 0] = torch.nan
    found = compare(*nets, images(), ["conv1", "fc"])
    assert found.cka[:, 1].isnan().all() and torch.equal(found.cka[:, 0], expected.cka[:, 0])
    assert "CKA nan" not in repr(found) and found.nearest().count("conv1") == 3
