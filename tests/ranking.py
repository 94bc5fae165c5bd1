# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ranking ops share: the backends that run here, and rows that are hard to rank."""

import pytest
import torch

from kdkernels import backend


def backends(op="soft_rank", reference=True):
    """Parameters: each backend that `op` has on the CPU; one whose library is not there is skipped, and says why."""
    out = ["reference"] if reference else []
    why = backend.obstacle("cpp", "cpu", op=op)
    marks = [pytest.mark.native, pytest.mark.skipif(why is not None, reason=why or "it runs")]
    return [*out, "torch", pytest.param("cpp", marks=marks)]


# one element, two, around a warp, past float16's sums (362), around a block of threads, ImageNet-21k, a vocabulary
SIZES = (1, 2, 31, 32, 33, 362, 1023, 1024, 1025, 2049, 4097)
LARGE = (21841, 128256)


def adversarial(n: int) -> dict[str, torch.Tensor]:
    """Rows [n], float64, for which pooling is deep, uneven, or decided by ties."""
    generator = torch.Generator().manual_seed(n)
    i = torch.arange(n, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return {
        "normal": noise,
        "heavy": noise**5,
        "few values": (2 * noise).round() / 2,
        "constant": torch.full_like(i, 0.1),
        "grid of one strength": i,  # every gap equals a strength of 1
        "wider and wider gaps": i.square() / max(n, 1),
        "closer and closer": -((n - i).square()) / max(n, 1),
        "square roots": i.sqrt() * 3,
        "two clusters": noise * 1e-3 + (i % 2) * 100,
        "descending powers": 1.5 ** -(i % 60),
        "offset": noise + 1e4,
        "logits": torch.where(noise > 2, 20 * noise, 0.3 * noise),
    }
