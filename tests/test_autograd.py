# SPDX-License-Identifier: Apache-2.0
"""The direct way from a call to its implementation, and everyone who must still find the operator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import autograd


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))


def sides():
    return torch.randn(16, 8, requires_grad=True), torch.randn(16, 4)


def gradient(x, y):
    return torch.autograd.grad(kd.cka(x, y), x)[0]


def test_a_dispatch_mode_sees_both_operators():
    with Record() as record:
        gradient(*sides())
    assert {"kdkernels::gram_fwd", "kdkernels::gram_bwd"} <= set(record.seen)


def test_a_profiler_sees_both_operators():
    with torch.profiler.profile() as profile:
        gradient(*sides())
    assert {"kdkernels::gram_fwd", "kdkernels::gram_bwd"} <= {event.name for event in profile.events()}


def test_the_direct_way_and_the_operator_give_the_same_bits():
    x, y = sides()
    with Record():
        through_operator = gradient(x, y)
    assert torch.equal(gradient(x, y), through_operator)


def test_an_eager_call_leaves_the_operators_out(monkeypatch):
    class Nothing:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was dispatched")

    x, y = sides()
    monkeypatch.setattr(torch.ops, "kdkernels", Nothing())
    torch.autograd.grad(kd.cka(x, y, backend="torch"), x)


def test_a_subclass_keeps_its_operator():
    class Sub(torch.Tensor):
        pass

    assert autograd.plain(torch.zeros(1), None, torch.nn.Parameter(torch.zeros(1)))
    assert not autograd.plain(torch.zeros(1).as_subclass(Sub))


def test_backward_is_given_no_zeros_for_the_saved_pairs(monkeypatch):
    with Record():
        value = kd.cka(*sides())
    function, seen = type(value.grad_fn)._forward_cls, []
    original = function.backward

    def spy(ctx, grad, *of_saved):
        seen.append(of_saved)
        return original(ctx, grad, *of_saved)

    monkeypatch.setattr(function, "backward", staticmethod(spy))
    value.backward()
    assert seen == [(None, None)]
