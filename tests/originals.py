# SPDX-License-Identifier: Apache-2.0
"""What RepDistiller, mdistiller, MMRazor and torchdistill compute, in loops over their formulas with their constants.

Oracles of the compat tests: every formula takes the student first and gives one number a pair of tensors, or says what
else. Inputs come first."""

import inspect
import itertools
import math

import torch
import torch.nn.functional as F


def untyped(function):
    """The signature as a text without annotations, which the originals lack."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def logits(dtype):
    return torch.randn(5, 7, dtype=dtype), 3 * torch.randn(5, 7, dtype=dtype)


def features(dtype):
    """The teacher's are the student's and more."""
    student = torch.randn(6, 4, dtype=dtype)
    return student, torch.cat([student, torch.randn(6, 5, dtype=dtype)], 1)


def every(side):
    """The levels of a side that may be one tensor."""
    return side if isinstance(side, list) else [side]


def kl(student, teacher, tau):
    """tau^2 sum_c p_t (log p_t - log p_s), one number a row [B]."""
    log_s, log_t = ((z / tau) - (z / tau).logsumexp(-1, keepdim=True) for z in (student, teacher))
    return tau**2 * (log_t.exp() * (log_t - log_s)).sum(-1)


def dkd(student, teacher, labels, alpha, beta, tau):
    """alpha KL of (label, all others) + beta KL among the others, mean over the rows."""
    total = 0
    for s, t, y in zip(student / tau, teacher / tau, labels.tolist(), strict=True):
        others = [c for c in range(len(s)) if c != y]
        # logarithms of the probabilities of the label and of all others
        log_q, log_p = ((z[y] - z.logsumexp(0), z[others].logsumexp(0) - z.logsumexp(0)) for z in (s, t))
        target = sum(a.exp() * (a - b) for a, b in zip(log_p, log_q, strict=True))
        total = total + alpha * tau**2 * target + beta * tau**2 * kl(s[others], t[others], 1)
    return total / len(student)


def to_lower(student, teacher):
    """Of two heights the higher map, whatever its width, pooled to height x height of the lower."""
    side = min(student.shape[2], teacher.shape[2])
    return [F.adaptive_avg_pool2d(f, (side, side)) if f.shape[2] > side else f for f in (student, teacher)]


def attention(student, teacher, p):
    maps = []
    for f in to_lower(student, teacher):
        energy = sum(f[:, c] ** p for c in range(f.shape[1])) / f.shape[1]
        maps.append(torch.stack([a / a.norm() for a in energy.flatten(1)]))
    return (maps[0] - maps[1]).square().mean()


def nst(student, teacher):
    """Squared MMD between the unit channels of each sample, kernel (a.b)^2, biased; mean over the samples."""
    total = 0
    for s, t in zip(*(f.flatten(2) for f in to_lower(student, teacher)), strict=True):
        s, t = ([c / max(c.norm(), 1e-12) for c in side] for side in (s, t))
        mean = {
            key: sum((a @ b) ** 2 for a, b in itertools.product(*pair)) / math.prod(map(len, pair))
            for key, pair in {"ss": (s, s), "tt": (t, t), "st": (s, t)}.items()
        }
        total = total + mean["ss"] + mean["tt"] - 2 * mean["st"]
    return total / len(student)


def similarity(student, teacher):
    n = len(student)
    sides = []
    for f in (student, teacher):
        gram = torch.stack([torch.stack([(a * b).sum() for b in f]) for a in f])
        sides.append(torch.stack([row / max(row.norm(), 1e-12) for row in gram]))
    return (sides[0] - sides[1]).square().sum() / n**2


def flow(student, teacher):
    """One number a pair of consecutive layers, from lists of maps."""
    values = []
    for i in range(len(student) - 1):
        sides = []
        for layers in (student, teacher):
            below, above = to_lower(layers[i], layers[i + 1])
            sides.append(torch.einsum("bihw,bjhw->bij", below, above) / below[0, 0].numel())
        values.append((sides[0] - sides[1]).square().mean())
    return values


def distances(features):
    """Square roots of the squared distances, each at least 1e-12, the diagonal 0."""
    n = len(features)
    found = features.new_zeros(n, n)
    for i, j in itertools.product(range(n), range(n)):
        if i != j:
            found[i, j] = (features[i] - features[j]).square().sum().clamp(min=1e-12).sqrt()
    return found


def relational_distance(student, teacher):
    sides = [distances(f.flatten(1)) for f in (student, teacher)]
    s, t = (d / (d.sum() / (d > 0).sum()) for d in sides)
    return F.smooth_l1_loss(s, t)


def relational_angle(student, teacher):
    """Smooth L1 between cosines at every corner i of triangles (j, i, k), over all n^3 triples."""
    sides = []
    for f in (student.flatten(1), teacher.flatten(1)):
        cosines = []
        for i in range(len(f)):
            units = torch.stack([F.normalize(f[j] - f[i], dim=0) for j in range(len(f))])
            cosines.append(units @ units.T)
        sides.append(torch.stack(cosines))
    return F.smooth_l1_loss(*sides)


def relational(student, teacher, distance, angle):
    return distance * relational_distance(student, teacher) + angle * relational_angle(student, teacher)


def probabilistic(student, teacher, eps=1e-7):
    """Mean over all n^2 pairs of t log((t + eps) / (s + eps)), rows of (1 + cosine) / 2 as probabilities."""
    sides = []
    for f in (student, teacher):
        units = f / (f.norm(dim=1, keepdim=True) + eps)
        shifted = (units @ units.T + 1) / 2
        sides.append(shifted / shifted.sum(1, keepdim=True))
    s, t = sides
    return (t * ((t + eps) / (s + eps)).log()).mean()


def congruence(student, teacher):
    """Mean over neighbours i, i + 1 in the batch of sum_c |d_ic| |d_(i+1)c|, d = student - teacher."""
    d = (student - teacher).abs()
    return sum((d[i] * d[i + 1]).sum() for i in range(len(d) - 1)) / (len(d) - 1)


def inter_channel(student, teacher):
    """Sum of squares between the row-normalised C x C Gram matrices of each sample, over C B."""
    total = 0
    for pair in zip(student.flatten(2), teacher.flatten(2), strict=True):
        s, t = ([row / max(row.norm(), 1e-12) for row in f @ f.T] for f in pair)
        total = total + sum((a - b).square().sum() for a, b in zip(s, t, strict=True))
    return total / (student.shape[1] * len(student))


def dist(student, teacher, inter, intra, tau):
    """tau^2 times 1 - the mean Pearson correlation of tempered softmaxes, of rows and of columns."""

    def apart(s, t):
        total = 0
        for a, b in zip(s, t, strict=True):
            a, b = a - a.mean(), b - b.mean()
            total = total + a @ b / (a.norm() * b.norm() + 1e-8)
        return 1 - total / len(s)

    s, t = ((z / tau).softmax(1) for z in (student, teacher))
    return tau**2 * (inter * apart(s, t) + intra * apart(s.T, t.T))


def second(value, features):
    """The gradient of the sum of the gradient's cubes."""
    (first,) = torch.autograd.grad(value, features, create_graph=True)
    return torch.autograd.grad(first.pow(3).sum(), features)[0]


def unit_rows(features):
    return torch.stack([f / f.norm() for f in features.flatten(1)])
