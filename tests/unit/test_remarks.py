"""What a person is told beside a program's own output."""

from __future__ import annotations

from dataclasses import replace

from pbotvm_qemu import execution
from pbotvm_qemu.channel import Outcome
from pbotvm_qemu.config import Limits

ENDED = Outcome(
    status=None, signal=9, timed_out=True, cancelled=False, truncated=False, limit="wall", stage="run", message="",
    wall_s=10.0, cpu_s=None, memory_peak=None,
)  # fmt: skip


def test_whose_time_was_over_is_told() -> None:
    limits = Limits(wall=10)
    assert execution.remarks(ENDED, limits) == ["pbotvm-qemu: the program was ended after 10 s; --timeout allows more"]
    built = execution.remarks(replace(ENDED, stage="build"), limits)
    assert built == [
        "pbotvm-qemu: the compiler was ended because its time was over; `languages show` says how much it has"
    ]


def test_signals_have_names() -> None:
    assert [execution.signal_name(number) for number in (11, 15, None, 0, 999)] == [
        "SIGSEGV",
        "SIGTERM",
        None,
        None,
        None,
    ]
