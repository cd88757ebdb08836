"""The Python API: run programs in virtual machines from a program of your own.

```python
import asyncio
from pbotvm_qemu.api import Pool

async def main() -> None:
    async with Pool("pbot-vm", size=2) as pool:
        result = await pool.run("python3", "print(6 * 7)")
        print(result.exit_code, result.stdout)

asyncio.run(main())
```

The machine must exist (`pbotvm-qemu create`). Every run is on a clean machine, unless it is in a `Session`. Whatever
goes wrong on our side is a `PbotVMError`: `NeverRanError` is safe to repeat, after `RunLostError` the program may have
run. A program that fails is no error.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from pbotvm_qemu import config, keeper, paths, request, sessions, state, template
from pbotvm_qemu import pool as pools
from pbotvm_qemu.errors import (
    GuestError,
    NeverRanError,
    PbotVMError,
    RunLostError,
    StateError,
    UnknownLanguageError,
    UsageError,
)
from pbotvm_qemu.languages import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.machine import VirtualMachine as _Machine

__all__ = [
    "GuestError",
    "NeverRanError",
    "Output",
    "PbotVMError",
    "Pool",
    "Result",
    "RunLostError",
    "Session",
    "StateError",
    "Template",
    "UnknownLanguageError",
    "UsageError",
    "VirtualMachine",
    "run",
]

Stream = Literal["stdout", "stderr"]
_UNREAD = 16  # pieces of output that wait for who reads a stream; then the program waits


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of what a program printed, as it came."""

    stream: Stream
    data: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """A program that has ended, and what it printed."""

    language: str
    stdout: bytes
    stderr: bytes
    output: bytes  # both streams in the order of writing
    outcome: Outcome  # how it ended, what it used, where it ran, collected files

    @property
    def exit_code(self) -> int:
        """What a shell would report; see Outcome.exit_code."""
        return self.outcome.exit_code

    @property
    def files(self) -> dict[str, bytes]:
        """The files that were asked for with `collect` and were there."""
        return self.outcome.files


class _Collector:
    """Keeps what a program prints."""

    def __init__(self, on_output: OnOutput | None = None) -> None:
        self._pieces: list[Output] = []
        self._on_output = on_output

    async def take(self, stream: Stream, data: bytes) -> None:
        if self._on_output:
            await self._on_output(stream, data)
        else:
            self._pieces.append(Output(stream, data))

    def result(self, language: str, outcome: Outcome) -> Result:
        def joined(*streams: Stream) -> bytes:
            return b"".join(piece.data for piece in self._pieces if piece.stream in streams)

        return Result(language, joined("stdout"), joined("stderr"), joined("stdout", "stderr"), outcome)


class _Runner:
    """What everything that runs programs has in common: from a language and its code to a result."""

    def __init__(self, source: str | Template | None, limits: config.Limits | None) -> None:
        configured = config.load(paths.config_file())
        name = configured.machine.name if source is None else source if isinstance(source, str) else source.name
        self._record = state.ready(name)
        self._limits = limits or configured.limits
        self._registry = Registry.load(paths.user_languages())

    async def _execute(
        self, spec: RunSpec, content: Sequence[bytes], on_output: OnOutput, stdin: AsyncIterator[bytes] | None
    ) -> Outcome:
        raise NotImplementedError

    async def run(
        self,
        language: str,
        code: str | bytes,
        *,
        arguments: Sequence[str] = (),
        options: Sequence[str] = (),
        stdin: bytes | AsyncIterator[bytes] | None = None,
        files: Mapping[str, bytes] | None = None,
        collect: Sequence[str] = (),
        timeout: float | None = None,
        on_output: OnOutput | None = None,
    ) -> Result:
        """Run `code` and return how it ended.

        `options` replace the language's defaults for its compiler or interpreter. `files` are put beside the program,
        `collect` names files to bring back. `timeout` is the wall-clock limit in seconds. With `on_output`, pieces of
        output go there as they come, and the result holds none; while it waits, the program waits.

        Raises UsageError or UnknownLanguageError for a request that cannot be, NeverRanError when nothing was run,
        RunLostError when the guest was lost, GuestError when it broke the protocol.
        """
        found = self._registry.find(language, self._record.languages)
        limits = (
            self._limits
            if timeout is None
            else config.checked(self._limits, "limits", {"wall": float(timeout)}, "timeout")
        )
        program = code.encode("utf-8", "surrogateescape") if isinstance(code, str) else code
        spec, content = request.render(
            request.Request(language=found.name, options=tuple(options), arguments=tuple(arguments)),
            found,
            limits,
            stdin=stdin is not None,
            code=program,
            files=list((files or {}).items()),
            collect=collect,
        )
        feed = request.once(stdin) if isinstance(stdin, bytes) else stdin
        collector = _Collector(on_output)
        outcome = await self._execute(spec, content, collector.take, feed)
        return collector.result(found.name, outcome)

    async def stream(
        self,
        language: str,
        code: str | bytes,
        *,
        arguments: Sequence[str] = (),
        stdin: bytes | AsyncIterator[bytes] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Output | Result]:
        """Yield an Output for each piece that the program prints, and in the end the Result, which holds none of it.

        Leaving the loop early ends the program. Raises what `run` raises.
        """
        pieces: asyncio.Queue[Output] = asyncio.Queue(_UNREAD)

        async def put(stream: Stream, data: bytes) -> None:
            await pieces.put(Output(stream, data))

        work = asyncio.ensure_future(
            self.run(language, code, arguments=arguments, stdin=stdin, timeout=timeout, on_output=put)
        )
        try:
            while not work.done() or not pieces.empty():
                piece = asyncio.ensure_future(pieces.get())
                await asyncio.wait({piece, work}, return_when=asyncio.FIRST_COMPLETED)
                if piece.done():
                    yield piece.result()
                else:
                    piece.cancel()
            yield work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Template:
    """A machine that was made by `create`, frozen and warm. Clones start from it in milliseconds."""

    name: str
    languages: tuple[str, ...]
    _frozen: template.Template

    @classmethod
    def load(cls, name: str) -> Self:
        """Return the template of machine `name`.

        Raises StateError when there is none, or it does not fit this host any more.
        """
        record = state.ready(name)
        keeper.check(record)
        return cls(name, record.languages, template.matching(name, record.fingerprint))

    def verify(self) -> None:
        """Compare every byte with what was frozen. Raises StateError for the first file that differs."""
        self._frozen.verify()


class VirtualMachine(_Runner):
    """One clone for several runs at once or one after another: a context manager.

    ```python
    async with VirtualMachine("pbot-vm") as vm:
        await vm.run("sh", "echo hello")
    ```

    Its runs are kept apart by users' rights only; for strangers' programs use a Pool.
    """

    def __init__(self, source: str | Template | None = None, *, limits: config.Limits | None = None) -> None:
        super().__init__(source, limits)
        self._stack = AsyncExitStack()
        self._machine: _Machine | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(state.share(self._record.name))
            way = keeper.choose(self._record, _configured(revert="clone"))
            self._machine = await way.start()
            stack.push_async_callback(self._machine.stop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    async def _execute(
        self, spec: RunSpec, content: Sequence[bytes], on_output: OnOutput, stdin: AsyncIterator[bytes] | None
    ) -> Outcome:
        assert self._machine, "use it with `async with`"
        outcome = await self._machine.execute(spec, content, on_output=on_output, stdin=stdin)
        return replace(outcome, clone=self._record.name, revert="clone")


class Session(_Runner):
    """Several runs in one clone on purpose. Made by `Pool.session`."""

    def __init__(self, name: str, limits: config.Limits, kept: sessions.Sessions, inner: sessions.Session) -> None:
        super().__init__(name, limits)
        self._kept = kept
        self._inner = inner

    @property
    def id(self) -> str:
        """Its name in logs."""
        return self._inner.id

    async def save(self, tag: str) -> None:
        """Save the state of the clone, memory and disk, under `tag`. No program may run meanwhile."""
        await self._inner.save(tag)

    async def revert(self, tag: str) -> None:
        """Go back to the state `tag`. Raises StateError when there is none."""
        await self._inner.revert(tag)

    @asynccontextmanager
    async def fork(self) -> AsyncIterator[Session]:
        """Have a second session that goes on from this one's state, running programs included."""
        inner = await self._kept.fork(self._inner.id)
        try:
            yield Session(self._record.name, self._limits, self._kept, inner)
        finally:
            _end(self._kept, inner)

    async def _execute(
        self, spec: RunSpec, content: Sequence[bytes], on_output: OnOutput, stdin: AsyncIterator[bytes] | None
    ) -> Outcome:
        return await self._inner.run(spec, content, on_output=on_output, stdin=stdin)


class Pool(_Runner):
    """Clean machines, some of them kept ready: a context manager.

    `source` names the machine or is its Template; None stands for the one that PBOTVM_DOMAIN or the configuration names.

    `size` are kept ready, at most `most` live at once (default: as many as the host carries). `revert` is the way back
    to clean: "auto", "clone", "loadvm" or "restart". With `share_memory` False, no two clones share a page of memory.
    Any number of pools, in any number of processes, can clone one machine; `loadvm` and `restart` need it alone.
    """

    def __init__(
        self,
        source: str | Template | None = None,
        *,
        size: int = 2,
        most: int = 0,
        revert: str = "auto",
        share_memory: bool = True,
        limits: config.Limits | None = None,
    ) -> None:
        super().__init__(source, limits)
        self._config = _configured(size=size, most=most, revert=revert, share_memory=share_memory)
        self._stack = AsyncExitStack()
        self._pool: pools.Pool | None = None
        self._sessions: sessions.Sessions | None = None

    async def __aenter__(self) -> Self:
        name = self._record.name
        async with AsyncExitStack() as stack:
            way = keeper.choose(self._record, self._config)
            lock = state.lock(name, purpose="api") if way.single else state.share(name)
            await stack.enter_async_context(lock)
            self._pool = await stack.enter_async_context(keeper.make_pool(way, self._config, self._record))
            self._sessions = await stack.enter_async_context(
                sessions.Sessions(self._pool, most=self._config.pool.sessions)
            )
            await self._pool.ready()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    def status(self) -> dict[str, object]:
        """Return how many machines are ready and busy, how many died, and more."""
        assert self._pool, "use it with `async with`"
        return self._pool.status()

    @asynccontextmanager
    async def session(self, *, idle: float = sessions.IDLE) -> AsyncIterator[Session]:
        """Have a clone for several runs; it ends with the block, or after `idle` seconds without use."""
        assert self._sessions, "use it with `async with`"
        inner = await self._sessions.open(idle=idle)
        try:
            yield Session(self._record.name, self._limits, self._sessions, inner)
        finally:
            _end(self._sessions, inner)

    async def _execute(
        self, spec: RunSpec, content: Sequence[bytes], on_output: OnOutput, stdin: AsyncIterator[bytes] | None
    ) -> Outcome:
        assert self._pool, "use it with `async with`"
        return await self._pool.run(spec, content, on_output=on_output, stdin=stdin)


def _end(kept: sessions.Sessions, inner: sessions.Session) -> None:
    with contextlib.suppress(NeverRanError):  # it has ended by itself
        kept.end(inner.id)


def _configured(**pool: object) -> config.Config:
    return config.override(config.load(paths.config_file()), "pool", **pool)


def run(language: str, code: str | bytes, *, machine: str | None = None, stdin: bytes | None = None,
        timeout: float | None = None) -> Result:  # fmt: skip
    """Run one program on a clone that is made for it, and wait for its end: for programs without an event loop.

    `machine` None stands for the one that PBOTVM_DOMAIN or the configuration names.

    Raises what Pool.run raises.
    """

    async def work() -> Result:
        async with Pool(machine, size=0) as pool:
            return await pool.run(language, code, stdin=stdin, timeout=timeout)

    return asyncio.run(work())
