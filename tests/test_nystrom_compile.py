# SPDX-License-Identifier: Apache-2.0
"""The Nystrom ops and losses are good citizens of PyTorch: torch.compile without breaks or a word, torch.func."""

import pytest
import torch

import kdkernels as kd

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")
CALLS = {
    "features": lambda x, y, m: kd.nystrom_features(x, y[:4], kernel="rbf"),
    "features sqrt": lambda x, y, m: kd.nystrom_features(x, y[:4], kernel=kd.Laplacian(2.0), whiten="sqrt"),
    "cka": lambda x, y, m: kd.nystrom_cka(x, y, x[:4], y[:3], mask=m),
    "hsic": lambda x, y, m: kd.nystrom_hsic(x, y, x[:4], y[:3], kernel=("polynomial", "cosine"), unbiased=False),
    "transfer": lambda x, y, m: kd.nystrom_transfer(x, y, x[:4], y[:4], kernel=kd.RBF(2.0), mask=m),
    "selected": lambda x, y, m: kd.nystrom_features(x, x[kd.select_landmarks(x, 4, method="greedy", mask=m)]),
    "quality": lambda x, y, m: kd.transfer_quality(x, y, kernel="rbf"),
}


def arguments(n=12, dtype=torch.float32):
    x, y = torch.randn(n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype) + 0.5
    mask = torch.rand(n) > 0.2
    mask[:5] = True
    return x.requires_grad_(), y.requires_grad_(), mask


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def with_centers(make):
    """A loss that has ended an epoch, and learns no more."""
    loss, labels = make(), torch.arange(12) % 3
    loss(torch.randn(12, 4), torch.randn(12, 4), labels)
    loss.end_epoch()
    return loss.eval()


LOSSES = {
    "KDALoss": lambda: with_centers(lambda: kd.losses.KDALoss(3, 4, 4, start_epoch=0)),
    "NystromTransferLoss": lambda: kd.losses.NystromTransferLoss(4),
    "NystromTransferLoss centers": lambda: with_centers(
        lambda: kd.losses.NystromTransferLoss(centers=kd.ClassCenters(3, 4, 4))
    ),
}
SIMILARITY = {
    "similarity": lambda x, y, m: kd.landmark_similarity_loss(x, y, y[:4], x[:4].detach()),
    "similarity torch": lambda x, y, m: kd.landmark_similarity_loss(x, y, y[:4], y[4:8], backend="torch"),
}


# but for what Dynamo tells itself: it makes an object of every autograd.Function it meets
@pytest.mark.filterwarnings("error", "ignore:dynamo_pgo", "ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", [*CALLS, *SIMILARITY, *LOSSES])
def test_compiling_says_nothing(name):
    x, y, mask = arguments()
    if name in LOSSES:
        loss = LOSSES[name]()
        run = lambda x, y: loss(x, y, mask=mask)  # noqa: E731
    else:
        run = lambda x, y: (CALLS | SIMILARITY)[name](x, y, mask)  # noqa: E731
    torch.compile(run, fullgraph=True, backend="aot_eager")(x, y).sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_made_under_inference_mode_is_as_good_as_any(name, compiled):
    loss = LOSSES[name]()
    x, y, mask = arguments()
    with torch.inference_mode():
        teacher = y.clone()
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for how in ({}, {"mask": mask}):
        got, want = (torch.autograd.grad(f(x, t, **how), x) for f, t in ((run, teacher), (loss, y)))
        same(got, want)
        assert want[0].abs().sum() > 0
