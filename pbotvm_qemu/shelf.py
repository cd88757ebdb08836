"""What programs keep between runs under a key of PBot's (`persist-key`): one archive each, which only a guest opens."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pbotvm_qemu import paths
from pbotvm_qemu.errors import HostError, NeverRanError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

log = logging.getLogger(__name__)

SIZE_MAX = 1 << 20  # bytes of one archive
KEYS_MAX = 1000


@dataclass(slots=True)
class Item:
    """What is kept under one key; `data` is empty when nothing is."""

    _path: Path
    data: bytes

    def store(self, data: bytes) -> str:
        """Keep `data` from now on; return why not, when it cannot be."""
        problem = ""
        if data == self.data:
            return problem
        temporary = self._path.with_suffix(".new")
        try:
            if len(data) > SIZE_MAX:
                problem = f"what a program wants to keep is over {SIZE_MAX} bytes"
            elif not self._path.exists() and len(list(self._path.parent.glob("*.tar"))) >= KEYS_MAX:
                problem = f"{KEYS_MAX} keys are kept already"
            else:
                temporary.write_bytes(data)
                temporary.replace(self._path)
        except OSError as exc:
            problem = f"cannot keep anything in {self._path.parent}: {exc.strerror}"
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if problem:
            log.warning("%s", problem)
        return problem


class Shelf:
    """Keeps archives in `folder`, one file for each key. Runs with the same key take turns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}  # and how many have or want it

    @contextlib.asynccontextmanager
    async def item(self, key: str, *, wait: float) -> AsyncIterator[Item]:
        """Have what is kept under `key` for oneself.

        Raises NeverRanError when it is not free within `wait` seconds, HostError when it cannot be read.
        """
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            try:
                async with asyncio.timeout(wait):
                    await lock.acquire()
            except TimeoutError:
                raise NeverRanError(
                    f"what is kept under key {key[:40]!r} was not free within {wait:.0f} s", hint="try again later"
                ) from None
            try:
                yield self._read(key)
            finally:
                lock.release()
        finally:
            lock, users = self._locks[key]
            if users > 1:
                self._locks[key] = lock, users - 1
            else:
                del self._locks[key]

    def _read(self, key: str) -> Item:
        try:
            paths.private(self._folder)
            path = self._folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}.tar"
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                return Item(path, file.read(SIZE_MAX + 1))
            return Item(path, b"")
        except OSError as exc:
            raise HostError(
                f"cannot read what is kept in {self._folder}: {exc.strerror}", hint="check its owner"
            ) from exc
