# SPDX-License-Identifier: Apache-2.0
"""Statistics of the rows of all ranks: linear kernels send p x p moments and no feature, the others their rows.

What reaches a rank a call, N rows in all, b bytes a number: moments about 2 (p^2 + p q + q^2 + p + q) b, whatever N is;
features N (p + q) b. The smaller of the two is chosen, on every rank alike; features are gathered while they are few,
and go round a ring where they are not. MATH.md, "More than one GPU", has the formulas and what backward sends.
"""

from __future__ import annotations

from ... import backend as backends
from ... import distributed
from ...autograd import device_type
from ...distributed import Agreed, rows_first
from .. import two_sample
from ..call import Question, Rows, check_features, check_mask
from . import moments, ring


def agreed(op: str, rows: Rows, group, options) -> Agreed:
    """The ranks compare what they were given, before anything of it is looked into."""
    x, y, mask = rows

    def check():
        check_features(x, y, empty=True)
        if mask is not None:
            check_mask(mask, x, "mask")
        backends.resolve(op, options["backend"], device_type(x), (x.dtype, y.dtype))

    return distributed.agreed(
        [rows_first(side) for side in (x, y, mask)], ("x", "y", "mask"), group, check, op, options
    )


def answer(question: Question, rows: Rows, group, backend: str):
    """(the statistic, None) from moments or the ring, else (None, the rows of all ranks).

    The textbook sees rows: for backend="reference" all of them travel.
    """
    x, y, mask = rows
    _, kernel, unbiased, center, row_normalize, _ = question
    options = {"kernel": kernel, "unbiased": unbiased, "center": center, "row_normalize": row_normalize}
    group = agreed(question.op(), rows, group, {**options, "backend": backend})
    kernels = question.kernels()
    # what came from moments or the ring runs on no backend: an unknown one is refused all the same
    backends.resolve(question.op(), backend, device_type(x), (x.dtype, y.dtype))
    if group.total < question.least():
        raise ValueError(
            f"x and y have {group.total} rows on all ranks: {question.stat} needs at least {question.least()}"
        )
    if backend != "reference":
        if moments.serve(question, kernels) and moments.are_fewer(question, rows, group.total):
            return moments.statistic(question, kernels, rows, group), None
        if ring.chosen(x, y, group):
            return ring.statistic(question, kernels, rows, group), None
    return None, Rows(*(rows_first(side) for side in group.gather(*map(rows_first, rows))))


def samples(question: Question, rows: Rows, group, backend: str):
    """`answer` for two samples, which need not have the same number of rows; the mask is a pair of masks, or None."""
    options = {"kernel": question.kernel, "unbiased": question.unbiased, "backend": backend}
    groups = _agreed_on_both(rows, group, options)
    kernel, (x, y, masks) = question.kernels()[0], rows
    masks = masks or (None, None)
    many = min(of.total for of in groups) > 1 and ring.chosen(x, y[..., :0], ring.joined(groups))
    if many and backend != "reference":
        return ring.mmd(kernel, question.unbiased, Rows(x, y, masks), groups), None
    pairs = [map(rows_first, pair) for pair in zip((x, y), masks, strict=True)]
    (x, mask_x), (y, mask_y) = (map(rows_first, of.gather(*pair)) for of, pair in zip(groups, pairs, strict=True))
    return None, Rows(x, y, (mask_x, mask_y))


def _agreed_on_both(rows: Rows, group, options) -> list[Agreed]:
    """`agreed` of two samples."""
    if isinstance(group, Agreed):
        return [group, group]

    def prepare():
        two_sample.check(rows, empty=True)
        x, y, masks = rows
        backends.resolve("mmd", options["backend"], device_type(x), (x.dtype, y.dtype))
        of_x, of_y = masks or (None, None)
        return None, {name: rows_first(t) for name, t in (("x", x), ("mask[0]", of_x), ("y", y), ("mask[1]", of_y))}

    handle = distributed.handle_of(group)
    _, found = distributed.compare(prepare, handle, "mmd", options)
    return [Agreed(handle, found[name]) for name in "xy"]
