# SPDX-License-Identifier: Apache-2.0
"""Comparing networks where some tokens, positions or samples do not count: the value is that of the others alone."""

import warnings

import pytest
import torch
from test_compare_models import Net, compare, images, outputs
from torch import nn

import kdkernels as kd
from kdkernels.analysis import metric as module

B, T, REAL = 24, 16, 4


class Reader(nn.Module):
    """A token network that reads one entry of the batch; `pool` gives a row a sample."""

    def __init__(self, key, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.key, self.embed, self.mix, self.pool = key, nn.Linear(6, width), nn.Linear(width, 9), nn.Linear(9, 5)
        self.eval()

    def forward(self, a, b, attention_mask):
        x = self.embed({"a": a, "b": b}[self.key])
        x = self.mix(x.relu() + 0 * attention_mask[..., None])
        return self.pool(x.mean(1))


def batches(count=8, real=REAL):
    """Independent inputs for the two; the rest of the tokens is padding, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(B, T, 6, generator=generator)  # noqa: E731
    for _ in range(count):
        mask = (torch.arange(T) < real).expand(B, T).long()
        yield {"a": (draw() + 3) * mask[..., None], "b": (draw() - 3) * mask[..., None], "attention_mask": mask}


@pytest.fixture
def readers():
    return Reader("a", 10, 0), Reader("b", 12, 1)


def hsic(K, L):
    """Song et al. 2012, equation 5."""
    n = len(K)
    K, L = (M - M.diagonal().diag() for M in (K, L))
    total = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(1))
    return total / (n * (n - 3))


def ratio_of_sums(pairs):
    sides = [[x.double() @ x.double().T for x in pair] for pair in pairs]
    kl, kk, ll = (sum(hsic(side[i], side[j]) for side in sides) for i, j in ((0, 1), (0, 0), (1, 1)))
    return kl / (kk * ll).sqrt()


def features(net, name, batch):
    kept = []
    hook = net.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        net(**batch)
    hook.remove()
    return kept[0]


HOW = {"tokens": lambda x: x[:, :REAL].flatten(0, 1), "mean": lambda x: x[:, :REAL].double().mean(1)}


@pytest.mark.parametrize("rows", HOW)
@pytest.mark.parametrize(
    "mask",
    ["attention_mask", lambda batch: batch["attention_mask"].bool(), (torch.arange(T) < REAL).expand(B, T), None],
    ids=["key", "function", "tensor", "its own"],
)
@pytest.mark.filterwarnings("ignore:loader's batches carry")
def test_padding_has_no_part(rows, mask, readers):
    found = compare(*readers, batches(), "mix", rows=rows, mask=mask)
    pairs = [[HOW[rows](features(net, "mix", batch)) for net in readers] for batch in batches()]
    assert found.rows == sum(len(x) for x, _ in pairs)
    assert float(found.cka) == pytest.approx(float(ratio_of_sums(pairs)), abs=2e-6)
    assert abs(found.cka) < 4 * found.standard_error  # they are independent
    if rows == "tokens":
        assert compare(*readers, batches(), "mix", rows=rows, mask=False).cka > 0.5


def test_that_a_batch_s_own_mask_is_used_is_said_once_and_can_be_turned_off(readers):
    with pytest.warns(UserWarning, match="carry attention_mask.*mask=False for all tokens") as caught:
        compare(*readers, batches(), "mix", rows="tokens")
    assert len(caught) == 1 and caught[0].filename == compare.__code__.co_filename
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in ("attention_mask", False):
            compare(*readers, batches(), "mix", rows="tokens", mask=mask)
        compare(*readers, batches(), "mix", rows="flatten")


def test_a_layer_of_samples_counts_those_of_which_a_token_counts(readers):
    def some(batch):
        mask = batch["attention_mask"].clone()
        mask[5:9] = 0
        return mask

    kept = [*range(5), *range(9, B)]
    pairs = [[features(net, "pool", batch)[kept] for net in readers] for batch in batches()]
    for layers in (["mix", "pool"], "pool"):
        found = compare(*readers, batches(), layers, rows="mean", mask=some)
        assert found.rows == len(kept) * 8
        assert float(found.cka[-1, -1]) == pytest.approx(float(ratio_of_sums(pairs)), abs=2e-6)


def test_positions_of_maps_and_samples_are_masked():
    nets, names = (Net(4, 0), Net(6, 1)), ("conv2", "norm")
    where = torch.rand(16, 2, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    which = torch.arange(16) % 3 > 0
    for mask, rows in ((where, "positions"), (which, "positions"), (which, "gap"), (which, None)):
        found = compare(*nets, images(), names, rows=rows, mask=mask)
        pairs = []
        for x in images():
            sides = [outputs(net, names[:1], x)[0] for net in nets]
            if rows == "positions":
                picked = where if mask is where else which[:, None, None].expand(16, 2, 2)
                pairs.append([out.permute(0, 2, 3, 1)[picked] for out in sides])
            else:
                pairs.append([(out.mean((2, 3)) if rows else out.flatten(1))[which] for out in sides])
        assert float(found.cka[0, 0]) == pytest.approx(float(ratio_of_sums(pairs)), abs=2e-6)


def test_each_network_may_have_a_mask_of_its_own(readers):
    found = compare(
        *readers, batches(), "mix", rows=("tokens", "tokens"), mask=("attention_mask", lambda b: b["a"][..., 0] != 0)
    )
    assert torch.equal(found.cka, compare(*readers, batches(), "mix", rows="tokens", mask="attention_mask").cka)
    with pytest.raises(ValueError, match="model_a's layers give 96 rows, model_b's 384"):
        compare(*readers, batches(), "mix", rows="tokens", mask=("attention_mask", False))


def test_a_batch_in_which_too_little_counts_is_left_out(readers):
    data = list(batches())
    data[3]["attention_mask"] = torch.zeros(B, T, dtype=torch.long)
    with pytest.warns(UserWarning, match="batch 4 gives 0 rows and 4 are needed"):
        found = compare(*readers, data, "mix", rows="tokens", mask="attention_mask")
    assert torch.equal(
        found.cka, compare(*readers, data[:3] + data[4:], "mix", rows="tokens", mask="attention_mask").cka
    )


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("padding", ValueError, "mask is 'padding', and loader's batch has a, b, attention_mask"),
        (3, TypeError, "mask is a int: give a bool tensor, a key"),
        (torch.zeros(B, T) - torch.inf, ValueError, "mask is torch.float32 and holds other numbers than 0 and 1"),
        (torch.arange(T).expand(B, T), ValueError, "mask is torch.int64 and holds other numbers than 0 and 1"),
        (torch.ones(B, 5) > 0, ValueError, r"mask has shape \(24, 5\).*\(24,\) or \(24, 16\)"),
        (lambda batch: "all", TypeError, "mask is a str"),
        (("attention_mask",), ValueError, "mask has 1 entries: give one, or a pair"),
    ],
)
def test_a_wrong_mask_is_named_with_the_fix(mask, error, message, readers):
    with pytest.raises(error, match=message):
        compare(*readers, batches(), "mix", rows="tokens", mask=mask)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_of_a_matrix_that_do_not_count_have_no_part(kernel, backend):
    torch.manual_seed(0)
    xs, mask = [torch.randn(40, p, dtype=torch.float64) for p in (6, 30)], torch.arange(40) % 3 > 0
    ys = [xs[0].tanh(), torch.randn(40, 7).double()]
    expected = kd.cka_matrix([x[mask] for x in xs], [y[mask] for y in ys], kernel=kernel)
    xs[1][~mask] = torch.nan
    found = kd.cka_matrix(xs, ys, mask=mask, kernel=kernel, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="have 2 rows that count: CKA .* needs at least 4"):
        kd.cka_matrix(xs, ys, mask=torch.arange(40) < 2)
    with pytest.raises(TypeError, match="mask is torch.int64"):
        kd.cka_matrix(xs, ys, mask=mask.long())


@pytest.mark.parametrize("collected", [False, True])
def test_a_metric_sees_the_rows_that_count(collected, monkeypatch):
    if collected:
        pytest.importorskip("torchmetrics")
    else:
        monkeypatch.setattr(module, "_collected", lambda: None)
    torch.manual_seed(0)
    x, y, masks = torch.randn(3, 30, 5), torch.randn(3, 30, 8), torch.rand(3, 30) < 0.6
    alone, masked, called = (kd.CKAMetric() for _ in range(3))
    for a, b, mask in zip(x, y, masks, strict=True):
        alone.update(a[mask], b[mask])
        a, b = (torch.where(mask[:, None], side, torch.nan) for side in (a, b))
        masked.update(a, b, mask=mask)
        torch.testing.assert_close(called(a, b, mask), kd.cka(a[mask], b[mask]), rtol=0, atol=1e-6)
    assert alone.compute() == masked.compute() == called.compute()
    with pytest.warns(UserWarning, match="a batch of 3 rows"):
        masked.update(x[0], y[0], mask=torch.arange(30) < 3)
    with pytest.raises(ValueError, match=r"mask has shape \(7,\)"):
        masked.update(x[0], y[0], mask=torch.ones(7, dtype=torch.bool))
