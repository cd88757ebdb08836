"""Tells when an idle machine is sick: its agent is gone or silent, or it burns processor time while nothing runs.

A machine with a run is not judged: the run has its own limits, and honest load is no offence.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pbotvm_qemu.config import WatchdogConfig

_CHANCES = 2  # questions in a row without an answer that make a silent agent; a host may be busy for a moment

LOST = "agent-lost"
SILENT = "agent-silent"
BURNING = "cpu"


class Watchdog:
    """Watches one machine.

    `cpu` gives the processor seconds that its QEMU has used, None when it is gone; `ping` asks the agent and raises
    GuestError without an answer in the seconds given; `lost` returns when the channel is lost; `idle` tells whether
    nothing runs.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        *,
        cpu: Callable[[], float | None],
        ping: Callable[[float], Awaitable[object]],
        lost: Callable[[], Awaitable[object]],
        idle: Callable[[], bool],
    ) -> None:
        self._config = config
        self._cpu = cpu
        self._ping = ping
        self._lost = lost
        self._idle = idle

    async def offence(self) -> str:
        """Return why the machine must be put back, once that is so: LOST, SILENT or BURNING."""
        lost = asyncio.ensure_future(self._lost())
        looks = asyncio.ensure_future(self._look())
        try:
            await asyncio.wait({lost, looks}, return_when=asyncio.FIRST_COMPLETED)
            return LOST if lost.done() else looks.result()
        finally:
            for task in (lost, looks):
                task.cancel()
            await asyncio.gather(lost, looks, return_exceptions=True)

    async def _look(self) -> str:
        """Look again and again; return what was found."""
        if not self._config.interval:
            await asyncio.Event().wait()
        over = 0
        silent = 0
        while True:
            before, since = self._cpu(), time.monotonic()
            idle = self._idle()
            await asyncio.sleep(self._config.interval)
            now, seconds = self._cpu(), time.monotonic() - since
            if before is None or now is None or not (idle and self._idle()):
                over = silent = 0
                continue
            over = over + 1 if (now - before) / seconds * 100 >= self._config.cpu else 0
            if over >= self._config.samples:
                return BURNING
            try:
                await self._ping(self._config.silence)
                silent = 0
            except GuestError:
                silent = silent + 1 if self._idle() else 0
                if silent >= _CHANCES:
                    return SILENT
