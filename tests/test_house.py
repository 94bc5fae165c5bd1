# SPDX-License-Identifier: Apache-2.0
"""tools/house.py sees what it counts, in a small house with one fault of each kind; and bench has no import circle."""

import importlib.util

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)

TEN = ", ".join("abcdefghij")
FILES = {
    "kdkernels/__init__.py": "from .gram import cka\n",
    "kdkernels/backend.py": "def choose(backend):\n    return backend == 'cpp'\n",
    "kdkernels/gram/__init__.py": "from .op import cka\n",
    "kdkernels/gram/op.py": f"def cka({TEN}):\n    return a == 'cpp'\n",
    "kdkernels/gram/forms.py": f"from . import maps\ndef forward({TEN}, *k):\n    return a in ('torch', 'cpp')\n",
    "kdkernels/gram/maps.py": "def f(t):\n    from .forms import forward\n    return t.device.type == 'cuda'\n",
    "kdkernels/gram/triton_impl.py": f"@triton.jit\ndef kernel({TEN}):\n    return a == 'triton'\n",
    "kdkernels/gram/spec.py": f"def case({TEN}):\n    return a == 'cpp'\n",
    "kdkernels/gram/operator.py": "from ..differentiable import operator\ncka = operator('cka')\n",
    "kdkernels/gram/by_hand.py": "class F(torch.autograd.Function): ...\nregister('f', F)\n",
    "kdkernels/gram/ring.py": "class F(torch.autograd.Function): ...\n",
    "kdkernels/differentiable.py": "def operator(name): ...\n",
    "kdkernels/autograd.py": "class NoSecondDerivative: ...\n",
    "kdkernels/testing/__init__.py": "\n" * 100,
    "bench/rows.py": "from . import case\n",
    "bench/case.py": "",
    "tests/test_cka.py": "\n\n\n",
}


@pytest.fixture
def small(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house.House(tmp_path)


def test_each_figure_sees_its_fault_and_no_other(small):
    wide, longest = small.wide_functions()
    assert wide.places == ["kdkernels/gram/forms.py:2 forward, 11"] and longest.value == 11
    inside, elsewhere = small.backend_names()
    assert inside.places == ["kdkernels/gram/forms.py:3 a in ('torch', 'cpp')"]
    assert [place.split(":")[0] for place in elsewhere.places] == [
        f"kdkernels/gram/{f}.py" for f in ("op", "triton_impl")
    ]
    (circles,) = small.circles()
    assert circles.places == ["2: kdkernels.gram.forms, kdkernels.gram.maps"]
    operators, package, tests = small.sizes()
    assert (operators.value, package.value, tests.value) == (6, 24, 3)


@pytest.mark.parametrize(("held", "worse"), [(11, True), (12, False), (None, False)])
def test_a_figure_is_worse_where_it_passes_what_it_is_held_at_whatever_is_asked(held, worse):
    assert house.Figure("files", 12, 15, 10, held, []).worse == worse


def test_the_modules_of_bench_import_each_other_in_no_circle():
    (circles,) = house.House(ROOT).circles()
    assert not [place for place in circles.places if "bench." in place]
