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

# qemu.qmp logs every lost connection as an error, and as a bug of its own when we give up waiting at that moment; all of
# them are exceptions too, and whoever gets one says what it means.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

_FILE_URI = (9, 1)
_NO_LIMIT = 1 << 40  # bytes a second
_LOOK = 0.005  # seconds between two questions for a state that there is no event for


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
        self._client.events.names.add("SHUTDOWN")  # it would keep every other event, too, for ever
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

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version of QEMU, from its greeting; (0, 0) when it said nothing that makes sense."""
        greeting = self._client.greeting
        number = greeting.QMP.version.get("qemu") if greeting else None
        try:
            return (int(number["major"]), int(number["minor"])) if isinstance(number, dict) else (0, 0)
        except (KeyError, TypeError, ValueError):
            return 0, 0

    @property
    def shutdown_reason(self) -> str:
        """Why QEMU ended by itself, in the words of QAPI's ShutdownCause such as "guest-reset"; empty when it did not say."""
        for event in self._client.events.history:
            data = event.get("data")
            if isinstance(data, dict) and isinstance(reason := data.get("reason"), str):
                return reason
        return ""

    async def give(self, fd: int, name: str) -> str:
        """Hand the open file `fd` to QEMU; return the migration URI by which it is reached.

        From 9.1 on a plain file behind `fd:` is deprecated in favour of a descriptor set (docs/about/deprecated.rst).
        """
        with _translate("passing a descriptor"):
            self._client.send_fd_scm(fd)
        if self.version >= _FILE_URI:
            answer = await self.execute("add-fd", opaque=name)
            number = answer.get("fdset-id") if isinstance(answer, dict) else None
            return f"file:/dev/fdset/{number}"
        await self.execute("getfd", fdname=name)
        return f"fd:{name}"

    async def lend(self, fd: int, name: str) -> str:
        """Hand the open socket `fd` to QEMU under `name`, for the next command that takes such a name; return it."""
        with _translate("getfd"):
            self._client.send_fd_scm(fd)
        await self.execute("getfd", fdname=name)
        return name

    async def save_state(self, fd: int, *, without_memory: bool, timeout: float) -> None:
        """Write the state of the stopped machine to the open file `fd`; it stays stopped.

        `without_memory` leaves out memory that is a shared file anyway. Raises MonitorError when QEMU cannot.
        """
        await self.execute("migrate-set-parameters", max_bandwidth=_NO_LIMIT)
        await self._transfer("migrate", await self.give(fd, "save"), without_memory=without_memory, timeout=timeout)
        # QEMU tells of the end a moment before it is through with it, and refuses `cont` until then.
        with _translate("migrate"):
            async with asyncio.timeout(timeout):
                while await self._run_state() == "finish-migrate":
                    await asyncio.sleep(_LOOK)

    async def _run_state(self) -> str:
        """Return QEMU's RunState such as "running" or "postmigrate"."""
        answer = await self.execute("query-status")
        state = answer.get("status") if isinstance(answer, dict) else None
        return state if isinstance(state, str) else ""

    async def load_state(self, fd: int, *, without_memory: bool, timeout: float) -> None:
        """Read the state of a machine that was started with `-incoming defer`; it stays stopped.

        Raises MonitorError when the state does not fit. The process is of no use then.
        """
        uri = await self.give(fd, "load")
        await self._transfer("migrate-incoming", uri, without_memory=without_memory, timeout=timeout)

    async def _transfer(self, command: str, uri: str, *, without_memory: bool, timeout: float) -> None:
        await self._capabilities(events=True, **{"x-ignore-shared": without_memory})
        with self._client.listener("MIGRATION") as listener:
            await self.execute(command, uri=uri, timeout=timeout)
            with _translate(command):
                async with asyncio.timeout(timeout):
                    while True:
                        data = (await listener.get())["data"]
                        status = data.get("status") if isinstance(data, dict) else None
                        if status in ("completed", "failed", "cancelled"):
                            break
        if status != "completed":
            about = await self.execute("query-migrate")
            why = about.get("error-desc") if isinstance(about, dict) else None
            raise MonitorError(f"{command}: {why or status}", hint="see `pbotvm-qemu logs`")
        if without_memory:  # a later snapshot of this process must hold its memory
            await self._capabilities(**{"x-ignore-shared": False})

    async def _capabilities(self, **wanted: bool) -> None:
        states = [{"capability": name, "state": state} for name, state in wanted.items()]
        await self.execute("migrate-set-capabilities", capabilities=states)

    async def snapshot_save(self, tag: str, node: str, *, timeout: float) -> None:
        """Save the machine's whole state under `tag` in the qcow2 file behind block node `node`."""
        await self.job("snapshot-save", tag=tag, vmstate=node, devices=[node], timeout=timeout)

    async def snapshot_load(self, tag: str, node: str, *, timeout: float) -> None:
        """Go back to the state saved under `tag`, and run on from there."""
        try:
            await self.job("snapshot-load", tag=tag, vmstate=node, devices=[node], timeout=timeout)
        finally:  # the job stops the machine, and leaves it so when it fails
            if await self._run_state() != "running":
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
