"""What holds on each of the three ways back to clean, by the same tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.conftest import kept
from tests.support import PROGRAM, cli, cli_json, qemus

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]


@pytest.fixture(scope="module", params=["clone", "loadvm", "restart"])
def way_env(request: pytest.FixtureRequest, vm_env: Env) -> Iterator[Env]:
    """The machine kept in each way; `WAY` in the environment names it."""
    for env in kept(vm_env, request.param):
        yield env | {"WAY": request.param}


# Leaves a mark wherever a program can write or keep something.
MARKS = """
for place in /tmp /var/tmp /dev/shm ~ /home/vm/*; do echo x > $place/mark; done 2>/dev/null
python3 - <<'END'
import os, socket, sys, time
from multiprocessing import shared_memory
shared_memory.SharedMemory("mark", create=True, size=4096).buf[:4] = b"mark"
for name in ("/proc/self/comm", "/proc/sys/kernel/hostname", "/proc/sys/vm/swappiness", "/proc/sys/kernel/core_pattern"):
    try:
        open(name, "w").write("mark")
    except OSError:
        pass
socket.socket(socket.AF_UNIX).bind("\\0mark")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
END
(trap '' TERM HUP; while :; do sleep 1000; done) &
nohup sleep 1000 >/dev/null 2>&1 &
umask 0; renice 5 $$ >/dev/null 2>&1
"""
LOOK = """
ls -A /tmp /var/tmp /dev/shm . | grep -v prog; ls -A /home/vm | wc -l; ps -e -o args= | grep -c '[s]leep 1000'
ls /dev/shm; grep -c mark /proc/net/unix; cat /proc/sys/vm/swappiness /proc/sys/kernel/core_pattern
umask; nice; cat /proc/sys/kernel/random/entropy_avail; ls /sys/fs/cgroup | grep -c run-
"""


def test_status_names_the_way_and_why(way_env: Env) -> None:
    live = cli_json(way_env, "status", "--json")["live"]
    assert live["revert"] == way_env["WAY"]
    assert live["revert_why"]
    assert cli_json(way_env, "exec", "--json", "-lang=sh", "true")["revert"] == way_env["WAY"]


def test_no_mark_of_a_run_is_seen_by_the_next(way_env: Env) -> None:
    clean = cli(way_env, "exec", "-lang=sh", LOOK)
    assert cli(way_env, "exec", "-lang=sh", MARKS).returncode == 0
    for _ in range(3):
        after = cli(way_env, "exec", "-lang=sh", LOOK)
        assert after.stdout == clean.stdout
        assert b"mark" not in after.stdout


def test_status_signal_time_out_and_output_are_told(way_env: Env) -> None:
    assert cli(way_env, "exec", "-lang=sh", "echo out; echo err >&2; exit 7").returncode == 7
    assert cli_json(way_env, "exec", "--json", "-lang=sh", "kill -9 $$")["signal"] == 9
    assert cli_json(way_env, "exec", "--json", "--timeout", "1", "-lang=sh", "sleep 60")["timed_out"] is True
    data = os.urandom(1 << 20)
    assert cli(way_env, "exec", "-lang=sh", "cat", data=data).stdout == data


def test_time_and_random_numbers_are_each_runs_own(way_env: Env) -> None:
    seen = set()
    for _ in range(3):
        before = time.time()
        said = cli(way_env, "exec", "-lang=sh", "date +%s.%N; head -c 32 /dev/urandom | od -An -tx1").stdout.decode()
        stamp, _newline, noise = said.partition("\n")
        assert before - 1 < float(stamp) < time.time() + 1
        seen.add(noise)
    assert len(seen) == 3


def test_callers_at_once_get_their_own_answers(way_env: Env) -> None:
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda n: cli(way_env, "exec", "-lang=sh", f"echo {n}").stdout, range(6)))
    assert answers == [f"{number}\n".encode() for number in range(6)]


def connected(port: str) -> socket.socket:
    """Return a connection to a port of the machine, which is closed while a used machine is replaced."""
    until = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", int(port)), timeout=30)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_the_health_port_beats_at_least_every_five_seconds(way_env: Env) -> None:
    with connected(way_env["PBOTVM_HEALTH"]) as sock:
        begin = time.monotonic()
        heard = b""
        while heard.count(b"\n") < 3:
            heard += sock.recv(64)
        assert heard.strip(b"\r\n") == b""
        assert time.monotonic() - begin < 60  # two pauses of 4 s by the clock of a guest on a busy host
    with connected(way_env["PBOTVM_SERIAL"]):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_qemu_lost_during_a_run_is_told_and_replaced(way_env: Env, number: signal.Signals) -> None:
    child = subprocess.Popen(
        [*PROGRAM, "exec", "--timeout", "600", "-lang=sh", "echo begun; sleep 600"],
        env=way_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout
    assert child.stdout.readline() == b"begun\n"
    for pid in qemus(way_env["XDG_DATA_HOME"]):
        os.kill(pid, number)
    _out, err = child.communicate(timeout=120)
    assert child.returncode == 125
    assert b"died (SIGKILL)" in err or b"stopped (SIGSTOP)" in err
    assert cli(way_env, "exec", "-lang=sh", "echo healed").stdout == b"healed\n"
