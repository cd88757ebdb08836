"""`bench --net`: throughput and latency of each network mode, beside what the host does without a guest.

Everything happens in two network namespaces that are made for it and removed afterwards: one is the host with its
bridges and guests, the other the world behind its uplink. The same small program measures from a guest and from the
host, so that the difference is the guest's network; iperf3, where it is installed, says what the host itself can do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu import image, keeper, net, paths, plan, process, request, state, template
from pbotvm_qemu.config import Limits, NetworkConfig
from pbotvm_qemu.errors import HostError, StateError
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.machine import VirtualMachine
from pbotvm_qemu.network import links, netprobe, netsetup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.config import Config

    Figures = dict[str, object]

WORLD, HOST = "45.45.45.1", "45.45.45.2"
PORT = 5201  # iperf3's own, plus one for ours
_BRIDGE = "br-bench"
_SIZE = 32 << 20  # bytes in each direction
_ROUNDS = 200
_LIMIT = 420.0  # seconds for everything
_SETTINGS = NetworkConfig(
    rate=0, connections=0, peers=True, bridge=_BRIDGE, addresses=("45.45.45.100-45.45.45.120/24",), gateways=(WORLD,), dns=(WORLD,),
)  # fmt: skip

# Echoes single bytes, and gives or takes _SIZE bytes; `ready` when it listens.
SERVER = """
import socket, sys, threading
block = bytes(1 << 16)
def serve(sock):
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        word = sock.recv(1)
        while word == b"e":
            sock.sendall(b"e")
            word = sock.recv(1)
        left = SIZE
        while word == b"g" and left > 0:
            sock.sendall(block)
            left -= len(block)
        while word == b"t" and left > 0:
            left -= len(sock.recv(1 << 16)) or left
        if word == b"t": sock.sendall(b"t")
with socket.create_server(("0.0.0.0", PORT)) as server:
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
CLIENT = """
import json, socket, statistics, time
def connect():
    sock = socket.create_connection((WHERE, PORT), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
with connect() as sock:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        sock.sendall(b"e"); sock.recv(1)
        times.append(time.perf_counter() - begin)
def rate(word):
    with connect() as sock:
        begin, left = time.perf_counter(), SIZE
        sock.sendall(word)
        while word == b"g" and left > 0: left -= len(sock.recv(1 << 16)) or left
        block = bytes(1 << 16)
        while word == b"t" and left > 0: sock.sendall(block); left -= len(block)
        if word == b"t": sock.recv(1)
        return SIZE / (time.perf_counter() - begin) / 1e6
print(json.dumps({"receive_mb_s": rate(b"g"), "send_mb_s": rate(b"t"), "round_trip_ms": statistics.median(times) * 1e3}))
"""


def _program(text: str, where: str = "") -> str:
    """Return `text` with its figures filled in."""
    places = f"WHERE, PORT, SIZE, ROUNDS = {where!r}, {PORT + 1}, {_SIZE}, {_ROUNDS}\n"
    return places + text


async def measure(config: Config, say: Callable[[str], None]) -> Figures:
    """Return the figures of every mode as {mode: {figure: value}}.

    Raises HostError when the host lacks something, StateError when the machine has no network card.
    """
    record = state.ready(config.machine.name)
    if net.imagined(record.machine.net, 1) == 0:
        raise StateError(
            f"machine {record.name!r} has no network card that could be measured (mode {record.machine.net})",
            hint=f"pbotvm-qemu create --net nat {record.name}-net, and bench --net that one",
        )
    if not netprobe.has_net_admin() or os.geteuid():
        raise HostError("network namespaces need root", hint="run as root")
    ip = process.find_program("ip", package="iproute2")
    async with _namespaces(ip) as (host, world):
        say("measuring networks in namespaces of their own")
        inner = [ip, "netns", "exec", host, sys.executable, "-m", "pbotvm_qemu", "bench-net", record.name, world]
        done = (await process.run(inner, timeout=_LIMIT)).check(hint="see the lines above")
    figures = json.loads(done.stdout)
    return {str(mode): values for mode, values in figures.items()}


@contextlib.asynccontextmanager
async def _namespaces(ip: str) -> AsyncIterator[tuple[str, str]]:
    """Make two namespaces with a cable in between; the host's end of it is in a bridge."""
    names = host, world = f"pbotvm-host-{os.getpid()}", f"pbotvm-world-{os.getpid()}"
    try:
        for name in names:
            await _run(ip, "netns", "add", name)
            await _run(ip, "-n", name, "link", "set", "lo", "up")
        await _run(ip, "link", "add", "lan0", "netns", host, "type", "veth", "peer", "name", "lan0", "netns", world)
        await _run(ip, "-n", host, "link", "add", _BRIDGE, "type", "bridge")
        await _run(ip, "-n", host, "link", "set", "lan0", "master", _BRIDGE)
        for name, place, address in ((host, _BRIDGE, HOST), (world, "lan0", WORLD)):
            await _run(ip, "-n", name, "addr", "add", f"{address}/24", "dev", place)
            for link in {place, "lan0"}:
                await _run(ip, "-n", name, "link", "set", link, "up")
        await _run(ip, "-n", host, "route", "add", "default", "via", WORLD)
        yield names
    finally:
        for name in names:
            with contextlib.suppress(HostError):
                await process.run([ip, "netns", "del", name], timeout=10.0)


async def _run(*words: str) -> None:
    (await process.run(words, timeout=10.0)).check()


async def inside(config: Config, world: str) -> Figures:
    """Measure, in the host's namespace; `world` is the other one."""
    ip = process.find_program("ip", package="iproute2")
    figures: Figures = {}
    async with links.Links() as kernel:
        for step in netsetup.up(kernel, await netsetup.look(kernel), _SETTINGS, netsetup.OWN):
            await step.do()
    async with _server([ip, "netns", "exec", world, sys.executable, "-c", _program(SERVER)]):
        figures["host, no guest"] = json.loads(
            (await process.run([sys.executable, "-c", _program(CLIENT, WORLD)], timeout=60.0)).check().stdout
        )
        async with _booted(config, "user") as one:
            figures["user"] = await _ask(one, WORLD)
        for mode in ("nat", "bridge"):
            async with _guests(config, mode, 1) as (one,):
                figures[mode] = await _ask(one, WORLD)
    async with _guests(config, "isolated", 2) as (one, two):
        assert two.attachment.guest
        async with _serving(two):
            figures["isolated, guest to guest"] = await _ask(one, str(two.attachment.guest.plain[0]))
    figures |= await _iperf3(ip, world)
    return figures


async def _iperf3(ip: str, world: str) -> Figures:
    """Return what iperf3 measures between the namespaces; nothing where it is not installed."""
    with contextlib.suppress(HostError):
        iperf3 = process.find_program("iperf3", package="iperf3")
        async with _server(
            [ip, "netns", "exec", world, iperf3, "-s", "-p", str(PORT), "--forceflush"], ready="listening"
        ):
            found: dict[str, object] = {}
            for name, words in (("send_mb_s", ()), ("receive_mb_s", ("-R",))):
                done = await process.run([iperf3, "-c", WORLD, "-p", str(PORT), "-t", "2", "-J", *words], timeout=30.0)
                summary = json.loads(done.check().stdout)["end"]["sum_received"]
                found[name] = summary["bits_per_second"] / 8e6
            return {"host, no guest, iperf3": found}
    return {}


@contextlib.asynccontextmanager
async def _server(argv: list[str], ready: str = "ready") -> AsyncIterator[None]:
    """Have a server run while the body does."""
    with tempfile.TemporaryFile() as log:
        child = await process.Child.start(argv, pass_fds=(), log=log.fileno())
        try:
            for _ in range(200):
                if ready.encode() in os.pread(log.fileno(), 4096, 0):
                    break
                await child.wait(0.05)
            yield
        finally:
            await child.kill()


@contextlib.asynccontextmanager
async def _guests(config: Config, mode: str, count: int) -> AsyncIterator[list[VirtualMachine]]:
    """Start clones of the machine in the network of `mode`."""
    record = state.ready(config.machine.name)
    frozen = template.matching(record.name, record.fingerprint)
    base = plan.Plan.of(record, keeper.check(record), loadvm=None).restored(frozen.memory)
    base = replace(base, config=replace(base.config, net=mode), network=_SETTINGS)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(VirtualMachine(base, thaw=frozen.frozen, hostname=f"bench-{number}"))
            for number in range(count)
        ]


@contextlib.asynccontextmanager
async def _booted(config: Config, mode: str) -> AsyncIterator[VirtualMachine]:
    """Boot a guest in `mode`, whose card can do other things than that of the machine's clones, from a disk of its own."""
    record = state.ready(config.machine.name)
    built = keeper.check(record)
    parent = paths.private(paths.MachinePaths(record.name).clones, mode=0o711)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=parent) as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU's user must get through
        await image.create_overlay(built, folder / "disk.qcow2", record.machine.disk_size)
        base = plan.Plan.of(record, built, loadvm=None)
        quiet = replace(base.config, net=mode, serial=0, health=0)
        console = plan.Console(folder / "console/socket", folder / "console.log")
        async with VirtualMachine(
            replace(base, config=quiet, network=_SETTINGS, disk=folder / "disk.qcow2", console=console)
        ) as vm:
            yield vm


async def _ask(vm: VirtualMachine, where: str) -> object:
    """Run the measuring program in a guest."""
    printed = bytearray()

    async def keep(_stream: object, data: bytes) -> None:
        printed.extend(data[: 4096 - len(printed)])

    outcome = await _execute(vm, _program(CLIENT, where), keep)
    if outcome.exit_code:
        raise HostError(f"the measurement failed in the guest: {printed.decode('utf-8', 'replace').strip()[-300:]}")
    found = json.loads(printed)
    return found if isinstance(found, dict) else {}


@contextlib.asynccontextmanager
async def _serving(vm: VirtualMachine) -> AsyncIterator[None]:
    """Have the server run in a guest while the body runs."""
    ready = asyncio.Event()

    async def heard(_stream: object, data: bytes) -> None:
        if b"ready" in data:
            ready.set()

    task = asyncio.create_task(_execute(vm, _program(SERVER), heard))
    try:
        async with asyncio.timeout(60.0):
            await ready.wait()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _execute(vm: VirtualMachine, code: str, on_output: OnOutput) -> Outcome:
    language = Registry.load(paths.user_languages()).find("python3", None)
    spec, content = request.render(request.Request(code=code), language, Limits(wall=180.0), stdin=False)
    return await vm.execute(spec, content, on_output=on_output)


def table(report: Figures) -> list[str]:
    """Return the figures as lines for people."""
    lines = [f"{'mode':28} {'receive':>12} {'send':>12} {'round trip':>12}"]
    for mode, values in report.items():
        if isinstance(values, dict):
            shown = [
                f"{float(values[key]):.{digits}f} {unit}" if key in values else "-" for key, unit, digits in _COLUMNS
            ]
            lines.append(f"{mode:28} {shown[0]:>12} {shown[1]:>12} {shown[2]:>12}")
    return lines


_COLUMNS = (("receive_mb_s", "MB/s", 1), ("send_mb_s", "MB/s", 1), ("round_trip_ms", "ms", 2))
