# SPDX-License-Identifier: Apache-2.0
"""The compiled visit of CMKDLoss against the PyTorch formulas: values, gradients, edges, second derivatives."""

import math

import pytest
import torch
from conftest import needs_native

from kdkernels.losses import CMKDLoss
from kdkernels.rank import scores

OPS = torch.ops.kdkernels
pytestmark = needs_native(*scores.NATIVE)


def rows(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    x, y = (3 * torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (y + 0.5 * x).to(dtype)


def edges(C=21, dtype=torch.float64):
    """Rows with all that may stand in one: the last three hold NaN or +inf."""
    x, y = rows(13, C, dtype=dtype)
    x[0, 3] = y[0, 5] = x[0, 7] = y[0, 7] = -math.inf
    x[1, 0], y[1, 0] = -math.inf, math.nan  # absent, whatever the other side holds
    y[2, 1], x[2, 1] = -math.inf, math.inf
    x[3], y[4] = 0.1, 1e4
    x[5] = y[5] = 0.0
    x[6, 1:] = -math.inf  # one entry left
    y[7] = -math.inf  # none
    x[8] += 1e3
    y[9, 2] = 500.0  # a teacher that is sure
    x[10, 4], y[11, 4], y[12, 4] = math.nan, math.nan, math.inf
    y[12, 6] = x[10, 7] = -math.inf
    return x, y


def everything(x, y, tau, backend, above=None, create_graph=False):
    x = x.detach().clone().requires_grad_()
    z_x, z_y, share, pearson = scores.score(x, y, tau, backend)
    torch.manual_seed(1)
    weights = torch.randn(z_x.shape, dtype=torch.float64).to(z_x), torch.randn(pearson.shape).to(z_x)
    outputs = {"z": (z_x,), "pearson": (pearson,), None: (z_x, pearson)}[above]
    upstream = {"z": weights[:1], "pearson": weights[1:], None: weights}[above]
    return (
        *(t.detach() for t in (z_x, z_y, share, pearson)),
        *torch.autograd.grad(outputs, x, upstream, create_graph=create_graph),
    )


def compare(given, expected, rtol, atol):
    for got, want in zip(given, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("above", ["z", "pearson", None])
def test_every_edge_is_the_formulas_in_float64(above):
    x, y = edges()
    given, expected = (everything(x, y, 4.0, backend, above) for backend in ("cpp", "torch"))
    compare(given, expected, rtol=1e-11, atol=1e-12)
    assert expected[-1][:10].isfinite().all() and expected[3][10:].isnan().all()  # the edges are what they claim


# the tail of eight lanes, of a vector, of a block of 512 exponentials
@pytest.mark.parametrize("C", [2, 7, 8, 9, 16, 17, 511, 513, 1000])
@pytest.mark.parametrize("tau", [0.25, 4.0])
def test_float32_of_every_width_is_float64s_to_a_few_eps(C, tau):
    x, y = rows(5, C, dtype=torch.float32)
    x[1, C // 2] = y[2, C - 1] = -math.inf
    x[3], y[4] = 0.1, -7.3
    exact = everything(x.double(), y.double(), tau, "torch")
    compare(everything(x, y, tau, "cpp"), exact, rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spread_of_the_rounding_is_none(dtype):
    eps = torch.finfo(dtype).eps
    x, y = rows(2, 64, dtype=dtype)
    x[0] = 1 + eps * (torch.arange(64, dtype=dtype) % 2)
    y[1] = 1 + 16 * eps * (torch.arange(64, dtype=dtype) % 2)  # twice what is allowed
    for backend in ("cpp", "torch"):
        z_x, z_y, _, pearson, grad = everything(x, y, 4.0, backend)
        assert (z_x[0] == 0).all() and pearson[0] == 0 and (grad[0] == 0).all()
        assert z_y[1].abs().min() > 0.9 and pearson[1] != 0


def test_a_share_that_is_not_wanted_is_0():
    x, y = rows(3, 9)
    assert (scores.score(x, y, 0.0, "cpp")[2] == 0).all()


def test_rows_may_lie_apart_and_leading_dimensions_are_rows():
    x, y = rows(2, 3, 40, dtype=torch.float32)
    apart = x.transpose(0, 1)[..., 5:26], y.transpose(0, 1)[..., 5:26]
    dense = [t.contiguous() for t in apart]
    for got, want in zip(everything(*apart, 4.0, "cpp"), everything(*dense, 4.0, "cpp"), strict=True):
        assert got.equal(want)
    flat = everything(*(t.flatten(0, 1) for t in dense), 4.0, "cpp")
    for got, want in zip(everything(*dense, 4.0, "cpp")[:4], flat[:4], strict=True):
        assert got.flatten(0, 1).equal(want)


def test_the_bits_do_not_depend_on_the_number_of_threads(same_bits):
    x, y = rows(301, 137, dtype=torch.float32)
    same_bits(lambda: everything(x, y, 4.0, "cpp"))


@pytest.mark.parametrize("above", ["z", "pearson", None])
def test_a_gradient_that_carries_a_graph_is_the_same(above):
    x, y = edges()
    compare(everything(x, y, 4.0, "cpp", above, True), everything(x, y, 4.0, "cpp", above), rtol=1e-11, atol=1e-12)


def test_both_ways_can_be_differentiated_twice():
    x, y = rows(3, 6)
    x[1, 2] = y[2, 3] = -math.inf
    present = torch.fmin(x, y) > -math.inf
    x = x.masked_fill(~present, 0).requires_grad_()

    def of(x):
        z_x, _, _, pearson = scores.score(x.masked_fill(~present, -math.inf), y, 4.0, "cpp")
        return z_x, pearson

    assert torch.autograd.gradcheck(of, x) and torch.autograd.gradgradcheck(of, x)
    student, teacher = rows(3, 6)
    loss = CMKDLoss(spearman_weight=0, backend="cpp")
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_forward_mode_is_the_jacobian_and_a_second_derivative_right_or_refused(backend):
    student, teacher = rows(3, 6)
    student[1, 2] = teacher[2, 3] = -math.inf
    moved = torch.randn_like(student)
    loss = CMKDLoss(strength=0.3, class_weight=0.5, backend=backend)
    want = (torch.func.jacrev(loss)(student, teacher) * moved).sum()
    assert want.abs() > 1e-3
    got = torch.func.jvp(lambda s: loss(s, teacher), (student,), (moved,))[1]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, moved)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual, teacher)).tangent, want)
    across = torch.func.vmap(lambda m: torch.func.jvp(lambda s: loss(s, teacher), (student,), (m,))[1])
    torch.testing.assert_close(across(torch.stack([moved, -2 * moved])), torch.stack([want, -2 * want]))
    # Spearman's depends on the rows though its upstream does not: it may not get lost beside Pearson's
    for second in (torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="second derivative .* pass backend='reference'"):
            second(torch.func.grad(loss))(student, teacher)
    linear = CMKDLoss(spearman_weight=0, class_weight=0.5, backend=backend)
    hessians = [second(torch.func.grad(linear))(student, teacher) for second in (torch.func.jacrev, torch.func.jacfwd)]
    assert hessians[0].abs().max() > 1e-3
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("options", [{}, {"class_weight": 0.5}, {"spearman_share": 0.3}, {"spearman_weight": 0}])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2])
def test_the_loss_is_that_of_the_formulas_whatever_the_rows_hold(options, dtypes):
    student, teacher = (t.to(dtype) for t, dtype in zip(edges(C=12), dtypes, strict=True))
    mask = torch.arange(13) < 10
    mask[2] = False
    found = {}
    for backend in ("cpp", "torch"):
        s = student.clone().requires_grad_()
        value = CMKDLoss(strength=0.3, backend=backend, **options)(s, teacher, mask=mask)
        found[backend] = value.detach(), *torch.autograd.grad(value, s)
    assert found["torch"][0].isfinite() and found["torch"][1].abs().sum() > 0
    # one unit in the last place of the gradient's dtype
    eps = torch.finfo(dtypes[0]).eps
    compare(found["cpp"], found["torch"], rtol=max(eps, 1e-5), atol=1e-7)


@pytest.mark.parametrize(
    "given, message",
    [
        ((torch.zeros(3, 5).half(), torch.zeros(3, 5).half()), "x is Half: pass float32 or float64"),
        ((torch.zeros(3, 5), torch.zeros(3, 4)), "y is .3, 4.: it needs the shape of the rows"),
        ((torch.zeros(3, 5), torch.zeros(3, 5).double()), "y is Double: pass Float"),
        ((torch.zeros(5, 3).mT, torch.zeros(3, 5)), "x has column stride 3"),
    ],
)
def test_the_operator_refuses_what_it_cannot_read(given, message):
    with pytest.raises(ValueError, match=message):
        OPS.score_rows(*given, 4.0)


def test_its_gradient_refuses_what_it_cannot_read():
    z = torch.zeros(3, 5)
    one = torch.ones(3).double()
    with pytest.raises(ValueError, match=r"scale must be a contiguous Double \[3\]"):
        OPS.score_rows_backward(z, None, z, z, one.float(), one)
    with pytest.raises(ValueError, match=r"grad_pearson must be a contiguous Float \[3\]"):
        OPS.score_rows_backward(None, one, z, z, one, one)
