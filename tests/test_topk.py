# SPDX-License-Identifier: Apache-2.0
"""A teacher of k classes against the definition of each tail in float64: what is left of 1, of the student too."""

import math

import pytest
import torch
from conftest import needs_native

import kdkernels as kd
from kdkernels import losses
from kdkernels.logits.buckets import COMPILED
from kdkernels.losses import KDLoss

TAILS = ("bucket", "renormalize", "ignore")
EVERY = ("forward", "reverse", "jsd", "skew", "skew_reverse", "tvd")


def of_two(name, q, p, beta=0.5, skew=0.1):
    """A divergence of a teacher q and a student p, as its paper writes it."""

    def kl(a, b):
        return torch.where(a == 0, 0, a * (a / b).log()).sum(-1)

    m = beta * q + (1 - beta) * p
    return {
        "forward": lambda: kl(q, p),
        "reverse": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "skew": lambda: kl(q, skew * q + (1 - skew) * p),
        "skew_reverse": lambda: kl(p, (1 - skew) * q + skew * p),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()


def by_the_book(student, log_q, ids, tail, divergence="forward", tau=1.0):
    """Rows; log_q the teacher's log-probabilities of the classes ids, at temperature tau."""
    student, log_q = student.double(), log_q.double()
    log_p = (student / tau).log_softmax(-1)
    p, q = log_p.gather(-1, ids).exp(), log_q.exp()
    if tail == "ignore":
        rows = (q * (log_q - log_p.gather(-1, ids))).sum(-1)
    elif tail == "renormalize":
        rows = of_two(divergence, q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True))
    else:
        others = log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True).exp()
        rows = of_two(divergence, torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1), torch.cat([p, others], -1))
    return tau**2 * rows


def sides(*shape, k=4, tau=1.0, scale=2.0, dtype=torch.float64):
    """The student, and values and indices of the teacher, of which the first are rounded to dtype."""
    torch.manual_seed(0)
    student, teacher = scale * torch.randn(2, *shape, dtype=torch.float64)
    values, ids = ((teacher + student) / tau).log_softmax(-1).topk(k)
    return student.to(dtype).requires_grad_(), values.to(dtype), ids


def agree(found, expected, student, rtol=1e-10, keep=True):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol / 100)
    ours, theirs = (torch.autograd.grad(value, student, retain_graph=keep)[0] for value in (found, expected))
    assert (ours - theirs).abs().max() <= 10 * rtol * theirs.abs().max()


CASES = [(tail, name) for tail in TAILS[:2] for name in EVERY] + [("ignore", "forward")]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("tail, divergence", CASES)
def test_each_tail_is_its_definition(tail, divergence, backend):
    student, values, ids = sides(3, 5, 11)
    loss = KDLoss(tau=1.0, divergence=divergence, backend=backend)
    found = loss(student, kd.TopKLogits(values, ids.int(), tail=tail))
    agree(found, by_the_book(student, values, ids, tail, divergence).mean(), student)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("scale_tau", [True, False])
def test_log_probabilities_are_of_the_temperature_of_the_loss(tail, scale_tau):
    student, values, ids = sides(6, 11, tau=2.5)
    want = by_the_book(student, values, ids, tail, tau=2.5).mean() / (1 if scale_tau else 2.5**2)
    loss = KDLoss(tau=2.5, scale_tau=scale_tau)
    agree(loss(student, kd.TopKLogits(values, ids, tail=tail, tau=2.5)), want, student)
    other = kd.TopKLogits(values, ids, tail=tail)
    for tau, text in ((2.5, "tau is 2.5, the teacher's log-probabilities are of 1"), (torch.tensor(1.0), "a tensor")):
        if tail != "renormalize":
            with pytest.raises(ValueError, match=text):
                KDLoss(tau)(student, other)


def test_renormalised_log_probabilities_and_logits_are_of_any_temperature_also_one_a_row():
    student, values, ids = sides(6, 11)
    taus = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    rows = torch.stack([
        by_the_book(s, (v / t).log_softmax(-1), i, "renormalize", tau=t)
        for s, v, i, t in zip(student, values, ids, taus.tolist(), strict=True)
    ])  # fmt: skip
    for kind, given, tau in (("logprobs", values, 1.0), ("logits", values + 3, 1.0), ("logprobs", values / 2 - 2, 2.0)):
        teacher = kd.TopKLogits(given, ids, kind=kind, tail="renormalize", tau=tau)
        agree(KDLoss(taus)(student, teacher), rows.mean(), student)
        agree(KDLoss(2.0)(student[2:3], kd.TopKLogits(given[2:3], ids[2:3], kind=kind, tail="renormalize", tau=tau)),
              rows[2], student)  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
def test_rows_that_do_not_count_have_no_influence_whatever_they_hold(tail):
    student, values, ids = sides(6, 11)
    rows = by_the_book(student, values, ids, tail)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    keep = weights != 0
    dirty = torch.where(keep[:, None], student, math.nan)
    padded = torch.where(keep[:, None], values, math.nan), torch.where(keep[:, None], ids, -100)
    zeros = torch.where(keep[:, None], values, 0.0), torch.where(keep[:, None], ids, 0)  # as padding makes them
    labels = torch.where(keep, 1, -100)
    for backend in ("auto", "reference"):
        loss = KDLoss(tau=1.0, backend=backend)
        for given in (padded, zeros):
            teacher = kd.TopKLogits(*given, tail=tail)
            agree(loss(dirty, teacher, token_weights=weights), (rows * weights).sum() / 7.5, student)
            agree(loss(dirty, teacher, mask=keep), rows[keep].mean(), student)
            agree(loss(dirty, teacher, labels=labels, normalizer=3), rows[keep].sum() / 3, student)
            leaf = dirty.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf, teacher, mask=keep), leaf)
            assert (gradient[~keep] == 0).all() and gradient[keep].isfinite().all()
            nothing = loss(leaf, teacher, mask=keep & False)
            assert nothing == 0 and (torch.autograd.grad(nothing, leaf)[0] == 0).all()
    total, parts = loss(student, kd.TopKLogits(values, ids, tail=tail), return_parts=True)
    assert total.equal(parts["kd"])


@pytest.mark.parametrize("divergence", EVERY)
def test_no_divergence_of_buckets_exceeds_that_of_all_classes_and_k_of_all_is_all(divergence):
    student, teacher = 3 * torch.randn(2, 20, 30, dtype=torch.float64)
    loss = KDLoss(tau=1.0, divergence=divergence, reduction="sum")
    full = loss(student, teacher)
    for k in (1, 8, 29):
        value = loss(student, kd.TopKLogits(*teacher.log_softmax(-1).topk(k)))
        assert 0 < value <= full * (1 + 1e-12)
    torch.testing.assert_close(loss(student, kd.TopKLogits(*teacher.log_softmax(-1).topk(30))), full)


def test_the_gradient_of_a_tail_is_right_where_one_less_the_sum_has_no_digits():
    for gap in (4.0, 10.0, 14.0, 17.0, 30.0):
        student = torch.zeros(1, 1000)
        student[0, :4] = gap + math.log(1000)
        student.requires_grad_()
        ids, values = torch.arange(4)[None], torch.full((1, 4), math.log(0.95 / 4))
        (found,) = torch.autograd.grad(KDLoss(tau=1.0)(student, kd.TopKLogits(values, ids)), student)
        exact = student.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(by_the_book(exact, values, ids, "bucket").sum(), exact)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_native(*COMPILED))])
def test_values_and_gradients_of_many_classes_in_float32(backend, dtype, spread, tail):
    torch.manual_seed(1)
    student = (4 * torch.randn(8, 32_000) + 50).to(dtype)
    values, ids = (student.double() + spread * torch.randn(8, 32_000)).log_softmax(-1).topk(64)
    values, student = values.float(), student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    want = by_the_book(exact, values, ids, tail).mean()
    found = KDLoss(tau=1.0, backend=backend)(student, kd.TopKLogits(values, ids, tail=tail))
    size = 1.0 if spread == 1 else 3e-2  # near the teacher the inputs' own rounding is seen: 1e-7 of log-probabilities
    signed = 2e-7 if tail == "ignore" else 0  # of terms of either sign, which add up to less than each
    torch.testing.assert_close(found.double(), want, rtol=2e-6 / size**2, atol=signed)
    ours, theirs = (torch.autograd.grad(v, x)[0].double() for v, x in ((found, student), (want, exact)))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    assert (ours - theirs).norm() <= rounding / size * theirs.norm()


def test_values_rounded_to_half_may_add_up_to_a_little_more_than_1():
    student, values, ids = sides(4, 11, k=10)
    values = (values.logsumexp(-1, keepdim=True) * -1 + values + 5e-4).requires_grad_(False)  # exp adds up to 1.0005
    q = torch.cat([values.softmax(-1), torch.zeros(4, 1)], -1)
    p = student.softmax(-1)
    rows = of_two("forward", q[:, :-1], p.gather(-1, ids))
    agree(KDLoss(tau=1.0)(student, kd.TopKLogits(values, ids)), rows.mean(), student)


def test_classes_that_are_excluded_on_either_side():
    student, values, ids = sides(4, 11)
    closed = student.detach().clone()
    closed[0, 10 if 10 not in ids[0] else ids[0, 0]] = -math.inf
    values[1, 3] = -math.inf
    closed.requires_grad_()
    value = KDLoss(tau=1.0, divergence="jsd")(closed, kd.TopKLogits(values, ids))
    want = by_the_book(closed, values, ids, "bucket", "jsd").mean()
    torch.testing.assert_close(value, want, rtol=1e-10, atol=0)
    assert torch.autograd.grad(value, closed)[0].isfinite().all()
    only = torch.full((1, 11), -math.inf, dtype=torch.float64).scatter(-1, ids[:1], 0.0).requires_grad_()
    excluded = KDLoss(tau=1.0)(only, kd.TopKLogits(values[:1], ids[:1]))
    assert excluded == math.inf and torch.autograd.grad(excluded, only)[0].isfinite().all()
    student.data[2, 5] = math.nan
    rows = [
        KDLoss(tau=1.0)(s[None], kd.TopKLogits(v[None], i[None])) for s, v, i in zip(student, values, ids, strict=True)
    ]
    assert [bool(row.isnan()) for row in rows] == [False, False, True, False]


def test_vocabularies_of_different_sizes():
    student, values, ids = sides(6, 11)
    wide = torch.cat([student, torch.full((6, 3), 50.0)], 1)
    want = by_the_book(student, values, ids, "bucket").mean()
    for found in (
        KDLoss(tau=1.0)(wide, kd.TopKLogits(values, ids, vocab=11)),
        KDLoss(tau=1.0)(wide, kd.TopKLogits(values, ids), vocab=11),
        KDLoss(tau=1.0)(wide, kd.TopKLogits(values, ids, vocab=20), vocab=11),
    ):
        agree(found, want, student)
    for teacher, how, text in (
        (kd.TopKLogits(values, ids, vocab=15), {}, "vocab is 15, student_logits has 14 classes"),
        (kd.TopKLogits(values, ids, vocab=11), {"vocab": 12}, "vocab is 12, teacher_logits has 11 classes"),
        (kd.TopKLogits(values, ids), {"vocab": 3}, "student_logits has 3, values has 4 classes a row"),
    ):
        with pytest.raises(ValueError, match=text):
            KDLoss(tau=1.0)(wide, teacher, **how)


def test_what_is_no_teacher_is_refused():
    student, values, ids = sides(6, 11)
    for arguments, how, error, text in (
        ((values.long(), ids), {}, TypeError, "values is torch.int64: convert it"),
        ((values, ids.float()), {}, TypeError, "indices is torch.float32: give classes"),
        ((values, ids.tolist()), {}, TypeError, "indices is a list"),
        ((values[:, :3], ids), {}, ValueError, r"values has shape \(6, 3\), indices \(6, 4\)"),
        ((values[:, :0], ids[:, :0]), {}, ValueError, "k >= 1"),
        ((values, ids.to("meta")), {}, ValueError, "values is on cpu, indices on meta"),
        ((values, ids), {"kind": "probs"}, ValueError, "kind is 'probs'"),
        ((values, ids), {"tail": "drop"}, ValueError, "tail is 'drop'"),
        ((values, ids), {"kind": "logits"}, ValueError, "tail is 'bucket': logits of k classes do not say"),
        ((values, ids), {"vocab": 3}, ValueError, "vocab is 3, values has 4 classes"),
        ((values, ids), {"tau": 0.0}, ValueError, "tau is 0.0"),
    ):
        with pytest.raises(error, match=text):
            kd.TopKLogits(*arguments, **how)
    loss = KDLoss(tau=1.0)
    for arguments, text in (
        ((values, ids + 7), "indices of the teacher hold a value outside 0 to 10"),
        ((values, ids - 11), "indices of the teacher hold a value outside 0 to 10"),
        ((values, ids[:, [0, 1, 2, 0]]), "indices of the teacher hold a class twice in a row"),
        ((values + 0.2 - values.logsumexp(-1, keepdim=True), ids), "no log-probabilities.*1.221"),
    ):
        with pytest.raises(ValueError, match=text):
            loss(student, kd.TopKLogits(*arguments))
    with pytest.raises(ValueError, match=r"teacher_logits has rows \(2, 3\), student_logits \(2, 2\)"):
        loss(student[:4].reshape(2, 2, 11), kd.TopKLogits(values.reshape(2, 3, 4), ids.reshape(2, 3, 4)))
    with pytest.raises(ValueError, match="student_logits has 3, values has 4 classes"):
        loss(student[:, :3], kd.TopKLogits(values, ids))
    with pytest.raises(ValueError, match="divergence is 'jsd', and tail='ignore'"):
        KDLoss(tau=1.0, divergence="jsd")(student, kd.TopKLogits(values, ids, tail="ignore"))
    for other in (losses.DISTLoss(), losses.CMKDLoss()):
        with pytest.raises(TypeError, match="teacher_logits is TopKLogits, and .*Loss reads every class"):
            other(student, kd.TopKLogits(values, ids))
    with pytest.raises(TypeError, match="student_logits is a TopKLogits"):
        loss(kd.TopKLogits(values, ids), student)


def test_where_nobody_may_look_a_wrong_row_is_nan_and_leaves_the_others_alone():
    student, values, ids = sides(6, 11)
    ids[1, 2], ids[3, 0], values[4] = ids[1, 0], 11, 0.0
    rows = torch.vmap(lambda s, v, i: KDLoss(tau=1.0)(s[None], kd.TopKLogits(v[None], i[None])))(student, values, ids)
    assert rows.isnan().tolist() == [False, True, False, True, True, False]
    right = [0, 2, 5]
    torch.testing.assert_close(rows[right], by_the_book(student, values, ids.clamp(max=10), "bucket")[right])


def test_a_batch_without_rows_is_zero_and_says_so():
    student = torch.zeros(0, 11, requires_grad=True)
    with pytest.warns(UserWarning, match="a batch of 0 rows"):
        value = KDLoss(tau=1.0)(student, kd.TopKLogits(torch.zeros(0, 4), torch.zeros(0, 4).long()))
    assert value == 0 and torch.autograd.grad(value, student)[0].shape == (0, 11)


def test_rows_are_read_where_they_lie_and_by_chunks(monkeypatch):
    student, values, ids = sides(3, 6, 11)
    from kdkernels.logits import torch_impl

    monkeypatch.setattr(torch_impl, "CPU_CHUNK", 25)
    teacher = kd.TopKLogits(values[:, 1:], ids[:, 1:])
    want = by_the_book(student[:, :-1], values[:, 1:], ids[:, 1:], "bucket").mean()
    agree(KDLoss(tau=1.0)(student[:, :-1], teacher), want, student)
    agree(KDLoss(tau=1.0)(student.mT.contiguous().mT[:, :-1], teacher), want, student)


def test_first_derivatives_in_both_modes_and_no_second_but_the_textbooks():
    student, values, ids = sides(4, 11)
    loss, teacher = KDLoss(tau=1.0), kd.TopKLogits(values, ids)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student, check_forward_ad=True)
    (gradient,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()
    textbook = KDLoss(tau=1.0, backend="reference")
    assert torch.autograd.gradgradcheck(lambda s: textbook(s, teacher), student)
    value = loss(student, teacher)
    for upstream in (0.0, 3.0, math.nan):
        (found,) = torch.autograd.grad(value, student, torch.tensor(upstream, dtype=value.dtype), retain_graph=True)
        torch.testing.assert_close(found, upstream * gradient.detach() if upstream else 0 * found, equal_nan=True)


def test_the_operator_is_what_pytorch_asks_of_one():
    student, values, ids = sides(4, 11)
    for need in (0, 1):
        torch.library.opcheck(torch.ops.kdkernels.buckets_fwd.default, (student.detach(), ids, 1.0, "auto", need))


@pytest.mark.parametrize("tail", TAILS)
def test_it_is_part_of_one_graph_also_with_another_number_of_tokens(tail):
    torch._dynamo.reset()
    loss = KDLoss(tau=1.0)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(student, values, ids):
        return loss(student, kd.TopKLogits(values, ids, tail=tail))

    for n in (6, 9):
        student, values, ids = sides(n, 11)
        agree(step(student, values, ids), by_the_book(student, values, ids, tail).mean(), student, keep=False)


def test_autocast_rounds_nothing_and_a_teacher_made_in_inference_mode_is_taken():
    student, values, ids = sides(6, 11, dtype=torch.float32)
    with torch.inference_mode():
        teacher = kd.TopKLogits(values.clone(), ids.clone())
    for tail in TAILS:
        teacher.tail = tail
        plain = KDLoss(tau=1.0)(student, kd.TopKLogits(values, ids, tail=tail))
        with torch.autocast("cpu", torch.bfloat16):
            agree(KDLoss(tau=1.0)(student, teacher), plain.double(), student, rtol=1e-7)
