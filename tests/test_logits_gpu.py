# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the logits family at the sizes they are made for, on a GPU; long rows in the interpreter."""

import pytest
import torch

import kdkernels as kd

SHAPES = [(8192, 1000), (64, 10), (16, 131072), (3, 1), (257, 2049)]
gpu = pytest.mark.gpu


def exact(student, teacher, tau):
    sides = [t.detach().double().requires_grad_() for t in (student, teacher)]
    value = kd.distillation_kl(*sides, tau=tau, backend="reference")
    return value.detach(), *torch.autograd.grad(value, sides)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("R, C", SHAPES)
def test_rows_of_every_size_equal_the_reference(R, C, dtype):
    student, teacher = ((4 * torch.randn(R, C, device="cuda")).to(dtype).requires_grad_() for _ in range(2))
    value = kd.distillation_kl(student, teacher, tau=4.0, backend="triton")
    want = exact(student, teacher, 4.0)
    assert abs(value.item() - want[0].item()) <= 2e-6 * abs(want[0].item()) + 1e-6
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 5e-6
    for got, grad in zip(torch.autograd.grad(value, (student, teacher)), want[1:], strict=True):
        # float16 gradients of a mean over many rows fall below its smallest normal number
        floor = 2.0**-24 * got.numel() ** 0.5 if dtype == torch.float16 else 1e-7
        assert (got.double() - grad).norm() <= rounding * grad.norm() + floor


@gpu
def test_offsets_beyond_32_bits_reach_the_right_rows():
    R, C = 17000, 131072  # 2.2e9 logits
    teacher = torch.zeros(1, C, device="cuda", dtype=torch.bfloat16).expand(R, C)
    student = torch.zeros(R, C, device="cuda", dtype=torch.bfloat16)
    student[-1] = torch.randn(C, device="cuda")
    rows = kd.distillation_kl(student, teacher, reduction="none", backend="triton")
    want = kd.distillation_kl(student[-1:].double(), teacher[-1:].double(), reduction="none", backend="reference")
    assert (rows[:-1].abs() < 1e-5).all()
    torch.testing.assert_close(rows[-1:].double(), want, rtol=1e-5, atol=1e-6)


@gpu
def test_a_step_takes_one_launch_a_pass_beside_the_mean():
    student, teacher = (torch.randn(512, 1000, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    kd.distillation_kl(student, teacher, backend="triton").backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        value = kd.distillation_kl(student, teacher, backend="triton")
        torch.autograd.grad(value, student)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # where a profiler looks on, as in a compiled graph, the gradient is made by the backward pass
    assert {"kl_rows", "kl_again"} <= {*kernels} and len(kernels) <= 5, kernels


@gpu
def test_labels_and_shares_out_of_range_make_their_row_nan_and_no_other():
    student, teacher = (torch.randn(4, 10, device="cuda") for _ in range(2))
    student.requires_grad_()
    a, b = torch.tensor([0, 10, 2, 3], device="cuda"), torch.tensor([1, 1, -1, 3], device="cuda")
    lam = torch.tensor([0.5, 0.5, 0.5, 1.5], device="cuda")
    rows = kd.mixed_distillation(student, teacher, a, b, lam, tau=4.0, alpha=0.5, reduction="none")
    assert rows.isnan().tolist() == [False, True, True, True]
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert grad.isnan().all(-1).tolist() == [False, True, True, True] and grad[0].isfinite().all()


@pytest.mark.interpret
def test_long_rows_in_blocks_equal_the_reference_in_the_interpreter(python):
    """Three blocks of 2048 with the largest logits first, last, and all before the last block closed."""
    code = """
import torch, kdkernels as kd
torch.manual_seed(0)
for case in range(4):
    s, t = (4 * torch.randn(3, 5003) for _ in range(2))
    if case == 1:
        s[:, :7] += 500; t[:, -9:] += 500
    if case == 2:
        s[:, -3:] += 500; t[:, :5] += 300
    if case == 3:
        s[:, :4100] = t[:, :4100] = -torch.inf
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        a, b = (x.to(dtype).requires_grad_() for x in (s, t))
        value = kd.distillation_kl(a, b, tau=3.0, reduction="none", backend=backend)
        found.append([value.detach().double(), *(g.double() for g in torch.autograd.grad(value.sum(), (a, b)))])
    for got, want in zip(*found):
        # a gradient of the teacher is a difference of logs, and 500 apart these are large
        size = want.abs().max() + found[1][0].max() / 27
        assert (got - want).abs().max() <= 2e-6 * size, (case, (got - want).abs().max(), want.abs().max())
print("equal")
"""
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr[-2000:]
