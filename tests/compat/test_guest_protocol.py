"""An unmodified vm-exec against our agent: every byte that passes on the data line and on the health port."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import paths
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
    end, seen = b"result:end\r\n", b""
    while seen.count(end) < count:  # several may come at once
        seen += read_until(agent.serial, end)
    answers = []
    for answer in seen.split(end)[:-1]:
        kept = [json.loads(line[7:])["result"] for line in answer.split(b"\r\n") if line.startswith(b"result:{")]
        assert len(kept) == 1, answer
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


@pytest.mark.parametrize("bad", [b"\xf5" * 10, b"\xf5\x04\0\0\0\1\xff\xff\xff\xff", b"\xf5" + b"x" * 20])
def test_bad_frames_without_end_leave_the_line_usable(agent: peers.Agent, bad: bytes) -> None:
    write_all(agent.serial, (bad + b"\n\n") * 500)
    write_all(agent.serial, b"\n\n" + frame_today(request(code="echo whole")))
    assert b'result:{"result": "whole\\n"}\r\n' in read_until(agent.serial, b'whole\\n"}\r\nresult:end\r\n')


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


# Our own header is in a folder of the guest where compilers look.
PRELUDE = paths.guest_package() / "source"
C = {
    "lang": "c11", "sourcefile": "prog.c", "execfile": "prog",
    "cmdline": f"gcc -gdwarf-2 -g3 prog.c -isystem {PRELUDE} -Wall -Wextra -Wno-unused-parameter -fno-diagnostics-show-caret -fsanitize=alignment,undefined -o prog",
}  # fmt: skip
needs_gdb = pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not installed (scripts/setup --dev installs it)")


def around(statements: str, before: str = "") -> str:
    """Return the program that PBot's host makes of statements; the last one is marked by whoever calls."""
    return (
        f"#include <stdio.h>\n#include <stdlib.h>\n#include <prelude.h>\n{before}\n"
        f"int main(int argc, char *argv[])\n{{\n    {statements}\n    ;\n    return 0;\n}}\n"
    )


@pytest.mark.parametrize(
    ("code", "begin", "end"),
    [
        ('#include <stdio.h>\nint main(void) { puts("hi"); return 3; }', "hi\n [Exit 3]", ""),
        ("int main(void) { return 3; }", "Exit 3.", ""),
        ('#include <stdio.h>\nint main(void) { int x = 1; puts("hi"); return 0; }', "[prog.c: In function", "]\nhi\n"),
        ("int main(", "prog.c:1:", "\n"),
        ("int main(void) {\n  return nonsense; }", "prog.c: In function 'main':\nprog.c:2:10: error: ", "\n"),
    ],
)
def test_c_is_built_and_run(agent: peers.Agent, code: str, begin: str, end: str) -> None:
    (text,) = results(agent, frame_today(request(**C, code=code)))
    assert (
        text.replace("\N{LEFT SINGLE QUOTATION MARK}", "'")
        .replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        .startswith(begin)
    )
    assert text.endswith(end)
    assert "prog.c" not in text or "[Exit" not in text


@needs_gdb
@pytest.mark.parametrize(
    ("code", "begin", "end"),
    [
        (around("int x = 5, y = 16;\n    print_last_statement(x ^= y, y ^= x, x ^= y);"), "no output: x = 16; y = 5\n", ""),
        (around("print_last_statement(2 + 2);"), "no output: 2 + 2 = 4\n", ""),
        (around("int a = 1;\n    print_last_statement(a);"), "no output: a = 1\n", ""),
        (around("int n = 1;\n    print_last_statement(++n + 1);"), "no output: ++n + 1 = 3; n = 2\n", ""),
        (around("print_last_statement(free(0));"), "Success (no output).\n", ""),
        (around('puts("said");\n    print_last_statement(2 + 2);'), "said\n", ""),
        (around("int a[] = { 1, 2, 3 };\n    print(a); ptype(a); whatis(a[0]); dump(a[1]+1);"),
         "a = {1, 2, 3}\na = int [3]\na[0] = int\na[1]+1 = 3\n", ""),
        (around("int n = 3;\n    bang(n);", "void bang(int n) { char *volatile p = 0; p[n] = 1; }"), "",
         ") at statement: bang(n); <local variables: p = 0x0>\n [Exit 139]\n"),
        (around("int k = 1;\n    return k;"), "no output: k = 1\n [Exit 1]", ""),
    ],
)  # fmt: skip
def test_c_tells_what_it_holds_and_where_it_crashes(agent: peers.Agent, code: str, begin: str, end: str) -> None:
    (text,) = results(agent, frame_today(request(**C, code=code)))
    text = re.sub(r"\A\[.*?\]\]\n+", "", text, flags=re.DOTALL)  # what the compiler thinks of it
    assert text.startswith(begin)
    assert text.endswith(end)
    assert "print_last_statement" not in text


@needs_gdb
@pytest.mark.parametrize("format_", ["-gdwarf-2", "-gdwarf-4", "-gdwarf-5"])
def test_a_crash_is_told_whatever_the_debug_information(agent: peers.Agent, format_: str) -> None:
    line = f"gcc {format_} -g3 prog.c -isystem {PRELUDE} -o prog"
    code = around("int a = 1; bang(a);", "void bang(int n) { int b = n; char *volatile p = 0; p[b] = 1; }")
    (text,) = results(agent, frame_today(request(**C | {"cmdline": line}, code=code)))
    assert "in bang (n=1) at statement: p[b] = 1; called by main" in text
    assert "at statement: bang(a); <local variables: b = 1; p = 0x0>" in text


@needs_gdb
def test_a_crash_in_c_is_told_after_what_the_sanitizer_says(agent: peers.Agent) -> None:
    (text,) = results(agent, frame_today(request(**C, code=around("char *p = 0;\n    *p = 1;"))))
    said, report, note = text.rstrip("\n").split("\n")[-3:]
    assert said == "prog.c:8:8: runtime error: store to null pointer of type 'char'"
    assert re.fullmatch(
        r"Program received signal SIGSEGV, Segmentation fault in main \(argc=1, argv=0x[0-9a-f]+\) "
        r"at statement: \*p = 1; <local variables: p = 0x0>",
        report,
    )
    assert note == " [Exit 139]"


@needs_gdb
def test_cpp_tells_too(agent: peers.Agent) -> None:
    cpp = {"lang": "cpp", "sourcefile": "prog.cpp", "execfile": "prog"}
    cpp["cmdline"] = f"g++ -ggdb -g3 prog.cpp -isystem {PRELUDE} -std=c++14 -o prog"
    code = around('std::string s = "x";\n    print_last_statement(s.size() + 1);', "#include <string>")
    assert results(agent, frame_today(request(**cpp, code=code)))[0].startswith("no output: s.size() + 1 = 2; s = ")


def test_a_loop_in_c_is_ended_and_told(agent: peers.Agent) -> None:
    assert results(agent, frame_today(request(**C, code=around("while (1);")))) == ["[gdb time-out]\n"]


def test_a_compiler_can_be_asked_for_its_version(agent: peers.Agent) -> None:
    value = request(**C | {"cmdline": "gcc prog.c --version -o prog"}, code="x")
    assert results(agent, frame_today(value))[0].startswith("gcc (")


@pytest.mark.parametrize(
    "cmdline",
    ["gcc prog.c prog.c -o prog", "gcc -o prog", "nonsense prog.c", "gcc 'prog.c", "'' prog.c", "'pbotvm:run' prog.c",
     "gcc prog.c " + "-Dx " * 2000],
    ids=lambda line: line[:16],
)  # fmt: skip
def test_a_senseless_command_line_of_c_is_answered(agent: peers.Agent, cmdline: str) -> None:
    assert (
        len(results(agent, frame_today(request(**C | {"cmdline": cmdline}, code="int main(void) { return 0; }")))) == 1
    )
    assert results(agent, frame_today(request())) == ["hi\n"]


def test_c_arguments_lose_their_backslashes(agent: peers.Agent) -> None:
    code = "#include <stdio.h>\nint main(int c, char **v) { for (int i = 1; i < c; i++) puts(v[i]); }"
    assert results(agent, frame_today(request(**C, code=code, arguments=r'"a b" c\"d'))) == ['a b\nc"d\n']


def test_c_reads_its_input(agent: peers.Agent) -> None:
    code = "#include <stdio.h>\nint main(void) { int c; while ((c = getchar()) != EOF) putchar(c); }"
    assert results(agent, frame_today(request(**C, code=code, input="a\nb"))) == ["a\nb\n"]


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
