# SPDX-License-Identifier: Apache-2.0
"""What the maker gives to every operator, asked of two small ones: a derivative is right or an error, never 0."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import kdkernels  # noqa: F401
from kdkernels import differentiable

SECOND = "second derivative of this op is not written out: pass backend='reference'"
seen = []  # what the backward pass of `weighted` was given


def _weighted_backward(grad, x, w, scale, need):
    seen.append((x, w, need))
    g = scale * grad[..., None]
    return (2 * g * w * x if need & 1 else None), ((g * x.square()).reshape(-1, *w.shape).sum(0) if need & 2 else None)


# value_i = scale sum_j w_j x_ij^2: rows of x, and w shared by all; offset has no derivative
weighted = differentiable.operator(
    "test_weighted",
    "x w offset?",
    "float scale",
    "",
    wanted="x w",
    read="x w",
    forward=lambda x, w, offset, scale, need: ((scale * w * x.square()).sum(-1) + (0 if offset is None else offset),),
    backward=_weighted_backward,
    fake=lambda x, w, offset, scale, need: (x.new_empty(x.shape[:-1]),),
    tangent=differentiable.of_rows(0),
)
# its gradient is made with the value: backward reads no input, and the upstream gradient may be a constant
cubes = differentiable.operator(
    "test_cubes",
    "x",
    "",
    "slope",
    wanted="x:slope",
    read="",
    forward=lambda x, need: (x.pow(3).sum(-1), 3 * x.square()),
    backward=lambda grad, slope, need: (grad[..., None] * slope,),
    fake=lambda x, need: (x.new_empty(x.shape[:-1]), x.new_empty(x.shape)),
    tangent=differentiable.of_rows(0),
)
CALLS = {
    "weighted": (lambda x: weighted.value(x, W.to(x.dtype), None, 0.5), lambda x: (0.5 * W.to(x.dtype) * x**2).sum(-1)),
    "cubes": (lambda x: cubes.value(x), lambda x: x.pow(3).sum(-1)),
}
W = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
both = pytest.mark.parametrize("op, formula", [pytest.param(*pair, id=name) for name, pair in CALLS.items()])


def rows(*shape):
    return torch.randn(*shape, 3, dtype=torch.float64)


@both
def test_both_operators_pass_opcheck(op, formula):
    torch.library.opcheck(torch.ops.kdkernels.test_cubes_fwd, (rows(4), 1))
    torch.library.opcheck(torch.ops.kdkernels.test_weighted_fwd, (rows(4), W, None, 0.5, 3))
    torch.library.opcheck(torch.ops.kdkernels.test_weighted_bwd, (torch.ones(4).double(), rows(4), W, 0.5, 2))
    assert torch.autograd.gradcheck(op, rows(4).requires_grad_())


def test_a_schema_says_what_may_be_absent():
    forward, backward = (getattr(torch.ops.kdkernels, f"test_weighted_{way}").default._schema for way in ("fwd", "bwd"))
    arguments = "(Tensor x, Tensor w, Tensor? offset, float scale, int need) -> Tensor value"
    assert str(forward) == f"kdkernels::test_weighted_fwd{arguments}"
    arguments = "(Tensor grad, Tensor x, Tensor w, float scale, int need) -> (Tensor d_x, Tensor d_w)"
    assert str(backward) == f"kdkernels::test_weighted_bwd{arguments}"


def test_only_what_is_asked_for_is_computed():
    x, w = rows(4).requires_grad_(), W.clone()
    weighted.value(x, w, None, 0.5).sum().backward()
    assert seen.pop()[2] == 1
    w.requires_grad_()
    weighted.value(x.detach(), w, None, 0.5).sum().backward()
    assert seen.pop()[2] == 2


# ---- forward mode


@both
def test_tangents_are_those_of_the_formula(op, formula):
    x, v = rows(2, 4), rows(2, 4)
    for got, want in zip(torch.func.jvp(op, (x,), (v,)), torch.func.jvp(formula, (x,), (v,)), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.jacfwd(op)(x), torch.func.jacrev(formula)(x))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(formula, (x,), (v,))[1])


@both
def test_tangents_and_batches_go_through_each_other(op, formula):
    x, v = rows(2, 4), rows(2, 4)
    want = torch.func.jvp(formula, (x,), (v,))[1]
    each = torch.func.vmap(lambda a, b: torch.func.jvp(op, (a,), (b,))[1])(x, v)
    torch.testing.assert_close(each, want)
    torch.testing.assert_close(torch.func.jvp(torch.func.vmap(op), (x,), (v,))[1], want)


@both
def test_a_compiler_leaves_torch_func_grad_to_eager_code_or_says_that_it_cannot(op, formula):
    """Traced there, no tensor says that it requires a gradient: it would be 0."""
    x = rows(4)
    gradient = lambda a: torch.func.grad(lambda b: op(b).sum())(a)  # noqa: E731
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="torch.func.grad of test_"):
        torch.compile(gradient, backend="eager", fullgraph=True)(x)


@both
def test_a_compiler_leaves_forward_mode_to_eager_code_or_says_that_it_cannot(op, formula):
    x, v = rows(4), rows(4)
    tangent = lambda a: torch.func.jvp(op, (a,), (v,))[1]  # noqa: E731
    torch.testing.assert_close(torch.compile(tangent, backend="eager")(x), tangent(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="forward-mode differentiation of test_"):
        torch.compile(tangent, backend="eager", fullgraph=True)(x)


def test_what_has_no_rule_is_refused_and_one_number_always_has_one():
    x, t = rows(4), torch.ones_like(W)
    shared = lambda w: weighted.value(x, w, None, 0.5)  # noqa: E731
    with pytest.raises(RuntimeError, match="test_weighted: forward-mode .* pass backend='reference'"):
        torch.func.jvp(shared, (W,), (t,))
    one = lambda w: weighted.value(x[0], w, None, 0.5)  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(one, (W,), (t,))[1], 0.5 * x[0].square().sum())
    with pytest.raises(RuntimeError, match="test_weighted: offset has a tangent"):
        torch.func.jvp(lambda o: weighted.value(x, W, o, 0.5), (rows()[0],), (rows()[0],))


# ---- second derivatives


def reverse_over_reverse(op, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)  # a constant upstream gradient
    return torch.autograd.grad(gradient.sum(), x)


def beside_a_loss(op, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
    return torch.autograd.grad(x.sum() + gradient.square().sum(), x)


def dual_of_gradient(op, x):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        return torch.autograd.grad(op(x).sum(), x, create_graph=True)


SECONDS = {
    "reverse over reverse": reverse_over_reverse,
    "beside a loss": beside_a_loss,
    "torch.func": lambda op, x: torch.func.jacrev(torch.func.jacrev(op))(x),
    "forward over reverse": lambda op, x: torch.func.hessian(lambda a: op(a).sum())(x),
    "reverse over forward": lambda op, x: torch.func.grad(lambda a: torch.func.jvp(op, (a,), (x,))[1].sum())(x),
    "dual numbers over reverse": dual_of_gradient,
}


@both
@pytest.mark.parametrize("way", SECONDS)
def test_second_derivatives_are_refused(way, op, formula):
    with pytest.raises(RuntimeError, match=SECOND):
        SECONDS[way](op, rows(4))


def test_a_first_derivative_may_carry_a_graph():
    x = rows(4).requires_grad_()
    (gradient,) = torch.autograd.grad(cubes.value(x).sum(), x, create_graph=True)
    torch.testing.assert_close(gradient.detach(), 3 * x.detach().square())


# ---- batches of calls and of upstream gradients


@both
def test_batches(op, formula):
    x = rows(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a batch of calls is a loop
        torch.testing.assert_close(torch.func.vmap(op)(x), formula(x))
        got = torch.func.vmap(torch.func.grad(lambda a: op(a).sum()))(x)
    torch.testing.assert_close(got, torch.func.grad(lambda a: formula(a).sum())(x))


@both
def test_batches_of_upstream_gradients(op, formula):
    x, eye = rows(4).requires_grad_(), torch.eye(4, dtype=torch.float64)
    want = torch.autograd.grad(formula(x), x, eye, is_grads_batched=True)[0]
    torch.testing.assert_close(torch.autograd.grad(op(x), x, eye, is_grads_batched=True)[0], want)


# ---- tensors made under inference mode


def under_inference_mode(*shape):
    with torch.inference_mode():
        return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_a_teacher_made_under_inference_mode_is_copied_and_no_other_is(backend):
    torch._dynamo.reset()
    x, made, plain = rows(4).requires_grad_(), under_inference_mode(3), W.clone()
    f = lambda x, w: weighted.value(x, w.view_as(w), None, 0.5).sum()  # noqa: E731
    run = f if backend is None else torch.compile(f, backend=backend, fullgraph=True)
    for w in (made, plain, made) if backend != "inductor" else (made,):  # which takes seconds for each
        seen.clear()
        (gradient,) = torch.autograd.grad(run(x, w), x)
        torch.testing.assert_close(gradient, x.detach() * w)
        own = [t for _, t, _ in seen if type(t) is torch.Tensor and t.data_ptr() == w.data_ptr()]
        assert len(own) == (w is plain)


def test_nothing_is_copied_inside_inference_mode():
    with torch.inference_mode():
        assert weighted.value(rows(4), W, None, 0.5).is_inference()


# ---- what else is seen to


def test_autocast_does_not_reach_inside():
    dtypes = []

    def forward(x, need):
        dtypes.append((x @ x.mT).dtype)
        return ((x @ x.mT).sum(),)

    product = differentiable.operator(
        "test_product",
        "x",
        "",
        "",
        wanted="x",
        forward=forward,
        backward=lambda grad, x, need: (grad * 2 * x.sum(0).expand_as(x),),
        fake=lambda x, need: (x.new_empty(()),),
    )
    with torch.autocast("cpu", torch.bfloat16):
        product.value(torch.randn(4, 3, requires_grad=True)).backward()
    assert dtypes == [torch.float32]


def test_tracing_reads_no_value():
    graph = make_fx(lambda x: torch.func.grad(lambda a: cubes.value(a).sum())(x), tracing_mode="symbolic")(rows(4))
    names = {str(node.target) for node in graph.graph.nodes}
    assert {"kdkernels.test_cubes_fwd.default", "kdkernels.test_cubes_bwd.default"} <= names
    x = rows(9)
    torch.testing.assert_close(graph(x), 3 * x.square())
    assert cubes.value(torch.empty(4, 3, device="meta")).shape == (4,)


def test_a_value_that_is_not_used_asks_for_nothing():
    seen.clear()
    x = rows(4).requires_grad_()
    weighted.value(x, W, None, 0.5)
    (2 * x).sum().backward()
    assert not seen and torch.equal(x.grad, torch.full_like(x, 2))
