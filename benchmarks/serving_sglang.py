#!/usr/bin/env python3
"""`sglang.launch_server` on an MoE model as it is and patched, under the traffic of `sglang.bench_serving`.

    python benchmarks/serving_sglang.py                              # Qwen3-30B-A3B shapes; 1 to 256 requests at once
    python benchmarks/serving_sglang.py --layers 8 --concurrency 64 --request-rate
    python benchmarks/serving_sglang.py --time-limit 500 --resume    # in pieces: goes on where the CSV ends
    python benchmarks/serving_sglang.py --report                     # table and plots again, from the CSV

Writes what a checkpoint of that architecture needs (config and tokenizer; the weights are random numbers that SGLang
makes at load), starts one server for each variant, and sends it one client run after the other: requests of random
tokens, several at once or so many a second, and prompts of 1024 tokens with one token to generate, which show the
prefill (input tokens/s). Variants: `base` is SGLang on its Triton experts, `patched` the same with MOE_OPS_SGLANG=1.
Retention is output tokens/s over those of base at the same load.

A row counts only if the server was what its variant says: the patched server's status files must show calls of our
kernels in every worker and no fallback; those of base must show none. Rows go to
benchmarks/results/<GPU>/serving_sglang.csv as they come. Exit status: 0 if all was measured, 1 if something failed, 3
if time ran out.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import serving_vllm
import synthetic
import vllm_agreement
from serving_server import HOST, SGLANG_MOE, Setting
from serving_traffic import Load, Traffic

MODELS = [name for name, shape in synthetic.SHAPES.items() if shape.experts]
VARIANTS = ("base", "patched")
CLIENT = "sglang.bench_serving"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b", choices=MODELS)
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--attention-backend", default="triton", help="of SGLang")
    serving_vllm.add_common_options(parser, "serving_sglang")
    parser.set_defaults(memory=0.85)
    options = parser.parse_args(argv)
    loads = serving_vllm.DEFAULTS["tiny" if options.model in serving_vllm.TINY else "grid"]
    serving_vllm.complete_load(parser, options, {name: loads[name] for name in ("concurrency", "request_rate")})
    return options


def server_command(
    options: argparse.Namespace, setting: Setting, names: list[str], most_at_once: float, on_gpu: bool
) -> list[str]:
    """`sglang.launch_server` without host and port."""
    at_once = str(256 if math.isinf(most_at_once) else max(256, round(most_at_once)))
    model = str(serving_vllm.model_folder(options))
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--dtype", "bfloat16"]
    command += ["--load-format", "dummy" if options.load_format == "dummy" else "auto"]
    command += ["--context-length", str(serving_vllm.context_length(options)), "--random-seed", "0"]
    command += ["--attention-backend", options.attention_backend, "--moe-runner-backend", "triton"]
    command += ["--disable-radix-cache", "--tp-size", str(options.tp)]
    command += ["--max-running-requests", at_once, "--mem-fraction-static", str(options.memory)]
    command += ["--disable-cuda-graph"] if options.eager else ["--cuda-graph-max-bs-decode", at_once]
    return command + options.server_args


def environment(options: argparse.Namespace, variant: str) -> dict[str, str]:
    """Of the server and its clients."""
    return vllm_agreement.environment(variant, options, "MOE_OPS_SGLANG") | {"NO_PROXY": "*", "no_proxy": "*"}


def client_command(model: Path, port: int, traffic: Traffic, load: Load, requests: int, result: Path) -> list[str]:
    command = [sys.executable, "-m", CLIENT, "--backend", "sglang", "--host", HOST, "--port", str(port)]
    command += ["--model", str(model), "--tokenizer", str(model)]
    # Token ids as they are: no file of conversations is asked for, and all prompts have the same length.
    command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    command += ["--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len)]
    command += ["--num-prompts", str(requests), "--request-rate", str(load.request_rate), "--seed", "0"]
    if not math.isinf(load.concurrency):
        command += ["--max-concurrency", str(round(load.concurrency))]
    return [*command, "--disable-tqdm", "--output-file", str(result)]


SGLANG_HOST = serving_vllm.Host(
    "sglang",
    ("sglang",),
    "sglang.srt.plugins",
    CLIENT,
    lambda options: SGLANG_MOE,
    server_command,
    environment,
    client_command,
    client_needs=("datasets",),
)


if __name__ == "__main__":
    sys.exit(serving_vllm.main(None, SGLANG_HOST, parse))
