# SPDX-License-Identifier: Apache-2.0
"""Nystrom ops: what holds for any data, figures that were promised, and bad input."""

import resource

import pytest
import torch
from torch.overrides import TorchFunctionMode

import kdkernels as kd
from kdkernels.gram.bandwidth import sigma_of
from kdkernels.gram.kernels import KernelSpec, spec_of
from kdkernels.nystrom import chunks, landmarks, maps, op, reference, torch_impl
from kdkernels.nystrom.call import Question, Side

KERNELS = ["linear", "polynomial", "cosine", "rbf", "laplacian", kd.RBF((1.0, 4.0)), kd.Laplacian(3.0)]


def kernel_matrix(x, kernel):
    one = spec_of(kernel)[0]
    return reference.kernel(x, x, one.name, op._parameters(one, sigma_of(one, x), x.dtype))


def data(n=60, p=12, q=9):
    x = torch.randn(n, p) + 0.5
    return x, 0.7 * x[:, :q] + 0.5 * torch.randn(n, q)


@pytest.mark.parametrize("whiten", ["cholesky", "sqrt"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_all_points_as_landmarks_give_the_kernel_matrix_to_1e_5(kernel, whiten):
    x = torch.randn(200, 16)
    phi = kd.nystrom_features(x, x, kernel=kernel, whiten=whiten).double()
    K = kernel_matrix(x.double(), kernel)
    assert (phi @ phi.T - K).abs().max() <= 1e-5 * K.abs().max()


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian"])
def test_the_nystrom_kernel_is_below_the_kernel(kernel):
    x, _ = data()
    x = x.double()
    phi = kd.nystrom_features(x, x[:20], kernel=kernel)
    gap = kernel_matrix(x, kernel) - phi @ phi.T
    assert torch.linalg.eigvalsh(gap).min() > -1e-10 * len(x)


def test_more_landmarks_never_worsen_the_approximation():
    x = torch.randn(150, 8, dtype=torch.float64)
    order = kd.select_landmarks(x, 60, kernel=kd.RBF(3.0), generator=torch.Generator().manual_seed(0))
    K = kernel_matrix(x, kd.RBF(3.0))
    errors = []
    for m in (5, 15, 30, 60):
        phi = kd.nystrom_features(x, x[order[:m]], kernel=kd.RBF(3.0), jitter=1e-12)
        errors.append((K - phi @ phi.T).trace().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_both_whitenings_give_the_same_kernel_matrix():
    x, _ = data()
    a, b = (kd.nystrom_features(x.double(), x[:10].double(), whiten=w, jitter=1e-10) for w in ("cholesky", "sqrt"))
    torch.testing.assert_close(a @ a.T, b @ b.T, atol=1e-8, rtol=0)


@pytest.mark.parametrize("whiten", ["cholesky", "sqrt"])
def test_duplicate_landmarks_change_nothing(whiten):
    x, _ = data()
    once = kd.nystrom_features(x, x[:8], whiten=whiten, kernel=kd.RBF(2.0))
    twice = kd.nystrom_features(x, x[:8].repeat(2, 1), whiten=whiten, kernel=kd.RBF(2.0))
    assert twice.shape == (60, 16)
    torch.testing.assert_close(twice @ twice.T, once @ once.T, atol=2e-5, rtol=0)


def test_the_square_root_drops_directions_and_its_gradient_survives_repeated_eigenvalues():
    x = torch.randn(30, 4, dtype=torch.float64)
    z = torch.cat([torch.eye(4), torch.eye(4)]).double().requires_grad_()  # linear: eigenvalues 2 (4 times) and 0
    phi = kd.nystrom_features(x, z, kernel="linear", whiten="sqrt")
    assert torch.linalg.matrix_rank(phi, rtol=1e-8) == 4
    torch.testing.assert_close(phi @ phi.T, x @ x.T)
    phi.square().sum().backward()
    # K~ = K as long as the landmarks span the space: its trace does not move with them
    assert z.grad.isfinite().all() and z.grad.abs().max() < 1e-10


def test_the_gradient_of_repeated_eigenvalues_is_the_derivative():
    x, z = torch.randn(9, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)  # rbf: one eigenvalue three times
    run = lambda z: kd.nystrom_features(x, z, kernel=kd.RBF(1.0), whiten="sqrt")  # noqa: E731
    assert torch.autograd.gradcheck(run, z.requires_grad_())


BLOCKS = """
import torch
import kdkernels as kd
# W of rank 20 and of quickly falling eigenvalues: diagonal blocks of its factor are as badly conditioned as it is
for kernel, d, m in (("linear", 20, 256), ("linear", 20, 203), (kd.RBF(10.0), 4, 256)):
    torch.manual_seed(0)
    x, upstream, seen = torch.randn(m, d), torch.randn(m, m), []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        rows = x.to(dtype, copy=True).requires_grad_()
        phi = kd.nystrom_features(rows, x.to(dtype), kernel=kernel, backend=backend)
        K = phi @ phi.mT
        (K * upstream).sum().backward()
        seen.append((K.detach().double(), rows.grad.double()))
    print(*(float((b - a).abs().max() / a.abs().max()) for a, b in zip(*seen, strict=True)))
"""


@pytest.mark.interpret
def test_blocks_of_a_nearly_singular_factor_keep_the_digits_in_the_interpreter(python):
    """One product with a block's inverse: 1.5e-5 and 3.6e-6 at rank 20, 7.1e-6 of the wide rbf kernel."""
    done = python("-c", BLOCKS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    (K, dx), (odd, odd_dx), (wide, _) = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    assert max(K, odd) <= 1e-6 and max(dx, odd_dx) <= 1e-6 and wide <= 4e-6


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", ("rbf", "linear")], ids=str)
def test_cka_with_all_points_as_landmarks_is_the_exact_one(kernel, unbiased):
    x, y = data()
    exact = kd.cka(x, y, kernel=kernel, unbiased=unbiased)
    near = kd.nystrom_cka(x, y, x, y, kernel=kernel, unbiased=unbiased)
    torch.testing.assert_close(near, exact, atol=2e-5, rtol=0)
    exact = kd.hsic(x, y, kernel=kernel, unbiased=unbiased)
    torch.testing.assert_close(
        kd.nystrom_hsic(x, y, x, y, kernel=kernel, unbiased=unbiased), exact, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("rule", ["rpcholesky", "kmeans++", "uniform"])
def test_the_error_of_cka_falls_with_the_number_of_landmarks(rule):
    torch.manual_seed(3)
    x = torch.randn(600, 10) * torch.logspace(0, -1.5, 10)
    y = x @ torch.randn(10, 6) + 0.3 * torch.randn(600, 6)
    exact, errors = kd.cka(x, y, kernel="rbf"), []
    for m in (8, 32, 128):
        # the mean of a few draws: one may be lucky
        runs = []
        for seed in range(4):
            index = kd.select_landmarks(x, m, method=rule, generator=torch.Generator().manual_seed(seed))
            runs.append((kd.nystrom_cka(x, y, x[index], y[index]) - exact).abs())
        errors.append(float(torch.stack(runs).mean()))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 5e-3


def test_cka_is_the_one_of_the_features_whatever_the_chunks(monkeypatch):
    x, y = data(70)
    x, y = x.double() + 5, y.double()
    phi, psi = kd.nystrom_features(x, x[:9]), kd.nystrom_features(y, y[:7])
    for chunk in (7, 64, 1000):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        near = kd.nystrom_cka(x, y, x[:9], y[:7])
        torch.testing.assert_close(near, kd.cka(phi, psi), rtol=1e-10, atol=0)


@pytest.mark.parametrize("m", [12, 9])
@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4, 0.0])
def test_transfer_is_the_naive_value_of_the_features_also_near_convergence(step, m):
    t = torch.randn(80, 10)
    s = t + step * torch.randn(80, 10)
    landmarks = s[:12], t[:m]
    phi, psi = (
        kd.nystrom_features(v, z, kernel=kd.RBF(4.0)).double() for v, z in ((s, landmarks[0]), (t, landmarks[1]))
    )
    K, L = phi @ phi.T, psi @ psi.T
    naive, norms = (K - L).square().sum(), K.square().sum() + L.square().sum()
    got = kd.nystrom_transfer(s, t, *landmarks, kernel=kd.RBF(4.0), normalize=False).double()
    assert (got - naive).abs() <= 1e-6 * norms
    if m == 12:  # the difference is squared, not expanded: relative accuracy, within the features' own rounding
        assert (got - naive).abs() <= 1e-3 * naive + 1e-12 * norms


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf", "polynomial", ("rbf", "linear")], ids=str)
@pytest.mark.parametrize("step", [1.0, 1e-4])
def test_transfer_quality_is_the_relative_distance_of_the_kernel_matrices(kernel, step):
    t = torch.randn(40, 7)
    s = t + step * torch.randn(40, 7)
    pair = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    K, L = (kernel_matrix(v.double(), k) for v, k in zip((s, t), pair, strict=True))
    got = kd.transfer_quality(s, t, kernel=kernel).double()
    torch.testing.assert_close(got, (K - L).norm() / L.norm(), rtol=1e-4, atol=1e-8)


def test_transfer_quality_of_a_copy_is_zero_with_a_finite_gradient():
    t = torch.randn(12, 5)
    for kernel in ("linear", "rbf"):
        s = t.clone().requires_grad_()
        value = kd.transfer_quality(s, t, kernel=kernel)
        value.backward()
        assert value == 0 and (s.grad == 0).all()


@pytest.mark.parametrize("method", ["rpcholesky", "uniform", "kmeans++", "greedy"])
def test_selected_rows_are_different_and_the_seed_decides(method):
    x = torch.randn(50, 6)

    def draw(seed):
        return kd.select_landmarks(x, 20, method=method, generator=torch.Generator().manual_seed(seed))

    assert len(draw(0).unique()) == 20 and draw(0).equal(draw(0)) and draw(0).dtype == torch.int64
    assert draw(0).equal(draw(1)) == (method == "greedy")
    assert sorted(kd.select_landmarks(x, 50, method=method).tolist()) == list(range(50))


@pytest.mark.parametrize("method", ["rpcholesky", "uniform", "kmeans++", "greedy"])
def test_masked_rows_are_not_selected(method):
    x, mask = torch.randn(50, 6), torch.rand(50) > 0.5
    x[~mask] = float("nan")
    chosen = kd.select_landmarks(x, 15, method=method, mask=mask)
    assert mask[chosen].all() and len(chosen.unique()) == 15


def test_randomly_pivoted_cholesky_draws_by_the_residual():
    # three tight clusters of very different sizes: after one row of a cluster its residual is gone
    sizes = (400, 40, 4)
    x = torch.cat([torch.randn(n, 2) * 1e-3 + 10 * k for k, n in enumerate(sizes)])
    group = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    for seed in range(10):
        chosen = kd.select_landmarks(x, 3, kernel=kd.RBF(1.0), generator=torch.Generator().manual_seed(seed))
        assert sorted(group[chosen].tolist()) == [0, 1, 2]


def test_selection_goes_on_where_the_kernel_has_no_more_directions():
    x = torch.randn(40, 3)
    chosen = kd.select_landmarks(x, 10, kernel="linear")
    assert len(chosen.unique()) == 10 and torch.linalg.matrix_rank(x[chosen[:3]]) == 3


def test_memory_is_linear_in_the_rows_and_small_beside_the_features():
    n, m = 60_000, 64
    x, y = torch.randn(n, 16), torch.randn(n, 16)
    kd.nystrom_cka(x[:2000], y[:2000], x[:m], y[:m])  # what loads, loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = kd.nystrom_cka(x, y, x[:m], y[:m])
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert value.isfinite() and extra <= 3 * n * m * 4


class Tf32(TorchFunctionMode):
    """Float32 products as tensor cores take them: factors rounded to 11 bits."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            bits = (a.contiguous().view(torch.int32) + (1 << 12) & -(1 << 13) for a in arguments)
            arguments = tuple(b.view(torch.float32) for b in bits)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("whiten", ["cholesky", "sqrt"])
def test_tf32_does_not_reach_what_the_whitener_amplifies(whiten, monkeypatch):
    x = torch.randn(60, 5) + 3
    spec = KernelSpec("rbf", (2.0,))
    question = Question("features", (spec, spec), whiten, 1e-6, backend="torch")
    s = landmarks.prepare(Side(x, x[:30], None, spec), question, torch.float32)
    rows = maps.prepared_rows(s.spec, x, s.shift, torch.float32)

    def error():
        with Tf32():
            phi = torch_impl.phi_of(s, rows).double()
        return float((phi @ phi.mT - exact @ exact.mT).abs().max())

    exact = torch_impl.phi_of(s, rows).double()
    rounded = error()  # nobody knows that TF32 is on
    monkeypatch.setattr(maps, "tf32_allowed", lambda x: True)
    assert error() <= 1e-5 and rounded >= 100 * error()


def test_an_all_zero_teacher_gives_zero_transfer_with_zero_gradient():
    s, zero = torch.randn(20, 5, requires_grad=True), torch.zeros(20, 4)
    value = kd.nystrom_transfer(s, zero, s.detach()[:6], zero[:6], kernel="linear")
    value.backward()
    assert value == 0 and (s.grad == 0).all()
    assert kd.transfer_quality(s, zero) == 0


BAD = {
    "no landmarks": (lambda x, z: kd.nystrom_features(x, z[:0]), ValueError, "landmarks is empty"),
    "another width": (lambda x, z: kd.nystrom_features(x, z[:, :2]), ValueError, "landmarks has width 2, x has 3"),
    "negative jitter": (lambda x, z: kd.nystrom_features(x, z, jitter=-1e-6), ValueError, "jitter is -1e-06"),
    "infinite jitter": (lambda x, z: kd.nystrom_features(x, z, jitter=float("inf")), ValueError, "jitter is inf"),
    "jitter as text": (lambda x, z: kd.nystrom_features(x, z, jitter="1"), TypeError, "jitter is '1'"),
    "whitening": (lambda x, z: kd.nystrom_features(x, z, whiten="lu"), ValueError, "whiten is 'lu': give one of"),
    "a pair": (lambda x, z: kd.nystrom_features(x, z, kernel=("rbf", "linear")), ValueError, "kernel is a pair"),
    "an unknown kernel": (lambda x, z: kd.nystrom_features(x, z, kernel="sigmoid"), ValueError, "kernel is 'sigmoid'"),
    "three dims": (lambda x, z: kd.nystrom_features(x[None], z), ValueError, r"x has shape \(1, 9, 3\)"),
    "sigma <= 0": (lambda x, z: kd.nystrom_features(x, z, kernel=kd.RBF(torch.tensor(0.0))), ValueError, "sigma holds"),
    "a sigma a group": (
        lambda x, z: kd.nystrom_features(x, z, kernel=kd.RBF(torch.ones(2))),
        ValueError,
        "sigma has 2",
    ),
    "duplicates without jitter": (
        lambda x, z: kd.nystrom_features(x, z[:2].repeat(2, 1), jitter=0.0),
        ValueError,
        "smallest eigenvalue .* Raise jitter",
    ),
    "an indefinite kernel": (
        lambda x, z: kd.nystrom_features(x, z, kernel=kd.Polynomial(1, 1.0, -50.0)),
        ValueError,
        "no Cholesky factor: smallest eigenvalue -",
    ),
    "m > n": (lambda x, z: kd.select_landmarks(x, 10), ValueError, "m is 10: x has 9 rows, give 1 <= m <= 9"),
    "m = 0": (lambda x, z: kd.select_landmarks(x, 0), ValueError, "m is 0"),
    "m as float": (lambda x, z: kd.select_landmarks(x, 2.0), TypeError, "m is a float: give an integer"),
    "a rule": (lambda x, z: kd.select_landmarks(x, 2, method="best"), ValueError, "method is 'best'"),
    "other samples": (lambda x, z: kd.nystrom_cka(x, x[:8], z, z), ValueError, "y has 8 rows, x has 9"),
    "too few rows": (lambda x, z: kd.nystrom_cka(x[:3], x[:3], z, z), ValueError, "needs at least 4"),
    "widths of a side": (
        lambda x, z: kd.nystrom_transfer(x, x, z, z[:, :2]),
        ValueError,
        "t_landmarks has width 2, t ",
    ),
    "a mask of numbers": (
        lambda x, z: kd.nystrom_cka(x, x, z, z, mask=torch.ones(9)),
        TypeError,
        "mask is torch.float32: pass a bool",
    ),
    "a short mask": (
        lambda x, z: kd.nystrom_cka(x, x, z, z, mask=torch.ones(8, dtype=torch.bool)),
        ValueError,
        r"mask has shape \(8,\)",
    ),
    "quality of other samples": (lambda x, z: kd.transfer_quality(x, x[:4]), ValueError, "t has 4 rows, s has 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_argument_and_the_fix(name):
    run, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run(torch.randn(9, 3), torch.randn(4, 3))


def test_a_matrix_without_factor_is_nan_where_values_may_not_be_read(monkeypatch):
    monkeypatch.setattr(landmarks.checks, "may_read", lambda tensor: False)  # as for a CUDA tensor
    x = torch.randn(9, 3)
    assert kd.nystrom_features(x, x[:2].repeat(2, 1), jitter=0.0).isnan().all()
    assert kd.nystrom_features(x, x[:2].repeat(2, 1), jitter=0.0, whiten="sqrt").isfinite().all()


@pytest.mark.parametrize("whiten", ["cholesky", "sqrt"])
def test_nan_stays_in_its_row_unless_it_is_in_a_landmark(whiten):
    x, z = torch.randn(9, 3), torch.randn(4, 3)
    x[5, 1] = float("nan")
    phi = kd.nystrom_features(x, z, kernel=kd.RBF(1.0), whiten=whiten)
    assert phi[5].isnan().all() and phi[torch.arange(9) != 5].isfinite().all()
    z[0, 0] = float("nan")
    assert kd.nystrom_features(x, z, kernel=kd.RBF(1.0), whiten=whiten).isnan().all()


def test_more_landmarks_than_rows_are_fine():
    x, z = torch.randn(3, 4), torch.randn(12, 4)
    phi = kd.nystrom_features(x, z, kernel=kd.RBF(2.0), jitter=1e-9).double()
    gap = kernel_matrix(x.double(), kd.RBF(2.0))
    assert torch.linalg.eigvalsh(gap - phi @ phi.T).min() > -1e-5
