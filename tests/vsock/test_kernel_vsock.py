"""The host kernel's vsock, for real: /dev/vhost-vsock under QEMU, AF_VSOCK in Python, our agent at the other end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
import socket
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import config, creation, image, paths, plan, process, state, transports
from pbotvm_qemu.endpoints import Endpoint
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.pbot_guest import OfflineError, PBotGuest
from tests import support
from tests.compat.peers import frame_seed, frame_today, request, sized
from tests.vsock.conftest import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pbotvm_qemu.machine import VirtualMachine
    from tests.vsock.conftest import Machine

pytestmark = pytest.mark.vm

SECONDS = 120.0  # for anything that must come; only a hang takes that long
ROUNDS = int(os.environ.get("PBOTVM_TEST_ROUNDS", "3"))  # set it higher for a long run by hand
PORT, HEALTH = 5555, 5556


def say(what: str, begin: float) -> None:
    """Print a figure; pytest shows it with -s."""
    sys.stdout.write(f"    {what}: {1000 * (time.monotonic() - begin):.0f} ms\n")
    sys.stdout.flush()


def connect(cid: int, port: int = PORT) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    try:
        sock.connect((cid, port))
    except BaseException:
        sock.close()
        raise
    return sock


def ask(cid: int, data: bytes, port: int = PORT) -> bytes:
    """Send what a vm-exec sends, and return every byte until the guest closes the connection."""
    with connect(cid, port) as sock:
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(1 << 16):
            answer += piece
        return answer


# context ids ---------------------------------------------------------------------------------------------------------


def test_a_context_id_is_free_for_who_gets_it() -> None:
    first, cid = plan.open_vsock(7000)
    second, other = plan.open_vsock(7000)
    try:
        assert (cid, other) == (7000, 7001)
        os.close(first)
        first, again = plan.open_vsock(7000)
        assert again == 7000
    finally:
        os.close(first)
        os.close(second)


async def test_two_clones_live_at_once_each_at_its_own_id(machine: Machine) -> None:
    async with machine.clone() as one, machine.clone() as two:
        assert {one._cid, two._cid} == {machine.plan.config.cid, machine.plan.config.cid + 1}
        assert {one.hello.transport, two.hello.transport} == {"vsock"}  # type: ignore[union-attr]
        words = secrets.token_hex(8), secrets.token_hex(8)
        await asyncio.gather(run(one, f"echo {words[0]} >/tmp/word"), run(two, f"echo {words[1]} >/tmp/word"))
        assert await run(one, "cat /tmp/word; hostname") != await run(two, "cat /tmp/word; hostname")
        assert (await run(one, "cat /tmp/word"), await run(two, "cat /tmp/word")) == tuple(
            f"{word}\n" for word in words
        )
        # The kernel takes each connection to the guest of that id, whoever asks.
        for vm, word in zip((one, two), words, strict=True):
            said = await asyncio.to_thread(ask, vm._cid, frame_today(request(code="cat /tmp/word")))
            assert json.loads(said.split(b"\n")[0].removeprefix(b"result:")) == {"result": f"{word}\n"}


async def test_the_id_that_was_asked_for_is_taken_and_the_next_when_somebody_has_it(machine: Machine) -> None:
    holder, taken = plan.open_vsock(4242)
    try:
        async with machine.clone(cid=4242) as vm:
            assert vm._cid == taken + 1
            assert await run(vm, "echo hi") == "hi\n"
    finally:
        os.close(holder)


@pytest.mark.parametrize("variable", ["PBOTVM_CID", "PBOTVM_VPORT"])
def test_0_at_a_start_never_uses_vsock(env: dict[str, str], machine: Machine, variable: str) -> None:
    """Not even of a machine that has it."""
    result = support.cli(env | {variable: "0"}, "start", "--revert", "clone", "--pool", "1")
    assert result.returncode == 0, result.stderr.decode()
    try:
        answer = support.cli_json(env, "exec", "--json", "-lang=sh", "echo hi")
        assert (answer["stdout"], answer["transport"]) == ("hi\n", "virtio-serial")
        assert not support.cli_json(env, "status", "--json")["live"]["transport_why"]
    finally:
        support.cli(env, "stop")


def test_a_start_takes_the_id_that_the_environment_says(env: dict[str, str], machine: Machine) -> None:
    result = support.cli(
        env | {"PBOTVM_CID": "4000"}, "start", "--transport", "vsock", "--revert", "clone", "--pool", "1"
    )
    assert result.returncode == 0, result.stderr.decode()
    try:
        words = [word for pid in support.qemus(machine.record.uuid) for word in process.command_line(pid)]
        assert any(",guest-cid=4000," in word for word in words), words
        answer = support.cli_json(env, "exec", "--json", "-lang=sh", "echo hi")
        assert (answer["stdout"], answer["transport"]) == ("hi\n", "vsock")
    finally:
        support.cli(env, "stop")


@pytest.mark.parametrize("variable", ["PBOTVM_CID", "PBOTVM_VPORT"])
async def test_a_machine_that_is_made_with_0_has_no_vsock(machine: Machine, variable: str) -> None:
    wanted = config.load(paths.config_file(), {"PBOTVM_DOMAIN": "other", variable: "0"})
    built = image.Image.load(machine.record.image)
    paths.private(paths.MachinePaths("other").directory, mode=0o711)
    try:
        record = await creation.prepare(wanted.machine, built, machine.record.qemu, "tcg", machine.record.languages)
        own = plan.Plan.of(record, built, loadvm=None)
        assert not own.vsock
        assert "vhost-vsock" not in " ".join(plan.devices(own, plan.Descriptors()))
    finally:
        state.discard("other")


async def test_a_machine_is_made_with_the_id_and_the_port_that_the_environment_says(
    machine: Machine, refused: Callable[[int, int], Awaitable[int | None]]
) -> None:
    said = {"PBOTVM_DOMAIN": "other", "PBOTVM_CID": "4000", "PBOTVM_VPORT": "6001"}
    wanted = config.override(config.load(paths.config_file(), said), "machine", memory="256M", serial=0, health=0)
    begin = time.monotonic()
    try:
        record = await creation.create(wanted, ",".join(machine.record.languages), lambda _stage, _done: None)
        say("create", begin)
        own = plan.Plan.of(record, image.Image.load(record.image), loadvm=config.SNAPSHOT)
        async with type(machine)(record, replace(own, transport="vsock")).clone() as vm:
            assert (vm._cid, vm.hello and vm.hello.transport) == (4000, "vsock")
            assert await run(vm, "echo hi") == "hi\n"
            answer = await asyncio.to_thread(ask, 4000, frame_today(request(code="echo hello")), 6001)
            assert answer == b'result:{"result": "hello\\n"}\nresult:end\n'
            assert await refused(4000, PORT) == errno.ECONNRESET  # nobody listens on the usual port
    finally:
        state.discard("other")
        state.forget_lock("other")


# after every kind of restore -----------------------------------------------------------------------------------------


async def test_the_first_request_to_every_clone_succeeds(machine: Machine) -> None:
    for _ in range(ROUNDS):
        begin = time.monotonic()
        async with machine.clone() as vm:
            say("clone to hello over vsock", begin)
            begin = time.monotonic()
            assert await run(vm, "echo first") == "first\n"
            say("first run", begin)


async def test_the_first_request_after_every_snapshot_load_succeeds(machine: Machine) -> None:
    way = machine.way("loadvm")
    begin = time.monotonic()
    vm = await way.start()
    say("start from the snapshot to hello over vsock", begin)
    try:
        for number in range(ROUNDS):
            old = vm.channel
            await run(vm, f"echo {number} >/tmp/seen")
            begin = time.monotonic()
            await vm.revert("1", timeout=SECONDS)
            say("snapshot-load to hello over vsock", begin)
            assert vm.channel is not old
            assert vm.hello
            assert vm.hello.transport == "vsock"
            assert await run(vm, "ls /tmp") == ""
    finally:
        await vm.stop()


async def test_the_first_request_after_a_restart_succeeds(machine: Machine) -> None:
    way = machine.way("restart")
    for _ in range(2):
        vm = await way.start()
        try:
            assert vm.hello
            assert vm.hello.transport == "vsock"
            assert await run(vm, "echo first") == "first\n"
        finally:
            await vm.stop()


async def test_sleeping_and_waking_keep_the_connection(machine: Machine) -> None:
    async with machine.clone() as vm:
        await vm.sleep()
        await vm.wake()
        assert await run(vm, "echo awake") == "awake\n"


async def test_many_connections_and_many_runs_at_once(machine: Machine) -> None:
    async with machine.clone() as vm, AsyncExitStack() as stack:
        channels = [vm.channel]
        for _ in range(3):
            reached = await transports.reach(transports.Vsock(vm._cid, PORT), SECONDS)
            stack.push_async_callback(reached.channel.close)
            channels.append(reached.channel)
        begin = time.monotonic()
        for channel in channels:
            await channel.ping(timeout=SECONDS)
        say("four pings", begin)
        texts = await asyncio.gather(*(run(vm, f"sleep 0.1; echo {number}") for number in range(8)))
        assert texts == [f"{number}\n" for number in range(8)]


async def test_a_megabyte_comes_whole_and_in_order(machine: Machine) -> None:
    async with machine.clone() as vm:
        begin = time.monotonic()
        said = await run(vm, "seq 150000", wall=300)
        say(f"{len(said) >> 10} KiB from guest to host", begin)
        assert said == "".join(f"{number}\n" for number in range(1, 150001))


# PBot's own protocol -------------------------------------------------------------------------------------------------


async def test_an_unmodified_vm_exec_is_answered_byte_for_byte_and_the_connection_closed(machine: Machine) -> None:
    async with machine.clone() as vm:
        today = await asyncio.to_thread(ask, vm._cid, frame_today(request(code="echo hello")))
        assert today == b'result:{"result": "hello\\n"}\nresult:end\n'
        seed = await asyncio.to_thread(ask, vm._cid, frame_seed(request(code="exit 3")))
        assert seed == b'result:{"result": "Exit 3.\\n"}\nresult:end\n'
        large = sized(40_000)
        said = await asyncio.to_thread(ask, vm._cid, frame_today(large))
        assert json.loads(said.split(b"\n")[0].removeprefix(b"result:"))["result"] == f"{len(str(large['code'])) + 1}\n"
        # A connection carries one request: what follows it is not read.
        two = await asyncio.to_thread(
            ask, vm._cid, frame_today(request(code="echo 1")) + frame_today(request(code="echo 2"))
        )
        assert two.count(b"result:end") == 1
        assert b"1\\n" in two


async def test_the_health_port_answers_both_eras(machine: Machine) -> None:
    async with machine.clone() as vm:

        def talk() -> tuple[bytes, bytes]:
            with connect(vm._cid, HEALTH) as sock:
                beat = sock.recv(2)
                sock.sendall(b"\n")
                said = b""
                while not said.endswith(b":END\r\n"):
                    said += sock.recv(4096)
                return beat, said

        beat, said = await asyncio.to_thread(talk)
        assert beat == b"\r\n"
        assert b"procs ---" in said


async def test_our_back_door_reaches_a_guest_server_over_vsock(machine: Machine) -> None:
    async with machine.clone() as vm:
        guest = PBotGuest(Endpoint(name="g", cid=vm._cid, vport=PORT), queue=4, queue_wait=5, output=1 << 20)
        answers = await asyncio.gather(
            *(guest.run(request(code=f"echo {number}"), timeout=SECONDS) for number in range(3))
        )
        assert sorted(text for text, _waited in answers) == [f"{number}\n\n" for number in range(3)]
        elsewhere = PBotGuest(Endpoint(name="g", cid=vm._cid + 1000), queue=4, queue_wait=5, output=1 << 20)
        with pytest.raises(OfflineError, match="cannot be reached over vsock"):
            await elsewhere.run(request(), timeout=SECONDS)


# what fails, and how -------------------------------------------------------------------------------------------------


@pytest.fixture
def refused() -> Iterator[Callable[[int, int], Awaitable[int | None]]]:
    """Return the errno with which a connection to (cid, port) fails, and print how long that took."""

    async def attempt(cid: int, port: int) -> int | None:
        begin = time.monotonic()
        try:
            (await asyncio.to_thread(connect, cid, port)).close()
        except OSError as exc:
            say(f"{exc.strerror}", begin)
            return exc.errno
        return None

    return attempt  # type: ignore[return-value]


async def test_every_refusal_has_its_error_and_virtio_serial_takes_over(
    machine: Machine, refused: Callable[[int, int], Awaitable[int | None]]
) -> None:
    assert await refused(65000, PORT) == errno.ENODEV  # no such guest
    async with machine.clone() as vm:
        assert await refused(vm._cid, 9999) == errno.ECONNRESET  # nobody listens
        await vm.sleep()
        assert await refused(vm._cid, PORT) == errno.ETIMEDOUT  # a guest that stands still
        await vm.wake()
        gone = vm._cid
    assert await refused(gone, PORT) in (errno.ENODEV, errno.ECONNRESET)  # QEMU has ended

    for cid, port, why in ((65000, PORT, "Errno 19"), (None, 9999, "Errno 104")):
        async with machine.over("virtio-serial").clone() as vm:
            assert vm.hello
            assert vm.hello.transport == "virtio-serial"
            await run(vm, "true")  # a guest that has just begun may take longer than that to refuse
            await vm.channel.close()
            ways: list[transports.Transport] = [
                transports.Vsock(cid or vm._cid, port),
                transports.VirtioSerial(_port(vm)),
            ]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transports, "FALL_BACK", 1.0)
                begin = time.monotonic()
                reached = await transports.choose(ways, SECONDS)
                say(f"falling back ({reached.why})", begin)
            assert reached.hello.transport == "virtio-serial"
            assert why in reached.why
            await reached.channel.ping(timeout=SECONDS)
            await reached.channel.close()


def _port(vm: VirtualMachine) -> socket.socket:
    assert vm._port
    return vm._port


async def test_a_guest_that_is_killed_ends_its_conversation(machine: Machine) -> None:
    async with machine.clone() as vm:
        work = asyncio.ensure_future(run(vm, "sleep 100", wall=110))
        await asyncio.sleep(0.5)
        os.kill(vm.pid, 9)
        with pytest.raises(GuestError):
            await asyncio.wait_for(work, SECONDS)


def test_a_kept_machine_says_that_it_is_reached_over_vsock(env: dict[str, str], machine: Machine) -> None:
    begin = time.monotonic()
    result = support.cli(env, "start", "--revert", "clone", "--transport", "vsock", "--pool", "1")
    assert result.returncode == 0, result.stderr.decode()
    say("start of a keeper", begin)
    try:
        for number in range(2):
            begin = time.monotonic()
            answer = support.cli_json(env, "exec", "--json", "-lang=sh", f"echo {number}")
            say("exec through a keeper", begin)
            status = support.cli_json(env, "status", "--json")
            said = support.cli(env, "logs").stdout.decode("utf-8", "replace")
            assert (answer["stdout"], answer["transport"]) == (f"{number}\n", "vsock"), (status, said)
            assert status.get("live", {}).get("transport") == "vsock", (status, said)
    finally:
        support.cli(env, "stop")
