"""Which accelerator works here: decided by booting a kernel under KVM, because a device node proves nothing.

A host can have `/dev/kvm`, answer its version and make virtual machines, and still be unable to run a guest kernel (KVM
inside some virtual machines is like that). So a kernel without a root file system is booted under a deadline: when it
complains that it finds no root, it has booted, and KVM is real. What was found is kept in a file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pbotvm_qemu import paths, process
from pbotvm_qemu.errors import CommandError, HostError, tail

Name = Literal["kvm", "tcg"]

log = logging.getLogger(__name__)

DEADLINE = 10.0  # seconds; where KVM works the kernel takes one or two
DEVICE = Path("/dev/kvm")

_CPU_INFO = Path("/proc/cpuinfo")
_BOOT = Path("/boot")
_VERSION = 1  # of the cache file
_LINES_MAX = 400
# A kernel that got this far has set up its memory, its clocks and its drivers.
_BOOTED = re.compile(r"Kernel panic - not syncing: (VFS|No working init)")
_KVM_ERROR = re.compile(r"KVM internal error[^\r\n]*|KVM: entry failed[^\r\n]*")
_MSR = re.compile(r"failed to (?:set|get) MSR 0x[0-9a-f]+")

OVERHEAD = 384 << 20  # bytes of host memory for one QEMU beside its guest's, translated code included
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    # tb-size is in MiB of translated code; QEMU's default is up to 1 GiB a process. What is full is emptied: hello world
    # in C needs 85 the first time and 25 more each time after that, on top of 42 for the kernel, the agent and Python.
    # Nehalem is x86-64-v2 without AVX and XSAVE. With them (`-cpu max`) the C library picks AVX code, which is slow
    # under emulation: a run of `true` took 1.3 times as long, measured in turn on one host.
    # Without cx16, because QEMU before 8.0 leaves junk in the flags after cmpxchg16b: an interrupt at that very moment
    # saved it, and the kernel, whose allocator uses the instruction when it is there, died of a double fault.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Nehalem,-cx16"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accelerator to use, and why in one sentence."""

    name: Name
    reason: str
    probed: bool  # False when /dev/kvm looks usable but there was no kernel to try it with


class _Seen(Exception):  # noqa: N818 - not an error: ends the probe as soon as its outcome is known
    """A line that decides the probe has been printed."""


def arguments(name: str) -> list[str]:
    """Return QEMU's arguments for the accelerator `name`.

    Raises HostError for a name other than "kvm" and "tcg".
    """
    if name not in _ARGUMENTS:
        raise HostError(f"there is no accelerator {name!r}", hint="use kvm or tcg")
    return list(_ARGUMENTS[name])


async def choose(qemu: str, kernel: Path | None, *, deadline: float = DEADLINE) -> Verdict:
    """Return the accelerator for the QEMU binary `qemu`: what is cached, else what booting `kernel` under KVM shows.

    Without a `kernel` the host's own is tried. Never raises for a host on which KVM fails: that is the answer TCG. The
    probe takes at most about `deadline` seconds.
    """
    if problem := _refused():
        return Verdict("tcg", problem, probed=True)
    if verdict := cached(qemu):
        return verdict
    if kernel is None:
        kernel = _host_kernel()
    if kernel is None:
        return Verdict("tcg", f"{DEVICE} is there, but no kernel at hand to try it with; `create` will", probed=False)
    verdict = await _probe(qemu, kernel, deadline)
    _remember(qemu, verdict)
    return verdict


def cached(qemu: str) -> Verdict | None:
    """Return what an earlier probe found for this very host kernel, CPU and QEMU binary, or None."""
    try:
        table = json.loads(paths.accelerator_verdicts().read_text("utf-8"))
        if table["key"] != _key(qemu):
            return None
        name, reason = table["verdict"]["name"], table["verdict"]["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, damaged or of another version: probing again costs seconds, trusting it could cost more
    if name not in ("kvm", "tcg") or not isinstance(reason, str):
        return None
    return Verdict(name, reason, probed=True)


def forget() -> None:
    """Drop the cached verdict, so that the next `choose` boots again. Raises HostError when it cannot be removed."""
    file = paths.accelerator_verdicts()
    try:
        file.unlink(missing_ok=True)
    except OSError as exc:
        raise HostError(f"cannot remove {file}: {exc.strerror}", hint="remove it by hand") from exc


def _remember(qemu: str, verdict: Verdict) -> None:
    file = paths.accelerator_verdicts()
    text = json.dumps({"key": _key(qemu), "verdict": asdict(verdict)}, indent=1)
    try:
        # Root's QEMU runs as another user, who reads images under this folder.
        directory = paths.private(file.parent, mode=0o755)
        descriptor, name = tempfile.mkstemp(prefix=file.name, dir=directory)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(name).replace(file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, HostError) as exc:
        log.warning("the accelerator's verdict cannot be kept: %s", exc)  # the next start pays for the probe again


def _key(qemu: str) -> dict[str, object]:
    """Return everything that a verdict depends on."""
    binary = Path(shutil.which(qemu) or qemu).resolve()
    try:
        stat = binary.stat()
        size, modified = stat.st_size, stat.st_mtime_ns
    except OSError:
        size, modified = 0, 0
    return {
        "version": _VERSION,
        "kernel": os.uname().release,
        "qemu": [str(binary), size, modified],
        "cpu": cpu_model(),
        "kvm": DEVICE.exists(),
    }


def cpu_model() -> str:
    """Return the host CPU's model name, or "unknown"."""
    try:
        text = _CPU_INFO.read_text("utf-8", "replace")
    except OSError:
        return "unknown"
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else "unknown"


def _refused() -> str | None:
    """Return why /dev/kvm cannot even be opened, or None when it can."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {DEVICE}: no hardware virtualisation, or its kernel module is not loaded"
    except OSError as exc:
        return f"{DEVICE} cannot be opened: {exc.strerror}"
    return None


def _host_kernel() -> Path | None:
    for file in (_BOOT / f"vmlinuz-{os.uname().release}", _BOOT / "vmlinuz"):
        if file.is_file() and os.access(file, os.R_OK):
            return file
    return None


async def _probe(qemu: str, kernel: Path, deadline: float) -> Verdict:
    booted, seen = await _boot(qemu, kernel, arguments("kvm"), deadline)
    if booted:
        return Verdict("kvm", "a kernel booted under KVM", probed=True)
    return Verdict("tcg", f"{DEVICE} is there, but no kernel boots under it: {seen}", probed=True)


async def _boot(qemu: str, kernel: Path, accelerator: list[str], deadline: float) -> tuple[bool, str]:
    """Boot `kernel` without a root file system; tell whether it got as far as missing it, and what was seen."""
    lines: list[str] = []

    def look(line: str) -> None:
        if len(lines) < _LINES_MAX:
            lines.append(line)
        if _BOOTED.search(line) or _KVM_ERROR.search(line):
            raise _Seen  # after an internal error QEMU stays for ever, paused

    argv = [
        qemu,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35",
        *accelerator,
        "-m", "128",
        "-kernel", str(kernel),
        # One character on the serial port is one VM exit: say nothing but the panic.
        "-append", "console=ttyS0 quiet panic=-1",
        # The console joins QEMU's own complaints on stderr, which is read line by line.
        "-chardev", "file,id=console,path=/dev/fd/2",
        "-serial", "chardev:console",
    ]  # fmt: skip
    how = ""
    # QEMU aborts when it cannot set a register; whatever core file that leaves goes away with the folder.
    with tempfile.TemporaryDirectory(prefix="pbotvm-kvm-", ignore_cleanup_errors=True) as scratch:
        try:
            ended = await process.run(argv, timeout=deadline, cwd=Path(scratch), on_line=look)
        except _Seen:
            pass
        except CommandError as exc:
            if not isinstance(exc.__cause__, TimeoutError):
                how = str(exc)
            else:
                how = f"{'not booted' if lines else 'nothing but silence'} after {deadline:g} s"
        else:
            how = f"QEMU ended with status {ended.status}"
    return _judge("\n".join(lines), how)


def _judge(text: str, how: str) -> tuple[bool, str]:
    """Tell whether a boot that printed `text` and ended like `how` was a success, and name what was seen."""
    if _BOOTED.search(text):
        return True, "the kernel booted"
    if match := _KVM_ERROR.search(text):
        return False, match[0].strip()
    if match := _MSR.search(text):
        return False, f"{match[0]} (`-cpu host` asks for a register that this KVM does not have)"
    evidence = tail(text.encode(), lines=1, limit=200)
    return False, ": ".join(part for part in (how, evidence) if part)
