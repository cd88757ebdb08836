"""QEMU's own helper, which puts a TAP into a bridge for ordinary users as far as bridge.conf lets them.

It has no shell, no options of a stranger, and decides by itself; what we add is to say beforehand why it will refuse.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import pwd
import socket
import stat
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pbotvm_qemu import process
from pbotvm_qemu.errors import NetworkError, tail

HELPERS = (
    Path("/usr/lib/qemu/qemu-bridge-helper"),
    Path("/usr/libexec/qemu-bridge-helper"),
    Path("/usr/libexec/qemu/qemu-bridge-helper"),
    Path("/usr/local/libexec/qemu-bridge-helper"),
)
ACLS = (Path("/etc/qemu/bridge.conf"), Path("/etc/qemu-kvm/bridge.conf"))
TUN = Path("/dev/net/tun")  # the helper opens it with the rights of who calls it
DEADLINE = 10.0  # seconds
_CAP_NET_ADMIN = 12
_INCLUDES_MAX = 8


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the helper cannot be used, and what to type."""

    why: str
    hint: str


def refusal(bridge: str | None = None) -> Refusal | None:
    """Return why the helper will not put a TAP into `bridge` (None: into any at all), or None when it will."""
    helper = find()
    line = f"allow {bridge or 'BRIDGE'}"
    if helper is None:
        return Refusal("qemu-bridge-helper is not installed", "apt-get install qemu-system-x86")
    acl = next((path for path in ACLS if path.exists()), None)
    allow = f"as root: mkdir -p {ACLS[0].parent} && echo '{line}' >> {acl or ACLS[0]}"
    setuid = f"chmod u+s {helper}"
    if not privileged(helper) and os.geteuid():
        both = setuid if acl and _allowed(acl, bridge) else f"{allow} && {setuid}"
        return Refusal(
            f"{helper} is neither setuid root nor has cap_net_admin",
            both if both.startswith("as") else f"as root: {both}",
        )
    if acl is None:
        return Refusal("there is no bridge.conf, so it refuses every bridge", allow)
    try:
        allowed = _allowed(acl, bridge)
    except OSError as exc:
        return Refusal(f"{acl} cannot be read: {exc.strerror}", f"as root: chmod a+r {acl}")
    if os.geteuid() and not os.access(TUN, os.R_OK | os.W_OK):
        return Refusal(f"{TUN} is closed to ordinary users", f"as root: chmod 666 {TUN}")
    if not allowed:
        return Refusal(f"{acl} allows {'no bridge' if bridge is None else f'not {bridge}'}", allow)
    return None


def find() -> Path | None:
    """Return where the helper is installed, or None."""
    return next((path for path in HELPERS if path.is_file()), None)


def summary() -> str:
    """Return what bridge.conf says, in one line."""
    acl = next((path for path in ACLS if path.exists()), None)
    if acl is None:
        return "there is no bridge.conf"
    return f"{acl}: {', '.join(' '.join(rule) for rule in rules(acl.read_text('utf-8', 'replace')))}"


def privileged(helper: Path) -> bool:
    """Tell whether `helper` gains the right to make TAPs whoever starts it."""
    status = helper.stat()
    if status.st_mode & stat.S_ISUID and status.st_uid == 0:
        return True
    try:
        raw = os.getxattr(helper, "security.capability")
    except OSError:
        return False
    if len(raw) < 8:
        return False
    # struct vfs_cap_data: flags and version, then the low word of the permitted set (linux/capability.h).
    _, permitted = struct.unpack_from("<II", raw)
    return bool(permitted >> _CAP_NET_ADMIN & 1)


def rules(text: str) -> list[tuple[str, str]]:
    """Return the rules of a bridge.conf as (verb, bridge or file) pairs."""
    found = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0] in ("allow", "deny", "include"):
            found.append((words[0], words[1]))
    return found


def _allowed(acl: Path, bridge: str | None, depth: int = 0) -> bool:
    """Tell whether `acl` lets `bridge` be used: some rule allows it, and none denies it."""
    allowed = denied = False
    for verb, what in rules(acl.read_text("utf-8", "replace")):
        if verb == "include":
            with contextlib.suppress(OSError):
                allowed |= depth < _INCLUDES_MAX and _allowed(Path(what), bridge, depth + 1)
        elif verb == "allow" and (bridge is None or what in ("all", bridge)):
            allowed = True
        elif verb == "deny" and bridge is not None and what in ("all", bridge):
            denied = True
    return allowed and not denied


async def open_tap(bridge: str) -> int:
    """Have the helper put a TAP into `bridge`, and return its descriptor; it is gone when that is closed.

    Raises NetworkError that says which lines to put where when the helper may not, or will not.
    """
    problem = refusal(bridge)
    helper = find()
    if problem or helper is None:
        me = pwd.getpwuid(os.geteuid()).pw_name
        assert problem
        raise NetworkError(f"user {me} cannot have a TAP in {bridge}: {problem.why}", hint=problem.hint)
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as log:
        argv = [str(helper), "--use-vnet", f"--fd={theirs.fileno()}", f"--br={bridge}"]
        child = await process.Child.start(argv, pass_fds=[theirs.fileno()], log=log.fileno())
        if not await child.wait(DEADLINE):
            await child.kill()
        log.seek(0)
        if child.status:
            raise NetworkError(
                f"qemu-bridge-helper refused {bridge}: {tail(log.read(8192)) or f'exit status {child.status}'}",
                hint=f"is there a bridge {bridge}? see `ip link show {bridge}`, and bridge.conf",
            )
        return await asyncio.to_thread(_receive, ours)


def _receive(sock: socket.socket) -> int:
    """Return the descriptor that the helper sent."""
    sock.settimeout(1.0)
    numbers = array.array("i")
    with contextlib.suppress(OSError):
        _data, control, _flags, _address = sock.recvmsg(1, socket.CMSG_SPACE(numbers.itemsize))
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if not numbers:
        raise NetworkError("qemu-bridge-helper ended without giving us a TAP", hint="see `pbotvm-qemu doctor`")
    os.set_inheritable(numbers[0], False)
    return numbers[0]
