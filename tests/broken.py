# SPDX-License-Identifier: Apache-2.0
"""How a kernel typically goes wrong, and whether the contract says so: what the sabotage suites share."""

import torch

from kdkernels import testing

CRASHES = ("TypeError", "AttributeError", "NameError")  # of a sabotage that no longer fits what it breaks


def rejects(monkeypatch, op, check, broken, module=None, backend="torch"):
    """Whether `check` fails once `broken`, {name or (module, name): replacement}, is in the place of the backend.

    A number has to be wrong: a replacement that cannot be called proves nothing.
    """
    for part, replacement in broken.items():
        where, name = part if isinstance(part, tuple) else (module, part)
        monkeypatch.setattr(where, name, replacement)
    family = "accuracy" if check.startswith(("value", "gradient")) else check
    results = testing.measure(op, backend, quick=True, checks=[family])
    return any(r.check == check and not r.ok and not r.note.startswith(CRASHES) for r in results)


def without_last(dim):
    """The last row, column or sample is lost: a loop that ends one too early."""

    def change(t):
        t = t.clone()
        t.narrow(dim, t.shape[dim] - 1, 1).zero_()
        return t

    return change


def unwritten(t):
    """The last three elements are never stored."""
    out = t.new_empty(t.shape)
    out.flatten()[:-3] = t.flatten()[:-3]
    return out


def packed(t):
    """The first numbers of the storage, as a kernel that trusts strides it never read would see them."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape, device="meta").stride())


def noisy(t):
    """Not the same bits twice."""
    return t * (1 + 1e-7 * torch.randn(()))


def asked_of(arguments) -> int:
    """`need`, of the call that is the first argument of a backward pass, or else the last one."""
    return getattr(arguments[0], "need", arguments[-1])


def one_gradient(backward, change, which=0):
    """A backward pass with one changed gradient, where that gradient is asked for."""

    def broken(*a):
        out = list(backward(*a))
        if asked_of(a) >> which & 1:
            out[which] = change(out[which])
        return tuple(out)

    return broken
