"""benchmarks/power.py, but for what needs a GPU."""

import csv

import power
import pytest
import torch
from moe_shapes import LAYERS, Case
from rich.console import Console


def test_a_line_of_nvidia_smi_is_read_and_others_are_left_out():
    assert power.parse("1350, 701.25\n") == (1350, 701.25)
    for line in ("", "[N/A], [N/A]", "1350", "1350, 700, 60", "No devices were found"):
        assert power.parse(line) is None


def test_samples_count_within_their_time_alone():
    sampler = object.__new__(power.Sampler)
    sampler.samples = [(1.0, 1900.0, 300.0), (2.0, 1400.0, 690.0), (3.0, 1300.0, 710.0), (9.0, 200.0, 70.0)]
    assert sampler.mean(1.5, 3.0) == (1350, 700)
    assert sampler.mean(4.0, 5.0) is None


def test_the_dense_products_are_the_layers():
    """All multiplications of the layer, and no others."""
    case = Case(LAYERS["qwen3-30b-a3b"], 100)
    up, down, layer = power.jobs(case)
    assert up[2] + down[2] == layer[2] == case.flops
    assert up[1] == (800, 2048, 1536)
    assert down[1] == (800, 768, 2048)


@pytest.mark.parametrize("right", [True, False])
def test_a_wrong_layer_has_no_speed(right, monkeypatch):
    case = Case(LAYERS["tiny"], 5)
    if right:
        assert power.layer(case)(0).shape == (5, LAYERS["tiny"].hidden)
        return
    problem, expected = power.checked_problem(case, 0)
    monkeypatch.setattr(power, "checked_problem", lambda case, seed: (problem, torch.ones_like(expected)))
    with pytest.raises(SystemExit, match="no speed is shown"):
        power.layer(case)


def test_rows_and_table(tmp_path, monkeypatch, capsys):
    """Rows come as they are measured; --report shows them again. A GPU without nvidia-smi has no clock to tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    monkeypatch.setattr(power, "Sampler", lambda: type("Nothing", (), {"close": lambda self: None})())
    times = iter([{"mhz": 1350.0, "watts": 700.4}, {"mhz": "", "watts": ""}, {"mhz": "", "watts": ""}])
    speed = {"burst_us": 1000.0, "sustained_us": 2000.0}
    monkeypatch.setattr(power, "measure", lambda run, sampler: speed | next(times))
    for name in ("dense", "layer"):
        monkeypatch.setattr(power, name, lambda *sizes: None)
    chosen = ["--model", "mixtral-8x7b", "--tokens", "16", "--commit", "abc", "--out", str(tmp_path)]
    assert power.main(chosen) == 0
    with (tmp_path / "power.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == [
        "cublas, as gate_up",
        "cublas, as down",
        "layer mixtral-8x7b 16 uniform bf16",
    ]
    assert [(row["mhz"], row["watts"]) for row in rows] == [("1350", "700"), ("", ""), ("", "")]
    flops = 2 * 32 * 4096 * 28672
    assert float(rows[0]["burst_tflops"]) == pytest.approx(flops / 1e9, abs=0.06)
    assert float(rows[0]["sustained_tflops"]) == pytest.approx(flops / 2e9, abs=0.06)
    assert {(row["gpu"], row["commit"]) for row in rows} == {("NVIDIA Test 1", "abc")}
    capsys.readouterr()
    assert power.main(["--report", "--out", str(tmp_path)]) == 0
    assert "28672" in capsys.readouterr().out


def test_what_it_needs_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none here"):
        power.main([])
    with pytest.raises(SystemExit, match="no measurement in"):
        power.main(["--report", "--out", str(tmp_path)])
    for wrong in (["--report"], ["--tokens", "0"], ["--model", "gpt-5"]):
        with pytest.raises(SystemExit) as error:
            power.main(wrong)
        assert error.value.code == 2


def test_the_table_takes_rows_without_a_clock():
    row = dict.fromkeys(power.COLUMNS, "1") | {"mhz": "", "watts": ""}
    console = Console(width=140, record=True)
    console.print(power.table([row]))
    assert console.export_text().count("-") >= 2
