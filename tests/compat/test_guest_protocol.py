"""An unmodified vm-exec against our agent: every byte that passes on the data line and on the health port."""

from __future__ import annotations

import json
import os
import select
import time
from typing import TYPE_CHECKING

import pytest

from tests.compat import peers
from tests.compat.peers import SECONDS, frame_seed, frame_today, request, sized

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def agent() -> Iterator[peers.Agent]:
    with peers.agent() as running:
        yield running


def read_until(fd: int, end: bytes, *, within: float = SECONDS) -> bytes:
    """Return what comes on `fd` up to `end`."""
    until = time.monotonic() + within
    seen = b""
    while not seen.endswith(end):
        ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
        assert ready, f"after {within:.0f} s there was only {seen[-500:]!r}"
        seen += os.read(fd, 4096)
    return seen


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def results(agent: peers.Agent, data: bytes, *, count: int = 1) -> list[str]:
    """Send what vm-exec sends, and read by its rules."""
    write_all(agent.serial, data)
    answers = []
    for _ in range(count):
        lines = read_until(agent.serial, b"result:end\r\n").split(b"\r\n")
        kept = [json.loads(line[7:])["result"] for line in lines if line.startswith(b"result:{")]
        assert len(kept) == 1, lines
        answers += kept
    return answers


@pytest.mark.parametrize("frame", [frame_today, frame_seed])
@pytest.mark.parametrize("size", [3999, 4000, 4001, 9164, 40_000, 300_000])
def test_requests_of_every_size_and_both_eras_arrive_whole(agent, frame, size) -> None:  # type: ignore[no-untyped-def]
    value = sized(size)
    assert results(agent, frame(value)) == [f"{len(str(value['code'])) + 1}\n"]


def test_a_transcript_byte_for_byte(agent: peers.Agent) -> None:
    write_all(agent.serial, frame_today(request(code="echo hello")))
    assert read_until(agent.serial, b"result:end\r\n") == b'result:{"result": "hello\\n"}\r\nresult:end\r\n'


def test_a_character_across_a_cut_stays_one_character(agent: peers.Agent) -> None:
    for shift in range(4):
        value = request(code="cat <<'X'\n" + "x" * shift + "€" * 2000 + "\nX")
        assert results(agent, frame_today(value)) == ["x" * shift + "€" * 2000 + "\n"]


def test_cr_lf_is_taken_for_lf(agent: peers.Agent) -> None:
    assert results(agent, frame_today(request(code="echo crlf")).replace(b"\n", b"\r\n")) == ["crlf\n"]


def test_several_requests_in_one_session_are_answered_in_order(agent: peers.Agent) -> None:
    data = b"".join(frame_today(request(code=f"echo {number}")) for number in range(5))
    assert results(agent, data, count=5) == [f"{number}\n" for number in range(5)]


def test_eras_can_follow_each_other_on_one_line(agent: peers.Agent) -> None:
    data = (
        frame_today(request(code="echo a")) + frame_seed(request(code="echo b")) + frame_today(request(code="echo c"))
    )
    assert results(agent, data, count=3) == ["a\n", "b\n", "c\n"]


def test_bytes_may_come_one_by_one(agent: peers.Agent) -> None:
    for byte in frame_today(request(code="echo slow")):
        os.write(agent.serial, bytes([byte]))
    assert results(agent, b"") == ["slow\n"]


def test_what_is_no_json_is_said(agent: peers.Agent) -> None:
    (text,) = results(agent, b"{broken\n\n")
    assert text.startswith("Failed to decode JSON: ")
    assert results(agent, b"[" * 20_000 + b"\n\n")[0].startswith("Failed to decode JSON: ")
    assert results(agent, frame_today(request())) == ["hi\n"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"code": "true"}, "Success (no output).\n"),
        ({"code": "exit 3"}, "Exit 3.\n"),
        ({"code": "echo hi; exit 3"}, "hi\n [Exit 3]\n"),
        ({"code": "printf 0"}, "0\n"),
        ({"code": "exit 3", "factoid": "#c:x"}, "\n"),
        ({"code": "kill -9 $$"}, "Exit 137.\n"),
        ({"code": r"printf '\377x'"}, "�x\n"),
        ({"code": "cat", "input": "one\ntwo"}, "one\ntwo\n"),
        ({"code": "cat", "input": None}, "Success (no output).\n"),
        ({"code": "echo $# $1 $2", "arguments": r"'a b' c\'d"}, "2 a b c\\'d\n"),
        ({"cmdline": ""}, "[Fatal error]\n"),
        ({"sourcefile": "../x"}, "[Fatal error] '../x' is not a plain file name\n"),
        ({"code": "x\x7fy=1; echo del", "cmdline": "echo fine; #"}, "fine\n"),
    ],
)
def test_results_are_worded_as_the_predecessor(agent: peers.Agent, changes: dict[str, object], text: str) -> None:
    assert results(agent, frame_today(request(**changes))) == [text]


C = {"lang": "c11", "sourcefile": "prog.c", "execfile": "prog", "cmdline": "gcc prog.c -Wall -o prog"}


@pytest.mark.parametrize(
    ("code", "begin", "end"),
    [
        ('#include <stdio.h>\nint main(void) { puts("hi"); return 3; }', "hi\n [Exit 3]", ""),
        ("int main(void) { return 3; }", "Exit 3.", ""),
        ("int main(void) { int x; return 0; }", "[prog.c: In function", "]\n\nSuccess (no output).\n"),
        ("int main(", "prog.c:1:", "\n"),
    ],
)
def test_c_is_built_and_run(agent: peers.Agent, code: str, begin: str, end: str) -> None:
    (text,) = results(agent, frame_today(request(**C, code=code)))
    assert text.startswith(begin)
    assert text.endswith(end)
    assert "prog.c" not in text or "[Exit" not in text


def test_c_arguments_lose_their_backslashes(agent: peers.Agent) -> None:
    code = "#include <stdio.h>\nint main(int c, char **v) { for (int i = 1; i < c; i++) puts(v[i]); }"
    assert results(agent, frame_today(request(**C, code=code, arguments=r'"a b" c\"d'))) == ['a b\nc"d\n']


def test_no_line_but_the_answer_begins_with_result(agent: peers.Agent) -> None:
    (text,) = results(agent, frame_today(request(code='echo result:end; echo \'result:{"result":"forged"}\'')))
    assert text == 'result:end\nresult:{"result":"forged"}\n'


def test_output_without_end_is_cut(agent: peers.Agent) -> None:
    (text,) = results(agent, frame_today(request(code="yes")))
    assert text.endswith(" [Exit 137]\n")
    assert 1 << 19 < len(text) < 1 << 21
    assert results(agent, frame_today(request())) == ["hi\n"]


def test_a_request_without_end_is_refused_and_the_line_goes_on(agent: peers.Agent) -> None:
    junk = b"x" * 65536
    for _ in range(160):
        write_all(agent.serial, junk)
    assert results(agent, b"\n\n")[0].startswith("[Fatal error] the request is longer than")
    assert results(agent, frame_today(request())) == ["hi\n"]


def test_the_heart_beats_until_a_question_and_then_it_is_answered() -> None:
    with peers.agent() as agent:
        begin = time.monotonic()
        assert read_until(agent.health, b"\r\n\r\n") == b"\r\n\r\n"  # the seed's host: at once, and again
        assert time.monotonic() - begin < 5 + SECONDS
        os.write(agent.health, b"\n")
        said = read_until(agent.health, b":END\r\n")
        *lines, empty, end = said.removesuffix(b"\r\n").split(b"\r\n")
        assert (empty, end) == (b"", b":END")
        assert b"".join(lines[-3:-1]).startswith(b"procs ---")
        assert len(lines[-1].split()) == 17
        os.write(agent.health, b"\n")
        assert read_until(agent.health, b":END\r\n").count(b":END") == 1


def test_a_host_that_asks_hears_no_heart_meanwhile() -> None:
    with peers.agent() as agent:
        read_until(agent.health, b"\r\n")
        os.write(agent.health, b"\n")
        read_until(agent.health, b":END\r\n")
        assert select.select([agent.health], [], [], 4.5)[0] == []
