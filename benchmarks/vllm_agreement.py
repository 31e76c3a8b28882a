#!/usr/bin/env python3
"""A patched vLLM beside an unpatched one on the same random Llama and adapters: do they agree, and how fast are they?

    python benchmarks/vllm_agreement.py --variant reference base stock patched --compare --out DIR
    python benchmarks/vllm_agreement.py --tp 2 --fully-sharded --variant stock patched --compare --out DIR
    python benchmarks/vllm_agreement.py --model tiny --adapters 4 --requests 1 4 12 --eager \
        --variant reference base stock patched --compare --out DIR

Variants, each in processes of its own, whose results are saved in DIR: `stock` is vLLM as it is, `patched` runs with
LORA_OPS_VLLM=1, `base` has no LoRA, `reference` is transformers and peft in fp32 on the first requests. `--compare`
reads what is saved; it can be a command of its own. CUDA graphs and torch.compile are on unless --eager.

Random weights make greedy tokens part at near-ties, so log-probs are compared along the same prefix, in both phases:

    decode   each request is made to decode one token of its own again and again (allowed_token_ids); compared are the
             model's own log-probs of that token, taken before it is forced, and its best token
    prefill  the same of every token of a random prompt (prompt_logprobs)

for 1, 16, 64 and 256 requests at once, round robin over the adapters with every ninth request on none. The yardstick
is how far stock vLLM is off by itself: from the fp32 reference, and from the same requests in batches of other sizes
and in reversed order; the larger of the two. Patched and stock agree when the root mean square of their difference is
at most three times that (independent errors e make 1.4 e; the errors along one request are correlated), and when
patched is as near to fp32 as stock is, but for a quarter.

Exit status: 0 if every comparison holds, 1 if not.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from running import between, git_commit, make_results, now, positive, require
from serving_server import LORA_RANKS, lora_rank

ENGINES = ("base", "stock", "patched")
VARIANTS = ("reference", *ENGINES)
NEEDS = {"reference": ("transformers", "peft")}
"""Packages of the variants that need no vLLM."""
PROMPT_TOKENS = 16
DECODE_STEPS = 32
PREFILL_TOKENS = 128
GREEDY_TOKENS = 64
GREEDY_LOGPROBS = 20
"""Best tokens whose log-probs tell a near-tie; vLLM gives no more. Of 128256 random ones many are close."""
REFERENCE_REQUESTS = 16

# Factors of the yardstick: see above for the first two.
AGREES = 3.0
AS_NEAR = 1.25
ADAPTER_EFFECT = 10.0
"""An adapter must change log-probs by at least this much, or agreement proves nothing."""
NEAR_TIE = 8.0
"""Log-prob distance to the best token up to which another greedy choice is a near-tie."""

POOL = 2**24
"""Random numbers that all adapters are cut from."""
SPEED_TOKENS = 128
SPEED_PROMPTS, SPEED_PROMPT_TOKENS = 64, 1024


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    adapter: int | None
    forced: int


def shapes() -> dict:
    from synthetic import LLAMA3_8B, TINY, LlamaShape

    small = LlamaShape(hidden=1024, intermediate=2816, layers=3, heads=16, kv_heads=4, vocab=8192)
    return {"tiny": TINY, "small": small, "llama3-8b": LLAMA3_8B}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama3-8b", choices=("tiny", "small", "llama3-8b"))
    add(
        "--variant", nargs="+", choices=VARIANTS, default=[], metavar="NAME", help=f"what to run: {', '.join(VARIANTS)}"
    )
    add("--compare", action="store_true", help="compare what --out holds")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--work", type=Path, default=Path(tempfile.gettempdir(), "vllm_agreement"), help="folder of the checkpoint")
    add("--adapters", type=positive(int), default=32)
    add("--rank", type=between(int, 1, LORA_RANKS[-1]), default=16)
    add("--tp", type=positive(int), default=1, help="GPUs of tensor parallelism")
    add("--fully-sharded", action="store_true", help="shard both LoRA matrices")
    add("--requests", nargs="+", type=positive(int), default=[1, 16, 64, 256], help="requests at once, ascending")
    add("--no-speed", action="store_true", help="leave the timings out")
    add("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    add("--memory", type=positive(float), default=0.6, help="gpu_memory_utilization")
    add("--timeout", type=positive(float), default=580, help="seconds for one engine")
    add("--commit", default=git_commit(), help="commit to write into the results; default: git's")
    add("--process", choices=VARIANTS, help=argparse.SUPPRESS)  # this process runs that variant
    return parser.parse_args(argv)


def label(options: argparse.Namespace) -> str:
    """Name of a configuration: the results of its variants belong together."""
    sharding = f"tp{options.tp}" + ("_fully_sharded" if options.fully_sharded else "")
    return f"{options.model}_{options.adapters}x{options.rank}_{sharding}"


def result_file(options: argparse.Namespace, variant: str) -> Path:
    """The reference serves every sharding."""
    name = f"{options.model}_{options.adapters}x{options.rank}" if variant == "reference" else label(options)
    return options.out / f"{name}_{variant}.json"


def checkpoint(options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Folders of the model and its adapters."""
    folder = options.work / options.model
    return folder / "model", [folder / f"adapter{i}_rank{options.rank}" for i in range(options.adapters)]


def write_checkpoint(options: argparse.Namespace) -> None:
    """Write what is missing of the model and the adapters."""
    import torch
    from synthetic import write_adapter, write_model

    shape = shapes()[options.model]
    model, adapters = checkpoint(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (model / "model.safetensors.index.json").exists():
        write_model(model, shape, torch.bfloat16, device=device)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for seed, adapter in enumerate(adapters):
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, shape, options.rank, seed=seed, dtype=torch.bfloat16, pool=pool)


def make_requests(options: argparse.Namespace, tokens: int, seed: int) -> list[Request]:
    """The most requests that run at once; smaller batches take the first ones."""
    vocab = shapes()[options.model].vocab
    rng = random.Random(seed)
    return [
        Request(
            prompt=tuple(rng.randrange(2, vocab) for _ in range(tokens)),
            adapter=None if i % 9 == 8 else i % options.adapters,
            forced=rng.randrange(2, vocab),
        )
        for i in range(max(options.requests))
    ]


# The engine's process


def look_inside(worker) -> dict:
    """Runs in each worker: which model runner and LoRA wrapper it has, and our status."""
    runner = f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__qualname__}"
    if not hasattr(worker.model_runner, "lora_manager"):
        return {"runner": runner, "wrappers": [], "status": None}
    from engine_job import inspect_worker

    return {"runner": runner} | inspect_worker(worker)


def compiled_kernels(worker) -> int:
    """Runs in each worker: how many binaries of our kernels it has."""
    ours = [module for name, module in list(sys.modules.items()) if name.startswith(("lora_ops.", "moe_ops."))]
    kernels = {id(kernel): kernel for m in ours for kernel in vars(m).values() if hasattr(kernel, "device_caches")}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())


def check_compiled(before: list[int], after: list[int]) -> None:
    """SystemExit if workers have more binaries than before; of its own kernels vLLM compiles some while it serves."""
    if before != after:
        raise SystemExit(f"kernels of ours were compiled while the engine served: from {before} to {after} a worker")


class Engine:
    """A vLLM engine and the ways it is asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        model, adapters = checkpoint(options)
        self.requests = options.requests
        self.vocab = shapes()[options.model].vocab
        self.adapters = []
        arguments = {
            "model": str(model),
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 2048,
            "max_num_seqs": max(256, *options.requests) if torch.cuda.is_available() else max(options.requests),
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": options.memory,
            "tensor_parallel_size": options.tp,
            "enforce_eager": options.eager,
            "seed": 0,
        }
        if options.tp > 1:
            # This fusion and the variables in `environment` reach for NVLink multicast, which not every host allows.
            arguments["compilation_config"] = {"pass_config": {"fuse_allreduce_rms": False}}
        if options.process != "base":
            self.adapters = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(adapters, 1)]
            arguments |= {
                "enable_lora": True,
                "max_loras": len(adapters),
                "max_cpu_loras": len(adapters) + 1,
                "max_lora_rank": lora_rank(options.rank),
                "fully_sharded_loras": options.fully_sharded,
            }
            if not torch.cuda.is_available():
                # vLLM's own CPU kernels read the last slot for rows without adapter, so it stays empty; and they cannot
                # take prompt log-probs through an lm_head with LoRA.
                from synthetic import ATTENTION, MLP

                arguments |= {"max_loras": len(adapters) + 1, "lora_target_modules": [*ATTENTION, *MLP]}
        start = time.perf_counter()
        self.llm = LLM(**arguments)
        self.ready_s = time.perf_counter() - start

    def compiled(self) -> list[int]:
        """Binaries of our kernels, in each worker."""
        return self.llm.collective_rpc(compiled_kernels)

    def generate(self, requests: list[Request], settings: dict | list[dict]) -> list:
        from vllm import SamplingParams

        settings = [settings] * len(requests) if isinstance(settings, dict) else settings
        return self.llm.generate(
            [{"prompt_token_ids": list(request.prompt)} for request in requests],
            [SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **setting) for setting in settings],
            lora_request=[
                None if request.adapter is None or not self.adapters else self.adapters[request.adapter]
                for request in requests
            ],
            use_tqdm=False,
        )

    def decode(self, requests: list[Request]) -> dict:
        """Log-probs of the forced token, and the best token, at every step."""
        settings = [
            {"max_tokens": DECODE_STEPS, "logprobs": 1, "allowed_token_ids": [request.forced]} for request in requests
        ]
        outputs = self.generate(requests, settings)
        steps = [output.outputs[0].logprobs for output in outputs]
        for request, output in zip(requests, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == [request.forced] * DECODE_STEPS
        tokens = [[request.forced] * DECODE_STEPS for request in requests]
        return self.score(steps, tokens)

    def prefill(self, requests: list[Request]) -> dict:
        """Log-probs of every prompt token but the first, and the best token at its place."""
        outputs = self.generate(requests, {"max_tokens": 1, "prompt_logprobs": 1})
        steps = [output.prompt_logprobs[1:] for output in outputs]
        return self.score(steps, [request.prompt[1:] for request in requests])

    @staticmethod
    def score(steps: list, tokens: list) -> dict:
        return {
            "logprob": [[p[t].logprob for p, t in zip(*pair, strict=True)] for pair in zip(steps, tokens, strict=True)],
            "best": [[max(p, key=lambda t: p[t].logprob) for p in step] for step in steps],
        }

    def greedy(self, requests: list[Request]) -> list[dict]:
        """In the form that engine_job.compare reads."""
        outputs = self.generate(requests, {"max_tokens": GREEDY_TOKENS, "logprobs": GREEDY_LOGPROBS})
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [{str(t): p.logprob for t, p in step.items()} for step in output.outputs[0].logprobs],
            }
            for output in outputs
        ]

    def agreement(self, decode: list[Request], prefill: list[Request]) -> dict:
        """Answers by phase and batch; `reversed` and `unadapted` (all on the base model) hold the first requests."""
        some = min(64, max(self.requests))
        result = {}
        for phase, ask, requests in (("decode", self.decode, decode), ("prefill", self.prefill, prefill)):
            result[phase] = {str(n): ask(requests[:n]) for n in self.requests}
            turned = ask(requests[:some][::-1])
            result[phase]["reversed"] = {name: values[::-1] for name, values in turned.items()}
            result[phase]["unadapted"] = ask([replace(request, adapter=None) for request in requests[:some]])
        return result | {"greedy": self.greedy(decode[:some])}

    def seconds(self, requests: list[Request], tokens: int) -> float:
        start = time.perf_counter()
        self.generate(requests, {"max_tokens": tokens})
        return time.perf_counter() - start

    def speed(self) -> dict:
        """ms per decode step at each number of requests, and prefill tokens/s, two samples each."""
        rng = random.Random(1)
        count = max(1, len(self.adapters))

        def requests(n: int, tokens: int) -> list[Request]:
            return [Request(tuple(rng.randrange(2, self.vocab) for _ in range(tokens)), i % count, 0) for i in range(n)]

        decode = {}
        for n in self.requests:
            batch = requests(n, PROMPT_TOKENS)
            self.seconds(batch, 2)
            decode[str(n)] = [
                (self.seconds(batch, SPEED_TOKENS + 1) - self.seconds(batch, 1)) / SPEED_TOKENS * 1e3 for _ in range(2)
            ]
        batch = requests(SPEED_PROMPTS, SPEED_PROMPT_TOKENS)
        self.seconds(batch[:8], 1)
        prefill = [SPEED_PROMPTS * SPEED_PROMPT_TOKENS / self.seconds(batch, 1) for _ in range(2)]
        return {"decode_ms": decode, "prefill_tokens_per_s": prefill}


def run_engine(options: argparse.Namespace) -> dict:
    """Everything that is asked of one engine. Runs in a process of its own."""
    import torch
    import vllm

    def say(text: str) -> None:
        print(f"[{options.process} {time.perf_counter() - start:.0f} s] {text}", flush=True)

    start = time.perf_counter()
    engine = Engine(options)
    say("ready")
    compiled = engine.compiled()
    decode = make_requests(options, PROMPT_TOKENS, seed=0)
    prefill = make_requests(options, PREFILL_TOKENS, seed=2)
    warm = [Request(decode[0].prompt, i, 0) for i in range(options.adapters)]
    engine.seconds(warm, 2)  # loads the adapters
    say("adapters loaded")
    result = {"agreement": engine.agreement(decode, prefill), "adapters": [request.adapter for request in decode]}
    say("answers taken")
    result["speed"] = None if options.no_speed else engine.speed()
    say("times taken")
    check_compiled(compiled, engine.compiled())
    config = engine.llm.llm_engine.vllm_config.compilation_config
    return result | {
        "workers": engine.llm.collective_rpc(look_inside),
        "torch_compile": config.mode.name,
        "cuda_graphs": config.cudagraph_mode.name,
        "ready_s": engine.ready_s,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


# The reference's process


def score(model, tokens: Sequence[int], first: int) -> tuple[list[float], list[int]]:
    """Log-probs that a transformers model gives tokens[first:] in one pass, and the best tokens at their places."""
    import torch

    tokens = torch.tensor(tokens, device=model.device)
    scores = model(tokens[None, :-1]).logits[0, first - 1 :].float().log_softmax(-1)
    return scores.gather(1, tokens[first:, None])[:, 0].tolist(), scores.argmax(-1).tolist()


def answers_of(scored: Iterable[tuple[list[float], list[int]]]) -> dict[str, list]:
    """Results of `score` as `Difference.between` takes them."""
    scored = list(scored)
    return {"logprob": [logprob for logprob, _ in scored], "best": [best for _, best in scored]}


def run_reference(options: argparse.Namespace) -> dict:
    """Transformers and peft in fp32, one request at a time along the same tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, adapters = checkpoint(options)
    count = min(REFERENCE_REQUESTS, max(options.requests))
    decode = make_requests(options, PROMPT_TOKENS, seed=0)[:count]
    prefill = make_requests(options, PREFILL_TOKENS, seed=2)[:count]
    used = sorted({request.adapter for request in decode} - {None})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device)
    model = PeftModel.from_pretrained(model, adapters[used[0]], adapter_name=str(used[0]), low_cpu_mem_usage=True)
    for adapter in used[1:]:
        model.load_adapter(adapters[adapter], adapter_name=str(adapter), low_cpu_mem_usage=True)
    model.eval()

    def adapted(request: Request, tokens: Sequence[int], first: int) -> tuple[list[float], list[int]]:
        """`score` with the request's adapter."""
        if request.adapter is None:
            with model.disable_adapter():
                return score(model, tokens, first)
        model.set_adapter(str(request.adapter))
        return score(model, tokens, first)

    return {
        "decode": answers_of(adapted(r, [*r.prompt, *[r.forced] * DECODE_STEPS], PROMPT_TOKENS) for r in decode),
        "prefill": answers_of(adapted(r, r.prompt, 1) for r in prefill),
    }


# Running the variants


SWITCHES = ("LORA_OPS_VLLM", "MOE_OPS_VLLM", "MOE_OPS_SGLANG")


def environment(variant: str, options: argparse.Namespace, switch: str = "LORA_OPS_VLLM") -> dict[str, str]:
    """Of a variant's processes; `switch`, one of SWITCHES, patches the patched one."""
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    if variant == "patched":
        env[switch] = "1"
    if options.tp > 1:
        env |= {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0", "NCCL_NVLS_ENABLE": "0"}
        env["SGLANG_IS_FLASHINFER_AVAILABLE"] = "0"  # it compiles its all-reduce for minutes, even when told not to
    return env | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc sends `look_inside` by pickle
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": env.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_LOGGING_LEVEL": env.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # compiles for minutes when it first starts on a machine, and greedy requests need none of it
        "VLLM_USE_FLASHINFER_SAMPLER": env.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
    }


def run_variants(options: argparse.Namespace, argv: list[str]) -> None:
    """Each variant in a process of its own, after another that writes the checkpoint and frees the GPU."""
    here = Path(__file__).resolve()
    start = time.perf_counter()
    write = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import vllm_agreement as a; "
    subprocess.run([sys.executable, "-c", f"{write}a.write_checkpoint(a.parse({argv!r}))"], check=True)
    print(f"checkpoint: {checkpoint(options)[0].parent}, {time.perf_counter() - start:.0f} s", flush=True)
    for variant in options.variant:
        start = time.perf_counter()
        command = [sys.executable, str(here), *argv, "--process", variant]
        subprocess.run(command, env=environment(variant, options), check=True, timeout=options.timeout)
        print(f"{variant}: {time.perf_counter() - start:.0f} s", flush=True)


# Comparing


@dataclass(frozen=True)
class Difference:
    """Of log-probs along the same prefix, over all positions of some requests."""

    positions: int
    rms: float
    largest: float
    same_best: float

    @classmethod
    def between(cls, a: dict, b: dict, pick: list[int] | None = None) -> Difference:
        """Of two answers of Engine.score; `pick`: indices of requests, default all that both have."""
        common = min(len(a["logprob"]), len(b["logprob"]))
        pick = [i for i in (pick if pick is not None else range(common)) if i < common]
        left, right = (np.array([x["logprob"][i] for i in pick], dtype=np.float64) for x in (a, b))
        best = [np.array([x["best"][i] for i in pick]) for x in (a, b)]
        gap = np.abs(left - right)
        return cls(gap.size, float(np.sqrt(np.mean(gap**2))), float(gap.max()), float(np.mean(best[0] == best[1])))


def noise_of(phase: dict) -> Difference:
    """vLLM against itself: neighbouring batch sizes and reversed order, pooled."""
    sizes = batch_sizes(phase)
    pairs = [(phase[a], phase[b]) for a, b in itertools.pairwise(sizes)]
    as_many = next(n for n in sizes if len(phase[n]["best"]) >= len(phase["reversed"]["best"]))
    pairs.append((phase["reversed"], phase[as_many]))
    each = [Difference.between(a, b) for a, b in pairs]
    total = sum(d.positions for d in each)
    return Difference(
        total,
        float(np.sqrt(sum(d.rms**2 * d.positions for d in each) / total)),
        max(d.largest for d in each),
        sum(d.same_best * d.positions for d in each) / total,
    )


def faults_of_workers(variant: str, result: dict) -> list[str]:
    """What shows that an engine did not run as its variant says."""
    faults = []
    for worker in result["workers"]:
        ours = [name for name in worker["wrappers"] if "LoraOpsPunicaWrapper" in name]
        if variant != "patched":
            if ours:
                faults.append(f"the {variant} engine runs {ours}")
            continue
        if ours != worker["wrappers"] or not ours:
            faults.append(f"the patched engine runs {worker['wrappers']}")
        if worker["status"] is None or not worker["status"]["patched"]:
            faults.append(f"a worker is not patched: {worker['status']}")
            continue
        counters = worker["status"]["counters"]
        if not sum(count for op, count in counters["hit"].items() if op.startswith("lora_")):
            faults.append("our kernels were never called")
        faults += [
            f"{kind} in the patched engine: {counters[kind]}" for kind in ("fallback", "error") if counters[kind]
        ]
    return faults


@dataclass(frozen=True)
class Comparison:
    """A line of the agreement table; `limit` is that of found.rms, None where it is for information."""

    phase: str
    what: str
    found: Difference
    limit: float | None
    holds: bool


def yardstick_of(results: dict[str, dict], phase: str) -> float:
    stock = results["stock"]["agreement"][phase]
    errors = [noise_of(stock).rms]
    if "reference" in results:
        errors.append(Difference.between(largest_batch(stock), results["reference"][phase]).rms)
    return max(errors)


def batch_sizes(phase: dict) -> list[str]:
    return sorted((name for name in phase if name.isdigit()), key=int)


def largest_batch(phase: dict) -> dict:
    return phase[batch_sizes(phase)[-1]]


def comparisons(results: dict[str, dict]) -> Iterator[Comparison]:
    for phase in ("decode", "prefill"):
        stock, patched = (results[name]["agreement"][phase] for name in ("stock", "patched"))
        yardstick = yardstick_of(results, phase)
        limit = AGREES * yardstick
        yield Comparison(phase, "stock against itself", noise_of(stock), None, True)
        if "reference" in results:
            off = {
                name: Difference.between(largest_batch(answers), results["reference"][phase])
                for name, answers in (("stock", stock), ("patched", patched))
            }
            near = AS_NEAR * off["stock"].rms
            yield Comparison(phase, "stock against fp32", off["stock"], None, True)
            yield Comparison(phase, "patched against fp32", off["patched"], near, off["patched"].rms <= near)
        for name in (*batch_sizes(stock), "reversed", "unadapted"):
            found = Difference.between(stock[name], patched[name])
            what = f"patched against stock, {name}" + " requests" * name.isdigit()
            yield Comparison(phase, what, found, limit, found.rms <= limit)
        adapted = [i for i, adapter in enumerate(results["stock"]["adapters"]) if adapter is not None]
        effect = Difference.between(largest_batch(stock), stock["unadapted"], adapted)
        least = ADAPTER_EFFECT * yardstick
        yield Comparison(phase, "effect of the adapters (at least)", effect, least, effect.rms >= least)


def greedy(results: dict[str, dict]) -> tuple[str, list[str]]:
    """How far free greedy decoding agrees; a request that parts elsewhere than at a near-tie is a fault."""
    from engine_job import compare

    tie = NEAR_TIE * yardstick_of(results, "decode")
    both = (results[name]["agreement"]["greedy"] for name in ("stock", "patched"))
    found = [compare(a, b, tie) for a, b in zip(*both, strict=True)]
    equal, ties = sum(a.equal for a in found), sum(a.tie for a in found)
    text = (
        f"free greedy decoding: {equal} of {len(found)} requests give the same {GREEDY_TOKENS} tokens, {ties} part at "
        f"a near-tie (within {tie:.2f}), after {statistics.mean(a.tokens for a in found):.0f} tokens on average; up to "
        f"there log-probs differ by at most {max(a.logprob_error for a in found):.3f}"
    )
    parted = [(i, a.tokens) for i, a in enumerate(found) if not (a.equal or a.tie)]
    return text, [f"greedy request {i} parts from stock at token {token}, no near-tie" for i, token in parted]


def speed_rows(results: dict[str, dict]) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """(metric, requests, samples of each variant)."""
    timed = {name: result["speed"] for name, result in results.items() if result["speed"]}
    if not timed:
        return
    for n in next(iter(timed.values()))["decode_ms"]:
        yield "ms per decode step", n, {name: speed["decode_ms"][n] for name, speed in timed.items()}
    prompts = str(SPEED_PROMPTS)
    yield "prefill tokens/s", prompts, {name: speed["prefill_tokens_per_s"] for name, speed in timed.items()}


def compare_results(options: argparse.Namespace) -> int:
    """Print the tables, write the CSV, and return how many comparisons do not hold."""
    from rich.console import Console
    from rich.table import Table

    files = {name: result_file(options, name) for name in VARIANTS}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if missing := [str(files[name]) for name in ("stock", "patched") if name not in results]:
        raise SystemExit(f"missing: {', '.join(missing)}; run with --variant first")
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    engines = {name: results[name] for name in ENGINES if name in results}
    faults = [fault for name, result in engines.items() for fault in faults_of_workers(name, result)]
    records = []

    table = Table(title=f"{label(options)}: log-probs along the same prefix", title_justify="left")
    for column in ("phase", "what", "positions", "rms", "limit", "largest", "same best token", ""):
        table.add_column(column, justify="left" if column in ("phase", "what") else "right")
    for c in comparisons(results):
        numbers = [str(c.found.positions), f"{c.found.rms:.1e}", f"{c.limit:.1e}" if c.limit is not None else ""]
        verdict = "" if c.limit is None else "[green]holds[/]" if c.holds else "[red]does not hold[/]"
        table.add_row(c.phase, c.what, *numbers, f"{c.found.largest:.1e}", f"{c.found.same_best:.1%}", verdict)
        records.append(("patched", f"{c.phase} log-prob rms: {c.what}", "", [c.found.rms]))
        records.append(("patched", f"{c.phase} log-prob largest: {c.what}", "", [c.found.largest]))
        if not c.holds:
            faults.append(f"{c.phase}, {c.what}: rms {c.found.rms:.1e}, limit {c.limit:.1e}")
    console.print(table)
    text, parted = greedy(results)
    console.print(text)
    faults += parted

    table = Table(title=f"{label(options)}: speed, adapters round robin", title_justify="left")
    for column in ("", "requests", *engines, "over stock", "share of base"):
        table.add_column(column, justify="right" if column else "left")
    for metric, requests, samples in speed_rows(engines):
        middle = {name: statistics.mean(values) for name, values in samples.items()}
        records += [(name, metric, requests, values) for name, values in samples.items()]
        cells = []
        for name in engines:
            values = samples.get(name)
            cells.append(f"{middle[name]:,.2f} ±{(max(values) - min(values)) / 2:.2f}" if values else "-")
        for other in ("stock", "base"):
            if other not in middle or "patched" not in middle:
                cells.append("-")
                continue
            ratio = middle["patched"] / middle[other]
            cells.append(f"{1 / ratio if metric.startswith('ms') else ratio:.2f}")
        table.add_row(metric, requests, *cells)
    if table.row_count:
        console.print(table)

    for name, result in engines.items():
        runners = {".".join(worker["runner"].rsplit(".", 2)[-2:]) for worker in result["workers"]}
        wrappers = {wrapper.rsplit(".", 1)[-1] for worker in result["workers"] for wrapper in worker["wrappers"]}
        console.print(
            f"{name}: vLLM {result['vllm']}, torch {result['torch']}, {result['gpu']}, "
            f"compilation mode {result['torch_compile']}, CUDA graphs {result['cuda_graphs']}, "
            f"{', '.join(runners)}, {', '.join(wrappers) or 'no LoRA'}, ready in {result['ready_s']:.0f} s"
        )
    write_csv(options, results, records)
    for fault in faults:
        console.print(f"[red]{fault}[/]")
    console.print("[green]patched and stock agree[/]" if not faults else f"[red]{len(faults)} faults[/]")
    return len(faults)


def write_csv(options: argparse.Namespace, results: dict[str, dict], records: list[tuple]) -> None:
    path = options.out / f"{label(options)}.csv"
    columns = "model tp fully_sharded adapters rank variant metric requests value min max gpu vllm torch commit date"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split())
        for variant, metric, requests, values in records:
            result = results[variant]
            setting = [options.model, options.tp, int(options.fully_sharded), options.adapters, options.rank]
            numbers = [f"{value:.6g}" for value in (statistics.mean(values), min(values), max(values))]
            versions = [result["gpu"], result["vllm"], result["torch"], result["commit"], result["date"]]
            writer.writerow([*setting, variant, metric, requests, *numbers, *versions])


def make_out(options: argparse.Namespace) -> None:
    """Make the folder of the results.

    Raises:
        SystemExit: there is nothing to do, or nothing can be written there.
    """
    if not (options.variant or options.compare or options.process):
        raise SystemExit("nothing to do: give --variant, --compare or both")
    make_results(options.out)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    make_out(options)
    if options.process:
        run = run_reference if options.process == "reference" else run_engine
        result = run(options) | {
            "commit": options.commit,
            "date": now(),
        }
        result_file(options, options.process).write_text(json.dumps(result))
        return 0
    if options.variant:
        require(name for variant in options.variant for name in NEEDS.get(variant, ("vllm",)))
        run_variants(options, argv)
    return int(compare_results(options) > 0) if options.compare else 0


if __name__ == "__main__":
    sys.exit(main())
