"""The agent: answers the host on every channel that this guest has, and runs what it is asked to run."""

from __future__ import annotations

import base64
import itertools
import os
import sys
from typing import TYPE_CHECKING

from . import health, legacy, network, spec, system, wire
from .child import Owner
from .loop import Loop
from .port import Port
from .run import Run
from .wire import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

RELEASE = "1"
_HOSTNAME_MAX = 63
_MESSAGE_MAX = 1000


class Agent:
    """What all conversations of this guest share; `serve` begins one."""

    def __init__(self, loop: Loop, owner: Owner) -> None:
        self.loop = loop
        self.owner = owner
        self.legacy = legacy.Server(loop, owner, host_busy=lambda: bool(self.runs), on_native=self.serve)
        self._peers: set[Peer] = set()
        self._numbers = itertools.count(1)

    @property
    def runs(self) -> int:
        """How many programs run for hosts that speak the native protocol."""
        return sum(len(peer.runs) for peer in self._peers)

    def serve(
        self, fd: int, transport: str, *, first: bytes = b"", on_end: Callable[[bytes], None] | None = None
    ) -> Peer:
        """Talk frames on `fd`; `first` was read from it already.

        With `on_end` the conversation ends when the stream does, or when framing is lost; without it the stream is a
        port that stays, on which a host may come back.
        """
        ended: Callable[[bytes], None] | None = None
        if on_end:
            back = on_end

            def ended(rest: bytes) -> None:
                self._peers.discard(peer)
                back(rest)

        # Runs on other streams may have the same ids, and get folders of their own.
        prefix = f"{next(self._numbers)}-" if on_end else ""
        peer = Peer(self, fd, transport, prefix, ended)
        self._peers.add(peer)
        peer.begin(first)
        return peer


class Peer:
    """One host's conversation: `hello`, `resume`, `ping`, and any number of runs at once up to RUNS_MAX."""

    def __init__(
        self, agent: Agent, fd: int, transport: str, prefix: str, on_end: Callable[[bytes], None] | None
    ) -> None:
        self._agent = agent
        self._loop = agent.loop
        self._transport = transport
        self._prefix = prefix
        self._nonce = ""
        self._turns = itertools.count()
        self.runs: dict[int, Run] = {}
        self._port = Port(agent.loop, fd, on_frame=self._frame, on_room=self._room, on_lost=self._lost, on_end=on_end)

    def begin(self, first: bytes) -> None:
        """Start: with the bytes `first` that the host has sent already, or else with a word to it.

        Unasked, that tells a host that is in the middle of something that all of that is lost.
        """
        if first:
            self._port.feed(first)
        else:
            self._hello({"nonce": "started"})

    def _frame(self, frame: wire.Frame) -> None:
        try:
            self._dispatch(frame)
        except (spec.BadRequestError, network.BadNetworkError) as exc:
            self._error(frame.id, "bad-request", str(exc))
        except wire.WireError as exc:
            self._error(frame.id, "protocol", str(exc))
            if run := self.runs.get(frame.id):
                run.cancel()
        except OSError as exc:
            self._error(frame.id, "guest", f"{exc.strerror}: {exc.filename or ''}".rstrip(": "))

    def _dispatch(self, frame: wire.Frame) -> None:
        type_ = frame.type
        if type_ == FrameType.HELLO:
            self._hello(wire.decode_json(frame.payload))
        elif type_ == FrameType.PING:
            self._port.send(wire.encode(FrameType.PING, frame.id, frame.payload), urgent=True)
        elif type_ == FrameType.RESUME:
            self._resume(wire.decode_json(frame.payload))
            self._port.send(wire.encode_json(FrameType.RESUME, frame.id, {}))
        elif type_ == FrameType.RUN:
            self._run(frame)
        elif type_ in (FrameType.DATA, FrameType.STDIN, FrameType.CREDIT, FrameType.SIGNAL, FrameType.CANCEL):
            if run := self.runs.get(frame.id):  # for one that has ended: it crossed our exit frame
                self._for_run(run, frame)
        else:
            self._error(frame.id, "unknown-type", f"this agent does not know frames of type {type_}")

    def _for_run(self, run: Run, frame: wire.Frame) -> None:
        if frame.type == FrameType.DATA:
            run.data(frame.payload)
        elif frame.type == FrameType.STDIN:
            run.stdin(frame.payload)
        elif frame.type == FrameType.CREDIT:
            run.credit(wire.credit(frame))
        elif frame.type == FrameType.CANCEL:
            run.cancel()
        else:
            number = wire.decode_json(frame.payload).get("signal")
            if not isinstance(number, int) or isinstance(number, bool):
                raise wire.WireError("signal: not a number")
            run.signal(number)

    def _hello(self, question: dict[str, object]) -> None:
        nonce = question.get("nonce")
        if not isinstance(nonce, str) or not nonce.isalnum() or len(nonce) > 64:
            raise wire.WireError("hello: nonce is not a short word")
        if nonce != self._nonce:  # another host, who knows nothing of what was under way; not the same one asking again
            self._nonce = nonce
            self._forget()
        kernel = os.uname()
        self._port.send(
            wire.encode_json(
                FrameType.HELLO,
                0,
                # The nonce comes first: the host finds the answer by it, see Decoder.expect_hello.
                {
                    "nonce": nonce,
                    "protocol": wire.VERSION,
                    "agent": RELEASE,
                    "transport": self._transport,
                    "kernel": kernel.release,
                    "hostname": kernel.nodename,
                    "memory": system.memory_total(),
                    "runs": self._agent.runs,
                },
            )
        )

    def _resume(self, question: dict[str, object]) -> None:
        """Become this clone, not the one that was frozen: its clock, its random numbers, its name."""
        clock = question.get("clock_ns")
        if isinstance(clock, int) and 0 < clock < 1 << 63:
            system.set_clock(clock)
        entropy = question.get("entropy")
        if isinstance(entropy, str):
            try:
                data = base64.b64decode(entropy, validate=True)
            except ValueError:  # binascii.Error is one, and so is what a text beyond ASCII gives
                raise wire.WireError("resume: entropy is not base64") from None
            if not 32 <= len(data) <= 512:
                raise wire.WireError("resume: entropy must be 32 to 512 bytes")
            system.add_entropy(data)
        name = question.get("hostname")
        if (
            isinstance(name, str)
            and 0 < len(name) <= _HOSTNAME_MAX
            and name.isascii()
            and name.replace("-", "").isalnum()
        ):
            system.set_hostname(name)
        if "network" in question:
            network.resume(question["network"])

    def _run(self, frame: wire.Frame) -> None:
        if not frame.id or frame.id in self.runs:
            raise spec.BadRequestError(f"run id {frame.id} is in use or 0")
        if self._agent.runs >= wire.RUNS_MAX:
            self._error(frame.id, "busy", f"{wire.RUNS_MAX} programs run already")
            return
        if self._agent.legacy.used:
            self._error(frame.id, "used", "this machine has run a program for another peer")
            return
        request = spec.parse(wire.decode_json(frame.payload))
        # Run() can end at once and call _done, so the place is taken before.
        run = Run(
            self._loop, self._port, frame.id, request, self._agent.owner, self._done, folder=f"{self._prefix}{frame.id}"
        )
        if not run.done:
            self.runs[frame.id] = run

    def _done(self, id_: int) -> None:
        self.runs.pop(id_, None)

    def _room(self) -> None:
        """Let the runs go on, each time another one first: the first one may fill the port again."""
        runs = list(self.runs.values())
        first = next(self._turns) % max(len(runs), 1)
        for run in runs[first:] + runs[:first]:
            run.resume()

    def _lost(self, why: str) -> None:
        print(f"agent: channel lost: {why}", file=sys.stderr, flush=True)  # noqa: T201 - the guest's console
        self._forget()

    def _forget(self) -> None:
        for run in list(self.runs.values()):
            run.close()

    def _error(self, id_: int, code: str, message: str) -> None:
        self._port.send(
            wire.encode_json(FrameType.ERROR, id_, {"code": code, "message": message[:_MESSAGE_MAX]}), urgent=True
        )


def _owner(name: str, home: str) -> Owner:
    if os.geteuid():
        return Owner(home, name, None, None, cgroups=False)
    uid, gid = system.user(name)
    return Owner(home, name, uid, gid, cgroups=system.Cgroup.prepare())


def _serve_others(loop: Loop, server: legacy.Server, options: dict[str, str]) -> None:
    """Open what peers of PBot's use; what this guest does not have is said on the console."""
    services: dict[str, Callable[[str], object]] = {
        "legacy": lambda path: server.serial(system.open_serial(path)),
        "health": lambda path: health.Health(loop, system.open_serial(path)),
        "vsock": lambda port: server.listen(int(port)) if port != "0" else None,
        "vsock-health": lambda port: health.Listener(loop, int(port)),
    }
    for name, serve in services.items():
        if name in options:
            try:
                serve(options[name])
            except OSError as exc:
                print(f"agent: no {name} on {options[name]}: {exc}", file=sys.stderr, flush=True)  # noqa: T201


def main(arguments: list[str] | None = None) -> None:
    """Serve for ever.

    Arguments: `port=NAME` (virtio-serial) or `fd=N` (an open stream socket), `user=NAME`, `home=DIR`, `grow=1` (fill
    the disk); for peers of PBot's, `legacy=DEVICE` and `health=DEVICE` (serial lines), `vsock=PORT` and
    `vsock-health=PORT`.
    """
    options = dict(argument.split("=", 1) for argument in (sys.argv[1:] if arguments is None else arguments))
    loop = Loop()
    owner = _owner(options.get("user", "vm"), options.get("home", "/home/vm"))
    if options.get("grow"):
        try:
            system.grow_root()
        except OSError as exc:
            print(f"agent: cannot grow the root file system: {exc}", file=sys.stderr, flush=True)  # noqa: T201
    if not os.geteuid():
        system.be_first()
    if "fd" in options:
        fd, transport = int(options["fd"]), "socket"
        os.set_inheritable(fd, False)
    else:
        network.prepare()
        fd, transport = os.open(system.find_port(options["port"]), os.O_RDWR | os.O_NONBLOCK), "virtio-serial"
    agent = Agent(loop, owner)
    agent.serve(fd, transport)
    _serve_others(loop, agent.legacy, options)
    while True:
        loop.step()


if __name__ == "__main__":
    main()
