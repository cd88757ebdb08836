"""What a `run` frame asks for, checked value by value. The host uses it to build one, the guest to read one."""

from __future__ import annotations

from typing import NamedTuple

from . import wire

OWN = "pbotvm:"  # begins the first word of a step that is the agent's own, see source/build.py
REPORT_SECONDS = 30.0  # that the debugger may look at what a program left
NAME_MAX = 255  # bytes in a file name, as in ext4
_ARGUMENT_MAX = 128 * 1024 - 1  # Linux: MAX_ARG_STRLEN


class BadRequestError(Exception):
    """A `run` frame that cannot be followed; nothing was run."""


class File(NamedTuple):
    """A file that is put into the run's directory before the first step."""

    name: str
    size: int  # bytes


class Limits(NamedTuple):
    """What the run may use."""

    wall: float  # seconds, all steps together
    cpu: float  # seconds per process
    memory: int  # bytes; 0 for all but the guest's reserve
    processes: int
    file_size: int  # bytes
    output: int  # bytes of both streams together
    build: float = 0.0  # seconds for the steps before the last one; 0: they are part of `wall`


class RunSpec(NamedTuple):
    """A checked request.

    `steps` are argument lists that are run in turn while the one before ends with 0; the last one gets stdin and is
    the program, the others are its build.
    """

    files: tuple[File, ...]
    steps: tuple[tuple[str, ...], ...]
    env: dict[str, str]
    stdin: bool
    limits: Limits
    collect: tuple[str, ...]
    keep: bool = False  # of a session: its folder and what it leaves running stay for the next run
    report: tuple[str, ...] = ()  # a step that is run when the program left a core file and crashed or said nothing
    language: str = ""  # what a log calls it

    @property
    def seconds(self) -> float:
        """The longest time that the run may take."""
        return self.limits.wall + self.limits.build + (REPORT_SECONDS if self.report else 0.0)

    def to_json(self) -> dict[str, object]:
        """Return the payload of a `run` frame."""
        return {
            "files": [file._asdict() for file in self.files],
            "steps": [list(step) for step in self.steps],
            "env": self.env,
            "stdin": self.stdin,
            "limits": self.limits._asdict(),
            "collect": list(self.collect),
            "keep": self.keep,
            "report": list(self.report),
            "language": self.language,
        }


def parse(value: dict[str, object]) -> RunSpec:
    """Return the request in the payload of a `run` frame.

    Raises BadRequestError that names the first value that is wrong. Unknown keys are ignored.
    """
    files = tuple(_file(item) for item in _list(value, "files", wire.FILES_MAX))
    if sum(file.size for file in files) > wire.FILES_BYTES_MAX:
        raise BadRequestError(f"files: more than {wire.FILES_BYTES_MAX} bytes together")
    if len({file.name for file in files}) != len(files):
        raise BadRequestError("files: a name stands twice")
    steps = tuple(_argv(item) for item in _list(value, "steps", 8))
    if not steps:
        raise BadRequestError("steps: nothing to run")
    env = value.get("env", {})
    if not isinstance(env, dict) or len(env) > 256:
        raise BadRequestError("env: not an object of at most 256 strings")
    for name, text in env.items():
        if not name or "=" in name or not _clean(name) or not _clean(text):
            raise BadRequestError(f"env: {name[:40]!r} cannot be set")
    collect = tuple(file_name(item) for item in _list(value, "collect", wire.FILES_MAX))
    limits = _limits(value.get("limits"))
    report = _argv(value["report"]) if value.get("report") else ()
    keep = value.get("keep") is True
    language = value.get("language", "")
    if not _clean(language) or len(str(language)) > NAME_MAX:
        raise BadRequestError("language: not a short text")
    return RunSpec(files, steps, env, value.get("stdin") is True, limits, collect, keep, report, str(language))


def file_name(value: object) -> str:
    """Return `value` when it is a plain file name: no folder, not hidden behind a NUL, not `.` or `..`.

    Raises BadRequestError otherwise.
    """
    if not isinstance(value, str) or not value or value in (".", "..") or "/" in value or not _clean(value):
        raise BadRequestError(f"{str(value)[:80]!r} is not a plain file name")
    if len(value.encode("utf-8", "surrogateescape")) > NAME_MAX:
        raise BadRequestError(f"a file name is longer than {NAME_MAX} bytes")
    return value


def _clean(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        return len(value.encode("utf-8", "surrogateescape")) <= _ARGUMENT_MAX
    except UnicodeEncodeError:
        return False


def _list(value: dict[str, object], key: str, most: int) -> list[object]:
    items = value.get(key, [])
    if not isinstance(items, list) or len(items) > most:
        raise BadRequestError(f"{key}: not a list of at most {most} items")
    return items


def _file(item: object) -> File:
    if not isinstance(item, dict):
        raise BadRequestError("files: not an object")
    size = item.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= wire.FILES_BYTES_MAX:
        raise BadRequestError(f"files: {size!r} is not a size up to {wire.FILES_BYTES_MAX}")
    return File(file_name(item.get("name")), size)


def _argv(item: object) -> tuple[str, ...]:
    if not isinstance(item, list) or not item or len(item) > wire.ARGV_MAX:
        raise BadRequestError(f"steps: not a list of 1 to {wire.ARGV_MAX} arguments")
    for argument in item:
        if not _clean(argument):
            raise BadRequestError(f"steps: an argument is no text, holds NUL, or is over {_ARGUMENT_MAX} bytes")
    if not item[0]:
        raise BadRequestError("steps: no program")
    return tuple(item)


def _limits(value: object) -> Limits:
    if not isinstance(value, dict):
        raise BadRequestError("limits: missing")

    def number(key: str, low: float, high: float, default: object = None) -> float:
        found = value.get(key, default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise BadRequestError(f"limits: {key} is not a number")
        if not low <= found <= high:  # which is true of NaN and infinity too
            raise BadRequestError(f"limits: {key} is not between {low} and {high}")
        return found

    return Limits(
        wall=number("wall", 0.01, 86400),
        cpu=number("cpu", 0, 86400),
        memory=int(number("memory", 0, 1 << 50)),
        processes=int(number("processes", 1, 1 << 22)),
        file_size=int(number("file_size", 0, 1 << 60)),
        output=int(number("output", 0, 1 << 60)),
        build=number("build", 0, 86400, 0),
    )
