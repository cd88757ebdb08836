"""The real agent, as an ordinary user on this host, over a socketpair instead of a virtio-serial port."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pbotvm_qemu import paths
from pbotvm_qemu.channel import Channel, Outcome
from pbotvm_qemu.errors import GuestError, NeverRanError, RunLostError
from pbotvm_qemu.guest import spec, wire
from pbotvm_qemu.guest.wire import FrameType
from pbotvm_qemu.process import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pbotvm_qemu.channel import Stream

NOBODY = 65534
SECONDS = 20.0  # for anything that must come; a test that passes waits much less

# Everything is imported before the rights are given up: the interpreter may lie in root's home.
BOOT = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
uid = int(sys.argv.pop(1))
from guest.agent import main
import guest.source.build  # while the standard library can still be read
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
main()
"""


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, f"not within {SECONDS:.0f} s: {what}"
        time.sleep(0.01)


class Agent:
    """A running agent and the host's end of its channel."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home.parent / "log"
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(SECONDS)
        self.decoder = wire.Decoder()
        self.frames: deque[wire.Frame] = deque()
        fd = theirs.fileno()
        argv = [sys.executable, "-I", "-c", BOOT, str(paths.guest_package().parent), str(NOBODY)]
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, f"fd={fd}", f"home={home}", "user=nobody"],
                pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        assert wire.decode_json(self.next(FrameType.HELLO).payload)["nonce"] == "started"

    def end(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.wait()

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def receive(self) -> Iterator[wire.Frame]:
        """Yield frames until the agent ends, which fails the test that still wants one."""
        while True:
            while self.frames:
                yield self.frames.popleft()
            data = self.sock.recv(1 << 16)
            if not data:
                pytest.fail(f"the agent ended: {self.log.read_text()[-2000:]}")
            self.frames += self.decoder.feed(data)

    def next(self, *types: FrameType) -> wire.Frame:
        return next(frame for frame in self.receive() if frame.type in types)

    def answers(self) -> bool:
        """Tell whether it answers a new `hello`."""
        nonce = os.urandom(8).hex()
        self.decoder = wire.Decoder()
        self.decoder.expect_hello(nonce)
        self.send(wire.encode_json(FrameType.HELLO, 0, {"nonce": nonce}))
        return self.next(FrameType.HELLO).type == FrameType.HELLO

    def refusal(self, frame: bytes) -> dict[str, object]:
        self.send(frame)
        return wire.decode_json(self.next(FrameType.ERROR).payload)

    def directories(self) -> list[str]:
        return sorted(entry.name for entry in self.home.iterdir())


@pytest.fixture
def agent() -> Iterator[Agent]:
    top = Path(tempfile.mkdtemp(prefix="pbotvm-agent-", dir="/tmp"))
    home = top / "home"
    home.mkdir()
    if os.geteuid() == 0:
        top.chmod(0o755)
        os.chown(home, NOBODY, NOBODY)
    running = Agent(home)
    try:
        yield running
    finally:
        running.end()
        shutil.rmtree(top)


@pytest.fixture
async def channel(agent: Agent) -> AsyncIterator[Channel]:
    opened = await Channel.open(agent.sock)
    try:
        await opened.handshake(SECONDS)
        yield opened
    finally:
        await opened.close()


def wants(  # what a test leaves out does not matter to it
    *steps: list[str],
    files: dict[str, bytes] | None = None,
    stdin: bool = False,
    collect: tuple[str, ...] = (),
    wall: float = SECONDS,
    cpu: float = 0,
    file_size: int = 1 << 30,
    output: int = 64 << 20,
    build: float = 0,
    report: tuple[str, ...] = (),
) -> spec.RunSpec:
    return spec.RunSpec(
        files=tuple(spec.File(name, len(data)) for name, data in (files or {}).items()),
        steps=tuple(tuple(step) for step in steps),
        env={},
        stdin=stdin,
        limits=spec.Limits(wall=wall, cpu=cpu, memory=0, processes=64, file_size=file_size, output=output, build=build),
        collect=collect,
        report=report,
    )


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


class Heard:
    """What a program printed."""

    def __init__(self) -> None:
        self.pieces: list[tuple[Stream, bytes]] = []

    async def __call__(self, stream: Stream, data: bytes) -> None:
        self.pieces.append((stream, data))

    @property
    def stdout(self) -> bytes:
        return b"".join(data for stream, data in self.pieces if stream == "stdout")

    @property
    def stderr(self) -> bytes:
        return b"".join(data for stream, data in self.pieces if stream == "stderr")


async def pieces(data: bytes, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def execute(
    channel: Channel, wanted: spec.RunSpec, content: list[bytes] | None = None, stdin: bytes = b""
) -> tuple[Outcome, Heard]:
    heard = Heard()
    outcome = await channel.execute(wanted, content or [], on_output=heard, stdin=pieces(stdin))
    return outcome, heard


async def test_hello_tells_who_it_is(agent: Agent) -> None:
    channel = await Channel.open(agent.sock)
    try:
        hello = await channel.handshake(SECONDS)
    finally:
        await channel.close()
    assert (hello.transport, hello.kernel, hello.hostname) == ("socket", os.uname().release, os.uname().nodename)
    assert hello.agent


async def test_ping_comes_back(channel: Channel) -> None:
    assert 0 < await channel.ping(timeout=SECONDS) < SECONDS


def test_ping_brings_the_same_bytes(agent: Agent) -> None:
    payload = os.urandom(wire.PAYLOAD_MAX)
    agent.send(wire.encode(FrameType.PING, 9, payload))
    assert agent.next(FrameType.PING) == (FrameType.PING, 9, payload)


@pytest.mark.parametrize("entropy", ["é" * 40, "\ud800" * 40, "*" * 40, "QUJD", "A" * 10_000])
def test_random_numbers_that_are_none_are_refused_and_the_agent_lives(agent: Agent, entropy: str) -> None:
    agent.send(wire.encode_json(FrameType.RESUME, 9, {"entropy": entropy}), wire.encode(FrameType.PING, 10, b"x"))
    assert wire.decode_json(agent.next(FrameType.ERROR).payload)["code"] == "protocol"
    assert agent.next(FrameType.PING).payload == b"x"


async def test_exit_status_and_both_streams_arrive(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(sh("echo out; echo err >&2; exit 7")))
    assert (outcome.status, outcome.signal, outcome.exit_code) == (7, None, 7)
    assert (heard.stdout, heard.stderr) == (b"out\n", b"err\n")
    assert (outcome.stage, outcome.limit, outcome.message) == ("run", None, "")


async def test_program_starts_in_its_own_directory_with_a_clean_environment(channel: Channel, agent: Agent) -> None:
    _, heard = await execute(channel, wants(sh('pwd; echo "$HOME $USER $TERM"; env | grep -c ^PYTEST')))
    directory, home, leaked = heard.stdout.decode().splitlines()
    assert Path(directory).parent == agent.home
    assert home == f"{directory} nobody dumb"
    assert leaked == "0"


async def test_nothing_is_left_of_a_run(channel: Channel, agent: Agent) -> None:
    await execute(channel, wants(sh("mkdir -p a/b; echo x > a/b/c; ln -s /etc a/etc")))
    await asyncio.to_thread(until, lambda: agent.directories() == [], "the run's directory is removed")


async def test_death_by_signal_is_told_from_a_status(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(sh("kill -SEGV $$")))
    assert (outcome.status, outcome.signal, outcome.exit_code) == (None, signal.SIGSEGV, 139)


def test_signal_from_the_host_reaches_the_program(agent: Agent) -> None:
    script = "trap 'echo caught; exit 3' USR1; echo up; while :; do sleep 0.01; done"
    agent.send(wire.encode_json(FrameType.RUN, 1, wants(sh(script)).to_json()))
    assert agent.next(FrameType.STDOUT).payload == b"up\n"
    agent.send(wire.encode_json(FrameType.SIGNAL, 1, {"signal": int(signal.SIGUSR1)}))
    assert agent.next(FrameType.STDOUT).payload == b"caught\n"
    assert wire.decode_json(agent.next(FrameType.EXIT).payload)["status"] == 3


@pytest.mark.parametrize("number", [0, -1, 65, 10**9])
def test_signal_that_there_is_not_does_no_harm(agent: Agent, number: int) -> None:
    agent.send(wire.encode_json(FrameType.RUN, 1, wants(sh("echo up; read x; exit 4"), stdin=True).to_json()))
    agent.next(FrameType.STDOUT)
    agent.send(wire.encode_json(FrameType.SIGNAL, 1, {"signal": number}), wire.encode(FrameType.STDIN, 1))
    assert wire.decode_json(agent.next(FrameType.EXIT).payload)["status"] == 4


async def test_wall_limit_ends_the_program(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(sh("echo before; sleep 60; echo after"), wall=0.3))
    assert (outcome.timed_out, outcome.limit, outcome.exit_code) == (True, "wall", 124)
    assert heard.stdout == b"before\n"
    assert outcome.wall_s < SECONDS


async def test_cpu_limit_is_named(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(sh("while :; do :; done"), cpu=1))
    assert (outcome.limit, outcome.signal, outcome.timed_out) == ("cpu", signal.SIGXCPU, False)


async def test_file_size_limit_is_named(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(["dd", "if=/dev/zero", "of=big", "bs=1k", "count=9"], file_size=4096))
    assert (outcome.limit, outcome.signal) == ("file_size", signal.SIGXFSZ)


async def test_output_limit_cuts_to_the_byte_and_says_so(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(["yes"], output=100_001))
    assert (outcome.truncated, outcome.limit) == (True, "output")
    assert len(heard.stdout) == 100_001


async def test_output_of_exactly_the_limit_is_not_cut(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(["head", "-c", "5000", "/dev/zero"], output=5000))
    assert (outcome.truncated, outcome.limit, outcome.status, len(heard.stdout)) == (False, None, 0, 5000)


async def test_input_of_5_mb_comes_back_byte_for_byte(channel: Channel) -> None:
    data = os.urandom(5_000_000)
    outcome, heard = await execute(channel, wants(["cat"], stdin=True), stdin=data)
    assert outcome.status == 0
    assert heard.stdout == data


async def test_input_that_nobody_reads_holds_nothing_up(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(sh("sleep 0.2; echo done"), stdin=True), stdin=bytes(3_000_000))
    assert (outcome.status, heard.stdout) == (0, b"done\n")


async def test_program_without_input_reads_its_end_at_once(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(["cat"]))
    assert (outcome.status, heard.stdout) == (0, b"")


async def test_slow_host_makes_the_program_wait_and_loses_nothing(channel: Channel) -> None:
    got = bytearray()

    async def slowly(_stream: Stream, data: bytes) -> None:
        if not got:
            await asyncio.sleep(0.3)  # much longer than the program needs to fill pipe, window and socket
        got.extend(data)

    script = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 20000)"
    python = shutil.which("python3", path="/usr/bin:/bin")
    step = [python, "-I", "-c", script] if python else sh("yes 0123456789abcde | head -c 5120000")
    outcome = await channel.execute(wants(step), [], on_output=slowly)
    assert (outcome.status, outcome.truncated, len(got)) == (0, False, 5_120_000)


async def test_files_are_put_and_collected_whole(channel: Channel) -> None:
    big = os.urandom(3_000_000)
    files = {"big file": big, "empty": b"", "ümlaut": b"x"}
    wanted = wants(sh("cp 'big file' copy; ls"), files=files, collect=("copy", "empty", "ümlaut"))
    outcome, heard = await execute(channel, wanted, list(files.values()))
    assert heard.stdout.decode().split("\n")[:-1] == ["big file", "copy", "empty", "ümlaut"]
    assert outcome.files == {"copy": big, "empty": b"", "ümlaut": b"x"}
    assert outcome.missing == {}


async def test_collected_file_that_is_not_there_is_named(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(["true"], collect=("nothing",)))
    assert outcome.files == {}
    assert outcome.missing == {"nothing": "No such file or directory"}
    assert outcome.status == 0


@pytest.mark.parametrize("make", ["ln -s /etc/passwd it", "mkdir it", "mkfifo it", "ln -s /dev/zero it"])
async def test_only_a_plain_file_is_collected(channel: Channel, make: str) -> None:
    outcome, _ = await execute(channel, wants(sh(make), collect=("it",)))
    assert outcome.files == {}
    assert list(outcome.missing) == ["it"]


async def test_build_that_fails_is_the_end(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(sh("echo no such header; exit 1"), sh("echo ran")))
    assert (outcome.stage, outcome.status) == ("build", 1)
    assert (heard.stdout, heard.stderr) == (b"", b"no such header\n")


async def test_build_goes_before_the_program_which_gets_the_input(channel: Channel) -> None:
    build = sh("cat > got; echo warning; echo 'cat got -' > prog")
    outcome, heard = await execute(channel, wants(build, ["sh", "prog"], stdin=True), stdin=b"input")
    assert (outcome.stage, outcome.status) == ("run", 0)
    assert (heard.stdout, heard.stderr) == (b"input", b"warning\n")


async def test_wall_limit_counts_all_steps_together(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(sh("sleep 0.3"), sh("sleep 30"), wall=0.6))
    assert (outcome.limit, outcome.stage) == ("wall", "run")


async def test_a_build_can_have_time_of_its_own(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(sh("sleep 0.8"), sh("sleep 0.1"), wall=0.6, build=30))
    assert (outcome.limit, outcome.status) == (None, 0)
    assert outcome.wall_s < 0.6 < outcome.build_s
    slow, _ = await execute(channel, wants(sh("sleep 30"), sh("true"), build=0.3))
    assert (slow.limit, slow.stage, slow.timed_out) == ("wall", "build", True)


REPORT = ("sh", "-c", "echo reported; echo aside >&2; exit 9")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("touch core; exit 3", b"reported\n"),
        ("touch core; echo word", b"word\n"),
        ("touch core; echo word; kill -SEGV $$", b"word\nreported\n"),
        ("exit 3", b""),
        ("mkdir core", b""),
    ],
)
async def test_what_a_silent_or_crashed_program_left_is_looked_at(channel: Channel, program: str, said: bytes) -> None:
    outcome, heard = await execute(channel, wants(sh(program), report=REPORT))
    assert heard.stdout == said
    assert (b"aside" in heard.stderr) == (b"reported" in said)
    assert (outcome.status, outcome.signal) in ((3, None), (0, None), (None, 11))
    assert outcome.status != 9


async def test_the_look_at_what_a_program_left_has_an_end(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ("sh", "-c", "echo begun; head -c 100000 /dev/zero")
    outcome, heard = await execute(channel, wants(sh("touch core"), report=report, output=1000))
    assert (outcome.status, outcome.signal, outcome.truncated) == (0, None, True)
    assert len(heard.stdout) == 1000


async def test_a_step_of_our_own_that_there_is_not_is_named(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(["pbotvm:nonsense"]))
    assert (outcome.status, heard.stderr) == (126, b"there is no step 'nonsense'\n")
    outcome, heard = await execute(channel, wants(["pbotvm:build", "no json", "cc"]))
    assert outcome.status == 126
    assert b"pbotvm:build failed: JSONDecodeError" in heard.stderr


async def test_a_step_of_our_own_has_no_way_to_the_host(channel: Channel) -> None:
    outcome, heard = await execute(channel, wants(["pbotvm:run", "sh", "-c", "ls /proc/$$/fd"]))
    assert outcome.status == 0
    assert set(heard.stdout.split()) <= {b"0", b"1", b"2", b"3", b"10"}  # 3 and 10 are ls's and the shell's


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
async def test_c_is_completed_compiled_and_run(channel: Channel) -> None:
    wanted = {
        "kind": "c",
        "source": "prog.c",
        "headers": ["stdio.h"],
        "defines": [],
        "flags": ["-noheaders", "-include", "stdio.h"],
    }
    code = b'puts("hi"); return 3;'
    steps = (["pbotvm:build", json.dumps(wanted), "gcc", ".prog.c", "-o", "prog"], ["pbotvm:run", "./prog"])
    outcome, heard = await execute(channel, wants(*steps, files={"prog.c": code}, build=60), [code])
    assert (outcome.status, heard.stdout, heard.stderr) == (3, b"hi\n", b"")
    wrong = b"int a;\nint b = nonsense;"
    outcome, heard = await execute(channel, wants(*steps, files={"prog.c": wrong}, build=60), [wrong])
    assert (outcome.stage, outcome.status) == ("build", 1)
    assert b"prog.c:2:9: error:" in heard.stderr


async def test_program_that_cannot_be_started_is_told_from_one_that_failed(channel: Channel) -> None:
    outcome, _ = await execute(channel, wants(["/no/such/program"]))
    assert outcome.message == "cannot be started: /no/such/program: No such file or directory"


def test_unknown_frame_type_is_refused_by_number(agent: Agent) -> None:
    answer = agent.refusal(wire.encode(200, 5))
    assert answer["code"] == "unknown-type"
    assert "200" in str(answer["message"])
    assert agent.answers()


def run_frame(id_: int = 1, **changes: object) -> bytes:
    value = wants(["true"]).to_json() | changes
    return wire.encode_json(FrameType.RUN, id_, {key: item for key, item in value.items() if item is not ...})


LIMITS = wants(["true"]).limits._asdict()


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"name": "../x", "size": 1}]},
        {"files": [{"name": "..", "size": 1}]},
        {"files": [{"name": "", "size": 1}]},
        {"files": [{"name": "a\0b", "size": 1}]},
        {"files": [{"name": "x" * 256, "size": 1}]},
        {"files": [{"name": "x", "size": -1}]},
        {"files": [{"name": "x", "size": True}]},
        {"files": [{"name": "x", "size": wire.FILES_BYTES_MAX + 1}]},
        {"files": [{"name": "x", "size": 1}, {"name": "x", "size": 1}]},
        {"files": [{"name": str(number), "size": 0} for number in range(wire.FILES_MAX + 1)]},
        {"files": [{"name": str(number), "size": wire.FILES_BYTES_MAX} for number in range(2)]},
        {"files": "x"},
        {"files": ["x"]},
        {"collect": ["../x"]},
        {"collect": [str(number) for number in range(wire.FILES_MAX + 1)]},
        {"steps": []},
        {"steps": [[]]},
        {"steps": [[""]]},
        {"steps": [["a\0b"]]},
        {"steps": [[1]]},
        {"steps": [["\ud800"]]},
        {"steps": [["x"] * (wire.ARGV_MAX + 1)]},
        {"steps": [["true"]] * 9},
        {"env": {"A=B": "x"}},
        {"env": {"": "x"}},
        {"env": {"A": "\0"}},
        {"env": {"A": 1}},
        {"env": []},
        {"limits": ...},
        {"limits": {}},
        {"limits": LIMITS | {"wall": 0}},
        {"limits": LIMITS | {"wall": float("nan")}},
        {"limits": LIMITS | {"output": float("inf")}},
        {"limits": LIMITS | {"processes": "9"}},
    ],
    ids=lambda changes: json.dumps(changes, default=str)[:60],
)
def test_malformed_run_is_refused_and_harms_nobody(agent: Agent, changes: dict[str, Any]) -> None:
    assert agent.refusal(run_frame(**changes))["code"] == "bad-request"
    assert agent.directories() == []
    assert agent.answers()


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b"[" * 60000, b'{"a":' * 10000])
def test_run_that_holds_no_json_object_is_refused(agent: Agent, payload: bytes) -> None:
    assert agent.refusal(wire.encode(FrameType.RUN, 1, payload))["code"] == "protocol"
    assert agent.answers()


def test_run_id_0_and_one_in_use_are_refused(agent: Agent) -> None:
    assert agent.refusal(run_frame(0))["code"] == "bad-request"
    agent.send(run_frame(3, steps=[["sleep", "60"]]))
    assert agent.refusal(run_frame(3))["code"] == "bad-request"


def test_one_run_too_many_is_refused_as_busy(agent: Agent) -> None:
    waiting = [run_frame(number + 1, files=[{"name": "x", "size": 1}]) for number in range(wire.RUNS_MAX)]
    agent.send(*waiting)
    assert agent.refusal(run_frame(1000))["code"] == "busy"


def test_more_file_data_than_announced_ends_the_run(agent: Agent) -> None:
    agent.send(run_frame(1, files=[{"name": "x", "size": 3}]))
    assert agent.refusal(wire.encode(FrameType.DATA, 1, b"1234"))["code"] == "protocol"
    assert wire.decode_json(agent.next(FrameType.EXIT).payload)["cancelled"] is True


def test_more_input_than_the_credit_ends_the_run(agent: Agent) -> None:
    agent.send(run_frame(1, steps=[["sleep", "60"]], stdin=True))
    agent.send(*[wire.encode(FrameType.STDIN, 1, bytes(wire.PAYLOAD_MAX)) for _ in range(10)])
    assert wire.decode_json(agent.next(FrameType.ERROR).payload)["code"] == "protocol"
    assert wire.decode_json(agent.next(FrameType.EXIT).payload)["cancelled"] is True


@pytest.mark.parametrize("type_", [FrameType.DATA, FrameType.STDIN, FrameType.CREDIT, FrameType.SIGNAL])
def test_frame_of_a_run_that_has_ended_is_nothing(agent: Agent, type_: FrameType) -> None:
    agent.send(wire.encode(type_, 77, b"123"), wire.encode(FrameType.PING, 78))
    assert next(agent.receive()).type == FrameType.PING


async def test_20_runs_at_once_are_not_mixed(channel: Channel) -> None:
    async def one(number: int) -> tuple[Outcome, bytes]:
        line = f"{number:03}\n".encode()
        script = f"for i in 1 2 3 4 5; do echo {number:03}; sleep 0.01; done; cat x; exit {number}"
        outcome, heard = await execute(channel, wants(sh(script), files={"x": line}), [line])
        return outcome, heard.stdout

    results = await asyncio.gather(*map(one, range(20)))
    for number, (outcome, stdout) in enumerate(results):
        assert outcome.status == number
        assert stdout == f"{number:03}\n".encode() * 6


async def test_cancelled_run_is_killed_and_the_channel_goes_on(channel: Channel) -> None:
    pids: asyncio.Queue[int] = asyncio.Queue()

    async def listen(_stream: Stream, data: bytes) -> None:
        await pids.put(int(data))

    task = asyncio.create_task(channel.execute(wants(sh("echo $$; exec sleep 60")), [], on_output=listen))
    program = Identity.of(await pids.get())
    assert program
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: not program.alive(), "the cancelled program is gone")
    assert (await execute(channel, wants(["true"])))[0].status == 0


def test_program_that_has_hardly_started_is_killed_too(agent: Agent) -> None:
    agent.send(run_frame(1, steps=[["sleep", "60"]]), wire.encode_json(FrameType.CANCEL, 1, {}))
    assert wire.decode_json(agent.next(FrameType.EXIT).payload)["truncated"] is False
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
    until(lambda: not children.read_text(), "the program is gone")


async def test_program_inherits_no_descriptor_but_its_streams(channel: Channel) -> None:
    _, heard = await execute(channel, wants(sh("for fd in /proc/$$/fd/*; do readlink $fd; done")))
    assert b"socket" not in heard.stdout


def test_cancel_is_answered_by_exit(agent: Agent) -> None:
    agent.send(run_frame(1, steps=[sh("echo up; exec sleep 60")]))
    agent.next(FrameType.STDOUT)
    agent.send(wire.encode_json(FrameType.CANCEL, 1, {}))
    answer = wire.decode_json(agent.next(FrameType.EXIT).payload)
    assert (answer["cancelled"], answer["signal"], answer["timed_out"]) == (True, signal.SIGKILL, False)


def test_what_a_program_left_running_dies_with_it(agent: Agent) -> None:
    agent.send(run_frame(1, steps=[sh("sleep 60 & echo $!")]))
    left = Identity.of(int(agent.next(FrameType.STDOUT).payload))
    answer = wire.decode_json(agent.next(FrameType.EXIT).payload)
    assert (answer["status"], answer["truncated"]) == (0, False)
    until(lambda: left is None or not left.alive(), "what the program started is gone")


def test_host_that_goes_away_takes_its_runs_with_it(agent: Agent) -> None:
    agent.send(run_frame(1, steps=[sh("sleep 60 & echo $! $$; wait")]))
    programs = [Identity.of(int(word)) for word in agent.next(FrameType.STDOUT).payload.split()]
    assert len(programs) == 2
    assert all(programs)
    agent.sock.close()
    until(lambda: not any(program and program.alive() for program in programs), "the run's processes are gone")
    until(lambda: agent.directories() == [], "the run's directory is removed")
    assert agent.process.poll() is None


async def test_agent_that_dies_is_a_lost_run(channel: Channel, agent: Agent) -> None:
    async def kill(_stream: Stream, _data: bytes) -> None:
        agent.process.kill()

    with pytest.raises(RunLostError, match="lost"):
        await channel.execute(wants(sh("echo up; exec sleep 1")), [], on_output=kill)
    with pytest.raises(GuestError):
        await channel.ping()


async def test_refused_run_never_ran(channel: Channel) -> None:
    with pytest.raises(NeverRanError, match="plain file name"):
        await channel.execute(wants(["true"], files={"../x": b""}), [b""], on_output=Heard())


async def test_resume_without_rights_is_an_error_and_not_the_end(channel: Channel) -> None:
    with pytest.raises(GuestError, match="resume was refused"):
        await channel.resume("clone-1", timeout=SECONDS)
    await channel.ping(timeout=SECONDS)


@pytest.mark.parametrize(
    "garbage",
    [
        b"Debian GNU/Linux login: \r\n",
        bytes(100_000),
        wire.HEADER.pack(wire.MAGIC, FrameType.RUN, 1, wire.PAYLOAD_MAX + 1),
    ],
    ids=["text", "zeros", "oversized"],
)
def test_agent_survives_garbage_and_answers_the_next_hello(agent: Agent, garbage: bytes) -> None:
    agent.send(run_frame(1, steps=[sh("echo $$; exec sleep 60")]))
    program = Identity.of(int(agent.next(FrameType.STDOUT).payload))
    agent.send(garbage)
    until(lambda: not (program and program.alive()), "a stream without framing has no runs")
    until(lambda: "channel lost" in agent.log.read_text(), "the agent says that it lost framing")
    time.sleep(0.3)  # longer than the port stays away after that
    assert agent.answers()


def test_hello_is_answered_after_half_a_frame_of_somebody_else_once_framing_is_lost(agent: Agent) -> None:
    agent.send(wire.HEADER.pack(wire.MAGIC, FrameType.PING, 1, 30) + b"half")
    agent.send(wire.encode_json(FrameType.HELLO, 0, {"nonce": "swallowed" * 5}))  # completes it, and more
    until(lambda: "channel lost" in agent.log.read_text(), "the agent says that it lost framing")
    time.sleep(0.3)
    assert agent.answers()


def test_number_too_large_for_a_float_is_refused(agent: Agent) -> None:
    assert agent.refusal(run_frame(limits=LIMITS | {"wall": 10**400}))["code"] == "bad-request"
    assert agent.answers()


def test_refusal_of_a_long_value_is_short(agent: Agent) -> None:
    payload = json.dumps(
        wants(["true"]).to_json() | {"files": [{"name": "x", "size": "é" * 30000}]}, ensure_ascii=False
    )
    assert agent.refusal(wire.encode(FrameType.RUN, 1, payload.encode()))["code"] == "bad-request"
    assert agent.answers()


def test_agent_survives_a_host_that_goes_away_before_files_are_sent(agent: Agent) -> None:
    agent.send(run_frame(1, steps=[sh("echo data > it; echo $$; read x")], stdin=True, collect=["it"]))
    program = Identity.of(int(agent.next(FrameType.STDOUT).payload))
    assert program
    os.kill(agent.process.pid, signal.SIGSTOP)
    os.kill(program.pid, signal.SIGTERM)
    until(lambda: not program.alive(), "the program has ended")
    agent.sock.close()
    os.kill(agent.process.pid, signal.SIGCONT)
    until(lambda: agent.directories() == [], "the run is cleaned up")
    with pytest.raises(subprocess.TimeoutExpired):
        agent.process.wait(0.5)
