# SPDX-License-Identifier: Apache-2.0
"""CKA between the layers of two networks, forward passes included, and what it is measured against.

eager      the loop of the public packages, written anew: hooks keep all features of a batch; for each pair of layers
           the Gram matrix of the second one again, and HSIC_1 by products of n x n matrices with a trace
algebra    the same with each Gram matrix once a layer and elementwise sums a pair

The networks are 20 blocks of Linear and ReLU; the first input of a case holds the samples, the second nothing. There is
no gradient, so a step is the forward phase. Contenders and op do the same forward passes: the part that cannot shrink.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import kdkernels as kd

from .case import Target

LAYERS = 20


class AnalysisCase(NamedTuple):
    name: str
    n: int  # samples
    p: int  # width of every layer
    batch: int
    targets: tuple[Target, ...] = ()
    quick: bool = False
    op: str = "cka"  # whose contract has to hold
    kernel: str = "linear"
    dtype: str = "float32"
    family: str = "analysis"
    regime: str = "networks"
    sigma: None = None
    options: dict = {}

    @property
    def rows(self) -> int:
        return self.n

    @property
    def shape(self) -> dict:
        return {"layers": LAYERS, "n": self.n, "p": self.p, "batch": self.batch}

    @property
    def item(self) -> int:
        return 4

    def smaller(self) -> AnalysisCase:
        return self._replace(n=2 * self.batch)

    def work(self, phase: str) -> tuple[int, int]:
        """Weights and samples read once a batch; forward passes, Gram matrices, products of all pairs."""
        if phase == "bwd":
            return 0, 0
        batches = self.n // self.batch
        moved = (self.n * self.p + batches * 2 * LAYERS * self.p**2) * self.item
        forward = 2 * LAYERS * 2 * self.n * self.p**2
        grams = 2 * LAYERS * self.n * self.batch * self.p
        return moved, forward + grams + 2 * LAYERS**2 * self.n * self.batch


def limit(p: int, batch: int) -> int:
    """Bytes of the features of all layers for one batch, and of nine sums a pair of layers."""
    return 2 * LAYERS * batch * p * 4 + 9 * LAYERS**2 * 8


def network(p: int, seed: int) -> nn.Sequential:
    """Scaled so that the features of the last block still differ from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(p, p), nn.ReLU()) for _ in range(LAYERS)]
    with torch.no_grad():
        for block in blocks:
            block[0].weight.copy_(torch.randn(p, p, generator=generator) * (2 / p) ** 0.5)
            block[0].bias.zero_()
    return nn.Sequential(*blocks).eval().requires_grad_(False)


def draw(case: AnalysisCase, device: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.n, case.p, generator=generator).to(device), torch.zeros(1, 1, device=device)


def names(case: AnalysisCase, device: str, compiled: bool) -> list[str]:
    return ["eager", "algebra"]


def _with_networks(case: AnalysisCase, function):
    """function(a, b, batches), the networks made once on the device of the first call."""
    known = {}

    def call(x, _):
        if x.device not in known:
            known[x.device] = [network(case.p, seed).to(x.device) for seed in (1, 2)]
        with torch.no_grad():
            return function(*known[x.device], x.detach().split(case.batch))

    return call


def ours(case: AnalysisCase, backend: str):
    layers = [str(place) for place in range(LAYERS)]
    how = {"progress": False, "backend": backend}
    return _with_networks(case, lambda a, b, batches: kd.compare_models(a, b, batches, layers, **how).cka)


def contender(case: AnalysisCase, name: str):
    return _with_networks(case, {"eager": _loop, "algebra": _once_a_layer}[name])


def _features(net, x):
    kept = []
    hooks = [block.register_forward_hook(lambda _module, _inputs, out: kept.append(out.flatten(1))) for block in net]
    net(x)
    for hook in hooks:
        hook.remove()
    return kept


def _ratio(total):
    return total[..., 0] / (total[..., 1].sqrt() * total[..., 2].sqrt())


def _hsic(K, L):
    n, ones = len(K), K.new_ones(len(K), 1)
    value = torch.trace(K @ L)
    value += ((ones.T @ K @ ones) @ (ones.T @ L @ ones)).item() / ((n - 1) * (n - 2))
    value -= (ones.T @ K @ (L @ ones)).item() * 2 / (n - 2)
    return (value / (n * (n - 3))).item()


def _gram(x):
    return (x @ x.T).fill_diagonal_(0)


def _loop(a, b, batches):
    total = torch.zeros(LAYERS, LAYERS, 3)
    for x in batches:
        first, second = _features(a, x), _features(b, x)
        for i, features in enumerate(first):
            K = _gram(features)
            total[i, :, 1] += _hsic(K, K)
            for j, others in enumerate(second):
                L = _gram(others)
                total[i, j, 0] += _hsic(K, L)
                total[i, j, 2] += _hsic(L, L)
    return _ratio(total)


def _hsic_elementwise(K, L):
    n = len(K)
    cross = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(0))
    return ((K * L).sum() + cross) / (n * (n - 3))


def _once_a_layer(a, b, batches):
    total = 0
    for x in batches:
        Ks, Ls = ([_gram(f) for f in _features(net, x)] for net in (a, b))
        kk, ll = (torch.stack([_hsic_elementwise(K, K) for K in side]) for side in (Ks, Ls))
        kl = torch.stack([torch.stack([_hsic_elementwise(K, L) for L in Ls]) for K in Ks])
        total = total + torch.stack([kl, kk[:, None].expand_as(kl), ll.expand_as(kl)], -1)
    return _ratio(total)


def _case(n: int, p: int, batch: int, *targets: Target, **more) -> AnalysisCase:
    return AnalysisCase(f"compare 20 x 20 layers, n {n}, p {p}, batch {batch}", n, p, batch, targets, **more)


def cpu_cases() -> list[AnalysisCase]:
    bytes_at_most = Target("bytes", "a limit", limit(512, 256))
    return [
        _case(10_000, 256, 256, Target("speed", "eager", 5.0)),
        _case(10_000, 64, 256, Target("speed", "eager", 5.0)),  # narrow: its bytes are counted in the tests
        _case(10_000, 512, 256, bytes_at_most),
        _case(2048, 64, 256, quick=True),
        _case(2048, 512, 64),
    ]


def cuda_cases() -> list[AnalysisCase]:
    """None: on a GPU it is PyTorch's products, and a driver that measures backends would find one."""
    return []
