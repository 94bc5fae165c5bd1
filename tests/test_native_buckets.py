# SPDX-License-Identifier: Apache-2.0
"""The compiled rows of k chosen classes and the rest: every width, dtype and edge is PyTorch's in float64."""

import math

import pytest
import torch
from conftest import needs_native

from kdkernels.logits import native_impl, torch_impl
from kdkernels.logits.buckets import COMPILED

pytestmark = needs_native(*COMPILED)


def both(student, index, tau, grad):
    """Values and gradient, compiled and in float64."""
    found = []
    for run, z in ((native_impl, student), (torch_impl, student.flatten(0, -2).double())):
        values, kept = run.bucket_rows(z, index, tau, True)
        found.append((values, run.bucket_gradient(grad.to(values.dtype), z, index, kept, tau)))
    return found


def chosen(R, C, k):
    return torch.rand(R, C).argsort(-1)[:, :k].contiguous()


# the tail of a vector, of a block of 512, and of the padding; one class, and all of them
@pytest.mark.parametrize(
    "C, k", [(1, 1), (2, 1), (15, 3), (16, 16), (17, 5), (511, 64), (512, 1), (513, 512), (2049, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_every_width_and_dtype_is_float64s_to_a_few_eps(C, k, dtype, tau):
    torch.manual_seed(C)
    student, index, grad = (4 * torch.randn(5, C)).to(dtype), chosen(5, C, k), torch.randn(5, k + 1)
    grad[1] = 0
    (values, gradient), (exact, slopes) = both(student, index, tau, grad)
    assert values.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=2e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), slopes, rtol=max(eps, 5e-6), atol=torch.finfo(dtype).tiny)


def test_closed_classes_poison_and_a_rest_that_is_nothing():
    torch.manual_seed(0)
    student, index, grad = torch.randn(9, 700), chosen(9, 700, 6), torch.randn(9, 7)
    student[0, index[0, 2]] = -math.inf
    student[1, :600] = -math.inf
    student[2, index[2, 0]], student[3, index[3, 1]] = math.inf, math.nan
    student[4, 698], student[5, 3] = math.nan, math.inf
    student[6] = torch.full((700,), -math.inf).scatter(-1, index[6], student[6, :6])
    student[7] = -math.inf
    student[8] -= 1e4 * torch.ones(700).scatter(-1, index[8], 0.0)  # the rest is far below the chosen
    (values, gradient), (exact, slopes) = both(student, index, 2.0, grad)
    poisoned = exact.isnan().any(-1)
    assert values.isnan().any(-1).equal(poisoned) and poisoned.tolist() == [
        False,
        False,
        *[True] * 4,
        False,
        True,
        False,
    ]
    torch.testing.assert_close(values[~poisoned].double(), exact[~poisoned], rtol=1e-6, atol=2e-6)
    assert values[6, 6] == -math.inf and values[8, 6] < -4e3
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-5, atol=1e-37, equal_nan=True)


def test_rows_of_samples_are_read_where_they_lie():
    student, index, grad = torch.randn(3, 6, 40)[:, 1:-1], chosen(12, 40, 5), torch.randn(12, 6)
    (values, gradient), (exact, slopes) = both(student, index, 1.0, grad)
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-5, atol=1e-37)


def test_the_bits_do_not_depend_on_the_number_of_threads(same_bits):
    student, index, grad = 4 * torch.randn(301, 1037), chosen(301, 1037, 20), torch.randn(301, 21)

    def run():
        values, kept = native_impl.bucket_rows(student, index, 1.0, True)
        return values, native_impl.bucket_gradient(grad, student, index, kept, 1.0)

    same_bits(run)


def test_a_class_that_is_not_there_is_refused():
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=f"index holds {wrong}: classes are 0 to 7"):
            native_impl.bucket_rows(torch.zeros(2, 8), torch.full((2, 1), wrong), 1.0, False)
