# SPDX-License-Identifier: Apache-2.0
"""What test_ring.py runs on each rank: torchrun --nproc-per-node N tests/over_ranks_ring.py OUT

As over_ranks.py, with the ring taken for every batch, tiles of a few rows, so that a block has several, and a median
of a few rows (by the portable backend: the compiled one has its own).
"""

import os
import signal
import sys
from functools import partial

import torch
import torch.distributed as dist
from largest import LargestTensor
from over_ranks import SPLITS, device, differs, run, worst

import kdkernels as kd
from bench import traffic
from kdkernels.gram import bandwidth as rules
from kdkernels.gram.distributed import ring
from kdkernels.gram.kernels import RBF, Laplacian, Polynomial
from kdkernels.gram.torch_impl import panels

RCKA = {"unbiased": False, "center": False, "row_normalize": True}
OF_GROUPS = ("cka rbf median", "cka centred rows", "gram_mse rows")
OPS = {
    "cka rbf": partial(kd.cka, kernel=RBF(3.0)),
    "cka rbf mean": partial(kd.cka, kernel=RBF(("mean", 0.7)), unbiased=False),
    "cka rbf median": partial(kd.cka, kernel="rbf", backend="torch"),
    "cka rbf sum": partial(kd.cka, kernel=(RBF((1.0, 3.0)), "linear")),
    "cka laplacian": partial(kd.cka, kernel=Laplacian(2.0)),
    "cka cosine": partial(kd.cka, kernel=("cosine", Polynomial(3, 0.5, 2.0))),
    "cka uncentred": partial(kd.cka, kernel="polynomial", unbiased=False, center=False),
    "cka rows of RCKA": partial(kd.cka, **RCKA),
    "cka centred rows": partial(kd.cka, kernel=("polynomial", RBF(2.0)), unbiased=False, row_normalize=True),
    "hsic": partial(kd.hsic, kernel=("polynomial", "laplacian")),
    "hsic biased": partial(kd.hsic, kernel="polynomial", unbiased=False),
    "gram_mse rows": partial(kd.gram_mse, normalize="row"),
    "gram_mse rows, sum": partial(kd.gram_mse, normalize="row", reduction="sum"),
    "mmd": partial(kd.mmd, kernel=RBF((1.0, 2.0))),
    "mmd median": partial(kd.mmd, kernel=Laplacian("median"), unbiased=False),
}


def pair(rows, dtype=torch.float64, groups=()):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*groups, sum(rows), 5, generator=generator, dtype=torch.float64) + 1
    y = torch.tanh(x) + torch.randn(x.shape, generator=generator, dtype=torch.float64) / 2
    return x.to(device(), dtype), y.to(device(), dtype)


def part(t, rows, dim):
    return t.split(rows, dim)[dist.get_rank()].clone()


def errors(op, x, y, rows, mask=None):
    """Of value and averaged gradient of both sides against one process, over all ranks, relative to the largest."""
    whole = [t.clone().requires_grad_() for t in (x, y)]
    value = op(*whole, mask=mask)
    upstream = torch.linspace(1.7, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    expected = torch.autograd.grad(value, whole, upstream)
    own = [part(t, rows, -2).requires_grad_() for t in (x, y)]
    masks = (None if m is None else part(m, rows, -1) for m in (mask if isinstance(mask, tuple) else (mask,)))
    found = op(*own, group="world", mask=tuple(masks) if isinstance(mask, tuple) else next(masks))
    # each rank weighs the value in its own way, the mean of which is what one process is given
    tilt = 1 + (dist.get_rank() - (dist.get_world_size() - 1) / 2) / 4
    gradients = torch.autograd.grad(found, own, upstream * tilt)
    here = [differs(found.detach(), value.detach())]
    for gradient, wanted in zip(gradients, expected, strict=True):
        off = gradient / dist.get_world_size() - part(wanted, rows, -2)
        here.append(float(off.abs().max() / wanted.abs().max()) if off.numel() else 0.0)
    return worst(here)


def equal_to_one_process(out):
    """Double precision with uneven rows; a rank without rows, and masked rows of NaN; single precision."""
    uneven, one_empty = (list(SPLITS[split][: dist.get_world_size()]) for split in ("uneven", "one empty"))
    for name, op in OPS.items():
        x, y = pair(uneven)
        out[f"{name}, float64"] = errors(op, x, y, uneven)
        out[f"{name}, float32"] = errors(op, x.float(), y.float(), uneven)
        x, y = pair(one_empty)
        mask = torch.arange(len(x), device=x.device) % 5 != 2
        x[~mask] = torch.nan
        out[f"{name}, masked"] = errors(op, x, y, one_empty, (mask, None) if name.startswith("mmd") else mask)


def groups_and_bandwidths(out):
    """Groups of their own masks, one with too few rows, of NaN; a bandwidth that learns; half rows."""
    rows = list(SPLITS["uneven"][: dist.get_world_size()])
    x, y = pair(rows, groups=(3,))
    mask = torch.rand(3, sum(rows), generator=torch.Generator().manual_seed(1)) < 0.8
    mask[1, 1:] = False
    mask = mask.to(x.device)
    lost = x.clone()
    lost[1] = torch.nan
    for name in OF_GROUPS:
        out[f"groups, {name}"] = errors(OPS[name], x, y, rows)
        out[f"groups, {name}, masked"] = errors(OPS[name], lost if name.startswith("cka") else x, y, rows, mask)
    x, y = (t[0] for t in (x, y))
    gradients = []
    for inputs, how in (((x, y), {}), ([part(t, rows, -2) for t in (x, y)], {"group": "world"})):
        sigma = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        inputs = [t.clone().requires_grad_() for t in inputs]
        kd.cka(*inputs, kernel=(RBF(sigma), Laplacian(sigma)), **how).backward()
        gradients.append(sigma.grad)
    out["bandwidth"] = worst([differs(gradients[1], gradients[0])])
    out["bfloat16"] = errors(OPS["cka rbf"], x.bfloat16(), y.bfloat16(), rows)[:1]
    with torch.autocast("cpu", torch.bfloat16):
        out["autocast"] = errors(OPS["cka rbf"], x, y, rows)


def wide_bandwidth(out):
    """Independent features, rows of unlike norms, a wide kernel: K is nearly u_i + u_j, and little of it is left."""
    rows = [150] * dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    norms = torch.linspace(0.1, 3, sum(rows))[torch.randperm(sum(rows), generator=generator), None]
    x = torch.randn(sum(rows), 400, generator=generator) * norms
    y = torch.randn(x.shape, generator=generator) * norms.flip(0) + x
    x, y = x.to(device()), y.to(device())
    op = partial(kd.cka, kernel=RBF(500.0))
    whole = [t.double().requires_grad_() for t in (x, y)]
    own = [part(t, rows, 0).requires_grad_() for t in (x, y)]
    value, found = op(*whole), op(*own, group="world")
    (wanted,), (gradient,) = torch.autograd.grad(value, whole[:1]), torch.autograd.grad(found, own[:1])
    off = gradient.double() / len(rows) - part(wanted, rows, 0)
    out["wide bandwidth"] = worst([differs(found, value), float(off.abs().max() / wanted.abs().max())])


def refused(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def second_derivatives(out):
    x, y = (t.requires_grad_() for t in pair([8]))
    (first,) = torch.autograd.grad(OPS["cka rbf"](x, y, group="world"), x, create_graph=True)
    out["second derivative"] = refused(lambda: first.sum().backward())


def gradient(x, y):
    kd.cka(x.clone().requires_grad_(), y, kernel=RBF(8.0), group="world").backward()


def memory_and_traffic(out):
    """Of a step on n rows a rank, by ring and by gather."""
    world, panels.TILE = dist.get_world_size(), 64
    for n in (128, 256):
        x, y = torch.randn(n, 40), torch.randn(n, 24)
        for how, least in (("ring", 0), ("gather", 2**60)):
            ring.RING_FROM = least
            step = partial(gradient, x, y)
            out[f"bytes, {how}, {n}"] = traffic.received(step, world)
            with LargestTensor() as seen:
                step()
            out[f"largest, {how}, {n}"] = seen.bytes


def dies(out):
    """Rank 1 ends after the ranks have agreed, when the first block is due."""
    if dist.get_rank() == 1:
        dist.batch_isend_irecv = lambda messages: os._exit(3)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others: they are to end by themselves
    try:
        gradient(*pair([8]))
    except RuntimeError as error:
        print("rank 0 was told:", error, file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    panels.TILE, ring.RING_FROM, rules.EXACT = 8, 0, 16
    every = (equal_to_one_process, groups_and_bandwidths, wide_bandwidth, second_derivatives, memory_and_traffic)
    run(sys.argv[1], *([check for check in (*every, dies) if check.__name__ in sys.argv[2:]] or every))
