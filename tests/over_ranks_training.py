# SPDX-License-Identifier: Apache-2.0
"""What test_distributed_training.py runs on each rank: a loss over the ranks inside DDP, FSDP2 and a compiled step.

torchrun --nproc-per-node N tests/over_ranks_training.py OUT [CHECK ...]; on GPUs with NCCL where KDK_RANKS=cuda. Every
rank holds its own rows of one batch; gradients of the parameters are compared with one process on the whole batch.
"""

import sys
import warnings

import torch
import torch.distributed as dist
from over_ranks import device, differs, run, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd

# rows of the ranks: an uneven last batch; a rank without any, and an odd number
SPLITS = ((17, 13, 4, 9), (26, 0, 3, 11))
LOSSES = {
    "moments": lambda **how: kd.losses.CKALoss(**how),
    "gathered": lambda **how: kd.losses.CKALoss(kernel=kd.RBF(3.0), **how),
    "pairs": lambda **how: kd.losses.RKDLoss(**how),
}


def student() -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5, bias=False)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1] ** 0.5)
    return net.to(device())


def batch(rows):
    """Images and the teacher's features of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), 6, generator=generator, dtype=torch.float64)
    return x.to(device()), torch.cat([x.relu(), x[:, :1]], 1).to(device())


def gradients(net, step, x, t):
    net.zero_grad()
    value = step(x, t)
    value.backward()
    # FSDP2 leaves each rank its shard
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
    return value.detach(), grads


def compared(out, name, wrap, make, splits=SPLITS, after=lambda: None):
    """Worst errors of value and gradients of parameters, which the wrapper averages, for one split after another."""
    net, loss = wrap(student()), make(group="world")
    alone, reference = student(), make()

    def step(x, t):
        return loss(net(x), t)

    step = torch.compile(step, backend="aot_eager") if name.startswith("compiled") else step
    for rows in splits:
        rows = rows[: dist.get_world_size()]
        x, t = batch(rows)
        value, expected = gradients(alone, lambda x, t: reference(alone(x), t), x, t)
        found, grads = gradients(net, step, *(side.split(rows)[dist.get_rank()] for side in (x, t)))
        errors = [differs(found, value), *(differs(g, e) for g, e in zip(grads, expected, strict=True))]
        out[f"{name}, {rows}"] = worst(errors)
        after()


def ddp(net):
    return DistributedDataParallel(net)


def fsdp(net):
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def wrapped(out):
    for kind in (ddp, fsdp):
        for name, make in LOSSES.items():
            compared(out, f"{kind.__name__}, {name}", kind, make)


def compiled(out):
    """A whole step under torch.compile: the numbers, and how often it compiles again as the ranks' rows change."""
    from torch._dynamo.utils import counters

    warnings.filterwarnings("ignore", module="torch")
    # ranks that differ from call to call: after the second split, sizes are symbols
    splits, graphs = ((17, 13, 4, 9), (16, 14, 5, 8), (15, 11, 6, 7), (19, 12, 7, 6)), []

    def count():
        graphs.append(counters["stats"]["unique_graphs"])

    compared(out, "compiled ddp", ddp, LOSSES["moments"], splits, count)
    out["graphs"], out["breaks"] = graphs, len(counters["graph_break"])


if __name__ == "__main__":
    checks = {"wrapped": wrapped, "compiled": compiled}
    run(sys.argv[1], *(checks[name] for name in sys.argv[2:] or checks))
