"""The whole life of a patch, on a host made of stub modules."""

import contextlib
import gc
import importlib.metadata
import logging
import os
import runpy
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ops_patches import engine, state, vllm_lora
from ops_patches.engine import Contract, Patch, PatchError, PatchSet

ENV, ALLOWLIST = "STUB_OPS", "STUB_PLUGINS"
VERSION = ">=1.0,<2.0"


@pytest.fixture
def host(monkeypatch, tmp_path):
    """stubhost 1.5: module stubhost.core, and stubhost.user that binds core.scale by name."""
    core, user = types.ModuleType("stubhost.core"), types.ModuleType("stubhost.user")

    def scale(x, factor=2, *, bias=0):
        return x * factor + bias

    class Base:
        @classmethod
        def wrapper(cls):
            return f"{cls.__name__}:host"

        def both(self):
            return "base"

    class Platform(Base):
        @staticmethod
        def device(index):
            return f"host:{index}"

        def run(self, x, **kwargs):
            self.last = x
            return x

    @dataclass
    class Mapping:
        tokens: tuple
        prompts: tuple = ()

    class Engine:
        pass

    core.scale = user.scale = scale
    core.current, core.Platform, core.Base, core.Mapping, core.Engine = Platform(), Platform, Base, Mapping, Engine
    for module in (types.ModuleType("stubhost"), core, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "status"))
    monkeypatch.setattr(state, "_providers", {})
    monkeypatch.setattr(state, "_last", float("-inf"))
    for name in (ENV, ALLOWLIST):
        monkeypatch.delenv(name, raising=False)
    installed = {"stubhost": "1.5"}

    def distribution(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return types.SimpleNamespace(version=installed[name], locate_file=lambda path: f"/{name}/{path}")

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [types.SimpleNamespace(name="ours")])
    return types.SimpleNamespace(core=core, user=user, installed=installed)


def add_one(original):
    return lambda *args, **kwargs: original(*args, **kwargs) + 1


def say_ours(original):
    return lambda *args: original(*args).replace("host", "ours")


SCALE = Patch(
    target="stubhost.core:scale",
    signature="(x, factor=2, *, bias=0)",
    versions=VERSION,
    replacement=add_one,
    why="test",
    obsolete_when="never",
    also_bound_in=("stubhost.user:scale",),
)
WRAPPER = replace(
    SCALE,
    target="stubhost.core:current.__class__.wrapper",
    signature="(cls)",
    replacement=say_ours,
    also_bound_in=(),
)
DEVICE = replace(WRAPPER, target="stubhost.core:Platform.device", signature="(index)")


def patch_set(*rows, **kwargs):
    defaults = {
        "name": "stubhost",
        "hosts": {"stubhost": VERSION, "stubhost-cpu": ">=1.2,<1.4"},
        "env": ENV,
        "entry_point": ("stub.plugins", "ours"),
        "allowlist": ALLOWLIST,
        "platform": lambda: "cpu",
        "patches": rows or (SCALE, replace(WRAPPER, platform="cpu"), DEVICE),
    }
    return PatchSet(**(defaults | kwargs))


def assert_untouched(host):
    assert host.core.scale is host.user.scale
    assert host.core.scale(3) == 6
    assert host.core.current.wrapper() == "Platform:host"
    assert "wrapper" not in vars(host.core.Platform)
    assert host.core.Platform.device(1) == "host:1"
    assert isinstance(vars(host.core.Platform)["device"], staticmethod)
    assert ENV not in os.environ


def refusal(patches, caplog):
    """The one warning of a refused patch, which must leave the patch set unpatched."""
    caplog.clear()
    handle = patches.patch()
    assert not handle.applied
    assert not patches.is_patched
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for reason in handle.reasons:
        assert reason in record.getMessage()
    with pytest.raises(PatchError) as error:
        patches.patch(strict=True)
    for reason in handle.reasons:
        assert reason in str(error.value)
    assert patches.status()["reasons"] == list(handle.reasons) == patches.verify()
    return handle.reasons


# The life of a patch


def test_patch_replaces_every_binding_and_unpatch_restores_it(host):
    patches = patch_set()
    originals = host.core.scale, vars(host.core.Platform)["device"]
    assert patches.patch().applied
    assert patches.is_patched
    assert host.core.scale(3, bias=1) == 8
    assert host.user.scale is host.core.scale
    assert host.core.current.wrapper() == "Platform:ours"
    assert host.core.Base().wrapper() == "Base:host"
    assert host.core.Platform.device(1) == host.core.current.device(1) == "ours:1"
    patches.unpatch()
    assert not patches.is_patched
    assert_untouched(host)
    assert (host.core.scale, vars(host.core.Platform)["device"]) == originals


def test_the_replacement_is_marked_and_leads_to_the_original(host):
    original = host.core.scale
    with patch_set().patch():
        assert host.core.scale.__wrapped__ is original
        assert getattr(host.core.scale, engine.MARKER) == SCALE.target
        assert host.core.scale.__name__ == "scale"


def test_patch_and_unpatch_are_idempotent(host):
    patches = patch_set()
    patches.unpatch()
    assert_untouched(host)
    assert patches.patch().applied
    again = patches.patch()
    assert not again.applied
    assert again.reasons == ()
    assert host.core.scale(3) == 7
    patches.unpatch()
    patches.unpatch()
    assert_untouched(host)


@pytest.mark.parametrize(
    ("before", "patched"),
    [(None, "LORA_OPS_,MOE_OPS_"), ("AWS_,", "AWS_,LORA_OPS_,MOE_OPS_"), ("MOE_OPS_", "MOE_OPS_,LORA_OPS_")],
)
def test_the_host_copies_our_variables_to_other_machines(host, monkeypatch, before, patched):
    monkeypatch.delenv("STUB_COPIED", raising=False)
    if before is not None:
        monkeypatch.setenv("STUB_COPIED", before)
    with patch_set(copied="STUB_COPIED").patch():
        assert os.environ["STUB_COPIED"] == patched
    assert os.environ.get("STUB_COPIED") == (before and before.rstrip(","))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("before", [None, "AWS_", "MOE_OPS_"])
def test_sets_that_are_undone_in_any_order_leave_nothing_listed(host, monkeypatch, before, order):
    monkeypatch.delenv("STUB_COPIED", raising=False)
    if before is not None:
        monkeypatch.setenv("STUB_COPIED", before)
    sets = patch_set(SCALE, copied="STUB_COPIED"), patch_set(DEVICE, copied="STUB_COPIED", env="MOE_STUB")
    for patches in sets:
        patches.patch()
    listed = os.environ["STUB_COPIED"]
    sets[order[0]].unpatch()
    assert os.environ["STUB_COPIED"] == listed
    sets[order[1]].unpatch()
    assert os.environ.get("STUB_COPIED") == before


def test_patching_again_after_unpatching_works(host):
    patches = patch_set()
    for _ in range(2):
        with patches.patch():
            assert host.core.scale(3) == 7
        assert_untouched(host)


def test_the_context_manager_undoes_even_after_an_exception(host):
    with pytest.raises(ZeroDivisionError), patch_set().patch():
        assert host.core.scale(3) == 1 / 0
    assert_untouched(host)


def test_an_inner_context_leaves_an_outer_patch_alone(host):
    patches = patch_set()
    with patches.patch():
        with patches.patch():
            pass
        assert host.core.scale(3) == 7
    assert_untouched(host)


def test_an_exception_of_the_host_goes_through(host):
    with patch_set().patch(), pytest.raises(TypeError):
        host.core.scale()


def test_the_log_names_every_symbol(host, caplog):
    caplog.set_level(logging.INFO)
    patch_set().patch().patch_set.unpatch()
    assert f"patched stubhost 1.5 (4 targets) in pid {os.getpid()}" in caplog.text
    for target in (SCALE.target, "stubhost.user:scale", WRAPPER.target, DEVICE.target):
        assert target in caplog.text


def test_of_the_rows_of_a_target_the_one_for_the_version_is_applied(host):
    older = replace(SCALE, signature="(x)", versions=">=1.0,<1.4", also_bound_in=())
    patches = patch_set(older, replace(SCALE, versions=">=1.4,<2.0"))
    with patches.patch(strict=True):
        assert host.core.scale(3) == 7
        assert patches.status()["targets"] == {SCALE.target: 1}
    assert_untouched(host)
    patches = patch_set(older, replace(DEVICE, versions="<1.4"))
    assert [reason.partition(" is for ")[0] for reason in patches.verify()] == [
        "stubhost.core:scale (cpu)",
        "stubhost.core:Platform.device (cpu)",
    ]


def test_a_property_is_replaced_by_a_property(host):
    host.core.Platform.name = property(lambda self: "host")
    row = replace(WRAPPER, target="stubhost.core:Platform.name", signature="(self)")
    assert patch_set(replace(row, signature="(self, more)")).verify()
    with patch_set(row).patch(strict=True):
        assert host.core.current.name == "ours"
    assert host.core.current.name == "host"


def test_two_sets_of_one_host_have_a_status_each(host):
    first, second = patch_set(SCALE), patch_set(DEVICE, key="stubhost_more", entry_point=("stub.plugins", "more"))
    with first.patch(), second.patch():
        (process,) = state.processes()
    assert process["stubhost"]["targets"] == {SCALE.target: 0}
    assert process["stubhost_more"]["targets"] == {DEVICE.target: 0}


def test_rows_of_another_platform_are_left_out(host):
    other = replace(WRAPPER, platform="gpu", signature="(not, there)".replace("not", "nothing"))
    contract = Contract("stubhost.gpu:absent", VERSION, "test", platform="gpu")
    patches = patch_set(SCALE, replace(DEVICE, platform="cpu"), other, contracts=(contract,))
    with patches.patch(strict=True):
        assert host.core.current.wrapper() == "Platform:host"
        assert host.core.current.device(0) == "ours:0"


# What does not fit


MISFITS = [
    ("module", replace(SCALE, target="stubhost.gone:scale"), {}, "stubhost.gone"),
    ("attribute", replace(SCALE, target="stubhost.core:gone"), {}, "stubhost.core:gone is not there"),
    ("parent", replace(SCALE, target="stubhost.core:Gone.scale"), {}, "stubhost.core:Gone.scale is not there"),
    ("parameter name", replace(SCALE, signature="(y, factor=2, *, bias=0)"), {}, "expected (y, factor=2, *, bias=0)"),
    ("parameter kind", replace(SCALE, signature="(x, factor=2, bias=0)"), {}, "expected"),
    ("default", replace(SCALE, signature="(x, factor, *, bias=0)"), {}, "expected"),
    ("further parameter", replace(SCALE, signature="(x, factor=2, *, bias=0, **kwargs)"), {}, "expected"),
    ("no function", replace(SCALE, target="stubhost.core:current", also_bound_in=()), {}, "has no signature"),
    ("row's version", replace(SCALE, versions=">=1.6"), {}, "is for stubhost >=1.6, this is 1.5"),
    ("alias gone", replace(SCALE, also_bound_in=("stubhost.user:gone",)), {}, "stubhost.user:gone is not there"),
    ("alias differs", replace(SCALE, also_bound_in=("stubhost.core:Engine",)), {}, "core:Engine is not stubhost.core"),
    ("platform", replace(SCALE, platform="gpu"), {}, "no patch for the platform cpu, only for gpu"),
    ("platform raises", SCALE, {"platform": lambda: 1 / 0}, "ZeroDivisionError"),
]


@pytest.mark.parametrize(("row", "kwargs", "expected"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS])
def test_one_misfit_leaves_the_host_untouched(host, caplog, row, kwargs, expected):
    (reason,) = refusal(patch_set(DEVICE, row, replace(WRAPPER, platform=row.platform), **kwargs), caplog)
    assert expected in reason
    assert_untouched(host)


CONTRACTS = [
    (Contract("stubhost.core:Platform.run", VERSION, "t", signature="(self, x, **kwargs)", assigns=("last",)), None),
    (Contract("stubhost.core:Platform.run", VERSION, "t", signature="(self, x)"), "expected (self, x)"),
    (Contract("stubhost.core:Platform.run", VERSION, "t", assigns=("last", "first")), "does not set first"),
    (Contract("stubhost.core:Mapping", VERSION, "t", fields=("tokens", "prompts")), None),
    (Contract("stubhost.core:Mapping", VERSION, "t", fields=("tokens", "rank")), "has no rank"),
    (Contract("stubhost.core:Platform", VERSION, "t", fields=("run", "both")), None),
    (Contract("stubhost.core:Platform", VERSION, "t", fields=("run", "gone")), "has no gone"),
    (Contract("stubhost.core:gone", VERSION, "t"), "is not there"),
    (Contract("stubhost.core:gone", ">=1.6", "t"), None),
    (Contract("stubhost.core:gone", VERSION, "t", platform="gpu"), None),
]


@pytest.mark.parametrize(("contract", "expected"), CONTRACTS)
def test_contracts(host, caplog, contract, expected):
    patches = patch_set(contracts=(contract,))
    if expected is None:
        assert patches.verify() == []
        return
    (reason,) = refusal(patches, caplog)
    assert expected in reason
    assert_untouched(host)


def test_every_reason_is_listed(host, caplog):
    rows = [replace(SCALE, target=f"stubhost.core:gone{i}") for i in range(3)]
    contract = Contract("stubhost.core:gone3", VERSION, "test")
    reasons = refusal(patch_set(*rows, contracts=(contract,), platform=lambda: "cpu"), caplog)
    for name in ("gone0", "gone1", "gone2", "gone3"):
        assert any(f"stubhost.core:{name} is not there" in reason for reason in reasons)
    assert_untouched(host)


@pytest.mark.parametrize("version", ["0.9", "2.0", "2.1rc1", "1.5rc1", "1.6.dev3+g12"])
def test_an_unknown_version_is_one_warning(host, caplog, version):
    host.installed["stubhost"] = version
    (reason,) = refusal(patch_set(), caplog)
    assert f"stubhost {version} is not one of the tested versions ({VERSION})" in reason
    assert_untouched(host)


def test_a_local_version_counts_as_its_release(host):
    host.installed["stubhost"] = "1.5+cu129"
    with patch_set().patch(strict=True):
        pass


def test_each_distribution_has_its_own_range(host, caplog):
    del host.installed["stubhost"]
    host.installed["stubhost-cpu"] = "1.5"
    (reason,) = refusal(patch_set(), caplog)
    assert "stubhost-cpu 1.5" in reason
    host.installed["stubhost-cpu"] = "1.3"
    with patch_set().patch(strict=True):
        pass


def test_a_host_that_is_not_installed(host, caplog):
    host.installed.clear()
    (reason,) = refusal(patch_set(), caplog)
    assert "stubhost is not installed (looked for stubhost, stubhost-cpu)" in reason
    assert_untouched(host)


def test_two_distributions_in_one_folder_are_refused(host, caplog, monkeypatch):
    host.installed["stubhost-cpu"] = "1.3"
    spec = types.SimpleNamespace(origin="/site/stubhost/__init__.py")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: spec)
    (reason,) = refusal(patch_set(), caplog)
    assert "uninstall all but one" in reason
    spec.origin = "/stubhost-cpu/stubhost/__init__.py"
    assert patch_set().installed() == ("stubhost-cpu", "1.3")


def test_a_setattr_that_fails_rolls_back(host, caplog):
    class Frozen(type):
        def __setattr__(cls, name, value):
            raise TypeError(f"{cls.__name__} is frozen")

    class Sealed(metaclass=Frozen):
        @staticmethod
        def device(index):
            return index

    host.core.Sealed = Sealed
    patches = patch_set(SCALE, WRAPPER, replace(DEVICE, target="stubhost.core:Sealed.device"))
    handle = patches.patch()
    assert "stubhost.core:Sealed.device cannot be replaced: TypeError: Sealed is frozen" in handle.reasons[0]
    assert not patches.is_patched
    assert_untouched(host)
    with pytest.raises(PatchError, match="Sealed is frozen"):
        patches.patch(strict=True)
    assert_untouched(host)


def test_a_factory_that_fails_rolls_back(host, caplog):
    def broken(original):
        raise ImportError("no kernels")

    handle = patch_set(SCALE, replace(DEVICE, replacement=broken)).patch()
    assert "ImportError: no kernels" in handle.reasons[0]
    assert_untouched(host)


def test_a_second_copy_of_the_library_is_refused(host, caplog):
    with patch_set().patch():
        reasons = patch_set(SCALE, platform=lambda: "cpu").verify()
        assert any("another copy of this library" in reason for reason in reasons)


# Undo that does not clobber


def test_unpatch_refuses_to_clobber_a_later_patch(host):
    patches = patch_set()
    patches.patch()
    ours = vars(host.core.Platform)["device"]

    def later(index):
        return "later"

    host.core.Platform.device = staticmethod(later)
    with pytest.raises(PatchError, match=r"stubhost.core:Platform.device is now .*later") as error:
        patches.unpatch()
    assert SCALE.target not in str(error.value)
    assert patches.is_patched
    assert host.core.Platform.device(1) == "later"
    assert host.core.scale(3) == 7  # nothing is undone
    assert os.environ[ENV] == "1"
    host.core.Platform.device = ours
    patches.unpatch()
    assert_untouched(host)


def test_unpatch_refuses_when_its_replacement_was_removed(host):
    patches = patch_set()
    patches.patch()
    del host.core.Platform.wrapper
    with pytest.raises(PatchError, match="wrapper is now"):
        patches.unpatch()
    assert host.core.scale(3) == 7


# The environment variable and the entry point


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_environment_variable_is_set_and_restored(host, monkeypatch, caplog, before):
    """With a warning where the next engine would be patched again by it."""
    if before is not None:
        monkeypatch.setenv(ENV, before)
    with patch_set().patch():
        assert os.environ[ENV] == "1"
    assert os.environ.get(ENV) == before
    assert [ENV in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        True for _ in range(before == "1")
    ]


@pytest.mark.parametrize("value", ["", "2", "true", "01", " 1"])
def test_a_bad_value_of_the_variable_is_loud(host, monkeypatch, value):
    monkeypatch.setenv(ENV, value)
    with pytest.raises(ValueError, match=ENV) as error:
        patch_set().patch()
    assert repr(value) in str(error.value)
    assert "set it to 1 (patch stubhost) or 0 (do not)" in str(error.value)
    assert host.core.scale(3) == 6


def test_workers_that_will_not_follow_are_told(host, monkeypatch, caplog):
    monkeypatch.setenv(ALLOWLIST, "other,another")
    with patch_set().patch() as handle:
        assert "STUB_PLUGINS=other,another leaves ours out" in caplog.text
        assert handle.patch_set.status()["unreached_children"]
    monkeypatch.setenv(ALLOWLIST, "other,ours")
    assert patch_set().unreached_children() == []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    with patch_set().patch():
        assert "ours is not registered in stub.plugins" in caplog.text


# Too late


@pytest.mark.parametrize("frozen", [False, True])
def test_patching_after_an_engine_was_built_is_refused(host, frozen):
    patches = patch_set(before=("stubhost.core:Engine", "stubhost.absent:Engine"))

    class Client(host.core.Engine):
        pass

    client = Client()
    client.itself = client  # freed only by a collection
    if frozen:
        gc.freeze()  # as vLLM does once its engine is up
    with pytest.raises(RuntimeError, match=rf"too late.*Client.*before the engine is built.*{ENV}=1"):
        patches.patch()
    assert_untouched(host)
    assert bool(gc.get_freeze_count()) == frozen
    del client
    with patches.patch():
        kept = host.core.Engine()
        assert not patches.patch().applied  # patched before it was built: fine
    del kept
    gc.collect()


# Status


def test_status_counts_what_fired_and_lists_what_did_not(host):
    seldom = replace(DEVICE, only_when="there is more than one device")
    patches = patch_set(SCALE, replace(WRAPPER, platform="cpu"), seldom)
    assert patches.status()["targets"] == {}
    assert patches.status()["reasons"] == [f"not asked for: neither by a call nor by {ENV}=1"]
    with patches.patch():
        host.core.scale(1)
        host.user.scale(1)
        status = patches.status()
    assert status["pid"] == os.getpid()
    assert (status["host"], status["version"], status["patched"]) == ("stubhost", "1.5", True)
    assert status["targets"] == {SCALE.target: 2, WRAPPER.target: 0, DEVICE.target: 0}
    assert status["never_fired"] == [WRAPPER.target]
    assert status["reasons"] == []
    assert status["environment"][ENV] == "1"
    after = patches.status()
    assert (after["patched"], after["reasons"]) == (False, ["unpatched again"])
    assert after["targets"][SCALE.target] == 2
    with patches.patch():
        assert patches.status()["targets"][SCALE.target] == 0


def test_status_is_published(host):
    with patch_set().patch():
        (found,) = state.processes()
        assert found["stubhost"]["patched"]
    assert not state.processes()[0]["stubhost"]["patched"]


def test_a_refused_process_publishes_why(host):
    host.installed["stubhost"] = "9.9"
    patch_set().patch()
    assert "9.9" in state.processes()[0]["stubhost"]["reasons"][0]


def test_status_without_the_host(host):
    host.installed.clear()
    status = patch_set().status()
    assert (status["host"], status["version"], status["patched"]) == (None, None, False)


# vLLM's table


def test_the_entry_point_of_the_package_is_the_plugin():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert [point.load() for point in points if point.name == "lora_ops"] == [vllm_lora.plugin]


@pytest.mark.parametrize("value", [None, "0"])
def test_the_plugin_does_nothing_unless_asked(host, monkeypatch, value):
    monkeypatch.setattr(vllm_lora, "VLLM_LORA", patch_set())
    if value is not None:
        monkeypatch.setenv(ENV, value)
    vllm_lora.plugin()
    assert host.core.scale(3) == 6


def test_the_plugin_patches_when_asked(host, monkeypatch):
    monkeypatch.setattr(vllm_lora, "VLLM_LORA", patches := patch_set())
    monkeypatch.setenv(ENV, "1")
    vllm_lora.plugin()
    vllm_lora.plugin()  # vLLM may load it more than once
    assert host.core.scale(3) == 7
    patches.unpatch()
    assert os.environ[ENV] == "1"


def test_the_plugin_stops_the_host_on_a_bad_value(host, monkeypatch):
    monkeypatch.setattr(vllm_lora, "VLLM_LORA", patch_set())
    monkeypatch.setenv(ENV, "yes")
    with pytest.raises(ValueError, match="yes"):
        vllm_lora.plugin()


@pytest.mark.parametrize("misfit", ["version", "late"])
def test_the_plugin_only_warns_of_a_misfit(host, monkeypatch, caplog, misfit):
    monkeypatch.setattr(vllm_lora, "VLLM_LORA", patch_set(before=("stubhost.core:Engine",)))
    monkeypatch.setenv(ENV, "1")
    if misfit == "version":
        host.installed["stubhost"] = "9.9"
    engine_of_the_host = host.core.Engine() if misfit == "late" else None
    vllm_lora.plugin()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert host.core.scale(3) == 6
    del engine_of_the_host
    gc.collect()


def test_a_target_is_replaced_once_on_each_platform():
    for platform, count in {"cuda": 3, "cpu": 2}.items():
        targets = [row.target for row in vllm_lora.PATCHES if row.platform in ("", platform)]
        assert len(targets) == len(set(targets)) == count


def test_get_punica_wrapper_names_our_class_and_nothing_else(caplog):
    replacement = vllm_lora._name_instead("host.A", "ours.A")
    assert replacement(lambda cls: "host.A")(object) == "ours.A"
    assert caplog.records == []
    assert replacement(lambda cls: "host.PunicaWrapperXPU")(object) == "host.PunicaWrapperXPU"
    assert "object names host.PunicaWrapperXPU, not host.A" in caplog.text


def test_the_compile_hash_depends_on_the_host_and_on_our_sources(monkeypatch):
    compute_hash = vllm_lora._hash_our_sources(lambda self: self)
    ours = compute_hash("a")
    assert ours == compute_hash("a")
    assert len({"a", ours, compute_hash("b")}) == 3
    monkeypatch.setattr(vllm_lora, "sources_hash", lambda: "changed")
    assert compute_hash("a") != ours


@pytest.mark.parametrize("source", ["lora_ops/kernels/shrink.py", "ops_configs/store.py", "ops_patches/vllm_punica.py"])
def test_the_sources_hash_sees_every_source(tmp_path, monkeypatch, source):
    """Constants of the configs, such as SMALL_BATCH, are in traced graphs, too."""
    for package in ("lora_ops", "ops_configs", "ops_patches"):
        (tmp_path / package / "kernels").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
    find = types.SimpleNamespace
    monkeypatch.setattr(
        vllm_lora.importlib.util, "find_spec", lambda name: find(origin=str(tmp_path / name / "__init__.py"))
    )
    hashes = []
    for text in ("a = 1", "a = 2", "a = 2"):
        (tmp_path / source).write_text(text)
        hashes.append(vllm_lora.sources_hash.__wrapped__())
    assert hashes[0] != hashes[1] == hashes[2]


PATCH_TABLE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "patch_table.py"))


def test_the_readme_shows_the_tables_of_today():
    readme = PATCH_TABLE["README"].read_text()
    assert PATCH_TABLE["with_tables"](readme) == readme, "run python scripts/patch_table.py --write"


def test_the_tables_of_the_readme_show_every_host_and_row():
    tables = PATCH_TABLE["tables"]()
    lines = [line for line in tables.splitlines() if line]
    expected = 4
    for door, patches in PATCH_TABLE["SETS"].items():
        for name, versions in patches.hosts.items():
            assert f"| {door} | `{name}` | `{versions}` |" in lines
        for row in patches.patches:
            (line,) = [x for x in lines if x.startswith(f"| {door} | `{row.target}` | {row.platform or 'any'} |")]
            assert f"`{row.versions}`" in line
            assert f"| {row.why} | {row.obsolete_when} |" in line
        expected += len(patches.hosts) + len({(row.target, row.platform) for row in patches.patches})
    assert len(lines) == expected


def test_the_tables_go_between_the_markers():
    begin, end, with_tables = (PATCH_TABLE[name] for name in ("BEGIN", "END", "with_tables"))
    text = with_tables(f"before\n{begin}\nold\n{end}\nafter\n")
    assert text == f"before\n{begin}\n{PATCH_TABLE['tables']()}\n{end}\nafter\n"
    assert with_tables(text) == text
    for broken in ("no markers", f"{end} {begin}", f"{begin} {begin} {end}"):
        with pytest.raises(ValueError, match="there must be one"):
            with_tables(broken)


CHILD = """
import sys, types
from importlib import metadata
module = types.ModuleType("stubhost")
module.scale = lambda x: x
sys.modules["stubhost"] = module
from ops_patches import vllm_lora
from ops_patches.engine import Patch, PatchSet
row = Patch("stubhost:scale", "(x)", ">=1.0", lambda original: lambda x: x + 1, "test", "never", platform="cpu")
metadata.distribution = lambda name: types.SimpleNamespace(version="1.5")
vllm_lora.VLLM_LORA = PatchSet("stubhost", {"stubhost": ">=1.0"}, "STUB_OPS", ("vllm.general_plugins", "lora_ops"),
                               "STUB_PLUGINS", lambda: "cpu", (row,))
(point,) = [p for p in metadata.entry_points(group="vllm.general_plugins") if p.name == "lora_ops"]
point.load()()
print(module.scale(3))
"""


@pytest.mark.parametrize(("patched", "value"), [(True, "4"), (False, "3")])
def test_a_child_process_follows_through_the_entry_point_and_is_seen_in_its_log(host, patched, value):
    with patch_set().patch() if patched else contextlib.nullcontext():
        child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert child.stdout == f"{value}\n"
    assert ("lora_ops: patched stubhost 1.5 (1 targets) in pid" in child.stderr) == patched


def test_the_front_doors_import_nothing_heavy():
    code = (
        "import sys, lora_ops; lora_ops.patch_vllm, lora_ops.unpatch_vllm; lora_ops.status;"
        "assert not {'torch', 'triton', 'vllm', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import lora_ops

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lora_ops.no_such_name
    assert "patch_vllm" in dir(lora_ops)
