"""What of a sweep is kept, and written: pure functions over the records of a run.

sweep records -> `merge`: one config for each entry -> verification records -> `kept` -> `entries` -> files

Layers share entries: a shrink's belongs to (k, slices), an expand's to the widths and the planes it reads. So a
second, independent measurement times each layer with and without each of its two tuned halves, and an entry stays only
if it makes a layer faster by the margin and no layer slower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ops_configs.files import MAX_SHARED_BYTES, expand_file, shrink_file
from ops_configs.lora import ExpandConfig, ShrinkConfig, expand_default, fitted, shrink_default

from ..config import planes_read
from .layers import Layer

MARGIN = 0.03
"""A tuned entry is kept if it takes at least this fraction of a layer's time away."""
NOISE = 0.01
"""A layer counts as slower from this fraction on."""

Key = tuple[str, int, int]
"""(file, rank, rows) of an entry."""
Config = dict[str, int]


@dataclass(frozen=True, order=True)
class Case:
    """A layer, rank and number of tokens: what is measured at a time."""

    layer: Layer
    rank: int
    tokens: int

    @property
    def keys(self) -> tuple[Key, Key]:
        """The entries that the shrink and the expand look up."""
        k, widths = self.layer.k, self.layer.widths
        shrink = shrink_file(k, len(widths))
        expand = expand_file(widths, planes_read(k, widths, self.rank, self.tokens))
        return (shrink, self.rank, self.tokens), (expand, self.rank, self.tokens)


@dataclass(frozen=True)
class Swept:
    """Result of a sweep: configs of shrink and expand, None where the default won, and us a call."""

    shrink: Config | None
    expand: Config | None
    us: float
    default_us: float


@dataclass(frozen=True)
class Verified:
    """Second measurement of a case, us a call: with (tuned shrink?, tuned expand?)."""

    us: dict[tuple[bool, bool], float]

    def time(self, shrink: bool, expand: bool) -> float:
        """With these halves tuned; a half that has nothing tuned is the default whether asked for or not."""
        return self.us[shrink and (True, False) in self.us, expand and (False, True) in self.us]


def merge(swept: dict[Case, Swept]) -> dict[Key, Config]:
    """For each entry the config of the case that it saves most; entries that nobody wants tuned are left out."""
    best: dict[Key, tuple[float, Config]] = {}
    for case, result in swept.items():
        for key, config in zip(case.keys, (result.shrink, result.expand), strict=True):
            saved = result.default_us - result.us
            if config is not None and (key not in best or saved > best[key][0]):
                best[key] = saved, config
    return {key: config for key, (_, config) in best.items()}


def gains(verified: dict[Case, Verified], on: set[Key]) -> dict[Key, list[tuple[float, Case]]]:
    """For each entry that is on: how many times as long each case takes without it, the others as they are."""
    found: dict[Key, list[tuple[float, Case]]] = {}
    for case, result in verified.items():
        halves = tuple(key in on for key in case.keys)
        for i, key in enumerate(case.keys):
            if key in on:
                without = (halves[0] and i != 0, halves[1] and i != 1)
                found.setdefault(key, []).append((result.time(*without) / result.time(*halves), case))
    return found


def kept(verified: dict[Case, Verified], tuned: Iterable[Key]) -> set[Key]:
    """The tuned entries that stay: each makes some case faster by MARGIN and none slower; the worst goes first."""
    measured = {key for case in verified for key in case.keys}
    on = set(tuned) & measured
    while True:
        bad = []
        for key, found in gains(verified, on).items():
            ratios = [gain for gain, _ in found]
            if min(ratios) < 1 - NOISE or max(ratios) < 1 / (1 - MARGIN):
                bad.append((min(ratios), max(ratios), key))
        if not bad:
            return on
        on.remove(min(bad)[2])


def _default(case: Case, half: int, shared: int) -> ShrinkConfig | ExpandConfig:
    layer = case.layer
    if half == 0:
        return fitted(shrink_default(layer.k, len(layer.widths), case.rank, case.tokens), case.tokens, 2, shared)
    planes = planes_read(layer.k, layer.widths, case.rank, case.tokens)
    return expand_default(layer.widths, case.rank, case.tokens, planes)


def entries(
    verified: dict[Case, Verified], tuned: dict[Key, Config], on: set[Key], shared: int = MAX_SHARED_BYTES
) -> dict[str, dict]:
    """file -> (rank, rows) -> entry as it is written: the kept config, or the analytic default as it was measured.

    shared: memory of a block of the GPU, bytes.
    """
    found = gains(verified, on)
    written: dict[str, dict[tuple[int, int], dict]] = {}
    for case, result in sorted(verified.items(), key=lambda item: item[0]):
        halves = tuple(key in on for key in case.keys)
        for i, key in enumerate(case.keys):
            name, rank, rows = key
            if key in on and max(found[key])[1] != case:
                continue
            us = result.time(*halves)
            without = result.time(halves[0] and i != 0, halves[1] and i != 1)
            config = tuned[key] if key in on else asdict(_default(case, i, shared))
            entry = {"config": config, "us": round(us, 2), "default_us": round(without, 2)}
            written.setdefault(name, {}).setdefault((rank, rows), entry | {"layer": str(case.layer)})
    return written


def final_us(case: Case, result: Verified, on: set[Key]) -> tuple[float, float]:
    """Microseconds of a case with the analytic defaults, and with what was kept."""
    return result.time(False, False), result.time(*(key in on for key in case.keys))
