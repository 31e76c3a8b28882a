#!/usr/bin/env python3
"""A patched vLLM or SGLang beside an unpatched one on the same random MoE model: do they agree, how fast are they?

    python benchmarks/moe_agreement.py --host vllm --variant base patched --compare --out DIR
    python benchmarks/moe_agreement.py --host sglang --variant base patched --compare --out DIR
    python benchmarks/moe_agreement.py --host vllm --load-format safetensors --layers 8 \
        --variant reference base patched --compare --out DIR

Each variant runs in a process of its own, whose results are saved in DIR as JSON: `base` is the host on its Triton
experts, `patched` runs with MOE_OPS_VLLM=1 or MOE_OPS_SGLANG=1, `reference` is transformers in fp32 on the first
requests. `--compare` reads what is saved, and writes what it finds of the answers as CSV beside it. Measured are ms per
decode step at 1, 16, 64 and 256 requests, and prefill tokens/s. CUDA graphs are on unless --eager.

Dummy weights, the hosts' own random numbers, are good for speed alone: requests of random tokens reach all experts, but
weights of 1e-3 leave nothing of the experts in the log-probs. With --load-format safetensors weights are written that
keep their scale (1.2 GB a layer of Qwen3-30B-A3B: give --layers), and these are compared too, along the same prefix:

    prefill  log-probs of every token of a random prompt, for 1, 16, 64 and 256 requests at once
    greedy   64 tokens of each request: two engines may part at a near-tie alone

The yardstick is how far base is off by itself: from the fp32 reference, and from the same requests in batches of other
sizes and in reversed order. The root mean square of patched against base may be three times that, and that of patched
against the reference 1.25 times that of base.

Exit status: 0 if every comparison holds, 1 if not.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path

from running import git_commit, now, positive, require
from vllm_agreement import (
    AGREES,
    AS_NEAR,
    GREEDY_LOGPROBS,
    GREEDY_TOKENS,
    NEAR_TIE,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    REFERENCE_REQUESTS,
    Difference,
    Engine,
    Request,
    answers_of,
    batch_sizes,
    check_compiled,
    environment,
    largest_batch,
    make_out,
    noise_of,
    score,
    speed_rows,
)

ENGINE_VARIANTS = ("base", "patched")
VARIANTS = ("reference", *ENGINE_VARIANTS)
SWITCHES = {"vllm": "MOE_OPS_VLLM", "sglang": "MOE_OPS_SGLANG"}
GREEDY_REQUESTS = 64
LEAST_NOISE = 1e-4
"""Of log-probs: a base that agrees with itself even better than this is not the yardstick."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", required=True, choices=SWITCHES, help="installed in the environment of this Python")
    add("--model", default="qwen3-30b-a3b", choices=("tiny-moe", "qwen3-30b-a3b"))
    add("--layers", type=positive(int), help="keep that many layers of the model")
    add("--load-format", default="dummy", choices=("dummy", "safetensors"), help="safetensors: compare answers too")
    add(
        "--variant", nargs="+", choices=VARIANTS, default=[], metavar="NAME", help=f"what to run: {', '.join(VARIANTS)}"
    )
    add("--compare", action="store_true", help="compare what --out holds")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--work", type=Path, default=Path(tempfile.gettempdir(), "moe_agreement"), help="folder of the checkpoint")
    add("--tp", type=positive(int), default=1, help="GPUs of tensor parallelism")
    add("--expert-parallel", action="store_true", help="whole experts, spread over those GPUs")
    add("--requests", nargs="+", type=positive(int), default=[1, 16, 64, 256], help="requests at once, ascending")
    add("--no-speed", action="store_true", help="leave the timings out")
    add("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    add("--memory", type=positive(float), default=0.8, help="share of the GPU's memory for the engine")
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="more arguments of the host's engine")
    add("--timeout", type=positive(float), default=580, help="seconds for one engine")
    add("--commit", default=git_commit(), help="commit to write into the results; default: git's")
    add("--process", choices=VARIANTS, help=argparse.SUPPRESS)  # this process runs that variant
    options = parser.parse_args(argv)
    if "reference" in options.variant and options.load_format == "dummy":
        parser.error("the reference needs weights: give --load-format safetensors")
    return options


def shape_of(options: argparse.Namespace):
    from synthetic import SHAPES

    shape = SHAPES[options.model]
    return replace(shape, layers=options.layers) if options.layers else shape


def label(options: argparse.Namespace) -> str:
    """Name of a configuration: the results of its variants belong together."""
    layers = f"-{options.layers}layers" if options.layers else ""
    parallel = f"tp{options.tp}" + ("_ep" if options.expert_parallel else "")
    return f"moe_agreement_{options.host}_{options.model}{layers}_{options.load_format}_{parallel}"


def result_file(options: argparse.Namespace, variant: str) -> Path:
    """The reference serves both hosts and every way of parallelism."""
    if variant == "reference":
        return options.out / f"moe_agreement_{model_folder(options).name}_reference.json"
    return options.out / f"{label(options)}_{variant}.json"


def model_folder(options: argparse.Namespace) -> Path:
    """Both hosts share a checkpoint."""
    return options.work / f"{options.model}-{shape_of(options).layers}layers-{options.load_format}"


def write_checkpoint(options: argparse.Namespace) -> None:
    """Write what is missing of the model."""
    import torch
    from synthetic import write_config, write_model

    folder = model_folder(options)
    if options.load_format == "dummy":
        if not (folder / "tokenizer_config.json").exists():  # what is written last
            write_config(folder, shape_of(options), torch.bfloat16)
    elif not (folder / "model.safetensors.index.json").exists():
        write_model(folder, shape_of(options), torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")


def make_requests(options: argparse.Namespace, tokens: int, seed: int) -> list[Request]:
    """The most requests that run at once, of random tokens; smaller batches take the first ones."""
    rng, vocab = random.Random(seed), shape_of(options).vocab
    return [
        Request(tuple(rng.randrange(2, vocab) for _ in range(tokens)), adapter=None, forced=0)
        for _ in range(max(options.requests))
    ]


# The engine's process


class VllmEngine(Engine):
    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import vllm

        self.requests, self.vocab, self.adapters = options.requests, shape_of(options).vocab, []
        arguments = {
            "model": str(model_folder(options)),
            "load_format": "dummy" if options.load_format == "dummy" else "auto",
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 2048,
            "max_num_seqs": max(options.requests),
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": options.memory,
            "tensor_parallel_size": options.tp,
            "enable_expert_parallel": options.expert_parallel,
            "enforce_eager": options.eager,
            "seed": 0,
        }
        if torch.cuda.is_available():
            arguments["moe_backend"] = "triton"
        if options.tp > 1:
            # This fusion and the variables in `environment` reach for NVLink multicast, which not every host allows.
            arguments["compilation_config"] = {"pass_config": {"fuse_allreduce_rms": False}}
        self.version = vllm.__version__
        self.llm = vllm.LLM(**arguments | options.engine_args)


class SglangEngine(Engine):
    def __init__(self, options: argparse.Namespace) -> None:
        import sglang

        self.requests, self.vocab, self.adapters = options.requests, shape_of(options).vocab, []
        self.version = sglang.__version__
        arguments = {
            "model_path": str(model_folder(options)),
            "load_format": "dummy" if options.load_format == "dummy" else "auto",
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "context_length": 2048,
            "max_running_requests": max(options.requests),
            "disable_radix_cache": True,
            "mem_fraction_static": options.memory,
            "tp_size": options.tp,
            "ep_size": options.tp if options.expert_parallel else 1,
            "attention_backend": "triton",
            "moe_runner_backend": "triton",
            "random_seed": 0,
            "log_level": "warning",
        }
        if options.eager:
            arguments["disable_cuda_graph"] = True
        else:
            arguments["cuda_graph_max_bs_decode"] = max(options.requests)
        self.engine = sglang.Engine(**arguments | options.engine_args)

    def compiled(self) -> list[int]:
        """SGLang's workers run no function of ours."""
        return []

    def generate(self, requests: list[Request], settings: dict) -> list[dict]:
        """`settings` as vLLM takes them: max_tokens, logprobs, prompt_logprobs."""
        arguments = {}
        if "logprobs" in settings:
            arguments = {"return_logprob": True, "top_logprobs_num": settings["logprobs"]}
        if "prompt_logprobs" in settings:
            arguments = {"return_logprob": True, "top_logprobs_num": 1, "logprob_start_len": 0}
        return self.engine.generate(
            input_ids=[list(request.prompt) for request in requests],
            sampling_params={"temperature": 0, "ignore_eos": True, "max_new_tokens": settings["max_tokens"]},
            **arguments,
        )

    def prefill(self, requests: list[Request]) -> dict:
        found = [output["meta_info"] for output in self.generate(requests, {"max_tokens": 1, "prompt_logprobs": 1})]
        return {
            "logprob": [[logprob for logprob, *_ in meta["input_token_logprobs"][1:]] for meta in found],
            "best": [[step[0][1] for step in meta["input_top_logprobs"][1:]] for meta in found],
        }

    def greedy(self, requests: list[Request]) -> list[dict]:
        outputs = self.generate(requests, {"max_tokens": GREEDY_TOKENS, "logprobs": GREEDY_LOGPROBS})
        return [
            {
                "tokens": [token for _, token, *_ in output["meta_info"]["output_token_logprobs"]],
                "logprobs": [
                    {str(token): logprob for logprob, token, *_ in step}
                    for step in output["meta_info"]["output_top_logprobs"]
                ],
            }
            for output in outputs
        ]


ENGINES = {"vllm": VllmEngine, "sglang": SglangEngine}


def agreement(engine: Engine, options: argparse.Namespace) -> dict:
    """Answers in every batch size; `reversed` holds those of the first requests, asked in reversed order."""
    prompts = make_requests(options, PREFILL_TOKENS, seed=2)
    some = min(GREEDY_REQUESTS, max(options.requests))
    prefill = {str(n): engine.prefill(prompts[:n]) for n in options.requests}
    turned = engine.prefill(prompts[:some][::-1])
    prefill["reversed"] = {name: values[::-1] for name, values in turned.items()}
    return {"prefill": prefill, "greedy": engine.greedy(make_requests(options, PROMPT_TOKENS, seed=0)[:some])}


def run_engine(options: argparse.Namespace) -> dict:
    """Everything that is asked of one engine. Runs in a process of its own."""
    import torch
    from serving_server import SGLANG_MOE, VLLM_MOE, faults

    from ops_patches import state

    def say(text: str) -> None:
        print(f"[{options.host} {options.process} {time.perf_counter() - start:.0f} s] {text}", flush=True)

    start = time.perf_counter()
    engine = ENGINES[options.host](options)
    ready_s = time.perf_counter() - start
    say("ready")
    compiled = engine.compiled()
    result = {"agreement": None, "speed": None}
    engine.seconds(make_requests(options, PROMPT_TOKENS, seed=0)[:1], 2)
    if options.load_format == "safetensors":
        result["agreement"] = agreement(engine, options)
        say("answers taken")
    if not options.no_speed:
        result["speed"] = engine.speed()
        say("times taken")
    check_compiled(compiled, engine.compiled())
    time.sleep(1.2 * state.INTERVAL_S)  # a status file lags its process by at most one interval
    watched = {"vllm": VLLM_MOE, "sglang": SGLANG_MOE}[options.host]
    processes = [process for process in state.processes() if watched.key in process]
    return result | {
        "faults": faults(options.process, processes, options.tp, watched),
        "counters": [process[watched.key]["counters"] for process in processes],
        "ready_s": ready_s,
        "engine_args": options.engine_args,
        "version": engine.version,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": options.commit,
        "date": now(),
    }


def run_reference(options: argparse.Namespace) -> dict:
    """Transformers in fp32, one request at a time along the same tokens: log-probs of the prompts' prefill."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(options), dtype=torch.float32, device_map=device, experts_implementation="eager"
    )
    model.eval()
    requests = make_requests(options, PREFILL_TOKENS, seed=2)[:REFERENCE_REQUESTS]
    return {"prefill": answers_of(score(model, request.prompt, 1) for request in requests)}


def run_variants(options: argparse.Namespace, argv: list[str]) -> None:
    """Each variant in a process of its own, after another that writes the checkpoint and frees the GPU."""
    from ops_patches import state

    here = Path(__file__).resolve()
    write = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import moe_agreement as a; "
    subprocess.run([sys.executable, "-c", f"{write}a.write_checkpoint(a.parse({argv!r}))"], check=True)
    for variant in options.variant:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="moe_agreement_status_") as folder:
            env = environment(variant, options, SWITCHES[options.host]) | {state.STATUS_DIR: folder}
            command = [sys.executable, str(here), *argv, "--process", variant]
            subprocess.run(command, env=env, check=True, timeout=options.timeout)
        print(f"{variant}: {time.perf_counter() - start:.0f} s", flush=True)


# Comparing


def yardstick_of(base: dict, reference: dict | None) -> float:
    """How far base is off by itself, rms of the prefill's log-probs."""
    errors = [noise_of(base["prefill"]).rms, LEAST_NOISE]
    if reference:
        errors.append(Difference.between(largest_batch(base["prefill"]), reference["prefill"]).rms)
    return max(errors)


def differences(
    base: dict, patched: dict, reference: dict | None, yardstick: float
) -> Iterator[tuple[str, Difference, float | None]]:
    """(what, found, limit of its rms) of the prefill's log-probs; None: for information."""
    limit = AGREES * yardstick
    yield "base against itself", noise_of(base["prefill"]), None
    if reference:
        off = [
            Difference.between(largest_batch(answers["prefill"]), reference["prefill"]) for answers in (base, patched)
        ]
        yield "base against fp32", off[0], None
        yield "patched against fp32", off[1], AS_NEAR * off[0].rms
    for name in (*batch_sizes(base["prefill"]), "reversed"):
        what = f"patched against base, {name}" + " requests" * name.isdigit()
        yield what, Difference.between(base["prefill"][name], patched["prefill"][name]), limit


def greedy(base: dict, patched: dict, yardstick: float) -> tuple[str, list[str]]:
    """How far free greedy decoding agrees; a request that parts elsewhere than at a near-tie is a fault."""
    from engine_job import compare

    tie = NEAR_TIE * yardstick
    found = [compare(a, b, tie) for a, b in zip(base["greedy"], patched["greedy"], strict=True)]
    equal, ties = sum(a.equal for a in found), sum(a.tie for a in found)
    text = (
        f"greedy decoding: {equal} of {len(found)} requests give the same {GREEDY_TOKENS} tokens, {ties} part at a "
        f"near-tie (within {tie:.2f}), after {statistics.mean(a.tokens for a in found):.0f} tokens on average"
    )
    parted = [(i, a.tokens) for i, a in enumerate(found) if not (a.equal or a.tie)]
    return text, [f"greedy request {i} parts from base at token {token}, no near-tie" for i, token in parted]


def compare_results(options: argparse.Namespace) -> int:
    """Print the tables and return how many comparisons do not hold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    files = {name: result_file(options, name) for name in ENGINE_VARIANTS}
    if missing := [str(file) for file in files.values() if not file.exists()]:
        raise SystemExit(f"missing: {', '.join(missing)}; run with --variant first")
    results = {name: json.loads(file.read_text()) for name, file in files.items()}
    if results["base"].get("engine_args") != results["patched"].get("engine_args"):
        raise SystemExit(f"base and patched ran with different --engine-args: run both again, or see {files['base']}")
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    found_faults = [fault for result in results.values() for fault in result["faults"]]

    reference = result_file(options, "reference")
    reference = json.loads(reference.read_text()) if reference.exists() else None
    answers = [results[name]["agreement"] for name in ENGINE_VARIANTS]
    if all(answers):
        table = Table(title=f"{label(options)}: prefill log-probs along the same prefix", title_justify="left")
        for column in ("what", "positions", "rms", "limit", "largest", "same best token"):
            table.add_column(column, justify="left" if column == "what" else "right")
        yardstick = yardstick_of(answers[0], reference)
        rows = list(differences(*answers, reference, yardstick))
        write_csv(options, results, rows)
        for what, found, limit in rows:
            holds = limit is None or found.rms <= limit
            numbers = (str(found.positions), f"{found.rms:.1e}", f"{limit:.1e}" if limit else "")
            table.add_row(what, *numbers, f"{found.largest:.1e}", f"{found.same_best:.1%}")
            if not holds:
                found_faults.append(f"{what}: rms {found.rms:.1e}, limit {limit:.1e}")
        console.print(table)
        text, parted = greedy(*answers, yardstick)
        console.print(text)
        found_faults += parted
    else:
        console.print("[yellow]dummy weights: answers are not compared, see --load-format[/]")

    table = Table(title=f"{label(options)}: speed", title_justify="left")
    for column in ("", "requests", *ENGINE_VARIANTS, "base / patched"):
        table.add_column(column, justify="right" if column else "left")
    for metric, requests, samples in speed_rows(results):
        middle = {name: statistics.mean(values) for name, values in samples.items()}
        cells = [
            f"{middle[n]:,.2f} ±{(max(samples[n]) - min(samples[n])) / 2:.2f}" if n in middle else "-"
            for n in ENGINE_VARIANTS
        ]
        if len(middle) == len(ENGINE_VARIANTS):
            ratio = middle["base"] / middle["patched"]
            cells.append(f"{ratio if metric.startswith('ms') else 1 / ratio:.2f}")
        table.add_row(metric, requests, *cells)
    if table.row_count:
        console.print(table)
    for name, result in results.items():
        hits = sum(n for counters in result["counters"] for n in counters["hit"].values())
        console.print(
            f"{name}: {options.host} {result['version']}, torch {result['torch']}, {result['gpu']}, ready in "
            f"{result['ready_s']:.0f} s, {hits} calls of our kernels"
        )
    for fault in found_faults:
        console.print(f"[red]{escape(fault)}[/]")
    console.print("[green]nothing is wrong[/]" if not found_faults else f"[red]{len(found_faults)} faults[/]")
    return len(found_faults)


def write_csv(options: argparse.Namespace, results: dict[str, dict], rows: list[tuple]) -> None:
    """The table of the answers; `limit` is that of the rms."""
    columns = (
        "host model layers tp expert_parallel what positions rms limit largest same_best gpu version torch commit date"
    )
    setting = [options.host, options.model, shape_of(options).layers, options.tp, int(options.expert_parallel)]
    about = [results["patched"][name] for name in ("gpu", "version", "torch", "commit", "date")]
    with (options.out / f"{label(options)}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split())
        for what, found, limit in rows:
            numbers = [f"{value:.4g}" for value in (found.rms, limit or nan, found.largest, found.same_best)]
            writer.writerow([*setting, what, found.positions, *numbers, *about])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    make_out(options)
    if options.process:
        run = run_reference if options.process == "reference" else run_engine
        result_file(options, options.process).write_text(json.dumps(run(options)))
        return 0
    if options.variant:
        require("transformers" if variant == "reference" else options.host for variant in options.variant)
        run_variants(options, argv)
    return int(compare_results(options) > 0) if options.compare else 0


if __name__ == "__main__":
    sys.exit(main())
