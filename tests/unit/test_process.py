"""The door to subprocesses: deadlines that hold, output that is bounded, processes that are not mistaken."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import process
from pbotvm_qemu.errors import CommandError, HostError
from pbotvm_qemu.process import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


async def gone(programs: list[Identity | None], within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while any(program and program.alive() for program in programs):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.01)
    return True


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


async def test_status_and_both_streams_are_told() -> None:
    done = await process.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.status, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    with pytest.raises(CommandError, match="sh: exit status 3: err"):
        done.check(hint="h")


async def test_death_by_signal_is_a_negative_status() -> None:
    done = await process.run(["sh", "-c", "kill -9 $$"])
    assert done.status == -9
    with pytest.raises(CommandError, match="killed by signal 9"):
        done.check()


async def test_standard_input_is_empty() -> None:
    assert (await process.run(["cat"], timeout=10)).stdout == b""


async def test_program_that_is_not_there_is_named() -> None:
    with pytest.raises(CommandError, match="/no/such/thing: cannot be started: No such file") as caught:
        await process.run(["/no/such/thing"])
    assert caught.value.hint


async def test_words_are_not_looked_into_by_a_shell() -> None:
    assert (await process.run(["echo", "$HOME; `id`"])).stdout == b"$HOME; `id`\n"


async def test_environment_and_folder_are_as_told(tmp_path: Path) -> None:
    done = await process.run(["/bin/sh", "-c", "pwd; echo $ONLY$HOME"], env={"ONLY": "this"}, cwd=tmp_path)
    assert done.stdout.decode() == f"{tmp_path}\nthis\n"


async def test_output_is_bounded_and_its_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "OUTPUT_MAX", 1000)
    done = await process.run(["sh", "-c", "yes | head -c 1000000; echo the end"])
    assert len(done.stdout) == 1000
    assert done.stdout.endswith(b"y\nthe end\n")


async def test_lines_of_stderr_are_told_as_they_come() -> None:
    lines: list[str] = []
    script = "printf 'one\\ntw' >&2; echo no; printf 'o\\n\\n' >&2"
    await process.run(["sh", "-c", script], on_line=lines.append)
    assert lines == ["one", "two", ""]


async def test_last_line_without_line_feed_is_told_too() -> None:
    lines: list[str] = []
    await process.run(["sh", "-c", "printf 'E: broken' >&2"], on_line=lines.append)
    assert lines == ["E: broken"]


async def pid_in(file: Path) -> list[Identity | None]:
    while not (file.exists() and file.read_text().endswith("\n")):
        await asyncio.sleep(0.01)
    return [Identity.of(int(word)) for word in file.read_text().split()]


async def test_deadline_ends_the_whole_session(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {file}; wait"
    task = asyncio.create_task(process.run(["sh", "-c", script], timeout=0.5))
    programs = await pid_in(file)
    assert all(programs)
    with pytest.raises(CommandError, match="not finished after"):
        await task
    assert await gone(programs)


async def test_cancelled_caller_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    task = asyncio.create_task(process.run(["sh", "-c", f"sleep 60 & echo $! $$ > {file}; wait"]))
    programs = await pid_in(file)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await gone(programs)


@pytest.mark.parametrize(
    "script", ["sleep 60 & echo $! > {file}", "(trap '' TERM; sleep 60) & echo $! > {file}; wait"], ids=["left", "deaf"]
)
async def test_deadline_ends_what_outlives_the_first_process(tmp_path: Path, script: str) -> None:
    file = tmp_path / "pids"
    with pytest.raises(CommandError):
        await process.run(["sh", "-c", script.format(file=file)], timeout=0.5)
    left = await pid_in(file)
    try:
        assert await gone(left, within=1.0)
    finally:
        for program in left:
            if program and program.alive():
                os.killpg(os.getpgid(program.pid), signal.SIGKILL)


def test_identity_is_of_a_live_process(sleeper: subprocess.Popen[bytes]) -> None:
    identity = Identity.of(sleeper.pid)
    assert identity
    assert identity.alive()
    assert identity.kill()
    sleeper.wait()
    assert not identity.alive()
    assert not identity.kill()


def test_later_process_with_the_same_pid_is_another(sleeper: subprocess.Popen[bytes]) -> None:
    identity = Identity.of(sleeper.pid)
    assert identity
    earlier = replace(identity, started=identity.started - 5)
    assert not earlier.alive()
    assert not earlier.kill()
    assert sleeper.poll() is None


def test_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Identity.of(child.pid) is None
    finally:
        child.wait()


@pytest.mark.parametrize("pid", [-1, 2**22 + 1, 2**31, 10**20])
def test_pid_that_there_is_not_has_no_identity(pid: int) -> None:
    assert Identity.of(pid) is None


def test_usage_is_of_a_live_process() -> None:
    used = process.usage(os.getpid())
    assert used
    assert used.cpu_s > 0
    assert used.rss > 1 << 20
    assert process.usage(2**22 + 1) is None


def test_program_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(HostError, match="no-such-program is not installed") as caught:
        process.find_program("no-such-program", package="some-package")
    assert caught.value.hint == "apt-get install some-package"


def test_programs_of_root_are_found_without_them_in_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert process.find_program("sh", package="dash").endswith("/sh")


async def test_child_keeps_descriptors_and_logs(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        code = f"import os; os.write(1, b'said\\n'); os.write(2, b'wrong\\n'); os.write({writing}, b'there\\n'); os._exit(4)"
        argv = [sys.executable, "-c", code]
        child = await process.Child.start(argv, pass_fds=[writing], log=log)
        assert await child.wait(10)
        assert child.status == 4
        assert await child.exited == 4
        assert os.read(reading, 100) == b"there\n"
        assert (tmp_path / "log").read_text() == "said\nwrong\n"
    finally:
        for fd in (reading, writing, log):
            os.close(fd)


@pytest.mark.parametrize("end", [lambda child: child.send(process.TERMINATE), lambda child: None])
async def test_child_is_killed_once_and_then_left_alone(tmp_path: Path, end: Callable[[process.Child], None]) -> None:
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        child = await process.Child.start(["sleep", "60"], pass_fds=[], log=log)
        assert not await child.wait(0.05)
        end(child)
        await child.kill()
        assert child.status in (-signal.SIGKILL, -signal.SIGTERM)
        await child.kill()
    finally:
        os.close(log)


STARTS = """
import asyncio, gc, sys
from pbotvm_qemu import process

async def main():
    with open(sys.argv[1], "wb") as log:
        child = process.Detached(["sleep", "60"], log=log.fileno())
    print(child.pid, child.status, await child.wait(0.1))

asyncio.run(main())
gc.collect()
"""


def test_what_is_detached_outlives_us(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", STARTS, tmp_path / "log"], capture_output=True, check=True, timeout=60)
    pid, *state = said.stdout.split()
    detached = process.Identity.of(int(pid))
    assert detached
    try:
        assert state == [b"None", b"False"]
        assert os.getsid(detached.pid) == detached.pid
    finally:
        assert detached.kill()


async def test_what_is_detached_can_be_ended_while_we_live(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        quick = process.Detached(["sh", "-c", "echo said; exit 7"], log=log.fileno())
        slow = process.Detached(["sleep", "60"], log=log.fileno())
    assert await quick.wait(60)
    assert quick.status == 7
    await slow.end(process.TERMINATE, 60)
    assert slow.status == -process.TERMINATE
    assert (tmp_path / "log").read_text() == "said\n"
    with pytest.raises(CommandError, match="cannot be started"):
        process.Detached(["/no/such/thing"], log=2)


async def test_child_that_cannot_be_started_is_named() -> None:
    with pytest.raises(CommandError, match="cannot be started"):
        await process.Child.start(["/no/such/thing"], pass_fds=[], log=2)
