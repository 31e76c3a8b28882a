"""No kernel reads or writes out of bounds, and none races."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the path"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean(tool):
    # the caching allocator would hide reads past the end of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    run = subprocess.run(
        [*command, "tests.gpu.sanitizer_job"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
