# SPDX-License-Identifier: Apache-2.0
"""The compiled steps of the Gram family beside the PyTorch they replace: centred rows, and row sums to weights."""

import pytest
import torch
from conftest import needs_native

from kdkernels.gram import native_impl
from kdkernels.gram.call import Question, Side
from kdkernels.gram.kernels import spec_of
from kdkernels.gram.torch_impl import prepared
from kdkernels.gram.torch_impl.combine import RowStats, combine, pack_rows
from kdkernels.registry import OPS

pytestmark = needs_native(*OPS["cka"].native)


def problem(stat="cka", unbiased=True, centre=True, kernel="linear"):
    return Question(stat, kernel, unbiased, centre, False, True).problem(spec_of(kernel))


def centre_rows(x, mask=None, centre=True, rescale=True):
    return torch.ops.kdkernels.centre_rows(x, mask, centre, rescale)


# one lane is 8 columns, four of them are unrolled, a strip is 512; a tile has 256 rows and four are read together
SHAPES = [(1, 1, 1), (1, 2, 7), (2, 5, 8), (1, 7, 31), (3, 4, 33), (1, 257, 40), (1, 9, 515), (2, 300, 1030)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_centred_rows_are_the_float64_ones(shape, masked, centre, rescale):
    x = 3 * torch.randn(shape) + 20
    mask = torch.rand(shape[:2]) > 0.3 if masked else None
    if masked:
        mask[0, -1] = True
        x = torch.where(mask[..., None], x, torch.nan)  # a masked row is never read
    keep = torch.ones(shape[:2], dtype=torch.bool) if mask is None else mask
    z, square, scale, shift, unit, typical = centre_rows(x, mask, centre, rescale)
    true = x.double().masked_fill(~keep[..., None], 0.0)
    count = keep.sum(1).clamp(min=1)[:, None, None]
    mean = true.sum(1, keepdim=True) / count
    if centre:
        true = (true - mean).masked_fill(~keep[..., None], 0.0)
    spread = true.square().sum((1, 2)) / count[:, 0, 0]
    assert (scale.log2() == scale.log2().round()).all()  # a power of two rounds nothing
    assert rescale or (scale == 1).all()
    true = true * scale[:, None, None]
    tolerance = 4e-6 * scale.max()  # rounding of x - mean at 20 to 30
    torch.testing.assert_close(z.double(), true, rtol=1e-6, atol=tolerance.item())
    assert (z[~keep] == 0).all() and (square[~keep] == 0).all()
    torch.testing.assert_close(square, z.double().square().sum(-1).float(), rtol=1e-6, atol=0)
    assert torch.equal(unit, scale.double() ** -2)
    if rescale and spread.min() > 1e-3:
        assert ((spread * scale**2 > 0.49) & (spread * scale**2 < 2.01)).all()
    torch.testing.assert_close(typical.double(), 2 * spread * scale.double() ** 2, rtol=1e-4, atol=1e-30)
    if centre:
        expected = (mean * scale[:, None, None]).masked_fill(~keep.any(1)[:, None, None], 0.0)
        torch.testing.assert_close(shift.double(), expected, rtol=1e-6, atol=1e-30)
    else:
        assert shift.shape == (shape[0], 1, 0)


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "cosine", "rbf"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_preparation_equals_the_portable_one(kernel, offset):
    x, mask = torch.randn(2, 40, 100) + offset, torch.rand(2, 40) > 0.2
    sigma = torch.tensor([2.0])
    case = problem(kernel=kernel)
    side = Side(x, case.kx, sigma)
    seen = [prepared.prepare(side, mask, case, x.dtype, by.centre) for by in (native_impl, prepared)]
    for name in prepared.Prepared._fields:
        a, b = (getattr(p, name) for p in seen)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=4e-6 if name != "shift" else 2e-5)


@pytest.mark.parametrize("size", [1.0, 1e-3, 3e4])
def test_constant_rows_become_exact_zeros_and_rows_that_differ_do_not(size):
    x = size * torch.randn(1, 1, 5000).expand(1, 50, 5000).clone()
    assert not centre_rows(x)[0].any()
    x[0, 7] *= 1 + 1e-4
    z = centre_rows(x)[0]
    assert z[0, 7].abs().max() > 0 and z.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_poisons_its_group_alone(bad):
    x = torch.randn(2, 20, 30)
    x[1, 3, 4] = bad
    z, square, *_ = centre_rows(x)
    assert z[0].isfinite().all() and square[1].isnan().all()


def test_the_bits_do_not_depend_on_the_threads(same_bits):
    x = torch.randn(2, 700, 1100) + 3
    same_bits(lambda: centre_rows(x))


@pytest.mark.parametrize(
    "argument, message",
    [
        ((torch.zeros(3, 4), None), r"pass features \[G, n, p\]"),
        ((torch.zeros(1, 3, 4).double(), None), "pass float32"),
        ((torch.zeros(1, 4, 3).mT, None), "pass x.contiguous"),
        ((torch.zeros(1, 3, 4), torch.ones(1, 4, dtype=torch.bool)), r"bool tensor \[1, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        centre_rows(*argument)


@pytest.mark.parametrize("stat", ["cka", "hsic"])
@pytest.mark.parametrize("unbiased, centre", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("need", [0, 1, 2, 0b0111, 0b1111])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_those_of_combine(stat, unbiased, centre, need, masked, dtype):
    case, (G, n) = problem(stat, unbiased, centre), (3, 12)
    sums = torch.randn(5, G, n, dtype=torch.float64)
    sums[2:] = sums[2:].abs() + 2
    units = tuple(torch.rand(G, dtype=torch.float64) + 0.5 for _ in range(2))
    mask = torch.ones(G, n, dtype=torch.bool)
    mask[1, :-3] = not masked
    mask[2, 2:4] = not masked
    count = mask.sum(1) if masked else None
    u = (torch.randn(G, n, dtype=dtype), None)
    eps = torch.finfo(torch.float32).eps
    sums[0, 0] = sums[2, 0] = 0  # a constant side
    like = torch.empty(0, dtype=dtype)
    how = (stat == "cka", unbiased, centre, need, case.minimum, eps)
    value, rows = torch.ops.kdkernels.weigh_rows(sums, count, *units, *u, like, *how)
    asked = (bool(need & 0b101), bool(need & 0b1010))
    want, sides = combine(case, RowStats(*sums), n if count is None else count, eps, units, None, asked)
    want, want_rows = pack_rows(want, sides, u, n if count is None else count, case, need, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(value, want, rtol=tolerance, atol=1e-300)
    torch.testing.assert_close(rows, want_rows, rtol=tolerance, atol=tolerance * 1e-2)
    assert value.dtype == rows.dtype == dtype


def test_weights_refuse_what_does_not_fit():
    one, like = torch.ones(1, dtype=torch.float64), torch.empty(0)
    how = (None, None, like, True, True, True, 1, 4, 1e-7)
    with pytest.raises(ValueError, match="float64 row sums"):
        torch.ops.kdkernels.weigh_rows(torch.zeros(5, 1, 4), None, one, one, *how)
    with pytest.raises(ValueError, match=r"float64 \[1\]"):
        torch.ops.kdkernels.weigh_rows(torch.zeros(5, 1, 4).double(), None, one.float(), one, *how)
