"""An unmodified vm-client against our relay: what it sends, and every byte that it gets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import paste, pbot, pbot_guest, relay, reply
from pbotvm_qemu.config import PasteConfig, RelayConfig
from pbotvm_qemu.endpoints import Endpoint, Endpoints
from pbotvm_qemu.errors import GuestError, NeverRanError, RunLostError
from tests.compat.door import CONFIG
from tests.compat.peers import GuestServer, HealthPort
from tests.support import free_ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.compat.door import Door

# What is sent --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b'{"nick":"n","channel":"#c","code":"-lang=sh echo hello"}\n',
        b'{"nick" :"n" ,"channel" :"#c" ,"code" :"-lang=sh echo hello" }\n',
        b'  {\t"code" : "echo hello",   "lang":"sh", "vm-addr":"10.0.0.1", "debug":1, "new":{"x":[]}}  \r\n',
        b"-lang=sh echo hello\n",
        b"-lang=sh echo hello\r\n",
        b"--lang=sh echo hello\r\r\n",
        b"\n\r\n   \n-lang=sh echo hello\nanother line that nobody reads\n",
        b"-vm=pbot-vm -lang=SH echo hello\n",
    ],
)  # fmt: skip
async def test_a_line_in_any_spacing_is_answered_and_the_connection_closed(door: Door, line: bytes) -> None:
    assert await door.ask(line) == b"hello\n"


async def test_a_line_may_end_with_half_of_the_connection(door: Door) -> None:
    assert await door.ask(b"-lang=sh echo half", finish=True) == b"half\n"


async def test_text_is_utf8_both_ways(door: Door) -> None:
    assert await door.ask("-lang=sh echo é€😀\n".encode()) == "é€😀\n".encode()
    assert await door.code("echo é€😀", lang="sh") == "é€😀\n"


async def test_newlines_in_json_code_are_newlines(door: Door) -> None:
    assert await door.code("echo a\necho b", lang="sh") == "a\nb\n"


async def test_without_a_language_it_is_c(door: Door) -> None:
    assert await door.code("-info int x;") == (
        "c11 cmdline: gcc -gdwarf-2 -g3 prog.c -Wextra -Wall -Wno-unused-parameter -Wno-unused-variable -pedantic "
        "-Wfloat-equal -Wshadow -std=c11 -lm -Wfatal-errors -fsanitize=alignment,undefined "
        "-fsanitize-address-use-after-scope -fno-omit-frame-pointer -fno-diagnostics-show-caret -o prog\n"
    )


async def test_no_line_in_time_gets_no_byte(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "LINE_TIMEOUT", 0.2)
    assert await door.ask(b"") == b""
    assert await door.ask(b"no end of line") == b""
    assert await door.ask(b"\n", finish=True) == b""


# Front options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("-lang=sh -args \"'a b' c\" echo $#:$1", "2:a b\n"),
        ("-lang=sh echo $# -args 'x y'", "2\n"),
        ("-lang=sh cat -stdin one\\ntwo", "one\ntwo\n"),
        ("-lang=sh cat -stdin 'quotes' stay", "'quotes' stay\n"),
        ("-lang=sh -e false; echo not reached", "Exit 1.\n"),
        ("-lang=sh -info -x echo hi", "sh cmdline: sh -x prog.sh\n"),
        ("-lang=sh echo '-info' 2  -args 'a'", "-info 2\n"),
        ("-lang=sh -info -noinfo echo ran", "ran\n"),
        ("-lang=sh echo -- -info", "-- -info\n"),
    ],
)
async def test_front_options(door: Door, code: str, text: str) -> None:
    assert await door.code(code) == text


async def test_arguments_of_the_object_give_way_to_those_in_the_code(door: Door) -> None:
    assert await door.code("-lang=sh echo $1", arguments="'from object'") == "from object\n"
    assert await door.code("-lang=sh -args code echo $1", arguments="object") == "code\n"


@pytest.mark.parametrize(
    "option",
    [
        "-revert=1",
        "-health=1",
        "-vm-domain=x",
        "-vm-cid=7;id",
        "-vm-vport=1",
        "-vm-serial=22",
        "-vm-health=1",
        "--vm-cid=3",
    ],
)
async def test_what_only_the_configuration_chooses_is_refused(door: Door, option: str) -> None:
    for code in (f"{option} echo hi", f"-lang=sh {option} echo hi"):
        assert "is not available" in await door.code(code)


# Fixed texts ---------------------------------------------------------------------------------------------------------------


USAGE = (
    'Usage: cc [-lang=<language>] [-vm=<virtual machine>] [-info] [-paste] [-args "command-line arguments"] '
    "[compiler/language options] <code> [-stdin <stdin input>]\n"
)


async def test_usage(door: Door) -> None:
    assert await door.code("") == USAGE
    assert await door.ask(b"-lang=sh\n") == USAGE.encode()
    assert await door.code("", usage="usage: mine") == "usage: mine\n"


async def test_unknown_language(door: Door) -> None:
    assert (
        await door.code("-lang=nope x") == "Language 'nope' is not supported.\nSupported languages are: bash, c11, sh\n"
    )


async def test_unknown_machine_lists_aliases_only(door: Door) -> None:
    assert await door.code("-vm=X echo") == "Unknown machine 'X'; available machines are: pbot-vm\n"
    await door.configure(
        endpoints=Endpoints(
            machines={"pbot-vm": Endpoint(name="pbot-vm"), "pbot-test-vm": Endpoint(name="pbot-test-vm")},
            aliases={"test": "pbot-test-vm", "main": "pbot-vm"},
        )
    )
    assert await door.code("-vm=X echo") == "Unknown machine 'X'; available machines are: main, test\n"
    for name in ("main", "MAIN", "pbot-vm"):
        assert await door.code(f"-vm={name} -lang=sh echo hi") == "hi\n"


@pytest.mark.parametrize(
    ("failure", "problem", "text"),
    [
        (lambda: NeverRanError("queue full"), None, "Virtual machine is temporarily unavailable, try again soon.\n"),
        (lambda: NeverRanError("no machine"), "QEMU does not start", "Virtual machine is offline.\n"),
        (lambda: RunLostError("QEMU died"), None, "Virtual machine is misbehaving, try again soon.\n"),
        (lambda: GuestError("nonsense"), None, "Virtual machine is misbehaving, try again soon.\n"),
    ],
)
async def test_each_failure_has_its_text(
    door: Door, failure: Callable[[], Exception], problem: str | None, text: str
) -> None:
    door.pool.fail, door.pool.problem = failure, problem
    assert await door.code("-lang=sh echo hi") == text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("true", "Success (no output).\n"),
        ("exit 3", "Exit 3.\n"),
        ("echo hi; exit 3", "hi\n [Exit 3]\n"),
        ("kill -9 $$", "Exit 137.\n"),
        ("printf 0", "0\n"),
        ("echo out; echo err >&2", "out\nerr\n"),
        ("echo begun; echo more; sleep 60", "[Timed-out] begun\n"),
        ("sleep 60", "[Timed-out]\n"),
        ("printf 'a\\n\\n\\n'", "a\n"),
        (r"printf 'abc\b\bX\n'", "aX\n"),
        (r"printf '\033[1m \014 \000 \001 \177 \t| \002 \037'", "<esc>[1m <ff> \\x00 \\x01 \x7f \t| \x02 \x1f\n"),
        (r"printf '\377'", "�\n"),
    ],
)
async def test_ends_are_worded_and_controls_shown(door: Door, code: str, text: str) -> None:
    assert await door.code(f"-lang=sh {code}") == text


async def test_a_bell_is_one_of_eleven_words(door: Door) -> None:
    text = await door.code(r"-lang=sh printf '\007\007'")
    assert re.fullmatch(r"(\*(BEEP|BING|DING|DONG|CLUNK|BONG|PING|BOOP|BLIP|BOP|WHIRR)\*){2}\n", text)


async def test_a_factoid_without_output_is_an_empty_line(door: Door) -> None:
    for code in ("true", "exit 3"):
        assert await door.code(f"-lang=sh {code}", factoid="#c:x") == "\n"


async def test_compiler_words_come_without_exit_note(door: Door) -> None:
    text = await door.code("-lang=c11 int main(")
    assert "error" in text
    assert "[Exit" not in text


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed (scripts/setup --dev installs it)")
async def test_backslashes_of_arguments_stay_for_a_shell_and_protect_for_c(door: Door) -> None:
    c = "-noheaders -g -include stdio.h -nomain int main(int c, char **v) { while (*++v) puts(*v); }"
    assert await door.code(rf"""-lang=c11 -args "'a b' c\'d" {c}""") == "a b\nc'd\n"
    assert await door.code(rf"""-lang=c11 {c}""", arguments=r"'a b' c\'d") == "a b\nc'd\n"
    assert await door.code(r"""-lang=sh -args "'a b' c\'d" printf '%s\n' "$@" """) == "a b\nc\\'d\n"


async def test_same_output_is_said_once_for_each_channel(door: Door) -> None:
    long = f"-lang=sh echo {'x' * 60}"
    assert await door.code(long) == "x" * 60 + "\n"
    assert await door.code(long) == "Same output.\n"
    assert await door.code(long, channel="#other") == "x" * 60 + "\n"
    assert await door.code(long, channel="joe") == "x" * 60 + "\n"
    assert await door.code(long, channel="joe") == "x" * 60 + "\n"
    assert await door.code(long, factoid="#c:y") == "x" * 60 + "\n"
    assert await door.code("-lang=sh echo short") == await door.code("-lang=sh echo short")
    assert await door.code(long) == "x" * 60 + "\n"  # something else was shown in between


async def test_output_beyond_the_limit_is_cut_and_said(door: Door) -> None:
    await door.configure(relay=replace(CONFIG.relay, output=1000))
    text = await door.code("-lang=sh yes | head -c 5000")
    assert text.endswith(" [Output truncated]\n")
    assert len(text) < 1100


# Who may ask ----------------------------------------------------------------------------------------------------------------


async def test_a_token_is_asked_for_in_every_form(door: Door) -> None:
    await door.configure(relay=replace(CONFIG.relay, token="s3cret"))
    for line in (
        b"-lang=sh echo hi\n",
        b"-token=wrong -lang=sh echo hi\n",
        b'{"code":"-lang=sh echo hi","token":7}\n',
        b"\\x\n",
        b'{"code":""}\n',
    ):
        assert await door.ask(line) == b"Access denied: the request does not carry the token of this server.\n"
    for line in (
        b"-token=s3cret -lang=sh echo hi\n",
        b"-lang=sh -token=s3cret echo hi\n",
        b'{"code":"-lang=sh echo hi","token":"s3cret"}\n',
    ):
        assert await door.ask(line) == b"hi\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_beyond_loopback_takes_a_token_or_an_explicit_word(host: str) -> None:
    with pytest.raises(Exception, match="for everybody") as caught:
        relay.check_address(RelayConfig(host=host))
    assert "--no-auth" in str(caught.value.hint)  # type: ignore[attr-defined]
    relay.check_address(RelayConfig(host=host, token="x"))
    relay.check_address(RelayConfig(host=host, no_auth=True))


# Paste ------------------------------------------------------------------------------------------------------------------------


async def test_paste_goes_nowhere_by_default(door: Door) -> None:
    assert (await door.code("-lang=sh -paste echo hi")).startswith("error pasting: no place is configured")


async def test_paste_writes_a_file(door: Door, tmp_path: Path) -> None:
    folder = tmp_path / "paste"
    folder.mkdir()
    await door.configure(paste=PasteConfig(directory=str(folder), url="https://paste.example/"))
    url = await door.code("-lang=sh -paste -args x cat -stdin hello")
    (file,) = folder.iterdir()
    assert url == f"https://paste.example/{file.name}\n"
    text = file.read_text()
    for piece in ("cat", "sh prog.sh", "arguments: x", "stdin: hello", "hello\n*"):
        assert piece in text


async def test_paste_is_given_to_a_program(door: Door, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    await door.configure(paste=PasteConfig(command=("tee", str(kept))))
    assert await door.code("-lang=sh -paste echo hi") == "echo hi\n"  # its first line
    assert "OUTPUT" in kept.read_text()
    await door.configure(paste=PasteConfig(command=("false",)))
    assert (await door.code("-lang=sh -paste echo hi")).startswith("error pasting: ")
    await door.configure(paste=PasteConfig(directory=str(tmp_path / "nowhere")))
    assert (await door.code("-lang=sh -paste echo hi")).startswith("error pasting: cannot write")


# Guests of others -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def foreign(door: Door, *, seed: bool = False, health: int = 0, **more: object) -> AsyncIterator[GuestServer]:
    server = GuestServer(seed=seed)
    try:
        endpoint = Endpoint(name="old-vm", serial=server.port, health=health, seed=seed, **more)  # type: ignore[arg-type]
        await door.configure(endpoints=Endpoints(machines={"old-vm": endpoint}, aliases={"old": "old-vm"}))
        yield server
    finally:
        server.end()


async def test_a_request_goes_on_to_an_unmodified_guest_server(door: Door) -> None:
    async with HealthPort() as health, foreign(door, health=health.port) as server:
        assert (
            await door.code("-vm=old -lang=sh -args 'a b' cat -stdin in", nick="joe", **{"persist-key": "k"}) == "in\n"
        )
        asked = server.requests[-1]
        assert asked.keys() == {
            "lang",
            "sourcefile",
            "execfile",
            "cmdline",
            "input",
            "date",
            "arguments",
            "code",
            "persist-key",
        }
        assert (asked["lang"], asked["sourcefile"], asked["cmdline"], asked["input"]) == (
            "sh",
            "prog.sh",
            "sh prog.sh",
            "in",
        )
        assert (asked["arguments"], asked["code"], asked["persist-key"]) == ("a b", "cat", "k")
        assert await door.code("-vm=old -lang=sh exit 4") == " [Exit 4]\n"
        await door.code(r"""-vm=old -lang=sh -args "'x y' c\'d" cat""")
        assert server.requests[-1]["arguments"] == r"'x y' c\'d"  # the guest cuts it, each language its own way
        assert await door.code("-vm=old -lang=sh echo hi", factoid="#c:f") == "hi\n"
        assert "factoid" in server.requests[-1]


async def test_a_guest_of_the_seeds_era_is_served_while_its_heart_beats(door: Door) -> None:
    async with HealthPort(beats=0.1) as health, foreign(door, seed=True, health=health.port):
        assert await door.code("-vm=old -lang=sh echo hi") == "hi\n"


async def test_each_sickness_of_a_foreign_guest_has_its_text(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pbot_guest, "_HEALTH", 0.3)
    monkeypatch.setattr(pbot_guest, "_BEAT_OLD", 0.3)
    (nobody,) = free_ports(1)
    async with foreign(door, health=nobody):
        assert await door.code("-vm=old -lang=sh echo hi") == "Virtual machine is offline.\n"
    async with HealthPort(b"no end") as health, foreign(door, health=health.port):
        assert await door.code("-vm=old -lang=sh x") == "Virtual machine is temporarily unavailable, try again soon.\n"
    async with foreign(door, seed=True, health=nobody):
        assert await door.code("-vm=old -lang=sh x") == "Virtual machine is resetting, try again soon.\n"
    async with foreign(door) as server:
        assert await door.code("-vm=old -lang=sh echo warm") == "warm\n"
        server.reply = lambda _request, _text: b"result:{\nresult:end\n"
        assert await door.code("-vm=old -lang=sh x") == "Virtual machine is misbehaving, try again soon.\n"


async def test_a_foreign_guest_is_reverted_by_the_operators_command(door: Door, tmp_path: Path) -> None:
    mark = tmp_path / "reverted"
    command = ("sh", "-c", f"echo x >>{mark}")
    async with foreign(door, revert=command) as server:
        assert await door.code("-vm=old -lang=sh echo fine") == "fine\n"
        assert not mark.exists()
        server.gate.clear()
        assert await door.code("-vm=old -lang=sh echo slow") == "[Timed-out]\n"
        server.gate.set()
        assert mark.read_text() == "x\n"
        assert await door.code("-vm=old -lang=sh echo '[Killed]'") == "[Killed]\n"
        assert mark.read_text() == "x\nx\n"
        assert await door.code("-vm=old -lang=sh echo mine") == "mine\n"
        await door.configure(relay=replace(CONFIG.relay, no_revert=True))
        assert await door.code("-vm=old -lang=sh echo '[Killed]'") == "[Killed]\n"
        assert mark.read_text() == "x\nx\n"


# Hostile callers --------------------------------------------------------------------------------------------------------------


async def test_a_line_without_end_is_refused_and_not_kept(door: Door) -> None:
    async def flood() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        with contextlib.suppress(OSError):
            for _ in range(1024):
                writer.write(b"x" * 65536)
                await writer.drain()
                assert door.relay.held <= 4 * (relay.LINE_MAX + 65536)
        reply_ = b""
        with contextlib.suppress(OSError):
            reply_ = await reader.read()
        writer.close()
        return reply_

    replies = await asyncio.gather(*(flood() for _ in range(4)))
    assert b"The request is longer than 2 MiB.\n" in replies
    assert set(replies) <= {b"The request is longer than 2 MiB.\n", b""}
    assert door.relay.held == 0
    assert await door.code("-lang=sh echo served") == "served\n"


async def test_many_silent_callers_do_not_shut_out_the_next(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_UNASKED_MAX", 20)
    silent = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(60)]
    assert await door.code("-lang=sh echo served") == "served\n"
    assert len(door.relay.unasked) <= 20
    reader, _writer = silent[0]
    assert await reader.read() == b"Virtual machine is temporarily unavailable, try again soon.\n"
    for _reader, writer in silent:
        writer.close()


async def test_memory_of_all_callers_together_is_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_HELD_MAX", 1 << 20)
    writers = []
    readers = []
    for _ in range(8):
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(b"x" * 300_000)
        readers.append(reader)
        writers.append(writer)
    await asyncio.sleep(0.5)
    assert door.relay.held <= (1 << 20) + (64 << 10)
    assert b"unavailable" in await readers[-1].read()
    for writer in writers:
        writer.close()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"[" * 10_000 + b"\n", b"the request is nested too deeply\n"),
        (b'{"code":' + b"[" * 10_000 + b"\n", b"the request is nested too deeply\n"),
        (b"-lang=sh echo \xff\xfe\n", b"The request is not UTF-8.\n"),
        (b'{"code":"-lang=sh echo \\ud800"}\n', b"?\n"),
        (b"-lang=sh echo a\x00b\n", None),
        (b'{"code":"-lang=sh -args \\"a\\u0000b\\" echo"}\n', None),
    ],
)
async def test_malformed_requests_are_refused_clearly(door: Door, line: bytes, text: bytes | None) -> None:
    answer = await door.ask(line)
    assert answer.endswith(b"\n")
    assert text is None or answer == text
    assert await door.code("-lang=sh echo served") == "served\n"


async def test_a_caller_who_resets_costs_nothing(door: Door) -> None:
    for _ in range(20):
        sock = socket.create_connection(("127.0.0.1", door.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.sendall(b"-lang=sh yes | head -c 200000\n")
        sock.close()
    assert await door.code("-lang=sh echo served") == "served\n"


# What the operator sees -------------------------------------------------------------------------------------------------------


async def test_each_run_has_one_line_in_the_log(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="pbotvm_qemu.runlog"):
        await door.code("-lang=sh echo secret words", nick="joe\n")
        await door.code("-lang=sh exit 4")
        await door.code("-lang=nope x")
    lines = [record.getMessage() for record in caplog.records if record.name == "pbotvm_qemu.runlog"]
    assert [re.search(r"result=(\S+)", line)[1] for line in lines] == ["0", "4", "unknown-language"]  # type: ignore[index]
    assert "caller=#c/joe?" in lines[0].replace('"', "")
    for key in ("id=1", "from=relay", "language=sh", "wall_s=", "queue_s=", "machine=pbot-vm"):
        assert key in lines[0]
    assert "secret" not in "".join(lines)


async def test_run_counts_reach_whoever_watches(door: Door) -> None:
    seen: list[str] = []
    door.runs.watch(lambda record, _wall: seen.append(record.result))
    await door.code("-lang=sh true")
    assert seen == ["0"]


def test_replies_that_tests_do_not_reach_are_the_predecessors() -> None:
    assert (reply.RESETTING, pbot.DENIED[:13], paste.__name__) == (
        "Virtual machine is resetting, try again soon.", "Access denied", "pbotvm_qemu.paste",
    )  # fmt: skip
