"""A forked child becomes a program: whose it is, where it stands, what it may use."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from .spec import OWN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .system import Cgroup

    OwnStep = Callable[[tuple[str, ...], dict[str, str]], int]

_CORE_MAX = 128 << 20  # bytes of a core file
_DESCRIPTORS = 4096  # more than the agent ever has open
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


class Owner:
    """Who runs programs, and where. `uid` None: as ourselves (tests on the host)."""

    def __init__(self, home: str, name: str, uid: int | None, gid: int | None, *, cgroups: bool) -> None:
        self.home = home
        self.name = name
        self.uid = uid
        self.gid = gid
        self.cgroups = cgroups


class Surroundings(NamedTuple):
    """What a program finds when it begins."""

    directory: str
    variables: Mapping[str, str]  # beside those that every program has
    owner: Owner
    cgroup: Cgroup | None
    cpu: int  # seconds
    file_size: int  # bytes


def own_step(argv: tuple[str, ...]) -> OwnStep | None:
    """Return the function that does a step of our own, such as `pbotvm:build`; None for a program."""
    if not argv[0].startswith(OWN):
        return None
    from .source import build  # noqa: PLC0415 - most guests never need it

    return build.main


def become(
    argv: tuple[str, ...], own: OwnStep | None, here: Surroundings, streams: tuple[int, int, int], error: int
) -> NoReturn:
    """Turn this forked child into the program `argv`, or do the step `own`. Never returns.

    `streams` become its standard ones; what keeps it from starting is written to `error`.
    """
    what = "prepare"
    try:
        os.setsid()
        if here.cgroup:
            os.write(here.cgroup.procs, b"0")
        for standard, fd in enumerate(streams):
            os.dup2(fd, standard)
        resource.setrlimit(resource.RLIMIT_CPU, (here.cpu, here.cpu + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (here.file_size, here.file_size))
        # Only a step of our own may allow its program a core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, _CORE_MAX if own else 0))
        owner = here.owner
        if owner.uid is not None and owner.gid is not None:
            os.setgroups([])
            os.setresgid(owner.gid, owner.gid, owner.gid)
            os.setresuid(owner.uid, owner.uid, owner.uid)
        os.chdir(here.directory)
        os.umask(0o022)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, programs expect to die of them
            signal.signal(number, signal.SIG_DFL)
        what = argv[0]
        if own:
            os.closerange(3, _DESCRIPTORS)  # the host's channel among them
            os._exit(own(argv, _environment(here)))
        os.execvpe(argv[0], argv, _environment(here))
    except BaseException as exc:
        text = exc.strerror if isinstance(exc, OSError) else type(exc).__name__
        with contextlib.suppress(OSError):
            os.write(error, f"{what}: {text}".encode()[:500])
    finally:
        os._exit(127)


def _environment(here: Surroundings) -> dict[str, str]:
    return {
        "PATH": _PATH,
        "HOME": here.directory,
        "USER": here.owner.name,
        "LOGNAME": here.owner.name,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TMPDIR": "/tmp",  # noqa: S108 - a tmpfs of this guest
        "ASAN_OPTIONS": "detect_leaks=0",
        **here.variables,
    }
