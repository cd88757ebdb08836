"""What a caller asks for: PBot's front options, and the way from a request to a `run` frame.

Parsing follows section by section what the predecessor does with a line; nothing here looks into the program itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import UsageError
from pbotvm_qemu.guest import spec, wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pbotvm_qemu.config import Limits
    from pbotvm_qemu.languages import Language

CODE_MAX = 4 << 20  # bytes of one program
ARGUMENTS_MAX = 48 * 1024  # bytes of all arguments and options: they travel in one frame
DEFAULT_LANGUAGE = "sh"

_LEADING = re.compile(r"\s*--?(lang|vm)=(\S+)\s*")
_ARGUMENTS = re.compile(r"--?(?:args|arguments)")
_ESCAPE = re.compile(r"(?<!\\)\\(?:([nrtb])|x([0-9A-Fa-f]{1,8})|([0-7]{1,11}))")
_OPTION = re.compile(r"\s*(-\S+)(?:\s+|$)")
_WORD = re.compile(r"(\S+)(?:\s+|$)")
_SIMPLE = {"n": "\n", "r": "\r", "t": "\t", "b": "\b"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One program to run. `code` has no front options any more."""

    language: str = DEFAULT_LANGUAGE
    machine: str | None = None
    code: str = ""
    options: tuple[str, ...] = ()  # for the compiler or interpreter; replace its defaults when there are any
    arguments: tuple[str, ...] = ()
    stdin: str | None = None


def parse_line(line: str) -> Request:
    """Return the request in one line of PBot's: a JSON object with `code`, or the code itself.

    Raises UsageError when there is nothing to run. Unknown keys are ignored.
    """
    fields: dict[str, object] = {}
    try:
        decoded = json.loads(line)
    except (ValueError, RecursionError):
        decoded = None
    if isinstance(decoded, dict):
        fields = decoded
    code = _text(fields, "code") if isinstance(decoded, dict) else line
    base = Request(
        language=_text(fields, "lang") or DEFAULT_LANGUAGE,
        machine=_text(fields, "vm") or None,
        arguments=split_arguments(_text(fields, "arguments")),
    )
    return parse_code(code, base)


def _text(fields: dict[str, object], key: str) -> str:
    value = fields.get(key)
    # JSON can spell half a surrogate pair, which no program could be given.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def parse_code(code: str, base: Request) -> Request:
    """Return `base` with the front options in `code` applied and taken off.

    `-lang=` and `-vm=` count at the very front, `-args` anywhere, `-stdin` takes the rest of the line; words with a
    dash that are then in front are options for the compiler or interpreter. Raises UsageError for empty code.
    """
    request = base
    position = 0
    while match := _LEADING.match(code, position):
        if match[1] == "lang":
            request = replace(request, language=match[2].lower())
        else:
            request = replace(request, machine=match[2])
        position = match.end()
    code = code[position:]
    code, arguments = _take_arguments(code)
    if arguments is not None:
        request = replace(request, arguments=split_arguments(_unquote(arguments)))
    head, mark, tail = code.partition("-stdin")
    if mark and (not head or head[-1].isspace() or head[-1] == "-"):
        code = head.removesuffix("-").rstrip(" ")
        request = replace(request, stdin=expand_escapes(tail[1:] if tail[:1] in (" ", "=") else tail))
    options = []
    position = 0
    while match := _OPTION.match(code, position):
        options.append(_unquote(match[1]))
        position = match.end()
        if match[1] == "-include" and (value := _WORD.match(code, position)):  # of the C family, with a word of its own
            options.append(_unquote(value[1]))
            position = value.end()
    code = code[position:]
    if options:
        request = replace(request, options=tuple(options))
    if not code.strip():
        raise UsageError("there is no code to run", hint="write the program after the options")
    return replace(request, code=code)


def _take_arguments(code: str) -> tuple[str, str | None]:
    """Cut `-args X`, `-args=X` (or `-arguments`) out of the code; X is one word, quotes kept."""
    words = list(_words(code))
    for index, (start, end) in enumerate(words):
        word = code[start:end]
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if not _ARGUMENTS.fullmatch(name):
            continue
        if equals:
            return code[:start] + code[end:].lstrip(" "), value
        if index + 1 < len(words):
            following = words[index + 1]
            return code[:start] + code[following[1] :].lstrip(" "), code[following[0] : following[1]]
    return code, None


def _words(code: str) -> Sequence[tuple[int, int]]:
    """Return begin and end of each word: cut at blanks outside quotes; an unbalanced quote is an ordinary character."""
    spans = []
    position = 0
    # Whether a closing quote is still to come is asked once per kind, so that a line of quotes stays linear.
    last = {quote: code.rfind(quote) for quote in "'\""}
    while position < len(code):
        if code[position].isspace():
            position += 1
            continue
        start = position
        while position < len(code) and not code[position].isspace():
            character = code[position]
            if character == "\\":
                position += 2
            elif character in last and last[character] > position:
                position = code.index(character, position + 1) + 1
            else:
                position += 1
        spans.append((start, min(position, len(code))))
    return spans


def _unquote(word: str) -> str:
    """Return `word` without one pair of quotes around it."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return word[1:-1]
    return word


def split_arguments(text: str) -> tuple[str, ...]:
    """Return the words of an argument string: quotes join and are removed, backslashes stay (as in the predecessor)."""
    arguments: list[str] = []
    for start, end in _words(text):
        word = text[start:end]
        parts: list[str] = []
        position = 0
        while position < len(word):
            character = word[position]
            close = word.find(character, position + 1) if character in "'\"" else -1
            if close > 0:
                parts.append(word[position + 1 : close])
                position = close + 1
            else:
                step = 2 if character == "\\" else 1
                parts.append(word[position : position + step])
                position += step
        arguments.append("".join(parts))
    return tuple(arguments)


def expand_escapes(text: str) -> str:
    r"""Return `text` with `\n \r \t \b`, `\xHH` and `\OOO` replaced, where the backslash is not itself escaped."""

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return _SIMPLE[match[1]]
        number = int(match[2], 16) if match[2] else int(match[3], 8)
        return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\N{REPLACEMENT CHARACTER}"

    return _ESCAPE.sub(value, text)


def render(
    request: Request,
    language: Language,
    limits: Limits,
    *,
    stdin: bool,
    code: bytes | None = None,
    files: Sequence[tuple[str, bytes]] = (),
    collect: Sequence[str] = (),
    chat: bool = False,
) -> tuple[spec.RunSpec, list[bytes]]:
    """Return the run frame for `request` and the content of its files.

    `code` replaces the request's text where the caller has bytes; `files` are put beside the program. With `chat`,
    what a compiler says is made short. Raises UsageError when something is too large or cannot be passed on.
    """
    program = request.code.encode("utf-8", "surrogateescape") if code is None else code
    program = language.prefix.encode() + program + language.suffix.encode()
    if not program.endswith(b"\n"):
        program += b"\n"
    if len(program) > CODE_MAX:
        raise UsageError(
            f"the program has {len(program)} bytes, the limit is {CODE_MAX}", hint="pass data through standard input"
        )
    words = sum(len(word.encode("utf-8", "surrogateescape")) + 1 for word in (*request.options, *request.arguments))
    if words > ARGUMENTS_MAX:
        raise UsageError(
            f"options and arguments have {words} bytes, the limit is {ARGUMENTS_MAX}",
            hint="pass data through standard input",
        )
    everything = [(language.source, program), *files]
    value = {
        "files": [{"name": name, "size": len(data)} for name, data in everything],
        "steps": [list(step) for step in language.steps(request.options, request.arguments, chat=chat)],
        "env": dict(language.env),
        "stdin": stdin,
        "limits": {
            "wall": limits.wall,
            "cpu": limits.cpu,
            "memory": limits.memory,
            "processes": max(limits.processes, language.processes),
            "file_size": limits.file_size,
            "output": limits.output,
            "build": language.build_seconds if language.build else 0,
        },
        "collect": list(collect),
        "report": list(language.report),
    }
    try:
        parsed = spec.parse(value)
        wire.encode_json(wire.FrameType.RUN, 1, parsed.to_json())
    except spec.BadRequestError as exc:
        raise UsageError(f"the request cannot be run: {exc}", hint="change what it names") from exc
    except wire.WireError as exc:
        raise UsageError(f"the request is too large: {exc}", hint="pass data through standard input") from exc
    return parsed, [data for _name, data in everything]


async def once(data: bytes) -> AsyncIterator[bytes]:
    """Yield `data`: input that is known at once."""
    yield data
