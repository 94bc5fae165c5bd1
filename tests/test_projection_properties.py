# SPDX-License-Identifier: Apache-2.0
"""What must hold of projections, covariance, landmark similarity and class means for any data and any split."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd

SEEDS = st.integers(0, 2**31 - 1)
CHEAP = settings(max_examples=40, deadline=None)


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@st.composite
def maps(draw_from):
    """(seed, B, c, k, positions, channel last)."""
    c = draw_from(st.integers(1, 12))
    k = draw_from(st.integers(1, c))
    return draw_from(SEEDS), draw_from(st.integers(1, 5)), c, k, draw_from(st.integers(1, 9)), draw_from(st.booleans())


@CHEAP
@given(maps())
def test_a_rotation_of_the_basis_inside_its_span_changes_nothing(case):
    seed, B, c, k, p, last = case
    s, t, A, R = draw(seed, (B, c, p), (B, c, p), (c, k), (k, k))
    P, Q = torch.linalg.qr(A).Q, torch.linalg.qr(R).Q
    if last:
        s, t = (x.mT.contiguous().mT for x in (s, t))
    torch.testing.assert_close(kd.projected_mse(s, t, P @ Q), kd.projected_mse(s, t, P))


@CHEAP
@given(maps())
def test_a_projection_is_never_longer_and_pythagoras_holds(case):
    seed, B, c, k, p, last = case
    s, t, A = draw(seed, (B, c, p), (B, c, p), (c, c))
    Q = torch.linalg.qr(A).Q
    inside = kd.projected_mse(s, t, Q[:, :k], reduction="sum")
    outside = kd.projected_mse(s, t, Q[:, k:], reduction="sum") if k < c else 0
    torch.testing.assert_close(inside + outside, (s - t).square().sum())


@CHEAP
@given(maps(), st.floats(0.01, 100), st.sampled_from(["mean", "sum", "none"]))
def test_it_is_symmetric_shift_invariant_and_quadratic_in_scale(case, scale, reduction):
    seed, B, c, k, p, last = case
    s, t, P, shift = draw(seed, (B, c, p), (B, c, p), (c, k), (B, c, p))
    value = kd.projected_mse(s, t, P, reduction=reduction)
    torch.testing.assert_close(kd.projected_mse(t, s, P, reduction=reduction), value)
    torch.testing.assert_close(kd.projected_mse(s + shift, t + shift, P, reduction=reduction), value)
    torch.testing.assert_close(kd.projected_mse(scale * s, scale * t, P, reduction=reduction), scale**2 * value)


@CHEAP
@given(SEEDS, st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(-1e5, 1e5))
def test_the_covariance_does_not_depend_on_how_rows_are_split_or_merged(seed, sizes, mean):
    (x,) = draw(seed, (sum(sizes) + 2, 4))
    x = x + mean
    whole, streamed, merged = kd.StreamingPCA(4), kd.StreamingPCA(4), kd.StreamingPCA(4)
    whole.update(x)
    for part in x.split([*sizes, 2]):
        one = kd.StreamingPCA(4)
        for pca in (streamed, one):
            pca.update(part)
        merged.merge(one)
    for other in (streamed, merged):
        assert int(other.count) == len(x)
        torch.testing.assert_close(other.scatter, whole.scatter, rtol=1e-9, atol=1e-9 * (1 + abs(mean) * 1e-3))


@CHEAP
@given(SEEDS, st.integers(1, 20), st.integers(1, 8), st.floats(0.01, 30))
def test_landmark_similarity_is_positive_zero_for_equal_sides_and_bounded_by_the_l1_distance(seed, B, C, size):
    s, t, a, b = draw(seed, (B, 3), (B, 5), (C, 3), (C, 5))
    value = kd.landmark_similarity_loss(size * s, t, a, b)
    S, T = size * s @ a.T, t @ b.T
    assert 0 <= value <= (S - T).abs().sum() / T.norm() * (1 + 1e-12)
    assert kd.landmark_similarity_loss(t, t, b, b) == 0


@CHEAP
@given(SEEDS, st.integers(1, 20), st.integers(2, 8))
def test_the_order_of_samples_and_of_landmarks_does_not_matter(seed, B, C):
    s, t, a, b = draw(seed, (B, 3), (B, 5), (C, 3), (C, 5))
    generator = torch.Generator().manual_seed(seed)
    rows, marks = torch.randperm(B, generator=generator), torch.randperm(C, generator=generator)
    value = kd.landmark_similarity_loss(s, t, a, b)
    torch.testing.assert_close(kd.landmark_similarity_loss(s[rows], t[rows], a[marks], b[marks]), value)


@CHEAP
@given(SEEDS, st.lists(st.integers(-1, 5), min_size=1, max_size=40), st.integers(1, 7))
def test_the_class_means_do_not_depend_on_order_or_batches(seed, labels, batch):
    labels = torch.tensor(labels)
    labels[labels < 0] = -100
    s, t = draw(seed, (len(labels), 2), (len(labels), 3))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one, other = kd.ClassCenters(6, 2, 3), kd.ClassCenters(6, 2, 3)
    one.update(s, t, labels)
    for rows in order.split(batch):
        other.update(s[rows], t[rows], labels[rows])
    assert one.counts.equal(other.counts)
    for centers in (one, other):
        centers.swap()
    torch.testing.assert_close(one.student_centers, other.student_centers, rtol=1e-6, atol=1e-7)
    for c in range(6):
        want = t[labels == c].mean(0).float() if (labels == c).any() else torch.zeros(3)
        torch.testing.assert_close(one.teacher_centers[c], want, rtol=1e-6, atol=1e-7)
