# SPDX-License-Identifier: Apache-2.0
"""A whole training step with several losses under torch.compile: one graph, eager's parameters, weights that change."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels import losses

CLASSES, WIDTH, MAPS = 6, 8, 4


class Student(nn.Module):
    """Logits, the features before them, and a map of a pyramid."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, MAPS, 3, padding=1), nn.ReLU())
        self.neck = nn.Linear(MAPS * 9, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        maps = self.body(x)
        features = self.neck(nn.functional.adaptive_avg_pool2d(maps, 3).flatten(1)).relu()
        return self.head(features), features, maps


class Step(nn.Module):
    """The forward pass of a step: cross-entropy and one loss of each kind on what student and teacher give."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = Student(), Student().requires_grad_(False)
        self.on_logits = nn.ModuleList([losses.KDLoss(), losses.RCKALoss(), losses.CMKDLoss(), losses.DISTLoss()])
        self.on_features = nn.ModuleList([losses.CKALoss(), losses.SPLoss()])
        self.pyramid = losses.PCKALoss(transposed=0.5)
        self.kda = losses.KDALoss(CLASSES, WIDTH, WIDTH, start_epoch=0)
        for centers in (self.kda.centers.student_centers, self.kda.centers.teacher_centers):
            centers.copy_(torch.randn(centers.shape))
        self.kda.eval()  # its centres come from whole epochs, outside the step

    def forward(self, x, labels, mask):
        logits, features, maps = self.student(x)
        with torch.no_grad():
            t_logits, t_features, t_maps = self.teacher(x)
        loss = nn.functional.cross_entropy(logits, labels)
        loss = loss + sum(f(logits, t_logits, mask=mask) for f in self.on_logits)
        loss = loss + sum(f(features, t_features, mask=mask) for f in self.on_features)
        loss = loss + self.pyramid(maps, t_maps, mask=mask) + self.kda(features, t_features, labels)
        return loss

    def weights(self):
        return [f.weight for f in (*self.on_logits, *self.on_features, self.pyramid, self.kda)]


def batch(n=12):
    mask = torch.ones(n, dtype=torch.bool)
    mask[2] = False
    return torch.randn(n, 1, 20, 20), torch.randint(CLASSES, (n,)), mask


def run(forward, step, batches):
    """The losses of SGD steps, the weights of all terms halved after each."""
    optimiser = torch.optim.SGD(step.student.parameters(), lr=0.01)
    values = []
    for inputs in batches:
        optimiser.zero_grad()
        loss = forward(*inputs)
        loss.backward()
        optimiser.step()
        values.append(loss.detach())
        for weight in step.weights():
            weight.mul_(0.5)
    return values


def test_a_compiled_step_leaves_the_parameters_that_an_eager_one_leaves():
    torch._dynamo.reset()
    eager, compiled = Step(), Step()
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    batches = [batch() for _ in range(3)]
    before = [p.detach().clone() for p in eager.student.parameters()]
    expected = run(eager, eager, batches)
    values = run(torch.compile(compiled, fullgraph=True, backend=counter), compiled, batches)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    parameters = list(eager.student.parameters())
    torch.testing.assert_close(list(compiled.student.parameters()), parameters, rtol=1e-4, atol=1e-5)
    assert all((p - old).abs().max() > 1e-3 for p, old in zip(parameters, before, strict=True))
    assert counter.frame_count == 1  # three steps, each with other weights
    assert expected[0] != expected[1]


def test_a_step_on_mixed_images_compiles():
    torch._dynamo.reset()
    model, loss, lam = nn.Linear(5, 9), losses.STKDLoss(), torch.tensor(0.3)

    def step(x, labels, teacher):
        mixed = kd.mixup(x, labels, lam=lam)
        return loss(model(mixed.x), teacher, mixed)

    inputs = torch.randn(8, 5), torch.randint(9, (8,)), torch.randn(8, 9)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs).backward()
    assert model.weight.grad.isfinite().all() and model.weight.grad.abs().max() > 0
