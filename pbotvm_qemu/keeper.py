"""The process that keeps one machine: pool, control socket, relay, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from pbotvm_qemu import image, machine, paths, process, state
from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.control import ControlServer
from pbotvm_qemu.errors import UsageError
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.pool import Pool
from pbotvm_qemu.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pbotvm_qemu.config import Config

log = logging.getLogger(__name__)

DRAIN = 30.0  # seconds that running programs get after SIGTERM
_TAG_MAX = 64


class Keeper:
    """Keeps machine `record` until it is told to stop."""

    def __init__(self, record: state.MachineRecord, config: Config, *, purpose: str, relay: bool) -> None:
        self._record = record
        self._config = config
        self._purpose = purpose
        self._with_relay = relay
        self._stop = asyncio.Event()
        self._pool: Pool | None = None
        self._relay: Relay | None = None

    async def keep(self, on_ready: Callable[[str], None]) -> None:
        """Hold the machine, serve it, and return after SIGTERM, SIGINT or `stop`.

        `on_ready` is called once with the relay's address (empty without one) when programs can be run.
        Raises what keeps the machine from starting.
        """
        record = self._record
        files = paths.MachinePaths(record.name)
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(state.lock(record.name, purpose=self._purpose))
            plan = prepare(record, self._config)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
                stack.callback(loop.remove_signal_handler, number)
            pool = self._pool = await stack.enter_async_context(
                Pool(
                    plan,
                    queue=self._config.relay.queue,
                    queue_wait=self._config.relay.queue_wait,
                    on_process=self._remember,
                )
            )
            if self._with_relay:
                registry = Registry.load(paths.user_languages())
                self._relay = await stack.enter_async_context(
                    Relay(self._config.relay, self._config.limits, registry, record.languages, record.name, pool)
                )
            await self._first(pool)
            if self._stop.is_set():
                return
            await stack.enter_async_context(ControlServer(files.control_socket, pool, self._answer))
            address = self._relay.address if self._relay else ""
            self._remember(None)
            on_ready(address)
            notify("READY=1")
            await self._stop.wait()
            notify("STOPPING=1")
            log.info("stopping: %d running", pool.status()["busy"])
            if self._relay:
                self._relay.close()
            if not await pool.drain(DRAIN):
                log.warning("programs that still run after %.0f s are ended", DRAIN)

    async def _first(self, pool: Pool) -> None:
        """Wait for the first machine, or for the order to stop."""
        ready = asyncio.create_task(pool.ready())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
        finally:
            for task in (ready, stop):
                task.cancel()
            await asyncio.gather(ready, stop, return_exceptions=True)

    def _remember(self, pid: int | None) -> None:
        """Write down who runs what, so that after a crash of ours nothing is left unknown."""
        me = process.Identity.of(os.getpid())
        assert me
        known = state.get_process(self._record.name)
        qemu = process.Identity.of(pid) if pid else (known.qemu if known else None)
        address = self._relay.address if self._relay else ""
        state.set_process(self._record.name, state.ProcessRecord(me, qemu, self._purpose, address))

    async def _answer(self, question: dict[str, object]) -> dict[str, object]:
        """Answer a question on the control socket."""
        assert self._pool
        pool = self._pool
        actions: dict[str, Callable[[], Awaitable[dict[str, object]]]] = {
            "status": lambda: self._status(pool),
            "stop": self._stop_now,
            "snapshot-list": lambda: _named("snapshots", pool.snapshots()),
            "snapshot-create": lambda: _named("created", pool.snapshot_create(_tag(question))),
            "snapshot-delete": lambda: _named("deleted", pool.snapshot_delete(_tag(question))),
            "revert": lambda: _named("way", pool.revert(_tag(question))),
        }
        action = actions.get(str(question.get("do")))
        if action is None:
            raise UsageError(
                f"the keeper does not know {str(question.get('do'))[:40]!r}", hint="restart it: another version runs"
            )
        return await action()

    async def _status(self, pool: Pool) -> dict[str, object]:
        return {**pool.status(), "relay": self._relay.address if self._relay else None}

    async def _stop_now(self) -> dict[str, object]:
        self._stop.set()
        return {"stopping": True}


async def _named(name: str, work: Awaitable[object]) -> dict[str, object]:
    return {name: await work}


def _tag(question: dict[str, object]) -> str:
    return check_tag(str(question.get("tag", "")))


def check_tag(tag: str) -> str:
    """Return `tag` when it can name a snapshot. Raises UsageError otherwise."""
    if not 0 < len(tag) <= _TAG_MAX or not tag.isprintable() or not tag.isascii() or tag.startswith("-"):
        raise UsageError(f"{tag[:80]!r} cannot name a snapshot", hint=f"use 1 to {_TAG_MAX} printable ASCII characters")
    return tag


def prepare(record: state.MachineRecord, config: Config) -> machine.Plan:
    """Return the plan that starts `record` from its clean snapshot, with today's ports.

    Raises StateError or ImageError when something differs from when the snapshot was made. The caller holds the lock.
    """
    found = image.Image.load(record.image)
    machine.check_fingerprint(record, found)
    hardware = config.machine
    changes = {name: getattr(hardware, name) for name in ("serial", "health") if name in config.explicit}
    today = dataclasses.replace(record, machine=dataclasses.replace(record.machine, **changes))
    return machine.Plan.of(today, found, loadvm=SNAPSHOT)


def notify(text: str) -> None:
    """Tell systemd how we are, when it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
