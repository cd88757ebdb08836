"""What the agent asks of the guest's kernel: clock, random numbers, host name, control groups, the serial heartbeat."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import socket
import struct
import termios
import time
import tty

_CGROUPS = "/sys/fs/cgroup"

# linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7)
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207

# linux/fs.h through ext4: _IOW('f', 16, __u64)
_EXT4_IOC_RESIZE_FS = 0x40086610
_BLKGETSIZE64 = 0x80081272

RESERVE = 96 << 20  # bytes of guest memory that runs cannot have: kernel, agent


def set_clock(clock_ns: int) -> None:
    """Step the wall clock to `clock_ns` nanoseconds since the epoch."""
    time.clock_settime_ns(time.CLOCK_REALTIME, clock_ns)


def add_entropy(data: bytes) -> None:
    """Mix `data` into the kernel's random numbers and have it draw a new seed at once (random(4))."""
    fd = os.open("/dev/urandom", os.O_WRONLY)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def set_hostname(name: str) -> None:
    """Set the guest's host name, and have it lead to the guest itself."""
    if name == socket.gethostname():
        return
    socket.sethostname(name)
    with contextlib.suppress(OSError), open("/etc/hosts", "w", encoding="ascii") as file:
        file.write(f"127.0.0.1 localhost {name}\n::1 localhost {name}\n")


def grow_root(device: str = "/dev/vda") -> None:
    """Let the mounted root file system fill `device`, when the disk is larger than the image it was made from."""
    fd = os.open(device, os.O_RDONLY)
    try:
        size = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, b"\0" * 8))[0]
    finally:
        os.close(fd)
    root = os.statvfs("/")
    blocks = size // root.f_bsize
    if blocks <= root.f_blocks * 21 // 20:
        return
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _EXT4_IOC_RESIZE_FS, struct.pack("Q", blocks))
    finally:
        os.close(fd)


def memory_total() -> int:
    """Return the bytes of memory of this guest."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def user(name: str) -> tuple[int, int]:
    """Return uid and gid of user `name`. Raises KeyError when there is none."""
    entry = pwd.getpwnam(name)
    return entry.pw_uid, entry.pw_gid


def be_first() -> None:
    """Run before everything else in this guest.

    Under SCHED_FIFO the agent gets the processor as soon as it has something to do: a fork bomb cannot keep it from
    its deadlines, and with one processor it reads each write of a program before the program's next one, which is
    what keeps stdout and stderr in the order of writing. Children get ordinary scheduling back.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("-1000")


def find_port(name: str, deadline: float = 10.0) -> str:
    """Return the device file of the virtio-serial port `name`.

    Raises FileNotFoundError when it does not come up within `deadline` seconds.
    """
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir("/sys/class/virtio-ports"):
                with open(f"/sys/class/virtio-ports/{entry}/name", encoding="ascii") as file:
                    if file.read().strip() == name:
                        return f"/dev/{entry}"
        time.sleep(0.05)  # the bus is probed once, at boot; there is no event to wait for without udev
    raise FileNotFoundError(f"no virtio-serial port named {name}")


def open_serial(path: str) -> int:
    """Open the serial line `path` raw: no echo, no line editing, no translation."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        tty.setraw(fd, termios.TCSANOW)
    except termios.error as exc:
        os.close(fd)
        raise OSError(exc.args[0], f"{path} is not a serial line") from exc
    return fd


class Cgroup:
    """A control group for one run: limits that hold for all its processes, and an end that none escapes."""

    def __init__(self, name: str, *, memory: int, processes: int) -> None:
        """Make the group. Raises OSError when this kernel or user cannot."""
        self.path = f"{_CGROUPS}/{name}"
        self._memory = memory
        os.mkdir(self.path)
        try:
            self._write("memory.max", str(memory))
            self._write("memory.oom.group", "1")
            self._write("pids.max", str(processes))
            with contextlib.suppress(FileNotFoundError):
                self._write("memory.swap.max", "0")
            self.procs = os.open(f"{self.path}/cgroup.procs", os.O_WRONLY)
        except OSError:
            os.rmdir(self.path)
            raise

    @staticmethod
    def prepare() -> bool:
        """Turn the controllers on; tell whether groups can be used here."""
        try:
            with open(f"{_CGROUPS}/cgroup.subtree_control", "w", encoding="ascii") as file:
                file.write("+memory +pids +cpu")
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kill every process in the group."""
        self._write("cgroup.kill", "1")

    def exhausted(self) -> bool:
        """Tell whether the group is at its limit with next to nothing left that could be given back.

        Without swap the kernel then takes the program's own code pages away and reads them back, again and again, and
        sees progress in that: its out-of-memory killer may not come for minutes.
        """
        current = self._number("memory.current")
        if current < self._memory * 99 // 100:
            return False
        table = self._table("memory.stat")
        return table.get("file", 0) - table.get("shmem", 0) < self._memory // 20

    def oom_kills(self) -> int:
        """Return how many processes the kernel killed because memory ran out."""
        return self._table("memory.events").get("oom_kill", 0)

    def fork_refusals(self) -> int:
        """Return how often a fork failed because of the limit on processes."""
        return self._table("pids.events").get("max", 0)

    def memory_peak(self) -> int:
        """Return the most bytes the group ever used, 0 where the kernel does not tell."""
        return self._number("memory.peak")

    def cpu_seconds(self) -> float:
        """Return the processor time of all processes in the group."""
        return self._table("cpu.stat").get("usage_usec", 0) / 1e6

    def remove(self) -> bool:
        """Remove the group once it is empty; tell whether it is gone."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        self.forget()
        return True

    def forget(self) -> None:
        """Leave the group to the processes that are in it."""
        if self.procs >= 0:
            os.close(self.procs)
            self.procs = -1

    def _write(self, name: str, value: str) -> None:
        with open(f"{self.path}/{name}", "w", encoding="ascii") as file:
            file.write(value)

    def _number(self, name: str) -> int:
        try:
            with open(f"{self.path}/{name}", encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    def _table(self, name: str) -> dict[str, int]:
        try:
            with open(f"{self.path}/{name}", encoding="ascii") as file:
                return {key: int(value) for key, value in (line.split() for line in file)}
        except (OSError, ValueError):
            return {}


def remove(path: str) -> None:
    """Remove the file `path`, or the folder, or nothing; a link goes, not what it leads to."""
    try:
        os.unlink(path)
    except IsADirectoryError:
        remove_tree(path)
    except FileNotFoundError:
        pass


def remove_tree(path: str) -> None:
    """Remove `path` and all below it; what a program left there must not stop us."""
    shutil.rmtree(path, ignore_errors=True)
