# SPDX-License-Identifier: Apache-2.0
"""The landmark similarity loss and ClassCenters: the public formula written out, means by NumPy, and every odd case."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import backend as backends
from kdkernels.nystrom.kda import torch_impl

compiled = backends.obstacle("cpp", "cpu", op="landmark_similarity_loss") is None
BACKENDS = ("reference", "torch", *(("cpp",) if compiled else ()))


def problem(B=13, C=7, d=5, e=9, dtype=torch.float64, size=1.0):
    s, t = size * torch.randn(B, d, dtype=dtype), size * torch.randn(B, e, dtype=dtype)
    return s.requires_grad_(), t, torch.randn(C, d, dtype=dtype), torch.randn(C, e, dtype=dtype)


def formula(s, t, s_centers, t_centers):
    """loss and dL/ds as the design states them, term by term."""
    S, T = s @ s_centers.T, t @ t_centers.T
    D = S - T
    each = torch.where(D.abs() < 1, D**2 / 2, D.abs() - 0.5)
    norm = (T**2).sum().sqrt()
    return each.sum() / norm, D.clamp(-1, 1) @ s_centers / norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])  # inside the parabola, across its end, on the slopes
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_value_and_gradient_are_the_formula(backend, size, dtype, tolerance):
    s, t, s_centers, t_centers = problem(dtype=dtype, size=size)
    value = kd.landmark_similarity_loss(s, t, s_centers, t_centers, backend=backend)
    (grad,) = torch.autograd.grad(value, s)
    want, want_grad = formula(*(x.detach().double() for x in (s, t, s_centers, t_centers)))
    assert abs(value.double() - want) <= tolerance * want
    assert (grad.double() - want_grad).abs().max() <= tolerance * want_grad.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_and_landmarks_are_constants(backend):
    inputs = [x.detach().requires_grad_() for x in problem()]
    kd.landmark_similarity_loss(*inputs, backend=backend).backward()
    assert inputs[0].grad is not None and all(x.grad is None for x in inputs[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", ["t", "t_centers"])
def test_a_teacher_of_zeros_gives_zero_with_zero_gradient(backend, zero):
    s, t, s_centers, t_centers = problem()
    t, t_centers = (torch.zeros_like(x) if name == zero else x for x, name in ((t, "t"), (t_centers, "t_centers")))
    value = kd.landmark_similarity_loss(s, t, s_centers, t_centers, backend=backend)
    value.backward()
    assert value == 0 and (s.grad == 0).all()


def test_rows_are_independent_of_the_blocks_they_are_computed_in(monkeypatch):
    inputs = problem(40)
    whole = kd.landmark_similarity_loss(*inputs)
    (grad,) = torch.autograd.grad(whole, inputs[0])
    monkeypatch.setitem(torch_impl.BLOCK, "cpu", 21)  # three rows of seven landmarks
    blocked = kd.landmark_similarity_loss(*inputs)
    torch.testing.assert_close(blocked, whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(blocked, inputs[0])[0], grad, rtol=1e-13, atol=1e-16)


def test_neither_similarity_matrix_is_stored():
    s, t, s_centers, t_centers = problem(8192, 1000, 8, 8, torch.float32)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with (
        torch.profiler.profile(profile_memory=True) as profile,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        kd.landmark_similarity_loss(s, t, s_centers, t_centers).backward()
    assert max(saved) <= 8192 * 8
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * torch_impl.BLOCK["cpu"] < 8192 * 1000  # a quarter of one float32 [B, C]


BAD = {
    "three dims": ((0, torch.zeros(13, 5, 1)), ValueError, r"s has shape \(13, 5, 1\): give rows of features"),
    "other samples": ((1, torch.zeros(12, 9)), ValueError, "t has 12 rows, s has 13"),
    "other landmarks": ((2, torch.zeros(6, 5)), ValueError, "t_centers has 7 rows, s_centers has 6"),
    "other width": ((3, torch.zeros(7, 8)), ValueError, "t_centers has 8 columns, t has 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_argument_and_the_fix(name):
    (place, value), error, message = BAD[name]
    inputs = list(problem(dtype=torch.float32))
    inputs[place] = value
    with pytest.raises(error, match=message):
        kd.landmark_similarity_loss(*inputs)


def test_no_landmarks_are_refused_and_no_samples_give_zero():
    s, t, s_centers, t_centers = problem()
    with pytest.raises(ValueError, match="at least one landmark"):
        kd.landmark_similarity_loss(s, t, s_centers[:0], t_centers[:0])
    for backend in BACKENDS:
        value = kd.landmark_similarity_loss(s[:0], t[:0], s_centers, t_centers, backend=backend)
        assert value == 0 and torch.autograd.grad(value, s)[0].abs().max() == 0


def batches(count=4, B=50, C=6, d=3, e=4):
    """Class 5 never comes."""
    for _ in range(count):
        yield torch.randn(B, d) + 3, torch.randn(B, e) - 7, torch.randint(0, C - 1, (B,))


def test_the_centres_are_the_class_means_of_the_epoch():
    centers, seen = kd.ClassCenters(6, 3, 4), list(batches())
    for batch in seen:
        centers.update(*batch)
    assert (centers.student_centers == 0).all()  # until the swap
    centers.swap()
    s, t, labels = (torch.cat(parts).double().numpy() for parts in zip(*seen, strict=True))
    for c in range(5):
        np.testing.assert_allclose(centers.student_centers[c].numpy(), s[labels == c].mean(0), rtol=1e-6)
        np.testing.assert_allclose(centers.teacher_centers[c].numpy(), t[labels == c].mean(0), rtol=1e-6)
    assert (centers.student_centers[5] == 0).all() and not centers.known[5] and centers.known[:5].all()


def test_a_class_that_is_not_seen_keeps_its_centre():
    centers = kd.ClassCenters(3, 2, 2)
    centers.update(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 1, 2]))
    centers.swap()
    centers.update(torch.full((2, 2), 5.0), torch.full((2, 2), 6.0), torch.tensor([0, 0]))
    centers.swap()
    assert centers.student_centers.tolist() == [[5, 5], [1, 1], [1, 1]]
    assert centers.teacher_centers.tolist() == [[6, 6], [1, 1], [1, 1]]
    centers.swap()  # an epoch without any row
    assert centers.student_centers.tolist() == [[5, 5], [1, 1], [1, 1]] and centers.student_centers.isfinite().all()


def test_momentum_averages_and_a_new_class_takes_its_mean_at_once():
    centers = kd.ClassCenters(2, 1, 1, momentum=0.75)
    centers.update(torch.tensor([[4.0]]), torch.tensor([[8.0]]), torch.tensor([0]))
    centers.swap()
    assert centers.student_centers.tolist() == [[4], [0]]
    centers.update(torch.tensor([[8.0], [2.0]]), torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]))
    centers.swap()
    assert centers.student_centers.tolist() == [[5], [2]] and centers.teacher_centers.tolist() == [[6], [2]]


def test_counts_of_the_first_epoch_divide_the_sums_of_the_later_ones():
    x = torch.tensor([[2.0], [4.0]])
    for rule, want in (("first", 1.0), ("epoch", 2.0)):
        centers = kd.ClassCenters(2, 1, 1, counts=rule)
        centers.update(x, x, torch.tensor([0, 0]))
        centers.swap()
        assert centers.student_centers[0] == 3
        centers.update(x[:1], x[:1], torch.tensor([0]))
        centers.update(x[1:], x[1:], torch.tensor([1]))  # not seen in the first epoch: its own count
        centers.swap()
        assert centers.student_centers.flatten().tolist() == [want, 4.0]


def test_ignored_and_masked_rows_do_not_count_even_where_they_hold_nan():
    s, t, labels = next(batches(1))
    labels[::3] = -100
    mask = torch.rand(50) > 0.3
    kept = mask & (labels >= 0)
    for x in (s, t):
        x[~kept] = float("nan")
    some, all_of_them = kd.ClassCenters(6, 3, 4), kd.ClassCenters(6, 3, 4)
    some.update(s, t, labels, mask=mask)
    all_of_them.update(s[kept], t[kept], labels[kept])
    for a, b in zip(some.buffers(), all_of_them.buffers(), strict=True):
        assert torch.equal(a, b)


def test_sums_do_not_depend_on_how_rows_are_batched_beyond_the_last_digit():
    seen = list(batches(8))
    whole, parts = kd.ClassCenters(6, 3, 4), kd.ClassCenters(6, 3, 4)
    for batch in seen:
        parts.update(*batch)
    whole.update(*(torch.cat(x) for x in zip(*seen, strict=True)))
    torch.testing.assert_close(parts.student_sums, whole.student_sums, rtol=1e-14, atol=1e-13)
    again = kd.ClassCenters(6, 3, 4)
    for batch in seen:
        again.update(*batch)
    assert again.student_sums.equal(parts.student_sums)


def test_the_state_travels_in_the_middle_of_an_epoch_and_casting_rounds_no_sum():
    seen = list(batches())
    straight, before = kd.ClassCenters(6, 3, 4), kd.ClassCenters(6, 3, 4)
    for i, batch in enumerate(seen):
        straight.update(*batch)
        if i < 2:
            before.update(*batch)
    resumed = kd.ClassCenters(6, 3, 4)
    resumed.load_state_dict(before.state_dict())
    resumed.half()
    for batch in seen[2:]:
        resumed.update(*batch)
    for module in (straight, resumed):
        module.swap()
    assert resumed.student_sums.dtype == torch.float64 and resumed.student_centers.dtype == torch.float32
    assert resumed.student_centers.equal(straight.student_centers)


def test_no_gradient_reaches_the_sums():
    centers = kd.ClassCenters(2, 3, 3)
    x = torch.randn(4, 3, requires_grad=True)
    centers.update(x, x, torch.tensor([0, 1, 0, 1]))
    assert not centers.student_sums.requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"labels": torch.tensor([0, 2])}, ValueError, "labels holds 2: give class indices from 0 to 1, or -100"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "labels holds -1"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels is torch.float32"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels has shape \(1,\): one entry a row of s is \(2,\)"),
        ({"s": torch.zeros(2, 4)}, ValueError, r"s has shape \(2, 4\): these centres take \[B, 3\]"),
        ({"t": torch.zeros(1, 4)}, ValueError, r"t has shape \(1, 4\): one entry a row"),
        ({"s": torch.zeros(2, 3).long()}, TypeError, "s is torch.int64"),
        ({"t": torch.zeros(2, 4, device="meta")}, ValueError, "t is on meta, the centres on cpu"),
        ({"mask": torch.ones(2)}, TypeError, "mask is torch.float32"),
    ],
)
def test_an_update_that_makes_no_sense_is_refused_and_changes_nothing(change, error, message):
    call = {"s": torch.ones(2, 3), "t": torch.ones(2, 4), "labels": torch.tensor([0, 1]), "mask": None} | change
    centers = kd.ClassCenters(2, 3, 4)
    with pytest.raises(error, match=message):
        centers.update(call["s"], call["t"], call["labels"], mask=call["mask"])
    assert (centers.counts == 0).all() and (centers.student_sums == 0).all()


def test_centres_that_make_no_sense_are_refused():
    for arguments, error, message in (
        ((0, 3, 3), ValueError, "num_classes is 0"),
        ((2, 3.0, 3), TypeError, "student_dim is a float"),
        ((2, 3, -1), ValueError, "teacher_dim is -1"),
        ((2, 3, 3, 1.0), ValueError, "momentum is 1.0"),
    ):
        with pytest.raises(error, match=message):
            kd.ClassCenters(*arguments)
    with pytest.raises(ValueError, match="counts is 'all'"):
        kd.ClassCenters(2, 3, 3, counts="all")


SUMS = """
import torch
import kdkernels as kd
from kdkernels.nystrom.kda import torch_impl, triton_impl
from kdkernels.nystrom.kda.triton_centers import add_rows
torch.manual_seed(0)
for B, C, d, e in ((70, 6, 5, 130), (1, 3, 64, 65), (33, 40, 1, 7)):
    s, t, labels = torch.randn(B, d), torch.randn(B, e).half(), torch.randint(0, C, (B,))
    counted = torch.rand(B) > 0.3
    want = kd.ClassCenters(C, d, e)
    s[~counted] = float("nan")
    got = [torch.ones_like(x) for x in (want.student_sums, want.teacher_sums, want.counts)]  # added to, not replaced
    want.update(s, t, labels, mask=counted)
    add_rows(s, t, labels, counted, *got)
    for a, b in zip(got, (want.student_sums, want.teacher_sums, want.counts), strict=True):
        torch.testing.assert_close(a - 1, b, rtol=1e-12, atol=1e-12)
for B, C, d, e in ((70, 33, 20, 40), (1, 3, 64, 65), (0, 4, 5, 6)):
    tensors = torch.randn(B, d), torch.randn(B, e), torch.randn(C, d), torch.randn(C, e)
    found, want = (run.sums(*tensors, True)[0] for run in (triton_impl, torch_impl))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
print("equal")
"""


@pytest.mark.interpret
def test_class_sums_and_the_sums_that_ranks_send_are_the_same_from_their_kernels_in_the_interpreter(python):
    done = python("-c", SUMS, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


@pytest.mark.skipif(not compiled, reason="the compiled library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sums_that_ranks_send_are_those_of_the_compiled_library_too(dtype):
    """Several blocks of rows, and none."""
    from kdkernels.nystrom.kda import native_impl, torch_impl

    for B in (0, 1, 700):
        tensors = [torch.randn(n, width, dtype=dtype) for n, width in ((B, 5), (B, 6), (3000, 5), (3000, 6))]
        assert B < 700 or torch_impl.block_rows(tensors[0], tensors[2]) < B
        (found, slope), (want, expected) = (run.sums(*tensors, True) for run in (native_impl, torch_impl))
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-3)


def test_smooth_l1_of_pytorch_is_the_same_function():
    x = torch.linspace(-3, 3, 101).double()
    V = x.clamp(-1, 1)
    torch.testing.assert_close((V * (x - V / 2)).sum(), F.smooth_l1_loss(x, torch.zeros_like(x), reduction="sum"))
