# SPDX-License-Identifier: Apache-2.0
"""What test_distributed.py runs on each rank: torchrun --nproc-per-node N tests/over_ranks.py OUT

Every rank draws the same global batch, keeps its own rows, computes over the group, and compares value and averaged
gradient with one process on the whole batch. Rank 0 writes {check: facts} to OUT.
"""

import datetime
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import kdkernels as kd
from kdkernels import distributed

# rows of the ranks: even, an uneven last batch, and a rank with none; cut to the number of ranks
SPLITS = {"even": (16, 16, 16, 16), "uneven": (17, 5, 1, 12), "one empty": (23, 0, 9, 7)}


def device() -> torch.device:
    """This rank's: a GPU, with NCCL, where KDK_RANKS=cuda."""
    on_gpu = os.environ.get("KDK_RANKS") == "cuda"
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")


def linear_mask(x):
    return torch.arange(len(x), device=x.device) % 5 != 2


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


def differs(one, other) -> float:
    """Relative to the largest number."""
    return float((one - other).abs().max() / other.abs().max()) if other.numel() else 0.0


def worst(errors) -> list[float]:
    """Over the ranks; not a number is infinitely wrong, where the larger of 0 and nan may be 0."""
    table = torch.tensor(errors, dtype=torch.float64).nan_to_num(nan=torch.inf)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


def compared(op, x, y, rows, mask=None, wide=False):
    """Errors of value and averaged gradient of both sides, over all ranks; wide: from one process in float64."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, y)]
    value = OPS[op](*whole, **({} if mask is None else {"mask": mask}))
    upstream = torch.tensor(1.7, dtype=value.dtype, device=value.device)
    expected = torch.autograd.grad(value, whole, upstream)
    own = [t.split(rows)[rank].clone().requires_grad_() for t in (x, y)]
    here = {} if mask is None else {"mask": mask.split(rows)[rank]}
    found = OPS[op](*own, group="world", **here)
    gradients = torch.autograd.grad(found, own, upstream)
    errors = [differs(found.detach(), value.detach())]
    for gradient, wanted in zip(gradients, expected, strict=True):
        scale = wanted.abs().max()
        errors.append(float((gradient / world - wanted.split(rows)[rank]).abs().max() / scale) if len(gradient) else 0)
    return worst(errors)


# rows that float32 moments could lose: far from 0, and sides or ranks of other sizes
SHIFTS = {
    "far from 0": lambda x, y: (x + 1e5, y - 3e4),
    "one rank far from 0": lambda x, y: (x + 1e4 * (torch.arange(len(x)) < len(x) // 2)[:, None], y),
    "a small side": lambda x, y: (x * 1e-6, y),
}


def out_of_scale(out):
    """float32 over the ranks against float64 in one process, on the same numbers."""
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12 * world, 5, generator=generator, dtype=torch.float64)
    y = torch.tanh(x) + torch.randn(x.shape, generator=generator, dtype=torch.float64) / 2
    for name, shift in SHIFTS.items():
        for op in ("cka", "cka biased", "hsic", "gram_mse"):
            sides = [side.float() for side in shift(x, y)]
            out[f"out of scale, {op}, {name}"] = compared(op, *sides, [12] * world, wide=True)


def equal_to_one_process(out):
    world = dist.get_world_size()
    for split, sizes in SPLITS.items():
        rows = list(sizes[:world])
        for dtype in (torch.float64, torch.float32):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(sum(rows), 5, generator=generator, dtype=torch.float64) + 1
            y = torch.tanh(x) + torch.randn(x.shape, generator=generator, dtype=torch.float64) / 2
            x, y = x.to(device(), dtype), y.to(device(), dtype)
            for op in OPS:
                name = f"{op}, {split}, {str(dtype).removeprefix('torch.')}"
                out[name] = compared(op, x, y, rows)
            if dtype == torch.float64:
                for op in ("cka", "cka rbf", "gram_mse"):
                    out[f"{op}, {split}, masked"] = compared(op, x, y, rows, linear_mask(x))


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


def penalties(out):
    """The gradient of a squared gradient, of what the textbook backend computes on gathered rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = list(SPLITS["uneven"][:world])
    x = torch.randn(sum(rows), 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def penalty(x, y, **how):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kd.cka(x, y, backend="reference", **how), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    own = x.split(rows)[rank]
    found, expected = penalty(own, own.tanh(), group="world") / world**2, penalty(x, x.tanh())
    out["penalty"] = differs(found, expected.split(rows)[rank])


def samples_of_other_numbers(out):
    """MMD of more rows of x than of y, and of a rank that has none of one of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows_x, rows_y = [5, 7, 3, 2][:world], [4, 0, 6, 3][:world]
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(sum(rows), 3, generator=generator).double() for rows in (rows_x, rows_y))
    masks = linear_mask(x), linear_mask(y)
    sides = [
        (t.split(rows)[rank], m.split(rows)[rank]) for t, m, rows in zip((x, y), masks, (rows_x, rows_y), strict=True)
    ]
    found = kd.mmd(sides[0][0], sides[1][0], mask=(sides[0][1], sides[1][1]), group="world")
    out["samples of other numbers"] = differs(found, kd.mmd(x, y, mask=masks))


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


def said_by_all(call) -> list[str]:
    """The error of each rank."""
    try:
        call()
        said = "nothing"
    except (ValueError, TypeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    return everyone


def refusals(out):
    """Wrong input: what each rank says."""
    rank = dist.get_rank()
    odd = rank == 1
    x, y, few = torch.randn(8, 4), torch.randn(8, 4), torch.randn(1 - (rank > 1), 4)
    whole = {"group": "world"}
    rbf, mask, sigma = kd.RBF(1.0 + odd), torch.ones(8, dtype=torch.bool), torch.ones((), requires_grad=odd)
    wrong = {
        "kernel": lambda: kd.cka(x, y, kernel="rbf" if odd else "linear", **whole),
        "bandwidth": lambda: kd.mmd(x, y, kernel=rbf, **whole),
        "bandwidth with a gradient": lambda: kd.cka(x, y, kernel=kd.RBF(sigma), **whole),
        "unbiased": lambda: kd.hsic(x, y, unbiased=not odd, **whole),
        "option that does not exist": lambda: kd.gram_mse(x, y, normalize="rows" if odd else None, **whole),
        "backend": lambda: kd.cka(x, y, backend="reference" if odd else "torch", **whole),
        "unknown backend": lambda: kd.cka(x, y, backend="gpu", **whole),
        "another op": lambda: (kd.pkt if odd else kd.rkd_distance)(x, y, **whole),
        "one mask for two samples": lambda: kd.mmd(x, y, mask=mask if odd else None, **whole),
        "widths": lambda: kd.cka(torch.randn(8, 4 + odd), y, **whole),
        "dtypes": lambda: kd.cka(x.double() if odd else x, y, **whole),
        "rows of one rank": lambda: kd.hsic(x, y[odd:], **whole),
        "too few": lambda: kd.cka(few, few, **whole),
        "integers on one rank": lambda: kd.gram_mse(x.long() if odd else x, y, **whole),
        "a mask on one rank": lambda: kd.cka(x, y, mask=x[:, 0] > 0 if odd else None, **whole),
        "group": lambda: kd.cka(x, y, group="all"),
    }
    for name, call in wrong.items():
        out[f"refused, {name}"] = said_by_all(call)


def dies(out):
    """Rank 1 ends in the middle; the others are to be told within the timeout."""
    if dist.get_rank() == 1:
        sys.exit(3)
    kd.cka(torch.randn(8, 4), torch.randn(8, 4), group="world")


def run(path, *checks):
    """Each check writes its facts; rank 0 those of all ranks to the file."""
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    # on GPUs gloo too: what the checks tell each other is on the CPU
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=20))
    torch.set_num_threads(1)
    out = {}
    for check in checks:
        check(out)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, out)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(everyone))
    dist.destroy_process_group()
    # all is written: what torch leaves running behind FSDP and DDP now and then aborts the process as Python ends
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    import over_ranks_losses

    every = (
        equal_to_one_process,
        out_of_scale,
        gathered_rows,
        penalties,
        samples_of_other_numbers,
        traffic,
        refusals,
        *over_ranks_losses.CHECKS,
    )
    named = {check.__name__: check for check in (*every, dies)}
    run(sys.argv[1], *([named[wanted] for wanted in sys.argv[2:]] or every))
