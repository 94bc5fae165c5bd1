# SPDX-License-Identifier: Apache-2.0
"""Every loop over chunks of rows: Phi, and the gradients of a side.

What happens to one chunk is a backend's: a module with `phi_of` (Phi of its rows) and `pull` (from dL/dPhi to gradients
of rows and landmarks).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..autograd import at_least_float32, device_type
from ..backend import implementation
from ..checks import beyond
from ..gram.torch_impl.prepared import FAR
from . import landmarks, maps
from .call import Question, Side
from .landmarks import Landmarks

X, Z, SIGMA = 1, 2, 4  # bits of `need` of one side
CENTRED = ("cka", "hsic")
FAR_OFF = 2**-8  # the spread of landmarks, as a share of their squared mean, from which centring takes float32's digits
CHUNK = 4096  # rows of a chunk on a CPU: 4 MB of features at m = 256 stay in its caches
CHUNK_BYTES = 256 << 20  # of one [rows, m] panel on a GPU


def chunks(x, m: int):
    """Slices of the rows of x."""
    n = x.shape[0]
    rows = CHUNK if device_type(x) == "cpu" else max(CHUNK, CHUNK_BYTES // (4 * max(1, m)) // 1024 * 1024)
    return [slice(start, min(n, start + rows)) for start in range(0, n, rows)]


def prepared_landmarks(side: Side, question: Question, dtype, *factor) -> Landmarks:
    """The landmarks of a side in the dtype of the work: float64 where float32 does not do and the backend takes it."""
    s = landmarks.prepare(side, question, dtype, *factor)
    takes_any = getattr(implementation(__package__, question.backend), "TAKES_ANY_DTYPE", False)
    unfit = takes_any and (outside_float32(side.rows, s) or (question.stat in CENTRED and far_off(s)))
    return landmarks.prepare(side, question, torch.float64, *factor) if unfit else s


def outside_float32(rows, s: Landmarks) -> bool:
    """Whether squares of rows or landmarks leave float32, or landmarks are far apart under a narrow kernel: distances
    to near ones are then rounded away. Asked on the CPU only: a GPU would have to wait for the answer."""
    if not s.z.is_cpu or s.z.dtype != torch.float32 or s.spec.name == "cosine" or rows.numel() == 0:
        return False
    square = 2 * s.half.max().item()
    mean = torch.linalg.vector_norm(rows, dtype=torch.float32).item() ** 2 / rows.numel()
    if beyond([square, mean], 1e-30, 1e30):
        return True
    return s.spec.of_distance and square > FAR * min(s.par.tolist()) ** 2


def far_off(s: Landmarks) -> bool:
    """Whether features of dot products hardly vary beside their mean, which a centred statistic takes from them."""
    if not s.z.is_cpu or s.z.dtype != torch.float32 or s.spec.of_distance:
        return False
    mean = s.z.mean(0).square().sum()
    return bool(2 * s.half.mean() - mean < FAR_OFF * mean)


class Pulled(NamedTuple):
    """What one chunk gives back: dL/dx of prepared rows or None, and its part of the sums over rows."""

    dx: torch.Tensor | None
    dz: torch.Tensor | None  # [m, d]
    product: torch.Tensor | None  # G'Phi or C'G
    dsigma: torch.Tensor | None


class Puller:
    """Gradients of one side, summed over chunks: sums over rows in float64, dL/dx written in place."""

    def __init__(self, side: Side, s: Landmarks, run, need: int):
        self.side, self.landmarks, self.pull, self.need = side, s, run.pull, need
        self.dx = side.rows.new_empty(side.rows.shape) if need & X else None
        self.sums = [None, None, None]

    def add(self, rows: slice, prepared, grad):
        out = self.pull(self.landmarks, prepared, grad, self.need)
        if self.need & X:
            self.dx[rows] = maps.raw_gradient(self.side.kernel, self.side.rows[rows], out.dx)
        for k, part in enumerate(out[1:]):
            if part is not None:
                self.sums[k] = part.double() if self.sums[k] is None else self.sums[k].add_(part)

    def finish(self):
        """(dx, dz, dsigma), None where nobody asked."""
        x, z, sigma, kernel = self.side
        dz = dsigma = None
        if x.shape[0] == 0:  # a rank that has no rows
            dz, dsigma = torch.zeros_like(z), None if sigma is None else torch.zeros_like(sigma)
        elif self.need & (Z | SIGMA):
            through, product, direct = self.sums
            weight = landmarks.factor_gradient(self.landmarks, product)
            want_sigma = bool(self.need & SIGMA)
            more, more_sigma = landmarks.landmark_gradient(self.landmarks, z, weight, want_sigma)
            if self.need & Z:
                dz = maps.raw_gradient(kernel, z, through + more).to(z.dtype)
            if want_sigma:
                dsigma = (direct + more_sigma).reshape(sigma.shape).to(sigma.dtype)
        return self.dx, dz, dsigma


def features_forward(side: Side, question: Question):
    """Phi [n, m] in the promoted dtype of rows and landmarks, and the factor of W."""
    x, z, *_ = side
    make = implementation(__package__, question.backend).phi_of
    s = prepared_landmarks(side, question, at_least_float32(x, z))
    phi = x.new_empty((x.shape[0], z.shape[0]), dtype=torch.promote_types(x.dtype, z.dtype))
    for rows in chunks(x, z.shape[0]):
        phi[rows] = make(s, maps.prepared_rows(s.spec, x[rows], s.shift, s.z.dtype))
    return phi, s.factor, s.spectrum


def features_backward(grad, side: Side, factors, question: Question, need: int):
    x, z, *_ = side
    s = prepared_landmarks(side, question, at_least_float32(x, z), *factors)
    puller = Puller(side, s, implementation(__package__, question.backend), need)
    for rows in chunks(x, z.shape[0]):
        prepared = maps.prepared_rows(s.spec, x[rows], s.shift, s.z.dtype)
        puller.add(rows, prepared, grad[rows].to(s.z.dtype))
    return puller.finish()
