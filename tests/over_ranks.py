# SPDX-License-Identifier: Apache-2.0
"""What test_distributed.py runs on each rank: torchrun --nproc-per-node N tests/over_ranks.py OUT

Every rank draws the same global batch, keeps its own rows, computes over the group, and compares value and averaged
gradient with one process on the whole batch. Rank 0 writes {check: facts} to OUT.
"""

import datetime
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import kdkernels as kd
from kdkernels import distributed, losses

# rows of the ranks: even, an uneven last batch, and a rank with none; cut to the number of ranks
SPLITS = {"even": (16, 16, 16, 16), "uneven": (17, 5, 1, 12), "one empty": (23, 0, 9, 7)}


def linear_mask(x):
    return torch.arange(len(x)) % 5 != 2


OPS = {
    "cka": lambda x, y, **how: kd.cka(x, y, **how),
    "cka biased": lambda x, y, **how: kd.cka(x, y, unbiased=False, **how),
    "cka rbf": lambda x, y, **how: kd.cka(x, y, kernel=kd.RBF(3.0), **how),
    "cka rbf median": lambda x, y, **how: kd.cka(x, y, kernel="rbf", **how),
    "cka cosine": lambda x, y, **how: kd.cka(x, y, kernel="cosine", **how),
    "cka rows of RCKA": lambda x, y, **how: kd.cka(x, y, unbiased=False, center=False, row_normalize=True, **how),
    "hsic": lambda x, y, **how: kd.hsic(x, y, **how),
    "hsic biased": lambda x, y, **how: kd.hsic(x, y, unbiased=False, **how),
    "gram_mse": lambda x, y, **how: kd.gram_mse(x, y, **how),
    "gram_mse sum": lambda x, y, **how: kd.gram_mse(x, y, reduction="sum", **how),
    "gram_mse rows": lambda x, y, **how: kd.gram_mse(x, y, normalize="row", **how),
    "mmd": lambda x, y, **how: kd.mmd(x, y, kernel=kd.RBF(2.0), **how),
}


# sizes of a sample on the student's and the teacher's side
SIZES = {
    "rows": ((5,), (7,)),
    "one width": ((5,), (5,)),
    "tokens": ((3, 5), (3, 7)),
    "maps": ((4, 2, 3), (6, 2, 3)),
    "levels": [((5,), (7,)), ((4, 2, 3), (6, 2, 3))],
    "logits and stages": [((5,), (5,)), ((5,), (7,)), ((4, 2, 3), (6, 2, 3))],
    "logits and tokens": [((3, 5), (3, 5)), ((3, 4), (3, 6))],
}


ROWS_OF_BOTH = {"rows": "groups", "feature_rows": "groups"}


class Case(NamedTuple):
    make: object  # (group=...) -> the loss
    sizes: str = "rows"
    mask: str | None = None  # of "samples" or "tokens"
    call: dict = {}


# every loss that takes `group`, and every way of making rows with some of them
LOSSES = {
    "CKALoss": Case(losses.CKALoss),
    "CKALoss rbf": Case(partial(losses.CKALoss, "rbf", unbiased=False), mask="samples"),
    "CKALoss levels": Case(partial(losses.CKALoss, weights=[0.5, 2.0], weight=3.0), "levels", mask="samples"),
    "CKALoss tokens": Case(losses.CKALoss, "tokens", mask="tokens", call={"rows": "tokens"}),
    "CKALoss mean": Case(losses.CKALoss, "tokens", mask="tokens", call={"rows": "mean"}),
    "CKALoss groups": Case(partial(losses.CKALoss, unbiased=False), "tokens", call={"rows": "groups"}),
    "CKALoss groups masked": Case(partial(losses.CKALoss, unbiased=False, rows="groups"), "tokens", mask="tokens"),
    "CKALoss gap": Case(losses.CKALoss, "maps", call={"rows": "gap"}),
    "CKALoss positions": Case(losses.CKALoss, "maps", call={"rows": "positions"}),
    "MMDLoss": Case(losses.MMDLoss, "one width"),
    "MMDLoss transfer": Case(partial(losses.MMDLoss.preset, "transfer"), "one width", mask="samples"),
    "GramMSELoss": Case(losses.GramMSELoss, mask="samples"),
    "SPLoss": Case(losses.SPLoss, "maps", mask="samples"),
    "PKTLoss": Case(losses.PKTLoss),
    "PKTLoss groups": Case(losses.PKTLoss, "tokens", mask="tokens", call={"rows": "groups"}),
    "RKDDistanceLoss": Case(losses.RKDDistanceLoss),
    "RKDAngleLoss": Case(losses.RKDAngleLoss, mask="samples"),
    "RKDLoss": Case(losses.RKDLoss, "levels"),
    "RKDLoss groups": Case(losses.RKDLoss, "tokens", mask="tokens", call={"rows": "groups"}),
    "CCLoss": Case(losses.CCLoss, "one width", mask="samples"),
    "RCKALoss": Case(losses.RCKALoss, "one width"),
    "RCKALoss textbook": Case(
        partial(losses.RCKALoss, row_normalize=False, center=True, unbiased=True, class_weight=0), mask="samples"
    ),
    "RCKALoss stages": Case(partial(losses.RCKALoss, feature_weight=[1.0, 0.5]), "logits and stages", mask="samples"),
    "RCKALoss groups": Case(partial(losses.RCKALoss, feature_weight=2.0), "logits and tokens", "tokens", ROWS_OF_BOTH),
    "CCLoss taylor": Case(partial(losses.CCLoss, "taylor", normalize=True)),
}


def differs(one, other) -> float:
    """Relative to the largest number."""
    return float((one - other).abs().max() / other.abs().max()) if other.numel() else 0.0


def compared(op, x, y, rows, mask=None):
    """Errors of value and averaged gradient of both sides, over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = [t.clone().requires_grad_() for t in (x, y)]
    value = OPS[op](*whole, **({} if mask is None else {"mask": mask}))
    upstream = torch.tensor(1.7, dtype=value.dtype)
    expected = torch.autograd.grad(value, whole, upstream)
    own = [t.split(rows)[rank].clone().requires_grad_() for t in (x, y)]
    here = {} if mask is None else {"mask": mask.split(rows)[rank]}
    found = OPS[op](*own, group="world", **here)
    gradients = torch.autograd.grad(found, own, upstream)
    errors = [differs(found.detach(), value.detach())]
    for gradient, wanted in zip(gradients, expected, strict=True):
        scale = wanted.abs().max()
        errors.append(float((gradient / world - wanted.split(rows)[rank]).abs().max() / scale) if len(gradient) else 0)
    worst = torch.tensor(errors, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


def equal_to_one_process(out):
    world = dist.get_world_size()
    for split, sizes in SPLITS.items():
        rows = list(sizes[:world])
        for dtype in (torch.float64, torch.float32):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(sum(rows), 5, generator=generator, dtype=torch.float64) + 1
            y = torch.tanh(x) + torch.randn(x.shape, generator=generator, dtype=torch.float64) / 2
            x, y = x.to(dtype), y.to(dtype)
            for op in OPS:
                name = f"{op}, {split}, {str(dtype).removeprefix('torch.')}"
                out[name] = compared(op, x, y, rows)
            if dtype == torch.float64:
                for op in ("cka", "cka rbf", "gram_mse"):
                    out[f"{op}, {split}, masked"] = compared(op, x, y, rows, linear_mask(x))


def batch(case, n, dtype):
    """Student and teacher levels of n samples that are alike, and the mask."""
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES[case.sizes]
    student, teacher = [], []
    for own, other in sizes if isinstance(sizes, list) else [sizes]:
        y = torch.randn(n, *other, generator=generator, dtype=torch.float64) + 0.5
        x = torch.randn(n, *own, generator=generator, dtype=torch.float64)
        shared = [slice(None), *(slice(min(pair)) for pair in zip(own, other, strict=True))]
        x[shared] += y[shared]
        student.append(x.to(dtype))
        teacher.append(y.to(dtype))
    shape = {None: None, "samples": (n,), "tokens": (n, *student[0].shape[1:-1])}[case.mask]
    mask = None if shape is None else torch.rand(shape, generator=generator) > 0.3
    return student, teacher, mask


def losses_equal_to_one_process(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    for split, sizes in SPLITS.items():
        rows = list(sizes[:world])
        for name, case in LOSSES.items():
            for dtype in (torch.float64, torch.float32):
                student, teacher, mask = batch(case, sum(rows), dtype)

                def terms(make, student, teacher, mask, case=case):
                    sides = (student[0], teacher[0]) if case.sizes != "levels" else (student, teacher)
                    if case.sizes.startswith("logits"):
                        sides = (*sides, student[1:], teacher[1:])
                    call = case.call if mask is None else {**case.call, "mask": mask}
                    total, parts = make()(*sides, return_parts=True, **call)
                    return {"total": total, **parts}, torch.autograd.grad(1.7 * total, student)

                whole = [t.clone().requires_grad_() for t in student]
                expected, gradients = terms(case.make, whole, teacher, mask)
                mine = [t.split(rows)[rank] for t in (*student, *teacher, *([] if mask is None else [mask]))]
                k = len(student)
                own = [t.clone().requires_grad_() for t in mine[:k]]
                found, here = terms(
                    partial(case.make, group="world"), own, mine[k : 2 * k], None if mask is None else mine[-1]
                )
                assert found.keys() == expected.keys()
                errors = [differs(found[part].detach(), expected[part].detach()) for part in found]
                for gradient, wanted in zip(here, gradients, strict=True):
                    apart = gradient / world - wanted.split(rows)[rank]
                    errors.append(float(apart.abs().max() / wanted.abs().max()) if len(gradient) else 0.0)
                worst = torch.tensor(errors, dtype=torch.float64)
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                out[f"{name}, {split}, {str(dtype).removeprefix('torch.')}"] = worst.tolist()


def gathered_rows(out):
    """What arrives, in which order, and what a gradient that differs between the ranks adds up to."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [r + 1 if r != 1 else 0 for r in range(world)]
    x = torch.full((rows[rank], 2), float(rank), requires_grad=True)
    whole = distributed.gather(x)
    (grad,) = torch.autograd.grad((whole * (rank + 1)).sum(), x)
    out["gather"] = {
        "rows": whole[:, 0].tolist(),
        "expected": [float(r) for r in range(world) for _ in range(rows[r])],
        "gradient": grad.flatten().tolist() if len(grad) else [],
        "expected gradient": [world * (world + 1) / 2.0] * (2 * rows[rank]),
        "bools": distributed.gather(x[:, 0] > 0.5).tolist(),
    }


def bytes_sent(call) -> int:
    """What the collectives of a call put in, counted at torch.distributed."""
    total, originals = 0, {}

    def counting(name, at):
        def run(*arguments, **options):
            nonlocal total
            total += arguments[at].numel() * arguments[at].element_size()
            return originals[name](*arguments, **options)

        return run

    for name, at in (("all_reduce", 0), ("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1)):
        originals[name] = getattr(dist, name)
        setattr(dist, name, counting(name, at))
    for name, at in (("all_gather_single", 1), ("reduce_scatter_single", 1)):
        if hasattr(dist, name):
            originals[name] = getattr(dist, name)
            setattr(dist, name, counting(name, at))
    try:
        call()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return total


def traffic(out):
    for n in (64, 512):
        x, y = torch.randn(n, 8, requires_grad=True), torch.randn(n, 6)
        out[f"bytes, linear, {n}"] = bytes_sent(lambda x=x, y=y: kd.cka(x, y, group="world").backward())
        out[f"bytes, rbf, {n}"] = bytes_sent(
            lambda x=x, y=y: kd.cka(x, y, kernel=kd.RBF(1.0), group="world").backward()
        )


def refusals(out):
    """Wrong input: what each rank says."""
    rank = dist.get_rank()
    odd = rank == 1
    x, y, few = torch.randn(8, 4), torch.randn(8, 4), torch.randn(1 - (rank > 1), 4)
    whole = {"group": "world"}
    wrong = {
        "widths": lambda: kd.cka(torch.randn(8, 4 + odd), y, **whole),
        "dtypes": lambda: kd.cka(x.double() if odd else x, y, **whole),
        "rows of one rank": lambda: kd.hsic(x, y[odd:], **whole),
        "too few": lambda: kd.cka(few, few, **whole),
        "integers on one rank": lambda: kd.gram_mse(x.long() if odd else x, y, **whole),
        "a mask on one rank": lambda: kd.cka(x, y, mask=x[:, 0] > 0 if odd else None, **whole),
        "group": lambda: kd.cka(x, y, group="all"),
    }
    for name, call in wrong.items():
        try:
            call()
            said = "nothing"
        except (ValueError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, said)
        out[f"refused, {name}"] = everyone


def dies(out):
    """Rank 1 ends in the middle; the others are to be told within the timeout."""
    if dist.get_rank() == 1:
        sys.exit(3)
    kd.cka(torch.randn(8, 4), torch.randn(8, 4), group="world")


def main(path, *wanted):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    torch.set_num_threads(1)
    out = {}
    for check in (
        (equal_to_one_process, losses_equal_to_one_process, gathered_rows, traffic, refusals)
        if not wanted
        else [globals()[w] for w in wanted]
    ):
        check(out)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, out)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
