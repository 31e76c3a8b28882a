"""Counts of calls that took our kernels (hit), took the host's path instead (fallback), or failed (error).

Leaf module: imports neither the host nor anything else of this library. A count costs one dictionary increment.
"""

import logging
import os
from collections import Counter

logger = logging.getLogger("lora_ops")

_hits: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[tuple[str, str, str]] = Counter()
_errors: Counter[tuple[str, str, str]] = Counter()


def hit(op: str, library: str = "lora_ops") -> None:
    """Count one call of a library's `op` that ran our kernel."""
    _hits[library, op] += 1


def fallback(op: str, reason: str, library: str = "lora_ops") -> None:
    """Count one call of `op` that was left to the host; each (op, reason) is logged once, as a warning."""
    _fallbacks[library, op, reason] += 1
    if _fallbacks[library, op, reason] == 1:
        logger.warning("%s: %s falls back to the host: %s", library, op, reason)


def error(op: str, exc_type: type[BaseException] | str, library: str = "lora_ops") -> None:
    """Count one call of `op` that raised; the caller re-raises."""
    _errors[library, op, exc_type if isinstance(exc_type, str) else exc_type.__name__] += 1


def snapshot(library: str | None = None) -> dict[str, dict]:
    """Counts of a library, or of both: {"hit": {op: n}, "fallback": {op: {reason: n}}, "error": {op: {type: n}}}."""
    return {
        "hit": _nested(_hits, library),
        "fallback": _nested(_fallbacks, library),
        "error": _nested(_errors, library),
    }


def reset() -> None:
    """Set every count to zero; a fallback that comes again is logged again."""
    for counts in (_hits, _fallbacks, _errors):
        counts.clear()


def _nested(counts: Counter[tuple[str, ...]], library: str | None) -> dict:
    """{op: n} or {op: {detail: n}} of the counts by (library, op) or (library, op, detail)."""
    nested: dict = {}
    for (of, op, *details), count in dict(counts).items():
        if library not in (None, of):
            continue
        if details:
            nested.setdefault(op, {})[details[0]] = count
        else:
            nested[op] = count
    return nested


os.register_at_fork(after_in_child=reset)
