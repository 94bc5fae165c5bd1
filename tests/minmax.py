# SPDX-License-Identifier: Apache-2.0
"""Soft ranks and soft sorts of short rows by the min-max formula of isotonic regression: no pooling, no shared code."""

import numpy as np


def nonincreasing(score):
    """v_i = min over a <= i of max over b >= i of score(a, b + 1): the isotonic fit whose block value is `score`."""
    n = score.n
    table = [[score(a, b + 1) if b >= a else -np.inf for b in range(n)] for a in range(n)]
    return np.array([min(max(table[a][b] for b in range(i, n)) for a in range(i + 1)) for i in range(n)])


class Mean:
    def __init__(self, y):
        self.y, self.n = y, len(y)

    def __call__(self, a, b):
        return self.y[a:b].mean()


class LogRatio:
    """log sum exp y - log sum exp w over a block."""

    def __init__(self, y, w):
        self.y, self.w, self.n = y, w, len(y)

    def __call__(self, a, b):
        return np.logaddexp.reduce(self.y[a:b]) - np.logaddexp.reduce(self.w[a:b])


def soft_rank(x, regularization, strength):
    """Blondel et al.: z - v(z, w) undone by the sort, w = (n, ..., 1), z = x / strength; kl: exp(z - v(z, log w))."""
    z, w = np.asarray(x, dtype=np.float64) / strength, np.arange(len(x), 0, -1.0)
    order = np.argsort(-z, kind="stable")
    s, rank = z[order], np.empty(len(z))
    if regularization == "l2":
        rank[order] = s - nonincreasing(Mean(s - w))
    else:
        rank[order] = np.exp(s - nonincreasing(LogRatio(s, np.log(w))))
    return rank


def soft_sort(x, regularization, strength):
    """Ascending: -(w - v(w, s)), w = (n, ..., 1) / strength, s = -x sorted descending."""
    s, w = np.sort(np.asarray(x, dtype=np.float64)), np.arange(len(x), 0, -1.0) / strength
    s = -s
    return -(w - nonincreasing(Mean(w - s) if regularization == "l2" else LogRatio(w, s)))
