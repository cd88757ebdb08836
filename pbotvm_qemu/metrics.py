"""Figures for Prometheus, on a port of their own; the only importer of prometheus_client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pbotvm_qemu.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.core import Metric

    from pbotvm_qemu.config import MetricsConfig
    from pbotvm_qemu.runlog import RunRecord

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)

# Key of `status` -> what it is.
_GAUGES = {
    "ready": "Clean machines that wait for a run",
    "busy": "Runs under way",
    "waiting": "Requests that wait for a machine",
}
_COUNTERS = {
    "runs": "Runs that got a machine",
    "starts": "Starts of QEMU",
    "deaths": "QEMU processes that died by themselves",
}


class Metrics:
    """Counts runs, and serves the page. A context manager."""

    def __init__(self, config: MetricsConfig, status: Callable[[], Mapping[str, object]]) -> None:
        self._config = config
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_Status(status))
        self._runs = prometheus_client.Counter(
            "pbotvm_requests", "Requests by way in, language and result", ["source", "language", "result"],
            registry=self._registry,
        )  # fmt: skip
        self._wall = prometheus_client.Histogram(
            "pbotvm_request_seconds", "From a request to its answer", buckets=_SECONDS, registry=self._registry
        )
        self._queue = prometheus_client.Histogram(
            "pbotvm_queue_seconds", "Wait for a machine", buckets=_SECONDS, registry=self._registry
        )
        self._close: Callable[[], None] | None = None
        self.address = ""

    async def __aenter__(self) -> Metrics:
        try:
            server, thread = prometheus_client.start_http_server(
                self._config.port, self._config.host, registry=self._registry
            )
        except OSError as exc:
            raise HostError(
                f"cannot serve metrics on {self._config.host}:{self._config.port}: {exc.strerror}",
                hint="choose another port in [metrics] of config.toml",
            ) from exc
        self.address = f"{self._config.host}:{server.server_port}"

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5)

        self._close = close
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._close:
            await asyncio.to_thread(self._close)

    def count(self, record: RunRecord, wall: float) -> None:
        """Take the end of one run."""
        result = record.result
        # Exit statuses are many and say little: what a program made of itself is one thing here.
        if result.isdigit():
            result = "ok" if result == "0" else "failed"
        self._runs.labels(record.source, record.language, result).inc()
        self._wall.observe(wall)
        self._queue.observe(record.queue_s)


class _Status(Collector):
    """Asks for the figures when the page is asked for."""

    def __init__(self, status: Callable[[], Mapping[str, object]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        found = self._status()
        for key, text in _GAUGES.items():
            yield GaugeMetricFamily(f"pbotvm_{key}", text, _number(found.get(key)))
        for key, text in _COUNTERS.items():
            yield CounterMetricFamily(f"pbotvm_{key}", text, _number(found.get(key)))
        reasons = CounterMetricFamily("pbotvm_reverts", "Machines put back, by reason", labels=["reason"])
        reverts = found.get("reverts")
        for reason, count in (reverts if isinstance(reverts, dict) else {}).items():
            reasons.add_metric([str(reason)], _number(count))
        yield reasons


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
