"""Every reader of a peer's bytes, with bytes of all kinds: noise, real conversations, and these damaged.

`scripts/fuzz` feeds the same readers with inputs that are chosen by the code that they reach.
"""

from __future__ import annotations

import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pbotvm_qemu.guest import legacy
from tests.fuzz.targets import TARGETS, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

EACH = pytest.mark.parametrize("target", [pytest.param(target, id=name) for name, target in TARGETS.items()])
Edit = tuple[int, int, bytes]  # place, bytes to take out, bytes to put in


def damaged(parts: Sequence[bytes], edits: Sequence[Edit]) -> bytes:
    """Return real conversations, one after another, with some bytes taken out and others put in."""
    data = bytearray(b"".join(parts))
    for place, length, new in edits:
        begin = place % (len(data) + 1)
        data[begin : begin + length] = new
    return bytes(data)


@EACH
def test_real_conversations_are_read(target: Target) -> None:
    for data in (*target.seeds, b""):
        target.feed(data)


@EACH
def test_no_bytes_harm_a_reader(target: Target) -> None:
    edits = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 8), st.binary(max_size=4)), max_size=6)
    real = st.lists(st.sampled_from(target.seeds), max_size=4)

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.binary(max_size=400), st.builds(damaged, real, edits)))
    def feed(data: bytes) -> None:
        target.feed(data)

    feed()


@EACH
def test_thousands_of_damaged_conversations_harm_no_reader(target: Target) -> None:
    """Hypothesis takes milliseconds for an input, and finds the smallest one; these are many, and repeat."""
    chance = random.Random(20261124)
    for number in range(4000):
        parts = chance.choices(target.seeds, k=chance.randint(1, 3))
        edits = [
            (
                chance.randrange(5000),
                chance.choice((0, 0, 1, 1, 2, 9, 100)),
                chance.randbytes(chance.choice((0, 1, 1, 4))),
            )
            for _ in range(chance.randint(0, 4))
        ]
        data = damaged(parts, edits)
        try:
            target.feed(data)
        except BaseException as exc:
            exc.add_note(f"input {number}: {data!r}")
            raise


KEEPS = {"vm-exec": 3 * legacy.REQUEST_MAX}  # bytes that a reader may need; the others do with much less
FEW = 4 << 20


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"channel", "line"}))  # which get their bytes all at once
@pytest.mark.parametrize("kind", ["real", "one byte", "line feeds"])
def test_megabytes_take_no_more_memory_than_the_limits_say(name: str, kind: str) -> None:
    seed = TARGETS[name].seeds[0][1:]
    body = {"real": seed * ((1 << 18) // len(seed)), "one byte": bytes(4 << 20), "line feeds": b"\n" * (1 << 16)}[kind]
    data = b"\x05" + body
    tracemalloc.start()
    try:
        TARGETS[name].feed(data)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A target itself holds the input twice, and what came of it.
    assert peak < len(data) * 3 + KEEPS.get(name, FEW)
