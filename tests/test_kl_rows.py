# SPDX-License-Identifier: Apache-2.0
"""The forward divergence as compiled for a GPU: a gradient that is made with the value and handed over once."""

import pytest
from conftest import ROOT, load_by_path

pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels and carries the disassembler")

compiler = load_by_path(ROOT / "tests" / "simt" / "build.py").compiler()
pytestmark = [
    pytest.mark.machine,
    pytest.mark.compile_only,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
]

BEGIN = f"""
import math, sys
sys.path.insert(0, {str(ROOT / "tests" / "machine")!r})
import contract, device, torch
import kdkernels as kd

contract.allow_cpu_tensors()
machine = device.install(90)
torch.manual_seed(0)

def sides(*shape, dtype=torch.float32):
    s, t = (3 * torch.randn(shape, dtype=torch.float32) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype)

def kl(s, t, **how):
    return kd.distillation_kl(s, t, tau=2.0, backend="triton", **how)

def exact(s, t, upstream):
    z = s.detach().double().requires_grad_()
    value = kd.distillation_kl(z, t.double(), tau=2.0, backend="reference")
    return torch.autograd.grad(value, z, torch.tensor(upstream).double())[0]

def launched():
    names = [launch.function.name for launch in machine.launches]
    machine.launches.clear()
    return names
"""
TESTS = {
    "one launch makes both, and an upstream of 1 reads no row": """
s, t = sides(40, 100)
value = kl(s, t)
assert launched() == ["kl_rows"]
torch.autograd.grad(value, s, torch.tensor(1.0), retain_graph=True)
steps = machine.launches[0].steps
assert launched() == ["kl_again"]
torch.autograd.grad(kl(s, t), s, torch.tensor(0.9))
assert 5 * steps < machine.launches[-1].steps
""",
    "any upstream is multiplied in and rounded once; a second pass finds the same": """
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    s, t = sides(6, 130, dtype=dtype)
    for upstream in (1.0, 0.5, -3.0, 0.9, 0.0, 65536.0):
        want, value = exact(s, t, upstream), kl(s, t)
        for _ in range(2):
            (found,) = torch.autograd.grad(value, s, torch.tensor(upstream), retain_graph=True)
            if dtype == torch.float32:
                assert (found - want).abs().max() <= 5e-7 * want.abs().max()
            else:
                assert (found != want.to(dtype)).float().mean() < 0.02, (dtype, upstream)
""",
    "what was handed out is its owner's": """
s, t = sides(5, 40)
value = kl(s, t)
value.backward(retain_graph=True)
once = s.grad.clone()
s.grad.mul_(2)
value.backward()
torch.testing.assert_close(s.grad, 3 * once)
""",
    "no upstream, no gradient, whatever a row holds; NaN goes on": """
for dtype in (torch.float32, torch.float16):
    s, t = sides(4, 30, dtype=dtype)
    t[1, 3] = math.nan
    value = kl(s, t)
    assert (torch.autograd.grad(value, s, torch.tensor(0.0), retain_graph=True)[0] == 0).all()
    assert torch.autograd.grad(value, s, torch.tensor(math.nan))[0].isnan().all()
""",
    "a weight of the loss is in it": """
s, t = sides(7, 50)
loss = kd.losses.KDLoss(tau=2.0, weight=0.3, backend="triton")
value = loss(s, t)
torch.testing.assert_close(value, 0.3 * kl(s, t), rtol=1e-6, atol=0)
(found,) = torch.autograd.grad(value, s)
assert launched() == ["kl_rows", "kl_rows", "kl_again"]
torch.testing.assert_close(found.double(), exact(s, t, 0.3), rtol=1e-5, atol=1e-9)
""",
    "equal sides have the value and the gradient 0": """
for C in (1, 10, 1000):
    s, _ = sides(3, C)
    value = kl(s, s.detach().clone())
    assert value == 0 and (torch.autograd.grad(value, s)[0] == 0).all()
""",
    "rows that a first piece says nothing of": """
for width in (100, 600, 9000):
    z, t = 3 * torch.randn(9, width), 3 * torch.randn(9, width)
    z[0, -3:] += 900; t[1, :2] += 900; z[2, : width // 2] = -torch.inf; t[2, : width // 2] = -torch.inf
    z[3] += 1e4; t[3] -= 3e4; z[4, 5:] = -1e30; t[4, 5:] = -1e30; z[5] = -3e38; t[5] = -3e38; t[6, 1] = -torch.inf
    for tau in (0.5, 1e4):
        a, b = z.clone().requires_grad_(), z.double().requires_grad_()
        rows = [kd.distillation_kl(x, t.to(x.dtype), tau=tau, reduction="none", backend=k)
                for x, k in ((a, "triton"), (b, "reference"))]
        torch.testing.assert_close(rows[0].double(), rows[1], rtol=1e-4, atol=1e-4)
        found, want = (torch.autograd.grad(r.sum(), x)[0] for r, x in zip(rows, (a, b)))
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=2e-5 * tau)
""",
    "a second derivative is refused": """
s, t = sides(3, 20)
(g,) = torch.autograd.grad(kl(s, t), s, create_graph=True)
try:
    g.sum().backward()
except RuntimeError as error:
    assert "second derivative" in str(error)
else:
    raise AssertionError("not refused")
""",
    "gradients of several upstreams at once": """
s, t = sides(3, 20)
value = kl(s, t)
upstreams = torch.tensor([1.0, 0.5, -2.0])
(found,) = torch.autograd.grad(value, s, upstreams, is_grads_batched=True)
want = exact(s, t, 1.0) * upstreams[:, None, None]
torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-8)
""",
}


@pytest.mark.parametrize("name", TESTS)
def test_a_gradient_that_is_made_with_the_value(name, python):
    done = python("-c", BEGIN + TESTS[name])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
