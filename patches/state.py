"""Status files: every patched process writes <pid>.json, so that other processes can see what it did.

The folder is LORA_OPS_STATUS_DIR, or <temporary folder>/lora_ops-<uid>. A file is replaced atomically, removed when its
process exits, and skipped and cleaned when its process is gone.
"""

import atexit
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ops_configs.files import replacing

logger = logging.getLogger("lora_ops")

STATUS_DIR = "LORA_OPS_STATUS_DIR"
INTERVAL_S = 1.0

_providers: dict[str, Callable[[], dict]] = {}
_lock = threading.Lock()
_writing = threading.Lock()
_last = float("-inf")
_pending: threading.Timer | None = None
_written: dict | None = None
_warned = False


def directory() -> Path:
    """The folder of the status files, whether or not it exists."""
    configured = os.environ.get(STATUS_DIR)
    return Path(configured) if configured else Path(tempfile.gettempdir()) / f"lora_ops-{os.getuid()}"


def register(name: str, provider: Callable[[], dict]) -> None:
    """Publish `provider()` under `name` from now on."""
    if not _providers:
        atexit.register(remove)
    _providers[name] = provider


def publish(force: bool = False) -> None:
    """Write this process's status file: now with `force`, else in a thread of its own, at most once a second.

    Whoever serves never waits for a disk, and the file never lags more than a second: what is counted after a write,
    such as the rest of a step, is written by another. Does nothing before something is registered. A folder that cannot
    be written is one warning, never an error, and is tried again the next time.
    """
    global _pending
    if not _providers:
        return
    if force:
        _write_now()
    elif _pending is None:
        with _lock:
            if _pending is None:
                _pending = threading.Timer(max(0.0, _last + INTERVAL_S - time.monotonic()), _write_in_turn)
                _pending.daemon = True
                _pending.start()


def _write_in_turn() -> None:
    if _write_now():
        publish()


def _write_now() -> bool:
    """Whether something was written that differs from what was."""
    global _last, _pending
    with _lock:
        _last, _pending = time.monotonic(), None
    with _writing:
        return _write()


def remove() -> None:
    """Remove this process's status file."""
    with contextlib.suppress(OSError):
        _file(os.getpid()).unlink()


def processes() -> list[dict]:
    """The status of every live process, by pid: {"pid", "started", "written", <registered name>: {...}}."""
    return [status for _, status in files() if status is not None]


def files() -> Iterator[tuple[Path, dict | None]]:
    """The file and the status of every live process, by pid, and None as the status of files that hold none."""
    for path in sorted(directory().glob("*.json"), key=lambda path: path.name.zfill(24)):
        try:
            status = json.loads(path.read_text())
            alive = _alive(status)
        except OSError:  # gone meanwhile, or another user's
            continue
        except (ValueError, LookupError, TypeError, OverflowError):
            yield path, None
            continue
        if alive:
            yield path, status
        elif path == _file(status["pid"]):
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            yield path, None


def _file(pid: int) -> Path:
    return directory() / f"{pid}.json"


def _write() -> bool:
    global _written, _warned
    pid = os.getpid()
    told = {name: provider() for name, provider in _providers.items()}
    status = {"pid": pid, "started": _started(pid), "written": time.time()} | told
    try:
        path = _file(pid)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{path.parent} belongs to another user")
        with replacing(path) as part:
            part.write_text(json.dumps(status))
    except OSError as exc:
        if not _warned:
            logger.warning("lora_ops: no status file for pid %d: %s; set %s to a folder of yours", pid, exc, STATUS_DIR)
        _warned = True
        return False
    changed, _written = told != _written, told
    return changed


def _started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when it is gone, or /proc does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # from field 3 on: the name before may hold spaces
    return None if fields[0] == "Z" else int(fields[19])


def _alive(status: dict) -> bool:
    if status["started"] is not None:  # tells a reused pid too
        return _started(status["pid"]) == status["started"]
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _after_fork() -> None:
    global _lock, _writing, _last, _pending
    _lock, _writing, _last, _pending = threading.Lock(), threading.Lock(), float("-inf"), None


os.register_at_fork(after_in_child=_after_fork)
