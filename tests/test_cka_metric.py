# SPDX-License-Identifier: Apache-2.0
"""The streaming metric: a ratio of sums, its standard error, its state, alone, in torchmetrics and over processes."""

import copy
import pickle
import warnings

import pytest
import torch
from ranked import needs_distributed

import kdkernels as kd
from kdkernels.analysis import metric as module


@pytest.fixture(params=["alone", "torchmetrics"])
def make(request, monkeypatch):
    """CKAMetric as it is without torchmetrics, and with it."""
    if request.param == "alone":
        monkeypatch.setattr(module, "_collected", lambda: None)
    else:
        pytest.importorskip("torchmetrics")
    return kd.CKAMetric


def stream(batches, n, p=12, q=9, seed=0, dtype=torch.float64):
    """(x, y) batches that share a part of their signal."""
    weights = torch.Generator().manual_seed(99)
    a, b = (torch.randn(6, width, generator=weights, dtype=torch.float64) for width in (p, q))
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    signal = draw(batches, n, 6)
    xs, ys = signal @ a + 2 * draw(batches, n, p), (signal @ b).relu() + 2 * draw(batches, n, q)
    return list(zip(xs.to(dtype), ys.to(dtype), strict=True))


def seen(metric, batches):
    for x, y in batches:
        metric.update(x, y)
    return metric


def hsics(batches, **how):
    one = lambda x, y: kd.hsic(x, y, backend="reference", **how).double()  # noqa: E731
    return torch.stack([torch.stack([one(x, y), one(x, x), one(y, y)]) for x, y in batches])


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_it_is_the_ratio_of_the_sums_over_batches_and_not_the_mean_of_ratios(make, kernel, unbiased):
    batches = [*stream(5, 16), *stream(1, 7, seed=1)]  # the last one is smaller
    found = seen(make(kernel=kernel, unbiased=unbiased), batches).compute()
    each = hsics(batches, kernel=kernel, unbiased=unbiased)
    a, b, c = each.sum(0)
    torch.testing.assert_close(found, a / (b * c).sqrt(), rtol=1e-9, atol=0)
    mean_of_ratios = (each[:, 0] / (each[:, 1] * each[:, 2]).sqrt()).mean()
    assert (found - mean_of_ratios).abs() > 1e-3


def test_the_standard_error_is_the_delta_method_over_batches(make):
    batches = stream(5, 16)
    a, b, c = hsics(batches).T
    value, error = seen(make(), batches).compute(return_error=True)
    moved = a / (b.sum() * c.sum()).sqrt() - value * (b / (2 * b.sum()) + c / (2 * c.sum()))
    torch.testing.assert_close(error, (moved.square().sum() * 5 / 4).sqrt(), rtol=1e-9, atol=0)


def test_the_standard_error_is_that_of_the_jackknife_to_first_order(make):
    batches = stream(200, 16)
    metric = seen(make(), batches)
    each = hsics(batches)
    without = each.sum(0) - each
    left_out = without[:, 0] / (without[:, 1] * without[:, 2]).sqrt()
    jackknife = ((left_out - left_out.mean()).square().sum() * 199 / 200).sqrt()
    torch.testing.assert_close(metric.standard_error(), jackknife, rtol=0.02, atol=0)
    value, error = metric.compute(return_error=True)
    assert value == metric.compute() and error == metric.standard_error()


def test_the_standard_error_is_the_scatter_of_repeated_measurements(make):
    found = [seen(make(), stream(25, 16, seed=s)).compute(return_error=True) for s in range(120)]
    values, errors = (torch.stack(side) for side in zip(*found, strict=True))
    # 120 draws: the scatter itself is known to 7 %
    assert 0.8 < errors.square().mean().sqrt() / values.std() < 1.25


def test_the_value_of_the_population_lies_within_the_error_as_often_as_it_says():
    """One and two standard errors: 68 % and 95 %, known to 2.1 % and 1 % from 500 streams of 25 batches of 16."""
    truth = kd.cka(*stream(1, 40_000, seed=1000)[0])
    x, y = (torch.stack(side) for side in zip(*stream(500 * 25, 16), strict=True))
    terms = module.stream.terms(kd.hsic(x, y), kd.hsic(x, x), kd.hsic(y, y)).unflatten(1, (500, 25)).sum(-1)
    apart = (module.stream.value(terms) - truth).abs() / module.stream.standard_error(terms, 25)
    assert 0.61 < (apart < 1).double().mean() < 0.75
    assert 0.91 < (apart < 2).double().mean() < 0.98
    # it is the metric's error
    value, error = seen(kd.CKAMetric(), list(zip(x[:25], y[:25], strict=True))).compute(return_error=True)
    torch.testing.assert_close((value - truth).abs() / error, apart[0], rtol=1e-7, atol=0)


def test_small_batches_estimate_the_value_of_all_data_within_the_error(make):
    batches = stream(150, 8)
    value, error = seen(make(), batches).compute(return_error=True)
    everything = kd.cka(*(torch.cat(side) for side in zip(*batches, strict=True)))
    assert error < 0.03
    assert abs(value - everything) < 3 * error
    biased = seen(make(unbiased=False), batches).compute()
    assert biased - everything > 5 * error  # what the unbiased estimator is for


def test_one_batch_has_a_value_but_no_error(make):
    ((x, y),) = stream(1, 32)
    value, error = seen(make(), [(x, y)]).compute(return_error=True)
    torch.testing.assert_close(value, kd.cka(x, y))
    assert error.isnan()


def test_equal_batches_have_no_error_and_a_constant_side_no_similarity(make):
    ((x, y),) = stream(1, 32)
    assert seen(make(), [(x, y)] * 4).standard_error() < 1e-7
    value, error = seen(make(), [(x, torch.ones(32, 3))] * 3).compute(return_error=True)
    assert value == 0 and error == 0


def test_calling_it_gives_the_value_of_the_batch_and_adds_it(make):
    metric, batches = make(), stream(3, 16)
    for x, y in batches:
        torch.testing.assert_close(metric(x, y), kd.cka(x, y), rtol=1e-9, atol=0)
    torch.testing.assert_close(metric.compute(), seen(make(), batches).compute())


def test_the_value_is_float32_until_a_batch_is_float64(make):
    metric = seen(make(), stream(2, 16, dtype=torch.bfloat16))
    assert metric.compute().dtype == torch.float32
    assert seen(metric, stream(1, 16)).compute().dtype == torch.float64


def test_reset_forgets_and_an_unseen_stream_raises(make):
    metric = seen(make(), stream(3, 16))
    metric.reset()
    with pytest.raises(ValueError, match="no batch of at least 4 rows was seen"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says so too
        metric.compute()
    fresh = seen(make(), stream(2, 16, seed=5)).compute()
    assert seen(metric, stream(2, 16, seed=5)).compute() == fresh


def test_parts_merge_to_the_whole(make):
    batches = stream(6, 16)
    whole, parts = seen(make(), batches), [seen(make(), batches[:2]), seen(make(), batches[2:])]
    parts[0].merge_state(parts[1])
    for found, expected in zip(parts[0].compute(True), whole.compute(True), strict=True):
        torch.testing.assert_close(found, expected)
    fresh = make()
    fresh.merge_state(whole.state_dict())
    torch.testing.assert_close(fresh.compute(), whole.compute())


@pytest.mark.parametrize("other", [{"kernel": "rbf"}, {"unbiased": False}])
def test_metrics_of_other_kernels_or_estimators_do_not_merge(make, other):
    with pytest.raises(ValueError, match="no common meaning"):
        make().merge_state(make(**other))
    with pytest.raises(ValueError, match="has no sums"):
        make().merge_state({"total": torch.zeros(3)})


def test_the_state_is_one_float64_tensor_whatever_is_done_to_the_model(make):
    metric = seen(make(), stream(4, 16))
    value = metric.compute()
    assert list(metric.state_dict()) == ["sums"] and metric.sums.shape == (11,)
    for moved in (metric.half().float(), metric.to("cpu", torch.float16), copy.deepcopy(metric)):
        assert moved.sums.dtype == torch.float64 and moved.compute() == value
    assert metric.to("meta").sums.device.type == "meta"
    loaded = make()
    loaded.load_state_dict(seen(make(), stream(4, 16)).state_dict())
    assert loaded.compute() == value


def test_it_survives_pickling(make):
    metric = seen(make(kernel=kd.RBF(2.0)), stream(4, 16))
    again = pickle.loads(pickle.dumps(metric))
    assert isinstance(again, kd.CKAMetric) and again.compute() == metric.compute()
    assert repr(again) == repr(metric) == "CKAMetric(kernel=RBF(sigma=(2.0,)), unbiased=True)"


def test_a_batch_that_is_too_small_is_left_out_with_one_warning(make):
    metric, batches = make(), stream(3, 16)
    seen(metric, batches)
    with pytest.warns(UserWarning, match="a batch of 3 rows and needs 4.*drop_last=True") as caught:
        for _ in range(3):
            metric.update(torch.randn(3, 12), torch.randn(3, 9))
        assert metric(torch.randn(2, 12), torch.randn(2, 9)).isnan()
    assert [w.filename for w in caught if "drop_last" in str(w.message)] == [__file__]
    assert metric.compute() == seen(make(), batches).compute()
    assert metric.sums[module.COUNT] == 3


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.randn(8, 3), torch.randn(7, 3), ValueError, "y has 7 rows, x has 8"),
        (torch.randn(8, 3, 2), torch.randn(8, 3), ValueError, r"x has shape \(8, 3, 2\): give \[n, p\]"),
        (torch.randn(8, 3), torch.ones(8, 3, dtype=torch.int64), TypeError, "y is torch.int64"),
        (torch.randn(8, 3, device="meta"), torch.randn(8, 3, device="meta"), ValueError, r"metric.to\('meta'\)"),
    ],
)
def test_a_wrong_batch_is_named_with_the_fix_and_leaves_the_state_alone(make, x, y, error, message):
    metric = make()
    with pytest.raises(error, match=message):
        metric.update(x, y)
    assert not metric.sums.any()


def test_a_torchmetrics_collection_takes_it():
    torchmetrics = pytest.importorskip("torchmetrics")
    collection = torchmetrics.MetricCollection({"linear": kd.CKAMetric(), "rbf": kd.CKAMetric(kernel="rbf")})
    batches = stream(4, 16)
    for x, y in batches[:2]:
        collection.update(x, y)
    for x, y in batches[2:]:
        assert collection(x, y).keys() == {"linear", "rbf"}
    found = collection.compute()
    for kernel in ("linear", "rbf"):
        assert found[kernel] == seen(kd.CKAMetric(kernel=kernel), batches).compute()
    collection.reset()
    assert not collection["rbf"].sums.any()


def test_torchmetrics_is_imported_when_a_metric_is_made_and_not_before(python):
    code = (
        "import sys, kdkernels as kd\n"
        "assert 'torchmetrics' not in sys.modules\n"
        "sys.modules['torchmetrics'] = None\n"  # as if it were broken
        "assert type(kd.CKAMetric()) is kd.CKAMetric\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


RANKS = """
import copy, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
sys.path.insert(0, "tests")
import kdkernels as kd
from kdkernels.analysis import metric as module
from test_cka_metric import seen, stream


def close(metric, batches):
    value, error = metric.compute(return_error=True)
    whole = module.stream.terms(*module_sums(batches)).sum(-1)
    torch.testing.assert_close(value, module.stream.value(whole), rtol=1e-12, atol=0)
    torch.testing.assert_close(error, module.stream.standard_error(whole, len(batches)), rtol=1e-9, atol=0)


def module_sums(batches):
    one = lambda x, y: kd.hsic(x, y).double()
    return torch.stack([torch.stack([one(x, y), one(x, x), one(y, y)]) for x, y in batches]).T


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    batches = stream(7, 16)
    both = [kd.CKAMetric(process_group=dist.group.WORLD)]
    module._collected = lambda: None
    both.append(kd.CKAMetric(process_group=dist.group.WORLD))
    assert type(both[1]) is kd.CKAMetric
    for metric in both:
        seen(metric, batches[:5] if rank == 0 else [])
        close(metric, batches[:5])
        seen(metric, batches[5:] if rank == 1 else [])
        close(metric, batches)
        assert metric.sums[module.COUNT] == (5, 2)[rank]  # its own state is left as it was
    for metric in both:
        metric.reset()
        try:
            metric.compute()
        except ValueError as error:
            assert "no batch of at least 4 rows" in str(error)
        else:
            raise AssertionError("an unseen stream has a value")
        copied = copy.deepcopy(metric)  # with its group
        for one in (metric, copied):
            seen(one, batches[rank :: 2])  # and goes on
            close(one, batches)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
@needs_distributed
def test_compute_adds_up_what_all_processes_saw_also_where_one_saw_nothing(python, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = python(str(script), str(tmp_path / "store"), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
