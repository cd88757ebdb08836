"""Interactive editing as a channel has it: lines that an unmodified vm-client sends, and every answer."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import editing, pbot, reply
from pbotvm_qemu.config import Limits, PasteConfig
from tests.compat.door import CONFIG

if TYPE_CHECKING:
    from pathlib import Path

    from tests.compat.door import Door


@pytest.fixture(autouse=True)
async def patient(door: Door) -> None:
    """Give programs time on a busy host."""
    await door.configure(limits=Limits(wall=60.0))


async def told(door: Door, *transcript: tuple[str, str], channel: str = "#c") -> None:
    """Send each line of the left side in turn, and hold that the right side comes back."""
    for line, answer in transcript:
        assert await door.code(f"-lang=sh {line}", channel=channel) == answer + "\n", line


async def test_the_worked_example(door: Door) -> None:
    await told(
        door,
        ('-x -args "a b" echo foo bar foo', "+ echo foo bar foo\nfoo bar foo"),
        ("show", '-x -args "a b" echo foo bar foo'),
        ("replace 'foo' with 'baz'", "+ echo baz bar foo\nbaz bar foo"),
        ("diff", '-x -args "a b" echo `replaced foo with baz` bar foo'),
        ("undo", '-x -args "a b" echo foo bar foo'),
        ("run", "+ echo foo bar foo\nfoo bar foo"),
        ("echo foo BAR foo", "foo BAR foo"),
        ("s/(B)(A)/$2$1/", "foo ABR foo"),
        ("append '; echo end'", "foo ABR foo\nend"),
        ("echo q bar", "q bar"),
        ("replace 'q' with 'A' and 'bar' with 'B'", "A B"),
        ("remove 'A ' and run", "B"),
        ("again", "B"),
        ("prepend 'echo first;'", "first\nB"),
    )


async def test_arguments_and_input_are_kept_with_the_code(door: Door) -> None:
    await told(
        door,
        ("-args \"'x y'\" echo $1; cat -stdin in", "x y\nin"),
        ("replace 'echo' with 'echo got'", "got x y\nin"),
        ("replace 'in' with 'out'", "got x y\nout"),
    )


async def test_what_there_is_none_of_is_said(door: Door) -> None:
    await told(
        door,
        ("show", "No recent code to show."),
        ("diff", "Not enough recent code to diff."),
        ("run", "No recent code to run."),
        ("undo", "No more undos remaining."),
        ("replace 'a' with 'b'", "No recent code to change."),
        ("append 'a'", "No recent code to append to."),
        ("prepend 'a'", "No recent code to prepend to."),
        ("copy #none", "No history for #none."),
        ("show #none", "No recent code to show."),
        ("echo a", "a"),
        ("replace 'x' with 'y'", "No replacements made."),
        ("s/x/y/", "No substitutions made."),
        ("s/x/y/z", "Bad regex modifier 'z'.  Only 'i' and 'g' are allowed."),
        ("s/x", f"Unbalanced slashes.  {reply.USAGE}"),
        ("append 'x", f"Unbalanced single quotes.  {reply.USAGE}"),
    )


async def test_a_caller_has_his_own_usage_line(door: Door) -> None:
    answer = await door.code("-lang=sh append 'x", usage="Usage: sh CODE")
    assert answer == "Unbalanced single quotes.  Usage: sh CODE\n"


async def test_channels_and_languages_have_buffers_of_their_own(door: Door) -> None:
    await told(door, ("echo c", "c"), channel="#c")
    await told(door, ("show", "No recent code to show."), ("copy #C", "echo c"), ("run", "c"), channel="#other")
    assert await door.code("-lang=bash show") == "No recent code to show.\n"
    assert await door.code("-lang=bash echo bash") == "bash\n"
    await told(door, ("show", "echo c"))


async def test_a_language_has_one_buffer_whatever_it_is_called(door: Door) -> None:
    await door.code("-lang=gcc -info int x;")
    assert await door.code("-lang=c11 show") == "-info int x;\n"


async def test_an_edit_cannot_change_language_or_machine(door: Door) -> None:
    await told(door, ("echo a", "a"))
    assert "Illegal option" in await door.code("-lang=sh prepend '-lang=bash -vm=other'")


async def test_an_edited_program_is_pasted(door: Door, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    await door.configure(paste=PasteConfig(command=("tee", str(kept))))
    await told(door, ("echo a", "a"), ("paste", "echo a"), ("replace 'a' with 'b' and paste", "echo b"))
    assert "OUTPUT" in kept.read_text()


async def test_code_that_begins_with_a_keyword_is_run(door: Door) -> None:
    await told(door, ("run() { echo ran; }; run", "ran"), ("show() { echo $1; }; show x", "x"))


async def test_a_factoids_code_is_neither_kept_nor_an_edit(door: Door) -> None:
    await told(door, ("echo mine", "mine"))
    assert await door.code("-lang=sh echo factoid", factoid="#c:f") == "factoid\n"
    assert "not found" in await door.code("-lang=sh undo", factoid="#c:f")
    await told(door, ("show", "echo mine"))


async def test_what_cannot_be_run_is_not_kept(door: Door) -> None:
    await told(door, ("echo a", "a"), ("-x", reply.USAGE), ("", reply.USAGE), ("show", "echo a"))


async def test_an_operator_can_turn_it_off(door: Door) -> None:
    await door.configure(relay=replace(CONFIG.relay, editing=False))
    await told(door, ("echo a", "a"))
    assert "not found" in await door.code("-lang=sh undo")


async def test_a_token_is_asked_for_before_anything_is_shown(door: Door) -> None:
    await told(door, ("echo secret", "secret"))
    await door.configure(relay=replace(CONFIG.relay, token="t"))
    assert await door.code("-lang=sh show") == f"{pbot.DENIED}\n"
    assert await door.code("-token=t -lang=sh show") == "echo secret\n"


async def test_a_history_that_cannot_be_written_stops_no_program(
    door: Door, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "history").write_text("a file where the folder should be")
    await told(door, ("echo a", "a"), ("show", "[Fatal error]"))
    assert "cannot make" in caplog.text


# Hostile channels ----------------------------------------------------------------------------------------------------


async def test_changes_of_many_at_once_are_all_made(door: Door) -> None:
    await told(door, ("echo", ""))
    numbers = range(12)
    await asyncio.gather(*(door.code(f"-lang=sh append '<{number}>' and s/[<>]//g") for number in numbers))
    text = await door.code("-lang=sh show")
    assert sorted(map(int, text.split()[1:])) == list(numbers)


async def test_a_slow_edit_holds_up_no_program_and_only_some_wait_for_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pbot, "_EDITS_MAX", 2)
    gate = threading.Event()
    handle = editing.Editor.handle

    def slow(editor: editing.Editor, channel: str, language: str, code: str) -> editing.Reply:
        gate.wait(60)
        return handle(editor, channel, language, code)

    await told(door, ("echo a", "a"))
    monkeypatch.setattr(editing.Editor, "handle", slow)
    try:
        edits = [asyncio.create_task(door.code("-lang=sh show")) for _ in range(8)]
        until = time.monotonic() + 60
        while sum(edit.done() for edit in edits) < 5:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        assert door.desk.edits == 3  # one under way, two that wait
        await told(door, ("echo served", "served"))
    finally:
        gate.set()
    said = sorted(await asyncio.gather(*edits))
    assert said == [f"{reply.UNAVAILABLE}\n"] * 5 + ["echo served\n"] * 3
    assert door.desk.edits == 0


async def test_an_edit_that_takes_too_long_is_ended(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    await told(door, ("echo aaa", "aaa"))
    monkeypatch.setattr(editing, "SECONDS_MAX", -1.0)
    await told(
        door,
        ("s/a.*b|a/x/g", "The edit takes too long."),
        ("replace all 'aaa' with 'x'", "The edit takes too long."),
        ("show", "echo aaa"),
    )
