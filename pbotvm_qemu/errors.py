"""The exception tree. Every error carries a hint (what to type next) and an exit code.

```text
PbotVMError                 125  our own failure
├── UsageError                2  the request was wrong: nothing was run
│   ├── ConfigError           2  a configuration file or environment variable is wrong
│   └── UnknownLanguageError  2
├── HostError               125  the host lacks something
│   └── CommandError        125  a program we called failed
├── ImageError              125  an image is missing, broken or could not be built
├── StateError              125  a machine is unknown, busy, or in the wrong state
├── NetworkError            125  an interface or rule could not be read, made or removed
├── MonitorError            125  QMP refused, timed out or was lost
├── LaunchError             125  QEMU ended before the guest was ready
├── NeverRanError           125  the program was not started: safe to repeat
│   └── UsedMachineError    125  because somebody else had used the machine
└── GuestError              125  the guest broke the protocol or stayed silent
    └── RunLostError        125  the guest was lost after dispatch: the program may have run
```

A program that ran and failed is not an error: its status is part of the result.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = 2
OURS = 125


class PbotVMError(Exception):
    """Root of all our errors.

    `hint` is one line that says what to do next; `exit_code` is what the command line ends with; `kind` is a word for
    programs that call us: above all whether a program may have run.
    """

    exit_code = OURS
    kind = "failure"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(PbotVMError):
    """The request itself is wrong; nothing was run."""

    exit_code = USAGE
    kind = "usage"


class ConfigError(UsageError):
    """A configuration file or an environment variable has a wrong key or value."""


class UnknownLanguageError(UsageError):
    """The language is not known, or not installed in this machine."""


class HostError(PbotVMError):
    """The host lacks something: a program, a device, space, a free port."""


class CommandError(HostError):
    """A program we called ended with a status other than 0, or took too long."""

    def __init__(self, argv: Sequence[str], problem: str, stderr: bytes = b"", *, hint: str | None = None) -> None:
        last = tail(stderr)
        super().__init__(f"{shlex.join(argv[:1])}: {problem}" + (f": {last}" if last else ""), hint=hint)
        self.argv = tuple(argv)
        self.stderr = stderr


class ImageError(PbotVMError):
    """A guest image is missing, damaged or could not be built."""


class StateError(PbotVMError):
    """A machine is unknown, exists already, is in use, or is in the wrong state for what was asked."""


class NetworkError(PbotVMError):
    """A network interface, address or rule could not be read, made or removed."""


class MonitorError(PbotVMError):
    """QEMU's monitor (QMP) refused a command, did not answer in time, or went away."""


class LaunchError(PbotVMError):
    """QEMU ended, or its guest stayed silent, before it was ready.

    `log_tail` is the end of QEMU's own output, the evidence.
    """

    def __init__(self, message: str, *, log_tail: str = "", hint: str | None = None) -> None:
        super().__init__(message + (f": {log_tail.strip()}" if log_tail.strip() else ""), hint=hint)
        self.log_tail = log_tail


class NeverRanError(PbotVMError):
    """The program was not started (no capacity, machine not ready, refused by the agent). Safe to repeat."""

    kind = "never-ran"


class UsedMachineError(NeverRanError):
    """The program was not started, because another peer had used the machine before. The next one is clean."""


class GuestError(PbotVMError):
    """The guest broke the protocol or did not answer in time."""


class RunLostError(GuestError):
    """The guest was lost after the program had been sent. It may have run; repeat at your own risk."""

    kind = "may-have-run"


def tail(data: bytes, lines: int = 3, limit: int = 600) -> str:
    """Return the last `lines` non-empty lines of `data` joined by ` | `, at most `limit` characters, printable only."""
    text = data[-8192:].decode("utf-8", "replace")
    kept = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
    joined = " | ".join(kept)
    return "".join(character if character.isprintable() else "?" for character in joined)[-limit:]
