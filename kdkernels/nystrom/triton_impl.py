# SPDX-License-Identifier: Apache-2.0
"""One chunk of rows on a GPU: the fused pass for m <= 256, float32 panels and library solves above.

Products are float32 ("ieee") or, where the user allowed TF32 for matmul, tf32x3: the whitener amplifies the rounding of
its operand by up to jitter^(-1/2), which plain TF32 does not survive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ..gram.triton_impl.maps import map_of
from . import torch_impl
from .chunks import SIGMA, Pulled, X, Z
from .landmarks import Landmarks
from .triton_kernels import PANEL, ROOT, TRIANGLE, Operands, feature_rows, pull_rows, root_rows

FUSED = 256  # most landmarks whose whitening is fused


class Config(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# unmeasured: chosen for 64 bytes of spills at most on sm_80, sm_90 and sm_100
FEATURES = Config(64, 32, 32, 8, 1)
PULL = Config(64, 32, 32, 8, 1)
# (most landmarks, config): the accumulator is rows x that many
ROOTS = ((64, Config(64, 32, 32, 8, 2)), (128, Config(64, 32, 32, 8, 2)), (256, Config(32, 32, 32, 8, 2)))


def precision() -> str:
    return "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _operands(s: Landmarks, rows) -> Operands:
    """What every kernel takes first, from prepared rows."""
    rows, spec = rows.contiguous(), s.spec
    half = rows.square().sum(-1).div_(2) if spec.of_distance else None
    numbers = spec.params[:0:-1] if spec.name == "polynomial" else ()  # coef0, then the scale
    kernel = map_of(spec, s.par[None] if spec.of_distance else None, numbers)
    return Operands(rows, half, s.z.contiguous(), s.half, rows.shape[0], *s.z.shape, kernel)


def _padded(s: Landmarks, block: int, width: int = 0):
    """The whitener padded to whole blocks: by the identity if triangular, else by zeros (to `width` columns)."""
    m = s.z.shape[0]
    M = triton.cdiv(m, block) * block
    out = s.whitener.new_zeros(M, width or M)
    if s.whiten == "cholesky":
        out.diagonal().fill_(1.0)
    out[:m, :m] = s.whitener
    return out


def _inverted(padded, block: int):
    """[M, block]: inverses of the diagonal blocks, in float64 before they are rounded."""
    M = padded.shape[0]
    blocks = padded.double().view(M // block, block, M // block, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    eye = torch.eye(block, dtype=torch.float64, device=padded.device).expand(blocks.shape)
    return torch.linalg.solve_triangular(blocks, eye, upper=False).to(padded.dtype).reshape(M, block).contiguous()


def _grid(rows, config: Config):
    return (triton.cdiv(rows.shape[0], config.rows),)


def _launch(config: Config):
    return {
        "BM": config.rows,
        "BN": config.columns,
        "BK": config.depth,
        "PRECISION": precision(),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def kernel_panel(s: Landmarks, rows):
    """C of prepared rows."""
    C = rows.new_empty(rows.shape[0], s.z.shape[0])
    with torch.cuda.device_of(rows):
        feature_rows[_grid(rows, FEATURES)](_operands(s, rows), None, None, C, MODE=PANEL.value, **_launch(FEATURES))
    return C


def phi_of(s: Landmarks, rows):
    """Phi of prepared rows, float32."""
    if s.z.shape[0] > FUSED:
        return torch_impl.whitened(s, kernel_panel(s, rows))
    operands = _operands(s, rows)
    phi = rows.new_empty(rows.shape[0], s.z.shape[0])
    with torch.cuda.device_of(rows):
        if s.whiten == "cholesky":
            R = _padded(s, FEATURES.columns)
            inverse = _inverted(R, FEATURES.columns)
            feature_rows[_grid(rows, FEATURES)](operands, R, inverse, phi, MODE=TRIANGLE.value, **_launch(FEATURES))
        else:
            config = next(config for most, config in ROOTS if s.z.shape[0] <= most)
            width = max(16, triton.next_power_of_2(s.z.shape[0]))
            A = _padded(s, config.columns, max(width, config.columns))
            root_rows[_grid(rows, config)](operands, A, phi, MP=A.shape[1], **_launch(config))
    return phi


def pull(s: Landmarks, rows, grad, need: int) -> Pulled:
    """From G = dL/dPhi of prepared rows; see `torch_impl.pull`."""
    grad, product = grad.contiguous(), None
    if need & (Z | SIGMA):
        product = grad.mT @ phi_of(s, rows) if s.whiten == "cholesky" else kernel_panel(s, rows).mT @ grad
    mode, R, inverse = TRIANGLE if s.whiten == "cholesky" else ROOT, None, None
    if s.z.shape[0] > FUSED:
        mode = PANEL
        grad = torch_impl.unwhitened(s, grad).contiguous()
    else:
        R = _padded(s, PULL.columns)
        if s.whiten == "cholesky":
            inverse = _inverted(R, PULL.columns)
    V = torch.empty_like(grad)
    # linear kernels: V is dL/dC itself
    dC = torch.empty_like(grad) if mode is TRIANGLE and not s.spec.linear else V
    dsigma = rows.new_empty(rows.shape[0]) if need & SIGMA else None
    with torch.cuda.device_of(rows):
        pull_rows[_grid(rows, PULL)](
            _operands(s, rows), R, inverse, grad, dC, V, dsigma, MODE=mode.value, **_launch(PULL)
        )
    total = None if dsigma is None else dsigma.sum(dtype=torch.float64)
    return torch_impl.gradients(s, rows, V, product, total, need & (X | Z))
