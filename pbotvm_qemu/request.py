"""What a caller asks for: PBot's front options, and the way from a request to a `run` frame.

Parsing follows section by section what the predecessor does with a line; nothing here looks into the program itself.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import UsageError
from pbotvm_qemu.guest import spec, wire
from pbotvm_qemu.guest.words import spans, split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pbotvm_qemu.config import Limits
    from pbotvm_qemu.languages import Language

CODE_MAX = 4 << 20  # bytes of one program
ARGUMENTS_MAX = 48 * 1024  # bytes of all arguments and options: they travel in one frame
NAME_MAX = 200  # characters kept of a key that another machine stores things under
DEFAULT_LANGUAGE = "sh"

_LEADING = re.compile(r"\s*--?(lang|vm|token)=(\S+)\s*")
# What the predecessor took from anybody who could chat, and what is the operator's alone.
_FORBIDDEN = re.compile(r"\s*--?(revert|health|vm-(?:domain|addr|health|heart|cid|vport|serial))=")
_ARGUMENTS = re.compile(r"--?(?:args|arguments)")
_SWITCH = re.compile(r"--?(no)?(info|paste)")
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
    argument_text: str = field(default="", compare=False)  # the same as they were written
    stdin: str | None = None
    info: bool = False  # show the command line, run nothing
    paste: bool = False  # put the output where it can be read at leisure
    # Who asks, in the words of a bot; and what it knows about him.
    nick: str = "vm"
    channel: str = "vm"
    factoid: bool = False
    persist_key: str | None = None
    usage: str | None = None  # shown instead of our own usage line
    token: str = field(default="", repr=False)


def parse_line(line: str, *, language: str = DEFAULT_LANGUAGE) -> Request:
    """Return the request in one line of PBot's: a JSON object with `code`, or the code itself.

    `language` is meant where none is named. Raises UsageError when there is nothing to run, with the request so far as
    `request`. Unknown keys are ignored.
    """
    base, code = parse_context(line, language=language)
    return parse_code(code, base)


def parse_context(line: str, *, language: str = DEFAULT_LANGUAGE) -> tuple[Request, str]:
    """Return what a line says about the request beside its code, and the code with its front options.

    Raises UsageError for JSON that is nested without end.
    """
    fields: dict[str, object] = {}
    try:
        decoded = json.loads(line)
    except RecursionError:
        raise UsageError("the request is nested too deeply", hint="send a plain JSON object") from None
    except ValueError:
        decoded = None
    if isinstance(decoded, dict):
        fields = decoded
    code = _text(fields, "code") if isinstance(decoded, dict) else line
    persist_key = fields.get("persist-key")
    base = Request(
        language=_text(fields, "lang") or language,
        machine=_text(fields, "vm") or None,
        arguments=split(_text(fields, "arguments")),
        argument_text=_text(fields, "arguments"),
        nick=_text(fields, "nick") or "vm",
        channel=_text(fields, "channel") or "vm",
        factoid="factoid" in fields,
        persist_key=str(persist_key)[:NAME_MAX] or None if isinstance(persist_key, str | int) else None,
        usage=_text(fields, "usage") or None,
        token=_text(fields, "token"),
    )
    return base, code


def _text(fields: dict[str, object], key: str) -> str:
    value = fields.get(key)
    # JSON can spell half a surrogate pair, which no program could be given.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def parse_code(code: str, base: Request) -> Request:
    """Return `base` with the front options in `code` applied and taken off.

    `-lang=` and `-vm=` count at the very front, `-args`, `-info` and `-paste` anywhere, `-stdin` takes the rest of the
    line; words with a dash that are then in front are options for the compiler or interpreter. Raises UsageError for
    empty code, and for options that would choose what only the configuration chooses.
    """
    return parse_options(*parse_choice(code, base))


def parse_choice(code: str, base: Request) -> tuple[str, Request]:
    """Take off what says at the very front where `code` is to run, and in which language; return the rest.

    Raises UsageError for options that would choose what only the configuration chooses.
    """
    request = base
    position = 0
    while match := _LEADING.match(code, position):
        if match[1] == "lang":
            request = replace(request, language=match[2].lower())
        elif match[1] == "vm":
            request = replace(request, machine=match[2])
        else:
            request = replace(request, token=match[2])
        position = match.end()
    if match := _FORBIDDEN.match(code, position):
        raise UsageError(
            f"The option -{match[1]} is not available; choose a machine with -vm=NAME.", hint="leave it out"
        )
    return code[position:], request


def parse_options(code: str, base: Request) -> Request:
    """Return `base` with the options in `code` that are left behind `parse_choice`. Raises UsageError for empty code."""
    code, request = _take_options(code, base)
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


def _take_options(code: str, request: Request) -> tuple[str, Request]:
    """Cut `-args X`, `-args=X` (or `-arguments`), `-info` and `-paste` out of the code; X is one word, quotes kept."""
    words = spans(code)
    kept: list[str] = []
    position = 0
    index = 0
    while index < len(words):
        start, end = words[index]
        word = code[start:end]
        index += 1
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if switch := _SWITCH.fullmatch(word):
            wanted = not switch[1]
            request = replace(request, info=wanted) if switch[2] == "info" else replace(request, paste=wanted)
        elif not _ARGUMENTS.fullmatch(name):
            continue
        elif equals:
            request = _with_arguments(request, _unquote(value))
        elif index < len(words):
            value, end = code[slice(*words[index])], words[index][1]
            request = _with_arguments(request, _unquote(value))
            index += 1
        else:
            continue
        kept.append(code[position:start])
        position = end
        while position < len(code) and code[position] == " ":
            position += 1
    return "".join(kept) + code[position:], request


def _with_arguments(request: Request, text: str) -> Request:
    return replace(request, arguments=split(text), argument_text=text)


def _unquote(word: str) -> str:
    """Return `word` without one pair of quotes around it."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return word[1:-1]
    return word


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
    kept: str = "",
) -> tuple[spec.RunSpec, list[bytes]]:
    """Return the run frame for `request` and the content of its files.

    `code` replaces the request's text where the caller has bytes; `files` are put beside the program. With `chat`,
    what a compiler says is made short. `kept` names a folder that the agent packs behind the program. Raises UsageError when something is too large or cannot be passed on.
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
    steps = [list(step) for step in language.steps(request.options, request.arguments, chat=chat)]
    if kept:
        try:
            spec.file_name(kept)
        except spec.BadRequestError as exc:
            raise UsageError(f"nothing can be kept: {exc}", hint="choose another persist-key") from exc
        steps[-1] = [f"{spec.OWN}keep", kept, *steps[-1]]
    value = {
        "files": [{"name": name, "size": len(data)} for name, data in everything],
        "steps": steps,
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
        "language": language.name,
    }
    try:
        parsed = spec.parse(value)
        wire.encode_json(wire.FrameType.RUN, 1, parsed.to_json())
    except spec.BadRequestError as exc:
        raise UsageError(f"the request cannot be run: {exc}", hint="change what it names") from exc
    except wire.WireError as exc:
        raise UsageError(f"the request is too large: {exc}", hint="pass data through standard input") from exc
    return parsed, [data for _name, data in everything]


def cmdline(request: Request, language: Language) -> str:
    """Return the command line that a request stands for: of the compiler, else of the interpreter."""
    step = language.steps(request.options, ())[0]
    if step[0] == "pbotvm:build":  # a step of the agent's own, around the compiler's
        step = step[2:]
    return shlex.join(language.source if word == f".{language.source}" else word for word in step)


def info(request: Request, language: Language) -> str:
    """Return the answer to `-info`."""
    return f"{language.name} cmdline: {cmdline(request, language)}"


async def once(data: bytes) -> AsyncIterator[bytes]:
    """Yield `data`: input that is known at once."""
    yield data
