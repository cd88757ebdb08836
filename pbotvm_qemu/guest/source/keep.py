"""A folder that lives on between runs: unpacked in front of the program, packed behind it.

The host keeps the archive and gives it to the next run with the same key; it never looks into it. A program that is
ended from outside leaves the archive as it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable

ARCHIVE = ".kept"
SIZE_MAX = 1 << 20  # bytes of an archive


def run(folder: str, program: Callable[[], int]) -> int:
    """Run `program` in a child with `folder` as the last run left it; return its status, or end by its signal."""
    try:
        os.mkdir(folder, 0o700)
        _unpack(folder)
    except Exception as exc:  # of an archive that a program made unreadable, too: it begins anew
        if not os.path.isdir(folder):
            _say(f"the folder {folder} cannot be made: {exc}")
            return 126
        _say(f"what was kept in {folder} cannot be read: {exc}")
    child = os.fork()
    if not child:
        status = 126
        try:
            status = program()
        finally:
            os._exit(status)
    _pid, status = os.waitpid(child, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error is enough
    try:
        _pack(folder)
    except Exception as exc:  # whatever a program made of its folder
        _say(f"the folder {folder} is not kept: {exc}")
        with contextlib.suppress(OSError):
            os.unlink(ARCHIVE)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return 128 + number
    return os.WEXITSTATUS(status)


def _unpack(folder: str) -> None:
    if not os.path.exists(ARCHIVE):
        return
    import tarfile  # noqa: PLC0415 - few runs need it

    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def _pack(folder: str) -> None:
    """Write the archive anew. Raises OSError, and what tarfile raises, when it cannot be."""
    import tarfile  # noqa: PLC0415

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member if member.isreg() or member.isdir() or member.islnk() else None

    total = sum(
        os.lstat(os.path.join(place, name)).st_size for place, _folders, names in os.walk(folder) for name in names
    )
    if total > SIZE_MAX:
        raise OSError(f"it has over {SIZE_MAX} bytes")
    temporary = f"{ARCHIVE}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    with tarfile.open(temporary, "x") as archive:
        for name in sorted(os.listdir(folder)):
            archive.add(os.path.join(folder, name), name, filter=plain)
    if os.path.getsize(temporary) > SIZE_MAX:
        os.unlink(temporary)
        raise OSError(f"it has over {SIZE_MAX} bytes")
    os.replace(temporary, ARCHIVE)


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode("utf-8", "replace"))
