"""Kernel tests run on a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import numpy as np
import pytest
import torch

from ops_configs import store
from ops_patches import library, replay


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if not library.INTERPRET:
        pytest.skip(f"no GPU and TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}: `make test` sets it to 1")
    return "cpu"


@pytest.fixture(params=["float16", "float32", "bfloat16"])
def dtype(request, device) -> torch.dtype:
    if request.param == "bfloat16" and device == "cpu":
        pytest.skip("the interpreter's bf16 dot multiplies bit patterns")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Each call runs its Python: a test may change what it launches. tests/gpu/test_replay_gpu.py has the others."""
    store.forget()
    monkeypatch.setattr(replay, "KEPT", 0)


@pytest.fixture
def products_in_order(device, monkeypatch):
    """The interpreter adds up a product's terms in order; numpy's order depends on the place of a row and the CPU."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
        return total

    if device == "cpu":
        monkeypatch.setattr(np, "matmul", matmul)
