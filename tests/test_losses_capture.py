# SPDX-License-Identifier: Apache-2.0
"""No loss reads a value on the host: every one of them goes through fake tensors, and on a GPU into a CUDA graph."""

import pytest
import torch
from test_losses_contract import CASES, N

# labels in CPU memory are looked at, to refuse those out of range; on a GPU they are not
LABELLED = ("dkd", "stkd", "stkd clean")


def emptied(loss, like):
    """The module with tensors of no content in the place of its own."""
    for module in loss.modules():
        for held in (module._buffers, module._parameters):
            for name, tensor in held.items():
                if tensor is not None:
                    fresh = like(tensor.shape, dtype=tensor.dtype)
                    held[name] = torch.nn.Parameter(fresh) if held is module._parameters else fresh
    return loss


@pytest.mark.parametrize("name", [name for name in CASES if name not in LABELLED])
def test_no_value_of_the_inputs_decides_what_a_loss_does(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    loss = CASES[name].make().eval()
    with FakeTensorMode():
        loss = emptied(loss, torch.empty)
        student, teacher = torch.empty(N, 10, requires_grad=True), torch.empty(N, CASES[name].classes)
        for options in ({}, {"mask": torch.empty(N, dtype=torch.bool)}):
            # reading one raises DataDependentOutputException, a shape that depends on one another error
            value = loss(student, teacher, **options)
            (gradient,) = torch.autograd.grad(value, student)
            assert value.shape == () and gradient.shape == student.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradient_replay_from_a_cuda_graph(name):
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    loss = case.make().eval().cuda()
    widths = 10, case.classes
    batches = [[torch.randn(N, width, generator=generator) for width in widths] for _ in range(2)]
    student, teacher = (t.cuda() for t in batches[0])
    student.requires_grad_()

    def step():
        value = loss(student, teacher)
        return value.detach(), torch.autograd.grad(value, student)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for batch in batches[::-1]:
        with torch.no_grad():
            student.copy_(batch[0])
            teacher.copy_(batch[1])
        graph.replay()
        for found, wanted in zip(captured, step(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
