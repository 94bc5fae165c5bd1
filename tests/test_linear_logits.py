# SPDX-License-Identifier: Apache-2.0
"""KDLoss straight from hidden states and heads, against the definitions on logits that are stored, in float64."""

import warnings

import pytest
import torch
from conftest import FAST
from test_compare_memory import counted_peak
from test_losses_kd import EVERY, by_the_book
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels.logits import linear_driver
from kdkernels.losses import KDLoss

N, H, V, WIDE = 23, 6, 37, 9  # rows in chunks of 7 leave a part


def heads(dtype=torch.float64, n=N, classes=V):
    """Hidden states, weight and bias of both sides, the student's with gradients."""
    student = torch.randn(n, H), torch.randn(classes, H), torch.randn(classes)
    teacher = torch.randn(n, WIDE), torch.randn(classes, WIDE), torch.randn(classes)
    return [t.to(dtype).requires_grad_() for t in student], [t.to(dtype) for t in teacher]


def stored(hidden, weight, bias=None, scale=1.0, softcap=None, vocab=None):
    """The logits as a model writes them."""
    z = scale * (torch.nn.functional.linear(hidden, weight, bias))[..., :vocab]
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def exact(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def apart(got, want) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


HOW = [{}, {"scale": 0.3, "softcap": 2.0}, {"scale": -1.5, "vocab": 30}, {"softcap": 5.0, "vocab": V}]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("divergence", EVERY)
def test_values_and_gradients_are_those_of_stored_logits(divergence, how, backend):
    student, teacher = heads()
    rows = by_the_book(stored(*student, **how), stored(*teacher, **how), 2.0, divergence)
    keep, labels = torch.rand(N) > 0.3, torch.randint(0, 3, (N,))
    weights = torch.rand(N, dtype=torch.float64) * (torch.rand(N) > 0.2)
    counts = keep & (labels != 1)
    sides = kd.LinearLogits(*student, **how), kd.LinearLogits(*teacher, **how)
    marks = {"mask": keep, "labels": labels, "ignore_index": 1}
    for more, call, want in (
        ({}, {"chunk": 7}, rows.mean()),
        ({"scale_tau": False}, {}, rows.mean() / 4),
        ({"reduction": "sum", "weight": 3.0}, {"chunk": 1, **marks}, 3 * rows[counts].sum()),
        ({}, {"chunk": 7, "normalizer": 4, **marks}, rows[counts].sum() / 4),
        ({}, {"chunk": 7, "token_weights": weights, **marks}, (rows * weights)[counts].sum() / weights[counts].sum()),
    ):
        got = KDLoss(2.0, divergence=divergence, backend=backend, **more)(*sides, **call)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
        found, expected = (torch.autograd.grad(-1.7 * v, student, retain_graph=True) for v in (got, want))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", EVERY)
def test_either_side_may_be_logits(divergence):
    student, teacher = heads()
    loss, want = KDLoss(2.0, divergence=divergence), by_the_book(stored(*student), stored(*teacher), 2.0, divergence)
    counts = torch.rand(N) > 0.3
    for mask, value in ((None, want.mean()), (counts, want[counts].mean())):
        for sides in (
            (kd.LinearLogits(*student), stored(*teacher)),
            (stored(*student), kd.LinearLogits(*teacher)),
        ):
            got = loss(*sides, mask=mask, chunk=7)
            torch.testing.assert_close(got, value, rtol=1e-11, atol=0)
            found, expected = (torch.autograd.grad(v, student, retain_graph=True) for v in (got, value))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_a_temperature_a_row_and_heads_padded_to_unequal_sizes(divergence):
    (hidden, weight, bias), teacher = heads()
    taus, pad = torch.rand(N, dtype=torch.float64) + 0.5, torch.randn(5, H, dtype=torch.float64)
    more = torch.cat([weight, pad]), torch.cat([bias, pad[:, 0]])
    sides = (z / taus[:, None] for z in (stored(hidden, weight, bias), stored(*teacher)))
    want = by_the_book(*sides, 1.0, divergence)
    for scale in (True, False):
        loss = KDLoss(taus, divergence=divergence, scale_tau=scale)
        value = want * taus**2 if scale else want
        for how, vocab in (({"vocab": V}, None), ({}, V)):
            got = loss(kd.LinearLogits(hidden, *more, **how), kd.LinearLogits(*teacher), vocab=vocab, chunk=7)
            torch.testing.assert_close(got, value.mean(), rtol=1e-11, atol=0)
            found, expected = (torch.autograd.grad(v.mean(), (weight, bias), retain_graph=True) for v in (got, value))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_tokens_of_sequences_keep_their_shape():
    student, teacher = heads(n=12)
    loss, want = KDLoss(), by_the_book(stored(*student), stored(*teacher), 4.0, "forward").mean()
    hidden = student[0].detach().unflatten(0, (3, 4)).requires_grad_()
    logits = kd.LinearLogits(hidden, *student[1:])
    assert logits.shape == (3, 4, V) and logits.logits().shape == (3, 4, V)
    value = loss(logits, kd.LinearLogits(teacher[0].unflatten(0, (3, 4)), *teacher[1:]), mask=torch.ones(3, 4) > 0)
    torch.testing.assert_close(value, want)
    assert torch.autograd.grad(value, hidden)[0].shape == (3, 4, H)


# dtype, of value and gradients relative: float32 as asked; float16: one rounding of the gradient; bfloat16: three, of
# slopes, of a chunk's product and of the gradient, 1.7e-3 each
ROUNDED = [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-6, 3e-3), (torch.float16, 1e-6, 3.3e-4)]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype, of_value, of_gradient", ROUNDED)
def test_nothing_but_the_gradient_is_rounded(dtype, of_value, of_gradient, divergence):
    """Near its teacher (a divergence of 1e-4) and far from it, in one chunk and in several."""
    student, teacher = heads(dtype, n=64, classes=2000)
    student[1].data.div_(H**0.5)
    near = [student[0].detach(), (student[1] + 0.02 * torch.randn_like(student[1])).detach(), student[2].detach()]
    for other, more in ((teacher, 1), (near, 5)):
        sides = exact(student), exact(other)
        want = by_the_book(stored(*sides[0]), stored(*sides[1]), 1.0, divergence).mean()
        expected = torch.autograd.grad(want, sides[0])
        for chunk in (None, 9):
            got = KDLoss(1.0, divergence=divergence)(kd.LinearLogits(*student), kd.LinearLogits(*other), chunk=chunk)
            torch.testing.assert_close(got.double(), want, rtol=more * of_value, atol=0)
            for a, b in zip(torch.autograd.grad(got * 4096, student), expected, strict=True):
                assert apart(a, 4096 * b) < of_gradient  # unscaled, these are below what float16 holds


def test_what_is_left_out_may_hold_anything_and_is_not_multiplied(monkeypatch):
    student, teacher = heads()
    counts = torch.arange(N) % 2 == 0
    student[0].data[~counts], teacher[0][~counts] = torch.nan, torch.inf
    multiplied = []
    logits = linear_driver._logits
    monkeypatch.setattr(
        linear_driver, "_logits", lambda side, at, *rest: multiplied.append(len(at)) or logits(side, at, *rest)
    )
    loss = KDLoss(divergence="jsd")
    value = loss(kd.LinearLogits(*student), kd.LinearLogits(*teacher), mask=counts, chunk=5)
    few = [student[0].detach()[counts].requires_grad_(), *student[1:]]
    assert sum(multiplied) == 2 * counts.sum() and max(multiplied) <= 5
    want = by_the_book(stored(*few), stored(teacher[0][counts], *teacher[1:]), 4.0, "jsd").mean()
    torch.testing.assert_close(value, want, rtol=1e-11, atol=0)
    found, expected = torch.autograd.grad(value, student), torch.autograd.grad(want, few)
    assert (found[0][~counts] == 0).all()
    torch.testing.assert_close((found[0][counts], *found[1:]), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_that_counts_is_zero_with_zero_gradients(dtype):
    student, teacher = heads(dtype)
    student[0].data[:] = torch.nan
    value = KDLoss()(kd.LinearLogits(*student), kd.LinearLogits(*teacher), mask=torch.zeros(N, dtype=torch.bool))
    value.backward()
    assert value == 0 and all((t.grad == 0).all() for t in student)
    student, teacher = heads(dtype, n=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KDLoss()(kd.LinearLogits(*student), kd.LinearLogits(*teacher)).backward()
    assert all((t.grad == 0).all() for t in student)


def test_the_textbook_leaves_out_the_same():
    student, teacher = heads()
    counts = torch.arange(N) % 2 == 0
    student[0].data[~counts], teacher[0][~counts] = torch.nan, torch.inf
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    two = [KDLoss(backend=backend)(*sides, mask=counts) for backend in ("reference", "torch")]
    torch.testing.assert_close(*two, rtol=1e-11, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, student) for v in two), rtol=1e-9, atol=1e-13)


def test_a_row_with_nan_that_counts_makes_the_value_nan():
    student, teacher = heads()
    student[0].data[3] = torch.nan
    assert KDLoss()(kd.LinearLogits(*student), kd.LinearLogits(*teacher)).isnan()


@pytest.mark.parametrize("upstream", [0.0, torch.nan])
def test_an_upstream_of_zero_gives_zero_and_one_of_nan_gives_nan(upstream):
    student, teacher = heads(torch.float32)
    student[0].data[3] = torch.nan if upstream == 0 else 1.0
    value = KDLoss()(kd.LinearLogits(*student), kd.LinearLogits(*teacher))
    for found in torch.autograd.grad(value, student, torch.tensor(upstream)):
        assert (found == 0).all() if upstream == 0 else found.isnan().all()


def test_gradients_of_the_weight_are_handed_over_without_a_copy():
    student, teacher = heads(torch.float32, n=8, classes=4000)
    loss = KDLoss(1.0)
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    value = loss(*sides)
    held = value.grad_fn
    while not hasattr(held, "found"):
        held = held.next_functions[0][0]
    place = held.found[1].data_ptr()
    value.backward()
    assert student[1].grad.data_ptr() == place and held.found is None


def test_a_second_backward_pass_gives_the_same_again():
    student, teacher = heads()
    value = 3 * KDLoss()(kd.LinearLogits(*student), kd.LinearLogits(*teacher))
    first = torch.autograd.grad(value, student, retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, student), tuple(kept))


def test_only_what_asks_for_a_gradient_is_paid_for(monkeypatch):
    student, teacher = heads(torch.float32)
    student[1].requires_grad_(False)
    student[2].requires_grad_(False)
    monkeypatch.setattr(linear_driver.Gradients, "_add_weight", None)
    loss, sides = KDLoss(), (kd.LinearLogits(*student), kd.LinearLogits(*teacher))
    loss(*sides).backward()  # a frozen head
    assert student[0].grad.norm() > 0 and student[1].grad is None
    monkeypatch.setattr(linear_driver.Gradients, "add", None)
    with torch.no_grad():
        value = loss(*sides)
    torch.testing.assert_close(value, by_the_book(stored(*student), stored(*teacher), 4.0, "forward").mean())


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    table = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    teacher, tokens = torch.randn(N, V, dtype=torch.float64), torch.randint(V, (N,))
    hidden = torch.nn.functional.embedding(tokens, table).tanh()
    value = KDLoss()(kd.LinearLogits(hidden, table), teacher)
    want = by_the_book(hidden @ table.T, teacher, 4.0, "forward").mean()
    found, expected = (torch.autograd.grad(v, table, retain_graph=True)[0] for v in (value, want))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_batches_that_are_accumulated_are_one():
    student, teacher = heads()
    loss, labels = KDLoss(divergence="reverse"), torch.where(torch.arange(N) % 3 == 0, -100, 1)
    parts = (slice(0, 10), slice(10, N))
    value = sum(
        loss(
            kd.LinearLogits(student[0][part], *student[1:]), kd.LinearLogits(teacher[0][part], *teacher[1:]),
            labels=labels[part], normalizer=(labels != -100).sum(),
        )
        for part in parts
    )  # fmt: skip
    want = by_the_book(stored(*student), stored(*teacher), 4.0, "reverse")[labels != -100].mean()
    torch.testing.assert_close(value, want, rtol=1e-11, atol=0)
    found, expected = (torch.autograd.grad(v, student, retain_graph=True) for v in (value, want))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_autocast_rounds_nothing_inside():
    student, teacher = heads(torch.float32)
    loss, sides = KDLoss(divergence="jsd"), (kd.LinearLogits(*student), kd.LinearLogits(*teacher))
    want = loss(*sides)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*sides)
        found = torch.autograd.grad(value, student, retain_graph=True)
        again = torch.autograd.grad(value, student)  # computed anew
    assert value == want
    for expected in (found, again):
        torch.testing.assert_close(torch.autograd.grad(want, student, retain_graph=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_array_of_rows_by_classes_exists(dtype):
    """Alive at the peak: the weight's gradient, in float32 until it is whole, and the arrays of a chunk."""
    n, classes, chunk = 512, 4096, 32
    student, teacher = heads(dtype, n, classes)
    sides, loss = (kd.LinearLogits(*student), kd.LinearLogits(*teacher)), KDLoss(divergence="jsd")
    head, rows = classes * H * 4, n * H * 4

    def step():
        for t in student:
            t.grad = None
        loss(*sides, chunk=chunk).backward()

    wide = dtype != torch.float32
    arrays = 3.5 if wide else 3  # slopes that are rounded to bfloat16, too
    blocks = 2 * linear_driver.CPU_BLOCK * 4 if wide else 0
    allowed = head * (1.5 if wide else 1) + rows + arrays * chunk * classes * 4 + min(blocks, 2 * head) + (1 << 16)
    assert counted_peak(step) <= allowed < n * classes * dtype.itemsize


def test_one_graph_takes_any_number_of_tokens():
    loss = KDLoss(1.0, divergence="jsd")

    def step(student, teacher):
        value = loss(kd.LinearLogits(*student), kd.LinearLogits(*teacher))
        return value, torch.autograd.grad(value, student)

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(lambda s, t: loss(kd.LinearLogits(*s), kd.LinearLogits(*t)), fullgraph=True, backend=counter)
    for n in (23, 40, 61, 17):
        student, teacher = heads(torch.float32, n)
        torch._dynamo.mark_dynamic(student[0], 0)
        torch._dynamo.mark_dynamic(teacher[0], 0)
        value = call(student, teacher)
        found = value.detach(), torch.autograd.grad(value, student)
        torch.testing.assert_close(found, (lambda v, g: (v.detach(), g))(*step(student, teacher)), rtol=1e-5, atol=1e-8)
    assert counter.frame_count == 1


def test_meta_tensors_have_meta_losses():
    student, teacher = ([t.to("meta") for t in side] for side in heads())
    value = KDLoss()(kd.LinearLogits(*student), kd.LinearLogits(*teacher))
    assert value.is_meta and value.shape == ()


def test_bad_input_is_named():
    (hidden, weight, bias), teacher = heads()
    for arguments, how, error, words in (
        ((hidden, weight[:, 1:]), {}, ValueError, "hidden has shape"),
        ((hidden, weight[0]), {}, ValueError, "weight"),
        ((hidden[0], weight), {}, ValueError, "hidden has shape"),
        ((hidden, weight, bias[1:]), {}, ValueError, "bias has shape"),
        ((hidden.long(), weight), {}, TypeError, "hidden is"),
        ((hidden, weight.tolist()), {}, TypeError, "weight is a list"),
        ((hidden, weight[:0]), {}, ValueError, "weight has shape"),
        ((hidden, weight), {"scale": 0.0}, ValueError, "scale is"),
        ((hidden, weight), {"softcap": -1}, ValueError, "softcap is"),
        ((hidden, weight), {"vocab": V + 1}, ValueError, "vocab is 38"),
        ((hidden, weight), {"vocab": 0}, ValueError, "vocab is 0"),
        ((hidden, weight.to("meta")), {}, ValueError, "weight on meta"),
    ):
        with pytest.raises(error, match=words):
            kd.LinearLogits(*arguments, **how)
    student = kd.LinearLogits(hidden, weight, bias)
    for other, words in (
        (kd.LinearLogits(teacher[0][1:], *teacher[1:]), "22 rows"),
        (kd.LinearLogits(*teacher, vocab=30), "vocab=n"),
        (stored(*teacher)[:, 1:], "vocab=n"),
    ):
        with pytest.raises(ValueError, match=words):
            KDLoss()(student, other)
    with pytest.raises(ValueError, match="mask has shape"):
        KDLoss()(student, kd.LinearLogits(*teacher), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="chunk is 0"):
        KDLoss()(student, kd.LinearLogits(*teacher), chunk=0)


def test_second_derivatives_are_refused_and_the_textbook_has_them():
    student, teacher = heads()
    sides = kd.LinearLogits(*student), kd.LinearLogits(*teacher)
    first = torch.autograd.grad(KDLoss()(*sides), student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        sum(t.square().sum() for t in first).backward()
    first = torch.autograd.grad(KDLoss(backend="reference")(*sides), student, create_graph=True)
    sum(t.square().sum() for t in first).backward()
    assert all(t.grad.norm() > 0 for t in student)
