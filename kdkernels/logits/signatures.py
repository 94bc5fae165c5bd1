# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of the family in its default configurations, as ahead-of-time compilation needs it.

Used by the compile-only test leg, which has no GPU: kernel, argument types, compile-time constants and launch options.
"""

from __future__ import annotations

from ..testing.compiling import CompileCase, compile_case
from .triton_divergence import MIXTURE, REVERSE, VARIATION, divergence_gradient_rows, divergence_rows
from .triton_impl import KL, MIX, ROWS
from .triton_kernels import gradient_rows, loss_rows, mix_rows
from .triton_kl import kl_again, kl_rows

INDICES = ("labels_ptr", "permuted_ptr", "order_ptr", "index_ptr")
FLOATS = (
    "tau", "inverse_tau", "alpha", "k1", "k2", "k3", "number", "factor", "weight", "b", "u", "v", "log_b", "log_c",
)  # fmt: skip
ALIGNED = ("C", "width", "s_b", "t_b", "s_r", "t_r", "clean_r")
SINGLE = ("value_ptr", "stat_ptr", "grad_ptr", "lam_ptr", "weight_ptr", "other_ptr", "tau_ptr")


def _case(name, kernel, dtype, warps, odd=None, registers=None, **constants) -> CompileCase:
    def type_of(argument):
        if argument.endswith("_ptr"):
            return "int64" if argument in INDICES else "float32" if argument in SINGLE else dtype
        return "fp32" if argument in FLOATS else "i32"

    return compile_case(
        f"{name}-{dtype}", kernel, type_of, ALIGNED, warps, 3, odd=odd, registers=registers, **constants
    )


# what training uses: the mixed loss, its target with every term
FORMS = {
    "mixed": {"SOFT": True, "HARD": True, "LABELLED": True, "PLAIN": True, "CLEAN": False, "HAS_LAM": True},
    "full": {"SOFT": True, "HARD": True, "LABELLED": True, "PLAIN": False, "CLEAN": True, "HAS_LAM": True},
}
DIVERGENCES = {"mixture": MIXTURE, "reverse": REVERSE, "variation": VARIATION}


def _name(limit: int) -> str:
    return "long" if limit == 1 << 31 else f"c{limit}"


def _kl_cases():
    """As training has them: a number for tau, and for the weights; the backward pass of short, long and held rows."""
    absent = {"tau_ptr": None, "weight_ptr": None, "s_b": None, "t_b": None}
    for dtype in ("float32", "float16", "bfloat16"):
        for limit, of in KL:
            shared = absent | {"ROWS": of.rows, "CHUNK": of.columns, "CHUNKS": of.held, "UNIT": 8}
            launch = {"odd": {"UNIT": 1}, "registers": of.registers}
            yield _case(f"kl_rows-{_name(limit)}", kl_rows, dtype, of.warps, stat_ptr=None, **launch, **shared)
            if limit in (16, 1024, 1 << 31):
                yield _case(f"kl_again-{_name(limit)}", kl_again, dtype, of.warps, MADE=True, **launch, **shared)


def _divergence_cases():
    """The mixture in every configuration, of long rows in every dtype; the other forms of long rows."""
    for limit, config in ROWS:
        long = limit == 1 << 31
        of = [("mixture", dtype) for dtype in (("float32", "float16", "bfloat16") if long else ("float32",))]
        for form, dtype in [*of, *(((form, "float32") for form in DIVERGENCES if form != "mixture") if long else ())]:
            yield from _divergence(f"{form}-{_name(limit)}", dtype, config, form)
    yield from _divergence("mixture-c1", "float32", ROWS[0][1], "mixture", C=1, s_r=1, t_r=1)


def _divergence(name, dtype, config, form, **constants):
    shared = {"BLOCK": config.block, "FORM": DIVERGENCES[form].value, "HAS_TAU": False, **constants}
    kept = {"HAS_WEIGHT": False, "KEEP": True}
    yield _case(f"divergence_rows-{name}", divergence_rows, dtype, config.warps, **kept, **shared)
    yield _case(f"divergence_gradient_rows-{name}", divergence_gradient_rows, dtype, config.warps, **shared)


def compile_cases():
    yield from _kl_cases()
    yield from _divergence_cases()
    for dtype in ("float32", "float16", "bfloat16"):
        for limit, config in ROWS:
            for form, flags in FORMS.items():
                name, shared = f"{form}-{_name(limit)}", {"BLOCK": config.block, **flags}
                yield _case(f"loss_rows-{name}", loss_rows, dtype, config.warps, KEEP=True, **shared)
                yield _case(f"gradient_rows-student-{name}", gradient_rows, dtype, config.warps, **shared)
        yield _case("mix_rows", mix_rows, dtype, MIX.warps, BLOCK=MIX.block)
    # a single class: C and the row strides are then constants of the launch
    config, ones = ROWS[0][1], {"C": 1, "s_r": 1, "t_r": 1, "clean_r": 1}
    for form, flags in FORMS.items():
        shared = {"BLOCK": config.block, **flags, **ones}
        yield _case(f"loss_rows-{form}-c1", loss_rows, "float32", config.warps, KEEP=True, **shared)
        yield _case(f"gradient_rows-{form}-c1", gradient_rows, "float32", config.warps, **shared)
