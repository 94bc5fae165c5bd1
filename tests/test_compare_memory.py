# SPDX-License-Identifier: Apache-2.0
"""Comparing networks takes no more memory than the features of one batch, for narrow layers and wide, any way taken."""

import pytest
import torch
from test_compare_models import by_hand, compare
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench import analysis_rows
from kdkernels.analysis import sums


def counted_peak(call) -> int:
    """Bytes at the peak of what PyTorch's allocator gives out during a call, compiled code's tensors included."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most


def network(widths, seed) -> nn.Sequential:
    """Blocks of Linear and ReLU, each of its own width; the first takes 24 numbers."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(p, q), nn.ReLU()) for p, q in zip((24, *widths), widths, strict=False)]
    with torch.no_grad():
        for block in blocks:
            weight = block[0].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight.shape[1]) ** 0.5)
    return nn.Sequential(*blocks).eval()


def allowed(a, b, n: int) -> int:
    """The features of all layers for one batch, and nine sums a pair."""
    widths = [block[0].out_features for net in (a, b) for block in net]
    return sum(widths) * n * 4 + 9 * len(a) * len(b) * 8


# feature space (16, 64), small tiles (150, 200), Gram matrices as wide as the rows (256) and narrower (384); both
MIXED = (64, 300, 32, 520, 128, 256, 96, 40, 400, 200) * 2
WIDTHS = [(16,) * 20, (64,) * 20, (150,) * 20, (200,) * 20, (256,) * 20, (384,) * 20, MIXED]


@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: f"{min(widths)} to {max(widths)}")
def test_two_networks_of_20_layers_take_no_more_than_the_features_of_a_batch(widths):
    a, b, x = network(widths, 1), network(widths, 2), torch.randn(512, 24)
    layers = [str(place) for place in range(20)]
    assert counted_peak(lambda: compare(a, b, x.split(256), layers)) <= allowed(a, b, 256)


def test_a_network_and_itself_and_the_number_of_batches_add_nothing():
    a, layers = network((150,) * 20, 1), [str(place) for place in range(20)]
    peaks = [counted_peak(lambda k=k: compare(a, a, torch.randn(k, 256, 24), layers)) for k in (3, 9)]
    assert max(peaks) <= allowed(a, a, 256)
    assert peaks[1] - peaks[0] <= 6 * 256 * 24 * 4  # the samples themselves


def test_the_stated_case_is_within_its_bound():
    case = analysis_rows.cpu_cases()[0]._replace(p=64, n=512)
    a, b = (analysis_rows.network(case.p, seed) for seed in (1, 2))
    layers = [str(place) for place in range(analysis_rows.LAYERS)]
    peak = counted_peak(lambda: compare(a, b, torch.randn(case.n, case.p).split(case.batch), layers))
    assert peak <= analysis_rows.limit(case.p, case.batch)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    ("widths", "way"),
    [((6, 9, 5, 7, 8), "feature_sums"), ((60, 70, 55, 80, 66), "tile_sums"), ((60, 9, 300, 20, 150), "tile_sums")],
)
def test_every_way_gives_the_ratio_of_sums(widths, way, unbiased, monkeypatch):
    """90 rows: the last tile of 32 is not full; groups of the second network are of three layers and of two."""
    taken = []
    for name in ("feature_sums", "tile_sums"):
        real = getattr(sums, name)
        monkeypatch.setattr(sums, name, lambda *a, name=name, real=real: taken.append(name) or real(*a))
    if way == "tile_sums":
        monkeypatch.setattr(sums, "in_feature_space", lambda *_: False)
    a, b, x = network(widths, 1), network(widths[::-1], 2), torch.randn(2, 90, 24) + 1
    found = compare(a, b, x, list("01234"), unbiased=unbiased)
    assert set(taken) == {way} and len(taken) >= 4
    torch.testing.assert_close(found.cka, by_hand(a, b, x, list("01234"), unbiased=unbiased), rtol=0, atol=2e-6)


def test_a_layer_that_is_called_again_after_its_group_was_contracted_counts_with_its_last_call():
    class Loop(nn.Module):
        """`cell` is called before and after the others."""

        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.cell, self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
            self.eval()

        def forward(self, x):
            return self.cell(self.two(self.one(self.cell(x).tanh()).tanh()).tanh())

    a, b, x, names = Loop(0), Loop(1), torch.randn(2, 40, 24), ["cell", "one", "two"]
    torch.testing.assert_close(compare(a, b, x, names).cka, by_hand(a, b, x, names), rtol=0, atol=2e-6)
