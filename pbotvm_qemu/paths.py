"""Every directory and file name that we write, in one place.

An ordinary user gets the XDG base directories. Root gets the system ones, because QEMU is then started as another
user who cannot enter root's home. An `XDG_*` variable that is set wins for both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pbotvm_qemu.errors import HostError

APP = "pbotvm-qemu"

# Linux: sun_path holds 108 bytes with the closing NUL (unix(7)).
SOCKET_PATH_MAX = 107


def _base(variable: str, system: str, user: Path) -> Path:
    value = os.environ.get(variable, "")
    if value.startswith("/"):  # the XDG specification: relative values are to be ignored
        return Path(value) / APP
    return Path(system) / APP if os.geteuid() == 0 else user / APP


def config_dir() -> Path:
    """Return the folder of `config.toml` and the operator's own languages."""
    return _base("XDG_CONFIG_HOME", "/etc", Path.home() / ".config")


def data_dir() -> Path:
    """Return the folder of machines: what is lost when it is deleted."""
    return _base("XDG_DATA_HOME", "/var/lib", Path.home() / ".local/share")


def cache_dir() -> Path:
    """Return the folder of images and verdicts: what can be made again."""
    return _base("XDG_CACHE_HOME", "/var/cache", Path.home() / ".cache")


def runtime_dir() -> Path:
    """Return the folder of sockets and process records: what is gone after a reboot."""
    fallback = Path(f"/run/user/{os.geteuid()}")
    if not fallback.is_dir():
        fallback = cache_dir().parent / f"run-{os.geteuid()}"
    return _base("XDG_RUNTIME_DIR", "/run", fallback)


def private(directory: Path, *, mode: int = 0o700) -> Path:
    """Make `directory` (with parents) and return it, sure that it is ours.

    Raises HostError when it cannot be made, or belongs to somebody else.
    """
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)  # whatever the umask says
        owner = directory.stat().st_uid
    except OSError as exc:
        raise HostError(
            f"cannot make {directory}: {exc.strerror}", hint="check its parent's owner and free space"
        ) from exc
    if owner != os.geteuid():
        raise HostError(
            f"{directory} belongs to user {owner}, not to us",
            hint="remove it, or point XDG_RUNTIME_DIR, XDG_DATA_HOME and XDG_CACHE_HOME elsewhere",
        )
    return directory


def config_file() -> Path:
    """Return the path of the configuration file, whether or not it exists."""
    return config_dir() / "config.toml"


def user_languages() -> Path:
    """Return the folder of the operator's own language files, whether or not it exists."""
    return config_dir() / "languages"


def images() -> Path:
    """Return the folder that holds one folder per built image."""
    return cache_dir() / "images"


def history() -> Path:
    """Return the folder of what was run last in each channel and language, whether or not it exists."""
    return data_dir() / "history"


def kept() -> Path:
    """Return the folder of what programs keep between runs, whether or not it exists."""
    return data_dir() / "kept"


def accelerator_verdicts() -> Path:
    """Return the file in which the result of the KVM probe is cached."""
    return cache_dir() / "accelerator.json"


def recipes() -> Path:
    """Return the folder of image recipes: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "images"
    return installed if installed.is_dir() else package.parent / "images"


def guest_package() -> Path:
    """Return the folder of the guest agent's source."""
    return Path(__file__).resolve().parent / "guest"


def open_file(fd: int) -> Path:
    """Return a path to our open file `fd`, also when it has no name any more: opened again, it has its own position."""
    return Path(f"/proc/self/fd/{fd}")


DAEMON_FOLDERS = "vsock-*"  # in a machine's runtime folder, one for each vsock daemon


@dataclass(frozen=True, slots=True)
class MachinePaths:
    """The files of one machine.

    What a change of languages replaces lies in `home`: the machine's own folder as `create` leaves it, or the folder
    `build` in it.
    """

    name: str
    build: str = ""

    @property
    def directory(self) -> Path:
        """The machine's own folder, which `rm` removes."""
        return data_dir() / "machines" / self.name

    @property
    def home(self) -> Path:
        """Where disk, initramfs and template are."""
        return self.directory / self.build

    @property
    def record(self) -> Path:
        """What `create` decided, as JSON."""
        return self.directory / "machine.json"

    @property
    def disk(self) -> Path:
        """The qcow2 overlay that holds the machine's changes and its snapshots."""
        return self.home / "disk.qcow2"

    @property
    def initramfs(self) -> Path:
        """The initramfs with the guest agent."""
        return self.home / "initramfs.cpio"

    @property
    def template(self) -> Path:
        """The folder of the frozen machine that clones start from."""
        return self.home / "template"

    @property
    def clones(self) -> Path:
        """The folder of the clones' disks. They have no names, so it looks empty."""
        return self.directory / "clones"

    @property
    def qemu_log(self) -> Path:
        """What QEMU printed."""
        return self.directory / "qemu.log"

    @property
    def console_log(self) -> Path:
        """What the guest kernel printed."""
        return self.directory / "console.log"

    @property
    def keeper_log(self) -> Path:
        """What a detached `run` or `start` logged."""
        return self.directory / "run.log"

    @property
    def runtime(self) -> Path:
        """The folder of sockets and of the process record."""
        return runtime_dir() / "machines" / self.name

    @property
    def lock(self) -> Path:
        """Held by the one process that runs or changes this machine, or together by those who clone it."""
        return runtime_dir() / "machines" / f"{self.name}.lock"

    @property
    def keeper_lock(self) -> Path:
        """Held by the one process that keeps this machine ready for others."""
        return runtime_dir() / "machines" / f"{self.name}.keeper.lock"

    @property
    def change_lock(self) -> Path:
        """Held by the one process that makes, changes or removes this machine, while others may go on using it."""
        return runtime_dir() / "machines" / f"{self.name}.change.lock"

    @property
    def process_record(self) -> Path:
        """Who runs this machine now, as JSON."""
        return self.runtime / "process.json"

    @property
    def control_socket(self) -> Path:
        """Where the keeping process listens for our own commands."""
        return self._socket("control.sock")

    @property
    def console_socket(self) -> Path:
        """QEMU's end of the guest's serial console, in a folder that belongs to QEMU's user."""
        return self._socket("qemu/console.sock")

    def _socket(self, name: str) -> Path:
        path = self.runtime / name
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise HostError(
                f"the socket path {path} is longer than {SOCKET_PATH_MAX} bytes",
                hint="set XDG_RUNTIME_DIR to a shorter path",
            )
        return path
