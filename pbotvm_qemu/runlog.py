"""One line for each run, for people and for programs: `key=value` pairs, the same for every way in."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+/#@:")
_TEXT_MAX = 120  # characters of one value


@dataclass(slots=True)
class RunRecord:
    """What is known of one run when it is over. Never the program or its output."""

    id: int
    source: str  # "relay" or "exec"
    caller: str
    machine: str
    language: str = "-"
    result: str = "refused"  # an exit status, a limit, or why it was not run
    queue_s: float = 0.0
    clone: str = ""
    detail: str = ""
    started: float = field(default_factory=time.monotonic)


class RunLog:
    """Writes a line for each run and tells whoever counts them, such as the metrics."""

    def __init__(self) -> None:
        self._watchers: list[Callable[[RunRecord, float], None]] = []
        self._next = 0

    def watch(self, watcher: Callable[[RunRecord, float], None]) -> None:
        """Call `watcher(record, wall)` at the end of each run; `wall` is in seconds, the wait included."""
        self._watchers.append(watcher)

    def begin(self, source: str, *, caller: str, machine: str) -> RunRecord:
        """Return the record of a run that begins now."""
        self._next += 1
        return RunRecord(self._next, source, caller, machine)

    def end(self, record: RunRecord) -> None:
        """Write its line."""
        wall = time.monotonic() - record.started
        values: dict[str, object] = {
            "id": record.id,
            "from": record.source,
            "caller": record.caller,
            "machine": record.machine,
            "language": record.language,
            "wall_s": f"{wall:.3f}",
            "queue_s": f"{record.queue_s:.3f}",
            "result": record.result,
        }
        values |= {key: text for key, text in (("clone", record.clone), ("detail", record.detail)) if text}
        log.info("run %s", pairs(values))
        for watcher in self._watchers:
            watcher(record, wall)


def pairs(values: dict[str, object]) -> str:
    """Return `values` as `key=value` words; a value that is not plain is written as a JSON string."""
    words = []
    for key, value in values.items():
        text = str(value)[:_TEXT_MAX]
        words.append(f"{key}={text if text and set(text) <= _PLAIN else json.dumps(text)}")
    return " ".join(words)
