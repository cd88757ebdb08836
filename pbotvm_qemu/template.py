"""A warm machine, frozen: files from which any number of clones start in milliseconds.

A template is a folder of the machine:

```text
ram            the guest's memory, which clones map copy on write
state          processor and devices (a QEMU migration stream without memory)
disk.qcow2     the disk as it was at that moment, the backing file of every clone's overlay
overlay.qcow2  an empty overlay: copied for each clone, which is quicker than asking qemu-img
template.json  what it was made with, and size, times and sha256 of each file; written last
```

Nothing in it ever changes. Restoring it with another QEMU, other devices or other files is corruption and not an error
message, so it is checked by name before use.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import tempfile
import weakref
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from pbotvm_qemu import paths, process, state
from pbotvm_qemu.errors import HostError, StateError
from pbotvm_qemu.plan import Memory, system_user

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_FORMAT = 1
_FILES = ("ram", "state", "disk.qcow2", "overlay.qcow2")
_COPY = 1 << 24  # bytes in one call of sendfile
_IN_PLACE = 4 << 20  # a larger file is copied in a thread, so that others are served meanwhile
PROTECTED_FROM = (8, 2)  # QEMU can map a file copy on write without the right to change it (readonly=on,rom=off)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A stopped machine as files: what `VirtualMachine` needs to thaw it.

    Without `ram`, the memory is part of `state`.
    """

    state: Path
    overlay: Path
    ram: Path | None = None

    @property
    def without_memory(self) -> bool:
        """Whether `state` holds processor and devices only."""
        return self.ram is not None

    async def new_disk(self, folder: Path) -> IO[bytes]:
        """Return a copy of the overlay as an open file without a name: whatever happens, nothing is left of it.

        Raises HostError when there is no room.
        """
        try:
            copy = tempfile.TemporaryFile(dir=folder, prefix=".overlay-")  # noqa: SIM115 - the caller owns it
        except OSError as exc:
            raise HostError(f"cannot make a disk in {folder}: {exc.strerror}", hint="free some space") from exc
        try:
            if self.overlay.stat().st_size > _IN_PLACE:
                await asyncio.to_thread(copy_into, self.overlay, copy.fileno())
            else:
                copy_into(self.overlay, copy.fileno())
        except OSError as exc:
            copy.close()
            raise HostError(f"cannot copy the empty disk to {folder}: {exc.strerror}", hint="free some space") from exc
        except BaseException:
            copy.close()
            raise
        return copy


def copy_into(source: Path, target: int) -> None:
    """Copy the content of `source` into the open file `target`. Raises OSError."""
    with source.open("rb", buffering=0) as stream:
        offset = 0
        while done := os.sendfile(target, stream.fileno(), offset, _COPY):
            offset += done


@dataclass(frozen=True, slots=True)
class Template:
    """A finished template. Made by `seal`, found by `load`."""

    directory: Path
    fingerprint: Mapping[str, str]
    files: Mapping[str, tuple[int, int, int, str]]  # size in bytes, mtime and ctime in ns, sha256
    protected: bool  # whether QEMU maps the memory without the right to change it

    @property
    def frozen(self) -> Frozen:
        """The files to thaw a clone from."""
        at = self.directory
        return Frozen(at / "state", at / "overlay.qcow2", at / "ram")

    @property
    def memory(self) -> Memory:
        """How a clone maps the memory."""
        return Memory(self.directory / "ram", shared=False, protected=self.protected)

    def check(self) -> None:
        """Look at sizes and times, which takes microseconds. Raises StateError that names the file that changed.

        The kernel sets ctime at every change, and nobody but root can set it back by hand.
        """
        for name, (size, modified, changed, _digest) in self.files.items():
            found = self._stat(name)
            if (found.st_size, found.st_mtime_ns, found.st_ctime_ns) != (size, modified, changed):
                raise self.damaged(f"{self.directory / name} was changed")

    def verify(self) -> None:
        """Compare every byte. Raises StateError for the first file that differs."""
        for name, (size, _modified, _changed, digest) in self.files.items():
            if self._stat(name).st_size != size or _sha256(self.directory / name) != digest:
                raise self.damaged(f"{self.directory / name} is damaged: wrong content")

    def _stat(self, name: str) -> os.stat_result:
        try:
            return (self.directory / name).stat()
        except OSError as exc:
            raise self.damaged(f"{self.directory / name}: {exc.strerror}") from exc

    @property
    def _machine(self) -> str:
        home = self.directory.parent
        return home.parent.name if home.name.startswith("build-") else home.name

    def damaged(self, what: str) -> StateError:
        """Return the error that says why this template cannot be used."""
        return StateError(
            f"the template of machine {self._machine!r} cannot be used: {what}",
            hint=f"run `pbotvm-qemu create --force {self._machine}`",
        )


def prepare(directory: Path, size: int) -> Path:
    """Make the folder of a template and its memory file of `size` bytes for QEMU to fill; return that file."""
    paths.private(directory, mode=0o711)
    ram = directory / "ram"
    try:
        with ram.open("xb") as stream:
            stream.truncate(size)
        own(ram)
    except OSError as exc:
        raise HostError(f"cannot make {ram}: {exc.strerror}", hint="free some space") from exc
    return ram


def own(file: Path) -> None:
    """Give `file` to the user that QEMU runs as, when that is not us."""
    if os.geteuid() == 0:
        user = system_user()
        os.chown(file, user.pw_uid, user.pw_gid)


async def seal(
    directory: Path, fingerprint: Mapping[str, str], *, disk_size: int, qemu_version: tuple[int, int]
) -> Template:
    """Turn the files that a frozen machine left in `directory` into a template.

    Raises HostError or CommandError when that cannot be done.
    """
    disk, overlay = directory / "disk.qcow2", directory / "overlay.qcow2"
    protected = qemu_version >= PROTECTED_FROM
    for name, mode in (("ram", 0o440 if protected else 0o660), ("state", 0o400), ("disk.qcow2", 0o440)):
        _take_back(directory / name, mode)
    qemu_img = process.find_program("qemu-img", package="qemu-utils")
    argv = [qemu_img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(disk), str(overlay), str(disk_size)]
    (await process.run(argv)).check(hint="check free space")
    overlay.chmod(0o400)
    files = {}
    for name in _FILES:
        digest = await asyncio.to_thread(_sha256, directory / name)
        found = (directory / name).stat()
        files[name] = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, digest)
    template = Template(directory, dict(fingerprint), files, protected)
    table = {"format": _FORMAT, "fingerprint": dict(fingerprint), "files": files, "protected": protected}
    state.write_atomic(directory / "template.json", json.dumps(table, indent=1))
    return template


def _take_back(file: Path, mode: int) -> None:
    """Make `file` ours, with QEMU's group: QEMU may read it, and before 8.2 must be able to write its memory file."""
    if os.geteuid() == 0:
        os.chown(file, 0, system_user().pw_gid)
    elif mode == 0o440:
        mode = 0o400
    elif mode == 0o660:
        mode = 0o600
    file.chmod(mode)


def use(owner: object, template: Template) -> Callable[[], object]:
    """Keep `template` from being deleted for as long as the object `owner` lives: a change of languages replaces it.

    Return what lets go of it earlier. Raises StateError when it is gone already.
    """
    try:
        fd = os.open(template.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise template.damaged(f"{template.directory}: {exc.strerror}") from exc
    release = weakref.finalize(owner, os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise template.damaged("it was replaced just now") from None
    template.check()
    return release


def exists(name: str) -> bool:
    """Tell whether machine `name` was ever frozen."""
    return (state.files(name).template / "template.json").exists()


def load(name: str) -> Template:
    """Return the template of machine `name`. Raises StateError when there is none or its description is damaged."""
    directory = state.files(name).template
    again = f"run `pbotvm-qemu create --force {name}`"
    try:
        table = json.loads((directory / "template.json").read_text("utf-8"))
        if table["format"] != _FORMAT:
            raise StateError(f"the template of machine {name!r} has format {table['format']}", hint=again)
        files = {str(key): (int(s), int(m), int(c), str(h)) for key, (s, m, c, h) in table["files"].items()}
        fingerprint = {str(key): str(value) for key, value in table["fingerprint"].items()}
        protected = table["protected"] is True
    except FileNotFoundError:
        raise StateError(f"machine {name!r} has no template", hint=again) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise StateError(f"the template of machine {name!r} has a damaged description: {exc}", hint=again) from exc
    if set(files) != set(_FILES):
        raise StateError(f"the template of machine {name!r} has a damaged description: wrong files", hint=again)
    return Template(directory, fingerprint, files, protected)


class SavedState:
    """The state of one clone at one moment, in files without names. Close it to give the space back."""

    def __init__(self, state_file: IO[bytes], disk: IO[bytes]) -> None:
        self._state = state_file
        self._disk = disk

    @property
    def frozen(self) -> Frozen:
        """The files to thaw it from."""
        return Frozen(paths.open_file(self._state.fileno()), paths.open_file(self._disk.fileno()))

    @property
    def size(self) -> int:
        """Bytes that it takes on the host's disk."""
        return sum(os.fstat(file.fileno()).st_blocks * 512 for file in (self._state, self._disk))

    def close(self) -> None:
        """Forget it."""
        self._state.close()
        self._disk.close()


def private_memory(template: Template) -> IO[bytes]:
    """Return a copy of the template's memory that no other clone shares, as a file that lives in memory only.

    Raises HostError when there is not enough memory.
    """
    source = template.directory / "ram"
    fd = os.memfd_create("pbotvm-ram", os.MFD_CLOEXEC)
    copy = os.fdopen(fd, "r+b", buffering=0)
    try:
        with source.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            os.ftruncate(fd, size)
            _copy_data(stream.fileno(), fd, size)
    except OSError as exc:
        copy.close()
        raise HostError(f"cannot copy the guest's memory: {exc.strerror}", hint="free some memory") from exc
    return copy


def _copy_data(source: int, target: int, size: int) -> None:
    """Copy the parts of a sparse file that hold data."""
    offset = 0
    while offset < size:
        try:
            begin = os.lseek(source, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes follow
            return
        end = os.lseek(source, begin, os.SEEK_HOLE)
        os.lseek(target, begin, os.SEEK_SET)
        while begin < end:
            done = os.sendfile(target, source, begin, min(_COPY, end - begin))
            if not done:
                return
            begin += done
        offset = end


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def matching(name: str, fingerprint: Mapping[str, str]) -> Template:
    """Return the template of machine `name`, unchanged and made with `fingerprint`.

    Raises StateError that names what is missing, damaged or different.
    """
    template = load(name)
    for key, value in fingerprint.items():
        was = template.fingerprint.get(key, "unknown")
        if was != value:
            raise StateError(
                f"the template of machine {name!r} was made with another {key} (was {was[:80]}, is {value[:80]})",
                hint=f"run `pbotvm-qemu create --force {name}`",
            )
    template.check()
    return template
