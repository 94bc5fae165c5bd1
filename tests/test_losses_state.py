# SPDX-License-Identifier: Apache-2.0
"""Modules whose state moves while they train: what a compiler makes of a step has the gradient of that step.

A compiler that makes a tensor again in backward, from a buffer that has changed since, gives the right value with the
gradient of another step: the values of all steps do not show it.
"""

import pytest
import torch

from kdkernels import ClassCenters, landmark_similarity_loss, losses

ROWS, WIDTH, CLASSES, STEPS = 12, 10, 4, 5


class Stateful(torch.nn.Module):
    """`within` runs in the graph of a step, `between` after its backward."""

    def __init__(self, *modules):
        super().__init__()
        self.parts = torch.nn.ModuleList(modules)

    def within(self, student, teacher, labels):
        return self.parts[0](student, teacher)

    def between(self, step):
        pass


class Labelled(Stateful):
    def within(self, student, teacher, labels):
        return self.parts[0](student, teacher, labels)


class WarmUp(Labelled):
    def between(self, step):
        self.parts[0].loss.set_epoch(step + 1)
        self.parts[0].loss.weight.mul_(1.25)


class Manual(Stateful):
    """Two calls a step, which ends in the graph."""

    def within(self, student, teacher, labels):
        value = self.parts[0](student, teacher) + self.parts[0](2 * student, teacher)
        self.parts[0].step()
        return value


class Landmarks(Labelled):
    def between(self, step):
        if step % 2:
            self.parts[0].end_epoch()


class Collecting(Stateful):
    """Centres that the graph of the loss adds to."""

    def within(self, student, teacher, labels):
        centers = self.parts[0]
        centers.update(student, teacher, labels)
        return landmark_similarity_loss(student, teacher, centers.student_centers, centers.teacher_centers)

    def between(self, step):
        self.parts[0].swap()


class Projected(Stateful):
    """A basis from what the graph of the loss has seen."""

    def within(self, student, teacher, labels):
        self.parts[0].observe(teacher)
        return self.parts[0](student, teacher)

    def between(self, step):
        self.parts[0].fit()


def rdimkd():
    loss = losses.RdimKDLoss(WIDTH, 3, normalizer="variance", seed=0)
    loss.observe(torch.randn(40, WIDTH))
    loss.fit()
    return Projected(loss)


CASES = {
    "ramp": lambda: Stateful(losses.Ramp(losses.KDLoss(), 0, 4)),
    "ramp of features": lambda: Stateful(losses.Ramp(losses.CKALoss(unbiased=False), 1, 3)),
    "ramp by hand": lambda: Manual(losses.Ramp(losses.KDLoss(), 0, 4, count="manual")),
    "ramp of a warm-up": lambda: WarmUp(losses.Ramp(losses.DKDLoss(warmup=4), 0, 4)),
    "kda": lambda: Landmarks(losses.KDALoss(CLASSES, WIDTH, WIDTH, start_epoch=1)),
    "kda average": lambda: Landmarks(losses.KDALoss(CLASSES, WIDTH, WIDTH, start_epoch=0, momentum=0.5)),
    "centres": lambda: Collecting(ClassCenters(CLASSES, WIDTH, WIDTH)),
    "rdimkd": rdimkd,
}


def steps(names, backend):
    """{name: gradients of each step} and what each module holds after the last; all modules in one graph."""
    torch.manual_seed(0)
    modules = {name: CASES[name]() for name in names}

    def values(students, teacher, labels):
        return {name: modules[name].within(student, teacher, labels) for name, student in students.items()}

    torch._dynamo.reset()
    run = torch.compile(values, backend=backend, fullgraph=True) if backend else values
    gradients = {name: [] for name in names}
    for step in range(STEPS):
        students = {name: torch.randn(ROWS, WIDTH, requires_grad=True) for name in names}
        found = run(students, torch.randn(ROWS, WIDTH), torch.arange(ROWS) % CLASSES)
        for name, grad in zip(names, torch.autograd.grad(sum(found.values()), students.values()), strict=True):
            gradients[name].append(grad)
            modules[name].between(step)
    return gradients, {name: dict(module.state_dict()) for name, module in modules.items()}


# the second compiles for a long time
@pytest.mark.parametrize("backend, names", [("aot_eager", CASES), ("inductor", ["ramp by hand", "kda"])])
def test_the_gradient_of_each_compiled_step_is_that_of_the_eager_one(backend, names):
    torch.testing.assert_close(steps(names, backend), steps(names, None), rtol=1e-5, atol=1e-7)
