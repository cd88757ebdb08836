"""Live figures of a kept machine: its queue, its runs, and what each of its QEMU processes uses."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pbotvm_qemu import control, process

_FIGURES = ("ready", "busy", "waiting", "runs", "starts", "deaths", "revert", "relay")


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at one moment."""

    when: float  # seconds, monotonic
    live: dict[str, object]
    usage: dict[int, process.Usage]  # by pid


async def look(name: str) -> Sample:
    """Return today's figures of machine `name`. Raises StateError when nobody keeps it."""
    live = await control.ask(name, {"do": "status"})
    found = live.get("pids", [live.get("pid")])
    pids = [pid for pid in found if isinstance(pid, int)] if isinstance(found, list) else []
    usage = {pid: used for pid in pids if (used := process.usage(pid))}
    return Sample(time.monotonic(), live, usage)


def report(name: str, before: Sample, now: Sample) -> dict[str, object]:
    """Return the figures between two moments: rates by the second, processor use in percent of one processor."""
    seconds = max(now.when - before.when, 1e-3)
    processes = []
    for pid, used in sorted(now.usage.items()):
        earlier = before.usage.get(pid)
        spent = used.cpu_s - (earlier.cpu_s if earlier else used.cpu_s)
        processes.append({"pid": pid, "cpu_percent": round(100 * spent / seconds, 1), "rss": used.rss, "pss": used.pss})
    runs = _number(now.live.get("runs")) - _number(before.live.get("runs"))
    return {
        "machine": name,
        **{key: now.live.get(key) for key in _FIGURES},
        "reverts": now.live.get("reverts"),
        "runs_per_s": round(runs / seconds, 2),
        "processes": processes,
    }


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
