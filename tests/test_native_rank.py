# SPDX-License-Identifier: Apache-2.0
"""The compiled ranking ops on the CPU agree with an oracle in long double on every regime and length, to the last digit
of their results, and give the same bits on any number of threads."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranking import adversarial
from sklearn.isotonic import isotonic_regression

from kdkernels import backend
from kdkernels.rank import native_impl

sys.path.insert(0, str(Path(__file__).resolve().parent / "simt"))
import compare
import oracle
import rows

why = backend.obstacle("cpp", "cpu", op="spearman") or backend.obstacle("cpp", "cpu", op="soft_sort")
pytestmark = [pytest.mark.native, pytest.mark.skipif(why is not None, reason=why or "it runs")]

slow = pytest.mark.slow
DTYPES = ("float32", "float16", "bfloat16", "float64")
# nothing, one, two; around a warp of the CUDA twin; past float16's sums; around 2^10; wide digits from 2,000; counted
# halves from 4,096
SIZES = (0, 1, 2, 31, 32, 33, 362, 1000, 1023, 1024, 1025, *(pytest.param(n, marks=slow) for n in (2049, 4097)))
STRENGTHS = ((1.0, False), (1.0, True), (4.0, True), (0.02, False), (1e-9, False), (1000.0, False))
# the gradients of huge rows are below the smallest normal float32
HEALTHY = [name for name in rows.REGIMES if name not in ("nan", "infinite", "masked nan", "last nan", "huge")]
OPS = torch.ops.kdkernels


def tensor(array, dtype=None):
    array = np.ascontiguousarray(array)
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.view(np.float16) if dtype == "float16" else array)


def array(t):
    return (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).numpy()


def given(factor):
    return None if factor is None else torch.as_tensor(factor, dtype=torch.float64)


class Native:
    """The compiled ops on NumPy arrays, as `compare` wants them."""

    def rank_rows(self, x, dtype, factor, strength, relative, kl, descending, need_blocks):
        found = OPS.rank_rows(tensor(x, dtype), given(factor), strength, relative, kl, descending, need_blocks)
        return tuple(map(array, found))

    def rank_rows_backward(self, grad, x, dtype, rank, block, eps, kl, descending):
        rest = (tensor(a) for a in (rank, block, eps))
        return array(OPS.rank_rows_backward(tensor(grad), tensor(x, dtype), *rest, kl, descending))

    def sort_rows(self, s, dtype, factor, strength, relative, kl):
        return tuple(map(array, OPS.sort_rows(tensor(s, dtype), given(factor), strength, relative, kl)))

    def sort_rows_backward(self, grad, s, dtype, start, kl):
        return array(OPS.sort_rows_backward(tensor(grad), tensor(s, dtype), tensor(start), kl))

    def spearman_rows(self, x, y, dtype, strength, relative, kl, hard, grad_x, grad_y):
        run = OPS.spearman_rows
        return tuple(map(array, run(tensor(x, dtype), tensor(y, dtype), strength, relative, kl, hard, grad_x, grad_y)))


def some(options, n):
    """All of them for short rows; the oracle is slow, so of long ones each length and dtype takes its share."""
    share = 1 if n < 1000 else 4 if n < 2000 else 8
    return options[n % share :: share]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
class TestOracle:
    def test_ranks_and_gradients_are_those_of_the_oracle(self, n, dtype):
        names = some(list(rows.REGIMES), n + len(dtype))
        for i, (strength, relative) in enumerate(STRENGTHS):
            descending, factor = (i // 2 + n) % 2 == 1, (None, "rows", 1.5)[(i + n) % 3]
            for kl in (False, True):
                compare.compare_rank(Native(), n, dtype, strength, relative, kl, descending, factor=factor, names=names)

    def test_hard_ranks_average_ties_and_have_no_gradient(self, n, dtype):
        compare.compare_rank(Native(), n, dtype, 0.0, descending=n % 2 == 0)

    def test_sorted_values_and_gradients_are_those_of_the_oracle(self, n, dtype):
        names = some(list(rows.REGIMES), n + len(dtype))
        for i, (strength, relative) in enumerate(STRENGTHS):
            for kl in (False, True):
                factor = (None, "rows", 1.5)[(i + n) % 3]
                compare.compare_sort(Native(), n, dtype, strength, relative, kl, factor=factor, names=names)

    def test_correlations_and_gradients_are_those_of_the_oracle(self, n, dtype):
        if n <= 2:
            n = 3  # of two points the gradient is rounding
        for i, (strength, relative) in enumerate(((0.02, False), (1.0, True), (4.0, True))):
            kl, hard = (i + n) % 2 == 1, (i // 2 + n) % 2 == 1
            names = some(HEALTHY, n + len(dtype) + i)
            compare.compare_spearman(Native(), n, dtype, strength, relative, kl, hard, names=names)


def test_dropped_pairs_may_hold_anything_and_others_poison_their_row_alone():
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[1.0, 3.0, -inf, 2.0], [1.0, 3.0, -inf, nan], [-inf, 3.0, -inf, 1.0], [-inf, 3.0, -inf, inf]])
    y = torch.tensor([[2.0, 1.0, nan, 5.0], [2.0, 1.0, inf, 5.0], [nan, 3.0, inf, -inf], [1.0, -inf, nan, 2.0]])
    value, dx, dy = OPS.spearman_rows(x, y, 1.0, True, False, False, True, True)
    assert value[0].isfinite() and value[2] == 0
    assert value[1].isnan() and value[3].isnan()
    for g in (dx, dy):
        assert g[0].isfinite().all() and g[0, 2] == 0 and (g[2] == 0).all()
        assert g[1].isnan().tolist() == [True, True, False, True] and g[1, 2] == 0
        assert g[3].isnan().tolist() == [False, False, False, True] and (g[3, :3] == 0).all()


LONG = (21841, 128256)


def exact_ranks(x, eps):
    """l2 by another road, scikit-learn's isotonic regression of s / eps - w, with block means in float64."""
    order = np.argsort(-x, kind="stable")
    s, n = x[order].astype(np.float64), len(x)
    w = np.arange(n, 0, -1.0)
    fit = isotonic_regression((s - s[0]) / eps - w, increasing=False)
    first = np.concatenate([[True], fit[1:] != fit[:-1]])
    a = np.flatnonzero(first)
    number, c = np.cumsum(first) - 1, np.diff(np.append(a, n))
    d = s - s[a][number]
    r = n - (2 * a + c - 1)[number] / 2 + (d - (np.add.reduceat(d, a) / c)[number]) / eps
    out = np.empty(n)
    out[order] = r
    return out


class TestLongRows:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("n", LONG)
    def test_ranks_are_within_one_unit_in_the_last_place_of_the_float64_rank(self, n, dtype):
        """Half rows of this length are counted, not sorted."""
        for scale, offset, eps in (
            (1.0, 0.0, 1e-3),
            (4.0, 0.0, 1.0),
            (1.0, 0.0, 1e-9),
            (1.0, 1e4, 1e-2),
            (3.0, 0, 1e3),
        ):
            noise = np.random.default_rng(n).standard_normal((1, n)) * scale + offset
            x, storage = rows.round_to(noise, dtype)
            found = OPS.rank_rows(tensor(storage, dtype), None, eps, False, False, False, False)[0]
            expected = exact_ranks(x[0], eps)
            assert (np.abs(found[0].numpy() - expected) <= compare.ulp(expected, "float32")).all(), (scale, offset, eps)

    @pytest.mark.parametrize("eps", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
    def test_float32_ranks_of_131072_are_within_one_unit_in_the_last_place(self, eps):
        n = 131072
        x = torch.stack([row.float() for row in adversarial(n).values()])
        found = OPS.rank_rows(x.double(), None, eps, False, False, False, False)[0]
        narrow = OPS.rank_rows(x, None, eps, False, False, False, False)[0]
        assert (np.abs(narrow.numpy() - found.numpy()) <= compare.ulp(found.numpy(), "float32")).all()
        expected = exact_ranks(x[0].numpy(), eps)
        assert np.abs(found[0].numpy() - expected).max() <= 1e-12 * n

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("kl", [False, True], ids=["l2", "kl"])
    def test_a_vocabulary_agrees_with_the_oracle(self, dtype, kl):
        names = ["random", "masked", "ties", "huge"]
        compare.compare_rank(Native(), 20000, dtype, 1.0, relative=True, kl=kl, names=names)

    def test_counted_rows_and_sorted_rows_are_the_same(self):
        """A bfloat16 row of 4,096 is counted; as float32 it is sorted."""
        x = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)).mul_(4).bfloat16()
        x[1, ::7] = -torch.inf
        x[2, 5] = torch.nan
        for kl in (False, True):
            for descending in (False, True):
                counted = OPS.rank_rows(x, None, 0.01, False, kl, descending, True)
                sorted_ = OPS.rank_rows(x.float(), None, 0.01, False, kl, descending, True)
                for a, b in zip(counted, sorted_, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-7, atol=0, equal_nan=True)


class TestKl:
    @pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-6])
    def test_probabilities_with_small_strengths_have_finite_gradients(self, eps):
        """torchsort's are NaN here: exp(1 / eps) overflows."""
        x = np.random.default_rng(0).random((4, 1000), dtype=np.float32)
        rank, block, found = Native().rank_rows(x, "float32", None, eps, False, True, False, True)
        g = Native().rank_rows_backward(np.ones_like(x), x, "float32", rank, block, found, True, False)
        assert np.isfinite(g).all()
        expected, blocks, _ = oracle.rank_rows(x, None, eps, False, True, False)
        compare.near(rank, expected, compare.ulp(expected, "float32"), "kl", list("abcd"))
        assert (compare.first_positions(x, block, False) == blocks).all()


class TestSoftSort:
    """soft_sort_rows is torch.sort and sort_rows in one; the order is undone in its backward pass."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("kl", [False, True], ids=["l2", "kl"])
    def test_it_is_a_stable_sort_and_sort_rows(self, dtype, descending, kl):
        x = torch.from_numpy(rows.matrix(65, "float32", 3)[0]).to(dtype)
        x = x[~(x.isnan() | (x == torch.inf)).any(-1)]
        value, s, order, start, eps = OPS.soft_sort_rows(x, None, 0.3, True, kl, descending)
        theta = x if descending else torch.where(x == -torch.inf, x, -x)
        expected_s, expected_order = torch.sort(theta, dim=-1, descending=True, stable=True)
        assert torch.equal(s, expected_s) and torch.equal(order, expected_order)
        sorted_value, sorted_start, sorted_eps = OPS.sort_rows(s, None, 0.3, True, kl)
        sign = torch.where(sorted_value == -torch.inf, 1.0, 1.0 if descending else -1.0).to(value.dtype)
        assert torch.equal(value, sorted_value * sign)
        assert torch.equal(start, sorted_start) and torch.equal(eps, sorted_eps)
        grad = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(1))
        expected = torch.empty_like(s).scatter_(-1, order, OPS.sort_rows_backward(grad, s, start, kl))
        assert torch.equal(OPS.soft_sort_rows_backward(grad, s, order, start, kl), expected)

    def test_a_poisoned_row_is_nan_and_its_neighbours_are_not(self):
        x = torch.randn(3, 9)
        x[1, 4] = torch.inf
        value, s, order, start, eps = OPS.soft_sort_rows(x, None, 1.0, False, False, True)
        dx = OPS.soft_sort_rows_backward(torch.ones(3, 9), s, order, start, False)
        for t in (value, eps[:, None], dx):
            assert t[1].isnan().all() and t[[0, 2]].isfinite().all()


class TestThreads:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("kl", [False, True], ids=["l2", "kl"])
    def test_the_bits_do_not_depend_on_the_run_or_the_number_of_threads(self, same_bits, dtype, kl):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, 23, 4500, generator=generator).to(dtype)
        grad = torch.randn(23, 4500, generator=generator).to(torch.promote_types(dtype, torch.float32))

        def run():
            rank, blocks, eps = OPS.rank_rows(x, None, 2.0, True, kl, False, True)
            dx = OPS.rank_rows_backward(grad, x, rank, blocks, eps, kl, False)
            sorted_ = OPS.soft_sort_rows(x, None, 2.0, True, kl, False)
            ds = OPS.soft_sort_rows_backward(grad, *sorted_[1:4], kl)
            return rank, blocks, eps, dx, *sorted_, ds, *OPS.spearman_rows(x, y, 2.0, True, kl, False, True, True)

        same_bits(run, 7)


class TestArguments:
    def test_no_rows_and_no_elements_are_no_error(self):
        for shape in ((0, 5), (5, 0), (0, 0)):
            x = torch.empty(shape)
            rank, blocks, eps = OPS.rank_rows(x, None, 1.0, True, False, False, True)
            assert rank.shape == shape and blocks.shape == shape and eps.shape == shape[:1]
            assert OPS.rank_rows_backward(rank, x, rank, blocks, eps, False, False).shape == shape
            assert OPS.spearman_rows(x, x, 1.0, True, False, False, True, True)[0].tolist() == [0.0] * shape[0]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda x: OPS.rank_rows(x.int(), None, 1.0, False, False, False, True), "x is Int: pass float16"),
            (lambda x: OPS.rank_rows(x[0], None, 1.0, False, False, False, True), r"x has 1 dimensions: pass rows"),
            (
                lambda x: OPS.rank_rows(x.t(), None, 1.0, False, False, False, True),
                r"x has column stride 7: pass x.con",
            ),
            (lambda x: OPS.rank_rows(x, None, -1.0, False, False, False, True), "strength is -1: it needs a number"),
            (lambda x: OPS.rank_rows(x, x[0], 1.0, False, False, False, True), r"strengths must be float64 \[1\] or"),
            (
                lambda x: OPS.spearman_rows(x, x.double(), 1.0, False, False, False, True, True),
                "y is Double: pass Float",
            ),
            (lambda x: OPS.spearman_rows(x, x[:2], 1.0, False, False, False, True, True), r"y is \[2, 7\]: it needs"),
            (lambda x: OPS.sort_rows_backward(x.double(), x, x.int(), False), "grad is Double: pass Float"),
            (lambda x: OPS.rank_rows_backward(x, x, x, x, x[:, 0], False, False), "blocks is Float: pass Int"),
        ],
    )
    def test_a_wrong_argument_is_named_with_its_fix(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(5, 7))

    def test_ids_and_orders_from_elsewhere_cannot_reach_outside_the_row(self):
        x, eps = torch.randn(2, 7), torch.ones(2, dtype=torch.float64)
        blocks = torch.full((2, 7), 7, dtype=torch.int32)
        with pytest.raises(ValueError, match="blocks must hold ids below the length of a row, 7"):
            OPS.rank_rows_backward(x, x, x, blocks, eps, False, False)
        order = torch.full((2, 7), -1)
        with pytest.raises(ValueError, match="order must hold positions of a row"):
            OPS.soft_sort_rows_backward(x, x, order, blocks, False)

    def test_every_schema_is_implemented(self):
        assert backend.native.lack("cpu", tuple(native_impl.SCHEMAS)) is None
