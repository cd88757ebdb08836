"""PBot's front options, and the way from a request to a `run` frame."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbotvm_qemu import request
from pbotvm_qemu.config import Limits
from pbotvm_qemu.errors import UsageError
from pbotvm_qemu.guest.words import split as split_arguments
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.request import Request, parse_line

SH = Registry.load().find("sh")


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\t", "\n:  ")])
def test_json_is_read_in_any_spacing(separators: tuple[str, str]) -> None:
    line = json.dumps({"code": "echo hi", "lang": "bash", "vm": "two", "arguments": "a 'b c'"}, separators=separators)
    wanted = Request(code="echo hi", language="bash", machine="two", arguments=("a", "b c"))
    assert parse_line(line) == wanted
    assert parse_line(f"  {line} ") == wanted


def test_unknown_keys_and_values_of_another_type_are_ignored() -> None:
    line = json.dumps({"code": "x", "nick": ["joe"], "lang": 7, "vm": None, "arguments": ["a"], "new": {}})
    assert parse_line(line) == Request(code="x")


def test_words_are_the_code() -> None:
    assert parse_line("echo hello world") == Request(code="echo hello world")


@pytest.mark.parametrize("line", ["[1]", "7", '"x"', "{not json", "null"])
def test_other_json_is_code(line: str) -> None:
    assert parse_line(line).code == line


@pytest.mark.parametrize(
    "line", ["", "   ", '{"code":""}', '{"code":" \\n"}', '{"lang":"sh"}', "-lang=sh", "-lang=sh -x"]
)
def test_empty_code_is_wrong_usage(line: str) -> None:
    with pytest.raises(UsageError, match="no code") as caught:
        parse_line(line)
    assert caught.value.hint


@pytest.mark.parametrize("line", ["-lang=Perl print 1", "--lang=perl print 1", "  -lang=perl   print 1"])
def test_language_is_taken_from_the_front(line: str) -> None:
    assert parse_line(line) == Request(language="perl", code="print 1")


def test_last_leading_language_and_the_machine_count() -> None:
    assert parse_line("-lang=a -vm=Two -lang=b x") == Request(language="b", machine="Two", code="x")


def test_language_in_front_of_the_code_wins_over_the_key() -> None:
    assert parse_line('{"lang":"sh","code":"-lang=perl print 1"}').language == "perl"


def test_language_behind_the_code_is_code() -> None:
    assert parse_line("echo -lang=perl") == Request(code="echo -lang=perl")


@pytest.mark.parametrize(
    ("line", "arguments", "code"),
    [
        ("-args x echo", ("x",), "echo"),
        ("-args=x echo", ("x",), "echo"),
        ("--arguments x echo", ("x",), "echo"),
        ("-args 'a b' echo", ("a", "b"), "echo"),
        ('-args="a b" echo', ("a", "b"), "echo"),
        ("""-args "a 'b c'" echo""", ("a", "b c"), "echo"),
        ("echo -args x", ("x",), "echo "),
        ("echo -- -args x", (), "echo -- -args x"),
        ("echo '-args x'", (), "echo '-args x'"),
        ("echo -args", (), "echo -args"),
    ],
)
def test_arguments_are_taken_out(line: str, arguments: tuple[str, ...], code: str) -> None:
    assert parse_line(line) == Request(code=code, arguments=arguments)


@pytest.mark.parametrize(
    ("line", "stdin", "code"),
    [
        ("cat -stdin a b", "a b", "cat"),
        ("cat -stdin=a b", "a b", "cat"),
        ("cat --stdin a", "a", "cat"),
        (r"cat -stdin a\nb\tc", "a\nb\tc", "cat"),
        (r"cat -stdin \x41\101", "AA", "cat"),
        (r"cat -stdin a\\nb", r"a\\nb", "cat"),
        ("cat -stdin", "", "cat"),
        ("cat -stdin x -stdin y", "x -stdin y", "cat"),
        ("a-stdin b", None, "a-stdin b"),
    ],
)
def test_input_is_the_rest_of_the_line(line: str, stdin: str | None, code: str) -> None:
    assert parse_line(line) == Request(code=code, stdin=stdin)


@pytest.mark.parametrize("text", [r"\xD800", r"\xFFFFFFFF", r"\37777777777"])
def test_escape_that_is_no_character_is_replaced(text: str) -> None:
    assert request.expand_escapes(text) == "\N{REPLACEMENT CHARACTER}"


def test_words_with_a_dash_in_front_are_options() -> None:
    assert parse_line("-lang=c -Wall '-O2' -DX=1 int x;") == Request(
        language="c", options=("-Wall",), code="'-O2' -DX=1 int x;"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ()),
        ("  ", ()),
        ("a b", ("a", "b")),
        ("'a b' c", ("a b", "c")),
        ('a"b c"d', ("ab cd",)),
        ("''", ("",)),
        (r"a\ b", (r"a\ b",)),
        (r"\n \"x", (r"\n", r"\"x")),
        ("it's", ("it's",)),
        ("'a", ("'a",)),
        (r"C:\dir 'D:\e f'", (r"C:\dir", r"D:\e f")),
    ],
)
def test_arguments_are_split_at_blanks_and_keep_backslashes(text: str, words: tuple[str, ...]) -> None:
    assert split_arguments(text) == words


@given(st.text("ab \\'\"\t", max_size=40))
def test_splitting_loses_nothing_but_quotes_and_blanks(text: str) -> None:
    kept = "".join(split_arguments(text))
    assert [c for c in kept if c in "ab\\"] == [c for c in text if c in "ab\\"]


@given(st.text(max_size=60))
def test_any_line_is_a_request_or_wrong_usage(line: str) -> None:
    try:
        parsed = parse_line(line)
    except UsageError:
        return
    assert parsed.code.strip()


MB = 1_000_000


@pytest.mark.parametrize(
    "line",
    ["'" * MB, '"' * MB, "'\"" * (MB // 2), "\\'" * (MB // 2), "' " * (MB // 2), "x " * (MB // 2), "\\" * MB, "-stdin" * (MB // 6)],
    ids=lambda line: repr(line[:6]),
)  # fmt: skip
def test_1_mb_is_read_in_linear_time(line: str) -> None:
    started = time.process_time()
    split_arguments(line)
    try:
        parse_line("x -args " + line)
        parse_line("x -stdin " + line)
    except UsageError:
        pass
    assert time.process_time() - started < 15  # quadratic takes hours


@pytest.mark.parametrize("word", ["-lang=a ", "-x "])
def test_many_leading_options_are_read_in_linear_time(word: str) -> None:
    def seconds(count: int) -> float:
        started = time.process_time()
        parse_line(word * count + "code")
        return time.process_time() - started

    seconds(1000)
    assert seconds(32_000) < 16 * max(seconds(4_000), 0.004)


def test_program_of_10_mb_is_refused() -> None:
    with pytest.raises(UsageError, match="10000001 bytes") as caught:
        request.render(Request(code="x" * 10_000_000), SH, Limits(), stdin=False)
    assert caught.value.hint == "pass data through standard input"


@pytest.mark.parametrize("change", [{"arguments": ("a\0b",)}, {"options": ("-x\0",)}])
def test_nul_cannot_be_passed_on(change: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(UsageError, match="NUL"):
        request.render(Request(code="x", **change), SH, Limits(), stdin=False)  # type: ignore[arg-type]


def test_too_many_arguments_are_refused_before_the_wire_does() -> None:
    with pytest.raises(UsageError, match="limit is"):
        request.render(Request(code="x", arguments=("x" * 50_000,)), SH, Limits(), stdin=False)


def test_arguments_that_grow_on_the_wire_are_refused_too() -> None:
    with pytest.raises(UsageError):
        request.render(Request(code="x", arguments=("\x01" * 40_000,)), SH, Limits(), stdin=False)


@pytest.mark.parametrize("name", ["../x", "", "a/b", "prog.sh\0"])
def test_file_that_would_leave_the_directory_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        request.render(Request(code="x"), SH, Limits(), stdin=False, files=[(name, b"")])


def test_rendered_request_has_the_program_and_what_goes_beside_it() -> None:
    asked = Request(code="cat", arguments=("a",))
    spec, content = request.render(asked, SH, Limits(wall=3), stdin=True, files=[("in", b"data")], collect=["out"])
    assert [(file.name, file.size) for file in spec.files] == [(SH.source, 4), ("in", 4)]
    assert content == [b"cat\n", b"data"]
    assert (spec.stdin, spec.collect, spec.limits.wall) == (True, ("out",), 3)
    assert spec.steps[-1][-1] == "a"


def test_bytes_that_are_no_utf8_reach_the_program_unchanged() -> None:
    code = b"echo \xff\xfe"
    _, content = request.render(Request(code=code.decode("utf-8", "surrogateescape")), SH, Limits(), stdin=False)
    assert content == [code + b"\n"]


@pytest.mark.parametrize("line", ['{"code":"\\ud800"}', '{"code":"x","arguments":"\\ud800"}'])
def test_half_a_character_in_json_is_wrong_usage_or_replaced(line: str) -> None:
    with contextlib.suppress(UsageError):
        request.render(parse_line(line), SH, Limits(), stdin=False)
