"""benchmarks/step_metadata.py, but for what needs a GPU."""

import time

import pytest
import step_metadata
import torch


class Wrapper:
    """Stands in for a punica wrapper: its calls, each of which takes a while."""

    def __init__(self):
        self.calls = []

    def update_metadata(self, *args):
        self.calls.append(args)
        time.sleep(1e-4)


def test_every_step_is_timed_with_the_mappings_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(step_metadata, "STEPS", 12)
    monkeypatch.setattr(step_metadata, "WARM_UP", 4)
    wrapper = Wrapper()
    samples = step_metadata.step_us(wrapper, ["a", "b", "c"], [7, None])
    assert len(samples) == 12
    assert min(samples) >= 100
    assert [call[0] for call in wrapper.calls] == ["a", "b", "c"] * 5 + ["a"]
    assert all(call[1:] == ([7, None], 3, step_metadata.VOCABULARY) for call in wrapper.calls)


def test_the_table_has_a_line_for_each_row():
    row = {"requests": 256, "adapters": 32, "slots": 32, "steps": "same", "variant": "stock"}
    table = step_metadata.table([row | {"us": "1.5", "us_p10": "1.0", "us_p90": "2.0"}] * 3)
    assert table.row_count == 3


def test_bad_arguments_are_named(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        step_metadata.main(["--adapters", "8", "--slots", "4"])
    assert "8 adapters do not fit into 4 slots" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none here"):
        step_metadata.main([])
