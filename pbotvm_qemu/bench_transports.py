"""The figures of each transport that this host has: round trip, and throughput in both directions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pbotvm_qemu import config, keeper, transports, vhost_user
from pbotvm_qemu.errors import HostError
from pbotvm_qemu.guest import spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pbotvm_qemu.channel import Stream
    from pbotvm_qemu.machine import VirtualMachine
    from pbotvm_qemu.state import MachineRecord

_BULK = {"isa-serial": 1 << 20}  # bytes; a serial line is slow
_BULK_ELSE = 64 << 20
_PINGS = 50
_PIECE = bytes(1 << 16)
_WALL = 300.0

FIGURES: dict[str, tuple[str, str]] = {
    f"{what}_{name}": (unit, f"{name}: {meaning}")
    for name in transports.NAMES
    for what, unit, meaning in (
        ("ping", "s", "empty question and answer"),
        ("output", "MB/s", "output of a program"),
        ("input", "MB/s", "input of a program"),
    )
}


async def measure(
    wanted: config.Config, record: MachineRecord, samples: dict[str, list[float]], say: Callable[[str], None]
) -> None:
    """Add what each transport carries; those that this host or machine does not have get no figures."""
    for name in transports.NAMES:
        if problem := _missing(name, record):
            say(f"{name}: {problem}; not measured")
            continue
        say(f"transport {name}")
        share = name != transports.DAEMON  # which must see the memory
        chosen = config.override(wanted, "pool", transport=name, revert="clone", share_memory=share)
        vm = await keeper.choose(record, chosen).start()
        try:
            await _carry(vm, name, samples)
        finally:
            await vm.stop()


def _missing(name: str, record: MachineRecord) -> str:
    """Return why `name` cannot be measured, or nothing."""
    if name == "vsock" and record.fingerprint.get("vsock") != "yes":
        return "the machine was made without it"
    if name == transports.DAEMON:
        try:
            vhost_user.find()
        except HostError as exc:
            return str(exc)
    return ""


async def _carry(vm: VirtualMachine, name: str, samples: dict[str, list[float]]) -> None:
    assert vm.hello
    if vm.hello.transport != name:
        return  # it gave way, and said why
    await vm.execute(_request("true"), [], on_output=_ignore)
    samples[f"ping_{name}"] += [await vm.channel.ping() for _ in range(_PINGS)]
    size = _BULK.get(name, _BULK_ELSE)
    for _ in range(3):
        begin = time.perf_counter()
        await vm.execute(_request("head", "-c", str(size), "/dev/zero"), [], on_output=_ignore)
        samples[f"output_{name}"].append(size / (time.perf_counter() - begin) / 1e6)
        begin = time.perf_counter()
        await vm.execute(_request("wc", "-c", stdin=True), [], on_output=_ignore, stdin=_pieces(size))
        samples[f"input_{name}"].append(size / (time.perf_counter() - begin) / 1e6)


def _request(*argv: str, stdin: bool = False) -> spec.RunSpec:
    limits = spec.Limits(wall=_WALL, cpu=0, memory=0, processes=20, file_size=0, output=4 * _BULK_ELSE)
    return spec.RunSpec(files=(), steps=(argv,), env={}, stdin=stdin, limits=limits, collect=())


async def _pieces(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // len(_PIECE)):
        yield _PIECE


async def _ignore(_stream: Stream, _data: bytes) -> None:
    pass
