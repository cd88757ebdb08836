"""`exec`: one program, in a machine that is kept or in one that is made for it."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pbotvm_qemu import control, paths, request, state
from pbotvm_qemu.errors import StateError
from pbotvm_qemu.languages import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.config import Config
    from pbotvm_qemu.guest.spec import RunSpec

_LONG_AGO = 0.05  # seconds: who waited longer for a machine looks at it again


@dataclass(frozen=True, slots=True)
class Execution:
    """A program that was run: in which language, and how it ended."""

    language: str
    outcome: Outcome


async def execute(
    config: Config,
    wanted: request.Request,
    *,
    on_output: OnOutput,
    stdin: AsyncIterator[bytes] | None,
    code: bytes | None = None,
    files: Sequence[tuple[str, bytes]] = (),
    collect: Sequence[str] = (),
    session: str | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Execution:
    """Run one program on a clean machine: through the keeper when one runs, else in a machine started for it.

    `session` runs it in that session of the keeper instead. Raises UsageError and UnknownLanguageError before anything is started; see Channel.execute for the rest.
    """
    record = state.ready(wanted.machine or config.machine.name)
    language = Registry.load(paths.user_languages(), only=wanted.language.lower()).find(
        wanted.language, record.languages, machine=record.name
    )
    spec, content = request.render(
        wanted, language, config.limits, stdin=stdin is not None, code=code, files=files, collect=collect
    )
    for _ in range(2):
        kept = state.running(record.name)
        if kept and kept.purpose in ("run", "start"):
            try:
                talk = await control.connect(paths.MachinePaths(record.name).control_socket)
            except StateError:
                if state.running(record.name):
                    raise
                continue  # it stopped between the look and the call
            try:
                limit = spec.seconds + config.relay.queue_wait + 30
                outcome = await talk.execute(
                    spec, content, on_output=on_output, stdin=stdin, timeout=limit, session=session
                )
            finally:
                await talk.close()
            return Execution(language.name, outcome)
        break
    if session is not None:
        raise StateError(
            f"there is no session {session[:40]!r}: machine {record.name!r} is not kept",
            hint=f"start it with `pbotvm-qemu start {record.name}`, then use --keep",
        )
    outcome = await _alone(config, record, spec, content, on_output, stdin, on_wait)
    return Execution(language.name, outcome)


async def _alone(
    config: Config,
    record: state.MachineRecord,
    spec: RunSpec,
    content: Sequence[bytes],
    on_output: OnOutput,
    stdin: AsyncIterator[bytes] | None,
    on_wait: Callable[[str], None] | None,
) -> Outcome:
    # What starts QEMU is not needed, and not loaded, when a keeper has done so.
    from pbotvm_qemu import keeper, pool  # noqa: PLC0415

    begin = time.monotonic()
    way = keeper.choose(record, config)
    async with AsyncExitStack() as stack:
        patience = config.relay.queue_wait
        lock = (
            state.lock(record.name, purpose="exec", wait=patience, on_wait=on_wait)
            if way.single
            else state.share(record.name, wait=patience, on_wait=on_wait)
        )
        await stack.enter_async_context(lock)
        queued = time.monotonic() - begin
        if queued > _LONG_AGO or state.ready(record.name) != record:
            way = keeper.choose(record, config)  # whoever had the machine may have changed it
        pool.check_memory(way.plan.config.memory)
        vm = await way.start()
        stack.push_async_callback(vm.stop)
        outcome = await vm.execute(spec, content, on_output=on_output, stdin=stdin)
        transport = vm.hello.transport if vm.hello else ""
    return replace(outcome, queue_s=round(queued, 4), transport=transport, clone=f"{record.name}/exec", revert=way.name)
