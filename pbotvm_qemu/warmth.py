"""Which languages a machine is to be warm in while it waits: those that are named, and those that callers used last.

An emulator translates a guest's code anew in each of its processes, so a machine that has run a language's sample is
quicker at the caller's program than one that has not. Nothing of that can be in a snapshot.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pbotvm_qemu.guest.spec import RunSpec

    Sample = tuple[RunSpec, Sequence[bytes]]

log = logging.getLogger(__name__)

_FAILURES = 3  # in a row, after which a language is let alone
_PAUSE = 600.0  # for so many seconds


class Warmth:
    """Remembers what callers use. `samples` has a program for each language of the machine.

    `always` names languages that are wanted whether they are used or not; beside them, the `recent` that were used last.
    """

    def __init__(self, samples: Mapping[str, Sample], *, always: Sequence[str] = (), recent: int = 0) -> None:
        self._samples = dict(samples)
        self._always = tuple(always)
        self._most = recent
        self._failures: Counter[str] = Counter()
        self._paused: dict[str, float] = {}  # until when, on the monotonic clock
        self._used: list[str] = []  # the last one first

    def used(self, language: str) -> None:
        """Note that a caller uses `language`."""
        if language in self._samples and language not in self._always:
            self._used = [language, *(name for name in self._used if name != language)][: self._most]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The languages, the most wanted first."""
        now = time.monotonic()
        names = (*self._always, *self._used)
        return tuple(name for name in names if name in self._samples and self._paused.get(name, now) <= now)

    def next(self, done: Collection[str]) -> str | None:
        """Return what a machine that is warm in the languages `done` is to run next, None for nothing."""
        return next((name for name in self.wanted if name not in done), None)

    def sample(self, language: str) -> Sample:
        """Return the program that warms a machine up in a wanted language."""
        return self._samples[language]

    def failed(self, language: str, why: Exception) -> None:
        """Note that the sample of `language` could not be run; after some times in a row it is not wanted for a while."""
        self._failures[language] += 1
        log.warning("a machine was to be warm in %s: %s", language, why)
        if self._failures[language] >= _FAILURES:
            log.error("machines are not kept warm in %s for %.0f s", language, _PAUSE)
            self._failures[language] = 0
            self._paused[language] = time.monotonic() + _PAUSE

    def worked(self, language: str) -> None:
        """Note that the sample of `language` ended well."""
        self._failures[language] = 0
