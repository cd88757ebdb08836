"""A vsock for one guest from the daemon `vhost-device-vsock`: for hosts without /dev/vhost-vsock, and for ordinary users.

The daemon is a part of the virtual machine: it reads and writes the guest's memory, which must therefore be shared. It
has a process of its own, the rights of QEMU's user, and is killed by the kernel when we end, however we do. QEMU cannot
save its state, so it is plugged into guests that run already.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pbotvm_qemu import paths, plan, process, template
from pbotvm_qemu.errors import HostError, MonitorError

if TYPE_CHECKING:
    from pbotvm_qemu.qmp import Monitor

log = logging.getLogger(__name__)

PROGRAM = "vhost-device-vsock"
_PACKAGE = "vhost-device-vsock (Debian sid, Ubuntu 25.04 and later, Fedora, or cargo install vhost-device-vsock)"
_START = 10.0  # seconds until it listens
_FOUND = 30.0  # seconds until the guest has found its device
_LOOK = 0.01
_DEVICE = "/machine/peripheral/vsock0/virtio-backend"
_CID = 3  # which only the guest sees: each daemon has one guest


def find() -> str:
    """Return the path of the daemon. Raises HostError when it is not installed."""
    return process.find_program(PROGRAM, package=_PACKAGE)


class Daemon:
    """The daemon of one guest; a context manager. `path` is the socket that leads to the guest's vsock ports.

    `found` is how many seconds the guest took to find the device, None when QEMU cannot tell.
    """

    def __init__(self, machine: str, log_file: int) -> None:
        self._machine = machine
        self._log = log_file
        self._folder = Path()
        self._child: process.Child | None = None
        self.found: float | None = None

    @property
    def path(self) -> Path:
        """Where the daemon listens for us."""
        return self._folder / "guest"

    @property
    def _control(self) -> Path:
        return self._folder / "qemu"

    async def __aenter__(self) -> Self:
        program = find()
        parent = paths.private(paths.MachinePaths(self._machine).runtime, mode=0o711)
        self._folder = Path(tempfile.mkdtemp(prefix=paths.DAEMON_FOLDERS.rstrip("*"), dir=parent))
        template.own(self._folder)
        try:
            argv = [*plan.unprivileged(), program, "--guest-cid", str(_CID)]
            argv += ["--socket", str(self._control), "--uds-path", str(self.path)]
            self._child = await process.Child.start(argv, pass_fds=(), log=self._log)
            async with asyncio.timeout(_START):
                while not self._control.exists():
                    if self._child.status is not None:
                        raise HostError(
                            f"{PROGRAM} ended with status {self._child.status}", hint="see its words in the log"
                        )
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            await self.__aexit__()
            raise HostError(f"{PROGRAM} does not listen after {_START:.0f} s", hint="try a quieter host") from None
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._child:
            await self._child.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def plug(self, monitor: Monitor) -> None:
        """Give the guest of `monitor` its vsock device. Raises MonitorError or OSError."""
        with socket.socket(socket.AF_UNIX) as sock:
            await asyncio.to_thread(sock.connect, os.fspath(self._control))  # a UNIX socket: at once, or not at all
            name = await monitor.lend(sock.fileno(), "vsock")
        address = {"type": "fd", "data": {"str": name}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await monitor.execute("chardev-add", id="vsock", backend=backend)
        try:
            await monitor.execute(
                "device_add", driver="vhost-user-vsock-pci", id="vsock0", chardev="vsock", bus=plan.SLOT
            )
        except MonitorError:
            with contextlib.suppress(MonitorError):
                await monitor.execute("chardev-remove", id="vsock")
            raise
        await self._driven(monitor)

    async def _driven(self, monitor: Monitor) -> None:
        """Wait until the guest's driver has the device: a request to connect before that may never be answered.

        Raises HostError when that takes too long. A QEMU before 7.2 cannot tell, and is not waited for.
        """
        begin = time.monotonic()
        try:
            async with asyncio.timeout(_FOUND):
                while True:
                    answer = await monitor.execute("x-query-virtio-status", path=_DEVICE)
                    if "DRIVER_OK" in str(answer.get("status") if isinstance(answer, dict) else answer):
                        self.found = time.monotonic() - begin
                        return
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            raise HostError(
                f"the guest did not find its vsock within {_FOUND:.0f} s", hint="try a quieter host"
            ) from None
        except MonitorError as exc:
            log.debug("the guest's driver cannot be watched: %s", exc)
