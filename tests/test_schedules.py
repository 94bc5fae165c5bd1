# SPDX-License-Identifier: Apache-2.0
"""The three Triton schedules: in the interpreter on small tiles, and on a GPU at the sizes they are made for."""

import pytest
import torch

import kdkernels as kd


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("leg", ["--small", "--large"])
def test_every_schedule_equals_the_reference_in_the_interpreter(python, leg):
    done = python("tests/interpreted_schedules.py", leg, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.split(" comparisons")[0].split()[-1]) > 50


@pytest.mark.interpret
def test_a_dropped_gradient_term_is_reported(python):
    done = python("tests/interpreted_schedules.py", "--break", timeout=300)
    assert done.returncode == 1 and "1 comparisons, 1 failed" in done.stdout, done.stdout + done.stderr


SHAPES = [(64, 512, 512), (127, 100, 33), (129, 512, 2048), (1000, 256, 256), (1025, 64, 96), (2049, 256, 300)]
SHAPES += [(3000, 1024, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["linear", "polynomial", "cosine", kd.RBF(20.0), kd.Laplacian(20.0)])
@pytest.mark.parametrize("n, p, q", SHAPES)
@pytest.mark.parametrize("features", ["activations", "mean zero", "low rank"])
def test_every_schedule_equals_the_reference_on_the_gpu(features, n, p, q, kernel, dtype):
    x, y = torch.randn(n, p, device="cuda"), torch.randn(n, q, device="cuda")
    if features == "low rank":  # differences of rows carry all digits; rbf weights cancel
        x, y = (t[:, :8] @ torch.randn(8, t.shape[1], device="cuda") / 8**0.5 for t in (x, y))
    y = y + x[:, :1]
    if features == "activations":  # the rows as given hide how a difference of them is rounded
        x, y = x.relu() + 3, y.relu()
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    true = [t.detach().double().requires_grad_() for t in (x, y)]
    value = kd.cka(x, y, kernel=kernel, backend="triton")
    value.backward()
    reference = kd.cka(*true, kernel=kernel, backend="reference")
    reference.backward()
    half = dtype != torch.float32
    assert abs(value.item() - reference.item()) <= (1e-4 if half else 5e-6 if kernel == "polynomial" else 1e-6)
    for got, want in ((x.grad, true[0].grad), (y.grad, true[1].grad)):
        error = (got.double() - want).norm() / want.norm()
        rounding = (want.to(dtype).double() - want).norm() / want.norm()
        assert error <= (1e-3 if half else 2e-5) + rounding


@pytest.mark.gpu
def test_offsets_beyond_32_bits_reach_the_right_rows():
    x = torch.randn(1000, 2_300_000, device="cuda", dtype=torch.bfloat16)  # 2.3e9 elements
    y = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16)
    true = torch.zeros(1000, 1000, device="cuda", dtype=torch.float64)
    for columns in x.split(100_000, dim=1):
        true += columns.float() @ columns.float().T
    centred = kd.gram.reference.hsic_of(true, y.double() @ y.double().T, True, True)
    assert torch.allclose(kd.hsic(x, y, backend="triton").double(), centred, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("n, launches", [(64, 2), (512, 3)])
def test_a_forward_call_takes_the_promised_launches(n, launches):
    x, y = (torch.randn(n, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    kd.cka(x, y)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        kd.cka(x, y)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == launches, [event.name for event in kernels]
