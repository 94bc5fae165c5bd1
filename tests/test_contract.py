# SPDX-License-Identifier: Apache-2.0
"""Every op keeps the contract of `kdkernels.testing` on every backend that runs here; Triton in its interpreter."""

import importlib
import re

import pytest
import torch

from kdkernels import backend as backends
from kdkernels import native, testing
from kdkernels.__main__ import main
from kdkernels.registry import OPS
from kdkernels.testing import transforms
from kdkernels.testing.case import evaluate, rounded
from kdkernels.testing.checks import CUDA_ONLY, STRUCTURAL, viewed, views
from kdkernels.testing.probe import probe_of
from kdkernels.testing.yardstick import Yardstick, doubled, expanded, moved

TRACED = ("traced", "compiled", "exported")
ON_THE_CPU = ["accuracy", *(name for name in STRUCTURAL if name not in CUDA_ONLY)]


def assert_kept(results):
    failed = [result for result in results if not result.ok]
    lines = [f"{r.check}: {r.case}: {r.error:.1e} > {r.budget:.1e} {r.note}" for r in failed]
    assert not failed, "\n".join([f"{len(failed)} of {len(results)} measurements failed", *lines[:20]])
    assert results


def _on_the_cpu():
    """Each op with each of its backends on the CPU; triton runs in a process of its own."""
    for op in OPS.values():
        for backend in ("reference", "torch", "cpp"):
            if backend in op.backends:
                why = backends.obstacle(backend, "cpu", op=op.name)
                native = [pytest.mark.native] if backend == "cpp" else []
                marks = [*native, pytest.mark.skipif(why is not None, reason=why or "it runs")]
                yield pytest.param(op.name, backend, marks=marks)


@pytest.mark.parametrize("check", ON_THE_CPU)
@pytest.mark.parametrize("op, backend", list(_on_the_cpu()))
def test_an_op_keeps_the_contract(op, backend, check):
    if check not in testing.checks_for(backend, "cpu"):
        assert backend == "reference" and check in ("accuracy", "autocast", "nonfinite", *transforms.CHECKS)
        return
    if check in TRACED and backend == "torch" and backends.obstacle("cpp", "cpu", op=op) is None:
        # asked of cpp in full: what is traced are the same operators with another word among their arguments
        results = list(STRUCTURAL[check](probe_of(_probes(op)[0], backend, "cpu")))
    else:
        results = testing.contract(op, backend, "cpu", quick=True, checks=[check])
    if not asks(check, op, backend):
        assert not results
        return
    assert_kept(results)


def asks(check, op, backend):
    """Whether a probe has what the check is about. Ranking rows, for one, have their absent entries in themselves, as
    -inf: the accuracy cases cover those."""
    probes = _probes(op, backend)
    if check == "masks":
        return any(case.masks for case in probes)
    if check == "second derivative" and backend == "reference":
        return any(case.gradient and not case.linear and not case.ruled for case in probes)
    if check in transforms.OF_GRADIENTS:
        return any(case.gradient and not (case.linear and check == "second derivative") for case in probes)
    return True


def test_the_mask_check_has_something_to_check():
    assert all(asks("masks", op, "torch") for op in ("cka", "hsic", "mmd", "gram_mse"))
    for op in OPS.values():
        for case in importlib.import_module(f"kdkernels.{op.family}.spec").cases(op.name, "torch", quick=True):
            for mask in case.masks:  # one that drops nothing, or all, asks nothing
                assert case.inputs[mask].any() and not case.inputs[mask].all(), (op.name, case.name)


def _probes(op, backend="torch"):
    spec = importlib.import_module(f"kdkernels.{OPS[op].family}.spec")
    return [case for case in spec.cases(op, backend, quick=True) if case.probe]


@pytest.mark.parametrize("op", OPS)
def test_one_rounding_of_its_inputs_moves_no_probe_far_beyond_its_cap(op):
    """Where two layouts are added up in two orders, an ill-conditioned probe would say what the BLAS is, not the op."""
    for case in _probes(op):
        given = rounded(case, torch.float32, "cpu")
        for name, view in views(case).items():
            inputs = {k: t.contiguous() for k, t in viewed(case, given, view).items()}
            yardstick = Yardstick(case, inputs, "torch", expanded)
            for seed in range(2):
                near = doubled(case, moved(case, inputs, torch.Generator().manual_seed(seed)))
                found = yardstick.errors(evaluate(case, near, "reference", yardstick.oracle.upstream), yardstick.oracle)
                for part, error, cap in found:
                    assert max(error) <= 5 * cap, (case.name, name, part, error, cap)


def along(case, step):
    """sum(upstream * value) of the textbook in float64, the leaves moved by this step, and its gradient's component."""
    inputs = doubled(case, case.inputs)
    ways = {name: torch.cos(torch.arange(inputs[name].numel())).reshape(inputs[name].shape) for name in case.leaves}
    moved = inputs | {name: (inputs[name] + step * way).requires_grad_() for name, way in ways.items()}
    with case.context():
        value = case.call(moved, "reference")
    total = (value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)).sum()
    grads = torch.autograd.grad(total, [moved[name] for name in ways])
    terms = [grad * way for grad, way in zip(grads, ways.values(), strict=True)]
    return total.detach(), sum(t.sum() for t in terms), sum(t.abs().sum() for t in terms)


@pytest.mark.parametrize("op", OPS)
def test_the_textbooks_gradient_is_the_derivative_of_its_value(op):
    for case in _probes(op, "reference"):
        if case.gradient and not case.ruled:
            ahead, behind = along(case, 1e-5)[0], along(case, -1e-5)[0]
            _, slope, size = along(case, 0.0)
            assert abs(slope - (ahead - behind) / 2e-5) <= 1e-6 * size, case.name


# as another machine would run it: no vector instructions in ATen, in MKL those that every x86-64 has
ANOTHER_CPU = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
NUMBERS = """
import torch
from kdkernels import backend, testing
from kdkernels.registry import OPS
assert torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"), torch.backends.cpu.get_cpu_capability()
for op in OPS.values():
    for name in op.backends:
        if backend.obstacle(name, "cpu", op=op.name) is None:
            checks = [c for c in testing.checks_for(name, "cpu") if c not in testing.transforms.CHECKS]
            results = testing.contract(op.name, name, quick=True, checks=checks)
            assert results and all(r.ok for r in results), (op.name, name, [r for r in results if not r.ok][:5])
print("kept")
"""


@pytest.mark.slow
def test_every_op_keeps_the_contract_on_another_cpu(python):
    done = python("-c", NUMBERS, **ANOTHER_CPU)
    assert done.stdout.strip() == "kept", done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_an_op_keeps_the_contract_in_every_combination_of_options(op):
    assert_kept(testing.contract(op, "torch", "cpu", checks=["accuracy"]))


# the real kernels: in a process of its own, as triton reads the variable when it is imported
@pytest.mark.interpret
@pytest.mark.parametrize(
    "op",
    [
        pytest.param(
            op.name,
            marks=[pytest.mark.slow] if op.name in ("cka", "hsic", "mmd", "rkd_angle", "soft_rank", "spearman") else [],
        )
        for op in OPS.values()
        if "triton" in op.backends
    ],
)
def test_an_op_keeps_the_contract_in_tritons_interpreter(op, python):
    done = python(
        "-m", "kdkernels", "validate", "--op", op, "--backend", "triton", "--device", "cpu", "--quick",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "every measurement is within its budget" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op, backend", [(op.name, b) for op in OPS.values() for b in ("torch", "triton", "cuda") if b in op.backends]
)
def test_an_op_keeps_the_contract_on_a_gpu(op, backend):
    assert_kept(testing.contract(op, backend, "cuda"))


def test_every_regime_kernel_and_estimator_is_in_the_quick_contract():
    from kdkernels.gram import spec

    names = [case.name for case in spec.cases("cka", "torch", quick=True)]
    for word in (*spec.REGIMES, *spec.KERNELS, *spec.ESTIMATORS, "tiles", "size", "width", "masked", "nan", "constant"):
        assert any(word in name for name in names), word
    assert {d for case in spec.cases("cka", "torch", quick=True) for d in case.dtypes} == set(spec.EVERY_DTYPE)


def test_the_contract_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="op is 'nothing': the ops are"):
        testing.contract("nothing", "torch")
    with pytest.raises(ValueError, match=r"checks holds \['speed'\]: the checks are"):
        testing.contract("cka", "torch", checks=["speed"])
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run soft_rank here: the tensors are on cpu"):
        testing.contract("soft_rank", "cuda")


def test_validate_prints_a_table_and_returns_zero(capsys):
    assert main(["validate", "--op", "gram_mse", "--backend", "torch", "--device", "cpu", "--quick"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^gram_mse +torch +gradient x", out, re.M) and "every measurement is within its budget" in out


def test_validate_returns_one_and_names_the_case_of_a_broken_op(monkeypatch, capsys):
    from kdkernels.gram import torch_impl

    right = torch_impl.forward
    monkeypatch.setattr(torch_impl, "forward", lambda *a: (right(*a)[0] * 1.01, *right(*a)[1:]))
    assert main(["validate", "--op", "gram_mse", "--backend", "torch", "--device", "cpu", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "FAILED gram_mse torch value: plain sum bland 33x7x5 float32: " in out


def test_validate_refuses_a_backend_that_cannot_run(capsys):
    assert main(["validate", "--backend", "cuda", "--device", "cpu", "--quick"]) == 2
    assert "cka on cuda cannot run: cka has" in capsys.readouterr().err
    assert main(["validate", "--device", "tpu"]) == 2
    assert "device is 'tpu': give cpu or cuda" in capsys.readouterr().err


def test_info_says_what_is_loaded_and_what_runs_where(capsys, python):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch      ", "triton     ", "compiled libraries", "float32 tensors on cpu", "available; runs "):
        assert word in out
    for block in out.split("\nfloat32 tensors on ")[1:]:
        lines = re.sub(r"\n {12}", " ", block).splitlines()
        for op in OPS:
            (said,) = (line for line in lines if re.search(rf"\b{op}\b", line))
            chosen, _ = backends.choose(op, "auto", block.split()[0], (torch.float32,))
            assert said.split()[0] == chosen or f"{op} runs on {chosen}: " in said
    assert max(map(len, out.splitlines())) <= 120
    done = python("-m", "kdkernels", "info", KDK_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "  cpp       switched off by KDK_NATIVE=0\n  torch     available; runs cka," in done.stdout
    price = "soft ranks, sorts and Spearman take 10 to 50 times as long without it"
    assert price in done.stdout and (price in out) == (not native.has("cpu"))
