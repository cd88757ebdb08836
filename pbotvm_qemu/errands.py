"""What machines run before a caller comes: a trifle that shows that they work, and the samples that warm them up."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Protocol

from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.guest import spec as specs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome, Stream
    from pbotvm_qemu.guest.spec import RunSpec

_TIMEOUT = 60.0  # seconds
PROOF = specs.RunSpec(
    files=(),
    steps=(("true",),),
    env={},
    stdin=False,
    limits=specs.Limits(wall=_TIMEOUT, cpu=0, memory=0, processes=20, file_size=0, output=4096),
    collect=(),
)


class Execute(Protocol):
    """Runs a program, as VirtualMachine.execute does."""

    async def __call__(
        self, spec: RunSpec, content: Sequence[bytes], *, on_output: OnOutput, stdin: AsyncIterator[bytes] | None = None
    ) -> Outcome:
        """Return how it ended."""


async def prove(execute: Execute, clone: str) -> None:
    """Have a machine run a trifle, which shows that it works, and has its slow first steps behind it afterwards.

    Raises GuestError when it does not work.
    """
    outcome = await execute(PROOF, [], on_output=ignore)
    if outcome.status != 0:
        raise GuestError(f"machine {clone} cannot run a program: {outcome.message or outcome.exit_code}")


async def warm_up(execute: Execute, spec: RunSpec, content: Sequence[bytes]) -> None:
    """Have a machine run the sample of a language. Raises GuestError when that does not end as it should."""
    outcome = await execute(spec, content, on_output=ignore)
    if outcome.status != 0 or outcome.limit:
        raise GuestError(f"its sample did not end well: {outcome.limit or outcome.message or outcome.exit_code}")


async def ignore(_stream: Stream, _data: bytes) -> None:
    """Take output that nobody wants."""


@dataclasses.dataclass(slots=True, eq=False)
class Errand:
    """The sample of a language, which a machine runs while nobody wants it."""

    language: str
    spec: RunSpec
    content: Sequence[bytes]
    given_up: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    async def run(self, execute: Execute, wake: Callable[[], Awaitable[None]] | None) -> bool:
        """Have a machine run the sample, after `wake` when it sleeps; tell whether it did before this was given up.

        Raises what `wake` and `warm_up` raise.
        """
        work = asyncio.ensure_future(self._run(execute, wake))
        given_up = asyncio.ensure_future(self.given_up.wait())
        try:
            await asyncio.wait({work, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return False
            work.result()
            return True
        finally:
            for task in (work, given_up):
                task.cancel()
            await asyncio.gather(work, given_up, return_exceptions=True)

    async def _run(self, execute: Execute, wake: Callable[[], Awaitable[None]] | None) -> None:
        if wake:
            await wake()
        await warm_up(execute, self.spec, self.content)
