"""benchmarks/soak.py: its verdict, on reports made here."""

import copy

import numpy as np
import pytest
import soak

NOISE, WEIGHTS, POSITIONS = 0.01, 6, 35


def idle(**more: float) -> dict:
    at_rest = {"resident_mib": 5000.0, "allocated_mib": 900.0, "live tensors": 400, "open files": 60}
    return at_rest | {"compiled kernels": 40, "compiled layers": 8, "activations": 100} | more


@pytest.fixture
def report() -> dict:
    """Of a soak whose probes differ by the noise."""
    rng = np.random.default_rng()
    truth = {w: rng.normal(-8, 1, POSITIONS) for w in (None, *range(WEIGHTS))}

    def ask(w) -> list[float]:
        return (truth[w] + rng.normal(0, NOISE, POSITIONS)).tolist()

    alone = {w: ask(w) for w in truth}

    def window() -> soak.Window:
        errors = [soak.Probe(w, ask(w)).rms(alone[w]) for w in truth]
        return soak.Window(seconds=60, tokens=60_000, finished=700, errors=errors)

    return {
        "alone": alone,
        "again": copy.deepcopy(alone),
        "noise": NOISE,
        "loaded": [soak.Probe(w, ask(w)) for w in truth],
        "windows": [window() for _ in range(4)],
        "idle": idle(),
        "idle_after": idle(),
        "speed": 1000.0,
        "speed_after": 950.0,
    }


def broken(report: dict) -> list[str]:
    options = soak.parse(["--cpu-slots", "8"])
    return [check.what.strip() for check in soak.checks(report, options, adapter_mib=10) if not check.holds]


def test_a_clean_run_has_no_fault(report):
    assert broken(report) == []


def test_one_probe_with_the_weights_of_another(report):
    wrong = soak.Probe(1, report["alone"][2])
    report["loaded"] += [copy.deepcopy(probe) for probe in report["loaded"]] * 100
    report["loaded"].append(wrong)
    assert broken(report)[-1] == "the worst of them"


def test_answers_that_drift(report):
    for error in range(len(report["windows"][3].errors)):
        report["windows"][3].errors[error] = 5 * NOISE
    assert "the worst window" in broken(report)


def test_answers_that_stay_changed(report):
    report["again"][2] = [logprob + 0.5 for logprob in report["again"][2]]
    assert broken(report) == ["alone after the soak against before, rms"]


def test_nan_never_passes(report):
    report["again"][0][3] = float("nan")
    assert broken(report) == ["alone after the soak against before, rms"]
    report["windows"][1].errors[0] = float("nan")
    assert len(broken(report)) > 1


def test_a_soak_without_probes_proves_nothing(report):
    for window in report["windows"]:
        window.errors = []
    assert len(broken(report)) == 3


def test_adapters_that_are_alike_prove_nothing(report):
    report["alone"][1] = report["again"][1] = report["alone"][0]
    assert "noise against the least distance of two adapters" in broken(report)


@pytest.mark.parametrize(
    ("grown", "what"),
    [
        ({"resident_mib": 5200.0}, "resident memory, idle to idle, MiB"),  # 64 and 8 adapters of 10 MiB are allowed
        ({"resident_mib": 5400.0, "activations": 5100}, "resident memory, idle to idle, MiB"),  # and 164 MiB for loads
        ({"live tensors": 1400}, "new live tensors"),
        ({"allocated_mib": 920.0}, "allocated on the GPU, idle to idle, MiB"),
        ({"compiled kernels": 41}, "new compiled kernels"),
        ({"compiled layers": 9}, "new compiled layers"),
        ({"open files": 100}, "new open files"),
    ],
)
def test_growth(report, grown, what):
    report["idle_after"] = idle(**grown)
    assert broken(report) == [what]


def test_what_the_host_loses_by_loading_is_allowed(report):
    report["idle_after"] = idle(resident_mib=5200.0, activations=5100)
    assert broken(report) == []


@pytest.mark.parametrize("after", [890.0, float("nan")])
def test_a_slower_engine(report, after):
    report["speed_after"] = after
    assert broken(report) == ["tokens/s of the same requests lost, idle to idle"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--adapters 2",
        "--concurrency 3",
        "--cpu-slots 2",
        "--minutes 0",
        "--minutes nan",
        "--swaps -1",
        "--longest-prompt 2048",
    ],
)
def test_bad_options_are_one_error(arguments, capsys):
    with pytest.raises(SystemExit):
        soak.parse(arguments.split())
    assert arguments.split()[0] in capsys.readouterr().err
