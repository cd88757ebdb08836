"""A relay with its desk, over a pool that is the real agent on this host."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pbotvm_qemu.config import Config, Limits, RelayConfig
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.pbot import Desk, Settings
from pbotvm_qemu.relay import Relay
from pbotvm_qemu.runlog import RunLog

if TYPE_CHECKING:
    from pathlib import Path

    from pbotvm_qemu.pool import Pool
    from tests.compat.peers import HostPool

INSTALLED = ("bash", "c11", "sh")


class Door:
    """Where callers connect."""

    def __init__(self, config: Config, pool: HostPool, history: Path) -> None:
        self.pool = pool
        self.runs = RunLog()
        self.desk = Desk(
            Settings(config, Registry.load()),
            name="pbot-vm",
            installed=INSTALLED,
            pool=cast("Pool", pool),
            runs=self.runs,
            history=history,
            kept=history.parent / "kept",
        )
        self.relay = Relay(config.relay, self.desk.answer)
        self.config = config

    @property
    def port(self) -> int:
        return int(self.relay.address.rpartition(":")[2])

    async def configure(self, **tables: object) -> None:
        self.config = replace(self.config, **tables)  # type: ignore[arg-type]
        await self.desk.configure(Settings(self.config, Registry.load()))

    async def ask(self, data: bytes, *, finish: bool = False) -> bytes:
        """Connect, send, and return all that comes until the connection closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            if finish:
                writer.write_eof()
            async with asyncio.timeout(60):
                return await reader.read()
        finally:
            writer.close()

    async def code(self, code: str, **keys: object) -> str:
        return (
            await self.ask(json.dumps({"nick": "n", "channel": "#c", "code": code, **keys}).encode() + b"\n")
        ).decode()


CONFIG = Config(relay=RelayConfig(port=0), limits=Limits(wall=3.0))
