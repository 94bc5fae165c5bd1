# SPDX-License-Identifier: Apache-2.0
"""torchsort's `soft_rank` and `soft_sort` with its values, gradients, dtypes and errors, computed by kdkernels.

    from kdkernels.compat import torchsort      # in place of: import torchsort

What torchsort 0.1.10 does and this keeps: values [B, n] only; ranks from 1, ascending; the result and the gradient in
the dtype of the input, integers giving float32; a strength that is a number, or a tensor that broadcasts against the
values, without gradient to it (so [n] is one a column, in soft_rank); a negative strength of soft_rank ranks downwards;
an infinite value has the rank NaN and the others count it (in kd.soft_rank -inf is absent and +inf spoils the row);
the least number of a dtype is one (there it is absent too; float32 and float64 sort it an ulp or two higher here);
under l2, soft_sort of a row with infinities is their sum n times.

What it does not keep is what rounding spoils there: float32 ranks are here within rounding of the exact ones at any
strength (there 0.11 off at n = 5000), float16 rows beyond n = 361 are finite (there NaN, and no return from n = 2049),
and so are kl gradients where exp underflows; bfloat16 is accepted. torchsort is compiled with -ffast-math, so what it
does with NaN, and under kl with infinities in soft_sort, follows no rule: here the row is NaN, or the sum as under l2.
Its backward joins neighbouring blocks whose solutions differ by less than 1e-9; this one does not. Its soft_sort hands
the gradients of equal values to them in any order in rows longer than 16, here in theirs. Strength 0 raises in both
functions; a negative one, and one that differs within a row, in soft_sort.
"""

from __future__ import annotations

import math

import torch

from .. import checks
from .._types import Number, Regularization
from ..autograd import at_least_float32
from ..differentiable import operator
from ..rank import op
from ..rank.checks import broadcasts

__all__ = ["soft_rank", "soft_sort"]


def soft_rank(
    values: torch.Tensor, regularization: Regularization = "l2", regularization_strength: Number = 1.0
) -> torch.Tensor:
    """Soft ranks [B, n] of each row of values [B, n], in the dtype of `values`.

    >>> from kdkernels.compat import torchsort
    >>> torchsort.soft_rank(torch.tensor([[8, 0, 5, 3, 2, 1, 6, 7, 9]]))
    tensor([[8., 1., 5., 4., 3., 2., 6., 7., 9.]])
    """
    values, strength = _arguments(values, regularization, regularization_strength)
    dtype = values.dtype
    if isinstance(strength, torch.Tensor) and _within_rows(strength):
        values, strength = (values / strength).to(at_least_float32(values)), 1.0
    elif isinstance(strength, torch.Tensor):
        values, strength = values * strength.sign().to(dtype), strength.abs()
    elif strength < 0:
        values, strength = -values, -strength
    finite, beyond = _without_infinities(values, strength, regularization == "kl")
    rank = op.soft_rank(finite, regularization, strength).to(dtype)
    if beyond is None:
        return rank
    # inf - inf; the gradient passes all the same
    return rank + torch.where(beyond, math.nan, 0).to(rank.dtype)


def soft_sort(
    values: torch.Tensor, regularization: Regularization = "l2", regularization_strength: Number = 1.0
) -> torch.Tensor:
    """Soft-sorted values [B, n], ascending, of each row of values [B, n], in the dtype of `values`.

    >>> from kdkernels.compat import torchsort
    >>> torchsort.soft_sort(torch.tensor([[8, 5, 3, 2, 1, 6, 7, 9]]), regularization_strength=0.1)
    tensor([[1., 2., 3., 5., 6., 7., 8., 9.]])
    """
    values, strength = _arguments(values, regularization, regularization_strength)
    negative = strength < 0
    if isinstance(strength, torch.Tensor):
        if _within_rows(strength):
            raise ValueError(
                f"regularization_strength has shape {tuple(strength.shape)}: soft_sort needs one number, or one a row "
                f"{(len(values), 1)}"
            )
        negative = bool(negative.any())
    if negative:
        raise ValueError(f"regularization_strength is {regularization_strength!r}: soft_sort needs a positive one")
    if _ordinary(values):
        return op.soft_sort(values, regularization, strength).to(values.dtype)
    spoilt = ~values.detach().isfinite().all(1, keepdim=True)
    clean = torch.where(spoilt, torch.zeros_like(values), values)
    sorted_values = op.soft_sort(_numbers(clean), regularization, strength).to(values.dtype)
    # one block: w - (mean(w) - mean(-x)) with an infinite mean
    return torch.where(spoilt, values.mean(1, keepdim=True), sorted_values)


def _arguments(values, regularization, strength):
    """values as floats, and the strength as a number or a tensor that kdkernels takes."""
    if len(values.shape) != 2:
        raise ValueError(f"'values' should be a 2d-tensor but got {values.shape}")
    if regularization not in ["l2", "kl"]:
        raise ValueError("'regularization' should be a 'l2' or 'kl'")
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    if isinstance(strength, torch.Tensor):
        shape = tuple(strength.shape)
        if not broadcasts(shape, values.shape):
            raise ValueError(f"regularization_strength has shape {shape}: it must broadcast to {tuple(values.shape)}")
        strength = strength.detach().to(values.device, torch.float64)
        return values, strength.reshape(()) if strength.numel() == 1 else strength
    if strength == 0:
        raise ZeroDivisionError("regularization_strength is 0: give a positive number; kd.soft_rank takes 0")
    return values, float(strength)


def _within_rows(strength) -> bool:
    """Whether it differs between the entries of a row: [n], [1, n] or [B, n]."""
    return strength.dim() > 0 and strength.shape[-1] > 1


def _ordinary(values) -> bool:
    """Whether kdkernels takes them for what torchsort does, as far as one may look."""
    if values.numel() == 0 or not checks.may_read(values):
        return values.numel() == 0
    least, most = values.detach().aminmax()
    return least.item() > torch.finfo(values.dtype).min and most.item() < math.inf  # NaN: neither


def _numbers(values):
    """In at least float32, with the least of its numbers, which would be absent, a little higher."""
    wide = values.to(at_least_float32(values))
    limits = torch.finfo(wide.dtype)
    return wide * (1 - limits.eps * (wide.detach() <= limits.min).to(wide.dtype))


def _without_infinities(values, strength, kl: bool):
    """values with infinities moved so far out that they pool with each other alone, and where they were, or None."""
    if _ordinary(values):
        return values, None
    beyond = values.detach().isinf()
    wide = _numbers(values)  # half precision has no room to move out
    rest = torch.where(beyond, 0, wide.detach())
    n = values.shape[1]
    largest = rest.abs().amax(1, keepdim=True)
    strength = strength.reshape(-1, 1) if isinstance(strength, torch.Tensor) else strength
    # neighbours further apart than n strengths never pool, under l2 or kl
    out = (3 * largest + 2 * n * strength + 1).to(wide.dtype)
    return _moved_out(wide, beyond, out, kl), beyond


def _forward(x, beyond, out, kl, need):
    return (torch.where(beyond, torch.where(x > 0, out, -out), x).contiguous(),)


def _backward(grad, x, beyond, kl, need):
    return [(grad.masked_fill(beyond, math.nan) if kl else grad.clone()).contiguous()]


def _fake(x, beyond, out, kl, need):
    return (x.new_empty(x.shape),)


# x with out or -out in place of its infinities; their gradient is that of what replaces them, NaN under kl
_moved_out = operator(
    "torchsort_moved_out",
    "x beyond out",
    "bool kl",
    "",
    wanted="x",
    read="x beyond",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    tangent=lambda run, moved, value, saved, how: run(moved[0], *saved, *how)[0],
).value
