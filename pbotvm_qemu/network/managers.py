"""Others that manage this host's interfaces, NetworkManager and systemd-networkd, are told to leave ours alone.

In folders that are gone after a reboot, as our interfaces are.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu import process
from pbotvm_qemu.errors import HostError, NetworkError
from pbotvm_qemu.network.addresses import TAP_PREFIX
from pbotvm_qemu.network.steps import Step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

_RELOAD = 20.0  # seconds
# What shows that a manager runs, the file, what is in it, and what has the manager read it.
_NETWORKMANAGER = Path("/run/NetworkManager")
_NETWORKD = Path("/run/systemd/netif")
FILES = (
    (
        _NETWORKMANAGER, Path("/run/NetworkManager/conf.d/90-pbotvm-qemu.conf"),
        f"[keyfile]\nunmanaged-devices+=interface-name:pbot-*;interface-name:{TAP_PREFIX}*\n",
        ("nmcli", "general", "reload", "conf"),
    ),
    (
        _NETWORKD, Path("/run/systemd/network/05-pbotvm-qemu.network"),
        f"[Match]\nName=pbot-* {TAP_PREFIX}*\n\n[Link]\nUnmanaged=yes\n",
        ("networkctl", "reload"),
    ),
)  # fmt: skip


def steps() -> list[Step]:
    """Return the steps that keep NetworkManager and systemd-networkd away from our interfaces, where they run."""
    found = []
    for sign, file, text, reload in FILES:
        if sign.is_dir() and _text(file) != text:
            what = f"write {file}, so that pbot-* and {TAP_PREFIX}* are left alone, and {' '.join(reload)}"
            found.append(Step(what, _writer(file, text, reload)))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:
        return ""


def _writer(file: Path, text: str, reload: Sequence[str]) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".new")
            temporary.write_text(text, "utf-8")
            temporary.replace(file)
        except OSError as exc:
            raise NetworkError(f"cannot write {file}: {exc.strerror}", hint="run as root") from exc
        await _reload(reload)

    return do


async def _reload(words: Sequence[str]) -> None:
    """Have a manager of networks read what it is told. One that does not answer reads it at its next start."""
    try:
        program = process.find_program(words[0], package=words[0])
        (await process.run([program, *words[1:]], timeout=_RELOAD)).check()
    except HostError as exc:
        log.warning("%s", exc)


def removal() -> list[Step]:
    """Return the steps that remove what managers of networks were told."""
    return [
        Step(f"remove {file}, and {' '.join(reload)}", _remover(file, reload if sign.is_dir() else ()))
        for sign, file, _text_, reload in FILES
        if file.exists()
    ]


def _remover(file: Path, reload: Sequence[str]) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        if reload:
            await _reload(reload)

    return do
