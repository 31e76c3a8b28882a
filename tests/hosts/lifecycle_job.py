"""In one process: a patched engine, then an unpatched one, then a patch that comes too late. Writes what happened.

python tests/hosts/lifecycle_job.py job.json result.json
"""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine_job import Job, build_engine, generate, inspect_worker


def serve(job: Job) -> tuple[dict, object]:
    """Build an engine and answer the job's requests; returns what came out, and the engine to keep it alive."""
    llm = build_engine(job)
    requests = generate(llm, job)
    (worker,) = llm.collective_rpc(inspect_worker)
    return {"requests": requests, "worker": worker}, llm


def main(job: Job) -> dict:
    """Run the life of a patch; `job.engine` is for the patched engine."""
    import lora_ops

    with lora_ops.patch_vllm() as handle:
        patched, llm = serve(job)
        applied = handle.applied
    environment_after = os.environ.get("LORA_OPS_VLLM")
    del llm
    gc.collect()
    unpatched, llm = serve(replace(job, engine={}))  # noqa: RUF059 (kept alive)
    try:
        lora_ops.patch_vllm()
        late = None
    except RuntimeError as error:
        late = str(error)

    import vllm

    return {
        "vllm": vllm.__version__,
        "applied": applied,
        "patched": patched,
        "environment_after": environment_after,
        "unpatched": unpatched,
        "late": late,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(Job(**json.loads(Path(sys.argv[1]).read_text())))))
