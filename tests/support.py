"""What the tests with real machines share: an environment of their own, and a way to call the command line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = [sys.executable, "-m", "pbotvm_qemu"]
LONG = 600.0  # seconds; only a hang takes that long


def missing_for_vm() -> str | None:
    """Return what this host lacks to boot a guest, or None."""
    for program in ("qemu-system-x86_64", "qemu-img", "mmdebstrap"):
        if not shutil.which(program):
            return f"{program} is not installed (scripts/setup installs it)"
    return None


def free_ports(count: int) -> list[int]:
    """Return TCP ports of the loopback address that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def environment(name: str) -> Iterator[dict[str, str]]:
    """Yield an environment with folders and ports of its own, for a machine called `name`; remove it afterwards.

    Images come from the host's ordinary cache: they never change, and take a minute to build.
    """
    base = Path(tempfile.mkdtemp(prefix="pbotvm-test-", dir="/var/tmp"))
    base.chmod(0o755)  # QEMU's user must get through
    serial, health, relay = free_ports(3)
    env = os.environ | {
        "XDG_DATA_HOME": str(base / "data"),
        "XDG_RUNTIME_DIR": str(base / "run"),
        "XDG_CONFIG_HOME": str(base / "config"),
        "PBOTVM_DOMAIN": name,
        "PBOTVM_SERIAL": str(serial),
        "PBOTVM_HEALTH": str(health),
        "PBOTVM_PORT": str(relay),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    for folder in ("data", "run"):
        (base / folder).mkdir(mode=0o755)
    try:
        yield env
    finally:
        stop_all(env)
        left = qemus(str(base))
        shutil.rmtree(base, ignore_errors=True)
        assert not left, f"QEMU processes left behind: {left}"


def places(base: Path) -> dict[str, str]:
    """Return the variables that put our folders below `base`."""
    return {
        "XDG_DATA_HOME": str(base / "data"), "XDG_RUNTIME_DIR": str(base / "run"), "XDG_CONFIG_HOME": str(base / "config"),
    }  # fmt: skip


def packages() -> str:
    """Return a PYTHONPATH with this checkout and what is installed beside it."""
    return f"{Path(__file__).parent.parent}:{sysconfig.get_path('purelib')}"


def python_for(user: str) -> str | None:
    """Return a Python that `user` can run this program with: ours may be in a home that is closed to him."""
    for python in (sys.executable, "/usr/bin/python3"):
        words = ["setpriv", f"--reuid={user}", "--clear-groups", "env", f"PYTHONPATH={packages()}"]
        words += [python, "-c", "import pbotvm_qemu.cli, pbotvm_qemu.machine"]
        if subprocess.run(words, capture_output=True, check=False, cwd="/", timeout=60).returncode == 0:
            return python
    return None


def stop_all(env: dict[str, str]) -> None:
    """Stop every machine of this environment."""
    listing = cli(env, "list", "--json")
    for machine in json.loads(listing.stdout)["machines"] if listing.returncode == 0 else []:
        cli(env, "stop", machine["name"])


def cli(
    env: dict[str, str], *arguments: str, data: bytes | None = None, timeout: float = LONG
) -> subprocess.CompletedProcess[bytes]:
    """Call the command line and return how it ended."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=env,
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def cli_json(env: dict[str, str], *arguments: str, data: bytes | None = None) -> Any:
    """Call the command line and return the JSON object that it printed."""
    return json.loads(cli(env, *arguments, data=data).stdout)


def popen(env: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command line with pipes at all three streams."""
    return subprocess.Popen(
        [*PROGRAM, *arguments], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def qemus(marker: str) -> list[int]:
    """Return the pids of QEMU processes that have `marker` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"qemu-system" in words[0] and any(marker.encode() in word for word in words):
                found.append(int(entry.name))
    return found


def machine_qemus(env: dict[str, str]) -> list[int]:
    """Return the pids of the QEMU processes of this environment's machine, clones with no file of its own included."""
    record = Path(env["XDG_DATA_HOME"]) / "pbotvm-qemu" / "machines" / env["PBOTVM_DOMAIN"] / "machine.json"
    return qemus(json.loads(record.read_text())["uuid"])


def assert_refused(result: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """Hold that a call failed as a call should: the right exit code, one line of cause, one of help, no traceback."""
    said = result.stderr.decode()
    assert result.returncode == code, said
    assert "Traceback" not in said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said
    assert sum(line.startswith("hint: ") for line in said.splitlines()) == 1, said
    for word in words:
        assert word in said, said
