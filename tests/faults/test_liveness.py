"""Every way in which a machine goes wrong, provoked for real: the next request is answered, and the log says why.

The guest of these tests has one thing that no real one has: a process of root's that carries out what a program asks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import support
from tests.compat import peers
from tests.compat.peers import frame_today
from tests.support import LONG, cli, cli_json, environment, qemus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]

_ROOT = """
while :; do
    if [ -f /tmp/root-command ]; then
        mv /tmp/root-command /run/root-command
        sh /run/root-command &
    fi
    sleep 0.1
done &

while :; do
    python3"""

_CONFIG = """
[watchdog]
interval = 1
silence = 4
cpu = 20
samples = 3
"""

MISBEHAVING = b"Virtual machine is misbehaving, try again soon.\n"
KILL_AGENT = "pkill -9 -f guest.agent"


@pytest.fixture(scope="module")
def sick_env() -> Iterator[Env]:
    """An environment with a machine in which a program can reach root."""
    if reason := support.missing_for_vm():
        pytest.skip(reason)
    top = Path(tempfile.mkdtemp(prefix="pbotvm-sick-", dir="/var/tmp"))
    here = Path(__file__).parents[2]
    for folder in ("pbotvm_qemu", "images"):
        shutil.copytree(here / folder, top / folder, ignore=shutil.ignore_patterns("__pycache__"))
    start = top / "images/initramfs/start"
    text = start.read_text()
    assert text.count("\nwhile :; do\n    python3") == 1
    start.write_text(text.replace("\nwhile :; do\n    python3", _ROOT))
    try:
        for env in environment("sick-vm"):
            # Without the working folder on the path, the copy is what runs.
            changed = env | {"PYTHONPATH": str(top), "PYTHONSAFEPATH": "1", "PBOTVM_TIMEOUT": "6"}
            config = Path(env["XDG_CONFIG_HOME"]) / "pbotvm-qemu"
            config.mkdir(parents=True)
            (config / "config.toml").write_text(_CONFIG)
            result = cli(changed, "create", timeout=1800)
            assert result.returncode == 0, result.stderr.decode()
            yield changed
            cli(changed, "stop")
    finally:
        shutil.rmtree(top)


def keep(env: Env, way: str) -> Env:
    """Have the machine kept in this way, by the keeper that runs already when it does it so."""
    report = cli_json(env, "status", "--json")
    if report.get("live", {}).get("revert") != way:
        cli(env, "stop")
        result = cli(env, "run", "--detach", "--revert", way)
        assert result.returncode == 0, result.stderr.decode()
    return env


@pytest.fixture
def env(sick_env: Env) -> Env:
    """The machine kept as one process, which has serial lines for peers of PBot's."""
    return keep(sick_env, "restart")


@pytest.fixture(scope="module", params=["restart", "clone"])
def way(request: pytest.FixtureRequest) -> str:
    """Both ways back to clean; of the module, so that the tests of one way come together."""
    return str(request.param)


@pytest.fixture
def each(sick_env: Env, way: str) -> Env:
    """The machine kept in either way."""
    return keep(sick_env, way)


def ask(env: Env, code: str, **keys: object) -> bytes:
    """Ask the relay as a bot does."""
    with socket.create_connection(("127.0.0.1", int(env["PBOTVM_PORT"])), timeout=LONG) as sock:
        sock.sendall(json.dumps({"lang": "sh", "code": code, **keys}).encode() + b"\n")
        reply = b""
        while piece := sock.recv(65536):
            reply += piece
        return reply


def ask_serial(env: Env, code: str) -> bytes:
    """Ask the guest itself, as an unmodified vm-exec does. Nobody puts the machine back after that."""
    with socket.create_connection(("127.0.0.1", int(env["PBOTVM_SERIAL"])), timeout=LONG) as sock:
        sock.sendall(frame_today(peers.request(code=code)))
        reply = b""
        while b"result:end" not in reply:
            reply += sock.recv(65536)
        return reply


def live(env: Env) -> dict[str, Any]:
    found: dict[str, Any] = cli_json(env, "status", "--json")["live"]
    return found


def log(env: Env) -> str:
    return (Path(env["XDG_DATA_HOME"]) / "pbotvm-qemu/machines/sick-vm/run.log").read_text()


def ready(env: Env) -> None:
    """Wait until a machine stands ready."""
    until = time.monotonic() + 60
    while not live(env)["ready"]:
        assert time.monotonic() < until
        time.sleep(0.1)


def counted(env: Env, reason: str, before: dict[str, Any]) -> None:
    """Wait until one more revert with this reason is counted, hold that it is logged, and that requests are served."""
    until = time.monotonic() + 60
    while live(env)["reverts"].get(reason, 0) <= before["reverts"].get(reason, 0):
        assert time.monotonic() < until, live(env)
        time.sleep(0.1)
    assert re.search(rf"revert machine=sick-vm\S* pid=\d+ reason={reason}\b", log(env))
    assert ask(env, "echo served") == b"served\n"


def provoked(env: Env, command: str, reason: str) -> None:
    """Have root carry out `command` in a guest that nobody uses, and hold that it is counted and logged as `reason`.

    The request that asks for it makes the machine a used one: when the keeper was quicker to replace it, once more.
    """
    for _ in range(5):
        ready(env)
        before = live(env)
        assert b"Success" in ask_serial(env, f"echo '{command}' >/tmp/root-command")
        until = time.monotonic() + 20
        while live(env)["reverts"] == before["reverts"] and time.monotonic() < until:
            time.sleep(0.1)
        if live(env)["reverts"].get(reason, 0) > before["reverts"].get(reason, 0):
            counted(env, reason, before)
            return
    pytest.fail(f"no revert because of {reason}: {live(env)['reverts']}; {log(env)[-2000:]}")


def during(env: Env, code: str, fault: Callable[[int], None]) -> tuple[bytes, bytes]:
    """Start a program, provoke the fault in every QEMU; return what its caller and the next one were told.

    Where there is one machine the next one waits already. Where each has a clone it comes after the fault, since its own
    would be lost rightly.
    """
    ready(env)
    clones = live(env)["revert"] == "clone"
    answers: list[bytes] = [b"", b""]

    def call(index: int, what: str) -> None:
        answers[index] = ask(env, what)

    runs = live(env)["runs"]
    first = threading.Thread(target=call, args=(0, code))
    first.start()
    until = time.monotonic() + 60
    while live(env)["runs"] == runs:
        assert time.monotonic() < until
        time.sleep(0.02)
    second = threading.Thread(target=call, args=(1, "echo served"))
    if not clones:
        second.start()
        while first.is_alive() and not live(env)["waiting"]:
            assert time.monotonic() < until
            time.sleep(0.02)
    for pid in qemus(env["XDG_DATA_HOME"]):
        fault(pid)
    if clones:
        second.start()
    first.join(LONG)
    second.join(LONG)
    return answers[0], answers[1]


def test_the_agent_killed_under_a_program(each: Env) -> None:
    told, next_told = during(each, f"echo {KILL_AGENT} >/tmp/root-command; sleep 60", lambda _pid: None)
    # On a busy host the next agent may start only after the program's time is over.
    assert told in (MISBEHAVING, b"[Timed-out]\n")
    assert next_told == b"served\n"
    assert "the agent in the guest was started anew" in log(each)


def test_the_agent_killed_while_nothing_runs(env: Env) -> None:
    provoked(env, f"sleep 1; {KILL_AGENT}", "agent-lost")


def test_a_panic_under_a_program(each: Env) -> None:
    told, next_told = during(each, "echo 'echo c >/proc/sysrq-trigger' >/tmp/root-command; sleep 60", lambda _pid: None)
    assert (told, next_told) == (MISBEHAVING, b"served\n")
    assert "QEMU died (guest-reset, its kernel panicked or restarted)" in log(each)
    assert "Kernel panic - not syncing" in log(each), log(each)


def test_a_panic_while_nothing_runs(env: Env) -> None:
    provoked(env, "sleep 1; echo c >/proc/sysrq-trigger", "died")


def test_qemu_killed_under_a_program(each: Env) -> None:
    told, next_told = during(each, "sleep 60", lambda pid: os.kill(pid, signal.SIGKILL))
    assert (told, next_told) == (MISBEHAVING, b"served\n")


def test_qemu_killed_while_nothing_runs(each: Env) -> None:
    ready(each)
    before = live(each)
    for pid in qemus(each["XDG_DATA_HOME"]):
        os.kill(pid, signal.SIGKILL)
    counted(each, "died", before)


def test_qemu_stopped_under_a_program(each: Env) -> None:
    told, next_told = during(each, "echo begun; sleep 60", lambda pid: os.kill(pid, signal.SIGSTOP))
    assert (told, next_told) == (MISBEHAVING, b"served\n")


def test_qemu_stopped_while_nothing_runs(each: Env, way: str) -> None:
    """A clone that waits sleeps: nothing can go wrong in it, and QEMU is only looked for when somebody needs it."""
    ready(each)
    before = live(each)
    for pid in qemus(each["XDG_DATA_HOME"]):
        os.kill(pid, signal.SIGSTOP)
    if way == "clone":
        assert ask(each, "echo served") == b"served\n"
    counted(each, "lost" if way == "clone" else "agent-silent", before)


def test_a_busy_loop_in_a_program_is_its_own_affair(each: Env) -> None:
    told, next_told = during(each, "while :; do :; done", lambda _pid: None)
    assert (told, next_told) == (b"[Timed-out]\n", b"served\n")


def test_a_busy_loop_while_nothing_runs(env: Env) -> None:
    provoked(env, "while :; do :; done", "cpu")


def test_a_guest_that_was_used_over_the_serial_line_is_not_given_to_others(env: Env) -> None:
    ready(env)
    assert b"left" in ask_serial(env, "touch /tmp/mark; echo left")
    assert b"mark" in ask_serial(env, "ls /tmp")
    assert ask(env, "ls /tmp") == b"Success (no output).\n"


def test_with_noreverts_the_machine_is_left_as_it_is(sick_env: Env) -> None:
    cli(sick_env, "stop")
    left = sick_env | {"PBOTVM_NOREVERT": "1"}
    assert cli(left, "run", "--detach", "--revert", "restart").returncode == 0
    try:
        assert ask(left, "touch /tmp/mark; echo; sleep 60") == b"[Timed-out]\n"
        assert b"mark" in ask(left, "ls /tmp")
    finally:
        cli(left, "stop")
