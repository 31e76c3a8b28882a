"""The wheel: what it holds, and that it works in a clean environment with nothing but its declared dependencies."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PACKAGES = {"lora_ops": "lora_ops", "moe_ops": "moe_ops", "ops_patches": "patches", "ops_configs": "configs"}

PROBE = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import lora_ops, moe_ops, ops_patches, ops_configs
for name in lora_ops.__all__:
    getattr(lora_ops, name)
end = time.perf_counter()
print(json.dumps({
    "files": [module.__file__ for module in (lora_ops, moe_ops, ops_patches, ops_configs)],
    "hosts": sorted(name for name in sys.modules if name.split(".")[0] in ("vllm", "sglang")),
    "cuda": torch.cuda.is_initialized(),
    "torch_s": middle - start,
    "ours_s": end - middle,
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what a wheel is made from, so that no earlier build is in the way."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES.values():
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def declared(wheel: Path) -> list[str]:
    """Requirements in the wheel's metadata."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist")


def dependencies(requirements: list[str], found: set[str]) -> set[str]:
    """Names of the distributions that the requirements ask for, and those of any depth, added to `found`."""
    for line in requirements:
        needed = Requirement(line)
        name = canonicalize_name(needed.name)
        if name in found or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        dependencies(importlib.metadata.requires(name) or [], found)
    return found


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """Python of a new environment with the wheel and links to its dependencies; no vLLM, no SGLang, no tests."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    for name in dependencies(declared(wheel), set()):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    pip("install", "--no-deps", "--target", site, wheel)
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Isolated, away from the repository, with no GPU in sight."""
    return subprocess.run(
        [str(python), "-I", *arguments],
        cwd=python.parent,
        env={"CUDA_VISIBLE_DEVICES": "", "HOME": str(python.parent), "LORA_OPS_STATUS_DIR": str(python.parent)},
        capture_output=True,
        text=True,
    )


def test_holds_our_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top - {info} == set(PACKAGES)
    assert f"{info}/licenses/LICENSE" in names


def test_holds_every_source_file(wheel):
    """A subpackage that pyproject.toml does not list would be missing."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    sources = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packed == sources


def test_pins_neither_torch_nor_triton(wheel):
    assert {"torch", "triton"} <= set(declared(wheel))


def test_imports_without_a_host_or_a_gpu(clean_python):
    probes = []
    for _ in range(3):  # the first one compiles the files
        done = run(clean_python, "-c", PROBE)
        assert done.returncode == 0, done.stderr
        probes.append(json.loads(done.stdout))
    assert all(str(clean_python.parents[1]) in file for file in probes[0]["files"])
    assert probes[0]["hosts"] == []
    assert not probes[0]["cuda"]
    assert min(probe["ours_s"] for probe in probes) < 1.0, probes


def test_doctor_runs_without_a_host(clean_python):
    done = run(clean_python, "-m", "lora_ops.doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["installed"]["serving-ops"]
    assert not report["fit"]["vllm"]["installed"]
    assert report["problems"] == []


def test_patching_without_a_host_is_one_warning(clean_python):
    done = run(clean_python, "-c", "import lora_ops; print(lora_ops.patch_vllm().applied)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    assert done.stderr.count("WARNING") == 1
    assert "vllm is not installed" in done.stderr
