# SPDX-License-Identifier: Apache-2.0
"""The ceilings of the machine, measured in the same run as the rows they are drawn above."""

from __future__ import annotations

import torch

from .measure import CLOCKS, percentiles


def measure(device: str, quick: bool = False, clock: str = "wall") -> list[dict]:
    """Roof rows: copy (bytes read + written a second), gemm by dtype (flop/s); on CUDA an empty launch and graph."""
    return _cuda(quick) if device == "cuda" else _cpu(quick, CLOCKS[clock])


def _cpu(quick: bool, now) -> list[dict]:
    size, edge = (2**22, 256) if quick else (2**27, 2048)
    source = torch.randint(0, 127, (size,), dtype=torch.int8)
    target = torch.empty_like(source)
    rows = [_row("copy", None, 2 * size, _host(lambda: target.copy_(source), now))]
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.randn(edge, edge, dtype=dtype) for _ in range(2))
        rows.append(_row("gemm", dtype, 2 * edge**3, _host(lambda a=a, b=b: a @ b, now)))
    return rows


def _cuda(quick: bool) -> list[dict]:
    size, edge = (2**24, 1024) if quick else (2**30, 8192)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    rows = [_row("copy", None, 2 * size, _events(lambda: target.copy_(source)))]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(edge, edge, device="cuda").to(dtype) for _ in range(2))
        rows.append(_row("gemm", dtype, 2 * edge**3, _events(lambda a=a, b=b: a @ b)))
    rows.append(_tf32x3(edge))
    one = torch.zeros(1, device="cuda")
    rows.append(_row("launch", None, 0, _events(one.zero_)))
    graph = torch.cuda.CUDAGraph()
    one.zero_()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        one.zero_()
    rows.append(_row("graph", None, 0, _events(graph.replay)))
    return rows


def _tf32x3(edge: int) -> dict:
    """What float32 products of three TF32 ones can reach: a third of those."""
    a, b = (torch.randn(edge, edge, device="cuda") for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        times = _events(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return {**_row("gemm", torch.float32, 2 * edge**3 // 3, times), "dtype": "tf32x3"}


def _host(function, now, reps: int = 9) -> list[float]:
    function()
    times = []
    for _ in range(reps):
        start = now()
        function()
        times.append((now() - start) * 1e3)
    return times


def _events(function, reps: int = 21) -> list[float]:
    for _ in range(3):
        function()
    times = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def _row(name: str, dtype, work: int, times: list[float]) -> dict:
    """The rate is that of the fastest call: a ceiling is what the machine can do, not what it does under load."""
    p20, p50, p80 = percentiles(times)
    return {
        "kind": "roof",
        "case": name,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "ms_min": min(times),
        "reps": len(times),
        "rate": work / (min(times) * 1e-3) if work else None,
    }


def bound(rows: list[dict], dtype: str, flops: int, bytes_moved: int) -> tuple[float | None, str | None]:
    """Milliseconds below which the machine cannot do this work, and the roof that says so."""
    rates = {(row["case"], row["dtype"]): row["rate"] for row in rows}
    limits, ways = [], (dtype, "tf32x3") if dtype == "float32" else (dtype,)
    products = [rates[key] for key in (("gemm", way) for way in ways) if rates.get(key)]
    if products:
        limits.append((flops / max(products) * 1e3, "gemm"))
    if rates.get(("copy", None)):
        limits.append((bytes_moved / rates["copy", None] * 1e3, "copy"))
    return max(limits, default=(None, None))
