# SPDX-License-Identifier: Apache-2.0
"""The losses of over_ranks.py, one table: equal to one process on the batch of all ranks; what they send and refuse."""

import warnings
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from over_ranks import SPLITS, bytes_sent, device, differs, said_by_all, worst
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import kdkernels as kd
from kdkernels import distributed, losses
from kdkernels.analysis import metric
from kdkernels.losses.cmkd import classes_apart

# sizes of a sample on the student's and the teacher's side
SIZES = {
    "rows": ((5,), (7,)),
    "one width": ((5,), (5,)),
    "tokens": ((3, 5), (3, 7)),
    "maps": ((4, 2, 3), (6, 2, 3)),
    "tokens of one width": ((3, 5), (3, 5)),
    "maps of one width": ((2, 20, 3), (2, 18, 5)),
    "levels": [((5,), (7,)), ((4, 2, 3), (6, 2, 3))],
    "logits and stages": [((5,), (5,)), ((5,), (7,)), ((4, 2, 3), (6, 2, 3))],
    "logits and tokens": [((3, 5), (3, 5)), ((3, 4), (3, 6))],
}


ROWS_OF_BOTH = {"rows": "groups", "feature_rows": "groups"}


class Case(NamedTuple):
    make: object  # (group=...) -> the loss
    sizes: str = "rows"
    mask: str | None = None  # of "samples" or "tokens"; "weights" of samples
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
    "PCKALoss": Case(losses.PCKALoss, "maps of one width"),
    "PCKALoss transposed": Case(partial(losses.PCKALoss, transposed=1.0, center=True), "maps of one width", "samples"),
    "DISTLoss": Case(losses.DISTLoss, "one width"),
    "DISTLoss tokens": Case(losses.DISTLoss, "tokens of one width", "tokens"),
    "CMKDLoss tokens": Case(partial(losses.CMKDLoss, class_weight=2.0), "tokens of one width"),
    "DISTLoss masked": Case(partial(losses.DISTLoss, 2.0, 3.0, 4.0, reduction="sum"), "one width", "samples"),
    "CMKDLoss": Case(partial(losses.CMKDLoss, class_weight=2.0), "one width"),
    "CMKDLoss masked": Case(
        partial(losses.CMKDLoss, class_weight=1.0), "one width", "samples", {"normalizer": torch.tensor(7.0)}
    ),
    "CMKDLoss weighted": Case(losses.CMKDLoss, "one width", "weights"),
    "DISTLoss weighted": Case(
        partial(losses.DISTLoss, gamma=0.0), "one width", "weights", {"normalizer": torch.tensor(7.0)}
    ),
    "CCLoss taylor": Case(partial(losses.CCLoss, "taylor", normalize=True)),
}


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
        student.append(x.to(device(), dtype))
        teacher.append(y.to(device(), dtype))
    if case.mask is None:
        return student, teacher, None
    drawn = torch.rand((n, *student[0].shape[1:-1]) if case.mask == "tokens" else n, generator=generator)
    return student, teacher, ((drawn - 0.3).clamp(0) if case.mask == "weights" else drawn > 0.3).to(device())


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
                    given = {} if mask is None else {"token_weights" if case.mask == "weights" else "mask": mask}
                    call = {**case.call, **given}
                    total, parts = make()(*sides, return_parts=True, **call)
                    return {"total": total, **parts}, torch.autograd.grad(1.7 * total, student)

                whole = [t.clone().requires_grad_() for t in student]
                expected, gradients = terms(case.make, whole, teacher, mask)
                mine = [t.split(rows)[rank] for t in (*student, *teacher, *([] if mask is None else [mask]))]
                k = len(student)
                own = [t.clone().requires_grad_() for t in mine[:k]]
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # a rank without rows is none to warn of
                    found, here = terms(
                        partial(case.make, group="world"), own, mine[k : 2 * k], None if mask is None else mine[-1]
                    )
                assert found.keys() == expected.keys()
                errors = [differs(found[part].detach(), expected[part].detach()) for part in found]
                for gradient, wanted in zip(here, gradients, strict=True):
                    apart = gradient / world - wanted.split(rows)[rank]
                    errors.append(float(apart.abs().max() / wanted.abs().max()) if len(gradient) else 0.0)
                out[f"{name}, {split}, {str(dtype).removeprefix('torch.')}"] = worst(errors)


def other_batches(out):
    """Ranks with other numbers of tokens, groups that are not the world, batches too small on all ranks together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(3, 5 + r if r != 1 else 2, 4, generator=generator) for r in range(world)]
    targets = [t.tanh() + torch.randn(t.shape, generator=generator) / 4 for t in tokens]
    pairs = list(zip(tokens, targets, strict=True))
    rows = {
        "tokens": losses.CKALoss()(
            torch.cat([t.flatten(0, 1) for t in tokens]), torch.cat([t.flatten(0, 1) for t in targets])
        ),
        "mean": losses.CKALoss()(torch.cat([t.mean(1) for t in tokens]), torch.cat([t.mean(1) for t in targets])),
        # the samples of rank 1 have too few tokens for the estimator
        "groups": sum(losses.CKALoss(rows="groups")(*p) for r, p in enumerate(pairs) if r != 1) / (world - 1),
    }
    loss = losses.CKALoss(group="world")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {how: loss(*pairs[rank], rows=how) for how in rows}
    out["other tokens"] = {how: [found[how].item(), rows[how].item()] for how in rows}
    out["warned of tokens"] = [str(w.message) for w in caught]

    handles = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    pair = rank // 2
    x, y = (torch.cat([t[side].mean(1) for t in pairs[2 * pair : 2 * pair + 2]]) for side in (0, 1))
    own = [t.mean(1) for t in pairs[rank]]
    out["pairs of ranks"] = [losses.CKALoss(group=handles[pair])(*own).item(), losses.CKALoss()(x, y).item()]
    out["refused, not a member"] = said_by_all(lambda: losses.CKALoss(group=handles[0])(*own))

    few = torch.randn(1 - (rank > 1), 4, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = losses.CKALoss(group="world")
        values = [loss(few, few), loss(few, few)]
    (gradient,) = torch.autograd.grad(values[0], few)
    out["too small"] = [
        *(value.item() for value in values),
        gradient.abs().sum().item(),
        [str(w.message) for w in caught],
    ]


def rows_at_the_mean(out):
    """A rank whose rows are the mean of all, of which it cannot tell on its own that a class is not constant."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [2, *[1] * (world - 1)]
    x, y = torch.zeros(world + 1, 3), torch.arange(3.0 * world + 3).reshape(-1, 3).square()
    x[:2] = torch.tensor([[1.0, -2.0, 1.0], [-1.0, 2.0, -1.0]])
    whole, own = x.clone().requires_grad_(), x.split(rows)[rank].clone().requires_grad_()
    (expected,) = torch.autograd.grad(classes_apart(whole, y, None), whole)
    agreed = distributed.Agreed(dist.group.WORLD, rows)
    (found,) = torch.autograd.grad(classes_apart(own, y.split(rows)[rank], None, agreed), own)
    out["rows at the mean"] = [(found / world).tolist(), expected.split(rows)[rank].tolist()]


def under_ddp_and_fsdp(out):
    """What they average is the gradient of one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, y = torch.randn(6 * world + 1, 5).double(), torch.randn(6 * world + 1, 3).double()
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)).double()
    expected = torch.autograd.grad(losses.GramMSELoss()(model(x), y), model.parameters())
    sizes = [7, *[6] * (world - 1)]
    x, y, loss = x.split(sizes)[rank], y.split(sizes)[rank], losses.GramMSELoss(group="world")
    replica = torch.nn.parallel.DistributedDataParallel(model)
    loss(replica(x), y).backward()
    out["ddp"] = worst([differs(p.grad, wanted) for p, wanted in zip(model.parameters(), expected, strict=True)])
    model.zero_grad()
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    loss(sharded(x), y).backward()
    grads = [p.grad.full_tensor() for p in sharded.parameters()]
    out["fsdp"] = worst([differs(grad, wanted) for grad, wanted in zip(grads, expected, strict=True)])


def compiled(out):
    """Around the collectives; the whole as one graph is refused."""
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher, _ = batch(LOSSES["DISTLoss"], 7 * world, torch.float64)
    rows = [10, *[7] * (world - 2), 4]
    y, apart = teacher[0].split(rows)[rank], []
    for loss in (losses.CCLoss(group="world"), losses.DISTLoss(group="world")):
        both = []
        for call in (loss, torch.compile(loss, backend="aot_eager")):
            x = student[0].split(rows)[rank].clone().requires_grad_()
            value = call(x, y)
            both.append((value.detach(), *torch.autograd.grad(value, x)))
        apart += [differs(one, other) for one, other in zip(*both, strict=True)]
    out["compiled"] = worst(apart)
    whole = torch.compile(loss, backend="eager", fullgraph=True)
    out["refused, one graph"] = said_by_all(lambda: whole(x, y))


def traffic_of_losses(out):
    for n in (64, 512):
        x, y = torch.randn(n, 8, requires_grad=True), torch.randn(n, 6)
        for name, loss in (("loss", losses.CKALoss(group="world")), ("op", partial(kd.cka, group="world"))):
            out[f"bytes, {name}, {n}"] = bytes_sent(lambda x=x, y=y, loss=loss: loss(x, y).backward())
    x, y = torch.randn(4, 100, 8, requires_grad=True), torch.randn(4, 100, 6)
    loss = losses.CKALoss(rows="groups", group="world")
    out["bytes, groups"] = bytes_sent(lambda: loss(x, y).backward())


def metric_alone(kernel):
    """As it is without torchmetrics, whose metrics compare nothing."""
    with mock.patch.object(metric, "_collected", lambda: None):
        return kd.CKAMetric(kernel)


def refusals_of_losses(out):
    rank = dist.get_rank()
    odd = rank == 1
    x, y, tokens = torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 3, 5)
    cka, rcka, sp = (make(group="world") for make in (losses.CKALoss, losses.RCKALoss, losses.SPLoss))
    tensors = {"mask": torch.ones(8, dtype=torch.bool)}
    whole = {"group": "world"}
    wrong = {
        "a kernel": lambda: losses.CKALoss("rbf" if odd else "linear", **whole)(x, y),
        "a bandwidth": lambda: losses.CKALoss(kd.RBF(1.0 + odd), **whole)(x, y),
        "a tensor as bandwidth": lambda: losses.CKALoss(kd.RBF(torch.tensor(1.0 + odd)), **whole)(x, y),
        "one of mmd": lambda: kd.mmd(x, y, kernel=kd.Laplacian(torch.tensor([1.0 + odd]).requires_grad_()), **whole),
        "one of a transfer": lambda: kd.nystrom_transfer(x, y, x, y, kernel=kd.RBF(torch.tensor(1.0 + odd)), **whole),
        "a weight": lambda: losses.SPLoss(weight=1.0 + odd, **whole)(x, y),
        "weights": lambda: losses.CKALoss(weights=[1.0] if odd else None, **whole)([x], [y]),
        "a preset": lambda: (losses.MMDLoss.preset("transfer", **whole) if odd else losses.MMDLoss(**whole))(x, y),
        "a term": lambda: losses.DISTLoss(beta=1.0 - odd, **whole)(x, y),
        "a normalizer": lambda: losses.DISTLoss(**whole)(x, y, normalizer=3.0 if odd else None, **tensors),
        "landmarks": lambda: losses.NystromTransferLoss(3 + odd, **whole)(x, y),
        "a part": lambda: losses.KDALoss(4, 4, 4, counts="epoch" if odd else "first", **whole)(x, y),
        "a fit": lambda: losses.RdimKDLoss(4, 2 + odd, **whole).fit(),
        "a metric": lambda: metric_alone("rbf" if odd else "linear").compute(),
        "a width": lambda: cka(torch.randn(8, 4 + odd), y),
        "a width of level 1": lambda: cka([x, torch.randn(8, 4 + odd)], [y, y]),
        "a dtype": lambda: cka(x, y.double() if odd else y),
        "levels": lambda: cka([x] * (2 + odd), [y] * (2 + odd)),
        "classes": lambda: rcka(*[torch.randn(8, 4 + odd)] * 2),
        "stages": lambda: rcka(x, y, *([[x], [y]] if odd else [])),
        "rows=": lambda: cka(tokens, tokens, rows="tokens" if odd else "mean"),
        "no rows=": lambda: cka(tokens, tokens, rows="tokens" if odd else None),
        "losses": lambda: (sp if odd else cka)(x, y),
        "a mask": lambda: cka(x, y, mask=torch.ones(8, dtype=torch.bool) if odd else None),
        "a gradient": lambda: cka(x.clone().requires_grad_(odd), y),
        "no tensor": lambda: cka(x.numpy() if odd else x, y),
    }
    for name, call in wrong.items():
        out[f"loss refused, {name}"] = said_by_all(call)


CHECKS = (
    losses_equal_to_one_process,
    other_batches,
    rows_at_the_mean,
    under_ddp_and_fsdp,
    compiled,
    traffic_of_losses,
    refusals_of_losses,
)
