"""Sessions: several runs in one machine on purpose, with saved states to go back to or to copy from.

A session ends when its owner ends it, when nobody has used it for a while, or with the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from pbotvm_qemu.errors import GuestError, NeverRanError, StateError, UsageError
from pbotvm_qemu.ways import Clone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.pool import Lease, Pool
    from pbotvm_qemu.template import Frozen, SavedState

log = logging.getLogger(__name__)

IDLE = 300.0  # seconds without use after which a session is ended
SAVED_MAX = 8  # states that one session may keep: each takes as much disk as the guest uses memory
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Session:
    """One machine that is kept from run to run. Made by `Sessions.open`.

    Its runs share the folder they start in and whatever they leave running; see `keep` in docs/protocol.md.
    """

    def __init__(self, id_: str, pool: Pool, lease: Lease, idle: float) -> None:
        self.id = id_
        self.idle = idle
        self.runs = 0
        self.used = time.monotonic()
        self.saved: dict[str, SavedState] = {}
        self._pool = pool
        self._lease = lease
        self._lock = asyncio.Lock()  # saving and going back need the machine alone
        self._under_way = 0
        self._ended = False

    @property
    def clone(self) -> str:
        """The machine that it has now."""
        return self._lease.clone

    @property
    def busy(self) -> bool:
        """Whether something happens in it just now."""
        return self._under_way > 0 or self._lock.locked()

    @property
    def alive(self) -> bool:
        """Whether its machine runs."""
        return not self._ended and self._lease.machine.alive

    def to_json(self) -> dict[str, object]:
        """Return what `session list` shows."""
        return {
            "id": self.id,
            "clone": self.clone,
            "runs": self.runs,
            "busy": self.busy,
            "idle_s": round(time.monotonic() - self.used, 1),
            "ends_after_s": self.idle,
            "saved": {tag: saved.size for tag, saved in self.saved.items()},
        }

    async def run(
        self,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
    ) -> Outcome:
        """Run a program in the session's machine, see Channel.execute for what is raised."""
        async with self._lock:
            self._check()
            self._under_way += 1
        lease = self._lease
        try:
            outcome = await self._pool.execute(
                lease, spec._replace(keep=True), content, on_output=on_output, stdin=stdin
            )
            self.runs += 1
            return self._pool.signed(outcome, lease, 0.0)
        finally:
            self._under_way -= 1
            self.used = time.monotonic()

    async def save(self, tag: str) -> None:
        """Keep the machine's state under `tag`. Raises StateError when the tag is taken or there are too many."""
        if not _TAG.fullmatch(tag):
            raise UsageError(f"{tag[:80]!r} cannot name a state", hint="use letters, digits, dots, dashes, underscores")
        async with self._alone():
            if tag in self.saved:
                raise StateError(f"session {self.id} has a state {tag!r} already", hint="use another tag")
            if len(self.saved) >= SAVED_MAX:
                raise StateError(f"session {self.id} keeps {SAVED_MAX} states already", hint="end it, or go without")
            self.saved[tag] = await self._lease.machine.save()

    async def revert(self, tag: str) -> None:
        """Put the session back to the state `tag`, in a new QEMU process. Raises StateError when there is none.

        When the new process does not start, the session is as before.
        """
        async with self._alone():
            if tag not in self.saved:
                known = ", ".join(self.saved) or "none"
                raise StateError(f"session {self.id} has no state {tag!r} (there are: {known})", hint="save one first")
            fresh = await self._thaw(self.saved[tag].frozen)
            if self._ended:  # meanwhile
                self._pool.give_back(fresh)
                self._check()
            self._pool.give_back(self._lease)
            self._lease = fresh

    async def copy(self) -> Lease:
        """Return a second machine in the state of this one's, as it is now."""
        async with self._alone():
            saved = await self._lease.machine.save()
            try:
                return await self._thaw(saved.frozen)
            finally:
                saved.close()

    def end(self) -> None:
        """Give the machine back and forget the saved states."""
        if not self._ended:
            self._ended = True
            self._pool.give_back(self._lease)
            for saved in self.saved.values():
                saved.close()
            self.saved.clear()

    async def _thaw(self, frozen: Frozen) -> Lease:
        way = self._lease.way
        assert isinstance(way, Clone)  # Sessions opens none on another way
        return await self._pool.adopt(way, lambda: way.thaw_saved(frozen))

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with self._lock:
            self._check()
            if self._under_way:
                raise StateError(f"a program runs in session {self.id}", hint="wait for its end")
            try:
                yield
            finally:
                self.used = time.monotonic()

    def _check(self) -> None:
        if self._ended:
            raise NeverRanError(f"session {self.id} has ended", hint="open another one")
        if not self._lease.machine.alive:
            raise NeverRanError(f"the machine of session {self.id} is gone", hint="open another session")


class Sessions:
    """The sessions of one pool. A context manager: leaving it ends them all."""

    def __init__(self, pool: Pool, *, most: int) -> None:
        self._pool = pool
        self._most = most
        self._sessions: dict[str, Session] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for session in list(self._sessions.values()):
            self.end(session.id)

    def list(self) -> list[dict[str, object]]:
        """Return what is known of each session."""
        return [session.to_json() for session in self._sessions.values()]

    def get(self, id_: str) -> Session:
        """Return session `id_`. Raises NeverRanError when there is none (any more)."""
        session = self._sessions.get(id_)
        if session is None:
            raise NeverRanError(
                f"there is no session {id_[:40]!r}", hint="it may have ended; see `pbotvm-qemu session list`"
            )
        return session

    async def open(self, *, idle: float = IDLE, caller: str = "") -> Session:
        """Return a new session on a clean machine.

        Raises StateError where machines are no clones, NeverRanError when there are too many.
        """
        self._check_room()
        return self._add(await self._pool.take(caller=caller), idle)

    async def fork(self, id_: str) -> Session:
        """Return a new session with a copy of the machine of session `id_`, memory and all."""
        self._check_room()
        origin = self.get(id_)
        return self._add(await origin.copy(), origin.idle)

    def end_idle(self) -> None:
        """End every session in which nothing happens just now."""
        for session in list(self._sessions.values()):
            if not session.busy:
                self.end(session.id)

    def end(self, id_: str) -> None:
        """End session `id_`. Raises NeverRanError when there is none."""
        self.get(id_).end()
        del self._sessions[id_]

    def _check_room(self) -> None:
        if not isinstance(self._pool.way, Clone):
            raise StateError(
                f"sessions need clones, and this machine is kept in the way {self._pool.way.name!r}",
                hint="start it with --revert clone",
            )
        if len(self._sessions) >= self._most:
            raise NeverRanError(
                f"there are {self._most} sessions already", hint="end one, or raise sessions in [pool] of config.toml"
            )

    def _add(self, lease: Lease, idle: float) -> Session:
        session = Session(secrets.token_hex(4), self._pool, lease, idle)
        self._sessions[session.id] = session
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        return session

    async def _watch(self) -> None:
        """End sessions that nobody uses, or whose machine died. Ends with the last one."""
        while self._sessions:
            now = time.monotonic()
            for session in list(self._sessions.values()):
                if not session.alive:
                    log.warning("session %s ends: its machine is gone", session.id)
                elif not session.busy and now - session.used >= session.idle:
                    log.info("session %s ends: not used for %.0f s", session.id, session.idle)
                else:
                    continue
                with contextlib.suppress(NeverRanError, GuestError):
                    self.end(session.id)
            await asyncio.sleep(0.5)
