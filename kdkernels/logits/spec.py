# SPDX-License-Identifier: Apache-2.0
"""What the contract and the benchmark need to know of the logits family: cases in every data regime, caps, bytes.

A divergence is judged in units of tau^2 sum_c |p_c - q_c| (|log q_c| + |log p_c|): what is off for all classes alike is
no excuse, nor is a student near its teacher. A cross-entropy in units of itself; a gradient in units of the
probabilities that it is a difference of. Half inputs are computed in float32.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..testing import REGIMES, Caps, Case, generator_beside, pair, seeded
from ..testing.shared import DOUBLE, EVERY_DTYPE, HALF, ONE_DTYPE, SINGLE, cases_of, grid, instead
from . import op as ops
from . import reference, torch_impl
from .call import Measure, measure_of

TAUS = (1.0, 4.0, 2.0, 3.7, 0.5)
REDUCTIONS = ("none", "mean", "sum")
MIXES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.25, 0.25))
# one class, two, around the vectors and blocks of every backend, odd and prime
SIZES = (1, 2, 3, 7, 8, 13, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129)
MORE_SIZES = (255, 257, 511, 513, 1000, 1023, 1025, 2049, 5003)


def caps(dtype: torch.dtype) -> Caps:
    return Caps(1e-13, 1e-12) if dtype == DOUBLE else Caps(1e-6, 2e-6)


def small_chunks(backend: str):
    """Several chunks of rows in PyTorch and several blocks of a row in Triton, on rows that a test can afford."""
    places = [(torch_impl, "CPU_CHUNK", 128), (torch_impl, "CUDA_CHUNK", 128)]
    if backend == "triton":
        from . import triton_impl  # here, as importing it needs triton

        places.append((triton_impl, "ROWS", ((1 << 31, triton_impl.Config(16, 1)),)))
        places.append((triton_impl, "KL", ((1 << 31, triton_impl.Pieces(2, 16, 0, 1)),)))
    return instead(*places)


def _reduced(rows, reduction):
    """The size of a reduced loss from that of its rows, the largest for a vector of them."""
    rows = torch.where(rows.isfinite(), rows, 0.0)
    return {"none": rows.max(), "mean": rows.mean(), "sum": rows.sum()}[reduction]


def _share(reduction, rows):
    return 1 / rows if reduction == "mean" else 1.0


# ---- distillation_kl


def _kl(op, backend, quick, generator):
    for count, regime, tau, reduction in grid(quick, 3, REGIMES, TAUS, REDUCTIONS):
        shape = ((9, 37), (2, 3, 40), (5, 100))[count % 3]
        dtypes = EVERY_DTYPE if count % 2 else (SINGLE, HALF[count // 2 % 2])
        yield _kl_case(*pair(regime, shape, shape, generator), tau, reduction, regime, dtypes=dtypes)
    for C in SIZES if quick else (*SIZES, *MORE_SIZES):
        s, t = pair("peaky", (3, C), (3, C), generator)
        yield _kl_case(s, t, 2.0, "none", "size", dtypes=(SINGLE, HALF[C % 2]))
    s, t = pair("peaky", (4, 100), (4, 100), generator)
    for tau in (1.0, 4.0):
        yield _kl_case(1e4 * s, 1e4 * t, tau, "none", "huge", dtypes=(SINGLE, torch.bfloat16))
        yield _kl_case(s + 1e4, t - 3e4, tau, "none", "far", dtypes=(SINGLE,))
    for regime, tau in (("bland", 100.0), ("peaky", 100.0), ("near", 100.0), ("peaky", 1e4)):
        for C in (2, 37, 600):
            yield _kl_case(
                *pair(regime, (5, C), (5, C), generator), tau, "none", f"hot {regime}", dtypes=(SINGLE, *HALF)
            )
    yield from _closed(generator)
    if backend != "reference":
        for regime in ("edge", "peaky", "near"):
            s, t = pair(regime, (11, 37), (11, 37), generator)
            context = partial(small_chunks, backend)
            yield _kl_case(s, t, 3.0, "none", regime + " chunks", dtypes=(SINGLE, HALF[0]), context=context)
    yield _kl_case(torch.randn(33, generator=generator).double(), torch.zeros(33).double(), 4.0, "mean", "one row")
    for tau, reduction in ((4.0, "mean"), (1.5, "none")):
        yield _kl_case(*pair("peaky", (7, 33), (7, 33), generator), tau, reduction, "probe", probe=True)


def _closed(generator):
    """Classes at -inf on both sides, on one, and rows that are poisoned between healthy ones."""
    s, t = (torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    out = torch.rand(7, 12, generator=generator) < 0.3
    out[:, 0] = False
    both = [x.masked_fill(out, -math.inf) for x in (s, t)]
    yield _kl_case(*both, 2.0, "none", "closed", dtypes=ONE_DTYPE)
    yield _kl_case(s, both[1], 2.0, "none", "closed teacher", dtypes=(SINGLE, *HALF))
    one = s.clone()
    one[2, 5] = -math.inf
    yield _kl_case(one, t, 2.0, "none", "closed student", dtypes=(SINGLE, *HALF), constants=("teacher",))
    bad = s.clone()
    bad[1, 3], bad[3, 11], bad[5] = math.nan, math.inf, -math.inf
    yield _kl_case(bad, t, 2.0, "none", "poisoned student", dtypes=(SINGLE, *HALF))
    yield _kl_case(t, bad, 2.0, "none", "poisoned teacher", dtypes=(SINGLE, *HALF))


def _kl_case(student, teacher, tau, reduction, label, **fields):
    def call(t, backend):
        return ops.distillation_kl(t["student"], t["teacher"], tau=tau, reduction=reduction, backend=backend)

    def sizes(t):
        log_p, log_q = (reference.log_p(t[side].detach(), tau) for side in ("student", "teacher"))
        q = log_q.exp()
        return log_p, q, torch.where(q == 0, 0.0, log_q.abs() + log_p.abs())

    def scale(t):
        log_p, q, logs = sizes(t)
        return _reduced(tau**2 * ((log_p.exp() - q).abs() * logs).sum(-1), reduction).clamp(min=1e-30)

    def terms(t):
        log_p, q, logs = sizes(t)
        of_teacher = q * (logs + (q * logs).sum(-1, keepdim=True))
        of_student = log_p.exp() + q
        parts = (t["student"] * of_student).sum(-1) + (t["teacher"] * of_teacher).sum(-1)
        return tau * (parts if reduction == "none" else parts.sum() * _share(reduction, parts.numel()))

    inputs = {"student": student, "teacher": teacher}
    name = f"tau {tau:g} {reduction} {label} {'x'.join(map(str, student.shape))}"
    return Case(name, inputs, call, caps, scale, terms, alike=0, **fields)


# ---- generalized_jsd, and the other divergences of its kernels


FORMS = ("jsd", "skew", "forward", "reverse", "skew_reverse", "tvd")


def _divergences(op, backend, quick, generator):
    rows = torch.linspace(0.5, 6, 9, dtype=torch.float64)
    for count, regime, name in grid(quick, 2, REGIMES, FORMS, steps=(1, 1)):
        shape, reduction = ((9, 37), (3, 3, 40), (9, 100))[count % 3], REDUCTIONS[count // 3 % 3]
        how = measure_of(name, TAUS[count % len(TAUS)], beta=(0.5, 0.1, 0.9)[count % 3])
        taus = rows if count % 4 == 0 else None
        dtypes = EVERY_DTYPE if count % 5 == 1 else (SINGLE, HALF[count // 2 % 2])
        sides = pair(regime, shape, shape, generator)
        if (name, regime) != ("tvd", "near"):  # its gradient is a sign, which float32 does not know there (MATH.md)
            yield _divergence_case(*sides, how, reduction, regime, taus, dtypes=dtypes)
    for C in SIZES if quick else (*SIZES, *MORE_SIZES):
        how = measure_of(FORMS[C % 6], 2.0, beta=0.3)
        s, t = pair("peaky", (3, C), (3, C), generator)
        yield _divergence_case(s, t, how, "none", "size", dtypes=(SINGLE, HALF[C % 2]))
    s, t = pair("peaky", (4, 100), (4, 100), generator)
    for name in FORMS[:4]:
        how = measure_of(name, 4.0)
        yield _divergence_case(1e4 * s, 1e4 * t, how, "none", "huge", dtypes=(SINGLE, torch.bfloat16))
        yield _divergence_case(s + 1e4, t - 3e4, how, "none", "far", dtypes=(SINGLE,))
    for beta in (1e-6, 0.999):
        for regime in ("peaky", "near"):
            how = measure_of("jsd", 1.0, beta=beta)
            yield _divergence_case(*pair(regime, (5, 37), (5, 37), generator), how, "none", "end", dtypes=ONE_DTYPE)
    yield from _closed_divergences(generator)
    if backend != "reference":
        for name in FORMS:
            s, t = pair("peaky", (11, 37), (11, 37), generator)
            fields = {"context": partial(small_chunks, backend), "dtypes": (SINGLE, HALF[0])}
            yield _divergence_case(s, t, measure_of(name, 3.0), "none", "chunks", **fields)
    for name, reduction in (("jsd", "mean"), ("skew_reverse", "none"), ("tvd", "sum")):
        how = measure_of(name, 1.5, beta=0.3)
        yield _divergence_case(*pair("peaky", (7, 33), (7, 33), generator), how, reduction, "probe", probe=True)


def _closed_divergences(generator):
    """Classes at -inf on either side or both, and rows that are poisoned between healthy ones."""
    for name in ("jsd", "skew", "skew_reverse", "tvd"):
        s, t = (torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(2))
        for side in (s, t):
            side[:, 1:].masked_fill_(torch.rand(7, 11, generator=generator) < 0.4, -math.inf)
        yield _divergence_case(s, t, measure_of(name, 2.0, beta=0.3), "none", "closed", dtypes=ONE_DTYPE)
        s[1, 3], s[3, 11], t[5] = math.nan, math.inf, -math.inf
        for sides in ((s, t), (t, s)):
            yield _divergence_case(*sides, measure_of(name, 2.0), "none", "poisoned", dtypes=(SINGLE, *HALF))


def _divergence_case(student, teacher, how: Measure, reduction, label, taus=None, **fields):
    share = _share(reduction, student[..., 0].numel())

    def call(t, backend):
        sides, rows = (t["student"], t["teacher"]), t.get("taus")
        if how[1:] == (how.b, how.b, 1 - how.b):
            tau = how.tau if rows is None else rows.reshape(student.shape[:-1])
            return ops.generalized_jsd(*sides, tau=tau, beta=how.b, reduction=reduction, backend=backend)
        return ops.any_divergence(*sides, how, rows, reduction, backend)

    def tau_of(t):
        return t["taus"].reshape(*student.shape[:-1], 1) if taus is not None else how.tau

    def sizes(t):
        """tau, p, q, and bounds of d term / dp and d term / dq."""
        tau = tau_of(t)
        log_p, log_q = (reference.log_p(t[side].detach(), tau) for side in ("student", "teacher"))
        p, q = log_p.exp(), log_q.exp()
        m = (how.b * q + (1 - how.b) * p).clamp(min=1e-300)
        log_m = log_p if how.b == 0 else log_q if how.b == 1 else m.log()
        both = (how.u * q + how.v * p) / m
        over_p, over_q = ((log_m - log).abs().nan_to_num(0.0, 0.0, 0.0) for log in (log_p, log_q))
        logs = log_p.abs().clamp(max=1e3) + log_q.abs().clamp(max=1e3)
        extra = 0.5 if how.variation else 0.0
        return tau, p, q, logs, how.v * over_p + (1 - how.b) * both + extra, how.u * over_q + how.b * both + extra

    def scale(t):
        tau, p, q, logs, *_ = sizes(t)
        weight = 0.5 if how.variation else how.u * (1 - how.b) + how.v * how.b
        rows = (torch.as_tensor(tau) ** 2 * weight * (p - q).abs() * logs).sum(-1)
        return _reduced(rows, reduction).clamp(min=1e-30)

    def terms(t):
        tau, p, q, _, of_p, of_q = sizes(t)
        size_p, size_q = (x * (of + (x * of).sum(-1, keepdim=True)) for x, of in ((p, of_p), (q, of_q)))
        rows = (tau * (t["student"] * size_p + t["teacher"] * size_q)).sum(-1)
        return rows if reduction == "none" else rows.sum() * share

    inputs = {"student": student, "teacher": teacher} | ({} if taus is None else {"taus": taus})
    name = f"{'/'.join(f'{x:g}' for x in how)} {reduction} {label} {'x'.join(map(str, student.shape))}"
    # one rounding of log p moves the gradient beside a teacher this near by 1e-12
    limits = (lambda dtype: Caps(1e-12, 1e-11) if dtype == DOUBLE else caps(dtype)) if label == "near" else caps
    return Case(name, inputs, call, limits, scale, terms, constants=("taus",), alike=0, **fields)


# ---- mixed_distillation


def _mixed(op, backend, quick, generator):
    for count, regime, mix, alpha in grid(quick, 3, REGIMES, MIXES, (0.9, 0.3, 1.0, 0.0)):
        dtypes = EVERY_DTYPE if count % 2 else (SINGLE, HALF[count // 2 % 2])
        how = (TAUS[count % len(TAUS)], alpha, mix, REDUCTIONS[count % 3], ("rows", "one", "number")[count % 3])
        yield _mixed_case(regime, (9, (37, 40, 100)[count % 3]), *how, regime, generator, dtypes=dtypes)
    for C in SIZES if quick else (*SIZES, *MORE_SIZES):
        for mix in (MIXES[0], MIXES[3]):
            how = (4.0, 0.6, mix, "none", "rows")
            yield _mixed_case("peaky", (3, C), *how, "size", generator, dtypes=(SINGLE, HALF[C % 2]))
    for tau in (100.0, 1e4):
        yield _mixed_case(
            "peaky", (5, 37), tau, 1.0, MIXES[0], "none", "rows", "hot", generator, dtypes=(SINGLE, HALF[0])
        )
    for lam in (0.0, 1.0):
        yield _mixed_case("peaky", (5, 33), 2.0, 0.5, MIXES[3], "none", lam, f"lam {lam:g}", generator)
    for bad in (math.nan, math.inf):
        yield _mixed_case("bland", (5, 12), 2.0, 0.5, MIXES[0], "none", "rows", f"poisoned {bad}", generator, bad)
    if backend != "reference":
        for regime, mix in (("edge", MIXES[3]), ("peaky", MIXES[0]), ("peaky", MIXES[1])):
            fields = {"context": partial(small_chunks, backend), "dtypes": (SINGLE, HALF[0])}
            yield _mixed_case(regime, (11, 37), 3.0, 0.7, mix, "none", "rows", "chunks", generator, **fields)
    for mix, reduction in ((MIXES[0], "mean"), (MIXES[3], "none")):
        yield _mixed_case("peaky", (7, 33), 4.0, 0.7, mix, reduction, "rows", "probe", generator, probe=True)


def _mixed_case(regime, shape, tau, alpha, mix, reduction, lam, label, generator, bad=None, **fields):
    R, C = shape
    student, teacher = pair(regime, shape, shape, generator)
    if bad is not None:
        student[1, 3] = bad
    clean = pair(regime, shape, shape, generator)[1]
    a, b = (torch.randint(C, (R,), generator=generator) for _ in range(2))
    order = torch.randperm(R, generator=generator)
    share = torch.rand(R, generator=generator, dtype=torch.float64)
    inputs = {"student": student, "teacher": teacher, "clean": clean, "a": a, "b": b, "order": order}
    if lam in ("rows", "one"):
        inputs["lam"] = share if lam == "rows" else share[0]
    number = 0.3 if lam == "number" else lam

    def call(t, backend):
        cleaned = {"teacher_clean": t["clean"], "permutation": t["order"]} if mix[1] else {}
        return ops.mixed_distillation(
            t["student"], t["teacher"], t["a"], t["b"], t.get("lam", number), tau=tau, alpha=alpha, mix=mix,
            reduction=reduction, backend=backend, **cleaned,
        )  # fmt: skip

    def parts(t):
        weight = torch.as_tensor(t.get("lam", number), dtype=torch.float64).expand(len(t["a"]))
        hard = reference.mixed_label(t["a"], t["b"], weight, C)
        q = reference.target(t["teacher"], t["clean"], t["order"], hard, weight, tau, mix)
        return hard, q, *(reference.log_p(t["student"].detach(), temperature) for temperature in (1, tau))

    def scale(t):
        hard, q, log_1, log_p = parts(t)
        log_q = torch.where(q == 0, 0.0, q.log())
        w = torch.where(q == 0, 0.0, log_p - log_q)  # a mixture is rounded as a whole
        soft = torch.where(q == 0, 0.0, (log_p.exp() - q).abs() * (log_q.abs() + log_p.abs())) + q * w.abs()
        rows = (1 - alpha) * (hard * log_1.abs()).sum(-1) + alpha * tau**2 * soft.sum(-1)
        return _reduced(rows, reduction).clamp(min=1e-30)

    def terms(t):
        hard, q, log_1, log_p = parts(t)
        size = (1 - alpha) * (log_1.exp() + hard) + alpha * tau * (log_p.exp() + q)
        rows = (t["student"] * size).sum(-1)
        return rows if reduction == "none" else rows.sum() * _share(reduction, R)

    fields.setdefault("constants", ("teacher", "clean", "lam"))
    name = f"tau {tau:g} alpha {alpha:g} mix {mix} {reduction} lam {lam} {label} {R}x{C}"
    return Case(name, inputs, call, caps, scale, terms, alike=0, **fields)


# ---- mixup


def _mixup(op, backend, quick, generator):
    for regime in REGIMES:
        for shape in ((9, 37), (4, 3, 5, 5), (7, 1), (13,)):
            for lam in ("rows", "one", "number"):
                yield _mixup_case(regime, shape, lam, regime, generator, dtypes=ONE_DTYPE)
    for size in SIZES if quick else (*SIZES, *MORE_SIZES):
        yield _mixup_case("bland", (3, size), "rows", "size", generator, dtypes=(SINGLE, HALF[size % 2]))
        yield _mixup_case("bland", (size, 3), "one", "size", generator, dtypes=(SINGLE, HALF[size % 2]))
    for lam in ("rows", "one"):
        yield _mixup_case("offset3", (7, 33), lam, "probe", generator, probe=True)


def _mixup_case(regime, shape, lam, label, generator, **fields):
    x = pair(regime, shape, shape, generator)[0] if len(shape) > 1 else torch.randn(shape, generator=generator).double()
    share = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    inputs = {"x": x, "labels": torch.arange(shape[0])}
    if lam != "number":
        inputs["lam"] = share if lam == "rows" else share[0]

    def call(t, backend):
        return ops.mixup(
            t["x"], t["labels"], lam=t.get("lam", 0.3), generator=generator_beside(t["x"]), backend=backend
        ).x

    name = f"lam {lam} {label} {'x'.join(map(str, shape))}"
    scale = lambda t: t["x"].abs().max()  # noqa: E731
    return Case(name, inputs, call, caps, scale, constants=("lam",), linear=True, context=seeded, **fields)


def bytes_moved(R: int, C: int, itemsize: int, backward: bool = False) -> int:
    """The least traffic of a loss: both rows are read once, and once more where the gradient is written."""
    return R * C * itemsize * (5 if backward else 2)


def flops(R: int, C: int, exponentials: int = 2) -> int:
    """Exponentials, the arithmetic that counts."""
    return R * C * exponentials


cases = cases_of(mixup=_mixup, distillation_kl=_kl, generalized_jsd=_divergences, mixed_distillation=_mixed)
