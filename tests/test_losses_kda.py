# SPDX-License-Identifier: Apache-2.0
"""KDALoss over epochs, against a plain float64 loop that keeps every row of the epoch before."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import kdkernels as kd
from kdkernels import losses

C, D, E = 5, 4, 6


def epoch(batches=3, n=16, shift=0.0):
    """Class 4 never comes."""
    for _ in range(batches):
        yield torch.randn(n, D) + shift, torch.randn(n, E) - shift, torch.randint(0, C - 1, (n,))


class Plain:
    """KDA as one reads it: means of the rows of the epoch before, smooth L1 by PyTorch, float64."""

    def __init__(self):
        self.rows, self.centers = [], (torch.zeros(C, D).double(), torch.zeros(C, E).double())

    def __call__(self, s, t, labels):
        self.rows.append((s.detach(), t, labels))
        S, T = s.double() @ self.centers[0].T, t.double() @ self.centers[1].T
        if T.norm() == 0:
            return 0 * s.double().sum()
        return torch.nn.functional.smooth_l1_loss(S, T, reduction="sum") / T.norm()

    def end_epoch(self):
        labels = torch.cat([row[2] for row in self.rows])
        for side, centers in enumerate(self.centers):
            x = torch.cat([row[side] for row in self.rows]).double()
            for c in labels.unique():
                centers[c] = x[labels == c].mean(0)
        self.rows = []


@pytest.mark.parametrize("start", [0, 2])
def test_training_follows_the_paper_epoch_by_epoch(start):
    loss, plain = losses.KDALoss(C, D, E, start_epoch=start, counts="epoch"), Plain()
    for number in range(4):
        for s, t, labels in epoch(shift=0.3 * number):
            s.requires_grad_()
            value, want = loss(s, t, labels), 0.04 * plain(s, t, labels)
            if number < start:
                want = want * 0
            torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=1e-9)
            got, expected = torch.autograd.grad(value, s)[0], torch.autograd.grad(want, s)[0]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
        loss.end_epoch()
        plain.end_epoch()
        assert int(loss.epoch) == number + 1
    assert value > 0


def test_the_defaults_are_those_of_the_public_code():
    loss = losses.KDALoss(C, D, E)
    assert loss.weight.item() == pytest.approx(0.04) and loss.start_epoch == 5
    assert loss.centers.count_rule == "first" and loss.centers.momentum is None


def test_counts_come_from_epoch_zero():
    loss = losses.KDALoss(1, 1, 1, start_epoch=0)
    one, zero = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    for _ in range(4):
        loss(one, one, zero)
    loss.end_epoch()
    assert loss.centers.student_centers.item() == 1
    for _ in range(2):  # half an epoch, as drop_last or a sampler leaves it
        loss(one, one, zero)
    loss.end_epoch()
    assert loss.centers.student_centers.item() == 0.5


def test_eval_mode_and_calls_without_labels_leave_the_sums_alone():
    loss = losses.KDALoss(C, D, E, start_epoch=0)
    s, t, labels = next(epoch(1))
    loss(s, t)
    loss.eval()(s, t, labels)
    assert (loss.centers.counts == 0).all() and (loss.centers.student_sums == 0).all()
    loss.train()(s, t, labels)
    assert int(loss.centers.counts.sum()) == 16


def test_rows_that_do_not_count_reach_neither_the_value_nor_the_centres():
    loss, kept_only = (losses.KDALoss(C, D, E, start_epoch=0, weight=1.0) for _ in range(2))
    for batch in epoch():
        for one in (loss, kept_only):
            one(*batch)
    for one in (loss, kept_only):
        one.end_epoch()
    s, t, labels = next(epoch(1))
    labels[::4] = 255
    mask = torch.rand(16) > 0.3
    kept = mask & (labels != 255)
    s[~kept], t[~kept] = float("nan"), float("inf")
    s.requires_grad_()
    value = loss(s, t, labels, mask=mask, ignore_index=255)
    want = kept_only(s.detach()[kept], t[kept], labels[kept])
    torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(value, s)
    assert (grad[~kept] == 0).all() and (grad[kept] != 0).any()
    assert loss.centers.counts.equal(kept_only.centers.counts)
    torch.testing.assert_close(loss.centers.student_sums, kept_only.centers.student_sums)


@pytest.mark.parametrize("name", ["KDALoss", "NystromTransferLoss"])
def test_a_batch_that_another_rank_refuses_is_not_counted(name, monkeypatch):
    centers = kd.ClassCenters(C, D, E)
    loss = losses.KDALoss(C, D, E) if name == "KDALoss" else losses.NystromTransferLoss(C, centers=centers)

    def refused(prepare, call):
        prepare()
        raise ValueError("on rank 1: labels holds 9")

    monkeypatch.setattr(loss, "_over_ranks", refused)
    with pytest.raises(ValueError, match="rank 1"):
        loss(torch.randn(8, D), torch.randn(8, E), torch.arange(8) % C)
    assert not loss.centers.counts.any() and not loss.centers.student_sums.any()
    monkeypatch.undo()
    loss(torch.randn(8, D), torch.randn(8, E), torch.arange(8) % C)
    assert loss.centers.counts.sum() == 8


def test_a_class_that_is_ignored_does_not_count():
    centers = kd.ClassCenters(2, 1, 1, ignore_index=0)
    centers.update(torch.ones(3, 1), torch.ones(3, 1), torch.tensor([0, 1, 1]))
    assert centers.counts.tolist() == [0, 2]


def test_a_resumed_training_goes_on_where_it_was():
    torch.manual_seed(3)
    straight, first = (losses.KDALoss(C, D, E, start_epoch=1) for _ in range(2))
    epochs = [list(epoch()) for _ in range(3)]
    for number, batches in enumerate(epochs):
        for i, batch in enumerate(batches):
            straight(*batch)
            if number == 0 or (number == 1 and i == 0):
                first(*batch)
        straight.end_epoch()
        if number == 0:
            first.end_epoch()
    resumed = losses.KDALoss(C, D, E, start_epoch=1)
    resumed.load_state_dict(first.state_dict())
    for batch in epochs[1][1:]:
        resumed(*batch)
    resumed.end_epoch()
    for batch in epochs[2]:
        value = resumed(*batch)
    straight.eval(), resumed.end_epoch()
    assert value > 0 and resumed.eval()(*batch).equal(straight(*batch))


def test_training_with_labels_compiles_to_one_graph_and_counts_as_eager_does():
    torch._dynamo.reset()
    eager, loss = (losses.KDALoss(C, D, E, start_epoch=1) for _ in range(2))
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for _ in range(3):
        for batch in epoch():
            torch.testing.assert_close(compiled(*batch), eager(*batch))
        for one in (eager, loss):
            one.end_epoch()
    assert counter.frame_count == 1
    assert loss.centers.student_centers.equal(eager.centers.student_centers)


def test_maps_are_flattened_and_momentum_is_handed_on():
    loss = losses.KDALoss(C, 4, 8, start_epoch=0, momentum=0.5)
    assert loss.centers.momentum == 0.5
    loss(torch.randn(3, 1, 2, 2), torch.randn(3, 2, 2, 2), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda s, t, y: (s[:, :3], t, y), ValueError, "student_features has 3 features a sample, .* for 4"),
        (lambda s, t, y: (s, t[:, :3], y), ValueError, "teacher_features has 3 features a sample, .* for 6"),
        (lambda s, t, y: (s, t, y[:3]), ValueError, r"labels has shape \(3,\)"),
        (lambda s, t, y: (s, t, y.float()), TypeError, "labels is torch.float32"),
        (lambda s, t, y: (s, t, y + C), ValueError, "labels holds . *|labels holds"),
        (lambda s, t, y: (s, t.long(), y), TypeError, "teacher_features is torch.int64"),
    ],
)
def test_bad_calls_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.KDALoss(C, D, E)(*arguments(*next(epoch(1))))


def test_bad_settings_are_refused():
    for how, error, message in (
        ({"start_epoch": -1}, ValueError, "start_epoch is -1"),
        ({"start_epoch": 1.5}, TypeError, "start_epoch is a float"),
        ({"momentum": 2}, ValueError, "momentum is 2"),
        ({"weight": float("nan")}, ValueError, "weight"),
    ):
        with pytest.raises(error, match=message):
            losses.KDALoss(C, D, E, **how)
    with pytest.raises(ValueError, match="num_classes is 0"):
        kd.losses.KDALoss(0, D, E)


def test_training_on_after_an_evaluation_without_an_end_of_epoch_is_told_once():
    def told(loss, end):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert loss.train()(torch.randn(4, 3), torch.randn(4, 5), torch.arange(4) % 2) >= 0
                if end:
                    loss.end_epoch()
                loss.eval()
        return ["end_epoch() was never called" in str(w.message) for w in caught]

    assert told(losses.KDALoss(2, 3, 5), end=False) == [True]
    assert told(losses.KDALoss(2, 3, 5), end=True) == []
