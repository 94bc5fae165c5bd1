# SPDX-License-Identifier: Apache-2.0
"""Every bad input has one documented behaviour: an error that names the argument and the fix, never a wrong number."""

import inspect
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import BACKENDS

import kdkernels as kd
from kdkernels import losses
from kdkernels.registry import OPS

X, Y = torch.randn(8, 4), torch.randn(8, 5)
PAIRED = [kd.cka, kd.hsic, kd.gram_mse]
EVERY = [*PAIRED, kd.mmd]
by_name = {"ids": lambda f: getattr(f, "__name__", None)}


def call(f, x, y, **how):
    """mmd wants features of one width."""
    return f(x, y[..., : x.shape[-1]] if f is kd.mmd and y.dim() > 1 else y, **how)


# ---- of every op, by its positional arguments

LANDMARKS = torch.randn(3, 4)
GIVEN = {
    **dict.fromkeys(("x", "y", "s", "t", "student", "teacher"), X),
    **{name: LANDMARKS for op in OPS for name in inspect.signature(getattr(kd, op)).parameters if "landmarks" in name},
    **{"basis": torch.eye(4)[:, :2], "s_centers": LANDMARKS, "t_centers": LANDMARKS, "m": 3, "lam": 0.3},
    **dict.fromkeys(("labels", "permuted_labels"), torch.arange(8) % 4),
}
KEYWORDS = {"mixup": {"lam": None}, "mixed_distillation": {"tau": 4.0, "alpha": 0.5}}


def arguments(op):
    return {name: GIVEN[name] for name in inspect.signature(getattr(kd, op)).parameters if name in GIVEN}


def features():
    for op in OPS:
        given = arguments(op).items()
        yield from ((op, name) for name, t in given if isinstance(t, torch.Tensor) and t.is_floating_point())


def run(op, **change):
    return getattr(kd, op)(**arguments(op) | KEYWORDS.get(op, {}) | change)


@pytest.mark.parametrize("op, name", list(features()))
def test_what_is_no_float_tensor_or_on_another_device(op, name):
    for dtype, how in ((torch.int64, "float"), (torch.uint8, "float"), (torch.bool, "float"), (torch.complex64, "abs")):
        with pytest.raises(TypeError, match=rf"{name} is {dtype}: convert it to a float dtype, e.g. {name}.{how}\(\)"):
            run(op, **{name: GIVEN[name].to(dtype)})
    for value in (GIVEN[name].tolist(), GIVEN[name].numpy()):
        with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}: pass a torch.Tensor"):
            run(op, **{name: value})
    if len(arguments(op)) > 1 and op != "select_landmarks":
        with pytest.raises(ValueError, match=r"(is|are) on (cpu|meta), .* on (cpu|meta): move both to one device"):
            run(op, **{name: GIVEN[name].to("meta")})


OTHERS = {
    "is torch.float8_e4m3fn: convert it to a float dtype of 16 to 64 bits": lambda x: x.to(torch.float8_e4m3fn),
    "is torch.qint8: .*dequantize": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "has layout torch.sparse_coo: make it dense": torch.Tensor.to_sparse,
    "has layout torch.sparse_csr: make it dense": torch.Tensor.to_sparse_csr,
    "is a nested tensor: pass a padded one and a mask": lambda x: torch.nested.nested_tensor([x[:2], x[:1]]),
    "is a nested tensor: .*to_padded_tensor": lambda x: torch.nested.nested_tensor([x[:2], x], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|quantiz)")
@pytest.mark.parametrize("text", OTHERS)
def test_a_tensor_that_is_no_dense_one(text):
    made = {name: OTHERS[text](GIVEN[name]) for name in {name for _, name in features()}}
    for op, name in features():
        with pytest.raises(TypeError, match=f"{name} {text}"):
            run(op, **{name: made[name]})
    for loss, what in ((losses.CKALoss(), "features"), (losses.KDLoss(), "logits")):
        with pytest.raises(TypeError, match=f"teacher_{what} {text}"):
            loss(X, made["x"])


def flags(f):
    return [name for name, p in inspect.signature(f).parameters.items() if isinstance(p.default, bool)]


FLAGGED = {op: (getattr(kd, op), partial(run, op)) for op in OPS}
FLAGGED |= {
    name: (getattr(losses, name),) * 2 for name in losses.__all__ if name not in ("KDALoss", "RdimKDLoss", "Ramp")
}
FLAGGED |= {"cka_matrix": (kd.cka_matrix, partial(kd.cka_matrix, [X], [Y])), "CKAMetric": (kd.CKAMetric, kd.CKAMetric)}


@pytest.mark.parametrize("name, flag", [(name, flag) for name, (f, _) in FLAGGED.items() for flag in flags(f)])
def test_a_flag_that_is_neither_true_nor_false(name, flag):
    for value in ("no", 0, None):
        with pytest.raises(TypeError, match=f"{flag} is {value!r}: give True or False"):
            FLAGGED[name][1](**{flag: value})


META = torch.ones((), device="meta")
NO_NUMBERS = (True, np.bool_(True), "x", b"x", math.nan, 1j, {}, object(), META)
ANYTHING = (*NO_NUMBERS, None, 0, 1, -1, 2.5, math.inf, 10**400, [], np.float64(0.5), np.int64(2), torch.tensor(0.5))


def refused_by_name(call, parameter):
    """Of any value the argument is taken, or refused by an error that names it; what is no number is no default's."""
    number = isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
    for value in ANYTHING:
        try:
            call(**{parameter.name: value})
        except (TypeError, ValueError) as error:
            said = str(error)
            assert re.search(rf"\b{parameter.name}\b", said), (value, said)
            assert not re.search("instances of|not iterable|unhashable|invalid combination", said), (value, said)
        else:
            assert not number or not any(value is one for one in NO_NUMBERS), (parameter.name, value)


NEEDED = {
    "KDALoss": {"num_classes": 3, "student_dim": 4, "teacher_dim": 4},
    "RdimKDLoss": {"channels": 4, "k": 2},
    "Ramp": {"loss": losses.KDLoss(), "start": 0, "end": 4},
    "ClassCenters": {"num_classes": 3, "student_dim": 4, "teacher_dim": 4},
    "StreamingPCA": {"num_channels": 4},
    "random_basis": {"num_channels": 4, "k": 1},
}
MADE = {name: getattr(losses, name) for name in losses.__all__}
MADE |= {name: getattr(kd, name) for name in ("RBF", "Laplacian", "Polynomial", "CKAMetric")}
MADE |= {name: getattr(kd, name) for name in ("ClassCenters", "StreamingPCA", "random_basis")}


@pytest.mark.parametrize("name", MADE)
def test_an_argument_of_what_is_made_is_taken_or_refused_by_name(name):
    for parameter in inspect.signature(MADE[name]).parameters.values():
        if parameter.name not in ("group", "device") and parameter.kind is not parameter.VAR_KEYWORD:
            refused_by_name(partial(MADE[name], **NEEDED.get(name, {})), parameter)


@pytest.mark.parametrize("op", OPS)
def test_an_option_of_an_op_is_taken_or_refused_by_name(op):
    for parameter in inspect.signature(getattr(kd, op)).parameters.values():
        if parameter.name not in GIVEN and parameter.name != "group":
            refused_by_name(partial(run, op), parameter)


def test_a_divisor_that_is_no_number_is_refused_by_name():
    for value in ("x", True, np.bool_(True), 1j, [], -1, math.nan, META):
        with pytest.raises((TypeError, ValueError), match="normalizer is "):
            losses.KDLoss()(X, X, normalizer=value)
    for value in (8, 8.0, np.int64(8), np.float32(8), torch.tensor(8)):
        torch.testing.assert_close(losses.KDLoss()(X, Y[:, :4], normalizer=value), losses.KDLoss()(X, Y[:, :4]))


@pytest.mark.parametrize(
    "f", [partial(kd.mixup, X, torch.arange(8)), partial(kd.select_landmarks, X, 3), partial(kd.random_basis, 4, 2)]
)
def test_a_generator_that_is_none(f):
    with pytest.raises(TypeError, match="generator is a int: give a torch.Generator"):
        f(generator=3)


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_or_missing_backend(op):
    with pytest.raises(ValueError, match="backend is 'numpy': give one of"):
        run(op, backend="numpy")
    for backend in {"cpp", "triton", "cuda"} - set(OPS[op].backends):
        with pytest.raises(ValueError, match=f"backend is '{backend}': {op} has"):
            run(op, backend=backend)
    for backend in {"triton", "cuda"} & set(OPS[op].backends):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run {op} here: "):
            run(op, backend=backend)


# ---- of the Gram family


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", PAIRED, **by_name)
def test_different_numbers_of_samples(f, backend):
    with pytest.raises(ValueError, match="y has 7 rows, x has 8: both sides must describe the same samples"):
        f(X, Y[:7], backend=backend)


def test_mmd_takes_different_numbers_of_samples_but_one_width():
    assert kd.mmd(X, Y[:7, :4]).isfinite()
    with pytest.raises(ValueError, match="y has 5 features, x has 4: mmd compares samples of one space"):
        kd.mmd(X, Y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [kd.cka, kd.hsic], **by_name)
@pytest.mark.parametrize("n, how, least", [(3, {}, 4), (1, {}, 4), (1, {"unbiased": False}, 2)])
def test_too_few_samples_for_the_estimator(f, n, how, least, backend):
    with pytest.raises(ValueError, match=rf"x and y have {n} rows: .* needs at least {least}"):
        f(X[:n], Y[:n], backend=backend, **how)
    assert f(X[:least], Y[:least], backend=backend, **how).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_samples_for_mmd(backend):
    with pytest.raises(ValueError, match="y has 1 rows: mmd with unbiased=True needs at least 2"):
        kd.mmd(X, X[:1], backend=backend)
    assert kd.mmd(X, X[:1], unbiased=False, backend=backend).isfinite()


@pytest.mark.parametrize("f", EVERY, **by_name)
@pytest.mark.parametrize("shape", [(0, 4), (8, 0), (0, 8, 4), (2, 0, 4)])
def test_an_empty_tensor(f, shape):
    with pytest.raises(ValueError, match=r"x is empty, shape .*: it needs at least one sample and one feature"):
        f(torch.empty(shape), torch.empty(shape))


@pytest.mark.parametrize("f", EVERY, **by_name)
@pytest.mark.parametrize("shape", [(8,), (2, 2, 8, 4), ()])
def test_a_shape_that_is_neither_samples_nor_groups(f, shape):
    with pytest.raises(ValueError, match=r"x has shape .*: give \[n, p\], or \[G, n, p\] for G groups"):
        f(torch.ones(shape), Y)


@pytest.mark.parametrize("f", EVERY, **by_name)
def test_groups_on_one_side_only_or_not_the_same_number(f):
    with pytest.raises(ValueError, match="give both with the same number of dims"):
        f(X[None], Y)
    with pytest.raises(ValueError, match="y has 3 groups, x has 2: groups are compared one to one"):
        f(X.expand(2, 8, 4), Y.expand(3, 8, 5))


@pytest.mark.parametrize("f", [kd.cka, kd.hsic, kd.mmd], **by_name)
@pytest.mark.parametrize("kernel", ["gaussian", None, 3, kd.RBF], ids=str)
def test_an_unknown_kernel(f, kernel):
    with pytest.raises(ValueError, match=r"kernel is .*: give one of \['cosine', 'laplacian', 'linear', .*kd.RBF"):
        call(f, X, Y, kernel=kernel)


def test_a_pair_of_kernels_that_is_none():
    with pytest.raises(ValueError, match=r"kernel\[1\] is 'gaussian': give one of"):
        kd.cka(X, Y, kernel=("rbf", "gaussian"))
    with pytest.raises(ValueError, match="kernel has 3 entries: give one kernel function, or a pair"):
        kd.cka(X, Y, kernel=("rbf", "rbf", "rbf"))
    with pytest.raises(ValueError, match="kernel is a pair: mmd compares x and y under one kernel function"):
        kd.mmd(X, X, kernel=("rbf", "linear"))


def test_an_explicit_backend_that_cannot_run_raises_and_says_why(python):
    code = (
        "import torch, kdkernels as kd\n"
        "x = torch.randn(8, 4)\n"
        "for backend in ('triton', 'cpp'):\n"
        "    try:\n"
        "        kd.cka(x, x, backend=backend)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    out = python("-c", code, KDK_NATIVE="0", TRITON_INTERPRET="0").stdout
    assert "backend='triton' cannot run cka here: the" in out
    assert "backend='cpp' cannot run cka here: switched off by KDK_NATIVE=0" in out


@pytest.mark.parametrize("kernel", [kd.RBF, kd.Laplacian], **by_name)
@pytest.mark.parametrize("sigma", [0, 0.0, -1.0, math.nan, math.inf, (1.0, 0.0), ("median", -1.0), ("mean", 0)])
def test_a_bandwidth_that_is_not_positive(kernel, sigma):
    with pytest.raises(ValueError, match=r"sigma is .*needs a positive finite number"):
        kernel(sigma)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_tensor_bandwidth_that_is_not_positive(value, backend):
    with pytest.raises(ValueError, match="sigma holds a value that is not positive: a bandwidth must be > 0"):
        kd.cka(X, Y, kernel=kd.RBF(torch.tensor(value)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_bandwidth_of_the_wrong_shape_or_dtype(backend):
    with pytest.raises(ValueError, match=r"sigma has shape \(2, 1\): RBF takes a 0-d tensor, or one value a group"):
        kd.RBF(torch.ones(2, 1))
    with pytest.raises(TypeError, match="sigma is a tensor of torch.int64: RBF needs a floating-point tensor"):
        kd.RBF(torch.tensor(2))
    with pytest.raises(ValueError, match="sigma has 3 values: give one, or one for each of the 2 groups"):
        kd.cka(X.expand(2, 8, 4), Y.expand(2, 8, 5), kernel=kd.RBF(torch.ones(3)), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", [op for op in OPS if "kernel" in inspect.signature(getattr(kd, op)).parameters])
def test_a_tensor_bandwidth_without_a_value(op, backend):
    with pytest.raises(ValueError, match="sigma is on meta, x on cpu: move both to one device"):
        run(op, kernel=kd.RBF(torch.ones((), device="meta")), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [kd.cka, kd.hsic, kd.mmd], **by_name)
def test_a_sum_of_kernels_or_a_rule_is_written_right(f, backend):
    for sigma, error, message in (
        ("mode", ValueError, "sigma is 'mode': the rules are 'median' and 'mean'"),
        ((), ValueError, "sigma is empty: RBF needs at least one bandwidth"),
        (None, TypeError, "sigma is None: RBF needs a positive number, a tensor or a rule"),
        (b"a", TypeError, "sigma is b'a': RBF needs a positive number"),
        (True, TypeError, "sigma is True: RBF needs a positive number"),
        (("median", "2"), TypeError, "the factor of sigma is '2': RBF needs a positive number"),
    ):
        with pytest.raises(error, match=message):
            call(f, X, Y, kernel=kd.RBF(sigma), backend=backend)


def test_a_polynomial_that_is_none():
    for degree in (1.5, 0, math.inf, math.nan, "2", True):
        with pytest.raises(ValueError, match=f"degree is {degree!r}: Polynomial needs an integer from 1 to 8"):
            kd.Polynomial(degree)
    for scale in (-1.0, "1", True):
        with pytest.raises(ValueError, match=f"scale is {scale!r}: Polynomial needs a positive number"):
            kd.Polynomial(2, scale=scale)
    for coef0 in (math.nan, None):
        with pytest.raises(ValueError, match=f"coef0 is {coef0!r}: Polynomial needs a finite number"):
            kd.Polynomial(2, coef0=coef0)


@pytest.mark.parametrize("f", [kd.cka, kd.hsic], **by_name)
def test_options_that_contradict_each_other(f):
    with pytest.raises(ValueError, match="center=False with unbiased=True: .* pass unbiased=False"):
        f(X, Y, center=False)
    with pytest.raises(
        ValueError, match="row_normalize=True with unbiased=True: row normalisation needs unbiased=False"
    ):
        f(X, Y, row_normalize=True)


def test_gram_mse_options():
    with pytest.raises(ValueError, match="normalize is 'column': give None or 'row'"):
        kd.gram_mse(X, Y, normalize="column")
    with pytest.raises(ValueError, match="reduction is 'none': give 'mean' or 'sum'"):
        kd.gram_mse(X, Y, reduction="none")


@pytest.mark.parametrize("f", PAIRED, **by_name)
def test_a_mask_of_the_wrong_kind(f):
    with pytest.raises(TypeError, match="mask is torch.float32: pass a bool tensor, True for the rows that count"):
        f(X, Y, mask=torch.ones(8))
    with pytest.raises(ValueError, match=r"mask has shape \(7,\): one entry a row of x is \(8,\)"):
        f(X, Y, mask=torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask is on meta, x on cpu: move both to one device"):
        f(X, Y, mask=torch.ones(8, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="mask is a list: pass a torch.Tensor"):
        f(X, Y, mask=[True] * 8)


def test_a_mask_of_mmd_is_a_pair():
    keep = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask: mmd takes a pair \(mask_x, mask_y\)"):
        kd.mmd(X, X, mask=keep)
    with pytest.raises(ValueError, match=r"mask\[1\] has shape \(7,\): one entry a row of x is \(8,\)|of y is"):
        kd.mmd(X, X, mask=(None, keep[:7]))


@pytest.mark.parametrize("f", EVERY, **by_name)
def test_debug_checks_name_the_argument_that_holds_nan(f):
    bad = X.clone()
    bad[3, 1] = math.nan
    assert call(f, bad, Y).isnan()
    with kd.debug_checks():
        with pytest.raises(ValueError, match="x holds NaN or infinity"):
            call(f, bad, Y)
        with pytest.raises(ValueError, match="y holds NaN or infinity"):
            call(f, X, bad)
        assert call(f, X, Y).isfinite()
    assert call(f, bad, Y).isnan()


def test_explain_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="op is 'cca': the ops are"):
        kd.explain("cca", X, Y)
    with pytest.raises(ValueError, match="explain needs the tensors of the call"):
        kd.explain("cka")
    with pytest.raises(ValueError, match="backend is 'numpy': give one of"):
        kd.explain("cka", X, Y, backend="numpy")
    assert str(kd.explain("cka", X, Y, backend="reference")) == "cka runs on reference: requested"


def test_auto_says_why_it_passed_over_a_better_backend():
    why = kd.explain("cka", X, Y).why
    assert "not triton: the tensors are on cpu" in why or "not triton: the package triton is not installed" in why
    assert set(kd.available_backends("cpu")) == {"reference", "torch", "cpp", "triton", "cuda"}
