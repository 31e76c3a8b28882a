"""Counters, and the status files through which processes see each other."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from ops_patches import counters, state
from ops_patches.vllm_lora import VLLM_LORA
from ops_patches.vllm_moe import VLLM_MOE


@pytest.fixture(autouse=True)
def fresh_counts():
    counters.reset()
    yield
    counters.reset()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A status folder of our own, with this process publishing {"value": ...} as "job"."""
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "status"))
    monkeypatch.setattr(state, "_providers", {})
    monkeypatch.setattr(state, "_last", float("-inf"))
    monkeypatch.setattr(state, "_pending", None)
    monkeypatch.setattr(state, "_written", None)
    monkeypatch.setattr(state, "_warned", False)
    job = {"value": 0}
    state.register("job", lambda: dict(job))
    yield job
    if state._pending is not None:
        state._pending.cancel()


def own_file():
    return state.directory() / f"{os.getpid()}.json"


def test_snapshot_holds_every_count():
    counters.hit("shrink")
    counters.hit("shrink")
    counters.fallback("expand", "rank 600")
    counters.error("expand", ValueError)
    counters.error("expand", "OutOfMemoryError")
    assert counters.snapshot() == {
        "hit": {"shrink": 2},
        "fallback": {"expand": {"rank 600": 1}},
        "error": {"expand": {"ValueError": 1, "OutOfMemoryError": 1}},
    }
    json.dumps(counters.snapshot())
    counters.reset()
    assert counters.snapshot() == {"hit": {}, "fallback": {}, "error": {}}


def test_a_library_has_its_own_counts():
    """Layers of both may run in one process, whose status says of each what came of it."""
    counters.hit("lora_linear")
    counters.hit("fused_experts", "moe_ops")
    counters.fallback("fused_experts", "int4", "moe_ops")
    counters.error("lora_linear", ValueError)
    assert counters.snapshot("lora_ops") == {
        "hit": {"lora_linear": 1},
        "fallback": {},
        "error": {"lora_linear": {"ValueError": 1}},
    }
    assert counters.snapshot("moe_ops") == {
        "hit": {"fused_experts": 1},
        "fallback": {"fused_experts": {"int4": 1}},
        "error": {},
    }
    for patches in (VLLM_LORA, VLLM_MOE):
        assert patches.status()["counters"] == counters.snapshot(patches.entry_point[1])


def test_each_fallback_is_logged_once_with_its_reason(caplog):
    for reason in ("rank 600", "rank 600", "fp32 weights"):
        counters.fallback("expand", reason)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "expand" in caplog.text
    assert "rank 600" in caplog.text
    assert "fp32 weights" in caplog.text


def test_a_forked_child_counts_from_zero():
    counters.hit("shrink")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if counters.snapshot()["hit"] == {} else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert counters.snapshot()["hit"] == {"shrink": 1}


def test_nothing_is_published_before_something_is_registered(tmp_path, monkeypatch):
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "status"))
    monkeypatch.setattr(state, "_providers", {})
    state.publish(force=True)
    assert not state.directory().exists()
    assert state.processes() == []


def test_publish_and_read_back(files):
    files["value"] = 7
    state.publish(force=True)
    (found,) = state.processes()
    assert found["pid"] == os.getpid()
    assert found["job"] == {"value": 7}
    assert abs(found["written"] - time.time()) < 5
    assert state.directory().stat().st_mode & 0o777 == 0o700
    assert [path.name for path in state.directory().iterdir()] == [own_file().name]


def until(value: int) -> float:
    """Seconds until the file says so, or 10."""
    start = time.monotonic()
    while time.monotonic() < start + 10 and [status["job"]["value"] for status in state.processes()] != [value]:
        time.sleep(0.005)
    return time.monotonic() - start


def test_publishing_is_throttled_and_catches_up(files, monkeypatch):
    monkeypatch.setattr(state, "INTERVAL_S", 0.5)
    state.publish()
    assert until(0) < 0.4, "nothing was written yet: it need not wait"
    for files["value"] in range(1, 50):
        state.publish()
    assert state.processes()[0]["job"] == {"value": 0}
    assert until(49) < 10


def test_what_is_counted_after_the_last_call_is_written_too(files, monkeypatch):
    """As the rest of a step is, at whose start the host's worker publishes; then nothing more is."""
    monkeypatch.setattr(state, "INTERVAL_S", 0.5)
    state.publish()
    until(0)
    files["value"] = 7
    assert until(7) < 10
    time.sleep(1.5)
    assert state._pending is None


def test_who_publishes_does_not_wait_for_the_disk(files, monkeypatch):
    monkeypatch.setattr(state, "INTERVAL_S", 0.0)
    write = state._write

    disk, written = threading.Event(), []

    def slowly() -> None:
        disk.wait(20)
        write()
        written.append(files["value"])

    monkeypatch.setattr(state, "_write", slowly)
    for files["value"] in range(1, 10):
        state.publish()
        time.sleep(0.05)
    assert not written, "it waited for a write"
    disk.set()
    assert until(9) < 10
    state.publish(force=True)  # the threads have ended, then


def test_force_publishes_at_once(files):
    state.publish(force=True)
    files["value"] = 1
    state.publish(force=True)
    assert state.processes()[0]["job"] == {"value": 1}


def test_files_of_dead_processes_are_skipped_and_cleaned(files):
    state.publish(force=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = state.directory() / f"{dead.pid}.json"
    stale.write_text(json.dumps({"pid": dead.pid, "started": 1, "written": 0.0}))
    assert [status["pid"] for status in state.processes()] == [os.getpid()]
    assert not stale.exists()


def test_a_reused_pid_is_not_taken_for_the_process_that_wrote_the_file(files):
    state.publish(force=True)
    status = json.loads(own_file().read_text())
    own_file().write_text(json.dumps(status | {"started": status["started"] - 1}))
    assert state.processes() == []


def test_a_killed_process_that_nobody_waited_for_is_dead(files):
    state.publish(force=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = {"pid": sleeper.pid, "started": state._started(sleeper.pid), "written": 0.0}
    (state.directory() / f"{sleeper.pid}.json").write_text(json.dumps(status))
    assert [found["pid"] for found in state.processes()] == sorted([os.getpid(), sleeper.pid])
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, still in the process table
    assert [found["pid"] for found in state.processes()] == [os.getpid()]
    sleeper.wait()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"name": "package"}'])
def test_a_broken_or_foreign_file_is_skipped(files, content):
    state.publish(force=True)
    other = state.directory() / "12.json"
    other.write_bytes(content)
    assert [status["pid"] for status in state.processes()] == [os.getpid()]
    assert other.read_bytes() == content


def test_a_dead_process_of_another_user_is_skipped(files, monkeypatch):
    state.directory().mkdir()
    (state.directory() / "1.json").write_text(json.dumps({"pid": 1, "started": -1}))
    monkeypatch.setattr(os, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError))
    assert state.processes() == []


def test_another_process_sees_the_file_until_this_one_ends(files):
    code = (
        "from ops_patches import state\n"
        "state.register('job', lambda: {'value': 3}); state.publish(force=True)\n"
        "print('ready', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    assert [status["job"] for status in state.processes() if status["pid"] == child.pid] == [{"value": 3}]
    child.communicate("\n")
    assert child.returncode == 0
    assert not (state.directory() / f"{child.pid}.json").exists()


def test_a_forked_child_publishes_its_own_file(files):
    state.publish(force=True)
    pid = os.fork()
    if pid == 0:
        state.publish(force=True)
        os._exit(0 if own_file().exists() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert own_file().exists()


def test_a_folder_that_cannot_be_written_is_one_warning(files, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "file"))
    state.publish(force=True)
    state.publish(force=True)
    state.remove()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert state.STATUS_DIR in caplog.text
    (tmp_path / "file").unlink()  # as when a full disk has room again
    files["value"] = 5
    state.publish(force=True)
    assert state.processes()[0]["job"] == {"value": 5}


def test_no_temporary_folder_is_a_warning(files, monkeypatch, caplog):
    monkeypatch.delenv(state.STATUS_DIR)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("no usable folder")))
    state.publish(force=True)
    assert "no usable folder" in caplog.text


def test_a_folder_of_another_user_is_refused(files, monkeypatch, caplog):
    state.directory().mkdir()
    monkeypatch.setattr(os, "getuid", lambda: state.directory().stat().st_uid + 1)
    state.publish(force=True)
    assert "belongs to another user" in caplog.text
    assert list(state.directory().iterdir()) == []
