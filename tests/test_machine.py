# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as compiled for a GPU, executed on the CPU under changing schedules; planted faults are seen."""

import pytest
from conftest import ROOT, load_by_path

pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels and carries the disassembler")

compiler = load_by_path(ROOT / "tests" / "simt" / "build.py").compiler()
pytestmark = [
    pytest.mark.machine,
    pytest.mark.compile_only,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
]
# the ops with the fewest programs to compile; `make machine` runs all of them, for both architectures
QUICK = [(op, 80) for op in ("mixup", "rkd_angle", "distillation_kl", "mixed_distillation")] + [("distillation_kl", 90)]


@pytest.mark.parametrize("op, architecture", QUICK)
def test_an_op_keeps_the_contract_in_machine_code(op, architecture, python):
    done = python("tests/machine/contract.py", op, "--architectures", str(architecture))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    assert f"{op} on sm_{architecture}: " in done.stdout and " 0 failed" in done.stdout


@pytest.mark.parametrize("architecture, multiplies", [(80, "HMMA"), (90, "HGMMA")])
def test_planted_faults_are_seen_and_products_are_right(architecture, multiplies, python):
    done = python("tests/machine/planted.py", str(architecture))
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.removeprefix(f"{architecture} ").split(": ", 1) for line in done.stdout.splitlines())
    assert said["none"] == "nothing"
    assert said["missing mask"].startswith("Fault, sum_rows: an access outside of every argument; near ")
    assert "a block reads what another wrote: out" in said["race between blocks"]
    # what Triton's interpreter cannot show: tensor cores cut what they are given
    assert said["tf32"] == "1 + 0.000000e+00"
    assert said["tf32x3"] == said["ieee"] == f"1 + {2**-11 + 2**-20:.6e}"
    products = {name: text for name, text in said.items() if name.startswith("product ")}
    assert len(products) == 6 and set(products.values()) == {f"{multiplies} nothing"}


@pytest.mark.parametrize("op, architecture", [("generalized_jsd", 80), ("projected_mse", 80), ("cka", 90)])
def test_a_barrier_or_wait_that_is_taken_out_is_seen(op, architecture, python):
    done = python("tests/machine/mutate.py", op, "--architectures", str(architecture))
    assert done.returncode == 0, done.stderr[-3000:]
    seen = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert len(seen) > 5 and set(seen.values()) <= {"reported", "wrong result", "harmless", "harmless here"}
    barriers = [outcome for line, outcome in seen.items() if " BAR." in line]
    assert barriers.count("reported") > 3 * barriers.count("harmless")
    waits = [(line, outcome) for line, outcome in seen.items() if "DEPBAR" in line]
    assert op != "projected_mse" or [outcome for _, outcome in waits].count("harmless") <= 1 < len(waits)
    if op == "cka":
        products = [outcome for line, outcome in waits if "WARPGROUP" in line]
        assert products.count("wrong result") > products.count("harmless")


@pytest.mark.parametrize("architecture", [80, 90])
def test_products_of_two_tf32_terms_are_as_exact_as_float32_ones(architecture, python):
    done = python("tests/machine/terms.py", str(architecture))
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [float(line.split(": ")[1]) for line in done.stdout.splitlines() if line.startswith("error of ")]
    assert len(errors) == 5 * 5 and max(errors) < 4e-7  # of sums that are cut; rounded ones: 3e-7
    assert sorted(errors)[-6] < 3e-7
    edges = [line.split(": ") for line in done.stdout.splitlines() if line.startswith("edge ")]
    seen = {name.removeprefix("edge "): tuple(map(float, numbers.split())) for name, numbers in edges}
    unlike = {name for name, (got, want) in seen.items() if not (got == want or (got != got and want != want))}
    # an infinite factor gives NaN, and the last 2^-12 below float32's largest number is cut to 11 bits
    assert unlike == {"inf", "-inf", "3.4025e+38", "3.4028e+38"} and len(seen) == 10
    assert all(seen[name][0] != seen[name][0] for name in ("inf", "-inf"))
    assert all(abs(seen[name][0] / seen[name][1] - 1) < 2**-10 for name in ("3.4025e+38", "3.4028e+38"))
