"""Kernels made by the ptxas that PyTorch brings, which Triton runs once torch.compile did: in vLLM's processes, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

PTXAS = Path(torch.__file__).parent / "bin" / "ptxas"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(not PTXAS.exists(), reason=f"there is no {PTXAS}"),
]


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("test_plan_ops.py", "test_linear or test_beside or test_wide_tiles"),
        ("test_moe_ops.py", "test_layer and bfloat16"),
        ("test_moe_quant.py", "test_cases or test_grouped_gemm and bfloat16"),
    ],
    ids=["lora", "moe", "quantised moe"],
)
def test_kernels_agree_with_the_reference(file, names):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{file}", "-k", names],
        cwd=ROOT,
        env=os.environ | {"TRITON_PTXAS_PATH": str(PTXAS)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
