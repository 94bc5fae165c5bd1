# SPDX-License-Identifier: Apache-2.0
"""Losses built from the configurations of torchdistill and MMRazor. Where these are not installed, as in our own test
environment (torchdistill brings a torchvision that must match torch's build, MMRazor brings mmcv), a small copy of the
part of their interface that is used stands in their place."""

import importlib.util
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kdkernels as kd
from kdkernels import losses
from kdkernels.compat import mmrazor, mmrazor_losses, torchdistill, torchdistill_losses
from kdkernels.compat.names import NAMES

OPTIONS = {  # of the constructors that need some
    "CKALoss": {"rows": "gap", "weight": 2.0},
    "NystromTransferLoss": {"num_landmarks": 6},
    "RdimKDLoss": {"channels": 10, "k": 4, "variant": "R", "seed": 0, "weight": 0.5},
}
LEVELS = ("FSPLoss",)  # compare pairs of levels: a list is needed


def module(name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


@pytest.fixture
def registry(monkeypatch):
    """torchdistill's: a decorator with a key, and a lookup that calls what was registered with the kwargs."""
    if importlib.util.find_spec("torchdistill") is None:
        known = {}

        def register_mid_level_loss(arg=None, **kwargs):
            def register(made):
                known[kwargs.get("key") or made.__name__] = made
                return made

            return register(arg) if callable(arg) else register

        def get_mid_level_loss(config, wrapper=None):
            assert not wrapper
            return known[config["key"]](**config["kwargs"])

        parts = {"register_mid_level_loss": register_mid_level_loss, "get_mid_level_loss": get_mid_level_loss}
        monkeypatch.setitem(sys.modules, "torchdistill", module("torchdistill"))
        own = module("torchdistill.losses.mid_level")
        monkeypatch.setitem(sys.modules, "torchdistill.losses", module("torchdistill.losses", mid_level=own))
        monkeypatch.setitem(
            sys.modules, "torchdistill.losses.registry", module("torchdistill.losses.registry", **parts)
        )
    torchdistill.register()
    torchdistill.register()
    from torchdistill.losses import registry

    return registry


class Models:
    """MMEngine's Registry: a name can be taken once, dots name scopes, build pops the type."""

    def __init__(self):
        self.known = {}

    def register_module(self, name=None, force=False, module=None):
        assert inspect.isclass(module) and "." not in name
        if not force and name in self.known:
            raise KeyError(f"{name} is already registered")
        self.known[name] = module
        return module

    def build(self, config):
        arguments = dict(config)
        return self.known[arguments.pop("type")](**arguments)


@pytest.fixture
def models(monkeypatch):
    if importlib.util.find_spec("mmrazor") is None:
        monkeypatch.setitem(sys.modules, "mmrazor", module("mmrazor"))
        monkeypatch.setitem(sys.modules, "mmrazor.models", module("mmrazor.models"))
        monkeypatch.setitem(sys.modules, "mmrazor.models.losses", module("mmrazor.models.losses"))
        monkeypatch.setitem(sys.modules, "mmrazor.registry", module("mmrazor.registry", MODELS=Models()))
    mmrazor.register()
    mmrazor.register()
    from mmrazor.registry import MODELS

    return MODELS


def what(name):
    """What the loss compares, as its arguments are called: logits or features."""
    parameters = inspect.signature(getattr(losses, name).forward).parameters
    return "logits" if "student_logits" in parameters else "features"


def recorded():
    """What hooks on two networks recorded, a batch of 16: two layers and the logits."""
    shapes = {"layer1": (16, 10, 16, 32), "layer2": (16, 10, 16, 32), "fc": (16, 10)}
    return [{path: {"output": torch.randn(shape)} for path, shape in shapes.items()} for _ in range(2)]


def where(name):
    if what(name) == "logits":
        return {"path": "fc", "io": "output"}
    levels = [{"path": f"layer{i}", "io": "output"} for i in (1, 2)]
    return levels if name in LEVELS else levels[0]


def tensors(io_dict, found):
    if isinstance(found, list):
        return [tensors(io_dict, one) for one in found]
    return io_dict[found["path"]][found["io"]]


@pytest.fixture(params=NAMES)
def registered(request):
    torch.manual_seed(0)
    return request.param, NAMES[request.param]


def test_torchdistill_builds_every_loss_and_calls_it_with_what_its_hooks_recorded(registry, registered):
    key, name = registered
    student, teacher = recorded()
    labels = torch.arange(16) % 10
    arguments = {f"{side}_{what(name)}": where(name) for side in ("student", "teacher")}
    loss = registry.get_mid_level_loss({"key": key, "kwargs": {"arguments": arguments, **OPTIONS.get(name, {})}}, None)
    direct = getattr(losses, name)(**OPTIONS.get(name, {}))
    needs = {"labels": labels} if name == "DKDLoss" else {}
    expected = direct(tensors(student, where(name)), tensors(teacher, where(name)), **needs)
    assert loss(student, teacher, labels).equal(expected) and expected.shape == () and expected != 0
    assert repr(direct) in repr(loss) or name in repr(loss)


def test_mmrazor_builds_every_loss_and_calls_it_by_the_names_of_its_mapping(models, registered):
    type_, name = registered
    student, teacher = recorded()
    loss = models.build({"type": type_, **OPTIONS.get(name, {})})
    mapping = {
        f"student_{what(name)}": tensors(student, where(name)),
        f"teacher_{what(name)}": tensors(teacher, where(name)),
    }
    needs = {}
    if name in mmrazor.LABELLED:
        labels = torch.arange(16) % 10
        # the two forms in which MMRazor's neighbours keep a label
        mapping["data_samples"] = [
            SimpleNamespace(gt_label=SimpleNamespace(label=one[None]) if i % 2 else one[None])
            for i, one in enumerate(labels)
        ]
        needs = {"labels": labels}
    # what a ConfigurableDistiller checks before training
    assert set(mapping) <= set(inspect.signature(loss.forward).parameters)
    direct = getattr(losses, name)(**OPTIONS.get(name, {}))
    pair = list(mapping.values())[:2]
    assert loss(**mapping).equal(direct(*pair, **needs))


def test_replace_puts_losses_in_the_places_of_torchdistills_own(registry):
    registry.register_mid_level_loss(key="PKTLoss")(dict)
    registry.register_mid_level_loss(key="ATLoss")(dict)
    torchdistill.replace("ATLoss")
    config = {
        "key": "PKTLoss",
        "kwargs": {f"{s}_module_{w}": "fc" for s in ("student", "teacher") for w in ("path", "io")},
    }
    assert type(registry.get_mid_level_loss(config)) is dict
    assert registry.get_mid_level_loss({"key": "ATLoss", "kwargs": {"at_pairs": {}}})({}, {}) == 0
    with pytest.raises(ValueError, match="'SPKDLoss' is not replaced: give some of ATLoss, ChSimLoss"):
        torchdistill.replace("RKDLoss", "SPKDLoss")
    torchdistill.replace()
    assert type(registry.get_mid_level_loss(config)) is torchdistill_losses.PKTLoss


def test_replace_puts_losses_in_the_places_of_mmrazors_own(models):
    models.register_module(name="KLDivergence", force=True, module=dict)
    mmrazor.replace("DKDLoss")
    assert type(models.build({"type": "KLDivergence"})) is dict
    mmrazor.replace()
    assert type(models.build({"type": "KLDivergence"})) is mmrazor_losses.KLDivergence
    assert type(models.build({"type": "DKDLoss", "beta": 2.0})) is mmrazor_losses.DKDLoss


def test_every_loss_with_labels_in_its_call_takes_data_samples_in_mmrazor():
    for registered, name in NAMES.items():
        labels = inspect.signature(getattr(losses, name).forward).parameters.get("labels")
        positional = labels is not None and labels.kind is labels.POSITIONAL_OR_KEYWORD
        assert positional == (name in mmrazor.LABELLED), registered


def test_in_torchdistill_a_loss_takes_lists_of_levels_optional_arguments_targets_and_a_ramp():
    student, teacher = recorded()
    levels = [{"path": f"layer{i}", "io": "output"} for i in (1, 2)]
    head = {"path": "fc", "io": "output"}
    arguments = {"teacher_features": levels, "student_features": levels, "student_logits": head, "teacher_logits": head}
    loss = torchdistill.IODictLoss("RCKALoss", arguments, ramp=[0, 4], row_weight=3.0)
    values = [loss(student, teacher, None) for _ in range(5)]
    features = [[side[f"layer{i}"]["output"] for i in (1, 2)] for side in (student, teacher)]
    expected = kd.losses.RCKALoss(row_weight=3.0)(student["fc"]["output"], teacher["fc"]["output"], *features)
    torch.testing.assert_close(torch.stack(values), expected * torch.tensor([0, 0.25, 0.5, 0.75, 1]))


def test_torchdistill_configurations_that_do_not_fit_are_refused_when_they_are_read():
    head = {"path": "fc", "io": "output"}
    with pytest.raises(ValueError, match="loss is 'STKDLoss': give one of .*KDLoss"):
        torchdistill.IODictLoss("STKDLoss", {})
    for arguments in ({"student_logits": head}, {"student_logits": head, "teacher_logits": head, "labels": head}, {}):
        with pytest.raises(
            ValueError, match=r"arguments names .*: KDLoss takes \['student_logits', 'teacher_logits'\]"
        ):
            torchdistill.IODictLoss("KDLoss", arguments)
    with pytest.raises(TypeError, match="temperature"):
        torchdistill.IODictLoss("KDLoss", {"student_logits": head, "teacher_logits": head}, temperature=2.0)


def test_neither_library_is_imported_before_register_is_called(python):
    code = (
        "import sys; sys.modules['torchdistill'] = sys.modules['mmrazor'] = None\n"
        "from kdkernels.compat import mmrazor, torchdistill\n"
        "for module in (mmrazor, torchdistill):\n"
        "    for call in (module.register, module.replace):\n"
        "        try: call()\n"
        "        except ImportError: continue\n"
        "        raise AssertionError\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_in_torchdistill_a_loss_follows_the_tensors_to_their_device():
    head = {"path": "fc", "io": "output"}
    loss = torchdistill.IODictLoss("DISTLoss", {"student_logits": head, "teacher_logits": head}, ramp=(0, 1))
    side = {"fc": {"output": torch.randn(16, 10, device="meta")}}
    assert loss(side, side).device.type == "meta"
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}
