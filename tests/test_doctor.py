"""The doctor: what it finds, what it calls a problem, and its exit code."""

import importlib.metadata
import json
import os
import subprocess
import sys
import types

import pytest

from lora_ops import doctor
from ops_patches import debug, engine, state, vllm_lora

TARGET, SELDOM = "vllm.platforms:current_platform.get", "vllm.config:Config.compute_hash"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No variable of ours but the status folder, vLLM 1.5 installed, and a patch that fits."""
    for name in [name for name in os.environ if name.startswith(doctor.PREFIXES) or name in doctor.VARIABLES]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path))
    versions = {"torch": "2.9.0", "vllm": "1.5"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    points = [types.SimpleNamespace(name=name) for name in ("lora_ops", "moe_ops")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    for patches in doctor.PATCHES:
        monkeypatch.setattr(patches, "verify", lambda: [])
    return versions


@pytest.fixture
def examine(capsys, monkeypatch):
    """Runs the doctor: (exit code, report, what it shows to a person)."""

    def run():
        monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
        code = doctor.main()
        report = json.loads(capsys.readouterr().out)
        monkeypatch.setattr(sys, "argv", ["doctor"])
        monkeypatch.setenv("COLUMNS", "200")
        assert doctor.main() == code == (1 if report["problems"] else 0)
        return code, report, capsys.readouterr().out

    return run


def process(pid, **status):
    """The status file of a live process, this one, under another pid."""
    status = {
        "pid": pid,
        "host": "vllm",
        "version": "1.5",
        "patched": True,
        "reasons": [],
        "targets": {TARGET: 1, SELDOM: 0},
        "never_fired": [],
        "counters": {"hit": {}, "fallback": {}, "error": {}},
    } | status
    written = {"pid": os.getpid(), "started": state._started(os.getpid()), "written": 0.0, "vllm": status}
    (state.directory() / f"{pid}.json").write_text(json.dumps(written))


def test_nothing_is_wrong(examine):
    process(1)
    code, report, shown = examine()
    assert (code, report["problems"]) == (0, [])
    assert report["installed"]["torch"] == "2.9.0"
    assert report["installed"]["sglang"] is None
    assert "nothing is wrong" in shown
    assert "not installed" in shown


def test_it_works_without_a_host_and_without_a_gpu(clean, examine, monkeypatch):
    clean.clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(vllm_lora.VLLM_LORA, "verify", lambda: pytest.fail("there is no host to verify"))
    code, report, shown = examine()
    assert code == 0
    assert report["gpus"] == []
    assert report["fit"]["vllm"]["installed"] is False
    assert "none found" in shown


@pytest.mark.parametrize(("status", "gpus"), [(0, 2), (9, 0)])
def test_gpus_are_read_from_nvidia_smi(monkeypatch, tmp_path, status, gpus):
    tool = tmp_path / "nvidia-smi"
    lines = ("NVIDIA H200, 143771 MiB, 9.0, 570.1", "B, 2 MiB, 9.0, 5", "WARNING: infoROM is corrupted at gpu 0000:3A")
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert len(doctor.gpus()) == gpus
    if gpus:
        first = {"name": "NVIDIA H200", "memory.total": "143771 MiB", "compute_cap": "9.0", "driver_version": "570.1"}
        assert doctor.gpus()[0] == first


def test_a_bad_value_and_a_misspelt_variable_are_problems(examine, monkeypatch):
    monkeypatch.setenv("LORA_OPS_VLLM", "yes")
    monkeypatch.setenv("LORA_OPS_DEBUG", "true")
    debug.enabled.cache_clear()
    monkeypatch.setenv("LORA_OPS_VLM", "1")
    code, report, shown = examine()
    assert code == 1
    bad, worse, misspelt = report["problems"]
    assert "LORA_OPS_VLLM='yes'" in bad
    assert "LORA_OPS_DEBUG='true'" in worse
    assert "LORA_OPS_VLM is not known" in misspelt
    assert "LORA_OPS_VLLM" in misspelt
    assert bad in shown
    assert misspelt in shown


def test_a_status_folder_that_cannot_be_written_is_a_problem(examine, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in examine()[1]["problems"][0]


def test_a_status_folder_that_is_not_there_yet_is_none(examine, monkeypatch, tmp_path):
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "later"))
    assert examine()[0] == 0


def test_a_status_folder_that_is_a_file_is_a_problem(examine, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        monkeypatch.setenv(state.STATUS_DIR, str(folder))
        (problem,) = examine()[1]["problems"]
        assert problem == f"{file} is no folder: set {state.STATUS_DIR} to a folder of yours"


@pytest.mark.parametrize(
    "change",
    [
        {"vllm": {"model": "llama"}},
        {"vllm": 3},
        {"pid": 2**70, "started": None},
        {"pid": 1, "started": -1},  # of no live process, under another's name
        {"started": "today"},
    ],
)
def test_a_file_that_is_no_status_is_a_problem_and_stays(examine, tmp_path, change):
    process(7)
    file = tmp_path / "package.json"
    file.write_text(json.dumps(json.loads((tmp_path / "7.json").read_text()) | change))
    _, report, shown = examine()
    (problem,) = report["problems"]
    assert problem.startswith(f"{file} is no status file of this version of the library: remove it")
    assert problem in shown
    assert [found["vllm"]["pid"] for found in report["processes"]] == [7]
    assert file.exists()


def test_what_does_not_fit_is_a_problem(examine, monkeypatch):
    monkeypatch.setattr(vllm_lora.VLLM_LORA, "verify", lambda: ["a takes [x], expected (y)", "b is not there"])
    code, report, shown = examine()
    assert code == 1
    assert report["fit"]["vllm"]["misfits"] == ["a takes [x], expected (y)", "b is not there"]
    assert "vllm cannot be patched: a takes [x], expected (y)" in shown
    assert "vllm cannot be patched: b is not there" in shown


def test_what_a_host_prints_on_import_does_not_spoil_the_json(examine, monkeypatch):
    monkeypatch.setattr(vllm_lora.VLLM_LORA, "verify", lambda: print("INFO importing") or [])
    assert examine()[0] == 0


def test_an_allowlist_without_us_is_a_problem(examine, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    problems = examine()[1]["problems"]
    assert len(problems) == 2
    for problem, name in zip(problems, ("lora_ops", "moe_ops"), strict=True):
        assert "worker processes would stay unpatched" in problem
        assert f"VLLM_PLUGINS=another leaves {name} out" in problem


def test_moe_patches_of_both_hosts_are_examined(clean, examine, monkeypatch):
    clean["sglang"] = "0.5.17"
    process(1)
    file = state.directory() / "1.json"
    written = json.loads(file.read_text())
    written["vllm_moe"] = written["vllm"] | {"targets": {"a.moe:Experts.apply": 7}}
    written["sglang_moe"] = written["vllm"] | {
        "host": "sglang",
        "targets": {"b.moe:fused": 0},
        "never_fired": ["b.moe:fused"],
    }
    file.write_text(json.dumps(written))
    monkeypatch.setenv("MOE_OPS_SGLANG", "true")
    code, report, shown = examine()
    assert list(report["fit"]) == ["vllm", "vllm_moe", "sglang_moe"]
    assert all(fit["installed"] for fit in report["fit"].values())
    assert code == 1
    assert report["problems"][0].startswith("MOE_OPS_SGLANG='true' is not allowed")
    assert report["problems"][1] == "b.moe:fused is patched but has fired in no process"
    assert "apply 7" in shown


def test_processes_are_shown_with_their_counts(examine):
    counts = {"hit": {"lora_linear": 12}, "fallback": {"fused_moe": {"kept [host]": 3}}, "error": {}}
    process(1, counters=counts)
    _, _, shown = examine()
    for text in ("get 1", "compute_hash 0", "lora_linear 12", "fused_moe 3 x kept [host]"):
        assert text in shown


def test_an_error_in_our_kernels_is_a_problem(examine):
    process(1, counters={"hit": {}, "fallback": {}, "error": {"lora_linear": {"RuntimeError": 2}}})
    (problem,) = examine()[1]["problems"]
    assert "lora_linear raised 2 x RuntimeError" in problem


def test_a_target_that_fired_in_no_process_is_a_problem(examine):
    idle = {"targets": {TARGET: 0, SELDOM: 0}, "never_fired": [TARGET]}
    process(1, **idle)
    assert examine()[1]["problems"] == [f"{TARGET} is patched but has fired in no process"]
    process(2)  # the worker, where it fires
    assert examine()[1]["problems"] == []


def test_a_refused_process_is_a_problem_and_an_unpatched_one_is_not(examine):
    process(1, patched=False, reasons=["vllm 9.9 is not one of the tested versions"], targets={})
    process(2, patched=False, reasons=[engine.UNPATCHED])
    (problem,) = examine()[1]["problems"]
    assert "unpatched: vllm 9.9 is not one of the tested versions" in problem


def test_it_runs_as_a_module(tmp_path):
    environment = {"PATH": "/nowhere", "LORA_OPS_VLLM": "2", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "lora_ops.doctor", "--json"], capture_output=True, env=environment)
    assert done.returncode == 1
    assert any("LORA_OPS_VLLM='2'" in problem for problem in json.loads(done.stdout)["problems"])
