# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host: what shapes settle is settled once, kept for the last shapes only, and changes no bit.

The launches run as machine code on CPU tensors, or a driver takes them that does nothing.
"""

import gc
import weakref

import pytest
import torch

import kdkernels as kd
from kdkernels.checks import Recent
from kdkernels.gram import op


def sides(n=12, p=5, q=7):
    return torch.randn(n, p, requires_grad=True), torch.randn(n, q)


def test_recent_keeps_the_last_and_no_more():
    recent = Recent(2)
    for key in "abc":
        recent.keep(key, key)
    assert [recent.get(key) for key in "abc"] == [None, "b", "c"]


def test_what_calls_have_settled_is_bounded_and_holds_no_tensor():
    x, y = sides()
    kd.cka(x, y, backend="torch").backward()
    seen = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    for n in range(4, 4 + op._settled.size + 20):
        kd.hsic(torch.randn(n, 2), torch.randn(n, 2), backend="torch")
    assert len(op._settled.found) == op._settled.size


def test_a_settled_call_still_refuses_what_equals_true_and_is_not():
    x, y = sides()
    kd.cka(x, y, unbiased=True)
    with pytest.raises(TypeError, match="unbiased is 1"):
        kd.cka(x, y, unbiased=1)


def test_a_settled_call_looks_at_values_under_debug_checks():
    x, y = sides()
    for _ in range(2):
        kd.cka(x, y)
    with kd.debug_checks(), pytest.raises(ValueError, match="x holds NaN"):
        kd.cka(x.detach() * torch.nan, y)


@pytest.mark.parametrize("change", ["dtype", "layout", "width", "nested", "options"])
def test_another_call_is_not_the_settled_one(change):
    x, y = sides()
    kd.cka(x, y, backend="torch")
    if change == "dtype":
        assert kd.cka(x.double(), y.double(), backend="torch").dtype == torch.float64
    elif change == "layout":
        with pytest.raises(TypeError, match="make it dense"):
            kd.cka(x.detach().to_sparse(), y, backend="torch")
    elif change == "nested":
        with pytest.raises(TypeError, match="nested"):
            kd.cka(torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(2, 2)]), y, backend="torch")
    elif change == "width":
        with pytest.raises(ValueError, match="y has 11 rows"):
            kd.cka(x, y[:11], backend="torch")
    else:
        biased = kd.cka(x, y, unbiased=False, backend="torch")
        assert torch.equal(biased, kd.cka(x, y, unbiased=False, mask=torch.ones(12, dtype=torch.bool), backend="torch"))


def test_a_first_call_inside_a_capture_says_what_to_do(monkeypatch):
    from kdkernels.gram import torch_impl

    def load(*_):  # what Triton says where a module cannot be loaded
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    x, y = sides()
    value = kd.cka(x, y, backend="torch")
    for direction, run in (("backward", value.backward), ("forward", lambda: kd.cka(x, y, backend="torch"))):
        with monkeypatch.context() as patch:
            patch.setattr(torch_impl, direction, load)
            with pytest.raises(RuntimeError, match="run the step once before the capture.*kd.warmup"):
                run()
    monkeypatch.setattr(torch_impl, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kd.cka(x, y, backend="torch")


def test_warmup_is_refused_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured: call warmup before"):
        kd.warmup(kd.cka, *sides())


def test_warmup_runs_both_directions_once_and_leaves_no_trace(monkeypatch):
    from kdkernels.gram import torch_impl

    ran = []
    for direction in ("forward", "backward"):
        original = getattr(torch_impl, direction)
        monkeypatch.setattr(torch_impl, direction, lambda *a, f=original, d=direction: ran.append(d) or f(*a))

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, y, *, kernel):
            self.calls += 1
            return {"cka": kd.cka(x + torch.rand(()), y, kernel=kernel, backend="torch"), "parts": [y.sum()]}

    module, (x, y), state = Counting(), sides(), torch.get_rng_state()
    kd.warmup(module, x.detach(), y, kernel="rbf")
    assert ran == ["forward", "backward"] and module.calls == 0 and torch.equal(torch.get_rng_state(), state)
    kd.warmup(module, x, y, kernel="rbf")
    assert ran == 2 * ["forward", "backward"] and x.grad is None and not y.requires_grad


LOSSES = {
    "cka linear": lambda x, y: kd.cka(x, y, backend="triton"),
    "cka rbf": lambda x, y: kd.cka(x, y, kernel=kd.RBF("mean"), backend="triton"),
    "kl": lambda x, y: kd.distillation_kl(x, y, backend="triton"),
    "jsd": lambda x, y: kd.generalized_jsd(x, y, backend="triton"),
    "rkd_angle": lambda x, y: kd.rkd_angle(x, y, backend="triton"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_odd_last_batch_specialises_no_kernel_more_than_twice(loss, monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed: nothing is specialised")
    from test_compile_variants import Driver
    from triton.runtime import driver

    from kdkernels import backend

    class Elsewhere(Driver):
        def get_current_device(self):
            return -2  # where no other test has compiled anything

    seen = {}

    def compiled(self, key, *_):
        seen.setdefault(self.__name__, set()).add(key)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(driver, "_active", Elsewhere())
    monkeypatch.setattr(backend, "_triton_obstacle", lambda *_: None)
    for n in (256, 255, 240, 137, 130):
        x, y = torch.randn(n, 512, requires_grad=True), torch.randn(n, 512)
        LOSSES[loss](x, y).backward()
    assert seen and all(len(keys) <= 2 for keys in seen.values()), {name: len(keys) for name, keys in seen.items()}


MACHINE = """
import contract, device, functools, itertools, torch
import kdkernels as kd
from kdkernels import autograd
from kdkernels.gram.triton_impl import direct
from triton.runtime.jit import JITFunction

on = device.install(90)
on.schedules = on.schedules[:1]
contract.allow_cpu_tensors()
through_triton, run = [], JITFunction.run

def counted(self, *arguments, **options):
    through_triton.append(self.__name__)
    return run(self, *arguments, **options)

JITFunction.run = counted

def step(x, y, **how):
    x = x.detach().requires_grad_()
    value = kd.cka(x, y, backend="triton", **how)
    return value.detach(), *torch.autograd.grad(value.sum(), x)

def both_ways(x, y, **how):
    '''Of the settled call, and of one that goes through the operators.'''
    first, again = step(x, y, **how), step(x, y, **how)
    with torch.profiler.profile():
        slow = step(x, y, **how)
    for a, b, c in zip(first, again, slow):
        assert torch.equal(a, b) and torch.equal(a, c), how

x, y = torch.randn(20, 33), torch.randn(20, 18)
both_ways(x, y)
before = len(through_triton)
step(x, y)
assert len(through_triton) == before, "a settled call went through Triton"
assert len(on.launches) > 0
both_ways(x[:, :5].expand(20, 5), y[:1].expand(20, 18) + y)
both_ways(x[:, 1:], y[:, 1:])  # addresses that 16 does not divide

# with a mask and without, in turn: each has launches of its own
for op in (functools.partial(kd.cka, kernel="cosine"), kd.cka, kd.gram_mse):
    for mask in (torch.arange(20) != 3, None, torch.arange(20) != 5):
        got = op(x, y, mask=mask, backend="triton")
        want = op(x.double(), y.double(), mask=mask, backend="reference")
        assert abs(got - want) <= 1e-5 * want.abs(), (op, mask, got, want)

# the rule: another sum than PyTorch's, so not the same bits, but those of every later call
how = {"kernel": kd.RBF(("mean", 0.5))}
groups = torch.randn(3, 20, 33), torch.randn(3, 20, 18)
first, again = step(*groups, **how), step(*groups, **how)
want = kd.cka(*(t.double() for t in groups), backend="reference", **how)
assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
assert (first[0] - want).abs().max() < 1e-6
step(x, y, kernel=kd.RBF((1.0, 2.0)))  # bandwidths in a tensor

# tensors that move: the same plan at addresses which 16 divides and at others
room = torch.randn(20 * 33 + 1)
for start in (0, 1, 0):
    at = room[start : start + 660].view(20, 33)
    assert torch.equal(step(at, y)[1], step(at.clone(), y)[1])

# a plan refuses second derivatives as the operator does, and takes batches of upstream gradients
x.requires_grad_()
value = kd.cka(x, y, backend="triton")
(first,) = torch.autograd.grad(value, x, create_graph=True)
try:
    first.sum().backward()
    raise AssertionError("a second derivative")
except RuntimeError as error:
    assert str(error) == autograd.SECOND
groups = torch.randn(3, 20, 33, requires_grad=True)
value = kd.cka(groups, torch.randn(3, 20, 18), backend="triton")
(rows,) = torch.autograd.grad(value, groups, torch.eye(3), is_grads_batched=True, retain_graph=True)
(whole,) = torch.autograd.grad(value, groups, torch.ones(3))
torch.testing.assert_close(rows.sum(0), whole)
assert rows[0, 1:].abs().max() == 0

# the forward divergence: other numbers and upstreams by the same launches
def kl(s, t, upstream, **how):
    s = s.detach().requires_grad_()
    value = kd.distillation_kl(s, t, **how)
    return value.detach(), *torch.autograd.grad(value, s, upstream.expand_as(value))

sides = torch.randn(2, 5, 48)
for s, t in (sides, sides[:, :, 1:41], sides.reshape(2, 5, 2, 24)[:, :, 1]):
    for reduction in ("mean", "none"):
        one = torch.ones(())
        # of each row its own, or the same for all, which has a stride of 0
        others = [torch.linspace(-1, 2, 5), torch.tensor(-2.0)] if reduction == "none" else [torch.tensor(0.75)]
        for upstream in (one, *others):
            kl(s, t, upstream, tau=1.0, reduction=reduction, backend="triton")
        before = len(through_triton)
        for tau, upstream in itertools.product((1.0, 3.0), (*others, one)):
            how = {"tau": tau, "reduction": reduction}
            got, want = (kl(s, t, upstream, backend=b, **how) for b in ("triton", "torch"))
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
        moved = len(through_triton) - before
        assert moved == 0 or s.data_ptr() % 16 or t.data_ptr() % 16, (s.shape, s.stride(), moved)

# where the driver is another one, nothing is launched by the old one
old, seen = on, len(on.launches)
on = device.install(80)
step(x, y)
assert len(old.launches) == seen and on.launches
"""


@pytest.mark.machine
@pytest.mark.compile_only
def test_a_settled_launch_is_the_one_that_triton_makes(python):
    pytest.importorskip("triton", reason="triton is not installed: there is nothing to launch")
    code = "import sys; sys.path.insert(0, 'tests/machine')\n" + MACHINE
    done = python("-c", code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
