"""The relay before real machines: callers at once, hostile callers, unmodified peers of PBot's, and what operators use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pbotvm_qemu import control
from tests.compat.peers import frame_seed, frame_today, request
from tests.conftest import kept
from tests.support import LONG, PROGRAM, assert_refused, cli, cli_json, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]
UNAVAILABLE = b"Virtual machine is temporarily unavailable, try again soon.\n"


class Keeper:
    """`run` in the foreground, as systemd starts it."""

    def __init__(self, env: Env, *options: str, config: str = "") -> None:
        self.folder = Path(env["XDG_CONFIG_HOME"]) / "pbotvm-qemu"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.configure(config)
        self.port = int(env["PBOTVM_PORT"])
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.settimeout(LONG)
        place = Path(env["XDG_RUNTIME_DIR"]) / "notify"
        place.unlink(missing_ok=True)
        self.told.bind(str(place))
        self.log = Path(env["XDG_RUNTIME_DIR"]) / "keeper.log"
        self.env = env | {"NOTIFY_SOCKET": str(place), "WATCHDOG_USEC": "2000000"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, "run", *options], env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.hear(b"READY=1")

    def configure(self, text: str) -> None:
        (self.folder / "config.toml").write_text(text)

    def hear(self, text: bytes) -> None:
        """Wait until systemd is told this. What it does not read in time is not sent, and stops nobody."""
        while (said := self.told.recv(100)) != text:
            assert said in (b"READY=1", b"WATCHDOG=1", b"STOPPING=1")

    def wait_log(self, text: str, *, after: int = 0) -> None:
        until = time.monotonic() + 60
        while text not in self.log.read_text()[after:]:
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def reload(self, text: str) -> None:
        size = len(self.log.read_text())
        self.configure(text)
        self.process.send_signal(signal.SIGHUP)
        self.wait_log("reloaded", after=size)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(120)
        self.told.close()
        (self.folder / "config.toml").unlink(missing_ok=True)
        return status

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def ask(self, code: str, **keys: object) -> bytes:
        return self.send(json.dumps({"lang": "sh", "code": code, **keys}).encode() + b"\n")

    def send(self, data: bytes) -> bytes:
        with self.connect() as sock:
            sock.sendall(data)
            return receive(sock)

    def figure(self, key: str) -> int:
        """Return a figure of the kernel's about the keeper, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def receive(sock: socket.socket) -> bytes:
    reply = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            reply += piece
    return reply


# Peers that know nothing of us -------------------------------------------------------------------------------------------


def serial(env: Env, *requests: bytes) -> list[str]:
    """Ask the guest over its serial port as an unmodified vm-exec, one session for all requests."""
    texts = []
    with socket.create_connection(("127.0.0.1", int(env["PBOTVM_SERIAL"])), timeout=LONG) as sock:
        for data in requests:
            sock.sendall(data)
            reply = b""
            while b"result:end\r\n" not in reply:
                piece = sock.recv(65536)
                assert piece, reply
                reply += piece
            line = next((line for line in reply.split(b"\r\n") if line.startswith(b"result:{")), None)
            assert line is not None, reply
            texts.append(json.loads(line[7:])["result"])
    return texts


@pytest.mark.parametrize("way", ["clone", "loadvm", "restart"])
def test_an_unmodified_vm_exec_is_served_by_a_machine_kept_in_any_way(vm_env: Env, way: str) -> None:
    with contextlib.contextmanager(kept)(vm_env, way):
        peers_of_pbot_are_served(vm_env)


def peers_of_pbot_are_served(way_env: Env) -> None:
    big = request(code="wc -c <prog.sh; exit; " + "€" * 3000)
    size = f"{len(str(big['code']).encode()) + 1}\n"
    answers = serial(way_env, frame_today(big), frame_seed(big), frame_today(request(code="id -un; exit 3")))
    assert answers == [size, size, "vm\n [Exit 3]\n"]
    with socket.create_connection(("127.0.0.1", int(way_env["PBOTVM_HEALTH"])), timeout=60) as sock:
        assert sock.makefile("rb", buffering=0).readline() == b"\r\n"  # the seed's heartbeat, before any question
        sock.sendall(b"\n")
        reply = b""
        while not reply.endswith(b"\r\n:END\r\n"):
            piece = sock.recv(4096)
            assert piece, reply
            reply += piece
    # And our own callers do not see what others did.
    assert serial(way_env, frame_today(request(code="touch /tmp/mark; ls /tmp")))[0] == "mark\n"
    assert cli(way_env, "exec", "-lang=sh", "ls /tmp").stdout == b""


def live(env: Env) -> dict[str, Any]:
    """Return the keeper's figures, quicker than a command of ours would."""

    async def ask() -> dict[str, Any]:
        machine = Path(env["XDG_RUNTIME_DIR"]) / "pbotvm-qemu/machines" / env["PBOTVM_DOMAIN"]
        talk = await control.connect(machine / "control.sock")
        try:
            return await talk.control({"do": "status"}, timeout=LONG)
        finally:
            await talk.close()

    return asyncio.run(ask())


def test_sigterm_lets_running_ones_end_tells_the_waiting_and_leaves_nothing(vm_env: Env) -> None:
    cli(vm_env, "stop")
    keeper = Keeper(vm_env, config="[pool]\nsize = 1\nmost = 1\n[relay]\nlanguage = 'sh'\n")
    try:
        running_ends_waiting_is_told(keeper)
    finally:
        status = keeper.end()
    assert status == 0
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def running_ends_waiting_is_told(keeper: Keeper) -> None:
    answers: dict[str, bytes] = {}

    def call(name: str, code: str) -> None:
        answers[name] = keeper.ask(code)

    running = threading.Thread(target=call, args=("running", "echo begun; sleep 6; echo done"))
    running.start()
    until = time.monotonic() + 60
    while not live(keeper.env)["busy"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    waiting = threading.Thread(target=call, args=("waiting", "echo late"))
    waiting.start()
    while not live(keeper.env)["waiting"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    with keeper.connect() as silent:
        live(keeper.env)  # answered after the connection was accepted: the keeper takes them in turn
        keeper.process.send_signal(signal.SIGTERM)
        keeper.hear(b"STOPPING=1")
        assert receive(silent) == UNAVAILABLE
    with pytest.raises(ConnectionRefusedError):
        keeper.connect()
    for thread in (running, waiting):
        thread.join(LONG)
    assert answers == {"running": b"begun\ndone\n", "waiting": UNAVAILABLE}


def test_beyond_loopback_a_token_or_a_word_is_needed(vm_env: Env) -> None:
    assert_refused(cli(vm_env, "run", "--listen", "0.0.0.0:0"), 2, "--no-auth")


# A keeper for all that follows ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def keeper(vm_env: Env, metrics_port: int) -> Iterator[Keeper]:
    cli(vm_env, "stop")
    running = Keeper(vm_env, config=f"[metrics]\nport = {metrics_port}\n")
    yield running
    assert running.end() == 0
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_netcat_alone_is_a_client(keeper: Keeper) -> None:
    line = b'{"nick":"n","channel":"#c","code":"-lang=sh echo hello"}\n'
    done = subprocess.run(
        ["nc", "127.0.0.1", str(keeper.port)], input=line, capture_output=True, timeout=LONG, check=False
    )
    assert done.stdout == b"hello\n"


def test_a_channel_changes_what_it_ran(keeper: Keeper) -> None:
    def say(line: str) -> str:
        return keeper.ask(line, channel="#edits").decode().removesuffix("\n")

    assert say("hostname >/tmp/mark; echo one; ls /tmp") == "one\nmark"
    assert say("replace 'one' with 'two' and s/hostname/echo/") == "two\nmark"
    assert say("show") == "echo >/tmp/mark; echo two; ls /tmp"
    assert say("remove 'echo >/tmp/mark; ' and run") == "two"  # on a clean machine
    assert say("undo undo") == "hostname >/tmp/mark; echo one; ls /tmp"
    assert say("copy #nowhere") == "No history for #nowhere."
    keeper.wait_log("result=edit")


def test_a_folder_lives_on_under_its_key_while_machines_do_not(keeper: Keeper) -> None:
    count = "echo x >>poll/votes; touch /tmp/mark; wc -l <poll/votes; stat -c %U poll/votes; ls /tmp"
    key = {"persist-key": "poll"}
    assert [keeper.ask(count, **key) for _ in range(2)] == [b"1\nvm\nmark\n", b"2\nvm\nmark\n"]
    assert keeper.ask("ls -d poll").endswith(b"[Exit 2]\n")
    code = '-lang=c11 char s[9]; FILE *f = fopen("poll/votes", "r"); int n = 0; while (fgets(s, 9, f)) n++; n'
    assert b" n = 2" in keeper.ask(code, **key)


def test_callers_at_once_get_their_own_answers_while_one_loops_for_ever(keeper: Keeper) -> None:
    wrong: list[tuple[str, bytes]] = []
    loop = threading.Thread(target=lambda: wrong.append(("loop", keeper.ask("while :; do :; done", nick="hog"))))

    def call(caller: int) -> None:
        for number in range(5):
            answer = keeper.ask(f"echo {caller}.{number}", nick=f"nick{caller}", channel="x")
            if answer != f"{caller}.{number}\n".encode():
                wrong.append((f"{caller}.{number}", answer))

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    loop.start()
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(LONG)
    loop.join(LONG)
    assert wrong == [("loop", b"[Timed-out]\n")]


def test_each_run_has_its_line(keeper: Keeper) -> None:
    keeper.ask("exit 3", nick="joe", channel="#c")
    keeper.wait_log("caller=#c/joe machine=test-vm language=sh")
    line = next(text for text in keeper.log.read_text().splitlines() if "caller=#c/joe" in text)
    for part in ("run id=", "from=relay", "wall_s=", "queue_s=", "result=3", "clone=test-vm/"):
        assert part in line
    assert cli(keeper.env, "exec", "-lang=sh", "exit 4").returncode == 4
    keeper.wait_log(f"from=exec caller=uid{os.geteuid()} machine=test-vm language=sh")


def test_an_unmodified_vm_exec_is_told_what_c_holds_and_where_it_crashes(keeper: Keeper) -> None:
    c = {"lang": "c11", "sourcefile": "prog.c", "execfile": "prog", "cmdline": "gcc -g3 prog.c -std=c11 -o prog"}

    def program(*statements: str) -> bytes:
        body = "\n    ".join(statements)
        code = f"#include <prelude.h>\n\nint main(int argc, char *argv[])\n{{\n    {body}\n    ;\n    return 0;\n}}\n"
        return frame_today(request(**c, code=code))

    silent, crash = serial(
        keeper.env,
        program("int x = 5, y = 16;", "print_last_statement(x ^= y, y ^= x, x ^= y);"),
        program("char *p = 0;", "*p = 1;"),
    )
    assert silent == "no output: x = 16; y = 5\n"
    assert re.fullmatch(
        r"Program received signal SIGSEGV, Segmentation fault in main \(argc=1, argv=0x[0-9a-f]+\) at statement: "
        r"\*p = 1; <local variables: p = 0x0>\n \[Exit 139\]\n",
        crash,
    )


def test_a_thousand_connections_and_floods_are_bounded_and_others_served(keeper: Keeper) -> None:
    """Memory and descriptors come back to what they were, and never grow far."""
    keeper.ask("echo warm")
    memory, descriptors = keeper.figure("VmRSS"), keeper.descriptors()
    quiet = []
    for _ in range(1000):
        with contextlib.suppress(OSError):
            quiet.append(keeper.connect())
    assert keeper.ask("echo served") == b"served\n"
    assert sum(receive(sock) == UNAVAILABLE for sock in quiet[:100]) > 50
    for sock in quiet:
        sock.close()
    refusals = []

    def flood() -> None:
        with contextlib.suppress(OSError), keeper.connect() as sock:
            with contextlib.suppress(OSError):
                for _ in range(256):
                    sock.sendall(b"x" * (1 << 20))
            refusals.append(receive(sock))

    floods = [threading.Thread(target=flood) for _ in range(16)]
    for thread in floods:
        thread.start()
    assert keeper.ask("echo served") == b"served\n"
    for thread in floods:
        thread.join(LONG)
    assert set(refusals) <= {b"The request is longer than 2 MiB.\n", UNAVAILABLE, b""}
    assert b"The request is longer than 2 MiB.\n" in refusals
    assert keeper.figure("VmHWM") < memory + (128 << 20)
    until = time.monotonic() + 30
    while keeper.descriptors() > descriptors + 40:  # machines come and go meanwhile
        assert time.monotonic() < until
        time.sleep(0.1)
    assert cli_json(keeper.env, "status", "--json")["live"]["callers"]["held_bytes"] == 0


def test_a_line_of_a_gigabyte_is_refused_at_once_and_costs_no_memory(keeper: Keeper) -> None:
    """The sender reads nothing before he is done, or cut off. Whoever else asks meanwhile is served."""
    keeper.ask("echo warm")
    before = keeper.figure("VmHWM")
    block = b"x" * (1 << 20)
    sent = 0
    with keeper.connect() as sock:
        sock.sendall(b'{"lang": "sh", "code": "')
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30:
                sock.sendall(block)
                sent += len(block)
                if sent == 64 << 20:
                    assert keeper.ask("echo served") == b"served\n"
    assert keeper.figure("VmHWM") < before + (16 << 20), sent
    with keeper.connect() as sock:  # one who stops to listen hears why
        sock.sendall(block + block + b"x")
        assert receive(sock) == b"The request is longer than 2 MiB.\n"


def test_a_byte_now_and_then_is_closed_without_a_word(keeper: Keeper) -> None:
    with keeper.connect() as sock:
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 30:
                sock.sendall(b"x")
                time.sleep(0.5)
                sock.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    assert sock.recv(10) == b""
                    break
        assert time.monotonic() - begin < 30


def test_the_page_of_metrics_counts_runs_and_reverts(keeper: Keeper, metrics_port: int) -> None:
    keeper.ask("exit 7")
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as page:
        text = page.read().decode()
    for part in (
        'pbotvm_requests_total{language="sh",result="failed",source="relay"}', "pbotvm_request_seconds_bucket",
        'pbotvm_reverts_total{reason="run"}', "pbotvm_ready ", "pbotvm_starts_total ",
    ):  # fmt: skip
        assert part in text


def test_top_shows_machines(keeper: Keeper) -> None:
    found = cli_json(keeper.env, "top", "--json", "--interval", "0.2")
    assert found["machine"] == "test-vm"
    assert found["processes"]
    assert all(item["rss"] > 1 << 20 for item in found["processes"])
    assert b"ready" in cli(keeper.env, "top", "--interval", "0.2").stdout


def test_sighup_reads_settings_and_languages_and_a_mistake_changes_nothing(keeper: Keeper, metrics_port: int) -> None:
    base = f"[metrics]\nport = {metrics_port}\n"
    languages = keeper.folder / "languages"
    languages.mkdir()
    (languages / "sh.toml").write_text(
        'description = "sh"\nsource = "other.sh"\nrun = ["sh", "{options}", "{source}"]\n'
        '[sample]\ncode = "echo hello world"\noutput = "hello world\\n"\n'
    )
    keeper.reload(f'{base}[limits]\nwall = 1\n[aliases]\nmain = "test-vm"\n')
    assert keeper.ask("-info x") == b"sh cmdline: sh other.sh\n"
    assert keeper.ask("sleep 8; echo late") == b"[Timed-out]\n"
    assert keeper.ask("-vm=main echo alias") == b"alias\n"
    keeper.reload("[limits]\nwall = 'soon'\n")
    assert "not reloaded" in keeper.log.read_text()
    assert keeper.ask("-vm=main echo still") == b"still\n"
    (languages / "sh.toml").unlink()
    languages.rmdir()
    keeper.reload(f'{base}[relay]\ntoken = "secret"\n')
    assert keeper.ask("echo x").startswith(b"Access denied")
    assert cli(keeper.env | {"PBOTVM_TOKEN": "secret"}, "client", "-lang=sh", "echo", "let in").stdout == b"let in\n"
    keeper.reload(base)
    assert keeper.ask("echo open") == b"open\n"
    assert "secret" not in keeper.log.read_text()


def test_systemd_hears_that_the_keeper_lives(keeper: Keeper) -> None:
    keeper.told.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            keeper.told.recv(100)
    keeper.told.settimeout(30)
    keeper.hear(b"WATCHDOG=1")
