# SPDX-License-Identifier: Apache-2.0
"""Every bad input of a ranking op has one documented behaviour: an error that names the argument and the fix."""

import math

import pytest
import torch
from ranking import backends

import kdkernels as kd

X, Y = torch.randn(3, 8), torch.randn(3, 8)
SINGLE = [kd.soft_rank, kd.soft_sort, kd.rank_diagnostics]
PAIRED = [kd.spearman, kd.pearson, kd.spearman_corr]
by_name = {"ids": lambda f: getattr(f, "__name__", None)}
every = pytest.mark.parametrize("f", [*SINGLE, *PAIRED], **by_name)
every_backend = pytest.mark.parametrize("backend", backends())


def call(f, x, **how):
    return f(x, **how) if f in SINGLE else f(x, x, **how)


def strength(f, value, **how):
    return f(X, regularization_strength=value, **how) if f in SINGLE else f(X, Y, regularization_strength=value, **how)


@every
@pytest.mark.parametrize("dim", [2, -3, 100])
def test_a_dim_out_of_range(f, dim):
    with pytest.raises(ValueError, match=rf"dim is {dim}: x has 2 dimensions, give one from -2 to 1"):
        call(f, X, dim=dim)


@every
@pytest.mark.parametrize("dim", [None, 1.0, (0, 1), True])
def test_a_dim_that_is_no_integer(f, dim):
    with pytest.raises(TypeError, match="dim is a .*: give an integer"):
        call(f, X, dim=dim)


@every
def test_a_tensor_without_dimensions(f):
    with pytest.raises(ValueError, match="x is 0-d: ranks need at least one dimension"):
        call(f, torch.tensor(1.0))


@every
def test_a_row_longer_than_its_positions_can_count(f):
    """One element in memory; refused before anything is read."""
    with pytest.raises(ValueError, match=f"x has {2**31} elements along dim 1: a row may have {2**31 - 1}"):
        call(f, torch.zeros(1, 1).expand(1, 2**31))


@pytest.mark.parametrize("f", PAIRED, **by_name)
def test_two_shapes(f):
    with pytest.raises(ValueError, match=r"y has shape \(3, 7\), x has \(3, 8\): rows are compared one to one"):
        f(X, Y[:, :7])
    with pytest.raises(ValueError, match=r"y has shape \(8,\), x has \(3, 8\)"):
        f(X, Y[0])


@pytest.mark.parametrize("f", [kd.soft_rank, kd.soft_sort, kd.spearman], **by_name)
@pytest.mark.parametrize("regularization", ["L2", "entropy", None, 2])
def test_an_unknown_regularization(f, regularization):
    with pytest.raises(ValueError, match=r"regularization is .*: give 'l2' or 'kl'"):
        call(f, X, regularization=regularization)


STRONG = pytest.mark.parametrize("f", [*SINGLE, kd.spearman], **by_name)


@STRONG
@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, math.inf, -3])
def test_a_strength_that_is_negative_or_not_finite(f, value):
    with pytest.raises(
        ValueError, match=r"regularization_strength is .*: it needs a finite number >= 0 \(0 gives hard"
    ):
        strength(f, value)


@STRONG
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_a_relative_strength_that_is_not_positive(f, value):
    with pytest.raises(ValueError, match="regularization_strength is .*: it needs c > 0"):
        strength(f, ("auto", value))


@STRONG
@pytest.mark.parametrize("value", ["automatic", ("auto", 1.0, 2.0), ("relative", 1.0)])
def test_an_unknown_rule(f, value):
    with pytest.raises(
        ValueError, match=r'regularization_strength is .*: give a number, a tensor, "auto" or \("auto", c'
    ):
        strength(f, value)


@STRONG
@pytest.mark.parametrize("value", [None, True, [1.0], (), 1j])
def test_a_strength_that_is_no_number(f, value):
    with pytest.raises(TypeError, match="regularization_strength is a .*: give a number, a tensor"):
        strength(f, value)


@STRONG
@every_backend
def test_a_strength_tensor_that_does_not_fit(f, backend):
    with pytest.raises(ValueError, match=r"strength has shape \(4,\): give a 0-d tensor, or one value a row, \(3,\)"):
        strength(f, torch.ones(4), backend=backend)
    with pytest.raises(TypeError, match="strength is a tensor of torch.int64: it needs a floating-point tensor"):
        strength(f, torch.tensor(1), backend=backend)
    with pytest.raises(ValueError, match="strength is on meta, x on cpu: move both to one device"):
        strength(f, torch.ones((), device="meta"), backend=backend)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength holds a value that is not positive and finite"):
            strength(f, torch.tensor([1.0, bad, 1.0]), backend=backend)


def test_without_the_compiled_library_the_rest_runs_and_says_so(python):
    code = (
        "import torch, kdkernels as kd\n"
        "x = torch.randn(2, 8, requires_grad=True)\n"
        "kd.spearman(x, -x.detach()).sum().backward()\n"
        "assert x.grad.isfinite().all()\n"
        "print(kd.explain('soft_rank', x))\n"
        "try:\n"
        "    kd.soft_rank(x, backend='cpp')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = python("-c", code, KDK_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "soft_rank runs on torch: " in done.stdout and "not cpp: switched off by KDK_NATIVE=0" in done.stdout
    assert "backend='cpp' cannot run soft_rank here: switched off by KDK_NATIVE=0" in done.stdout


def test_a_library_that_lacks_an_operator_is_not_there_for_it(monkeypatch):
    """An older build, loaded by a newer package."""
    from kdkernels import native

    status = native.status()._replace(cpu=True, cpu_reason="")
    monkeypatch.setattr(native, "status", lambda: status)
    assert native.lack("cpu", ("panel_moments", "no_such_operator")).endswith("has no no_such_operator: build it again")


@every_backend
@pytest.mark.parametrize("f", [kd.soft_rank, kd.soft_sort], **by_name)
@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0])
def test_rows_of_one_extreme_value_never_hang(value, regularization, f, backend):
    x = torch.full((2, 70), value)
    for how in (1.0, 1e-9, "auto", 0.0):
        out = f(x, regularization, how, backend=backend)
        if value in (math.inf, -math.inf) or math.isnan(value):
            gone = value == -math.inf
            want = (0.0 if f is kd.soft_rank else -math.inf) if gone else math.nan
            assert torch.equal(out.nan_to_num(7.0), torch.full_like(out, want).nan_to_num(7.0))
        else:
            assert out.isfinite().all()


@every_backend
@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_the_whole_range_of_float32_in_one_row(regularization, backend):
    x = torch.tensor([[3e38, -3e38, 1e-45, 0.0, -0.0, 1.0, -1e20]], requires_grad=True)
    r = kd.soft_rank(x, regularization, 1e-3, backend=backend)
    assert torch.equal(r, torch.tensor([[7.0, 1.0, 4.0, 4.0, 4.0, 6.0, 2.0]]))
    (g,) = torch.autograd.grad(r.sum(), x)
    assert g.isfinite().all()


@every_backend
def test_the_whole_range_of_float64_in_one_row(backend):
    big = torch.finfo(torch.float64).max
    for least, ranks in ((-math.nextafter(big, 0), [7.0, 1.0, 3.0, 3.0, 3.0, 5.0, 6.0]), (-big, [6, 0, 2, 2, 2, 4, 5])):
        x = torch.tensor([[big, least, 1e-300, 0.0, -0.0, 1.0, 1e39]], dtype=torch.float64)
        assert kd.soft_rank(x, "l2", 1e-3, backend=backend).tolist() == [ranks]


def test_explain_knows_the_ranking_ops():
    for op in ("soft_rank", "soft_sort", "rank_diagnostics", "spearman", "spearman_corr"):
        why = str(kd.explain(op, X, X))
        assert why.startswith(f"{op} runs on ") and "not cuda: the tensors are on cpu" in why
    assert str(kd.explain("pearson", X, X)) == "pearson runs on torch: the first choice"
