"""Clones that are lost, and what they start from spoiled: the caller is told, the pool heals, nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import paths, template
from pbotvm_qemu.api import NeverRanError, Pool, RunLostError, StateError
from tests.support import LONG, PROGRAM, assert_refused, cli, cli_json, machine_qemus

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]
LOSSES = [signal.SIGKILL, signal.SIGSTOP]


def pids(pool: Pool) -> list[int]:
    found = pool.status()["pids"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("number", LOSSES)
async def test_a_clone_lost_in_its_sleep_is_replaced_and_no_caller_notices(name: str, number: signal.Signals) -> None:
    async with Pool(name, size=2) as pool:
        lost = pids(pool)
        for pid in lost:
            os.kill(pid, number)
        answers = await asyncio.gather(*(pool.run("sh", f"echo {n}") for n in range(3)))
        assert [answer.stdout for answer in answers] == [b"0\n", b"1\n", b"2\n"]
        assert pool.status()["deaths"] == 2
        async with asyncio.timeout(60):
            while set(pids(pool)) & set(lost) or pool.status()["ready"] != 2:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", LOSSES)
async def test_clones_lost_while_they_start_delay_a_caller_and_no_more(
    name: str, vm_env: Env, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbotvm_qemu.machine.RESTORE_TIMEOUT", {"tcg": 5.0, "kvm": 5.0})
    monkeypatch.setattr("pbotvm_qemu.machine._LOAD_TIMEOUT", 5.0)
    async with Pool(name, size=0) as pool:
        for delay in (0.005, 0.03, 0.08, 0.2):
            while machine_qemus(vm_env):  # the one before
                await asyncio.sleep(0.01)
            run = asyncio.create_task(pool.run("sh", "echo served"))
            async with asyncio.timeout(30):
                while not (started := machine_qemus(vm_env)):
                    await asyncio.sleep(0.001)
            await asyncio.sleep(delay)
            with contextlib.suppress(ProcessLookupError):  # it was quicker than we
                os.kill(started[0], number)
            try:
                assert (await run).stdout == b"served\n"
            except RunLostError:
                assert delay > 0.03, "it was lost before a program can have been sent"


@pytest.mark.parametrize("number", LOSSES)
async def test_a_clone_lost_during_a_run_concerns_its_caller_alone(name: str, number: signal.Signals) -> None:
    async with Pool(name, size=1, most=4) as pool:
        begun = asyncio.Event()

        async def note(_stream: str, _data: bytes) -> None:
            begun.set()

        victim = asyncio.create_task(pool.run("sh", "echo begun; sleep 600", timeout=600, on_output=note))
        await begun.wait()
        (pid,) = [lease.machine.pid for lease in pool._pool._alive if lease.out]  # type: ignore[union-attr]
        other = asyncio.create_task(pool.run("sh", "sleep 2; echo unharmed"))
        os.kill(pid, number)
        with pytest.raises(RunLostError, match=number.name):
            await victim
        assert (await other).stdout == b"unharmed\n"
        assert (await pool.run("sh", "echo next")).stdout == b"next\n"


async def test_a_session_whose_clone_is_lost_says_so(name: str) -> None:
    async with Pool(name, size=1) as pool, pool.session() as session:
        await session.run("sh", "true")
        (pid,) = [lease.machine.pid for lease in pool._pool._alive if lease.out]  # type: ignore[union-attr]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((RunLostError, NeverRanError)):
            await session.run("sh", "true")


async def test_without_memory_for_a_clone_the_caller_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbotvm_qemu.process.memory_available", lambda: 300 << 20)
    async with Pool(name, size=0) as pool:
        pool._pool._queue_wait = 0.5  # type: ignore[union-attr]
        with pytest.raises(NeverRanError, match="no memory for one more machine"):
            await pool.run("sh", "true")
        monkeypatch.setattr("pbotvm_qemu.process.memory_available", lambda: 4 << 30)
        pool._pool._queue_wait = 60.0  # type: ignore[union-attr]
        assert (await pool.run("sh", "echo room")).stdout == b"room\n"


@contextlib.contextmanager
def without_memory(env: Env) -> Iterator[None]:
    """Let QEMU get no memory for a guest while the body runs: what the keeper starts inherits its limit."""
    keeper = cli_json(env, "status", "--json")["pid"]
    before = resource.prlimit(keeper, resource.RLIMIT_AS)
    resource.prlimit(keeper, resource.RLIMIT_AS, (700 << 20, before[1]))  # the guest alone has 512 MiB
    try:
        yield
    finally:
        resource.prlimit(keeper, resource.RLIMIT_AS, before)


def test_qemu_without_memory_is_told_and_the_pool_heals(kept_env: Env) -> None:
    with without_memory(kept_env):
        # One that was ready is still good; its successor is not to be had.
        assert cli(kept_env, "exec", "-lang=sh", "echo good").stdout == b"good\n"
        problem = ""
        for _ in range(100):
            problem = str(cli_json(kept_env, "status", "--json")["live"]["problem"])
            if problem != "None":
                break
        assert "Cannot allocate memory" in problem
    healed(kept_env)


def healed(env: Env) -> None:
    """Hold that a caller is served, and that the problem is forgotten as soon as a clone has started."""
    assert cli(env, "exec", "-lang=sh", "echo healed").stdout == b"healed\n"
    until = time.monotonic() + LONG
    while cli_json(env, "status", "--json")["live"]["problem"]:
        assert time.monotonic() < until


def test_a_caller_without_memory_for_his_own_qemu_is_told(vm_env: Env) -> None:
    limited = ["prlimit", f"--as={700 << 20}", *PROGRAM, "exec", "-lang=sh", "true"]
    done = subprocess.run(limited, env=vm_env, capture_output=True, timeout=120, check=False)
    assert_refused(done, 125, "Cannot allocate memory")


@contextlib.contextmanager
def full_folder(folder: Path) -> Iterator[None]:
    """Let there be no room for clones' disks while the body runs."""
    if os.geteuid():
        pytest.skip("needs root to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64K,mode=0711", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_and_the_pool_heals(kept_env: Env) -> None:
    folder = Path(kept_env["XDG_DATA_HOME"]) / "pbotvm-qemu/machines" / kept_env["PBOTVM_DOMAIN"] / "clones"
    with full_folder(folder):
        for number in range(2):  # those that were ready are still good
            assert cli(kept_env, "exec", "-lang=sh", f"echo {number}").stdout == f"{number}\n".encode()
        problem = ""
        for _ in range(100):
            problem = str(cli_json(kept_env, "status", "--json")["live"]["problem"])
            if "disk" in problem:
                break
        assert "cannot copy the empty disk" in problem
    healed(kept_env)


def test_a_full_disk_without_a_pool_is_one_line_of_cause_and_one_of_help(vm_env: Env) -> None:
    folder = Path(vm_env["XDG_DATA_HOME"]) / "pbotvm-qemu/machines" / vm_env["PBOTVM_DOMAIN"] / "clones"
    with full_folder(folder):
        assert_refused(cli(vm_env, "exec", "-lang=sh", "true"), 125, "cannot copy the empty disk", "free some space")
    assert cli(vm_env, "exec", "-lang=sh", "echo well").stdout == b"well\n"


@pytest.fixture
def own_machine(vm_env: Env) -> Iterator[Env]:
    """A copy of the machine, which a test may spoil, with the times of its files noted anew."""
    data = Path(vm_env["XDG_DATA_HOME"]).parent / "copy"
    subprocess.run(["cp", "-a", "--sparse=always", vm_env["XDG_DATA_HOME"], data], check=True)
    env = vm_env | {"XDG_DATA_HOME": str(data)}
    yield env
    cli(env, "stop")
    shutil.rmtree(data)


def folder_of(env: Env) -> Path:
    return Path(env["XDG_DATA_HOME"]) / "pbotvm-qemu/machines" / env["PBOTVM_DOMAIN"] / "template"


def note_times(env: Env) -> None:
    """Have the copy pass for untouched."""
    description = folder_of(env) / "template.json"
    table = json.loads(description.read_text())
    for file, (size, _modified, _changed, digest) in table["files"].items():
        found = (folder_of(env) / file).stat()
        table["files"][file] = (size, found.st_mtime_ns, found.st_ctime_ns, digest)
    overlay = folder_of(env) / "overlay.qcow2"  # which names the disk it lies over by its path
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", folder_of(env) / "disk.qcow2", overlay], check=True
    )
    found = overlay.stat()
    table["files"]["overlay.qcow2"] = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, "-")
    description.write_text(json.dumps(table))


@pytest.mark.parametrize("file", ["ram", "state", "disk.qcow2", "overlay.qcow2"])
def test_a_spoiled_template_is_refused_by_the_name_of_the_file(own_machine: Env, file: str) -> None:
    note_times(own_machine)
    path = folder_of(own_machine) / file
    os.truncate(path, path.stat().st_size - 1)
    assert_refused(cli(own_machine, "exec", "-lang=sh", "true"), 125, file, "changed", "create --force")
    path.unlink()
    assert_refused(cli(own_machine, "exec", "-lang=sh", "true"), 125, file, "create --force")


def test_a_change_that_keeps_size_and_mtime_is_noticed(own_machine: Env) -> None:
    note_times(own_machine)
    path = folder_of(own_machine) / "ram"
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        stream.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_refused(cli(own_machine, "exec", "-lang=sh", "true"), 125, "ram", "changed")


def test_verify_reads_every_byte(own_machine: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", own_machine["XDG_DATA_HOME"])
    found = template.load(own_machine["PBOTVM_DOMAIN"])
    found.verify()
    with (folder_of(own_machine) / "state").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"x")
    with pytest.raises(StateError, match="state is damaged"):
        found.verify()


def test_a_spoiled_template_does_not_take_the_clones_that_live(own_machine: Env) -> None:
    note_times(own_machine)
    assert cli(own_machine, "start").returncode == 0
    (folder_of(own_machine) / "state").unlink()
    for number in range(2):
        assert cli(own_machine, "exec", "-lang=sh", f"echo {number}").stdout == f"{number}\n".encode()
    lost = cli(own_machine | {"PBOTVM_TIMEOUT": "5"}, "status", "--json")
    assert b"state" in lost.stdout


def test_a_qemu_that_was_upgraded_under_the_pool_is_not_used(vm_env: Env, tmp_path: Path) -> None:
    """The program changes while the pool lives; restoring into another build would corrupt the guest in silence.

    The keeper sees a copy of QEMU in its place, in a mount namespace of its own.
    """
    if os.geteuid():
        pytest.skip("needs root for a mount namespace")
    tmp_path.chmod(0o755)
    qemu = Path(shutil.copy2("/usr/bin/qemu-system-x86_64", tmp_path / "qemu"))
    script = f'mount --bind {qemu} /usr/bin/qemu-system-x86_64 && exec "$@"'

    def with_copy(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, *arguments],
            env=vm_env, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    assert with_copy("start").returncode == 0
    try:
        os.utime(qemu, (1, 1))
        for number in range(2):
            assert cli(vm_env, "exec", "-lang=sh", f"echo {number}").stdout == f"{number}\n".encode()
        live = cli_json(vm_env, "status", "--json")["live"]
        assert "another QEMU program" in str(live["problem"])
        assert live["ready"] == 0
    finally:
        cli(vm_env, "stop")
    assert_refused(with_copy("exec", "-lang=sh", "true"), 125, "another QEMU program", "create --force")


def test_a_copied_machine_is_refused_until_it_is_made_anew(own_machine: Env) -> None:
    assert_refused(cli(own_machine, "exec", "-lang=sh", "true"), 125, "changed", "create --force")
    assert paths.APP in str(folder_of(own_machine))
