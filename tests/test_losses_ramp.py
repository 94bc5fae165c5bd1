# SPDX-License-Identifier: Apache-2.0
"""Ramp: when it counts a step, when it does not, and that nothing recompiles or breaks backward."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from kdkernels.losses import CKALoss, KDLoss, Ramp


def sides():
    torch.manual_seed(0)
    return torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)


def weights(ramp, calls):
    """The weight used by each of the next calls."""
    student, teacher = sides()
    plain = ramp.loss(student, teacher)
    return [round((ramp(student, teacher) / plain).item(), 6) for _ in range(calls)]


def test_the_weight_rises_linearly_between_start_and_end():
    assert weights(Ramp(KDLoss(), 2, 6), 9) == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert weights(Ramp(KDLoss(), 0, 2), 4) == [0, 0.5, 1, 1]


def test_equal_start_and_end_switch_the_loss_on_at_that_step():
    assert weights(Ramp(KDLoss(), 3, 3), 5) == [0, 0, 0, 1, 1]
    assert weights(Ramp(KDLoss(), 0, 0), 2) == [1, 1]


def test_calls_in_eval_mode_count_no_step():
    ramp = Ramp(KDLoss(), 0, 4)
    weights(ramp, 2)
    holder = nn.ModuleDict({"loss": ramp}).eval()
    assert weights(ramp, 3) == [0.5, 0.5, 0.5]
    holder.train()
    assert weights(ramp, 2) == [0.5, 0.75]


def test_manual_counting_leaves_the_step_to_the_caller():
    ramp = Ramp(KDLoss(), 0, 4, count="manual")
    ramp.step()
    assert weights(ramp, 3) == [0.25, 0.25, 0.25]
    ramp.step()
    assert ramp.weight == 0.5 and ramp.steps == 2


def test_two_calls_before_one_backward_each_keep_their_own_weight():
    student, teacher = sides()
    ramp = Ramp(KDLoss(), 0, 2)
    values = [ramp(student, teacher) for _ in range(2)]
    (grad,) = torch.autograd.grad(sum(values), student)
    (plain,) = torch.autograd.grad(KDLoss()(student, teacher), student)
    torch.testing.assert_close(grad, 0.5 * plain)


def test_a_resumed_ramp_goes_on_where_it_was():
    first, second = Ramp(KDLoss(weight=2.0), 0, 4), Ramp(KDLoss(), 0, 4)
    weights(first, 3)
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"steps", "weight", "loss.weight"}
    assert second.loss.weight == 2 and weights(second, 2) == [0.75, 1]


def test_the_parts_are_ramped_as_the_total_is():
    student, teacher = sides()
    ramp = Ramp(CKALoss(weights=[1, 2]), 0, 4)
    ramp([student] * 2, [teacher] * 2)
    total, parts = ramp([student] * 2, [teacher] * 2, return_parts=True)
    assert len(parts) == 2
    torch.testing.assert_close(sum(parts.values()), total)
    torch.testing.assert_close(total, 0.25 * ramp.loss([student] * 2, [teacher] * 2))


def test_masks_and_other_options_reach_the_loss():
    student, teacher = sides()
    mask = torch.tensor([True, False] * 3)
    assert Ramp(KDLoss(), 0, 0)(student, teacher, mask=mask).equal(KDLoss()(student, teacher, mask=mask))


def test_a_compiled_ramp_rises_in_one_graph():
    torch._dynamo.reset()
    ramp, counter = Ramp(KDLoss(), 0, 4), CompileCounter()
    compiled = torch.compile(ramp, fullgraph=True, backend=counter)
    student, teacher = sides()
    plain = KDLoss()(student, teacher)
    assert [round((compiled(student, teacher) / plain).item(), 6) for _ in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert counter.frame_count == 1 and ramp.steps == 6


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="loss is a function: Ramp wraps a loss module"):
        Ramp(lambda s, t: 0, 0, 1)
    for start, end in ((5, 3), (-1, 3), (True, 3), (0, True), ("0", 3), (None, 3), (0, float("nan")), (0, math.inf)):
        with pytest.raises(ValueError, match=f"start is {start!r}, end is {end!r}: the steps must be numbers 0"):
            Ramp(KDLoss(), start, end)
    with pytest.raises(ValueError, match="count is 'steps': give 'calls' or 'manual'"):
        Ramp(KDLoss(), 0, 1, count="steps")
