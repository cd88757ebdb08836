"""What a chat sees of a run: the predecessor's words for every end, and its rules for characters that do not show.

Only PBot callers get this. Everybody else gets bytes.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pbotvm_qemu.channel import Outcome

USAGE = (
    "Usage: cc [-lang=<language>] [-vm=<virtual machine>] [-info] [-paste] "
    '[-args "command-line arguments"] [compiler/language options] <code> [-stdin <stdin input>]'
)
OFFLINE = "Virtual machine is offline."
UNAVAILABLE = "Virtual machine is temporarily unavailable, try again soon."
MISBEHAVING = "Virtual machine is misbehaving, try again soon."
RESETTING = "Virtual machine is resetting, try again soon."  # of the seed's era
TIMED_OUT = "[Timed-out]"
FATAL = "[Fatal error]"
KILLED = "[Killed]"
SAME = "Same output."

_BEEPS = (
    "*BEEP*", "*BING*", "*DING*", "*DONG*", "*CLUNK*", "*BONG*", "*PING*", "*BOOP*", "*BLIP*", "*BOP*", "*WHIRR*",
)  # fmt: skip
# Line feed, carriage return, tab, and what IRC clients format text with.
_KEPT = "\n\r\t\x02\x03\x0f\x11\x1d\x1e\x1f"
_CONTROL = re.compile(f"[\x00-\x1f](?<![{_KEPT}])")
_SAME_LENGTH = 50  # characters; shorter outputs may be repeated
_SAME_SECONDS = 240.0
_SAME_CHANNELS = 512  # remembered; the oldest is forgotten


def unknown_machine(name: str, names: list[str]) -> str:
    """Return the text for a machine that the configuration does not list."""
    return f"Unknown machine '{printable(name)[:64]}'; available machines are: {', '.join(names)}"


def printable(text: str) -> str:
    """Return `text` without characters that would act on a terminal, a log or a chat."""
    return "".join(character if character.isprintable() else "?" for character in text)


def trim(text: str) -> str:
    """Return `text` without white space at its end; what formats text in a chat is none."""
    return text.rstrip(" \t\n\r\f\v")


def timed_out(output: str) -> str:
    """Return the text for a run that took too long: of what it printed, the first line is kept."""
    first = clean(output).lstrip("\n").split("\n", 1)[0]
    return f"{TIMED_OUT} {first}".rstrip()


def text_of(outcome: Outcome, output: bytes, *, factoid: bool) -> str:
    """Return what a chat sees of a run that was reported: its output, and a note of how it ended."""
    text = output.decode("utf-8", "replace")
    if outcome.timed_out:
        return timed_out(text)
    if outcome.message:
        return FATAL
    if outcome.stage == "build":  # a compiler's own words are enough
        return clean(text)
    code = outcome.exit_code
    if not text:
        return "" if factoid else "Success (no output)." if code == 0 else f"Exit {code}."
    if not text.endswith("\n"):
        text += "\n"
    return clean(text) if code == 0 else f"{clean(text)} [Exit {code}]"


def clean(text: str) -> str:
    """Return `text` with backspaces carried out, and bells and other control characters made visible."""
    return _CONTROL.sub(_visible, _overwrite(text)) if _CONTROL.search(text) else text


def _visible(match: re.Match[str]) -> str:
    character = match[0]
    if character == "\a":
        return random.choice(_BEEPS)  # noqa: S311 - a joke, not a secret
    return {"\x1b": "<esc>", "\f": "<ff>"}.get(character, f"\\x{ord(character):02X}")


def _overwrite(text: str) -> str:
    """Carry out backspaces: each moves the place of writing one back, and what is written there replaces."""
    if "\b" not in text:
        return text
    written: list[str] = []
    place = 0
    for piece in text.split("\b"):
        written[place : place + len(piece)] = piece
        place = max(0, place + len(piece) - 1)
    return "".join(written)


class LastOutputs:
    """Remembers the last output of each channel and language, so that a channel is not told the same twice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()

    def shorten(self, text: str, *, channel: str, language: str, factoid: bool) -> str:
        """Return `text`, or `Same output.` when that channel saw it a moment ago."""
        if factoid or not channel.startswith("#"):
            return text
        key = channel.lower(), language
        now = self._clock()
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        when, before = self._known.pop(key, (0.0, b""))
        self._known[key] = now, digest
        while len(self._known) > _SAME_CHANNELS:
            self._known.popitem(last=False)
        if len(text) > _SAME_LENGTH and digest == before and now - when <= _SAME_SECONDS:
            return SAME
        return text
