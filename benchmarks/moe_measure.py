"""One implementation on one MoE case: compiled ahead, swept if it has configs to choose from, checked, timed."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from baselines import Missing
from moe_baselines import IMPLS, Run
from moe_problem import Problem, make_problem, max_rel_error, reference, tolerance
from moe_shapes import Case, Layer
from running import run_ahead, unusable_configs
from timing import graph_time

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Measurement:
    """us, us_min, us_max are NaN unless the check is green and there is a GPU. error: NaN if the call failed."""

    impl: str
    version: str
    error: float
    config: dict | None = None
    us: float = math.nan
    us_min: float = math.nan
    us_max: float = math.nan
    failure: str = ""


@functools.cache
def load(name: str):
    return IMPLS[name]()


def load_all(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the implementations that can run here, and why the others cannot."""
    loaded, missing = [], {}
    for name in names:
        try:
            load(name)
            loaded.append(name)
        except Missing as reason:
            missing[name] = str(reason)
        except Exception as error:
            if name == "ours":
                raise
            missing[name] = f"{type(error).__name__}: {error}"
    return loaded, missing


@functools.lru_cache(maxsize=1)
def checked_problem(case: Case, seed: int) -> tuple[Problem, torch.Tensor]:
    """Inputs and reference of a case, kept while its implementations take their turns."""
    problem = make_problem(case, DEVICE, seed)
    torch.set_float32_matmul_precision("highest")  # whatever a host has set
    return problem, reference(problem)


def check(run: Run, problem: Problem, expected: torch.Tensor) -> float:
    """Error of set 0 after all sets have run; on a GPU that of the replay of a CUDA graph into NaNs."""
    for i in reversed(range(problem.copies)):
        out = run(i)
    if problem.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(0)
        out.fill_(math.nan)
        graph.replay()
    return max_rel_error(out, expected, problem)


def sweep(impl, problem: Problem, seconds: float) -> dict | None:
    """The fastest of the candidates; those that the time does not reach do not count."""
    end = time.monotonic() + seconds
    configs = impl.candidates(problem.case)
    best, best_us = configs[0], math.inf
    for config in configs:
        if time.monotonic() > end:
            break
        with unusable_configs():
            run = impl.bind(problem, config)
            run(0)
            us = graph_time(run, problem.copies, replays=3, graph_us=0).us_min
            if us < best_us:
                best, best_us = config, us
    return best


def measure(case: Case, name: str, seed: int, sweep_seconds: float) -> Measurement:
    """Errors of ours and of the GPU are raised; a host's stand in `failure`."""
    impl = load(name)
    if reason := impl.unsuited(case):
        return Measurement(name, impl.version, math.nan, failure=f"not run: {reason}")
    problem, expected = checked_problem(case, seed)
    try:
        config = sweep(impl, problem, sweep_seconds) if impl.swept else impl.candidates(case)[0]
        run = impl.bind(problem, config)
        found = Measurement(name, impl.version, check(run, problem, expected), impl.label(problem, config))
        if not (ON_GPU and found.error <= tolerance(case.dtype)):
            return found
        timing = graph_time(run, problem.copies)
        return Measurement(name, impl.version, found.error, found.config, timing.us, timing.us_min, timing.us_max)
    except Exception as error:
        if name == "ours" or "CUDA error" in str(error):
            raise
        return Measurement(name, impl.version, math.nan, failure=f"{type(error).__name__}: {error}")
    finally:
        if ON_GPU:
            torch.cuda.empty_cache()


# Compiling ahead


def compile_jobs(cases: list[Case], names: list[str]) -> list[tuple[str, Case, list]]:
    """(implementation, case, configs) to run once each, so that every kernel of the cases is compiled.

    A config that is given makes the same kernels for all numbers of tokens but 1, one that is chosen does not.
    """
    jobs, seen = [], set()
    for case in cases:
        for name in names:
            impl = load(name)
            if impl.unsuited(case):
                continue
            fresh = []
            for config in impl.candidates(case):
                tokens = case.tokens if config is None else min(case.tokens, 2)
                key = (name, case.layer, case.dtype, tokens, json.dumps(config))
                if key not in seen:
                    seen.add(key)
                    fresh.append(config)
            jobs += [(name, case, fresh[i : i + 4]) for i in range(0, len(fresh), 4)]
    return jobs


def compile_job(name: str, case: Case, configs: list) -> None:
    problem = make_problem(case, DEVICE, seed=0, blank=True)
    for config in configs:
        with unusable_configs():
            load(name).bind(problem, config)(0)
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def compile_ahead(
    cases: list[Case], names: list[str], workers: int, deadline: float, say: Callable[[str], None]
) -> None:
    run_ahead(compile_job, compile_jobs(cases, names), min(workers, os.cpu_count() or 1), deadline, say)


def case_from(data: dict) -> Case:
    """The case of `asdict(case)`."""
    return Case(**data | {"layer": Layer(**data["layer"])})
