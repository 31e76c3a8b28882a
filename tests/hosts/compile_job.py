"""A patched engine on the CPU that torch.compile traces as on a GPU: LoRA beside the GEMM, artifacts kept by vLLM.

python tests/hosts/compile_job.py job.json result.json
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine_job import Job, run


def compile_on_the_cpu() -> None:
    """vLLM's CPU platform turns torch.compile off where there is LoRA: turn it on again."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check_and_update_config = CpuPlatform.check_and_update_config

    def compiled(vllm_config) -> None:
        check_and_update_config(vllm_config)
        config = vllm_config.compilation_config
        config.mode, config.backend, config.compile_sizes = CompilationMode.VLLM_COMPILE, "inductor", []

    CpuPlatform.check_and_update_config = staticmethod(compiled)
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # looks for ops that the CPU build lacks


def run_lora_beside() -> None:
    """The table's row of CUDA, for our CPU class."""
    from vllm.lora.layers.base import BaseLayerWithLoRA

    from ops_patches import vllm_lora, vllm_punica_cpu, vllm_punica_gpu

    vllm_punica_gpu.LoraOpsPunicaWrapperGPU = vllm_punica_cpu.LoraOpsPunicaWrapperCPU
    BaseLayerWithLoRA.set_mapping = vllm_lora._run_lora_beside(BaseLayerWithLoRA.set_mapping)


def main(job: Job) -> dict:
    compile_on_the_cpu()
    run_lora_beside()
    result = run(job)

    from vllm.compilation.counter import compilation_counter

    return result | {"compilation": asdict(compilation_counter)}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(Job(**json.loads(Path(sys.argv[1]).read_text())))))
