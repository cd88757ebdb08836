"""QEMU's monitor: a thin, typed layer over qemu.qmp, whose only importer this is.

Every call has a deadline. Foreign errors become MonitorError at this border.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from qemu.qmp import ExecuteError, QMPClient, QMPError

from pbotvm_qemu.errors import MonitorError

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator

# qemu.qmp logs every lost connection as an error; who lost it says so himself.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


@contextmanager
def _translate(what: str) -> Iterator[None]:
    try:
        yield
    except ExecuteError as exc:
        raise MonitorError(f"{what}: {exc}", hint=f"QMP error class {exc.error_class}") from exc
    except TimeoutError as exc:
        raise MonitorError(f"{what}: QEMU did not answer in time", hint="see `pbotvm-qemu logs`") from exc
    except (QMPError, OSError) as exc:
        raise MonitorError(
            f"{what}: the monitor connection is lost: {str(exc) or type(exc).__name__}", hint="see `pbotvm-qemu logs`"
        ) from exc


class Monitor:
    """One QMP conversation. Made by `connect`."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._jobs = itertools.count(1)

    async def execute(self, command: str, *, timeout: float = 10.0, **arguments: object) -> object:
        """Return what `command` answers; `_` in argument names stands for `-`, None means left out.

        Raises MonitorError when QEMU refuses, is silent for `timeout` seconds, or is gone.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items() if value is not None}
        with _translate(command):
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, named)

    async def job(self, command: str, *, timeout: float, **arguments: object) -> None:
        """Start `command` as a QEMU job, and wait for its end.

        Raises MonitorError with the job's own words when it fails. The job is dismissed either way.
        """
        id_ = f"pbotvm-{next(self._jobs)}"
        with self._client.listener("JOB_STATUS_CHANGE") as listener:
            await self.execute(command, job_id=id_, timeout=timeout, **arguments)
            with _translate(command):
                async with asyncio.timeout(timeout):
                    while True:
                        data = (await listener.get())["data"]
                        if isinstance(data, dict) and data.get("id") == id_ and data.get("status") == "concluded":
                            break
        jobs = await self.execute("query-jobs")
        await self.execute("job-dismiss", id=id_)
        for job in jobs if isinstance(jobs, list) else ():
            if job.get("id") == id_ and job.get("error"):
                raise MonitorError(f"{command}: {job['error']}", hint="see `pbotvm-qemu logs`")

    async def snapshot_save(self, tag: str, node: str, *, timeout: float) -> None:
        """Save the machine's whole state under `tag` in the qcow2 file behind block node `node`."""
        await self.job("snapshot-save", tag=tag, vmstate=node, devices=[node], timeout=timeout)

    async def snapshot_load(self, tag: str, node: str, *, timeout: float) -> None:
        """Go back to the state saved under `tag`, and run on from there."""
        try:
            await self.job("snapshot-load", tag=tag, vmstate=node, devices=[node], timeout=timeout)
        finally:  # the job stops the machine, and leaves it so when it fails
            status = await self.execute("query-status")
            if not (isinstance(status, dict) and status.get("running")):
                await self.execute("cont")

    async def snapshot_delete(self, tag: str, node: str, *, timeout: float) -> None:
        """Delete the snapshot `tag`."""
        await self.job("snapshot-delete", tag=tag, devices=[node], timeout=timeout)

    async def snapshots(self, node: str) -> list[dict[str, object]]:
        """Return the snapshots in block node `node` as QEMU's SnapshotInfo objects."""
        nodes = await self.execute("query-named-block-nodes", flat=True)
        for item in nodes if isinstance(nodes, list) else ():
            if item.get("node-name") == node:
                return list(item.get("image", {}).get("snapshots", []))
        raise MonitorError(f"no block node {node}", hint="see `pbotvm-qemu logs`")


@asynccontextmanager
async def connect(name: str, sock: socket.socket, *, timeout: float = 20.0) -> AsyncIterator[Monitor]:
    """Speak QMP over the connected socket `sock`, which this owns from now on.

    Raises MonitorError when the greeting does not come within `timeout` seconds.
    """
    client = QMPClient(name)
    try:
        with _translate("connecting to the monitor"):
            async with asyncio.timeout(timeout):
                await client.connect(sock)
        yield Monitor(client)
    finally:
        # After QEMU's death disconnect() raises the stream's error again; there is nothing left to lose.
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(5):
                await client.disconnect()
        sock.close()
