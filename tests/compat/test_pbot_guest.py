"""Our back door against PBot's guest-server: framing, reading, late answers, both eras' signs of life."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbotvm_qemu import pbot_guest
from pbotvm_qemu.endpoints import Endpoint
from pbotvm_qemu.errors import GuestError, NeverRanError, RunLostError
from pbotvm_qemu.pbot_guest import OfflineError, PBotGuest, ResettingError, Results, encode
from tests.compat import peers
from tests.compat.peers import GuestServer, HealthPort, frame_result, request, sized
from tests.support import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 20.0


# Framing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "lines"),
    [(3999, [3999]), (4000, [4000]), (4001, [4000, 1]), (8000, [4000, 4000]), (9164, [4000, 4000, 1164])],
)
def test_a_request_is_cut_into_lines_of_4000_bytes_and_ends_with_an_empty_one(size: int, lines: list[int]) -> None:
    data = encode(sized(size))
    assert data.endswith(b"\n\n")
    assert [len(line) for line in data[:-2].split(b"\n")] == lines


def test_a_character_may_be_cut_in_two() -> None:
    value = request(code="€" * 3000)
    lines = encode(value)[:-2].split(b"\n")
    assert json.loads(b"".join(lines)) == value
    with pytest.raises(UnicodeDecodeError):
        lines[0].decode()


def test_the_seed_gets_one_line_and_its_own_end() -> None:
    data = encode(sized(9164), seed=True)
    assert data.endswith(b"\n:end:\n")
    assert data.count(b"\n") == 2


def test_no_byte_acts_on_a_tty() -> None:
    value = request(code="".join(map(chr, range(0x80))))
    data = encode(value)
    assert json.loads(data.replace(b"\n", b"")) == value
    assert not {byte for byte in data if byte < 32 or byte == 127} - {10}


@pytest.mark.parametrize("before", range(7))
def test_no_line_of_a_request_looks_like_an_answer(before: int) -> None:
    """Its echo would be read as one."""
    bare = len(json.dumps(request(code=""))) - 2
    code = "x" * (4000 - bare - before) + "result:end" + "result:{}" * 2000
    lines = encode(request(code=code))[:-2].split(b"\n")
    assert not [line for line in lines if line.startswith(b"result:")]
    assert max(map(len, lines)) <= 4000
    assert json.loads(b"".join(lines))["code"] == code


# Reading -----------------------------------------------------------------------------------------------------------------


def read(*pieces: bytes, close: bool = False) -> str:
    results = Results(limit=1 << 20)
    for piece in pieces:
        results.feed(piece)
    if close:
        results.close()
    assert results.done
    return results.text


END = b"result:end\n"


@pytest.mark.parametrize(
    ("transcript", "text"),
    [
        (b'result:{"result":"hi\\n"}\n' + END, "hi\n\n"),
        (b'result:{"result":"hi\\n"}\r\nresult:end\r\n', "hi\n\n"),
        (b'{"lang":"sh"}\r\n\r\n[  1.2] kernel says\r\nresult:{"result":"x"}\r\n' + END, "x\n"),
        (b'result:{"result":"one"}\nresult:{"result":"two"}\n' + END, "one\ntwo\n"),
        (b'result:{"result":"one"}\nan old guest goes on\n\n' + END, "one\nan old guest goes on\n\n"),
        (b'result:{"result":"\xff"}\n' + END, "\\xFF\n"),
        (b'result:{"result":"a"}\nb\xe9\n' + END, "a\nb\\xE9\n"),
        ('result:{"result":"€"}\n'.encode() + END, "€\n"),
        (b'result:{"result":"\\ud800"}\n' + END, "?\n"),
        (b"noise only\n" + END, ""),
        (END, ""),
    ],
)
def test_transcripts_are_read_as_the_predecessor_reads_them(transcript: bytes, text: str) -> None:
    assert read(transcript) == text
    assert read(*(bytes([byte]) for byte in transcript)) == text


def test_the_end_of_the_stream_ends_the_answer() -> None:
    assert read(b'result:{"result":"half"}\nmore', close=True) == "half\nmore\n"


@pytest.mark.parametrize(
    "line",
    [b"result:", b"result:{", b"result:[1]", b'result:{"x":1}', b'result:{"result":1}', b"result:" + b"[" * 9999],
)
def test_what_is_no_result_is_an_error(line: bytes) -> None:
    with pytest.raises(GuestError):
        Results(limit=1 << 20).feed(line + b"\n")


def test_an_answer_is_bounded_with_and_without_lines() -> None:
    with pytest.raises(GuestError, match="over 1000 bytes"):
        Results(limit=1000).feed(b"x" * 1001)
    with pytest.raises(GuestError, match="over 1000 bytes"):
        Results(limit=1000).feed(b'result:{"result":"a"}\n' + b"line\n" * 1000)


def test_lines_of_one_piece_take_time_in_proportion() -> None:
    def seconds(count: int) -> float:
        best = 1e9
        for _ in range(3):
            results, begin = Results(limit=1 << 24), time.process_time()
            results.feed(b"\n" * count)
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(1 << 18) < 40 * seconds(
        1 << 14
    )  # sixteen times as many; 256 times as long when each copies the rest


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_an_error(data: bytes) -> None:
    results = Results(limit=1 << 16)
    try:
        results.feed(b'result:{"result":"a"}\n' + data)
        results.close()
    except GuestError:
        return
    assert results.text.startswith("a\n")


# A guest-server behind a tty -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["today", "seed"])
def server(request: pytest.FixtureRequest) -> Iterator[GuestServer]:
    running = GuestServer(seed=request.param == "seed")
    yield running
    running.end()


def guest(server: GuestServer, *, health: int = 0, queue: int = 8, queue_wait: float = SECONDS) -> PBotGuest:
    endpoint = Endpoint(name="old", serial=server.port, health=health, seed=server.seed)
    return PBotGuest(endpoint, queue=queue, queue_wait=queue_wait, output=1 << 16)


async def test_requests_come_through_echo_and_cr_lf(server: GuestServer) -> None:
    talk = guest(server)
    for number in range(3):
        text, _ = await talk.run(request(code=f"echo {number}"), timeout=SECONDS)
        assert text == f"{number}\n\n"


@pytest.mark.parametrize("size", [3999, 4000, 4001, 9164])
async def test_long_requests_come_through_a_tty(size: int) -> None:
    server = GuestServer()
    try:
        value = sized(size)
        text, _ = await guest(server).run(value, timeout=SECONDS)
        assert int(text) == len(str(value["code"])) + 1
        assert server.requests[-1] == value
        assert max(len(line) for line in server.blocks[-1].split(b"\n")) <= 4000
    finally:
        server.end()


async def test_callers_at_once_take_turns_and_get_their_own(server: GuestServer) -> None:
    talk = guest(server)
    answers = await asyncio.gather(*(talk.run(request(code=f"echo {n}"), timeout=SECONDS) for n in range(8)))
    assert [text for text, _ in answers] == [f"{n}\n\n" for n in range(8)]


async def test_a_late_answer_never_reaches_the_next_caller(server: GuestServer) -> None:
    talk = guest(server)
    await talk.run(request(code="echo warm"), timeout=SECONDS)
    server.gate.clear()
    with pytest.raises(TimeoutError):
        await talk.run(request(code="echo secret"), timeout=0.3)
    following = asyncio.create_task(talk.run(request(code="echo mine"), timeout=SECONDS))
    await asyncio.sleep(0.3)  # the next caller is connected, and waits
    server.gate.set()
    assert (await following)[0] == "mine\n\n"


async def test_a_caller_who_is_cancelled_leaves_nothing_to_the_next(server: GuestServer) -> None:
    talk = guest(server)
    server.gate.clear()
    task = asyncio.create_task(talk.run(request(code="echo secret"), timeout=SECONDS))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    threading.Timer(0.3, server.gate.set).start()
    assert (await talk.run(request(code="echo mine"), timeout=SECONDS))[0] == "mine\n\n"


async def test_half_a_request_of_another_program_spoils_nothing() -> None:
    server = GuestServer()
    try:
        _reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b'{"lang":"sh","code":"echo gone')
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()
        assert (await guest(server).run(request(code="echo mine"), timeout=SECONDS))[0] == "mine\n\n"
    finally:
        server.end()


async def test_a_broken_answer_is_an_error_and_the_next_is_right(server: GuestServer) -> None:
    talk = guest(server)
    await talk.run(request(), timeout=SECONDS)
    server.reply = lambda _request, _text: b"result:{broken\nresult:end\n"
    with pytest.raises(GuestError):
        await talk.run(request(), timeout=SECONDS)
    server.reply = lambda _request, text: frame_result(text)
    assert (await talk.run(request(code="echo right"), timeout=SECONDS))[0] == "right\n\n"


async def test_a_full_queue_and_a_long_wait_are_refused(server: GuestServer) -> None:
    talk = guest(server, queue=1, queue_wait=0.3)
    await talk.run(request(), timeout=SECONDS)
    server.gate.clear()
    running = asyncio.create_task(talk.run(request(), timeout=SECONDS))
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(talk.run(request(), timeout=SECONDS))
    await asyncio.sleep(0.05)
    with pytest.raises(NeverRanError, match="1 requests wait already"):
        await talk.run(request(), timeout=SECONDS)
    with pytest.raises(NeverRanError, match="not free within"):
        await waiting
    server.gate.set()
    assert (await running)[0] == "hi\n\n"


async def test_nobody_at_the_port_is_offline() -> None:
    (port,) = free_ports(1)
    talk = PBotGuest(Endpoint(name="old", serial=port), queue=1, queue_wait=1, output=1000)
    with pytest.raises(OfflineError):
        await talk.run(request(), timeout=SECONDS)


async def test_a_guest_that_closes_is_lost() -> None:
    async def close(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        talk = PBotGuest(Endpoint(name="old", serial=port), queue=1, queue_wait=1, output=1000)
        talk._unsettled = False
        with pytest.raises(RunLostError):
            await talk.run(request(), timeout=SECONDS)
        with pytest.raises(NeverRanError):  # unsettled now, and nothing settles it
            await talk.run(request(), timeout=SECONDS)


async def test_without_vsock_on_the_host_the_serial_line_is_used(
    server: GuestServer, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = Endpoint(name="old", serial=server.port, cid=4242, vport=5555, seed=server.seed)
    talk = PBotGuest(endpoint, queue=1, queue_wait=SECONDS, output=1 << 16)
    with caplog.at_level("WARNING"):
        assert (await talk.run(request(code="echo serial"), timeout=SECONDS))[0] == "serial\n\n"
    assert "using the serial line" in caplog.text


# Health ------------------------------------------------------------------------------------------------------------------


def healthy(port: int, *, seed: bool = False) -> PBotGuest:
    return PBotGuest(Endpoint(name="old", serial=1, health=port, seed=seed), queue=1, queue_wait=1, output=1000)


@pytest.mark.parametrize("script", [b"vmstat\r\n\r\n:END\r\n", b"vmstat\n:END\n", b":END\r\n"])
async def test_a_healthy_guest_is_asked_with_one_line_feed(script: bytes) -> None:
    async with HealthPort(script) as port:
        await healthy(port.port).check()
        assert port.heard == [b"\n"]


@pytest.mark.parametrize("script", [b"", b"vmstat\r\n", b"x:END\r\n"])
async def test_a_guest_without_the_terminator_is_unavailable(script: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pbot_guest, "_HEALTH", 0.3)
    async with HealthPort(script) as port:
        with pytest.raises(NeverRanError) as caught:
            await healthy(port.port).check()
    assert not isinstance(caught.value, OfflineError)


async def test_no_health_port_is_offline() -> None:
    (port,) = free_ports(1)
    with pytest.raises(OfflineError):
        await healthy(port).check()


async def test_the_heart_of_the_seed_is_heard() -> None:
    async with HealthPort(beats=0.1) as port:
        talk = healthy(port.port, seed=True)
        await talk.check()
        await talk.close()


async def test_a_heart_that_stops_is_resetting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pbot_guest, "_BEAT_OLD", 0.3)
    async with HealthPort(beats=60) as port:
        talk = healthy(port.port, seed=True)
        await talk.check()
        await asyncio.sleep(0.5)
        with pytest.raises(ResettingError):
            await talk.check()
        await talk.close()


async def test_our_own_agent_passes_for_a_guest_of_either_era() -> None:
    """The two ends of ours, each unaware of the other, over a pseudo terminal."""
    with peers.agent() as agent:
        server = await asyncio.start_server(lambda r, w: bridge(agent.health, r, w), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            talk = healthy(port, seed=True)
            await talk.check()
            await talk.close()
            await healthy(port).check()


async def bridge(fd: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect a TCP peer and a pseudo terminal, as QEMU does."""
    loop = asyncio.get_running_loop()
    import os

    def pump() -> None:
        writer.write(os.read(fd, 4096))

    loop.add_reader(fd, pump)
    try:
        while data := await reader.read(4096):
            os.write(fd, data)
    except (OSError, asyncio.CancelledError):
        pass
    finally:
        loop.remove_reader(fd)
        writer.close()
