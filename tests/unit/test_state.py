"""Records, locks and orphans of machines, in folders of the test's own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import paths, state
from pbotvm_qemu.config import MachineConfig
from pbotvm_qemu.errors import PbotVMError, StateError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

RECORD = state.MachineRecord(
    name="m", uuid="u", created=1, state="ready", machine=MachineConfig(name="m", cpus=2), image="i",
    languages=("perl", "sh"), accelerator="tcg", qemu="/qemu", fingerprint={"kernel": "k"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable[4]))
    paths.private(paths.MachinePaths("m").directory)


def test_record_comes_back() -> None:
    state.save(RECORD)
    assert state.load("m") == RECORD
    assert state.ready("m") == RECORD
    assert state.names() == ["m"]


def test_unfinished_machine_is_not_ready() -> None:
    state.save(replace(RECORD, state="creating"))
    with pytest.raises(StateError, match="never finished"):
        state.ready("m")


def test_unknown_machine_is_told_with_those_that_there_are() -> None:
    with pytest.raises(StateError, match=r"no machine 'other' \(there are: m\)") as caught:
        state.load("other")
    assert "create other" in str(caught.value.hint)


def test_name_cannot_leave_the_folder() -> None:
    with pytest.raises(UsageError):
        state.load("../m")


def test_write_that_fails_leaves_the_old_text_and_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    state.write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        state.write_atomic(file, "\ud800")
    assert file.read_text() == "old"
    assert file.stat().st_mode & 0o777 == 0o600


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write"):
        state.write_atomic(tmp_path / "none" / "file", "x")


def changed(**changes: object) -> str:
    state.save(RECORD)
    return json.dumps(json.loads(paths.MachinePaths("m").record.read_text()) | changes)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", "\x00"],
)
def test_text_that_is_no_record_is_damage(text: str) -> None:
    paths.MachinePaths("m").record.write_text(text)
    with pytest.raises(StateError, match="damaged") as caught:
        state.load("m")
    assert caught.value.hint == "run `pbotvm-qemu create --force m`"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"state": "odd"},
        {"accelerator": "hvf"},
        {"machine": {"name": "other"}},
        {"machine": {"name": "m", "cpus": 1000}},
        {"machine": {"name": "m", "gpus": 1}},
        {"machine": 7},
        {"created": "x"},
        {"languages": 1},
        {"fingerprint": []},
    ],
    ids=str,
)
def test_value_that_makes_no_sense_is_damage(changes: dict[str, object]) -> None:
    paths.MachinePaths("m").record.write_text(changed(**changes))
    with pytest.raises(StateError) as caught:
        state.load("m")
    assert "machine.json" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("machine", [{"name": "m", "memory": "lots"}, {"name": "a/b"}])
def test_bad_size_and_name_are_damage_too(machine: dict[str, object]) -> None:
    paths.MachinePaths("m").record.write_text(changed(machine=machine))
    with pytest.raises(StateError):
        state.load("m")


def test_record_nested_without_end_is_damage() -> None:
    paths.MachinePaths("m").record.write_text("[" * 100_000)
    with pytest.raises(PbotVMError):
        state.load("m")


async def test_lock_says_who_has_it_and_leaves_nothing() -> None:
    async with state.lock("m", purpose="exec"):
        holder = state.running("m")
        assert holder
        assert (holder.keeper.pid, holder.purpose) == (os.getpid(), "exec")
    assert state.get_process("m") is None


async def test_contender_is_told_the_holder_after_its_patience() -> None:
    told: list[str] = []
    async with state.lock("m", purpose="create"):
        with pytest.raises(StateError, match=rf"in use by `pbotvm-qemu create` \(pid {os.getpid()}\)") as caught:
            async with state.lock("m", purpose="exec", wait=0.2, on_wait=told.append):
                pytest.fail("two have the lock")
        assert state.running("m"), "the contender took the holder's record away"
    assert caught.value.hint
    assert len(told) == 1


async def test_contender_gets_the_lock_when_it_is_free() -> None:
    order = []

    async def contend() -> None:
        async with state.lock("m", purpose="exec", wait=10):
            order.append("second")

    async with state.lock("m", purpose="run"):
        task = asyncio.create_task(contend())
        await asyncio.sleep(0.15)
        order.append("first")
    await task
    assert order == ["first", "second"]


async def test_locks_of_two_machines_are_two() -> None:
    async with state.lock("m", purpose="exec"), state.lock("n", purpose="exec"):
        pass


async def test_lock_of_a_deleted_machine_is_held_by_one() -> None:
    inside: list[str] = []
    release = asyncio.Event()

    async def hold(name: str, wait: float) -> None:
        async with state.lock("m", purpose=name, wait=wait):
            inside.append(name)
            await release.wait()

    async with state.lock("m", purpose="rm"):
        waiting = asyncio.create_task(hold("exec", 10))
        await asyncio.sleep(0.1)
        state.forget_lock("m")
    await asyncio.sleep(0.2)
    newcomer = asyncio.create_task(hold("create", 0))
    await asyncio.sleep(0.2)
    release.set()
    await asyncio.gather(waiting, newcomer, return_exceptions=True)
    assert len(inside) == 1


async def test_those_who_clone_share_a_machine_and_keep_others_out() -> None:
    async with state.share("m"), state.share("m"):
        assert state.held("m")
        with pytest.raises(StateError, match=f"process {os.getpid()}"):
            async with state.lock("m", purpose="create"):
                pytest.fail("somebody has it alone though others share it")
    assert not state.held("m")


async def test_there_is_one_keeper_and_others_may_clone_beside_it() -> None:
    async with state.keep("m", purpose="run", alone=False):
        async with state.share("m"):
            pass
        with pytest.raises(StateError, match=r"`pbotvm-qemu run`"):
            async with state.keep("m", purpose="start", alone=False):
                pytest.fail("two keepers")


async def test_a_keeper_that_uses_the_disk_has_the_machine_alone() -> None:
    async with state.keep("m", purpose="run", alone=True):
        with pytest.raises(StateError, match="in use"):
            async with state.share("m"):
                pytest.fail("somebody clones what another one writes to")


def mark(uuid: str) -> subprocess.Popen[bytes]:
    """Start a process that looks like the QEMU of machine `uuid`."""
    return subprocess.Popen(["sh", "-c", "read nothing", "qemu", "-uuid", uuid], stdin=subprocess.PIPE)


async def test_qemu_of_a_killed_holder_is_ended_by_the_next_who_has_the_machine_alone() -> None:
    state.save(replace(RECORD, uuid="0f3b-m"))
    orphan, foreign = mark("0f3b-m"), mark("0f3b-n")
    try:
        async with state.share("m"):
            assert orphan.poll() is None
        async with state.lock("m", purpose="exec"):
            assert orphan.wait(10) == -9
        assert foreign.poll() is None
    finally:
        for child in (orphan, foreign):
            child.kill()
            child.communicate()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keeper":{}}', '{"keeper":{"pid":"x","started":1},"qemu":null}'])
def test_damaged_process_record_is_nobody(text: str) -> None:
    paths.private(paths.MachinePaths("m").runtime)
    paths.MachinePaths("m").process_record.write_text(text)
    assert state.get_process("m") is None


def make_home(build: str) -> Path:
    """Make the folder of a template, current or not."""
    files = paths.MachinePaths("m", build)
    files.template.mkdir(parents=True)
    for file in (files.disk, files.initramfs, files.template / "template.json"):
        file.write_text("x")
    return files.home


async def test_what_a_change_of_languages_replaced_is_found_and_deleted() -> None:
    first, old, new = make_home(""), make_home("build-00000001"), make_home("build-00000002")
    state.save(replace(RECORD, build="build-00000002"))
    assert state.files("m").home == new
    record = state.load("m")
    assert set(state.replaced(record)) == {old, first / "template", first / "disk.qcow2", first / "initramfs.cpio"}
    assert state.sweep(record) == []
    assert sorted(item.name for item in first.iterdir()) == ["build-00000002", "machine.json"]
    assert (new / "template/template.json").exists()


async def test_a_machine_as_it_was_created_has_replaced_nothing() -> None:
    home, unfinished = make_home(""), make_home("build-00000001")
    state.save(RECORD)
    assert state.replaced(RECORD) == [unfinished]
    assert state.in_transition()
    assert state.sweep(RECORD) == []
    assert not state.in_transition()
    assert (home / "template/template.json").exists()


async def test_a_template_that_somebody_clones_is_not_deleted() -> None:
    old = make_home("build-00000001")
    make_home("build-00000002")
    record = replace(RECORD, build="build-00000002")
    state.save(record)
    fd = os.open(old / "template", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert state.sweep(record) == [old]
    assert old.exists()
    os.close(fd)
    assert state.sweep(record) == []
    assert not old.exists()


@pytest.mark.parametrize("build", ["..", "build-../../x", "build-0000000g", "template", "/etc", 7])
def test_a_record_cannot_name_a_folder_elsewhere(build: object) -> None:
    state.save(RECORD)
    paths.MachinePaths("m").record.write_text(changed(build=build))
    with pytest.raises(StateError, match="unknown build"):
        state.load("m")


async def test_one_at_a_time_changes_a_machine_while_others_use_it() -> None:
    async with state.changing("m"), state.share("m"):
        assert state.in_transition()
        with pytest.raises(StateError, match=f"being changed by process {os.getpid()}"):
            async with state.changing("m"):
                pytest.fail("two change it")
    assert not state.in_transition()
