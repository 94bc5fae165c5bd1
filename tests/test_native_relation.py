# SPDX-License-Identifier: Apache-2.0
"""The compiled triplets: the same bits for any number of threads, every row length, refusals that say why."""

import pytest
import torch
from conftest import needs_native

import kdkernels as kd
from kdkernels.registry import OPS
from kdkernels.relation import pairs, torch_impl

pytestmark = needs_native(*OPS["rkd_angle"].native)


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


def test_the_bits_do_not_depend_on_the_number_of_threads(same_bits):
    x, y = squares_of(torch.randn(131, 20)), squares_of(torch.randn(131, 30))
    same_bits(lambda: torch.ops.kdkernels.angle_triplets(x, y, True))


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


# ---- PKT and RKD-D in one call: `relate_pairs`

BOTH = ("rkd_distance", "pkt")


def value_and_gradients(kind, x, y, backend, **options):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = getattr(kd, kind)(x, y, backend=backend, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), (x, y))


def assert_near(got, want, error):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= error * b.norm()


# whole vectors and what is left of them; one band of a product, several, and a last one that is not whole
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("n", [3, 7, 8, 9, 16, 31, 64, 127, 128, 136, 200, 257])
def test_every_number_of_samples_gives_what_float64_gives(kind, n):
    x, y = torch.randn(n, 70) + 3, torch.randn(n, 33)
    got = value_and_gradients(kind, x, y, "cpp")
    want = value_and_gradients(kind, x.double(), y.double(), "torch")
    assert_near(got, want, 1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_rows_wider_than_a_block_of_columns_are_added_up(kind):
    """2^18 numbers a block: 9 rows, padded to 16, of more than 2^14 columns."""
    x, y = torch.randn(9, 40000), torch.randn(9, 17000) + 1
    want = value_and_gradients(kind, x.double(), y.double(), "torch")
    assert_near(value_and_gradients(kind, x, y, "cpp"), want, 1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_groups_are_each_their_own_and_masked_rows_are_not_there(kind):
    x, y, mask = torch.randn(3, 13, 9), torch.randn(3, 13, 20), torch.rand(3, 13) > 0.3
    mask[:, :4] = True
    x[~mask] = float("nan")
    value, dx, dy = value_and_gradients(kind, x, y, "cpp", mask=mask)
    assert (dx[~mask] == 0).all() and (dy[~mask] == 0).all()
    for g in range(3):
        alone = value_and_gradients(kind, x[g, mask[g]].double(), y[g, mask[g]].double(), "torch")
        assert_near((value[g], dx[g, mask[g]], dy[g, mask[g]]), alone, 1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_clusters_of_near_samples_keep_their_distances(size):
    """Most pairs lie closer than an eighth of their norms: their part of the gradient is that of their difference."""
    x = (torch.randn(8, 1, 20) + 1e-4 * torch.randn(8, 6, 20)).flatten(0, 1) * size
    y = torch.randn(48, 12)
    want = value_and_gradients("rkd_distance", x.double(), y.double(), "torch")
    assert_near(value_and_gradients("rkd_distance", x, y, "cpp"), want, 1e-6)


def test_norms_of_any_size_beside_each_other_keep_their_similarities():
    x, y = torch.randn(40, 16) + 1, torch.randn(40, 9)
    x *= torch.logspace(-6, 6, 40)[:, None]
    got = value_and_gradients("pkt", x, y, "cpp")
    want = value_and_gradients("pkt", x.double(), y.double(), "torch")
    for i in range(40):  # each row by its own size
        assert_near((got[1][i],), (want[1][i],), 1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_pairs_do_not_depend_on_the_number_of_threads(kind, threads):
    x, y = torch.randn(2, 61, 50), torch.randn(2, 61, 20)
    results = []
    for count in (1, 1, 2, 3):
        threads(count)
        results.append(value_and_gradients(kind, x, y, "cpp"))
    assert all(a.equal(b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:  # a product's own bits may depend on its threads
        assert_near(other, [r.double() for r in results[0]], 1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": torch.zeros(1, 4, 3).double()}, r"relate_pairs: x must be float32 rows \[G, n, p\]"),
        ({"y": torch.zeros(4, 3)}, "relate_pairs: y must be float32 rows"),
        ({"y": torch.zeros(1, 3, 4).mT}, "dense along p"),
        ({"y": torch.zeros(1, 5, 3)}, "y has 1 x 5 rows and x 1 x 4"),
        ({"mask": torch.ones(1, 3) > 0}, r"mask must be a contiguous bool \[1, 4\]"),
        ({"mask": torch.ones(1, 4)}, r"mask must be a contiguous bool \[1, 4\]"),
    ],
)
def test_pairs_refuse_what_they_cannot_read(given, message):
    given = {"x": torch.zeros(1, 4, 3), "y": torch.zeros(1, 4, 3), "mask": None, **given}
    with pytest.raises(ValueError, match=message):
        torch.ops.kdkernels.relate_pairs(given["x"], given["y"], given["mask"], True, 1)


def test_a_gradient_is_scaled_by_groups_and_0_from_above_silences_nan():
    slope, grad = torch.randn(3, 4, 5), torch.tensor([2.0, 0.0, float("nan")])
    slope[1, 2] = float("nan")
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 3] = False
    dx = torch.ops.kdkernels.scale_pairs(grad, slope, mask)
    assert (
        dx[0, :3].equal(2 * slope[0, :3]) and (dx[1] == 0).all() and (dx[:, 3] == 0).all() and dx[2, :3].isnan().all()
    )
    for bad in ((grad[:2], slope), (grad.double(), slope), (grad, slope[0]), (grad, slope.mT)):
        with pytest.raises(ValueError, match="scale_pairs: "):
            torch.ops.kdkernels.scale_pairs(*bad, None)
