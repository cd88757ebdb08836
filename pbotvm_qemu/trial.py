"""Shows that a language works in a real guest: the samples that warm a machine up, and the rows of `languages test`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Literal

from pbotvm_qemu import errands, keeper, process, request, state
from pbotvm_qemu.config import Limits
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.languages import ROWS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from pbotvm_qemu.channel import Outcome, Stream
    from pbotvm_qemu.config import Config
    from pbotvm_qemu.errands import Execute
    from pbotvm_qemu.languages import Language, Row
    from pbotvm_qemu.machine import VirtualMachine
    from pbotvm_qemu.warmth import Warmth
    from pbotvm_qemu.ways import Way

_WARM_LIMITS = Limits(
    wall=1200.0
)  # only a hang takes that long: hosts can be busy, and the first run of a compiler slow
_PATIENCE = 30  # times as long as usual for a build
_LIMITS = Limits(wall=60.0)
_SHORT = 3.0  # seconds that a program without end gets
_KEPT = 1 << 16  # bytes of output that are looked at
_SAID = 300  # characters of it that are shown
_TICK = 0.01  # seconds: what the kernel counts processor time in

TEXT = "héllo wörld – 日本語 🐎\n"
LINES = "first line\nsecond line, with blanks  and 'quotes'\n"
ARGUMENTS = ("a b", "it's", '"quoted"', "c")
STATUS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What one row showed. `detail` says why it failed, or why the language cannot do it."""

    row: Row
    verdict: Literal["ok", "fail", "cannot"]
    seconds: float
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """All rows of one language; and what hello world takes of a processor, in seconds of QEMU's time.

    That counts the same on a busy host as on a quiet one. The second run shows what a machine can save that was used
    already: translated code, above all, which is in no snapshot.
    """

    language: str
    results: tuple[Result, ...]
    fresh_s: float  # in a clone that has run nothing
    first_s: float  # in a clone that has waited in a pool whose callers use this language
    second_s: float  # in the same clone once more
    wall_s: float  # of the first run, by the clock

    @property
    def ratio(self) -> float:
        """How many times longer the first run takes than the second."""
        return round(self.first_s / max(self.second_s, _TICK), 2)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(result.verdict != "fail" for result in self.results)


async def warm(execute: Execute, language: Language) -> None:
    """Run the sample of `language`, twice so that nothing is left to load; and its program for that purpose.

    Raises GuestError when the sample prints the wrong thing.
    """
    # What a compiler makes once and keeps, such as Go its library, is made now.
    patient = dataclasses.replace(language, build_seconds=_PATIENCE * language.build_seconds)
    for code in (language.sample_code, language.sample_code, *filter(None, [language.warm])):
        outcome, printed = await _run(execute, patient, request.Request(code=code), _WARM_LIMITS)
        if code == language.sample_code and (outcome.exit_code or printed != language.sample_output):
            raise GuestError(
                f"language {language.name} does not work in this guest: exit status {outcome.exit_code}, "
                f"{outcome.message or _short(printed) or 'no output'}",
                hint=language.absent or "leave this language out",
            )


async def examine(
    config: Config, wanted: Sequence[Language], on_result: Callable[[str, Result], None], *, jobs: int = 1
) -> list[Report]:
    """Run every row of the wanted languages in machine `config.machine.name`, each language on a clean start of it.

    Up to `jobs` languages are tried at once where machines are clones. Raises StateError when the machine is in use;
    `on_result` is told of every row as it ends.
    """
    record = state.ready(config.machine.name)
    way = keeper.choose(record, config)
    lock = state.lock(record.name, purpose="languages test") if way.single else state.share(record.name)
    async with lock:
        way = keeper.choose(record, config)  # its languages may have been changed until now
        turns = asyncio.Semaphore(1 if way.single else jobs)

        async def examine_one(language: Language) -> Report:
            async with turns:
                return await _examine(way, language, keeper.warmth(record, config, way), on_result)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(examine_one(language)) for language in wanted]
    return [task.result() for task in tasks]


async def _examine(way: Way, language: Language, warmth: Warmth, on_result: Callable[[str, Result], None]) -> Report:
    async with _started(way) as vm:
        fresh, _wall = await _time_hello(vm, language)
    results = []
    warm: set[str] = set()
    async with _started(way) as vm:
        await errands.prove(vm.execute, vm.name)
        warmth.used(language.name)
        while (name := warmth.next(warm)) is not None:
            await errands.warm_up(vm.execute, *warmth.sample(name))
            warm.add(name)
        first, wall = await _time_hello(vm, language)
        second, _wall = await _time_hello(vm, language)
        for row in ROWS:
            results.append(await try_row(vm.execute, language, row))
            on_result(language.name, results[-1])
    return Report(language.name, tuple(results), fresh, first, second, wall)


@contextlib.asynccontextmanager
async def _started(way: Way) -> AsyncIterator[VirtualMachine]:
    vm = await way.start()
    try:
        yield vm
    finally:
        await vm.stop()


async def _time_hello(vm: VirtualMachine, language: Language) -> tuple[float, float]:
    """Run the sample of `language`; return seconds of QEMU's processor time, and seconds by the clock."""
    begin, before = time.monotonic(), _processor_time(vm)
    await _run(vm.execute, language, request.Request(code=language.sample_code), _LIMITS)
    return round(_processor_time(vm) - before, 2), round(time.monotonic() - begin, 2)


def _processor_time(vm: VirtualMachine) -> float:
    used = process.usage(vm.pid)
    return used.cpu_s if used else 0.0


async def try_row(execute: Execute, language: Language, row: Row) -> Result:
    """Return what row `row` shows of `language`."""
    if row in language.tests.cannot:
        return Result(row, "cannot", 0.0, language.tests.cannot[row])
    code = language.sample_code if row == "hello" else language.tests.programs.get(row)
    if code is None:
        return Result(row, "cannot", 0.0, "its file has no program for this")
    wanted = request.Request(
        code=code,
        arguments=ARGUMENTS if row == "arguments" else (),
        stdin=LINES if row == "stdin" else TEXT if row == "utf8" else None,
    )
    begin = time.monotonic()
    outcome, printed = await _run(execute, language, wanted, Limits(wall=_SHORT) if row == "timeout" else _LIMITS)
    seconds = round(time.monotonic() - begin, 3)
    problem = _judge(language, row, outcome, printed)
    return Result(row, "fail" if problem else "ok", seconds, problem)


def _judge(language: Language, row: Row, outcome: Outcome, printed: str) -> str:
    """Return what is wrong with how a row's program ended; empty when nothing is."""
    expected = {"hello": language.sample_output, "stdin": LINES, "arguments": "\n".join(ARGUMENTS) + "\n", "utf8": TEXT}
    said = f"exit status {outcome.exit_code}, {outcome.message or _short(printed) or 'no output'}"
    if row == "timeout":
        return "" if outcome.timed_out and outcome.stage == "run" else f"it was not ended by its time: {said}"
    if row == "status":
        return "" if outcome.exit_code == STATUS else f"not status {STATUS}: {said}"
    if row == "error":
        return "" if language.tests.error_says in printed and printed.strip() else f"the error is not told: {said}"
    return "" if printed == expected[row] and not outcome.exit_code else f"wrong output: {said}"


async def _run(execute: Execute, language: Language, wanted: request.Request, limits: Limits) -> tuple[Outcome, str]:
    """Return how a program ended, and what it printed."""
    has_input = wanted.stdin is not None
    spec, content = request.render(wanted, language, limits, stdin=has_input)
    printed = bytearray()

    async def keep(_stream: Stream, data: bytes) -> None:
        printed.extend(data[: _KEPT - len(printed)])

    feed = request.once((wanted.stdin or "").encode()) if has_input else None
    outcome = await execute(spec, content, on_output=keep, stdin=feed)
    return outcome, printed.decode("utf-8", "replace")


def _short(text: str) -> str:
    return " | ".join(text.strip().splitlines())[:_SAID]


def table(reports: Sequence[Report]) -> list[str]:
    """Return the table of `reports` in Markdown, and why some languages cannot do some things."""
    marks = {"ok": "ok", "fail": "**fails**", "cannot": "-"}
    lines = [
        f"| language | {' | '.join(ROWS)} | fresh | first | second | first / second | by the clock |",
        f"|---|{'---|' * (len(ROWS) + 5)}",
        *(
            f"| `{report.language}` | {' | '.join(marks[result.verdict] for result in report.results)} "
            f"| {report.fresh_s:.2f} s | {report.first_s:.2f} s | {report.second_s:.2f} s | {report.ratio:.1f} "
            f"| {report.wall_s:.2f} s |"
            for report in reports
        ),
    ]
    remarks = [
        f"- `{report.language}`, {result.row}: {result.detail}"
        for report in reports
        for result in report.results
        if result.verdict != "ok"
    ]
    return [*lines, *(["", *remarks] if remarks else [])]


__all__ = ["ARGUMENTS", "LINES", "TEXT", "Report", "Result", "examine", "table", "try_row", "warm"]
