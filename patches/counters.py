"""Counts of calls that took our kernels (hit), took the host's path instead (fallback), or failed (error).

Leaf module: imports neither the host nor anything else of this library. A count costs one dictionary increment.
"""

import logging
import os
from collections import Counter

logger = logging.getLogger("lora_ops")

_hits: Counter[str] = Counter()
_fallbacks: Counter[tuple[str, str]] = Counter()
_errors: Counter[tuple[str, str]] = Counter()


def hit(op: str) -> None:
    """Count one call of `op` that ran our kernel."""
    _hits[op] += 1


def fallback(op: str, reason: str, library: str = "lora_ops") -> None:
    """Count one call of `op` that was left to the host; each (op, reason) is logged once, as a warning."""
    _fallbacks[op, reason] += 1
    if _fallbacks[op, reason] == 1:
        logger.warning("%s: %s falls back to the host: %s", library, op, reason)


def error(op: str, exc_type: type[BaseException] | str) -> None:
    """Count one call of `op` that raised; the caller re-raises."""
    _errors[op, exc_type if isinstance(exc_type, str) else exc_type.__name__] += 1


def snapshot() -> dict[str, dict]:
    """All counts as plain data: {"hit": {op: n}, "fallback": {op: {reason: n}}, "error": {op: {type: n}}}."""
    return {"hit": dict(_hits), "fallback": _nested(_fallbacks), "error": _nested(_errors)}


def reset() -> None:
    """Set every count to zero; a fallback that comes again is logged again."""
    for counts in (_hits, _fallbacks, _errors):
        counts.clear()


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (op, detail), count in dict(counts).items():
        nested.setdefault(op, {})[detail] = count
    return nested


os.register_at_fork(after_in_child=reset)
