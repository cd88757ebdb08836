"""Clones of a template: each one its own, the template untouched, nothing left. Through the Python API."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pbotvm_qemu import paths, process
from pbotvm_qemu.api import NeverRanError, Output, Pool, Result, StateError, Template, VirtualMachine

pytestmark = pytest.mark.vm

Env = dict[str, str]
RUNS = int(os.environ.get("PBOTVM_TEST_RUNS", "80"))  # set it higher for a long run by hand


def template_hashes(name: str) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in paths.MachinePaths(name).template.iterdir()
    }


def descriptors() -> set[str]:
    """Return what our open descriptors lead to, but for pipes and sockets of the event loop itself."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except OSError:  # the listing's own
            continue
    return found


async def test_many_runs_are_never_mixed_and_leave_nothing(name: str) -> None:
    before = template_hashes(name)
    async with Pool(name):  # whatever is opened once and kept is open now
        pass
    open_before = descriptors()
    clones: set[str] = set()
    todo = iter(range(RUNS))

    async def caller(pool: Pool) -> None:
        for number in todo:
            word = f"{number}-{random.randrange(1 << 60)}"
            result = await pool.run("sh", f"echo {word}; cat /tmp/seen 2>&1; echo {word} > /tmp/seen")
            assert result.stdout.decode() == f"{word}\ncat: /tmp/seen: No such file or directory\n"
            clones.add(result.outcome.clone)

    async with Pool(name, size=2) as pool:
        async with asyncio.TaskGroup() as callers:
            for _ in range(8):
                callers.create_task(caller(pool))
        assert pool.status()["deaths"] == 0
    assert len(clones) == RUNS, "a clone served twice"
    assert template_hashes(name) == before
    assert descriptors() == open_before
    assert list(paths.MachinePaths(name).clones.iterdir()) == []


IDENTITY = """
import os, secrets, socket, ssl, time
print(os.urandom(32).hex(), secrets.token_hex(32), ssl.RAND_bytes(32).hex())  # the last by OpenSSL's own generator
print(socket.gethostname(), open("/proc/sys/kernel/random/boot_id").read().strip(), open("/proc/sys/kernel/random/uuid").read().strip())
print(socket.gethostbyname(socket.gethostname()))
print(time.time())
"""


async def test_twenty_clones_differ_where_they_must(name: str) -> None:
    seen: dict[str, set[str]] = {}
    async with Pool(name, size=2) as pool:
        for _ in range(20):
            before = time.time()
            lines = (await pool.run("python3", IDENTITY)).stdout.decode().splitlines()
            after = time.time()
            (urandom, secret, openssl), (host, boot, uuid) = lines[0].split(), lines[1].split()
            address, clock = lines[2:]
            assert before - 1 < float(clock) < after + 1
            assert address == "127.0.0.1"
            values = {"urandom": urandom, "secrets": secret, "openssl": openssl, "host": host, "boot id": boot}
            for what, value in (values | {"uuid": uuid}).items():
                seen.setdefault(what, set()).add(value)
    assert {what: len(values) for what, values in seen.items()} == dict.fromkeys(seen, 20)


@pytest.mark.parametrize("days", [3, -3])
async def test_the_date_is_right_in_a_clone_of_an_old_template(
    name: str, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """The host's clock, as the channel reads it, is moved instead of waiting for days."""
    real = time.time_ns
    monkeypatch.setattr("pbotvm_qemu.channel.time.time_ns", lambda: real() + days * 86400 * 10**9)
    async with VirtualMachine(name) as vm:
        clock = float((await vm.run("sh", "date +%s.%N")).stdout)
    assert abs(clock - (time.time() + days * 86400)) < 1


async def test_a_clone_that_slept_long_has_the_right_time(name: str) -> None:
    async with Pool(name, size=1, most=1) as pool:
        await asyncio.sleep(3)
        clock = float((await pool.run("sh", "date +%s.%N")).stdout)
        assert abs(clock - time.time()) < 1


async def test_output_streams_and_leaving_early_ends_the_program(name: str) -> None:
    async with Pool(name, size=1) as pool:
        events = [event async for event in pool.stream("sh", "echo one; echo two >&2; cat; exit 3", stdin=b"three\n")]
        result = events.pop()
        assert isinstance(result, Result)
        assert result.exit_code == 3
        pieces = [event for event in events if isinstance(event, Output)]
        assert b"".join(piece.data for piece in pieces if piece.stream == "stdout") == b"one\nthree\n"
        assert b"".join(piece.data for piece in pieces if piece.stream == "stderr") == b"two\n"
        stream = pool.stream("sh", "echo begun; sleep 600", timeout=600)
        assert await anext(stream) == Output("stdout", b"begun\n")
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while pool.status()["busy"]:
                await asyncio.sleep(0.05)


async def test_one_machine_runs_several_programs_and_files_pass(name: str) -> None:
    async with VirtualMachine(Template.load(name)) as vm:
        result = await vm.run("python3", "open('out', 'wb').write(open('in', 'rb').read() * 2)",
                              files={"in": b"ab"}, collect=["out", "none"])  # fmt: skip
        assert result.files == {"out": b"abab"}
        assert "none" in result.outcome.missing
        both = await asyncio.gather(vm.run("sh", "echo 1"), vm.run("sh", "echo 2"))
        assert [item.stdout for item in both] == [b"1\n", b"2\n"]


async def test_without_sharing_a_clone_has_every_page_for_itself(name: str) -> None:
    async with Pool(name, size=1, share_memory=False) as pool:
        assert (await pool.run("sh", "echo private")).stdout == b"private\n"
        inner = pool._pool
        assert inner
        await inner.ready()
        (machine, *_) = inner.machines
        maps = Path(f"/proc/{machine.pid}/maps").read_text()
        assert "memfd:pbotvm-ram" in maps
        assert "/template/ram" not in maps


async def test_an_idle_pool_costs_no_processor_time(name: str) -> None:
    async with Pool(name, size=2) as pool:
        pids = pool.status()["pids"]
        assert isinstance(pids, list)

        def spent() -> float:
            return sum(used.cpu_s for pid in pids if (used := process.usage(pid)))

        await asyncio.sleep(0.5)
        before = spent()
        await asyncio.sleep(3)
        assert spent() - before < 0.02


# Sessions ------------------------------------------------------------------------------------------------------------


async def test_a_session_keeps_files_and_what_it_left_running(name: str) -> None:
    async with Pool(name, size=1) as pool, pool.session() as session:
        first = await session.run("sh", "echo kept > file; nohup sleep 1000 >/dev/null 2>&1 & echo started")
        assert first.stdout == b"started\n"
        again = await session.run("sh", "cat file; ps -e -o args= | grep -c '[s]leep 1000'")
        assert again.stdout == b"kept\n1\n"
        assert again.outcome.clone == first.outcome.clone
        assert (await pool.run("sh", "ls; ps -e -o args= | grep -c '[s]leep 1000'")).stdout == b"prog.sh\n0\n"


async def test_a_program_that_holds_the_streams_open_does_not_delay_its_session(name: str) -> None:
    async with Pool(name, size=1) as pool, pool.session() as session:
        result = await session.run("sh", "sleep 1000 & echo done")
        assert (result.stdout, result.outcome.truncated, result.exit_code) == (b"done\n", False, 0)


async def test_a_session_goes_back_and_forks_with_its_memory(name: str) -> None:
    # The file is replaced: one that is written again is empty for a moment.
    counter = "i=0; while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.1; done"
    running = (
        "a=$(cat /tmp/count); for _ in $(seq 60); do sleep 0.5; [ $(cat /tmp/count) -gt $a ] && exec echo runs; done"
    )
    async with Pool(name, size=1, most=5) as pool, pool.session() as session:
        await session.run(
            "sh",
            f"echo before > file; (trap '' HUP; {counter}) >/dev/null 2>&1 & until test -s /tmp/count; do sleep 0.1; done",
        )
        await session.save("a")
        await session.run("sh", "echo after > file; touch /tmp/new; head -c 32 /dev/urandom > noise")
        async with session.fork() as other:
            same = "cat file; ls /tmp/new; od -An -tx1 noise"
            assert (await other.run("sh", same)).stdout == (await session.run("sh", same)).stdout
            await other.run("sh", "echo other > file")
            assert (await session.run("sh", "cat file")).stdout == b"after\n"
            noise = "head -c 16 /dev/urandom | od -An -tx1; hostname; date +%s"
            mine, theirs = await asyncio.gather(session.run("sh", noise), other.run("sh", noise))
            assert mine.stdout.split(b"\n")[:2] != theirs.stdout.split(b"\n")[:2]
            assert (await other.run("sh", running)).stdout == b"runs\n"
        await session.revert("a")
        asked = time.time()
        back = await session.run("sh", "cat file; ls /tmp/new noise 2>/dev/null; date +%s")
        words = back.stdout.decode().split()
        assert words[0] == "before"
        assert len(words) == 2
        assert asked - 2 < int(words[1]) < time.time() + 1
        assert (await session.run("sh", running)).stdout == b"runs\n"
        with pytest.raises(StateError, match="no state 'b'"):
            await session.revert("b")
        await session.revert("a")
    assert list(paths.MachinePaths(name).clones.iterdir()) == []


async def test_a_session_ends_by_itself_and_says_so(name: str) -> None:
    async with Pool(name, size=1) as pool, pool.session(idle=1) as session:
        assert (await session.run("sh", "echo hi")).stdout == b"hi\n"
        async with asyncio.timeout(60):
            while pool.status()["busy"]:
                await asyncio.sleep(0.1)
        with pytest.raises(NeverRanError, match="ended"):
            await session.run("sh", "echo hi")


async def test_sessions_need_clones(name: str) -> None:
    async with Pool(name, revert="restart") as pool:
        with pytest.raises(StateError, match="sessions need clones"):
            async with pool.session():
                pytest.fail("a session on the machine's own disk")


# The documentation ---------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = _BLOCK.findall(DOCUMENT.read_text("utf-8"))


def test_every_example_has_its_output() -> None:
    assert len(EXAMPLES) == DOCUMENT.read_text("utf-8").count("```python") >= 4


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_the_documentation_print_what_it_says(vm_env: Env, number: int, tmp_path: Path) -> None:
    code, expected = EXAMPLES[number]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.replace("pbot-vm", vm_env["PBOTVM_DOMAIN"])],
        env=vm_env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
