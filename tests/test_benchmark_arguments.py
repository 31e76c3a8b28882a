"""Arguments of the scripts in benchmarks/ that are refused before anything is measured."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def refusal(script: str, *words: str) -> str:
    """What a script says that ends at once."""
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *words], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("vllm_agreement.py", "--variant stock"),
        ("moe_agreement.py", "--host vllm --variant base"),
        ("soak.py", "--model tiny"),
        ("ops_speed.py", ""),
    ],
)
def test_a_folder_that_cannot_be_made(tmp_path, script, words):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "results" / "x"
    assert f"--out: {out.parent}" in refusal(script, *words.split(), "--out", str(out))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ops_speed.py --rank 16 600", "--rank: 600 is above 512"),
        ("ops_speed.py --rank 0", "--rank: 0 is not 1 or more"),
        ("ops_speed.py --rank many", "--rank: invalid int value: 'many'"),
        ("ops_speed.py --seed -1", "--seed: -1 is not 0 or more"),
        ("ops_speed.py --time-limit -1", "--time-limit: -1 is not 0 or more"),
        ("ops_speed.py --time-limit nan", "--time-limit: nan is not 0 or more"),
        ("ops_speed.py --workers -1", "--workers: -1 is not 0 or more"),
        ("ops_speed.py --moe --seed -1", "--seed: -1 is not 0 or more"),
        ("ops_speed.py --moe --time-limit -1", "--time-limit: -1 is not 0 or more"),
        ("ops_speed.py --moe --workers -1", "--workers: -1 is not 0 or more"),
        ("soak.py --rank 600", "--rank: 600 is above 512"),
        ("soak.py --seed -1", "--seed: -1 is not 0 or more"),
        ("vllm_agreement.py --out . --rank 600", "--rank: 600 is above 512"),
    ],
)
def test_a_number_that_cannot_be(words, message):
    assert f"error: argument {message}\n" in refusal(*words.split())


@pytest.mark.parametrize("words", ["vllm_agreement.py", "moe_agreement.py --host vllm"])
def test_nothing_to_do(tmp_path, words):
    assert "nothing to do: give --variant, --compare or both" in refusal(*words.split(), "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("script", "words", "package"),
    [
        ("vllm_agreement", "--model tiny --variant stock", "vllm"),
        ("vllm_agreement", "--model tiny --variant reference", "peft"),
        ("moe_agreement", "--model tiny-moe --host vllm --variant base", "vllm"),
        ("moe_agreement", "--model tiny-moe --host sglang --variant patched", "sglang"),
        ("soak", "--model tiny", "vllm"),
    ],
)
def test_a_missing_package_is_named_before_a_process_starts(monkeypatch, tmp_path, script, words, package):
    run = subprocess.run

    def no_python(command, **options):
        assert command[0] != sys.executable, "started a process"
        return run(command, **options)

    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    monkeypatch.setattr(subprocess, "run", no_python)
    with pytest.raises(SystemExit, match=f"^{sys.executable} has no {package}: install it there"):
        importlib.import_module(script).main([*words.split(), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("script", ["ops_speed.py", "serving_vllm.py", "serving_sglang.py", "power.py"])
def test_a_report_of_nothing(tmp_path, script):
    command = [sys.executable, str(BENCHMARKS / script), "--report", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"no measurement in {tmp_path}/" in done.stdout + done.stderr
