"""The outer guest of `scripts/test-nested`: a machine whose kernel has vhost_vsock, and in which we make machines.

A host like a continuous integration runner has no `/dev/vhost-vsock` and may load no module. A guest of its own has both,
under emulation too. So this boots one, puts the program and its Python packages into it, has it make a machine there,
and runs the tests of `tests/vsock` in it. What takes long is kept as a snapshot, by the hash of all that went into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu import image, paths, plan, process, qmp
from pbotvm_qemu.channel import Channel
from pbotvm_qemu.errors import RunLostError
from pbotvm_qemu.guest import spec, wire
from pbotvm_qemu.languages import Registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pbotvm_qemu.channel import Stream

TOP = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MEMORY = "3G"
DISK = 6 << 30  # bytes
PYTHON = "3.13"  # of Debian trixie
INNER = ("--languages", "sh", "--memory", "256M")
# Each in front of those that need it. QEMU emulates AMD's virtualisation, so the outer guest has KVM: the inner one is
# emulated once, not twice.
MODULES = ("vhost_iotlb", "vhost", "vhost_vsock", "irqbypass", "kvm", "kvm-amd")
PACKAGES = ("libstdc++6", "qemu-system-x86", "qemu-utils")
TESTED = {"PBOTVM_TEST_BYTES": "4M", "PBOTVM_TEST_ROUNDS": "3"}  # how much, unless our own environment says it
FOLDER = "/opt/pbotvm"  # in the outer guest
ENVIRONMENT = {
    "PYTHONPATH": f"{FOLDER}:{FOLDER}/site",
    "PYTHONDONTWRITEBYTECODE": "",
    "PBOTVM_DOMAIN": "inner",
    "PBOTVM_NESTED": "1",  # a test that cannot run there has failed
}

BOOT = 300.0  # seconds, as all below: only a hang takes so long
CREATE = 2400.0
SAVE = 300.0
TESTS = 3000.0
_START = time.monotonic()

# The outer guest has hardware virtualisation, but that is emulated: deadlines for real hardware are too short.
_CREATE = """
from pbotvm_qemu import accel, cli, machine
accel.choose.__kwdefaults__["deadline"] = 300.0
machine.BOOT_TIMEOUT.update(kvm=900.0, tcg=900.0)
machine.RESTORE_TIMEOUT.update(kvm=300.0, tcg=300.0)
cli.main()
"""


def say(text: str) -> None:
    """Print a stage with the seconds since the start."""
    print(f"test-nested: {time.monotonic() - _START:6.1f} s: {text}", flush=True)


class Outer:
    """The running outer guest; `run` runs programs in it as root."""

    def __init__(self, disk: Path, kernel: Path, initramfs: Path, *, snapshot: str | None) -> None:
        self._files = (disk, kernel, initramfs)
        self._snapshot = snapshot
        self._stack = AsyncExitStack()
        self.monitor: qmp.Monitor
        self.channel: Channel

    async def __aenter__(self) -> Outer:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        disk, kernel, initramfs = self._files
        monitor, their_monitor = socket.socketpair()
        agent, their_agent = socket.socketpair()
        numbers = (their_monitor.fileno(), their_agent.fileno())
        argv = ["setpriv", "--no-new-privs", "--pdeathsig", "KILL", "--", *command(disk, kernel, initramfs, *numbers)]
        if self._snapshot:
            argv += ["-loadvm", self._snapshot]
        log = stack.enter_context((disk.parent / "qemu.log").open("ab"))
        with their_monitor, their_agent:
            child = await process.Child.start(argv, pass_fds=numbers, log=log.fileno())
        stack.push_async_callback(child.kill)
        self.monitor = await stack.enter_async_context(qmp.connect("outer", monitor))
        self.channel = await Channel.open(agent)
        stack.push_async_callback(self.channel.close)
        await self.channel.handshake(BOOT)
        await self.channel.resume("outer")

    async def run(
        self, *argv: str, files: dict[str, bytes] | None = None, within: float = 300.0, quiet: bool = False
    ) -> int:
        """Run `argv` with `files` in its folder, show what it prints, and return its exit status."""
        given = files or {}
        request = spec.RunSpec(
            files=tuple(spec.File(name, len(data)) for name, data in given.items()),
            steps=(argv,),
            env=ENVIRONMENT,
            stdin=False,
            limits=spec.Limits(within, 86400, 0, 4096, 1 << 40, 1 << 40),
            collect=(),
        )

        async def show(_stream: Stream, data: bytes) -> None:
            if not quiet:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()

        try:
            outcome = await self.channel.execute(request, list(given.values()), on_output=show)
        except RunLostError as exc:
            said = (self._files[0].parent / "console.log").read_text(errors="replace")[-2000:]
            raise SystemExit(f"test-nested: {exc}; the last words of the outer guest:\n{said}") from None
        if outcome.timed_out or outcome.message:
            say(f"{argv[0]}: {outcome.message or f'not done within {within:.0f} s'}")
        return outcome.exit_code

    async def put(self, archive: bytes) -> None:
        """Unpack a tar archive below FOLDER. It travels in pieces that a run may have."""
        size = wire.FILES_BYTES_MAX // 2
        await self.check("mkdir", "-p", FOLDER)
        for start in range(0, len(archive), size):
            await self.check(
                "sh", "-c", 'cat part >>"$1"', "sh", f"{FOLDER}/archive", files={"part": archive[start : start + size]}
            )
        await self.check("tar", "-xf", f"{FOLDER}/archive", "-C", FOLDER, "--no-same-owner")
        await self.check("rm", f"{FOLDER}/archive")

    async def check(self, *argv: str, files: dict[str, bytes] | None = None, within: float = 300.0) -> None:
        """Run `argv`, and end everything when it fails."""
        status = await self.run(*argv, files=files, within=within)
        if status:
            raise SystemExit(f"test-nested: {' '.join(argv)[:200]} in the outer guest ended with {status}")


def command(disk: Path, kernel: Path, initramfs: Path, monitor: int, agent: int) -> list[str]:
    """Return QEMU's command line for the outer guest."""
    return [
        process.find_program("qemu-system-x86_64", package="qemu-system-x86"),
        "-name", "pbotvm-outer", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        # Every instruction of the inner guest is translated twice: room for translated code is what counts. One processor:
        # with two, QEMU 7.2 may translate what the other one is just patching, and keep that. The guest's kernel patches
        # its scheduler whenever a first virtual machine starts and a last one ends, and then died of a stale breakpoint.
        "-machine", "q35", "-accel", "tcg,tb-size=1024", "-cpu", "max,-cx16", "-smp", "1", "-m", MEMORY,
        "-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control",
        "-blockdev", f"driver=file,node-name=file0,filename={plan.escape(disk)},cache.no-flush=on,discard=unmap",
        "-blockdev", "driver=qcow2,node-name=disk0,file=file0,cache.no-flush=on,discard=unmap",
        "-device", "virtio-blk-pci,drive=disk0",
        "-device", "virtio-rng-pci",
        "-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={agent}",
        "-device", "virtserialport,chardev=agent,name=org.pbotvm.agent",
        "-chardev", f"file,id=console,path={plan.escape(disk.parent / 'console.log')}", "-device", "isa-serial,chardev=console",
        "-kernel", str(kernel), "-initrd", str(initramfs),
        "-append", "console=ttyS0 quiet loglevel=3 panic=-1 random.trust_cpu=on mitigations=off no_timer_check",
    ]  # fmt: skip


def outer_recipe() -> image.Recipe:
    """Return the recipe of the outer guest: that of every guest, with QEMU in it and vhost_vsock."""
    usual = image.Recipe.load([])
    return replace(usual, packages=tuple(sorted({*usual.packages, *PACKAGES})), modules=(*usual.modules[:5], *MODULES))


def python_packages(target: Path) -> Path:
    """Return a folder with the packages that the program and its tests need, for the outer guest's Python."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    development = project["optional-dependencies"]["dev"]
    wanted = [*project["dependencies"], *(item for item in development if item.startswith("pytest"))]
    folder = target / hashlib.sha256("\0".join([PYTHON, *wanted]).encode()).hexdigest()[:16]
    if not folder.is_dir():
        temporary = folder.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        argv = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        argv += [
            "--target",
            str(temporary),
            "--python-version",
            PYTHON,
            "--implementation",
            "cp",
            "--only-binary=:all:",
        ]
        argv += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64", *wanted]
        subprocess.run(argv, check=True, timeout=600)
        temporary.rename(folder)
    return folder


def pack(entries: Iterable[tuple[Path, str]]) -> bytes:
    """Return a tar archive of (file or folder, name in it) that depends on names and contents alone."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in member.name:
            return None
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        return member

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, name in entries:
            tar.add(path, name, filter=plain)
    return out.getvalue()


def _show(stage: str, _done: float) -> None:
    say(f"image: {stage}")


async def test(arguments: Sequence[str]) -> int:
    """Run the tests in the outer guest; return pytest's exit status."""
    cache = paths.private(paths.cache_dir() / "nested", mode=0o755)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("test-nested: another one runs: wait for it") from None
        return await _test(cache, arguments)


async def _test(cache: Path, arguments: Sequence[str]) -> int:
    outer = await image.ensure(outer_recipe(), _show)
    languages = Registry.load(cache / "none").select(INNER[1])
    inner = await image.ensure(image.Recipe.load(languages), _show)
    packages = python_packages(cache)
    program = pack([(TOP / name, name) for name in ("pbotvm_qemu", "images", "tests", "pyproject.toml")])
    place = cache / f"outer-{_key(outer, inner, packages)}"
    initramfs = place / "initramfs.cpio"
    disk = place / "disk.qcow2"
    ready = place / "ready"
    warm = ready.exists()
    if not warm:
        for old in cache.glob("outer-*"):
            shutil.rmtree(old)
        place.mkdir()
        image.write_initramfs(outer, initramfs)
        with initramfs.open("ab") as file:  # the kernel unpacks archives that stand one after another
            file.write(image.cpio([("agent/start", 0o755, (HERE / "start").read_bytes())]))
        await image.create_overlay(outer, disk, DISK)
        say("booting the outer guest, for the first time")
        async with Outer(disk, outer.kernel, initramfs, snapshot=None) as guest:
            say("the outer guest is up")
            await _prepare(guest, program, pack([(packages, "site"), (inner.directory, inner.id)]), inner.id)
            say("taking a snapshot of the outer guest")
            await guest.monitor.snapshot_save("1", "disk0", timeout=SAVE)
        ready.touch()
    say(f"starting the outer guest from its snapshot ({disk.stat().st_blocks * 512 >> 20} MiB on disk)")
    async with Outer(disk, outer.kernel, initramfs, snapshot="1") as guest:
        say("the outer guest answers")
        await guest.check("sh", "-c", f"cd {FOLDER} && rm -r pbotvm_qemu images tests")
        await guest.put(program)
        say("running the tests")
        chosen = TESTED | {name: value for name, value in os.environ.items() if name in TESTED}
        status = await guest.run(
            "env", "-C", FOLDER, *(f"{name}={value}" for name, value in chosen.items()), "python3", "-m", "pytest",
            *(arguments or ["tests/vsock", "-v", "-s", "--durations=0"]), within=TESTS,
        )  # fmt: skip
    say(f"the tests ended with {status} (from a {'warm' if warm else 'cold'} cache)")
    return status


async def _prepare(guest: Outer, program: bytes, others: bytes, image_id: str) -> None:
    await guest.check("test", "-c", "/dev/vhost-vsock")
    await guest.put(others)
    await guest.put(program)
    images = "/var/cache/pbotvm-qemu/images"
    await guest.check("sh", "-c", f"mkdir -p {images} && mv {FOLDER}/{image_id} {images}/")
    say("the program is in; making the inner machine")
    await guest.check("python3", "-c", _CREATE, "create", *INNER, within=CREATE)
    await guest.check("sync")


def _key(outer: image.Image, inner: image.Image, packages: Path) -> str:
    """Return a hash of what the inner machine is made of and by.

    The rest of the program is put in anew each time; it refuses a machine that does not fit it.
    """
    digest = hashlib.sha256(" ".join([outer.id, inner.id, packages.name, repr((INNER, DISK, ENVIRONMENT))]).encode())
    digest.update(" ".join(command(Path("disk"), Path(), Path(), 0, 0)).encode())
    digest.update(plan.qemu_identity(process.find_program("qemu-system-x86_64", package="qemu-system-x86")).encode())
    package = TOP / "pbotvm_qemu"
    made_by = [package / f"{name}.py" for name in ("accel", "creation", "image", "plan", "template")]
    for file in [*made_by, *_files(package / "guest"), *_files(TOP / "images"), HERE / "start"]:
        digest.update(f"{file.relative_to(TOP)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(test(sys.argv[1:])))
    sys.exit(130)
