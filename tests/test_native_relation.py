# SPDX-License-Identifier: Apache-2.0
"""The compiled triplets: the same bits for any number of threads, every row length, refusals that say why."""

import pytest
import torch

import kdkernels as kd
from kdkernels import native
from kdkernels.registry import OPS
from kdkernels.relation import pairs, torch_impl

why = native.lack("cpu", OPS["rkd_angle"].native)
pytestmark = [pytest.mark.native, pytest.mark.skipif(why is not None, reason=why or "loaded")]


def squares(n, p=6, G=1):
    x = torch.randn(G, n, p)
    return pairs.distances(x, None, torch.full((G,), n).double()).square


# whole vectors of every width and what is left of them; rows are folded in pairs, so odd and even
@pytest.mark.parametrize("n", [3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65])
def test_every_length_of_a_row_gives_what_pytorch_gives(n):
    x, y = squares(n, G=2), squares(n, G=2)
    y[1, 2, 1] = y[1, 1, 2] = 0  # two samples that are one, on one side alone
    value, (V, U) = torch_impl._triplets(x, y, 3)
    for k, (first, second, want) in enumerate(((x, y, V), (y, x, U))):
        got, weights = torch.ops.kdkernels.angle_triplets(first, second, True)
        torch.testing.assert_close(got, value, rtol=1e-13, atol=0)
        assert weights.equal(weights.mT) and (weights.diagonal(dim1=1, dim2=2) == 0).all()
        want = want.clone()
        want.diagonal(dim1=1, dim2=2).zero_()
        if k == 1:  # the weight of a pair at distance 0 meets a difference of 0: either may be
            assert weights[1, 1, 2] == 0
            want[1, 1, 2] = want[1, 2, 1] = 0
        torch.testing.assert_close(weights, want, rtol=1e-11, atol=1e-11)
        alone, nothing = torch.ops.kdkernels.angle_triplets(first, second, False)
        assert alone.equal(got) and nothing.numel() == 0


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, y = torch.randn(131, 20), torch.randn(131, 30)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.kdkernels.angle_triplets(squares_of(x), squares_of(y), True))
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def squares_of(x):
    """From differences: a product's own bits may depend on its threads."""
    return (x[None] - x[:, None]).double().square().sum(-1)[None]


@pytest.mark.parametrize("side", [0, 1], ids=["x", "y"])
def test_nan_on_either_side_reaches_value_and_weights(side):
    both = [squares(9), squares(9)]
    both[side][0, 3, 4] = both[side][0, 4, 3] = float("nan")
    value, V = torch.ops.kdkernels.angle_triplets(*both, True)
    assert value.isnan().all() and V[0, 3, 4].isnan() and V[0, 3, 5].isnan()


def test_auto_takes_the_compiled_triplets():
    x = torch.randn(5, 3)
    assert kd.explain("rkd_angle", x, x).backend == "cpp"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": torch.zeros(1, 4, 4)}, "x must be contiguous float64 squared distances"),
        ({"y": torch.zeros(1, 4, 5).double()}, r"y must be contiguous float64 squared distances \[G, n, n\]"),
        ({"y": torch.zeros(4, 4).double()}, "y must be contiguous float64 squared distances"),
        ({"y": torch.zeros(1, 5, 5).double()}, r"y is \[1, 5, 5\] and x is \[1, 4, 4\]"),
    ],
)
def test_the_operator_refuses_what_it_cannot_read(given, message):
    given = {"x": torch.zeros(1, 4, 4).double(), "y": torch.zeros(1, 4, 4).double(), **given}
    with pytest.raises(ValueError, match=message):
        torch.ops.kdkernels.angle_triplets(given["x"], given["y"], True)
