# SPDX-License-Identifier: Apache-2.0
"""The contract of the relations can fail: each of these breaks the torch backend once, and a check must notice it."""

import pytest
import torch
from broken import rejects, without_last

from kdkernels import native
from kdkernels.registry import OPS
from kdkernels.relation import native_impl, pairs, torch_impl

FORWARD, BACKWARD, DISTANCES = torch_impl.forward, torch_impl.backward, torch_impl.distances
TRIPLETS, PAIRS = torch_impl._triplets, torch_impl._distances
COMPILED_FORWARD, COMPILED_BACKWARD, ROWS = native_impl.forward, native_impl.backward, native_impl._rows
D, A, P = "rkd_distance", "rkd_angle", "pkt"
lacking = native.lack("cpu", OPS[P].native)


def value(change):
    return {"forward": lambda *a: (change(FORWARD(*a)[0]), *FORWARD(*a)[1:])}


def gradient(change):
    return {"backward": lambda *a: change(BACKWARD(*a))}


def weights(change):
    return {"backward": lambda g, x, mask, W, kind: BACKWARD(g, x, mask, change(W), kind)}


def of_distances(change):
    return {"distances": lambda *a: change(DISTANCES(*a))}


def in_float32(x, mask, count):
    """Rows that are not centred, products rounded to float32."""
    z = pairs.masked(x.float(), mask)
    norms = z.square().sum(-1)
    square = (norms[..., None] + norms[..., None, :] - 2 * z @ z.mT).clamp(min=0).double()
    square.diagonal(dim1=-2, dim2=-1).zero_()
    return DISTANCES(x, mask, count)._replace(square=square * DISTANCES(x, mask, count).scale.square()[:, None, None])


def quadratic(s, t, need):
    """The square of a difference above 1 too."""
    e = s.square.sqrt() - t.square.sqrt()
    return e.square().sum((-2, -1)) / 2, PAIRS(s, t, need)[1]


def no_vertex_term(V, g, cos, r, vertices):
    r = r[vertices]
    V.sub_(g.mul(r[:, :, None]).mul_(r[:, None]).sum(0), alpha=2)


def half_the_triplets(s, t, need):
    kept = torch.tril(torch.ones_like(s[0]))
    return TRIPLETS(s * kept, t * kept, need)


def constant_mean(s, t, need):
    """No gradient through mu."""
    total, _ = PAIRS(s, t, need)
    u = [side.square.sqrt() for side in (s, t)]
    g = (u[0] - u[1]).clamp(-1, 1)
    sides = [k for k in (0, 1) if need >> k & 1]
    return total, [2 * (g, -g)[k] * torch_impl.inverse((s, t)[k].square) for k in sides]


SABOTAGE = {
    "groups in another order": (A, "value", value(lambda v: v.flip(0))),
    "masked rows counted": (A, "value", {"rows_kept": lambda x, mask: pairs.rows_kept(x, None)}),
    "a last column not read": (D, "value", {"distances": lambda x, m, c: DISTANCES(x[..., :-1], m, c)}),
    "a last sample not seen": (A, "value", of_distances(lambda d: d._replace(square=without_last(-1)(d.square)))),
    "distances of float32": (A, "value", {"distances": in_float32}),
    "distances not relative": (
        D, "value", of_distances(lambda d: d._replace(square=d.square / d.scale.square()[:, None, None]))
    ),
    "squares for distances": (D, "value", of_distances(lambda d: d._replace(square=d.square.square()))),
    "angles of half the triplets": (A, "value", {"_triplets": half_the_triplets}),
    "another eps": (P, "value", {"EPS": 1e-3}),
    "squares all the way": (D, "value", {"_distances": quadratic}),
    "transposed groups of weights": (P, "gradient x", weights(lambda W: W.flip(0))),
    "weights without their diagonal": (D, "gradient x", weights(lambda W: W - W * torch.eye(W.shape[-1]))),
    "no gradient through the mean": (D, "gradient x", {"_distances": constant_mean}),
    "no gradient through the arms of an angle": (A, "gradient x", {"_add_weights": no_vertex_term}),
    "masked rows get a gradient": (D, "masks", {"backward": lambda g, x, m, W, k: BACKWARD(g, x, m, W, k) + 1e-9}),
    "NaN under the mask": (P, "masks", {"forward": lambda x, y, m, *r: FORWARD(x + 0 * x.sum(), y, m, *r)}),
}  # fmt: skip


# of the compiled calls, at their boundary
def compiled(change):
    return {"forward": lambda *a: change(COMPILED_FORWARD(*a))}


def slopes(change):
    return compiled(lambda out: (out[0], *map(change, out[1:])))


def scaled(change):
    return {"backward": lambda g, *rest: COMPILED_BACKWARD(change(g), *rest)}


def read(change):
    return {"_rows": lambda x: change(ROWS(x))}


COMPILED = {
    "features rounded to bfloat16": (D, "value", read(lambda x: x.bfloat16().float())),
    "a last sample not seen": (D, "value", read(without_last(-2))),
    "gradient without its last row": (P, "gradient x", slopes(lambda w: without_last(-2)(w) if w.dim() == 3 else w)),
    "upstream gradient of the first group alone": (P, "gradient x", scaled(lambda g: g[:1].expand(g.shape))),
    "a mask that is not passed": (P, "masks", {"forward": lambda x, y, m, *r: COMPILED_FORWARD(x, y, None, *r)}),
}  # fmt: skip


@pytest.mark.native
@pytest.mark.skipif(lacking is not None, reason=lacking or "loaded")
@pytest.mark.parametrize("name", COMPILED)
def test_the_contract_rejects_a_compiled_call_with(name, monkeypatch):
    assert rejects(monkeypatch, *COMPILED[name], native_impl, backend="cpp")


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_contract_rejects(name, monkeypatch):
    assert rejects(monkeypatch, *SABOTAGE[name], torch_impl)
