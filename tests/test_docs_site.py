# SPDX-License-Identifier: Apache-2.0
"""What the site makes of plain docstrings; that it builds without a warning is asked by `make docs`."""

import inspect
import re

import pytest
from conftest import ROOT, load_by_path

import kdkernels as kd

docstrings = load_by_path(ROOT / "docs" / "docstrings.py")
PUBLIC = [getattr(module, name) for module in (kd, kd.losses) for name in module.__all__]


@pytest.mark.parametrize(
    ("plain", "set_"),
    [
        ("x_i", r"*x*\ :sub:`i`\ "),
        ("tau^2 KL(p_t || m)", r"τ\ :sup:`2`\  KL(\ *p*\ :sub:`t`\  \|\| m)"),
        ("|K|_F^2", r"\|K\ \|\ :sub:`F`\ :sup:`2`\ "),
        ("x_(i+1)c", r"*x*\ :sub:`(i+1)c`\ "),
        ("W^(-1/2)", r"*W*\ :sup:`-1/2`\ "),
        ("`x_i` of `kd.cka`", "``x_i`` of :py:obj:`kd.cka <kdkernels.cka>`"),
        ("token_weights, x_landmarks, s_centers", r"token\_weights, x\_landmarks, s\_centers"),
        ("tau=4, weight_tau", r"tau=4, weight\_tau"),
    ],
)
def test_a_formula_is_set_and_a_name_is_not(plain, set_):
    assert docstrings.inline(plain) == set_


def test_arguments_are_a_list_and_the_rest_keeps_its_form():
    lines = ["A claim.", "", "Args:", "    x, y: rows", "        of both.", "    z: one.", "", ">>> 1", "1"]
    expected = ["A claim.", "", "**Args**", "", "* **x, y**: rows of both.", "* **z**: one.", "", ">>> 1", "1", ""]
    assert docstrings.restructured(lines) == expected
    assert docstrings.restructured(["Of:", "", "    a = b_i"]) == ["Of:", "", "::", "", "        a = b_i", ""]


@pytest.mark.parametrize("thing", [t for t in PUBLIC if callable(t)], ids=lambda thing: thing.__name__)
def test_no_word_of_a_docstring_is_lost(thing):
    text = inspect.getdoc(thing)
    made = "\n".join(docstrings.restructured(text.split("\n")))
    greek = {letter: name for name, letter in docstrings.GREEK.items()}
    back = re.sub(r":(?:sub|sup):|:py:obj:| <[\w.]+>", "", made)
    back = re.sub("|".join(greek), lambda letter: greek[letter[0]], back)
    assert re.sub("[^A-Za-z0-9]", "", back) == re.sub("[^A-Za-z0-9]", "", text)
