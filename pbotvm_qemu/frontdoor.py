"""What a keeper serves to callers beside the control socket: the relay, the metrics page, and a change of settings."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

from pbotvm_qemu import paths
from pbotvm_qemu.errors import PbotVMError
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.metrics import Metrics
from pbotvm_qemu.pbot import Desk, Settings
from pbotvm_qemu.relay import Relay
from pbotvm_qemu.runlog import RunLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pbotvm_qemu.config import Config
    from pbotvm_qemu.pool import Pool

log = logging.getLogger(__name__)

_FIXED = ("machine", "metrics", "watchdog")  # tables that are read once


class FrontDoor:
    """Serves callers from `pool`. A context manager.

    `load` reads the configuration again; `installed` are the languages of machine `name`.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        *,
        name: str,
        installed: Sequence[str],
        pool: Pool,
        relay: bool,
    ) -> None:
        self._config = config
        self._load = load
        self._name = name
        self._installed = installed
        self._pool = pool
        self._with_relay = relay
        self._stack = AsyncExitStack()
        self._desk: Desk | None = None
        self._relay: Relay | None = None
        self._metrics: Metrics | None = None
        self._reload: asyncio.Task[bool] | None = None
        self.runs = RunLog()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self._config.metrics.port:
                self._metrics = await stack.enter_async_context(Metrics(self._config.metrics, self._pool.status))
                self.runs.watch(self._metrics.count)
            if self._with_relay:
                registry = Registry.load(paths.user_languages())
                self._desk = Desk(
                    Settings(self._config, registry),
                    name=self._name, installed=self._installed, pool=self._pool, runs=self.runs,
                    history=paths.history(), kept=paths.kept(),
                )  # fmt: skip
                stack.push_async_callback(self._desk.close)
                self._relay = await stack.enter_async_context(Relay(self._config.relay, self._desk.answer))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    @property
    def address(self) -> str:
        """HOST:PORT for PBot clients, empty without a relay."""
        return self._relay.address if self._relay else ""

    def status(self) -> dict[str, object]:
        """Return figures for `status`."""
        return {
            "relay": self.address or None,
            "callers": self._relay.status() if self._relay else None,
            "metrics": self._metrics.address if self._metrics else None,
            "foreign_reverts": self._desk.reverts if self._desk else 0,
        }

    def install(self, languages: Sequence[str]) -> None:
        """Have the machine know other languages from the next request on."""
        self._installed = languages
        if self._desk:
            self._desk.installed = languages

    def close(self) -> None:
        """Accept no more callers."""
        if self._relay:
            self._relay.close()

    async def drain(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until every caller has read his answer."""
        if self._relay and not await self._relay.drain(timeout):
            log.warning("some callers did not read their answers within %.0f s", timeout)

    def reload_soon(self) -> None:
        """Begin to reload; one at a time."""
        if self._reload is None or self._reload.done():
            self._reload = asyncio.create_task(self.reload())

    async def reload(self) -> bool:
        """Read configuration and languages again; tell whether they are used. What is wrong changes nothing."""
        try:
            config = self._load()
            registry = Registry.load(paths.user_languages())
        except PbotVMError as exc:
            log.error("the configuration is not reloaded: %s", exc)  # noqa: TRY400 - the message says it all
            return False
        for table in _FIXED:
            if getattr(config, table) != getattr(self._config, table):
                log.warning("[%s] has changed: that counts from the next start", table)
        if (config.relay.host, config.relay.port) != (self._config.relay.host, self._config.relay.port):
            log.warning("host and port in [relay] have changed: that counts from the next start")
        if self._desk:
            await self._desk.configure(Settings(config, registry))
        log.info("configuration and languages are reloaded: %d languages", len(registry.languages))
        return True
