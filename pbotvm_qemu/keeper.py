"""The process that keeps a machine ready: pool, sessions, control socket, relay, and an orderly end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from pbotvm_qemu import image, paths, plan, pool, process, request, service, snapshots, state, transports, ways
from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.control import ControlServer
from pbotvm_qemu.errors import ConfigError, UnknownLanguageError, UsageError
from pbotvm_qemu.frontdoor import FrontDoor
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.pool import Pool
from pbotvm_qemu.ports import Ports
from pbotvm_qemu.sessions import Sessions
from pbotvm_qemu.warmth import Warmth

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pbotvm_qemu.config import Config, MachineConfig

log = logging.getLogger(__name__)

DRAIN = 30.0  # seconds that running programs get after SIGTERM
_ANSWERS = 5.0  # seconds for callers to read their answers after that
_DESCRIPTORS = 4096  # for a crowd of callers, before they are turned away, and for machines
_TAG_MAX = 64
_IDLE_MAX = 86400  # seconds
_BUSY_PER_PROCESSOR = 2


class Keeper:
    """Keeps machine `record` until it is told to stop."""

    def __init__(
        self, record: state.MachineRecord, config: Config, load: Callable[[], Config], *, purpose: str, relay: bool
    ) -> None:
        self._record = record
        self._config = config
        self._load = load  # reads the configuration again
        self._purpose = purpose
        self._with_relay = relay
        self._stop = asyncio.Event()
        self._pool: Pool | None = None
        self._sessions: Sessions | None = None
        self._door: FrontDoor | None = None

    async def keep(self, on_ready: Callable[[str], None]) -> None:
        """Hold the machine, serve it, and return after SIGTERM, SIGINT or `stop`.

        `on_ready` is called once with the relay's address (empty without one) when programs can be run.
        Raises what keeps the machine from starting.
        """
        record = self._record
        files = paths.MachinePaths(record.name)
        loop = asyncio.get_running_loop()
        process.raise_descriptor_limit(_DESCRIPTORS)
        async with AsyncExitStack() as stack:
            single = choose(record, self._config).single
            await stack.enter_async_context(state.keep(record.name, purpose=self._purpose, alone=single))
            record = self._record = state.ready(record.name)  # its languages may have been changed until now
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
                stack.callback(loop.remove_signal_handler, number)
            pool = self._pool = await stack.enter_async_context(
                make_pool(choose(record, self._config), self._config, record)
            )
            self._sessions = await stack.enter_async_context(Sessions(pool, most=self._config.pool.sessions))
            if not single:
                ports = today(record, self._config)
                ours = self._config.pool.transport == transports.IsaSerial.name  # then the line is our own
                serial = 0 if ours else ports.serial
                await stack.enter_async_context(Ports(pool, serial=serial, health=ports.health))
            door = self._door = await stack.enter_async_context(
                FrontDoor(
                    self._config, self._load, name=record.name, installed=record.languages, pool=pool,
                    relay=self._with_relay,
                )
            )  # fmt: skip
            loop.add_signal_handler(signal.SIGHUP, door.reload_soon)
            stack.callback(loop.remove_signal_handler, signal.SIGHUP)
            await self._first(pool)
            if self._stop.is_set():
                return
            await stack.enter_async_context(
                ControlServer(files.control_socket, pool, self._sessions, self._answer, door.runs)
            )
            self._remember(door.address)
            on_ready(door.address)
            service.notify("READY=1")
            await stack.enter_async_context(service.alive())
            await self._stop.wait()
            service.notify("STOPPING=1")
            log.info("stopping: %d running", pool.status()["busy"])
            door.close()
            self._sessions.end_idle()
            if not await pool.drain(DRAIN):
                log.warning("programs that still run after %.0f s are ended", DRAIN)
            await door.drain(_ANSWERS)

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

    def _remember(self, address: str) -> None:
        """Write down where the relay listens."""
        me = process.Identity.of(os.getpid())
        assert me
        state.set_process(self._record.name, state.ProcessRecord(me, self._purpose, address))

    async def _answer(self, question: dict[str, object]) -> dict[str, object]:
        """Answer a question on the control socket."""
        assert self._pool
        assert self._sessions
        pool, sessions = self._pool, self._sessions
        actions: dict[str, Callable[[], Awaitable[dict[str, object]]]] = {
            "status": lambda: self._status(pool),
            "stop": self._stop_now,
            "use-languages": lambda: self._use_languages(pool),
            "snapshot-list": lambda: _named("snapshots", snapshots.found(pool)),
            "snapshot-create": lambda: _named("created", snapshots.create(pool, _tag(question))),
            "snapshot-delete": lambda: _named("deleted", snapshots.delete(pool, _tag(question))),
            "revert": lambda: _named("way", snapshots.revert(pool, _tag(question))),
            "session-open": lambda: self._open_session(sessions, question),
            "session-list": lambda: _now({"sessions": sessions.list()}),
            "session-end": lambda: _end_session(sessions, _id(question)),
            "session-save": lambda: _named("saved", sessions.get(_id(question)).save(str(question.get("tag", "")))),
            "session-revert": lambda: _named("way", sessions.get(_id(question)).revert(str(question.get("tag", "")))),
            "session-fork": lambda: self._fork_session(sessions, question),
        }
        action = actions.get(str(question.get("do")))
        if action is None:
            raise UsageError(
                f"the keeper does not know {str(question.get('do'))[:40]!r}", hint="restart it: another version runs"
            )
        return await action()

    async def _status(self, pool: Pool) -> dict[str, object]:
        assert self._sessions
        assert self._door
        way = pool.way
        return {
            **pool.status(),
            "snapshot": way.plan.loadvm if way.single else None,
            "sessions": len(self._sessions.list()),
            **self._door.status(),
        }

    async def _open_session(self, sessions: Sessions, question: dict[str, object]) -> dict[str, object]:
        idle = question.get("idle")
        if idle is None:
            idle = self._config.pool.session_idle
        if not isinstance(idle, int | float) or isinstance(idle, bool) or not 1 <= idle <= _IDLE_MAX:
            raise UsageError(f"{str(idle)[:40]} is no number of seconds from 1 to {_IDLE_MAX}", hint="see --idle")
        return (await sessions.open(idle=float(idle))).to_json()

    async def _fork_session(self, sessions: Sessions, question: dict[str, object]) -> dict[str, object]:
        return (await sessions.fork(_id(question))).to_json()

    async def _use_languages(self, pool: Pool) -> dict[str, object]:
        """Start clones from the template that a change of languages has made, from the next one on."""
        assert self._door
        record = state.ready(self._record.name)
        way = choose(record, self._config)
        fresh = warmth(record, self._config, way)
        for language in reversed(pool.warmth.wanted):
            fresh.used(language)
        pool.warmth = fresh
        pool.use(way)
        self._record = record
        self._door.install(record.languages)
        log.info("the machine has other languages now: %s", ", ".join(record.languages))
        return {"languages": list(record.languages)}

    async def _stop_now(self) -> dict[str, object]:
        self._stop.set()
        return {"stopping": True}


async def _named(name: str, work: Awaitable[object]) -> dict[str, object]:
    return {name: await work}


async def _end_session(sessions: Sessions, id_: str) -> dict[str, object]:
    sessions.end(id_)
    return {"ended": id_}


async def _now(answer: dict[str, object]) -> dict[str, object]:
    return answer


def _id(question: dict[str, object]) -> str:
    return str(question.get("id", ""))


def _tag(question: dict[str, object]) -> str:
    return check_tag(str(question.get("tag", "")))


def check_tag(tag: str) -> str:
    """Return `tag` when it can name a snapshot. Raises UsageError otherwise."""
    if not 0 < len(tag) <= _TAG_MAX or not tag.isprintable() or not tag.isascii() or tag.startswith("-"):
        raise UsageError(f"{tag[:80]!r} cannot name a snapshot", hint=f"use 1 to {_TAG_MAX} printable ASCII characters")
    return tag


def check(record: state.MachineRecord) -> image.Image:
    """Return the image of `record` when nothing differs from when its snapshot was made.

    Raises StateError or ImageError that names what does.
    """
    found = image.Image.load(record.image)
    plan.check_fingerprint(record, found)
    return found


def prepare(record: state.MachineRecord, config: Config) -> plan.Plan:
    """Return the plan that starts `record` from its clean snapshot, with today's ports. Raises what `check` raises."""
    found = check(record)
    ours = plan.Plan.of(dataclasses.replace(record, machine=today(record, config)), found, loadvm=SNAPSHOT)
    memory = plan.Memory(shared=config.pool.transport == transports.DAEMON)
    return dataclasses.replace(ours, network=config.network, transport=config.pool.transport, memory=memory)


def today(record: state.MachineRecord, config: Config) -> MachineConfig:
    """Return the hardware of `record` with the ports and the context id that the environment or the command line wants.

    Its agent listens on the vsock port that it was made with, but 0 is no such port: then vsock is not used.
    """
    hardware = config.machine
    changes = {name: getattr(hardware, name) for name in ("serial", "health", "cid") if name in config.explicit}
    if "vport" in config.explicit and not hardware.vport:
        changes["cid"] = 0
    return dataclasses.replace(record.machine, **changes)


def choose(record: state.MachineRecord, config: Config) -> ways.Way:
    """Return the way back to clean that `config` wants for the machine of `record`, with the languages it has by now.

    Raises what `check` and `ways.choose` raise.
    """
    wanted = config.pool
    record = state.ready(record.name)
    return ways.choose(prepare(record, config), record.fingerprint, wanted.revert, shared=wanted.share_memory)


def warmth(record: state.MachineRecord, config: Config, way: ways.Way) -> Warmth:
    """Return in which languages the machines that `way` starts are to be warm.

    Hardware has nothing to translate, and a machine that is put back rather than replaced has no time to.
    Raises ConfigError when the configuration names one that is not known; one that the machine lacks is only logged.
    """
    registry = Registry.load(paths.user_languages())
    try:
        always = [registry.find(name).name for name in config.pool.warm]
    except UnknownLanguageError as exc:
        raise ConfigError(f"warm in [pool]: {exc}", hint=f"mend {paths.config_file()}; {exc.hint}") from exc
    for name in set(always) - set(record.languages):
        log.warning("warm in [pool] names %s, which machine %s does not have", name, record.name)
    samples = {
        name: request.render(request.Request(code=language.sample_code), language, config.limits, stdin=False)
        for name, language in registry.languages.items()
        if name in record.languages
    }
    emulated = record.accelerator == "tcg" and not way.single
    return Warmth(samples, always=always, recent=config.pool.warm_recent if emulated else 0)


def make_pool(way: ways.Way, config: Config, record: state.MachineRecord) -> Pool:
    """Return the pool of machines like `record` that `config` wants, as large as this host carries. Raises what `warmth` raises."""
    memory = way.plan.config.memory
    carried = pool.room(memory, process.memory_available())
    # More guests at once than that only make each other slow, until they reach their time limits.
    most = config.pool.most or config.pool.size + _BUSY_PER_PROCESSOR * (os.cpu_count() or 1)
    if most > max(carried, 1):
        log.warning("the host's memory carries %d machines of %d MiB, not %d", carried, memory >> 20, most)
    return Pool(
        way,
        size=config.pool.size,
        most=max(1, min(most, carried)),
        queue=config.relay.queue,
        queue_wait=config.relay.queue_wait,
        watchdog=config.watchdog,
        no_revert=config.relay.no_revert,
        warmth=warmth(record, config, way),
    )
