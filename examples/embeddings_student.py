# SPDX-License-Identifier: Apache-2.0
"""The student of distill_embeddings.py, its training, and what is measured: neighbours, and the order of the others."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from embeddings_data import Data
from torch import nn

import kdkernels as kd

HIDDEN = 128
NEAREST = 10


class Student(nn.Module):
    """A mean of token embeddings with a learned weight a token, and a residual network: it sees no order of words."""

    def __init__(self, words, width: int, dropped: float = 0.2):
        super().__init__()
        self.dropped = dropped
        # from the principal components of the teacher's own
        centred = words - words[1:].mean(0)
        start = centred @ torch.linalg.eigh(centred[1:].T @ centred[1:])[1][:, -HIDDEN:]
        start[0] = 0.0
        self.embed = nn.Embedding.from_pretrained(start / start.std(), freeze=False, padding_idx=0)
        self.attend = nn.Embedding(len(words), 1, padding_idx=0)
        nn.init.zeros_(self.attend.weight)
        hidden = start.shape[1]
        self.body = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        self.head = nn.Linear(hidden, width)

    def forward(self, tokens):
        if self.training:  # words are left out, never the first
            gone = torch.rand(tokens.shape) < self.dropped
            gone[:, 0] = False
            tokens = tokens.masked_fill(gone, 0)
        scores = self.attend(tokens).squeeze(-1).masked_fill(tokens == 0, -torch.inf)
        mean = torch.bmm(scores.softmax(1)[:, None], self.embed(tokens)).squeeze(1)
        return self.head(mean + self.body(mean))


def similarities(x):
    """Cosines of each sample to the others of the batch [n, n - 1]."""
    x, n = F.normalize(x, dim=1), len(x)
    return (x @ x.T).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


class Quality(NamedTuple):
    """Means over the sentences of a split."""

    rho: float  # Spearman's correlation of the student's cosines to the other sentences with the teacher's
    recall: float  # the share of the teacher's 10 nearest among the student's 10 nearest


@torch.no_grad()
def measure(student, teacher) -> Quality:
    s, t = similarities(student), similarities(teacher)
    k = min(NEAREST, s.shape[1])
    found = torch.zeros(s.shape).scatter_(1, s.topk(k).indices, 1.0)
    return Quality(float(kd.spearman_corr(s, t).mean()), float(found.gather(1, t.topk(k).indices).mean()))


@torch.no_grad()
def ceiling(data: Data, width: int) -> Quality:
    """What the teacher's own principal components of that width reach."""
    basis = torch.linalg.svd(data.train.teacher, full_matrices=False)[2][:width].T
    return measure(data.test.teacher @ basis, data.test.teacher)


class Run(NamedTuple):
    method: str
    width: int
    rate: float
    seed: int
    validation: Quality
    test: Quality
    projected: Quality | None  # on the test split, after the loss's own projection
    seconds: float  # of training, CPU time


def train(data: Data, method: str, make, width: int, rate: float, seed: int, epochs: int, batch: int) -> Run:
    """Adam with one cycle of the rate. `make(width, the teacher's training rows)` -> loss(student, teacher)."""
    torch.manual_seed(seed)
    tokens, teacher = data.train
    batch = min(batch, len(tokens))
    student, loss = Student(data.words, width), make(width, teacher)
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), fused=True)
    steps = epochs * (len(tokens) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    began = time.process_time()
    for _ in range(epochs):
        for rows in torch.randperm(len(tokens))[: len(tokens) // batch * batch].view(-1, batch):
            part = tokens[rows]
            part = part[:, : int((part != 0).sum(1).max())]
            value = loss(student(part), teacher[rows])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - began
    student.eval()
    with torch.no_grad():
        validation, test = (student(split.tokens) for split in (data.validation, data.test))
        project = getattr(loss, "project", None)
        projected = None if project is None else measure(project(test), data.test.teacher)
    qualities = (measure(validation, data.validation.teacher), measure(test, data.test.teacher), projected)
    return Run(method, width, rate, seed, *qualities, seconds)
