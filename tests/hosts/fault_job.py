"""A patched engine whose shrink breaks while it serves: what does the caller of vLLM see? Writes what happened.

python tests/hosts/fault_job.py job.json result.json
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine_job import Job, build_engine, generate, inspect_worker


def inject(worker) -> str:
    """Runs in the worker: from now on the launch of a kernel, or what stands for it on the CPU, raises."""
    import torch

    import lora_ops.reference

    def broken(*args, **kwargs):
        raise RuntimeError("injected fault")

    if torch.cuda.is_available():
        import lora_ops.kernels.shrink
        from ops_patches.recording import Replay

        lora_ops.kernels.shrink.shrink = broken  # of batches of a new form
        Replay.__call__ = broken  # of others
    else:
        lora_ops.reference.lora_linear = broken
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main(job: Job) -> dict:
    llm = build_engine(job)
    before = generate(llm, job)
    (worker,) = llm.collective_rpc(inspect_worker)
    (device,) = llm.collective_rpc(inject)
    try:
        generate(llm, job)
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    if not job.own_process:  # a worker of its own is gone with its engine
        worker = inspect_worker(llm.llm_engine.model_executor.driver_worker.worker)
    return {"device": device, "before": before, "error": error, "worker": worker}


if __name__ == "__main__":
    result = main(Job(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # what a dead engine leaves behind need not be taken down in order
