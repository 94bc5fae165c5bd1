# SPDX-License-Identifier: Apache-2.0
"""What test_distributed_vocabulary.py runs on each rank: losses on logits whose classes, or rows, lie on the ranks.

As over_ranks.py: every rank draws the same batch, keeps its own slices, and compares with one process.
"""

import sys

import torch
import torch.distributed as dist
from over_ranks import bytes_sent, device, differs, run, said_by_all, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd
from kdkernels.losses import DKDLoss, KDLoss, STKDLoss

N, H, WIDE, V = 13, 6, 9, 41
SLICES = {2: [30, 11], 4: [12, 9, 19, 1]}  # uneven; one of a single class
EVERY = ("forward", "reverse", "jsd", "skew", "skew_reverse", "tvd")


def mine(t, dim=-1):
    return t.split(SLICES[dist.get_world_size()], dim)[dist.get_rank()].clone()


def sides(dtype=torch.float64):
    """hidden, weight, bias of both sides."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device(), dtype)

    return [[draw(N, width), draw(V, width), draw(V)] for width in (H, WIDE)]


def marks():
    generator = torch.Generator().manual_seed(1)
    weights = (torch.rand(N, generator=generator) - 0.2).clamp(0)
    labels = torch.randint(V, (N,), generator=generator)
    labels[3] = -100
    return {"labels": labels.to(device()), "token_weights": weights.to(device())}


class EachRow(KDLoss):
    """Whose rows have an upstream of their own."""

    def __init__(self):
        super().__init__(2.0, divergence="jsd", reduction="none")

    def forward(self, *sides, **call):
        values = super().forward(*sides, **call)
        return (values * torch.linspace(-1, 1, N).to(values)).sum()


def topk(teacher, **how):
    z = teacher[0] @ teacher[1].T + teacher[2]
    return kd.TopKLogits(*z.log_softmax(-1).topk(7), **how)


CASES = {
    **{name: (lambda name=name: KDLoss(2.0, divergence=name)) for name in EVERY},
    "a temperature a row": lambda: KDLoss(torch.linspace(0.5, 3, N), divergence="jsd", scale_tau=False),
    "each row": lambda: EachRow(),
    "sum": lambda: KDLoss(reduction="sum", weight=3.0),
    "dkd": lambda: DKDLoss(tau=2.0),
    "dkd a temperature a row": lambda: DKDLoss(tau=torch.linspace(0.5, 3, N).double()),
}
TOPK = {
    "bucket": (lambda: KDLoss(1.0, divergence="jsd"), {"vocab": V}),
    "renormalize": (lambda: KDLoss(2.0, divergence="reverse"), {"tail": "renormalize"}),
    "ignore": (lambda: KDLoss(1.0), {"tail": "ignore"}),
}


def slices_equal_to_one_process(out):
    """Stored slices, heads of which each rank has a slice, and either beside a side that is whole."""
    cases = {name: (make, None) for name, make in CASES.items()} | TOPK
    for dtype in (torch.float64, torch.float32):
        for name, (make, kept) in cases.items():
            student, teacher = sides(dtype)
            marked = marks()
            for how in ("stored", "heads", "whole teacher", "whole student"):
                if name in TOPK and how.startswith("whole"):
                    continue
                for more in (marked, {"labels": marked["labels"]} if "dkd" in name else {}):
                    # one class fewer leaves the last of four ranks none, and labels and ids of none
                    for vocab in (None, V - 1) if name in EVERY and dist.get_world_size() == 2 else (None,):
                        key = f"{name}, {how}, {str(dtype).removeprefix('torch.')}"
                        errors = one(make(), student, teacher, (how, kept), {**more, "vocab": vocab})
                        out[key] = [max(pair) for pair in zip(errors, out.get(key, errors), strict=True)]


def one(loss, student, teacher, how, call):
    (how, kept), call = how, dict(call)
    labels = (call.pop("labels"),) if isinstance(loss, DKDLoss) else ()
    whole = [t.clone().requires_grad_() for t in student]
    z, y = (h @ w.T + b for h, w, b in (whole, teacher))
    other = y if kept is None else topk(teacher, **kept)
    value = loss(z, other, *labels, **call)
    expected = torch.autograd.grad(1.7 * value, whole)
    own = [whole[0].detach().clone(), mine(whole[1].detach(), 0), mine(whole[2].detach(), 0)]
    if kept is None:
        other = kd.LinearLogits(teacher[0], mine(teacher[1], 0), mine(teacher[2], 0), group="world")
    if how == "whole teacher":
        other = y
    if how == "whole student":
        own = [t.detach().clone() for t in whole]
    own = [t.requires_grad_() for t in own]
    if how == "stored":
        # rows of logits do not add up over the ranks by themselves, as hidden states do
        pair = own[0] @ own[1].T + own[2], mine(y) if kept is None else other
        found = loss(*pair, *labels, **call, group="world")
        gradients = list(torch.autograd.grad(1.7 * found, own))
        dist.all_reduce(gradients[0])
    else:
        head = kd.LinearLogits(*own, group=None if how == "whole student" else "world")
        found = loss(head, other, *labels, **call, chunk=5)
        gradients = torch.autograd.grad(1.7 * found, own, retain_graph=True)
        again = torch.autograd.grad(1.7 * found, own)  # the ranks speak a second time
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    if how != "whole student":
        expected = [expected[0], *(mine(t, 0) for t in expected[1:])]
    scales = [t.abs().max() for t in expected]
    errors = [float((g - e).abs().max() / max(scales)) for g, e in zip(gradients, expected, strict=True)]
    return worst([differs(found.detach(), value.detach()), *errors])


def placed(mesh):
    """Placements of both sides, on a mesh of one dimension or two; None: a tensor."""
    if mesh.ndim == 2:
        return [((Shard(0), Shard(1)), (Replicate(), Shard(1))), ((Shard(1), Shard(0)), None)]
    one = [Replicate(), Shard(0), Shard(1), Shard(-1)]
    return [((s,), (t,)) for s in one for t in one] + [(None, (t,)) for t in one] + [((s,), None) for s in one]


def dtensors_equal_to_one_process(out):
    world = dist.get_world_size()
    meshes = [init_device_mesh(device().type, (world,))]
    if world == 4:
        meshes.append(init_device_mesh(device().type, (2, 2)))
    generator = torch.Generator().manual_seed(2)
    z, y = (torch.randn(N, V, generator=generator, dtype=torch.float64).to(device()) for _ in range(2))
    mixed = kd.mixup(torch.zeros(N, 1).to(device()), marks()["labels"], generator=torch.Generator().manual_seed(0))
    losses = {
        "kd": (KDLoss(2.0, divergence="jsd"), ()),
        "kd sum": (KDLoss(2.0, reduction="sum"), ()),
        "dkd": (DKDLoss(tau=2.0), (marks()["labels"],)),
        "stkd": (STKDLoss(mix=(0.7, 0.0, 0.3)), (mixed,)),
    }
    for mesh in meshes:
        for places in placed(mesh):
            for name, (loss, more) in losses.items():
                if name == "stkd" and any(Shard(1) in (p or ()) or Shard(-1) in (p or ()) for p in places):
                    continue
                every = [{}, {"token_weights": marks()["token_weights"]}, {"normalizer": 5}]
                for k, call in enumerate(
                    [*every[: 2 if name == "kd sum" else 3], *([marks()] if name == "kd" else [])]
                ):
                    whole = z.clone().requires_grad_()
                    value, parts = loss(whole, y, *more, **call, return_parts=True)
                    (expected,) = torch.autograd.grad(1.7 * value, whole)
                    own = z.clone().requires_grad_() if places[0] is None else distribute_tensor(z, mesh, places[0])
                    own = own.detach().requires_grad_()
                    other = y if places[1] is None else distribute_tensor(y, mesh, places[1])
                    if k == 1:  # marks may be laid, too
                        call = {n: distribute_tensor(t, mesh, [Replicate()] * mesh.ndim) for n, t in call.items()}
                    found, said = loss(own, other, *more, **call, return_parts=True)
                    assert isinstance(found, torch.Tensor) and not isinstance(found, DTensor)
                    (gradient,) = torch.autograd.grad(1.7 * found, own)
                    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    pairs = [(found.detach(), value.detach()), (gradient, expected)]
                    pairs += [(said[part].detach(), parts[part].detach()) for part in parts]
                    out[f"{name}, {places}, {k}"] = worst([differs(a, b) for a, b in pairs])
    # of a stored teacher, whose rows are cut as the student's are
    kept = kd.TopKLogits(*y.log_softmax(-1).topk(5))
    for place in (Shard(0), Shard(1), Replicate()):
        own = distribute_tensor(z, meshes[0], [place])
        out[f"topk, {place}"] = worst([differs(KDLoss(1.0)(own, kept), KDLoss(1.0)(z, kept))])


class Student(nn.Module):
    """Whose loss is computed in its forward pass, where a wrapper has made its parameters whole."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, H), nn.Linear(H, V, bias=False)
        self.double().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def forward(self, x, teacher):
        return KDLoss(1.0, divergence="jsd")(kd.LinearLogits(self.body(x).tanh(), self.head.weight), teacher, chunk=3)


def heads_inside_wrappers(out):
    """DDP and FSDP2: the loss of a rank's rows in the module's forward; and a head of FSDP2's outside of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * world, 5, generator=generator, dtype=torch.float64).to(device())
    y = torch.randn(4 * world, V, generator=generator, dtype=torch.float64).to(device())
    alone = Student().to(device())
    value = alone(x, y)
    value.backward()
    expected = [p.grad for p in alone.parameters()]
    mesh = init_device_mesh(device().type, (world,))

    def of_root(net):  # body and head are the root's own: gathered before its forward
        return fully_shard(net, mesh=mesh)

    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", of_root)):
        net = wrap(Student().to(device()))
        for _ in range(2):
            net.zero_grad()
            net(x.split(4)[rank], y.split(4)[rank]).backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in net.parameters()]
        out[f"inside {name}"] = worst([differs(g, e) for g, e in zip(grads, expected, strict=True)])
    head = nn.Parameter(distribute_tensor(alone.head.weight.detach(), mesh, [Shard(0)]))
    h = alone.body(x).tanh().detach()
    out["a sharded weight"] = said_by_all(lambda: kd.LinearLogits(h, head))
    whole = head.full_tensor(grad_placements=[Partial()])
    loss = KDLoss(1.0, divergence="jsd")(kd.LinearLogits(h.split(4)[rank], whole), y.split(4)[rank])
    loss.backward()
    out["outside fsdp2"] = worst([differs(head.grad.full_tensor() / world, expected[-1])])


def refusals(out):
    world, odd = dist.get_world_size(), dist.get_rank() == 1
    student, teacher = sides()
    z, y = (mine(h @ w.T) for h, w, _ in (student, teacher))
    head = kd.LinearLogits(student[0], mine(student[1], 0), group="world")
    mesh, vocabulary = init_device_mesh(device().type, (world,)), [Shard(1)]
    whole = (student[0] @ student[1].T).detach()
    laid = distribute_tensor(whole, mesh, vocabulary)
    sums = DTensor.from_local(whole, mesh, [Partial()])
    wrong = {
        "rows": lambda: KDLoss()(z[odd:], y[odd:], group="world"),
        "slices of other classes": lambda: KDLoss()(z, torch.cat([y, y[:, :1]], 1), group="world"),
        "a padded teacher": lambda: KDLoss()(head, whole[:, : V - 1]),
        "a vocabulary that is too large": lambda: KDLoss()(z, y, vocab=V + 1, group="world"),
        "a rank without classes": lambda: KDLoss()(z, y, vocab=10, group="world"),
        "a mask on one rank": lambda: KDLoss()(z, y, mask=z[:, 0] > 0 if odd else None, group="world"),
        "a mask of another length": lambda: KDLoss()(z, y, mask=z[odd:, 0] > 0, group="world"),
        "another divergence": lambda: KDLoss(divergence="jsd" if odd else "forward")(z, y, group="world"),
        "the textbook": lambda: KDLoss(backend="reference")(z, y, group="world"),
        "vocab of a slice": lambda: kd.LinearLogits(*student, vocab=4, group="world"),
        "a loss of whole rows": lambda: kd.losses.DISTLoss(gamma=0)(head, teacher[0] @ teacher[1].T),
        "a loss of whole rows, mesh": lambda: kd.losses.CMKDLoss()(laid, laid),
        "stkd, cut": lambda: STKDLoss()(laid, laid, kd.mixup(torch.zeros(N, 1), marks()["labels"])),
        "sums to be made": lambda: KDLoss()(sums, sums),
        "a head beside a mesh": lambda: KDLoss()(laid, head),
    }
    for name, call in wrong.items():
        out[f"refused, {name}"] = said_by_all(call)


def traffic(out):
    """What is sent does not depend on how many classes there are, nor on how many there are in a chunk."""
    for classes in (64, 512):
        h, w = torch.randn(32, H, requires_grad=True), torch.randn(classes, H, requires_grad=True)
        head, teacher = kd.LinearLogits(h, w, group="world"), torch.randn(32, classes * dist.get_world_size())
        pair = head, teacher
        out[f"bytes, {classes}"] = bytes_sent(lambda pair=pair: KDLoss()(*pair, chunk=8).backward())


CHECKS = (slices_equal_to_one_process, dtensors_equal_to_one_process, heads_inside_wrappers, refusals, traffic)

if __name__ == "__main__":
    named = {check.__name__: check for check in CHECKS}
    run(sys.argv[1], *([named[wanted] for wanted in sys.argv[2:]] or CHECKS))
