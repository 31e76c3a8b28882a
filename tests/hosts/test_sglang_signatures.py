"""SGLang's patch table against real SGLang: the sources of the oldest, a middle and the newest supported version.

The sources are those that scripts/fetch_host_sources.py unpacks. They are read with ast, and the oldest is imported in
a process and its spawned child, to see that both patch themselves.
"""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ops_patches import engine, sglang_moe
from ops_patches.sglang_moe import FUSED_MOE, SGLANG_MOE

from .test_vllm_signatures import FETCH, calls, definition, names_of, signature_of, unpacked, version_of

pytestmark = pytest.mark.host

TREES = [f"sglang-{version}" for version in FETCH["HOSTS"]["sglang"]]
DEFINED_IN = {"sglang.srt.batch_invariant_ops": "sglang.srt.batch_invariant_ops.batch_invariant_ops"}
DEFINED_IN["sglang.srt.distributed"] = "sglang.srt.distributed.parallel_state"


@pytest.fixture(params=TREES)
def tree(request) -> Path:
    return unpacked(request.param)


def in_sources(target: str) -> str:
    module, _, path = target.partition(":")
    return f"{DEFINED_IN.get(module, module)}:{path}"


def rows(tree: Path, table: tuple) -> list:
    return [row for row in table if engine._within(version_of(tree), row.versions)]


def test_every_tree_is_a_tested_version(tree):
    assert engine._within(version_of(tree), SGLANG_MOE.hosts["sglang"])
    (metadata,) = tree.glob("*.dist-info/METADATA")
    assert re.search(rf"^Name: sglang\nVersion: {re.escape(version_of(tree))}$", metadata.read_text(), re.MULTILINE)


def test_every_patched_symbol_has_the_expected_signature(tree):
    checked = rows(tree, sglang_moe.PATCHES)
    assert [row.target for row in checked] == list(dict.fromkeys(row.target for row in sglang_moe.PATCHES))
    for row in checked:
        found = signature_of(definition(tree, row.target))
        assert engine.parameters(found) == engine.parameters(row.signature), row.target


@pytest.mark.parametrize("value", ["", "moe_ops", "other, moe_ops ,", "other", ",", " "])
def test_the_list_of_plugins_is_read_as_sglang_reads_it(tree, value, monkeypatch):
    """By its own lines, from the value of SGLANG_PLUGINS to the entry points that it skips."""
    loader = definition(tree, "sglang.srt.plugins:load_plugins_by_group")
    lines = [ast.unparse(node) for node in loader.body if "allowed_" in ast.unparse(node)][:3]
    assert lines[1] == "allowed_str = envs.SGLANG_PLUGINS.get()"
    found = {"allowed_str": value}
    exec("\n".join([lines[0], *lines[2:]]), found)
    allowed = found["allowed_set"]
    monkeypatch.setenv("SGLANG_PLUGINS", value)
    left_out = [reason for reason in SGLANG_MOE.unreached_children() if "leaves moe_ops out" in reason]
    assert bool(left_out) == (allowed is not None and "moe_ops" not in allowed)


def test_every_version_in_range_has_one_row_for_each_target():
    for minor in range(17, 24):
        targets = [row.target for row in sglang_moe.PATCHES if engine._within(f"0.5.{minor}", row.versions)]
        assert len(targets) == len(set(targets)) == 2


def test_every_contract_holds(tree):
    checked = rows(tree, sglang_moe.CONTRACTS)
    assert len(checked) == len(sglang_moe.CONTRACTS)
    for row in checked:
        node = definition(tree, in_sources(row.target))
        if row.signature:
            assert engine.parameters(signature_of(node)) == engine.parameters(row.signature), row.target
        assert set(row.fields) <= (names_of(node) if row.fields else set()), row.target


def test_our_arguments_are_those_of_sglang(tree):
    """Same names in the same order, so that positions mean the same."""
    theirs = [name for name, *_ in engine.parameters(signature_of(definition(tree, f"{FUSED_MOE}:fused_experts_impl")))]
    ours = [name for name, *_ in engine._parameters(sglang_moe.from_function)]
    assert ours[: len(theirs)] == theirs


def test_the_custom_ops_call_the_function_that_we_replace(tree):
    for name in ("inplace_fused_experts", "outplace_fused_experts"):
        node = definition(tree, f"{FUSED_MOE}:{name}")
        assert calls(node) == {"register_custom_op", "fused_experts_impl"}
    assert {"inplace_fused_experts", "outplace_fused_experts"} <= calls(definition(tree, f"{FUSED_MOE}:fused_experts"))


def test_nobody_binds_the_function_that_we_replace(tree):
    """`from ... import fused_experts_impl` at the top of a module would escape the patch."""
    for file in (tree / "sglang").rglob("*.py"):
        text = file.read_text()
        if "fused_experts_impl" in text:
            bound = [
                alias.name for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) for alias in node.names
            ]
            assert "fused_experts_impl" not in bound, file


def test_every_process_of_sglang_loads_the_plugins(tree):
    for target in ("entrypoints.engine:Engine.__init__", "managers.scheduler:run_scheduler_process"):
        assert "load_plugins" in calls(definition(tree, f"sglang.srt.{target}")), target
    plugins = (tree / "sglang/srt/plugins/__init__.py").read_text()
    assert f'"{SGLANG_MOE.entry_point[0]}"' in plugins
    assert f"envs.{SGLANG_MOE.allowlist}.get()" in plugins


def test_the_classes_of_a_live_engine_are_there(tree):
    for target in SGLANG_MOE.before:
        definition(tree, target)


# On imported sources

PROCESSES = """
import json, multiprocessing, os, sys
sys.path.insert(0, JOBS)

def load():
    import sglang_moe_job  # stands in for what SGLang wants beyond its sources
    import sglang.srt.plugins as plugins
    from ops_patches.sglang_moe import SGLANG_MOE
    plugins._plugins_loaded = False
    plugins.load_plugins()
    patched = SGLANG_MOE.is_patched
    SGLANG_MOE.unpatch()
    return patched

def child(queue):
    queue.put(load())

if __name__ == "__main__":
    seen = {}
    for value, allowed in (("", ""), ("0", ""), ("1", ""), ("1", "moe_ops"), ("1", "another"), ("yes", "")):
        os.environ |= {"MOE_OPS_SGLANG": value, "SGLANG_PLUGINS": allowed}
        for name in ("MOE_OPS_SGLANG", "SGLANG_PLUGINS"):
            if not os.environ[name]:
                del os.environ[name]
        seen[f"{value},{allowed}"] = load()
    os.environ.pop("MOE_OPS_SGLANG")
    import moe_ops
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with moe_ops.patch_sglang(strict=True):
        process = context.Process(target=child, args=(queue,))
        process.start()
        seen["child"] = queue.get(timeout=120)
        process.join()
    print(json.dumps(seen))
"""


@functools.cache
def processes(folder: Path) -> tuple[dict, str]:
    script = folder / "processes.py"
    script.write_text(PROCESSES.replace("JOBS", repr(str(Path(__file__).parent))))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MOE_OPS_", "SGLANG_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(unpacked(TREES[0])), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_sglang_loads_the_plugin_which_obeys_the_variable_and_children_follow(tmp_path):
    seen, log = processes(tmp_path)
    patched = {"1,", "1,moe_ops", "child"}
    assert seen == {name: name in patched for name in (",", "0,", "1,", "1,moe_ops", "1,another", "yes,", "child")}
    assert "MOE_OPS_SGLANG='yes' is not allowed: set it to 1 (patch sglang) or 0 (do not)" in log
