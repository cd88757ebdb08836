"""The monitor, against a fake QEMU that speaks QMP's JSON over a socketpair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pbotvm_qemu import qmp
from pbotvm_qemu.errors import MonitorError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
SILENCE = None
Reply = dict[str, object]


class FakeQemu:
    """Answers each command from its script; commands that are not in it succeed with nothing."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.script: dict[str, Reply | None] = {}
        self.events: dict[str, list[Reply]] = {}
        self.seen: list[Reply] = []
        self.ends_at = ""

    async def send(self, value: Reply) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, json.dumps(value).encode() + b"\r\n")

    async def serve(self, greeting: Reply | None) -> None:
        if greeting:
            await self.send(greeting)
        text = ""
        decoder = json.JSONDecoder()
        while data := await asyncio.get_running_loop().sock_recv(self.sock, 4096):
            text += data.decode()
            while text := text.lstrip():
                try:
                    command, end = decoder.raw_decode(text)
                except ValueError:
                    break
                text = text[end:]
                await self.answer(command)

    async def answer(self, command: Reply) -> None:
        self.seen.append(command)
        name = str(command["execute"])
        if name == self.ends_at:
            self.sock.shutdown(socket.SHUT_RDWR)
            return
        reply = self.script.get(name, {"return": {}})
        if reply is not None:
            await self.send({**reply, "id": command.get("id")})
        for event in self.events.get(name, []):
            arguments = command.get("arguments")
            id_ = arguments.get("job-id") if isinstance(arguments, dict) else None
            text = json.dumps(event).replace("$JOB", str(id_))
            await self.send({**json.loads(text), "timestamp": {"seconds": 1, "microseconds": 0}})


@contextlib.asynccontextmanager
async def fake(greeting: Reply | None) -> AsyncIterator[tuple[FakeQemu, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    qemu = FakeQemu(theirs)
    task = asyncio.create_task(qemu.serve(greeting))
    try:
        yield qemu, ours
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ours.close()
        theirs.close()


@pytest.fixture
async def talk() -> AsyncIterator[tuple[FakeQemu, qmp.Monitor]]:
    async with fake(dict(GREETING)) as (qemu, sock), qmp.connect("fake", sock, timeout=10) as monitor:
        yield qemu, monitor


Talk = tuple[FakeQemu, qmp.Monitor]


async def test_answer_comes_back_and_names_are_spelled_with_dashes(talk: Talk) -> None:
    qemu, monitor = talk
    qemu.script["query-status"] = {"return": {"running": True}}
    assert await monitor.execute("query-status", some_name=1, left_out=None) == {"running": True}
    assert qemu.seen[-1]["arguments"] == {"some-name": 1}


async def test_refusal_names_the_class(talk: Talk) -> None:
    qemu, monitor = talk
    qemu.script["device_del"] = {"error": {"class": "DeviceNotFound", "desc": "no nic9"}}
    with pytest.raises(MonitorError, match="device_del: no nic9") as caught:
        await monitor.execute("device_del", id="nic9")
    assert caught.value.hint == "QMP error class DeviceNotFound"


async def test_silence_ends_at_the_deadline_and_the_next_command_works(talk: Talk) -> None:
    qemu, monitor = talk
    qemu.script["stop"] = SILENCE
    with pytest.raises(MonitorError, match="stop: QEMU did not answer in time"):
        await monitor.execute("stop", timeout=0.1)
    await qemu.send({"return": {"late": True}, "id": qemu.seen[-1]["id"]})
    qemu.script["cont"] = {"return": {"mine": True}}
    assert await monitor.execute("cont") == {"mine": True}


async def test_lost_connection_is_told_at_once(talk: Talk) -> None:
    qemu, monitor = talk
    qemu.ends_at = "stop"
    with pytest.raises(MonitorError, match="connection is lost"):
        await monitor.execute("stop", timeout=10)
    with pytest.raises(MonitorError):
        await monitor.execute("cont", timeout=10)


async def test_the_reason_of_the_end_is_kept_and_no_other_event(talk: Talk) -> None:
    qemu, monitor = talk
    stamp: Reply = {"timestamp": {"seconds": 1, "microseconds": 0}}
    for _ in range(1000):
        await qemu.send({"event": "RTC_CHANGE", "data": {"offset": 1}, **stamp})
    assert monitor.shutdown_reason == ""
    qemu.ends_at = "stop"
    await qemu.send({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, **stamp})
    with pytest.raises(MonitorError):
        await monitor.execute("stop", timeout=10)
    assert monitor.shutdown_reason == "guest-reset"
    assert len(monitor._client.events.history) == 1


async def test_missing_greeting_ends_at_the_deadline() -> None:
    async with fake(None) as (_, sock):
        with pytest.raises(MonitorError, match="connecting to the monitor"):
            async with qmp.connect("fake", sock, timeout=0.1):
                pass


@pytest.mark.parametrize("greeting", [{"no": "QMP"}, {"QMP": {}}])
async def test_peer_that_is_no_qemu_is_refused(greeting: Reply) -> None:
    async with fake(greeting) as (_, sock):
        with pytest.raises(MonitorError):
            async with qmp.connect("fake", sock, timeout=5):
                pass


async def test_qemu_that_ends_before_its_greeting_is_told() -> None:
    async with fake(None) as (qemu, sock):
        qemu.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(MonitorError, match="lost"):
            async with qmp.connect("fake", sock, timeout=10):
                pass


CONCLUDED: Reply = {"event": "JOB_STATUS_CHANGE", "data": {"id": "$JOB", "status": "concluded"}}


async def test_giving_up_while_qemu_ends_says_nothing_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever sees the process end gives up the connection in any moment of its own end."""

    async def enter(sock: socket.socket) -> None:
        async with qmp.connect("m", sock):
            pass

    for moment in range(1, 40):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        connecting = asyncio.create_task(enter(ours))
        theirs.close()
        for _ in range(moment):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
    assert caplog.text == ""


async def test_job_ends_when_it_concludes_and_is_dismissed(talk: Talk) -> None:
    qemu, monitor = talk
    other: Reply = {"event": "JOB_STATUS_CHANGE", "data": {"id": "other", "status": "concluded"}}
    qemu.events["snapshot-save"] = [other, {**CONCLUDED, "data": {"id": "$JOB", "status": "running"}}, CONCLUDED]
    qemu.script["query-jobs"] = {"return": []}
    await monitor.snapshot_save("1", "disk0", timeout=10)
    sent = {str(command["execute"]): command.get("arguments") for command in qemu.seen}
    job = sent["snapshot-save"]
    assert isinstance(job, dict)
    assert (job["tag"], job["vmstate"], job["devices"]) == ("1", "disk0", ["disk0"])
    assert sent["job-dismiss"] == {"id": job["job-id"]}


async def test_job_that_fails_says_why_and_is_dismissed(talk: Talk) -> None:
    qemu, monitor = talk
    qemu.events["snapshot-delete"] = [CONCLUDED]
    qemu.script["query-jobs"] = {"return": [{"id": "pbotvm-1", "error": "no such snapshot"}, {"id": "x", "error": "y"}]}
    with pytest.raises(MonitorError, match="snapshot-delete: no such snapshot"):
        await monitor.snapshot_delete("9", "disk0", timeout=10)
    assert qemu.seen[-1]["execute"] == "job-dismiss"


async def test_machine_runs_on_when_a_snapshot_cannot_be_loaded(talk: Talk) -> None:
    qemu, monitor = talk
    qemu.script["snapshot-load"] = {"error": {"class": "GenericError", "desc": "cannot"}}
    qemu.script["query-status"] = {"return": {"running": False, "status": "restore-vm"}}
    with pytest.raises(MonitorError, match="cannot"):
        await monitor.snapshot_load("1", "disk0", timeout=10)
    assert qemu.seen[-1]["execute"] == "cont"


async def test_snapshots_are_those_of_the_block_node(talk: Talk) -> None:
    qemu, monitor = talk
    node = {"node-name": "disk0", "image": {"snapshots": [{"name": "1"}]}}
    qemu.script["query-named-block-nodes"] = {"return": [{"node-name": "x", "image": {}}, node]}
    assert await monitor.snapshots("disk0") == [{"name": "1"}]
    with pytest.raises(MonitorError, match="no block node y"):
        await monitor.snapshots("y")


# States --------------------------------------------------------------------------------------------------------------


def transfer(qemu: FakeQemu, command: str, status: str) -> None:
    """Have the fake report `status` as soon as it was asked for `command`."""
    qemu.events[command] = [
        {"event": "MIGRATION", "data": {"status": "active"}, "timestamp": {"seconds": 1, "microseconds": 0}},
        {"event": "MIGRATION", "data": {"status": status}, "timestamp": {"seconds": 1, "microseconds": 0}},
    ]


async def test_a_state_is_loaded_through_a_descriptor_and_without_memory(talk: Talk, tmp_path: Path) -> None:
    qemu, monitor = talk
    transfer(qemu, "migrate-incoming", "completed")
    with (tmp_path / "state").open("w+b") as file:
        await monitor.load_state(file.fileno(), without_memory=True, timeout=5)
    seen: list[tuple[Any, Any]] = [(item["execute"], item.get("arguments")) for item in qemu.seen]
    assert ("getfd", {"fdname": "load"}) in seen
    assert ("migrate-incoming", {"uri": "fd:load"}) in seen
    settings = [
        {item["capability"]: item["state"] for item in arguments["capabilities"]}
        for command, arguments in seen
        if command == "migrate-set-capabilities"
    ]
    # Off again afterwards: a snapshot that this process saves later must hold its memory.
    assert settings == [{"events": True, "x-ignore-shared": True}, {"x-ignore-shared": False}]


async def test_a_later_qemu_gets_a_descriptor_set(tmp_path: Path) -> None:
    greeting = json.loads(json.dumps(GREETING))
    greeting["QMP"]["version"]["qemu"] = {"major": 10, "minor": 0, "micro": 2}
    async with fake(greeting) as (qemu, sock), qmp.connect("fake", sock, timeout=10) as monitor:
        assert monitor.version == (10, 0)
        qemu.script["add-fd"] = {"return": {"fdset-id": 4, "fd": 9}}
        transfer(qemu, "migrate", "completed")
        with (tmp_path / "state").open("w+b") as file:
            await monitor.save_state(file.fileno(), without_memory=False, timeout=5)
        assert {"uri": "file:/dev/fdset/4"} in [item.get("arguments") for item in qemu.seen]


async def test_a_saved_machine_can_go_on_when_save_state_returns(talk: Talk, tmp_path: Path) -> None:
    """After the event of the end QEMU still refuses `cont` for a moment: "Migration is not finalized yet"."""
    qemu, monitor = talk
    transfer(qemu, "migrate", "completed")
    qemu.script["query-status"] = {"return": {"running": False, "status": "finish-migrate"}}
    later: Reply = {"return": {"running": False, "status": "postmigrate"}}
    asyncio.get_running_loop().call_later(0.1, qemu.script.update, {"query-status": later})
    with (tmp_path / "state").open("w+b") as file:
        await monitor.save_state(file.fileno(), without_memory=True, timeout=10)
    assert qemu.script["query-status"] is later
    assert [command["execute"] for command in qemu.seen].count("query-status") > 1


async def test_a_state_that_does_not_fit_is_told_in_qemus_words(talk: Talk, tmp_path: Path) -> None:
    qemu, monitor = talk
    transfer(qemu, "migrate-incoming", "failed")
    qemu.script["query-migrate"] = {"return": {"status": "failed", "error-desc": "Unknown ramblock"}}
    with (tmp_path / "state").open("w+b") as file, pytest.raises(MonitorError, match="Unknown ramblock"):
        await monitor.load_state(file.fileno(), without_memory=True, timeout=5)


async def test_a_transfer_without_end_has_a_deadline(talk: Talk, tmp_path: Path) -> None:
    _qemu, monitor = talk
    with (tmp_path / "state").open("w+b") as file, pytest.raises(MonitorError, match="in time"):
        await monitor.save_state(file.fileno(), without_memory=True, timeout=0.1)
