"""benchmarks/launch_time.py, but for what needs a GPU."""

import functools

import launch_time
import pytest
import torch


def test_calls(monkeypatch):
    """They take turns, the first ones are left out, and the GPU is waited for after each."""
    seen = []
    monkeypatch.setattr(launch_time, "CALLS", 12)
    monkeypatch.setattr(launch_time, "WARM_UP", 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    samples = launch_time.call_us({name: functools.partial(seen.append, name) for name in ("stock", "patched")})
    assert {name: len(values) for name, values in samples.items()} == {"stock": 12, "patched": 12}
    assert seen == ["stock", "wait", "patched", "wait"] * 16


def test_profile(monkeypatch, capsys):
    monkeypatch.setattr(launch_time, "CALLS", 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launch_time.print_profile(lambda: sorted([2, 1]))
    assert "{built-in method builtins.sorted}" in capsys.readouterr().out


def test_table():
    row = dict.fromkeys(launch_time.COLUMNS, "x") | {"us": "1.5", "us_p10": "1.0", "us_p90": "2.0"}
    assert launch_time.table([row] * 3).row_count == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    with pytest.raises(SystemExit, match="GPU"):
        launch_time.main([])
