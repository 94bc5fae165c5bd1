# SPDX-License-Identifier: Apache-2.0
"""What test_distributed_nystrom.py runs on each rank: Nystrom statistics, KDA and its centres, StreamingPCA, RdimKD.

As over_ranks.py: every rank draws the same global batch, keeps its own rows, and compares with one process.
"""

import sys
from functools import partial

import torch
import torch.distributed as dist
from over_ranks import SPLITS, bytes_sent, device, differs, run, said_by_all, worst

import kdkernels as kd
from kdkernels import losses

C = 4  # classes


def statistic(op, kernel, **how):
    return lambda x, y, zx, zy, **more: op(x, y, zx, zy, kernel=kernel, **how, **more)


# of rows [n, 5], [n, 7] and landmarks [4, 5], [4 or 6, 7]: more than a linear kernel's rank have no one gradient
OPS = {
    "transfer": statistic(kd.nystrom_transfer, kd.RBF(3.0)),
    "transfer sum": statistic(kd.nystrom_transfer, "linear", normalize=False),
    "transfer median": statistic(kd.nystrom_transfer, "rbf"),
    "transfer other m": statistic(kd.nystrom_transfer, ("polynomial", kd.RBF(4.0))),
    "transfer reference": statistic(kd.nystrom_transfer, "rbf", backend="reference"),
    "cka": statistic(kd.nystrom_cka, kd.RBF(3.0)),
    "cka biased": statistic(kd.nystrom_cka, "cosine", unbiased=False),
    "cka mean other m": statistic(kd.nystrom_cka, kd.RBF("mean")),
    "cka sqrt": statistic(kd.nystrom_cka, ("linear", kd.Laplacian("median")), whiten="sqrt"),
    "hsic": statistic(kd.nystrom_hsic, kd.RBF(("median", 1.5))),
    "hsic biased": statistic(kd.nystrom_hsic, kd.RBF(2.0), unbiased=False),
    "similarity": lambda x, y, zx, zy, **more: kd.landmark_similarity_loss(x, y, zx, zy, **more),
    "similarity reference": lambda *all, **more: kd.landmark_similarity_loss(*all, backend="reference", **more),
}  # fmt: skip


def mine(t, rows):
    return t.split(rows)[dist.get_rank()].clone()


def apart(gradient, wanted, rows=None):
    """Of this rank's rows, or of a tensor that all hold, of which the ranks' gradients are averaged."""
    if rows is None:
        dist.all_reduce(gradient)
    here = wanted if rows is None else wanted.split(rows)[dist.get_rank()]
    gap = gradient / dist.get_world_size() - here
    return float(gap.abs().max() / wanted.abs().max()) if gap.numel() else 0.0


def ops_equal_to_one_process(out):
    for split, sizes in SPLITS.items():
        rows = list(sizes[: dist.get_world_size()])
        for kind in ("float64", "float32", "masked"):
            dtype = torch.float32 if kind == "float32" else torch.float64
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(sum(rows), 5, generator=generator, dtype=torch.float64) + 1
            y = torch.cat([torch.tanh(x), torch.randn(len(x), 2, generator=generator, dtype=torch.float64)], 1)
            zx, zy = (torch.randn(6, d, generator=generator, dtype=torch.float64) for d in (5, 7))
            zx = zx[:4]
            mask = torch.arange(len(x)) % 5 != 2 if kind == "masked" else None
            if mask is not None:
                x[2], y[7] = torch.nan, torch.nan
                mask = mask.to(device())
            for name, op in OPS.items():
                if name.startswith("similarity") and mask is not None:
                    continue
                learns = 1 if name.startswith("similarity") else 4
                tensors = [t.to(device(), dtype) for t in (x, y, zx, zy if "other m" in name else zy[:4])]
                whole = [t.clone().requires_grad_(k < learns) for k, t in enumerate(tensors)]
                value = op(*whole, **({} if mask is None else {"mask": mask}))
                expected = torch.autograd.grad(1.7 * value, whole[:learns])
                own = [mine(t, rows) if k < 2 else t.clone() for k, t in enumerate(tensors)]
                own = [t.requires_grad_(k < learns) for k, t in enumerate(own)]
                found = op(*own, group="world", **({} if mask is None else {"mask": mine(mask, rows)}))
                gradients = torch.autograd.grad(1.7 * found, own[:learns])
                errors = [differs(found.detach(), value.detach())]
                for k, (gradient, wanted) in enumerate(zip(gradients, expected, strict=True)):
                    errors.append(apart(gradient, wanted, rows if k < 2 else None))
                out[f"{name}, {split}, {kind}"] = worst(errors)


def bandwidths(out):
    """A rule reads the rows of all ranks, above 1024 of them some; sigma as a tensor has its gradient."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    rows = [900, 700, 0, 3][:world]
    x = torch.randn(sum(rows), 3, generator=generator, dtype=torch.float64)
    y, z = x.square(), x[::200].clone()
    whole, own = (x, y, z, z.square()), (mine(x, rows), mine(y, rows), z, z.square())
    for rule in ("median", "mean"):
        value = kd.nystrom_hsic(*whole, kernel=kd.RBF(rule))
        out[f"rule {rule}"] = differs(kd.nystrom_hsic(*own, kernel=kd.RBF(rule), group="world"), value)
    sigmas = [torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    (expected,) = torch.autograd.grad(kd.nystrom_cka(*whole, kernel=kd.RBF(sigmas[0])), sigmas[0])
    (found,) = torch.autograd.grad(kd.nystrom_cka(*own, kernel=kd.RBF(sigmas[1]), group="world"), sigmas[1])
    out["sigma"] = apart(found, expected)
    # landmarks that each rank has chosen among its rows: the first one of each
    starts = [sum(rows[:r]) for r in range(world) if rows[r]]
    x, part = whole[0].clone().requires_grad_(), own[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(kd.nystrom_hsic(x, y, x[starts], y[starts]), x)
    chosen = kd.distributed.gather(part[:1]), kd.distributed.gather(own[1][:1])
    (gradient,) = torch.autograd.grad(kd.nystrom_hsic(part, own[1], *chosen, group="world"), part)
    out["gathered landmarks"] = apart(gradient, wanted, rows)
    # each rank makes another loss of the value: the gradient is that of their sum
    for op in (kd.nystrom_hsic, kd.landmark_similarity_loss):
        x, part = whole[0].clone().requires_grad_(), own[0].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(op(x, *whole[1:]) * sum(range(1, world + 1)) / world, x)
        (gradient,) = torch.autograd.grad(op(part, *own[1:], group="world") * (rank + 1), part)
        out[f"unlike, {op.__name__}"] = apart(gradient, wanted, rows)


def masks(out):
    """Each rank keeps fewer rows than the estimator needs, all of them together enough; then too few, and NaN."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8 * world, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    rows, z, kernel = [8] * world, x[:3].clone(), kd.RBF(2.0)
    mask = torch.arange(len(x)) % 8 < 2
    found = kd.nystrom_cka(mine(x, rows), mine(y, rows), z, z, mask=mine(mask, rows), kernel=kernel, group="world")
    out["few rows on each rank"] = differs(found, kd.nystrom_cka(x[mask], y[mask], z, z, kernel=kernel))
    own = mine(x, rows).fill_(torch.nan).requires_grad_()
    few = mine(mask, rows) & (rank == 0)
    value = kd.nystrom_cka(own, mine(y, rows), z, z, mask=few, kernel=kernel, group="world")
    value.backward()
    out["too few rows on all ranks"] = [float(value.detach()), float(own.grad.abs().sum())]


def kda(group=None, **how):
    return losses.KDALoss(C, 5, 7, start_epoch=1, weight=1.0, group=group, **how)


def transfer(group=None, centers=False, **how):
    return losses.NystromTransferLoss(6, centers=kd.ClassCenters(C, 5, 7) if centers else None, group=group, **how)


def rdimkd(group=None, normalizer="variance", **how):
    loss = losses.RdimKDLoss(7, 3, student_channels=5, normalizer=normalizer, seed=0, group=group, **how).double()
    weights = torch.linspace(-1, 1, 35, dtype=torch.float64)
    loss.adapter.weight.data, loss.adapter.bias.data = weights.view(7, 5).cos(), weights[:7].clone()
    return loss


MODULES = {
    "KDALoss": kda,
    "KDALoss counts": partial(kda, counts="epoch", momentum=0.5),
    "NystromTransferLoss": transfer,
    "NystromTransferLoss drawn": partial(transfer, method="rpcholesky", kernel=kd.RBF(2.0)),
    "NystromTransferLoss centers": partial(transfer, centers=True),
    "RdimKDLoss": rdimkd,
    "RdimKDLoss A": partial(rdimkd, variant="A"),
    "RdimKDLoss R": partial(rdimkd, variant="R", normalizer="mean"),
}


def modules(out):
    for split, sizes in SPLITS.items():
        rows = list(sizes[: dist.get_world_size()])
        for name, make in MODULES.items():
            for masked in (False, True):
                errors = steps(make(), make(group="world"), rows, masked, maps=name.startswith("RdimKD"))
                out[f"{name}, {split}, {'masked' if masked else 'all'}"] = worst(errors)


def steps(one, own, rows, masked: bool, maps: bool):
    """Two epochs, of two batches and of one: errors of the values, gradients and buffers."""
    errors, generator = [], torch.Generator().manual_seed(1)
    shapes = ((5, 2, 2), (7, 2, 2)) if maps else ((5,), (7,))
    for epoch, batches in enumerate((2, 1)):
        for batch in range(batches):
            s, t = (torch.randn(sum(rows), *shape, generator=generator, dtype=torch.float64) for shape in shapes)
            t = t * torch.arange(1, 8, dtype=torch.float64).view(-1, *[1] * (t.dim() - 2))
            # class 3 comes to the first rank alone
            labels = torch.arange(len(s)) % (C - 1)
            labels[0] = C - 1
            mask = torch.arange(len(s)) % 3 != 1 if masked else None
            if masked:
                s[1] = torch.nan
            call, here = (
                {} if mask is None else {"mask": m} for m in (mask, mask if mask is None else mine(mask, rows))
            )
            if maps:
                one.observe(t, **call), own.observe(mine(t, rows), **here)
                if epoch == 0 and batch + 1 < batches:
                    continue
                one.fit(), own.fit()
            else:
                call["labels"], here["labels"] = labels, mine(labels, rows)
            whole, part = s.clone().requires_grad_(), mine(s, rows).requires_grad_()
            torch.manual_seed(7)
            value = one(whole, t, **call)
            torch.manual_seed(7 + dist.get_rank())  # what ranks draw differs
            found = own(part, mine(t, rows), **here)
            assert bool(value > 0) == (epoch > 0 or maps or one.centers is None)
            errors.append(float((found - value).detach().abs() / value.detach().abs().clamp(min=1e-3)))
            wanted, *of_one = torch.autograd.grad(1.7 * value, [whole, *one.parameters()])
            gradient, *of_own = torch.autograd.grad(1.7 * found, [part, *own.parameters()])
            if wanted.abs().max() > 0:
                errors.append(apart(gradient, wanted, rows))
            errors += [apart(a, b) for a, b in zip(of_own, of_one, strict=True)]
        if hasattr(own, "end_epoch"):
            one.end_epoch(), own.end_epoch()
            errors += states(one, own)
        else:
            errors += [differs(own.basis, one.basis), differs(own.scale, one.scale)]
    return errors


def states(one, own):
    """Of the buffers, which have to be the same bits on every rank."""
    found = dict(own.named_buffers())
    for buffer in found.values():
        flat = buffer.double()
        first = flat.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, flat)
    pairs = [(found[n].double(), b.double()) for n, b in one.named_buffers() if n in found]
    return [differs(here, wanted) for here, wanted in pairs if wanted.abs().sum() > 0]


def streamed(out):
    """StreamingPCA: ranks that see other numbers of batches, far from 0, and one that sees nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    one, own = kd.StreamingPCA(6), kd.StreamingPCA(6)
    for batch in range(7):
        x = torch.randn(20, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 1e4 + batch
        one.update(x)
        if batch % 3 == rank:  # of 4 ranks the last one sees nothing
            own.update(x)
        elif batch % 3 >= world:
            own.update(x) if rank == 0 else None
    before = {name: buffer.clone() for name, buffer in own.named_buffers()}
    merged = own.merged("world")
    assert all(torch.equal(buffer, before[name]) for name, buffer in own.named_buffers())
    assert torch.equal(merged.count, one.count)
    errors = [differs(merged.mean, one.mean), differs(merged.scatter, one.scatter)]
    basis = own.components(3, dtype=torch.float64, group="world")
    errors += states(one, merged) + [differs(basis, one.components(3, dtype=torch.float64))]
    out["pca"] = worst(errors)


def traffic(out):
    """Bytes a rank sends: of rows none, of batches none."""
    for n in (64, 512):
        x, y = torch.randn(n, 8, requires_grad=True), torch.randn(n, 6)
        z = torch.arange(80.0).view(10, 8) % 7, torch.arange(60.0).view(10, 6) % 7
        for name, op in (("cka", kd.nystrom_cka), ("transfer", kd.nystrom_transfer)):
            one = partial(op, x, y, *z, kernel=kd.RBF(5.0), group="world")
            out[f"bytes, {name}, {n}"] = bytes_sent(lambda one=one: one().backward())
        one = partial(kd.landmark_similarity_loss, x, y, *z, group="world")
        out[f"bytes, similarity, {n}"] = bytes_sent(lambda one=one: one().backward())
        out[f"bytes, mean, {n}"] = bytes_sent(partial(kd.nystrom_hsic, x, y, *z, kernel=kd.RBF("mean"), group="world"))
        whole = {"group": "world"}
        for name, loss in {
            "KDALoss": losses.KDALoss(10, 8, 6, start_epoch=0, **whole),
            "NystromTransferLoss": losses.NystromTransferLoss(10, kernel=kd.RBF(5.0), **whole),
            "NystromTransferLoss centers": losses.NystromTransferLoss(
                centers=kd.ClassCenters(10, 8, 6), kernel=kd.RBF(5.0), **whole
            ),
        }.items():
            step = partial(loss, x, y, *([] if name == "NystromTransferLoss" else [torch.arange(n) % 10]))
            out[f"bytes, {name}, {n}"] = bytes_sent(lambda step=step: step().backward())
    for batches in (1, 5):
        centers, pca = kd.ClassCenters(10, 8, 6), kd.StreamingPCA(8)
        for _ in range(batches):
            centers.update(x, y, torch.arange(512) % 10)
            pca.update(x)
        out[f"bytes, centers, {batches}"] = bytes_sent(lambda centers=centers: centers.swap("world"))
        out[f"bytes, pca, {batches}"] = bytes_sent(lambda pca=pca: pca.components(2, group="world"))


def refusals(out):
    odd = dist.get_rank() == 1
    x, y, z = torch.randn(8, 5), torch.randn(8, 5), torch.ones(3, 5)
    labels = torch.tensor([0, 1, 2, 3 + 90 * odd, 0, 1, 2, 3])
    whole = {"group": "world"}
    rdimkd = losses.RdimKDLoss(5, 2, variant="R", group="world")
    wrong = {
        "landmarks": lambda: kd.nystrom_transfer(x, y, z + odd, z, **whole),
        "number of landmarks": lambda: kd.nystrom_cka(x, y, z, z[odd:], **whole),
        "widths": lambda: kd.nystrom_hsic(x[:, odd:], y, z[:, odd:], z, **whole),
        "dtypes": lambda: kd.nystrom_transfer(x.double() if odd else x, y, z, z, **whole),
        "rows of one rank": lambda: kd.nystrom_cka(x, y[odd:], z, z, **whole),
        "a mask on one rank": lambda: kd.nystrom_cka(x, y, z, z, mask=x[:, 0] > 0 if odd else None, **whole),
        "too few": lambda: kd.nystrom_cka(x[:1], y[:1], z, z, **whole) if dist.get_rank() < 2 else
        kd.nystrom_cka(x[:0], y[:0], z, z, **whole),
        "another statistic": lambda: (kd.nystrom_cka if odd else kd.nystrom_hsic)(x, y, z, z, **whole),
        "centres of the op": lambda: kd.landmark_similarity_loss(x, y, z, z + odd, **whole),
        "labels": lambda: losses.KDALoss(4, 5, 5, **whole)(x, y, labels),
        "classes": lambda: losses.KDALoss(4 + odd, 5, 5, **whole)(x, y, labels % 4),
        "widths of the loss": lambda: losses.NystromTransferLoss(**whole)(x[:, odd:], y),
        "rows of the loss": lambda: losses.NystromTransferLoss(**whole)(x[:, None], y),
        "classes at the end": lambda: kd.ClassCenters(4 + odd, 5, 5).swap("world"),
        "momentum at the end": lambda: kd.ClassCenters(4, 5, 5, momentum=0.5 if odd else None).swap("world"),
        "channels": lambda: kd.StreamingPCA(4 + odd).components(2, group="world"),
        "nothing seen": lambda: kd.StreamingPCA(4).components(2, group="world"),
        "no fit": lambda: rdimkd(x, y),
        "channels of the loss": lambda: losses.RdimKDLoss(5, 2, variant="R", seed=0, **whole)(x[:, odd:], y),
    }  # fmt: skip
    for name, call in wrong.items():
        out[f"refused, {name}"] = said_by_all(call)
    rdimkd.fit()
    first = rdimkd.basis.clone()
    dist.broadcast(first, 0)
    out["R without a seed"] = differs(rdimkd.basis, first)
    empty = losses.NystromTransferLoss(**whole)(x[:0].requires_grad_(), y[:0])
    empty.backward()
    out["empty everywhere"] = float(empty)


if __name__ == "__main__":
    every = (ops_equal_to_one_process, bandwidths, masks, modules, streamed, traffic, refusals)
    run(sys.argv[1], *([check for check in every if check.__name__ in sys.argv[2:]] or every))
