"""How a run is worded for a chat, where the transcripts do not reach."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from pbotvm_qemu import reply


@given(st.text(st.characters(max_codepoint=0x7F), max_size=60))
def test_only_what_a_chat_may_see_is_left(text: str) -> None:
    left = {character for character in reply.clean(text) if character < " "}
    assert left <= set("\n\r\t\x02\x03\x0f\x11\x1d\x1e\x1f")


def test_backspaces_go_across_lines_and_not_below_the_start() -> None:
    assert reply.clean("a\nb\b\b\bX") == "X\nb"
    assert reply.clean("\b\bab") == "ab"
    assert reply.clean("abc\b\bX\n") == "aX\n"


def test_a_megabyte_of_backspaces_is_quick() -> None:
    began = time.process_time()
    reply.clean("ab\b" * 350_000)
    assert time.process_time() - began < 20  # quadratic takes hours


def test_same_output_is_forgotten_after_four_minutes_and_when_short() -> None:
    now = 0.0
    last = reply.LastOutputs(clock=lambda: now)
    long = "x" * 51

    def seen(text: str) -> str:
        return last.shorten(text, channel="#c", language="sh", factoid=False)

    assert [seen(long), seen(long)] == [long, reply.SAME]
    now = 240.0
    assert seen(long) == reply.SAME
    now = 481.0
    assert seen(long) == long
    assert [seen("x" * 50), seen("x" * 50)] == ["x" * 50] * 2


def test_a_crowd_of_channels_does_not_grow_without_end() -> None:
    last = reply.LastOutputs()
    for number in range(5000):
        last.shorten("x", channel=f"#{number}", language="sh", factoid=False)
    assert len(last._known) <= 512
