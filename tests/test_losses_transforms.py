# SPDX-License-Identifier: Apache-2.0
"""Every loss and every name of compat: derivatives of all modes are right or refused, and teachers may be made under
inference mode."""

import inspect
from typing import NamedTuple

import pytest
import test_compat_mdistiller as of_mdistiller
import test_compat_repdistiller as of_repdistiller
import test_losses_contract as contract
import torch
from originals import every
from torch.autograd import forward_ad

import kdkernels as kd
from kdkernels.compat import mdistiller, repdistiller
from kdkernels.testing import transforms


class Entry(NamedTuple):
    """value(students, teachers, **options) of tuples of tensors; the inputs come in float64."""

    value: object
    students: tuple
    teachers: tuple
    options: dict = {}  # of a call that leaves rows out


def of_loss(case, **how):
    loss = case.make(**how).eval()  # in training KDALoss remembers what it was called with
    student, teacher = contract.sides(case, dtype=torch.float64)
    value = lambda s, t, **options: loss(*s, *t, **options)  # noqa: E731
    return Entry(value, (student.detach(),), (teacher,), {"mask": contract.kept_rows()})


def of_heads(divergence):
    """KDLoss straight from hidden states: student (hidden, weight, bias), teacher (hidden, weight)."""
    loss = kd.losses.KDLoss(divergence=divergence)
    value = lambda s, t, **options: loss(kd.LinearLogits(*s), kd.LinearLogits(*t), **options)  # noqa: E731
    draw = lambda *shapes: tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)  # noqa: E731
    return Entry(
        value, draw((contract.N, 5), (9, 5), (9,)), draw((contract.N, 7), (9, 7)), {"mask": contract.kept_rows()}
    )


def of_compat(function, inputs, *constants):
    levels = isinstance(inputs(torch.float64)[0], list)

    def value(*sides):
        out = function(*(list(side) if levels else side[0] for side in sides), *constants)
        return sum(level.sum() for level in every(out))

    return Entry(value, *(tuple(every(side)) for side in inputs(torch.float64)))


MAKERS = {
    **{name: lambda case=case: of_loss(case) for name, case in contract.CASES.items()},
    **{f"heads {divergence}": lambda divergence=divergence: of_heads(divergence) for divergence in ("forward", "jsd")},
    **{
        f"mdistiller {name}": lambda name=name, case=case: of_compat(getattr(mdistiller, name), case[0], *case[1])
        for name, case in of_mdistiller.CASES.items()
    },
    **{
        f"repdistiller {name}": lambda name=name, case=case: of_compat(getattr(repdistiller, name)(*case[0]), case[1])
        for name, case in of_repdistiller.CASES.items()
    },
}
# plain PyTorch all the way: nothing there may be refused
WRITTEN_OUT = ("fsp", "at", "at cubes", "cc", "cc taylor", "mdistiller at_loss")
WRITTEN_OUT += tuple(f"repdistiller {name}" for name in ("Attention", "FSP", "Correlation"))


def takes_backend(name) -> bool:
    if name not in contract.CASES or name == "pcka transposed":  # whose textbook takes minutes for its many groups
        return False
    loss = contract.CASES[name].make()
    return "backend" in inspect.signature(type(getattr(loss, "loss", loss)).__init__).parameters


@pytest.fixture(params=MAKERS, ids=lambda name: name.replace(" ", "-"))
def name(request):
    torch.manual_seed(1)
    return request.param


def made_under_inference_mode(tensors):
    with torch.inference_mode():
        return tuple(t.clone() for t in tensors)


def to(dtype, tensors):
    return tuple(t.to(dtype) for t in tensors)


def gradient(value, students, create_graph=False):
    students = tuple(s.clone().requires_grad_() for s in students)
    return students, torch.autograd.grad(value(students), students, create_graph=create_graph)


def gradient_of(entry, options):
    return gradient(lambda s: entry.value(s, entry.teachers, **options), entry.students)[1]


def along(gradients, directions):
    return sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))


def refused(error, *words) -> bool:
    return any(word in str(error) for word in words) and "backend='reference'" in str(error)


def test_a_teacher_and_a_mask_may_be_made_under_inference_mode(name):
    entries = [MAKERS[name]()]
    if takes_backend(name):
        entries.append(of_loss(contract.CASES[name], backend="reference"))
    for entry in entries:
        students, teachers = to(torch.float32, entry.students), to(torch.float32, entry.teachers)
        for options in ({}, entry.options) if entry.options else ({},):
            frozen = dict(zip(options, made_under_inference_mode(options.values()), strict=True))
            _, want = gradient(lambda s: entry.value(s, teachers, **options), students)  # noqa: B023
            _, got = gradient(
                lambda s: entry.value(s, made_under_inference_mode(teachers), **frozen),  # noqa: B023
                students,
            )
            assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_every_backend_gives_the_value_and_the_gradient_of_the_textbook(name):
    if not takes_backend(name):
        return
    entry = of_loss(contract.CASES[name], backend="reference")
    for options in ({}, entry.options):
        want = entry.value(entry.students, entry.teachers, **options), *gradient_of(entry, options)
        for other in (MAKERS[name](), of_loss(contract.CASES[name], backend="torch")):
            other = entry._replace(value=other.value)  # on the same inputs
            got = other.value(entry.students, entry.teachers, **options), *gradient_of(other, options)
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    if name in WRITTEN_OUT:
        return
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        of_loss(contract.CASES[name], backend="cuda").value(entry.students, entry.teachers)


def test_an_ordinary_teacher_is_not_copied():
    teacher = torch.randn(4, 3, requires_grad=True)
    assert contract.losses.base.constant(teacher).data_ptr() == teacher.data_ptr()
    with torch.inference_mode():
        inside = teacher.clone()
        assert contract.losses.base.constant(inside).data_ptr() == inside.data_ptr()
    copy = contract.losses.base.constant(inside)
    assert copy.equal(inside) and not copy.is_inference()


CHECKED = set()


def test_what_is_run_keeps_its_schema_and_its_fake(name):
    """Each operator once for what is None among its arguments."""
    entry = MAKERS[name]()
    students, teachers = to(torch.float32, entry.students), to(torch.float32, entry.teachers)
    with transforms._Operators() as seen:
        for options in ({}, entry.options) if entry.options else ({},):
            gradient(lambda s: entry.value(s, teachers, **options), students)  # noqa: B023
    for operator, arguments in seen.calls:
        kind = operator.name(), *(a is None for a in arguments)
        if kind not in CHECKED:
            CHECKED.add(kind)
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_tangents_are_the_gradients_or_refused(name):
    entry = MAKERS[name]()
    f = lambda *students: entry.value(students, entry.teachers)  # noqa: E731
    directions = tuple(map(torch.randn_like, entry.students))
    _, gradients = gradient(lambda s: f(*s), entry.students)
    want = along(gradients, directions)
    torch.testing.assert_close(torch.func.grad(f, tuple(range(len(gradients))))(*entry.students), gradients)
    try:
        _, transformed = torch.func.jvp(f, entry.students, directions)
        with forward_ad.dual_level():
            dual = f(*map(forward_ad.make_dual, entry.students, directions))
            found = forward_ad.unpack_dual(dual).tangent
    except RuntimeError as error:
        assert refused(error, "forward-mode differentiation") and name not in WRITTEN_OUT
        return
    for tangent in (transformed, found):
        torch.testing.assert_close(tangent, want, rtol=1e-10, atol=1e-12)


def reverse_of_reverse(f, students, directions):
    students, first = gradient(f, students, create_graph=True)
    return torch.autograd.grad(along(first, directions), students)


WAYS = {
    "reverse of reverse": reverse_of_reverse,
    "forward of reverse": lambda f, s, v: torch.func.jvp(torch.func.grad(f), (s,), (v,))[1],
    "reverse of forward": lambda f, s, v: torch.func.grad(lambda s: torch.func.jvp(f, (s,), (v,))[1])(s),
}


def second_derivative(entry, directions):
    """Along the directions, from differences of gradients."""
    h = 1e-5
    f = lambda s: entry.value(s, entry.teachers)  # noqa: E731
    two = [
        gradient(f, tuple(s + h * sign * v for s, v in zip(entry.students, directions, strict=True)))[1]
        for sign in (1, -1)
    ]
    return [(ahead - behind) / (2 * h) for ahead, behind in zip(*two, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivatives_are_right_or_refused(name, dtype):
    entry = MAKERS[name]()
    directions = tuple(map(torch.randn_like, entry.students))
    wants = second_derivative(entry, directions)
    students, teachers, moved = (to(dtype, t) for t in (entry.students, entry.teachers, directions))
    # a call in float32 may have a way of its own where nobody watches
    for way in WAYS if dtype == torch.float64 else ["reverse of reverse"]:
        try:
            found = WAYS[way](lambda s: entry.value(s, teachers), students, moved)
        except RuntimeError as error:
            refusals = "second derivative", "forward-mode differentiation"
            assert refused(error, *refusals) and name not in WRITTEN_OUT, f"{way}: {error}"
            continue
        for got, want in zip(found, wants, strict=True):
            scale = want.abs().max()
            assert scale > 0 and (got - want).abs().max() <= (1e-6 if dtype == torch.float64 else 1e-3) * scale, way


def test_batches_of_upstream_gradients(name):
    entry = MAKERS[name]()
    students, teachers = to(torch.float32, entry.students), to(torch.float32, entry.teachers)
    students, one = gradient(lambda s: entry.value(s, teachers), students, create_graph=True)
    upstream = torch.tensor([1.0, -2.0, 0.0])
    many = torch.autograd.grad(entry.value(students, teachers), students, upstream, is_grads_batched=True)
    for got, want in zip(many, one, strict=True):
        want = torch.stack([k * want.detach() for k in upstream])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max())
