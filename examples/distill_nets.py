# SPDX-License-Identifier: Apache-2.0
"""Teachers, students and the set-ups they meet in. Every net returns its logits and its penultimate features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Output(NamedTuple):
    logits: torch.Tensor  # [B, classes]
    features: torch.Tensor  # [B, d]: what the last linear layer reads


class SmallNet(nn.Module):
    """Two convolutions and a hidden layer, for 8 x 8 images."""

    def __init__(self, channels: int, hidden: int, classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * channels, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, images) -> Output:
        features = self.body(images)
        return Output(self.head(features), features)


class Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """WRN-depth-width (arXiv 1605.07146), for 32 x 32 images: the pair of the literature is 40-2 and 16-2."""

    def __init__(self, depth: int, width: int, classes: int = 100):
        super().__init__()
        count, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
        for stage in range(3):
            for i in range(count):
                inputs = channels[stage] if i == 0 else channels[stage + 1]
                layers.append(Block(inputs, channels[stage + 1], 2 if stage and i == 0 else 1))
        self.body = nn.Sequential(
            *layers, nn.BatchNorm2d(channels[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(channels[3], classes)

    def forward(self, images) -> Output:
        features = self.body(images)
        return Output(self.head(features), features)


class Setup(NamedTuple):
    """Who learns from whom, with how many labels. A step sees `labelled` rows with labels and `unlabelled` without."""

    teacher: Callable[[int], nn.Module]  # number of classes -> net
    student: Callable[[int], nn.Module]
    labels: int | None  # how many training labels the student sees; None: all
    epochs: int
    teacher_epochs: int
    labelled: int = 32
    unlabelled: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4


def small_net(channels: int, hidden: int):
    return lambda classes: SmallNet(channels, hidden, classes)


def wide_resnet(depth: int, width: int):
    return lambda classes: WideResNet(depth, width, classes)


# digits: A has few labels and much to gain from the teacher, B all labels and a student that is too small.
# cifar100: the nets, epochs and weight decay of the literature; the few labels of A are 25 a class.
SETUPS = {
    ("digits", "A"): Setup(small_net(16, 64), small_net(8, 64), 50, 30, 30),
    ("digits", "B"): Setup(small_net(16, 64), small_net(4, 16), None, 15, 30),
    ("cifar100", "A"): Setup(wide_resnet(40, 2), wide_resnet(16, 2), 2500, 240, 240),
    ("cifar100", "B"): Setup(wide_resnet(40, 2), wide_resnet(16, 2), None, 240, 240),
}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
