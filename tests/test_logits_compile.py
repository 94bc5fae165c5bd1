# SPDX-License-Identifier: Apache-2.0
"""A training step around the logits ops under torch.compile."""

import pytest
import torch

import kdkernels as kd

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


def test_a_whole_training_step_compiles():
    model = torch.nn.Linear(5, 9)
    loss = kd.losses.STKDLoss()
    lam = torch.tensor(0.3)

    def step(x, labels, teacher):
        batch = kd.mixup(x, labels, lam=lam)
        return loss(model(batch.x), teacher, batch)

    x, labels, teacher = torch.randn(8, 5), torch.randint(9, (8,)), torch.randn(8, 9)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, labels, teacher).backward()
    assert model.weight.grad.isfinite().all() and model.weight.grad.abs().max() > 0
