"""One vLLM engine in a process of its own: reads a job, generates, writes what came out and what ran.

    python benchmarks/engine_job.py job.json result.json

A job (see `Job`) names the model, the adapters and the requests; the result holds, per request, the token ids and
log-probs, and of the worker process the LoRA wrapper class in use and our counters. `run_job` does both ends from
another process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ops_patches import state

TOP_LOGPROBS = 5


@dataclass
class Job:
    """What to run. `patch`: "none", "call" (lora_ops.patch_vllm()) or "environment" (LORA_OPS_VLLM=1)."""

    model: str
    adapters: dict[str, str]
    requests: list[list]  # [prompt, adapter name or None]
    patch: str = "none"
    own_process: bool = False
    dtype: str = "float32"
    max_tokens: int = 16
    engine: dict = field(default_factory=dict)


def environment(job: Job) -> dict[str, str]:
    """The job's process environment: ours, made free of what an earlier patch left, with the core placed as asked."""
    env = dict(os.environ)
    env.pop("LORA_OPS_VLLM", None)
    if job.patch == "environment":
        env["LORA_OPS_VLLM"] = "1"
    env |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(job.own_process)),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc sends `inspect_worker` by pickle
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # FlashInfer compiles its sampler for minutes when it first starts on a machine; greedy requests need none of it.
    env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    return env


def run_job(job: Job, timeout: float = 600, env: dict[str, str] | None = None, script: str | Path = __file__) -> dict:
    """Run a job in its own process and return its result, with all that it printed as "output".

    `env` adds to the environment; another `script` takes the same two arguments as this file.

    Raises:
        RuntimeError: the process failed or took longer than `timeout` seconds; the message ends with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(json.dumps(asdict(job)))
        command = [sys.executable, str(script), str(job_path), str(result_path)]
        try:
            done = subprocess.run(
                command,
                env=environment(job) | (env or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"engine job took more than {timeout} s:\n{error.output}") from error
        if done.returncode or not result_path.exists():
            raise RuntimeError(f"engine job ended with {done.returncode}:\n{done.stdout}")
        return json.loads(result_path.read_text()) | {"output": done.stdout}


def inspect_worker(worker) -> dict:
    """Runs inside the worker process: its LoRA wrapper classes, and our status if our plugin was imported."""
    manager = worker.model_runner.lora_manager._adapter_manager
    ours = sys.modules.get("ops_patches.vllm_lora")
    return {
        "pid": os.getpid(),
        "wrappers": sorted(
            {f"{type(w).__module__}.{type(w).__qualname__}" for w in manager.punica_wrapper_mapping.values()}
        ),
        "status": ours.status() if ours else None,
    }


def generate(llm, job: Job) -> list[dict]:
    """Send all requests as one batch; greedy, with the log-probs of the best tokens."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True, logprobs=TOP_LOGPROBS)
    loras = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(job.adapters.items(), 1)}
    outputs = llm.generate(
        [prompt for prompt, _ in job.requests],
        params,
        lora_request=[loras.get(name) for _, name in job.requests],
        use_tqdm=False,
    )
    return [
        {
            "prompt": prompt,
            "adapter": name,
            "prompt_ids": list(output.prompt_token_ids),
            "tokens": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            # per position: {token id: log-prob} of the best tokens; ids as text, as JSON has them
            "logprobs": [
                {str(token): entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs
            ],
        }
        for (prompt, name), output in zip(job.requests, outputs, strict=True)
    ]


@dataclass(frozen=True)
class Agreement:
    """How far the same request got the same answer from two engines.

    equal: all tokens are the same. tokens: how many are, up to the first difference. tie: the first difference is a
    near-tie. logprob_error: largest difference of the sampled tokens' log-probs along the common prefix, NaN if any is.
    """

    equal: bool
    tokens: int
    tie: bool
    logprob_error: float


def compare(expected: dict, got: dict, tie: float = 0.0) -> Agreement:
    """Compare two results of `generate` for one request.

    Where the tokens part, the two still share the prefix, so that the expected engine's own log-probs tell a near-tie
    (the other engine's choice is within `tie` of the best) from a wrong answer.
    """
    errors = [0.0]
    for i, (a, b) in enumerate(zip(expected["tokens"], got["tokens"], strict=True)):
        best = expected["logprobs"][i]
        if a != b:
            return Agreement(False, i, best[str(a)] - best.get(str(b), float("-inf")) <= tie, float(np.max(errors)))
        errors.append(abs(best[str(a)] - got["logprobs"][i][str(a)]))
    return Agreement(True, len(expected["tokens"]), False, float(np.max(errors)))


def build_engine(job: Job):
    """The engine of a job; `job.engine` overrides its arguments."""
    from vllm import LLM

    options = {
        "model": job.model,
        "dtype": job.dtype,
        "enable_lora": True,
        # A slot to spare: vLLM's own CPU kernels read the last one for rows without adapter, so it must be empty.
        "max_loras": len(job.adapters) + 1,
        "max_lora_rank": 16,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "seed": 0,
    }
    return LLM(**(options | job.engine))


def published(worker: dict, timeout: float = 20 * state.INTERVAL_S) -> list[dict]:
    """The status files of all patched processes, once the worker has published its last step, or after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        processes = state.processes()
        counters = [process["vllm"]["counters"] for process in processes if process["pid"] == worker["pid"]]
        unpatched = not (worker["status"] and worker["status"]["patched"])
        if unpatched or counters == [worker["status"]["counters"]] or time.monotonic() > deadline:
            return processes
        time.sleep(state.INTERVAL_S / 10)


def run(job: Job) -> dict:
    """Patch as the job asks, build the engine, generate and look into the worker."""
    if job.patch == "call":
        import lora_ops

        lora_ops.patch_vllm()
    start = time.perf_counter()
    llm = build_engine(job)
    ready = time.perf_counter()
    requests = generate(llm, job)
    done = time.perf_counter()
    (worker,) = llm.collective_rpc(inspect_worker)
    processes = published(worker)

    import vllm

    return {
        "vllm": vllm.__version__,
        "pid": os.getpid(),
        "worker": worker,
        "processes": processes,
        "requests": requests,
        "start_s": ready - start,
        "generate_s": done - ready,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(Job(**json.loads(Path(sys.argv[1]).read_text())))))
