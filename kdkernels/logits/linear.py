# SPDX-License-Identifier: Apache-2.0
"""Logits as the hidden states and the head that make them: a side of a loss that is never stored whole."""

from __future__ import annotations

import math

import torch

from .. import checks
from ..autograd import at_least_float32
from ..distributed import GroupLike, check_group
from .linear_driver import Side


class LinearLogits:
    """Logits z = scale (hidden weight' + bias), with a softcap s tanh(z / s), in the place of a tensor of logits.

    A loss that takes them makes the logits of some rows at a time and the gradients of hidden, weight and bias from
    them at once: neither logits nor their gradient exist whole. The products are computed in at least float32, also
    those of bfloat16 tensors and under autocast: rounded logits of near sides lose all of the divergence. Formulas,
    memory and traps: kdkernels/logits/MATH.md, section 11.

    Args:
        hidden: the last hidden states, [..., H], each leading index a row; float16 to float64.
        weight: of the head, [V, H], also one tied to the embedding; frozen (no gradient asked for) it costs no product.
        bias: [V], or None.
        scale: a number that multiplies the logits (the logit scale of Cohere; Granite divides: give 1 / its number).
        softcap: a positive number (30 in Gemma 2), or None.
        vocab: how many classes there are: the first of weight and bias. For heads that are padded to different sizes;
            the rest gets gradient 0.
        group: "world" or the process group whose ranks hold the vocabulary in slices, one after another: weight and
            bias are then this rank's, hidden is the same on all of them, and vocab= goes to the loss, which is
            `kd.losses.KDLoss` (see its call) or `DKDLoss`. None: they are whole.

    Accepted by `kd.losses.KDLoss`, `DKDLoss`, `STKDLoss`, `DISTLoss` and the row terms of `CMKDLoss`, as student,
    teacher or both; the other side may be a tensor of logits [..., V].
    Gradients go to hidden, weight and bias of the student. `shape` is that of the logits; `logits()` makes them.

    Raises:
        ValueError: shapes that do not fit, no rows or classes, scale 0 or not finite, softcap <= 0, vocab above the
            head's classes. TypeError: tensors that are not float.

    >>> hidden, head = torch.randn(2, 6, 16, requires_grad=True), torch.nn.Linear(16, 1000, bias=False)
    >>> teacher = kd.LinearLogits(torch.randn(2, 6, 32), torch.randn(1000, 32))
    >>> student = kd.LinearLogits(hidden, head.weight)
    >>> kd.losses.KDLoss(tau=1.0, divergence="jsd")(student, teacher).backward()
    >>> student.shape
    torch.Size([2, 6, 1000])
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    vocab: int
    group: GroupLike

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        vocab: int | None = None,
        group: GroupLike = None,
    ):
        _check_tensors(hidden, weight, bias)
        check_group(group)
        if not (checks.is_number(scale) and scale and math.isfinite(scale)):
            raise ValueError(f"scale is {scale!r}: give a number other than 0, which multiplies the logits")
        if softcap is not None and not (checks.is_number(softcap) and 0 < softcap < math.inf):
            raise ValueError(f"softcap is {softcap!r}: give a positive number, or None")
        if vocab is not None:
            if group is not None:
                raise ValueError("vocab counts classes of this rank, and group= is given: give the loss vocab=, of all")
            checks.integer(vocab, "vocab")
            if vocab > weight.shape[0]:
                raise ValueError(f"vocab is {vocab}, weight has {weight.shape[0]} classes: give at most as many")
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale, self.softcap = float(scale), None if softcap is None else float(softcap)
        self.vocab, self.group = weight.shape[0] if vocab is None else vocab, group

    @property
    def shape(self) -> torch.Size:
        """Of the logits: [..., V]."""
        return torch.Size((*self.hidden.shape[:-1], self.vocab))

    @property
    def dtype(self) -> torch.dtype:
        """In which the logits are computed."""
        return at_least_float32(self.hidden, self.weight)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """hidden, weight and, if there is one, bias."""
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self.tensors)

    def numel(self) -> int:
        return math.prod(self.shape)

    def of(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, vocab: int | None = None
    ) -> LinearLogits:
        """The same of other tensors, or with fewer classes; no slice."""
        vocab = self.vocab if vocab is None else vocab
        return LinearLogits(hidden, weight, bias, scale=self.scale, softcap=self.softcap, vocab=vocab)

    def detach(self) -> LinearLogits:
        """The same, constant."""
        same = self.of(*(t.detach() for t in self.tensors))
        same.group = self.group
        return same

    def logits(self) -> torch.Tensor:
        """All of them, [..., V] in `dtype`, by PyTorch and with its derivatives: what the losses do without."""
        z = self.hidden.to(self.dtype) @ self.weight[: self.vocab].to(self.dtype).mT
        if self.bias is not None:
            z = z + self.bias[: self.vocab]
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def __repr__(self) -> str:
        return f"LinearLogits({tuple(self.hidden.shape)} to {self.vocab} classes, {self.dtype})"


def _check_tensors(hidden, weight, bias):
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        checks.floating(tensor, name)
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor: in the forward pass of what FSDP wraps it is a tensor; elsewhere give {name}"
                f".full_tensor(grad_placements=[Partial()]), or, of a vocabulary in slices, .to_local() and group="
            )
        checks.same_device(hidden, tensor, "hidden", name)
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}: "
            "give [..., H], with one leading index at least, and the head's [V, H]"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: one entry a class of weight is ({weight.shape[0]},)")
    if weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: a head needs classes and a width")


def side_of(logits) -> Side:
    """What the driver reads of either kind of a side [..., C], as rows."""
    if isinstance(logits, LinearLogits):
        return Side(logits.hidden.flatten(0, -2), logits.weight, logits.bias, logits.scale, logits.softcap or 0.0)
    return Side(logits.reshape(-1, logits.shape[-1]), None, None, 1.0, 0.0)
