# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled for the host with a fiber or an OS thread for each CUDA thread, agree with NumPy and are
clean under AddressSanitizer, UBSan and ThreadSanitizer; planted faults are caught."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_by_path

import kdkernels as kd

SIMT = Path(__file__).resolve().parent / "simt"
sys.path.insert(0, str(SIMT))

simt_build = load_by_path(SIMT / "build.py")
import compare  # noqa: E402
import drive  # noqa: E402
import rows  # noqa: E402

# where there is a compiler the module must build: a failure is an error of the fixture, never a skip
pytestmark = pytest.mark.skipif(simt_build.compiler() is None, reason="no C++ compiler")
FOUND = 66  # a sanitizer's exit code, apart from a failed comparison's 1


@pytest.fixture(scope="session")
def kernels():
    return drive.load(simt_build.build("plain"))


def fixed_layout() -> bool:
    """ThreadSanitizer needs a fixed layout where Linux randomises many address bits; containers may forbid setarch."""
    return (
        bool(shutil.which("setarch")) and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
    )


def sanitized(variant: str, *checks: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """drive.py in a process of its own under a sanitizer; only NumPy and the module are loaded there."""
    folder = simt_build.build(variant)
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(simt_build.runtimes(variant)),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}",
        "TSAN_OPTIONS": f"exitcode={FOUND}:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SIMT / "drive.py"), str(folder), *checks]
    if variant == "thread" and fixed_layout():
        command = ["setarch", "-R", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run here: too many random address bits and no `setarch -R`")
    return done


def assert_clean(done):
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"


def planted_line(name: str) -> int:
    lines = (SIMT / "planted.h").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if f"planted: {name}" in line)


class TestEmulation:
    @pytest.mark.parametrize("name", ["clean", "primitives", "primitives_with_early_exits"])
    def test_warp_and_block_primitives_do_what_cuda_says(self, kernels, name):
        drive.CHECKS[name](kernels)

    @pytest.mark.parametrize("bfloat", [False, True])
    def test_half_formats_round_to_nearest_even(self, kernels, bfloat):
        import torch

        edges = [
            0.0,
            -0.0,
            1.0,
            65504,
            65519.996,
            65520,
            1e-7,
            2.0**-24,
            2.0**-25,
            3e-8,
            6.1e-5,
            3.4e38,
            np.inf,
            -np.inf,
        ]
        x = np.random.default_rng(0).standard_normal(20000) * np.exp(np.linspace(-40, 40, 20000))
        x = np.concatenate([edges, [np.nan], x]).astype(np.float32)
        expected = torch.from_numpy(x).to(torch.bfloat16 if bfloat else torch.float16).float().numpy()
        assert np.array_equal(kernels.convert_half(x, bfloat), expected, equal_nan=True)

    def test_a_wrong_merge_and_an_unwritten_cell_show_in_the_comparison(self, kernels):
        assert drive.planted(kernels, "none") < 1e-10
        assert drive.planted(kernels, "wrong_merge") > 1e-3
        assert not drive.planted(kernels, "unwritten") < 1e-3
        assert not drive.planted(kernels, "no_barrier") < 1e-3  # threads run in a shuffled order

    @pytest.mark.parametrize(
        "plant, words",
        [
            ("divergent", r"threads meet at different calls, planted.h:\d+ and planted.h:\d+"),
            ("deadlock", r"deadlock: \d+ threads left; .*__syncthreads planted.h:\d+; 16 of 32 at warp collective"),
            ("bad_lane", r"planted.h:\d+: reads lane 16, which takes no part"),
        ],
    )
    def test_a_barrier_that_cannot_work_is_an_error_and_no_hang(self, kernels, plant, words):
        with pytest.raises(RuntimeError, match=words):
            drive.planted(kernels, plant)
        assert drive.planted(kernels, "none") < 1e-10  # the threads are back for the next launch


def last_column_lost(rank, *rest):
    rank[:, -1] = 0
    return rank, *rest


def one_entry_off_by_two_ulp(rank, *rest):
    rank[0, 3] += 2 * np.spacing(rank[0, 3])
    return rank, *rest


def rows_exchanged(rank, *rest):
    rank[[0, 1]] = rank[[1, 0]]
    return rank, *rest


def poison_lost(rank, *rest):
    return np.nan_to_num(rank, nan=1.0), *rest


def poison_spread(rank, *rest):
    rank[5] = np.nan
    return rank, *rest


def one_member_lost(rank, block, *rest):
    if block.size:
        block[0, block[0].argmax()] = -1
    return rank, block, *rest


def wrong_strength(rank, block, eps):
    return rank, block, eps * (1 + 1e-9)


def gradient_scaled(value, dx, dy):
    return value, dx * 1.0001, dy


class TestComparison:
    """The comparison accepts the textbook and refuses each spoiled result."""

    def test_the_textbook_is_accepted(self):
        compare.compare_rank(compare.Textbook(), 40, "float32", 0.1)
        compare.compare_sort(compare.Textbook(), 40, "float32", 0.1)
        compare.compare_spearman(compare.Textbook(), 40, "float32", 0.1)

    @pytest.mark.parametrize(
        "method, spoil",
        [
            ("rank_rows", last_column_lost),
            ("rank_rows", one_entry_off_by_two_ulp),
            ("rank_rows", rows_exchanged),
            ("rank_rows", poison_lost),
            ("rank_rows", poison_spread),
            ("rank_rows", one_member_lost),
            ("rank_rows", wrong_strength),
            ("rank_rows_backward", lambda g: g * np.float32(1.00001)),
            ("rank_rows_backward", lambda g: g + np.float32(1e-4)),
            ("sort_rows", last_column_lost),
            ("sort_rows", poison_lost),
            ("sort_rows_backward", lambda g: g[:, ::-1]),
            ("spearman_rows", poison_lost),
            ("spearman_rows", gradient_scaled),
        ],
    )
    def test_a_spoiled_result_is_refused(self, method, spoil):
        class Spoiled(compare.Textbook):
            pass

        def spoiled(self, *arguments):
            found = getattr(compare.Textbook, method)(self, *arguments)
            return spoil(*found) if isinstance(found, tuple) else spoil(found)

        setattr(Spoiled, method, spoiled)
        with pytest.raises(AssertionError):
            getattr(compare, "compare_" + method.split("_")[0])(Spoiled(), 40, "float32", 0.1)


# one past and one short of a warp, of a leaf of 32 positions, of an item more for each thread
WARP_SIZES = [1, 2, 3, 31, 32, 33]
LONGER_WARP_SIZES = [64, 127, 128, 129, 255, 256, 257]
BLOCK_SIZES = [1, 33, 362, 1023, 1024, 1025]
LONG_SIZES = [1, 2, 33, 129, 1024, 1025]


def settings(sizes, count, first=0):
    """(n, first setting): each size continues where the last one stopped, so that all settings come up."""
    return [(n, first + i * count) for i, n in enumerate(sizes)]


class TestRanking:
    """Every schedule of csrc/rank against the textbook, forced where the row length would choose another one."""

    @pytest.mark.parametrize("n, first", settings(WARP_SIZES, 4))
    def test_one_warp_a_row(self, kernels, n, first):
        drive.sweep(kernels, "warp", n, "rsp", 4, False, first)

    @pytest.mark.parametrize("n, first", settings(LONGER_WARP_SIZES, 2, 24))
    def test_one_warp_a_longer_row(self, kernels, n, first):
        drive.sweep(kernels, "warp", n, "rs", 2, True, first)

    @pytest.mark.parametrize("n, first", settings([1000, 1023, 1024], 1))
    def test_one_warp_a_row_of_a_thousand(self, kernels, n, first):
        drive.sweep(kernels, "warp", n, "rs", 1, True, first)

    # of 99 KiB of shared memory a block, as sm_86 has: 1,000 elements have a block of their own, 600 share one of two
    @pytest.mark.parametrize("n", [600, 1000])
    def test_fewer_warps_share_a_block_where_memory_is_short(self, kernels, n):
        short = drive.Kernels(kernels, "warp", 99 * 1024)
        compare.compare_rank(short, n, "float32", 1.0, True, names=["random", "ties", "masked"])
        compare.compare_sort(short, n, "float32", 1.0, names=["random", "ties", "masked"])

    @pytest.mark.parametrize("n, first", settings(BLOCK_SIZES, 1))
    def test_one_block_a_row(self, kernels, n, first):
        drive.sweep(kernels, "block", n, "rsp", 1, True, first)

    @pytest.mark.parametrize("n, first", settings(LONG_SIZES, 2, 5))
    def test_rows_that_go_through_workspace(self, kernels, n, first):
        drive.sweep(kernels, "long", n, "rs", 2 if n < 1000 else 1, True, first)

    # all rows and twice the settings
    @pytest.mark.slow
    @pytest.mark.parametrize("schedule", ["warp", "block", "long"])
    @pytest.mark.parametrize("n, first", settings([129, 257, 1025], 4))
    def test_all_rows_in_every_schedule(self, kernels, schedule, n, first):
        drive.sweep(kernels, schedule, n, "rsp", 4, False, first)

    def test_correlations_of_rows_that_go_through_workspace(self, kernels):
        drive.sweep(kernels, "long", 65, "p", 2, True)

    # a warp ranks each side, without the elements that are absent in the other
    @pytest.mark.parametrize("n, first", settings([129, 600], 1, 2))
    def test_correlations_by_a_warp_a_side(self, kernels, n, first):
        drive.sweep(kernels, "warp", n, "p", 2, True, first)

    # sums of a short row are float64, and its ranks come from their differences
    @pytest.mark.parametrize("strength", [1e-9, 1e-4, 0.03])
    def test_a_short_row_of_almost_hard_ranks_is_right_to_half_a_unit(self, kernels, strength):
        x = np.exp(5 * np.random.default_rng(0).standard_normal((2, 1024))).astype(np.float32)
        x[1] = np.round(x[1])  # ties
        found = drive.Kernels(kernels, "warp").rank_rows(x, "float32", None, strength, False, False, False, False)[0]
        eps = np.full(2, strength)
        expected = np.stack([compare.oracle.rank_row(row, e, False, False)[0] for row, e in zip(x, eps, strict=True)])
        assert (np.abs(found - expected) <= 0.502 * np.spacing(expected.astype(np.float32))).all()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_correlations_with_wider_rows_are_those_of_equally_wide_ones(self, kernels, dtype):
        x, storage, _ = rows.matrix(65, dtype, 0, ["random", "ties", "masked"])
        y = np.random.default_rng(1).standard_normal(x.shape)
        found = [
            drive.Kernels(kernels, "long").spearman_rows(side, y, name, 0.1, False, False, False, True, True, wide=True)
            for side, name in ((storage, dtype), (x.astype(np.float64), "float64"))
        ]
        assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))

    # beyond a block's registers: 256 threads of 16 keys, 512 of 24
    @pytest.mark.slow
    @pytest.mark.parametrize("n, first", settings([2049, 4096, 4097, 9000], 1))
    def test_one_block_a_long_row(self, kernels, n, first):
        drive.sweep(kernels, "auto", n, "rsp", 2, True, first)

    @pytest.mark.slow
    @pytest.mark.parametrize("strength", [1e-9, 1e-4, 0.3])
    def test_one_block_a_row_with_its_sums_outside(self, kernels, strength):
        compare.compare_rank(drive.Kernels(kernels, "big"), 12289, "float32", strength, names=["random", "nan", "ties"])

    # gaps far beyond the strength: prefix sums near m^3 / 2, and blocks of two that they must still decide
    def test_a_vocabulary_of_almost_hard_ranks(self, kernels):
        x = np.exp(5 * np.random.default_rng(0).standard_normal((1, 131072))).astype(np.float32)
        found = drive.Kernels(kernels, "long").rank_rows(x, "float32", None, 1e-9, False, False, False, False)[0]
        # the NumPy oracle's sums start at the largest element, 1e18 eps away: even long double is too short for it
        expected = kd.soft_rank(torch.from_numpy(x).double(), "l2", 1e-9, backend="torch").numpy()
        assert (np.abs(found - expected) <= np.spacing(expected.astype(np.float32))).all()

    # which rows of a float32 batch hold half values is found on the device: those count, the others are sorted
    @pytest.mark.parametrize("n, strength, kl, descending", [(1027, 0.01, False, False), (67, 0.3, True, True)])
    def test_long_float32_rows_that_hold_half_values_are_counted_row_by_row(self, kernels, n, strength, kl, descending):
        data, sorted_rows = rows.upcast(n)
        kernels.sorted_segments()
        long = drive.Kernels(kernels, "long")
        compare.compare_rank(long, n, "float32", strength, kl=kl, descending=descending, data=data)
        assert kernels.sorted_segments() == sorted_rows

    # 99 KiB of shared memory a block (sm_86, sm_89): less than a half of the codes needs
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_long_rows_are_sorted_where_the_bins_do_not_fit(self, kernels, dtype):
        x, _, names = rows.matrix(67, dtype, 0, drive.FEW)
        kernels.sorted_segments()
        compare.compare_rank(drive.Kernels(kernels, "long", 99 * 1024), 67, dtype, 0.1, names=names)
        with_elements = [i for i, row in enumerate(x) if not np.isnan(row).any() and (row > -np.inf).any()]
        assert kernels.sorted_segments() == with_elements

    def test_a_count_of_equal_elements_may_exceed_sixteen_bits(self, kernels):
        data, sorted_rows = rows.upcast(70001, names=["one value", "float32"])
        kernels.sorted_segments()
        compare.compare_rank(drive.Kernels(kernels), 70001, "float32", 1e-3, data=data)
        assert kernels.sorted_segments() == sorted_rows

    # float32 is sorted, the half formats count; 65,537: more elements than codes
    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("strength", [1e-9, 1e-3, 1.0])
    def test_a_vocabulary(self, kernels, dtype, strength):
        names = ["random", "nan", "masked", "clusters"]
        compare.compare_rank(drive.Kernels(kernels), 65537, dtype, strength, names=names)


class TestSanitizers:
    @pytest.mark.parametrize("variant", ["address", "thread"])
    def test_the_emulation_itself_is_clean(self, variant):
        assert_clean(sanitized(variant, "clean", "primitives", "primitives_with_early_exits"))

    def test_thread_sanitizer_names_the_line_of_a_missing_syncthreads(self):
        done = sanitized("thread", "no_barrier")
        assert done.returncode == FOUND, done.stderr[-3000:]
        assert "data race" in done.stderr
        lines = map(int, re.findall(r"planted\.h:(\d+)", done.stderr))
        assert set(lines) & set(range(planted_line("race"), planted_line("race") + 3))

    @pytest.mark.parametrize("barrier, schedule", [("__syncthreads();", "block"), ("__syncwarp();", "warp")])
    def test_thread_sanitizer_misses_the_barriers_of_the_ranking_kernels(self, barrier, schedule):
        """All of them go through one line, Group::sync."""
        source = (SIMT.parent.parent / "csrc" / "common" / "group.cuh").read_text().splitlines()
        (line,) = (i for i, text in enumerate(source, 1) if text.strip() == barrier)
        done = sanitized("thread", f"skip=group.cuh:{line}", f"sweep:{schedule}:40:r:1:few:0")
        assert done.returncode == FOUND and "data race" in done.stderr, done.stderr[-3000:]

    def test_address_sanitizer_names_the_line_of_a_write_past_shared_memory(self):
        done = sanitized("address", "out_of_bounds")
        assert done.returncode == FOUND, done.stderr[-3000:]
        assert "heap-buffer-overflow" in done.stderr
        assert f"planted.h:{planted_line('out of bounds')}" in done.stderr

    # threads that share a row in every way they can: SCHEDULE:N:OPS:COUNT:ROWS:FIRST
    SETTINGS = [
        "sweep:warp:33:rsp:2:few:0",
        "sweep:warp:130:r:1:few:1",
        "sweep:block:40:rs:1:few:0",
        "sweep:block:40:p:1:few:1",
        "sweep:long:70:rp:1:few:1",
    ]

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_ranking_kernels_stay_within_their_memory_and_have_no_undefined_behaviour(self, setting):
        assert_clean(sanitized("address", setting))

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_ranking_kernels_have_no_data_race(self, setting):
        assert_clean(sanitized("thread", setting))

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", ["address", "thread"])
    @pytest.mark.parametrize("setting", ["sweep:auto:1025:rs:1:few:0", "sweep:long:1025:rs:2:few:1"])
    def test_longer_rows_are_clean_too(self, variant, setting):
        assert_clean(sanitized(variant, setting, timeout=600))
