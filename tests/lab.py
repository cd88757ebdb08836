"""Network namespaces for tests: a host of our own with its uplink, the world behind it, and guests in between.

```text
world: 45.45.45.1 2a00:45::1 (outside), 10.99.0.1 fc99::1 (private), 169.254.169.254 fd00:ec2::254 (metadata)
  | lan0 -- lan0
host:  45.45.45.2 2a00:45::2, default routes to the world
```
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbotvm_qemu.config import Limits
from pbotvm_qemu.languages import Registry
from pbotvm_qemu.request import Request, render

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.machine import VirtualMachine

PATIENCE = 60.0  # seconds that something may take on a busy host
PORT = 7777
LOOPBACK_PORT = 7778
WORLD = {
    "outside4": "45.45.45.1", "outside6": "2a00:45::1", "private4": "10.99.0.1", "private6": "fc99::1",
    "metadata4": "169.254.169.254", "metadata6": "fd00:ec2::254",
}  # fmt: skip
HOST4, HOST6 = "45.45.45.2", "2a00:45::2"
_CLONE_NEWNET = 0x40000000


def missing() -> str | None:
    """Return why network namespaces cannot be used here, or None."""
    if os.geteuid():
        return "needs root, for network namespaces"
    for program in ("ip", "nft"):
        if subprocess.run(["sh", "-c", f"command -v {program}"], capture_output=True, check=False).returncode:
            return f"needs the program {program}"
    return None


def sh(*words: str) -> str:
    """Run a program and return what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Have this thread, and whatever it starts, be in namespace `name` while the body runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        assert libc.setns(there, _CLONE_NEWNET) == 0
        yield
    finally:
        assert libc.setns(home, _CLONE_NEWNET) == 0
        os.close(home)
        os.close(there)


@dataclass
class Lab:
    """Two namespaces and the servers in them."""

    host: str
    world: str
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def ip(self, *words: str) -> str:
        """Run ip(8) in the host's namespace."""
        return sh("ip", "-n", self.host, *words)

    def run(self, *words: str) -> str:
        """Run a program in the host's namespace."""
        return sh("ip", "netns", "exec", self.host, *words)

    def serve(self, where: str, *addresses: str) -> None:
        """Start servers on `addresses`, each ADDRESS,PORT."""
        program = Path(__file__).with_name("lab_server.py")
        server = subprocess.Popen(
            ["ip", "netns", "exec", where, sys.executable, str(program), *addresses], stdout=subprocess.PIPE, text=True
        )
        self.servers.append(server)
        assert server.stdout
        assert server.stdout.readline() == "ready\n"


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """Make a host and a world; both are gone afterwards, with everything in them."""
    tag = secrets.token_hex(3)
    made = Lab(f"pbt-host-{tag}", f"pbt-world-{tag}")
    try:
        for name in (made.host, made.world):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "link", "add", "lan0", "netns", made.host, "type", "veth", "peer", "name", "lan0", "netns", made.world)
        for name, four, six in ((made.host, HOST4, HOST6), (made.world, WORLD["outside4"], WORLD["outside6"])):
            sh("ip", "-n", name, "addr", "add", f"{four}/24", "dev", "lan0")
            sh("ip", "-n", name, "addr", "add", f"{six}/64", "dev", "lan0", "nodad")
            sh("ip", "-n", name, "link", "set", "lan0", "up")
        for name in ("private4", "private6", "metadata4", "metadata6"):
            sh("ip", "-n", made.world, "addr", "add", f"{WORLD[name]}/{32 if name.endswith('4') else 128}", "dev", "lo")
        made.ip("route", "add", "default", "via", WORLD["outside4"])
        made.ip("route", "add", "default", "via", WORLD["outside6"])
        # One by one: what listens everywhere answers datagrams from whichever address it likes.
        made.serve(made.world, *(f"{where},{PORT}" for where in WORLD.values()))
        made.serve(made.host, f"0.0.0.0,{PORT}", f"::,{PORT}", f"127.0.0.1,{LOOPBACK_PORT}", f"::1,{LOOPBACK_PORT}")
        yield made
    finally:
        for server in made.servers:
            server.kill()
            server.wait()
            assert server.stdout
            server.stdout.close()
        for name in (made.host, made.world):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


# guests ------------------------------------------------------------------------------------------------------------------


async def run_in(vm: VirtualMachine, code: str, *, timeout: float = 300.0) -> str:
    """Run Python `code` in the guest, and return what it printed."""
    printed = bytearray()

    async def keep(_stream: object, data: bytes) -> None:
        printed.extend(data)

    outcome = await execute(vm, code, keep, timeout=timeout)
    assert outcome.exit_code == 0, f"exit code {outcome.exit_code}: {printed.decode('utf-8', 'replace')}"
    return printed.decode()


async def execute(vm: VirtualMachine, code: str, on_output: OnOutput, *, timeout: float = 600.0) -> Outcome:
    """Run Python `code` in the guest."""
    language = Registry.load().languages["python3"]
    spec, content = render(Request(code=code), language, Limits(wall=timeout), stdin=False)
    return await vm.execute(spec, content, on_output=on_output)


PROBE = """
import json, os, socket, struct, threading, time
targets, wanted = json.loads(%r), json.loads(%r)
found = {}

def tcp(address, port, wait):
    with socket.create_connection((address, port), timeout=wait) as sock:
        sock.settimeout(wait)
        sock.sendall(b"echo hello\\n")
        return sock.recv(100).startswith(b"hello from ")

def udp(address, port, wait):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0)
        until = time.monotonic() + wait
        while time.monotonic() < until:
            sock.sendto(b"hello", (address, port))
            try:
                return sock.recv(100) == b"hello"
            except TimeoutError:
                pass
    return False

def icmp(address, port, wait):
    six = ":" in address
    kind, answer = (128, 129) if six else (8, 0)
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(0.2)
        body = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, 1) + b"12345678"
        if not six:
            total = sum(struct.unpack("!8H", body))
            total = (total & 0xFFFF) + (total >> 16)
            body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
        until = time.monotonic() + wait
        while time.monotonic() < until:
            sock.sendto(body, (address, 0))
            try:
                data, sender = sock.recvfrom(200)
            except TimeoutError:
                continue
            data = data if six else data[20:]
            if data[0] == answer and sender[0] == address:
                return True
    return False

def probe(name, kind, address, port):
    # What is to be reached gets all the time that a busy host may need, and is tried again after a refusal.
    until = time.monotonic() + (PATIENCE if name in wanted else WAIT)
    found[name] = False
    while not found[name]:
        try:
            found[name] = {"tcp": tcp, "udp": udp, "icmp": icmp}[kind](address, port, until - time.monotonic())
        except OSError:
            pass
        if name not in wanted or time.monotonic() + 0.2 > until: break
        time.sleep(0.2)

WAIT, PATIENCE = %f, %f
threads = [threading.Thread(target=probe, args=(name, *target)) for name, target in targets.items()]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""


Targets = dict[str, tuple[str, str, int]]


async def reached(vm: VirtualMachine, targets: Targets, wanted: Iterable[str] = (), *, wait: float = 3.0) -> set[str]:
    """Return which of `targets`, each (tcp, udp or icmp; address; port), the guest reaches.

    Each is tried for `wait` seconds; those that are `wanted`, for as long as a busy host may need.
    """
    found: Any = json.loads(await run_in(vm, PROBE % (json.dumps(targets), json.dumps(sorted(wanted)), wait, PATIENCE)))
    assert found.keys() == targets.keys()
    return {str(name) for name, yes in found.items() if yes}


async def eventually(check: Any, within: float = PATIENCE) -> None:
    """Wait until `check` holds."""
    until = asyncio.get_running_loop().time() + within
    while not check():
        assert asyncio.get_running_loop().time() < until, "it did not come"
        await asyncio.sleep(0.05)


# what there is -----------------------------------------------------------------------------------------------------------

_SETTINGS = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.lan0.accept_ra")


def dump(name: str) -> dict[str, object]:
    """Return everything that this program could have changed in namespace `name`, without counters and indexes."""

    def listing(*words: str) -> list[str]:
        found = json.loads(sh("ip", "-n", name, "-j", "-d", *words) or "[]")
        return sorted(json.dumps(item, sort_keys=True) for item in _settled(found))

    rules = json.loads(sh("ip", "netns", "exec", name, "nft", "-j", "list", "ruleset"))["nftables"]
    return {
        "links": listing("link"),
        "addresses": listing("addr"),
        "routes4": listing("route", "show", "table", "all"),
        "routes6": listing("-6", "route", "show", "table", "all"),
        "rules": sorted(json.dumps(_settled(item), sort_keys=True) for item in rules if "metainfo" not in item),
        "settings": sh("ip", "netns", "exec", name, "sysctl", *_SETTINGS).splitlines(),
    }


# What the kernel counts, or sets by itself when it finds the time to.
_PASSING = {
    "ifindex", "link_index", "handle", "gc_timer", "hello_timer", "tcn_timer", "topology_change_timer", "expires", "flags", "operstate",
    "valid_life_time", "preferred_life_time", "promiscuity", "allmulti", "topology_change_detected", "root_id", "bridge_id", "dynamic",
    "tentative", "linkdown", "tso_max_size", "tso_max_segs", "gso_max_size", "gso_max_segs",
}  # fmt: skip


def _settled(item: Any) -> Any:
    """Return `item` without what changes by itself, link-local addresses and their routes included."""
    if isinstance(item, list):
        return [_settled(part) for part in item if not _by_itself(part)]
    if isinstance(item, dict):
        return {key: _settled(value) for key, value in item.items() if key not in _PASSING}
    return item


def _by_itself(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    return any(str(item.get(key, "")).startswith(("fe80:", "ff00:")) for key in ("local", "dst"))


def assert_same(name: str, before: dict[str, object]) -> None:
    """Hold that namespace `name` is as `before`, once the kernel has finished what it does by itself."""
    until = time.monotonic() + PATIENCE
    while dump(name) != before and time.monotonic() < until:
        time.sleep(0.2)
    assert difference(before, dump(name)) == {}


def difference(one: dict[str, object], two: dict[str, object]) -> dict[str, object]:
    """Return what `one` and `two` have each without the other."""
    found: dict[str, object] = {}
    for key, mine in one.items():
        theirs = two[key]
        if mine != theirs and isinstance(mine, list) and isinstance(theirs, list):
            gone, new = Counter(mine) - Counter(theirs), Counter(theirs) - Counter(mine)
            found[key] = {"gone": list(gone.elements()), "new": list(new.elements())}
    return found
