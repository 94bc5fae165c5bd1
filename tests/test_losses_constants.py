# SPDX-License-Identifier: Apache-2.0
"""Constants of losses, their weights and what they have fitted, keep their digits in a model of any dtype."""

import pytest
import torch
from test_losses_contract import CASES, sides


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_and_a_default_dtype_leave_the_constants_of_a_loss_as_they_are(name, cast):
    student, teacher = sides(CASES[name])
    loss = CASES[name].make().eval()
    loss.weight.fill_(100_003.7)  # no half has it
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    expected = loss(student, teacher)
    loss.to(cast)
    assert all(
        buffer.dtype == before[name].dtype and buffer.equal(before[name]) for name, buffer in loss.named_buffers()
    )
    if not list(loss.parameters()):  # an adapter is trained, and cast, as any layer
        assert loss(student, teacher).equal(expected)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(cast)
    try:
        found = {
            name: buffer.dtype for name, buffer in CASES[name].make().named_buffers() if buffer.is_floating_point()
        }
    finally:
        torch.set_default_dtype(standard)
    assert {dtype for dtype in found.values() if dtype.itemsize < 4} == set()
