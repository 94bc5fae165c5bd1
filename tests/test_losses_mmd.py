# SPDX-License-Identifier: Apache-2.0
"""MMDLoss is kd.mmd on rows, or the multi-kernel form of the transfer-learning libraries."""

import pytest
import torch

import kdkernels as kd
from kdkernels.losses import MMDLoss


def transfer(student, teacher, factors=(0.25, 0.5, 1, 2, 4)):
    """The libraries' mmd_rbf: rbf kernels around the mean distance of distinct rows, biased, the mean detached."""
    n, rows = len(student), torch.cat([student, teacher])
    d2 = (rows[None] - rows[:, None]).square().sum(2)
    mean = d2.detach().sum() / (len(rows) ** 2 - len(rows))
    K = sum(torch.exp(-d2 / (mean * f)) for f in factors)
    return (K[:n, :n] + K[n:, n:] - K[:n, n:] - K[n:, :n]).mean()


def sides(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=dtype).requires_grad_(), torch.randn(*shape, dtype=dtype) + 0.5


def gradient(value, student):
    return torch.autograd.grad(value, student)[0]


def test_the_transfer_preset_is_the_libraries_formula():
    student, teacher = sides(9, 5)
    value, expected = MMDLoss.preset("transfer")(student, teacher), transfer(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(value, student), gradient(expected, student), rtol=1e-8, atol=1e-12)


def test_the_transfer_preset_counts_masked_rows_nowhere():
    student, teacher = sides(9, 5)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    expected = transfer(student[mask], teacher[mask])
    poisoned = torch.where(mask[:, None], student, torch.nan)
    torch.testing.assert_close(MMDLoss.preset("transfer")(poisoned, teacher, mask=mask), expected, rtol=1e-9, atol=0)


def test_the_transfer_preset_takes_identical_samples():
    same = torch.ones(4, 3, requires_grad=True)
    value = MMDLoss.preset("transfer")(same, torch.ones(4, 3))
    assert value.abs() < 1e-6 and gradient(value, same).isfinite().all()


def test_the_transfer_preset_keeps_float32_where_the_features_have_a_large_mean():
    student, teacher = sides(32, 8)
    expected = transfer(student, teacher)
    shifted = [(side.detach() + 256).float() for side in (student, teacher)]
    exact = transfer(*(side.double() for side in shifted))
    # 256 leaves 15 bits to the features themselves
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(MMDLoss.preset("transfer")(*shifted).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["rbf", "linear", kd.Laplacian(2.0)], ids=["rbf", "linear", "laplacian"])
def test_a_kernel_gives_kd_mmd(kernel, unbiased):
    student, teacher = sides(9, 5)
    value = MMDLoss(kernel, unbiased=unbiased, weight=2.0)(student, teacher)
    expected = 2 * kd.mmd(student, teacher, kernel=kernel, unbiased=unbiased, backend="reference")
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)


def test_the_transfer_preset_compiles_to_one_graph():
    torch._dynamo.reset()
    student, teacher = sides(9, 5)
    mask = torch.arange(9) != 4
    loss = MMDLoss.preset("transfer")
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher, mask=mask)
    expected = transfer(student[mask], teacher[mask])
    torch.testing.assert_close(gradient(value, student), gradient(expected, student), rtol=1e-8, atol=1e-12)


def test_it_compares_sets_and_not_pairs_of_rows():
    student, teacher = sides(9, 5)
    for loss in (MMDLoss(), MMDLoss.preset("transfer")):
        torch.testing.assert_close(loss(student, teacher.flip(0)), loss(student, teacher))


def test_a_single_sample_has_no_unbiased_mmd():
    student, teacher = sides(1, 5)
    with pytest.warns(UserWarning, match="1 rows and needs 2"):
        value = MMDLoss()(student, teacher)
    assert value == 0 and (gradient(value, student) == 0).all()
    biased = MMDLoss.preset("transfer")(student, teacher)
    torch.testing.assert_close(biased, transfer(student, teacher))


def test_what_cannot_be_compared_is_refused():
    student, teacher = sides(9, 5)
    with pytest.raises(ValueError, match=r"teacher_features\[0\] has rows of 4 features, student_features\[0\] of 5"):
        MMDLoss()([student], [teacher[:, :4]])
    with pytest.raises(ValueError, match="kernel is a pair"):
        MMDLoss(("rbf", "linear"))
    with pytest.raises(ValueError, match="factors make a sum of rbf kernels"):
        MMDLoss("linear", factors=(1.0,))
    with pytest.raises(ValueError, match=r"factors is \(1.0, -1.0\)"):
        MMDLoss(factors=(1.0, -1.0))
    with pytest.raises(ValueError, match="preset is 'mk': give one of"):
        MMDLoss.preset("mk")
