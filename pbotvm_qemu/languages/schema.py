r"""One language file: what its TOML may say, checked, with file and line in every complaint.

`perl.toml`, for example:

```toml
description = "Perl 5"
aliases = ["pl"]
source = "prog.pl"                                       # what the program is called in its directory
run = ["perl", "{options}", "{source}", "{arguments}"]   # {options} and {arguments} become any number of words
options = ["-w"]                                         # used when the caller gives none

[packages]
debian = ["perl"]

[sample]                                                 # warms the machine up, and tests it
code = 'print "hello world\n";'
output = "hello world\n"

[tests]                                                  # what `languages test` runs, see docs/languages.md
status = "exit 3;"
```

A compiled language has `build` too, and `program`, the name of what that makes. `like` takes over all that another
file says and this one does not.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from pbotvm_qemu.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Table = Mapping[str, object]

Prepare = Literal["", "c", "c++", "java"]
Row = Literal["hello", "stdin", "arguments", "status", "utf8", "error", "timeout"]
ROWS: tuple[Row, ...] = get_args(Row)

BUILD_SECONDS = 60.0  # that compilers get, beside the program's own time

_NAME = re.compile(r"[a-z0-9][a-z0-9+._-]{0,31}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{0,99}")
_PLACEHOLDER = re.compile(r"\{[^}]*\}")
_WHOLE = ("{options}", "{arguments}")
_PART = ("{source}", "{program}", "{prepared}")
_TABLES: Mapping[str, frozenset[str] | None] = {  # None: any key
    "env": None,
    "limits": frozenset({"build", "processes"}),
    "packages": None,
    "sample": frozenset({"code", "output"}),
    "tests": frozenset({*ROWS, "error-says", "cannot"}) - {"hello"},
}
_KEYS = frozenset(
    {"description", "like", "aliases", "absent", "source", "program", "prepare", "headers", "defines", "build", "run",
     "options", "replaced-by", "prefix", "suffix", "warm", *_TABLES}
)  # fmt: skip
_BUILD_MAX = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """Programs that show that a language works, by the name of what they show."""

    programs: Mapping[Row, str]
    cannot: Mapping[Row, str]  # what this language has no way to do, and why
    error_says: str  # a part of the message for the program with an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """How to build and run a program of one language."""

    name: str
    description: str
    aliases: tuple[str, ...]
    absent: str  # why no package brings it; empty when one does
    source: str
    program: str
    prepare: Prepare
    headers: tuple[str, ...]  # that a program without any gets
    defines: tuple[str, ...]  # likewise, "NAME VALUE"
    build: tuple[str, ...]
    run: tuple[str, ...]
    options: tuple[str, ...]
    replaced_by: tuple[str, ...]  # patterns of a caller's options that take the place of `options`
    prefix: str  # put in front of every program
    suffix: str  # appended to every program
    warm: str  # a program that `create` runs beside the sample
    env: Mapping[str, str]
    build_seconds: float
    processes: int  # that its programs need at least
    packages: Mapping[str, tuple[str, ...]]  # by distribution, or by recipe
    sample_code: str
    sample_output: str
    tests: Tests

    def packages_for(self, recipe: str) -> tuple[str, ...]:
        """Return the packages for an image of `recipe`, such as `debian-trixie`."""
        return self.packages.get(recipe, self.packages.get(recipe.partition("-")[0], ()))

    def steps(
        self, options: Iterable[str], arguments: Iterable[str], *, chat: bool = False
    ) -> tuple[tuple[str, ...], ...]:
        """Return the argument lists that build (where needed) and run a program.

        With `chat`, a compiler's words are made short. A first word that begins with `pbotvm:` stands for a step that
        the agent does itself, see `guest/source/build.py`.
        """
        flags, given = self._flags(tuple(options))
        words = {"{options}": self._options(given), "{arguments}": tuple(arguments)}
        steps = [self._fill(step, words) for step in (self.build, self.run) if step]
        if self.prepare:
            wanted = {"kind": self.prepare, "source": self.source, "headers": self.headers, "defines": self.defines,
                      "flags": flags, "chat": chat}  # fmt: skip
            steps = [("pbotvm:build", json.dumps(wanted), *steps[0]), ("pbotvm:run", *steps[1])]
        return tuple(steps)

    @property
    def report(self) -> tuple[str, ...]:
        """The step that looks at what a crashed or silent program left; empty when the language has none."""
        return ("pbotvm:report", self.program) if self.prepare in ("c", "c++") else ()

    def _flags(self, options: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the options that are for the preparation, and the others."""
        if not self.prepare:
            return (), options
        flags: list[str] = []
        others: list[str] = []
        words = iter(options)
        for word in words:
            if word in ("-nomain", "-noheaders"):
                flags.append(word)
            elif word == "-include":
                flags += [word, *itertools.islice(words, 1)]
            else:
                others.append(word)
        return tuple(flags), tuple(others)

    def _options(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """Return the caller's options, after the default ones unless one of them takes their place."""
        if any(_matches(word, pattern) for word in given for pattern in self.replaced_by):
            return given
        return (*self.options, *given)

    def _fill(self, step: tuple[str, ...], words: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        known = {"{source}": self.source, "{program}": self.program, "{prepared}": f".{self.source}"}
        filled: list[str] = []
        for word in step:
            if word in words:
                filled += words[word]
            else:
                filled.append(_PLACEHOLDER.sub(lambda found: known[found[0]], word))
        return tuple(filled)


def _matches(word: str, pattern: str) -> bool:
    return word.startswith(pattern[:-1]) if pattern.endswith("*") else word == pattern


@dataclass(frozen=True, slots=True)
class Source:
    """One file, decoded and not yet checked."""

    name: str
    where: str  # the file, for messages
    text: str
    table: Table

    @classmethod
    def decode(cls, name: str, text: str, where: str) -> Source:
        """Return the file called `name`. Raises ConfigError with the line when it is no TOML."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} cannot name a language", hint="use small letters, digits and + . _ -")
        try:
            return cls(name, where, text, tomllib.loads(text))
        except tomllib.TOMLDecodeError as exc:
            message, line = _split_position(str(exc), text)
            raise ConfigError(f"{where}{line}: {message[:200]}", hint="fix the file; it is TOML") from exc
        except RecursionError as exc:
            raise ConfigError(f"{where}: it is nested too deeply", hint="fix the file; it is TOML") from exc

    def error(self, problem: str, path: str, *, hint: str | None = None) -> ConfigError:
        """Return the complaint about the value at `path`, such as `sample.code`, with its line."""
        line = _line_of(self.text, path)
        return ConfigError(f"{self.where}{f':{line}' if line else ''}: {problem}", hint=hint)

    def like(self, base: Source) -> Source:
        """Return this file with what it leaves out taken from `base`; tables are merged key by key."""
        table: dict[str, object] = {key: value for key, value in base.table.items() if key not in ("aliases", "like")}
        for key, value in self.table.items():
            inherited = table.get(key)
            both = key in _TABLES and isinstance(value, dict) and isinstance(inherited, dict)
            table[key] = {**inherited, **value} if both else value  # type: ignore[dict-item]
        return Source(self.name, self.where, self.text, table)


def _split_position(message: str, text: str) -> tuple[str, str]:
    """Return tomllib's message without its position, and `:LINE`."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL)
    if not found:
        return message, ""
    return found[1], f":{found[2] or len(text.splitlines()) or 1}"


def _line_of(text: str, path: str) -> int | None:
    """Return the line on which the key at `path` stands, or its table; None when neither does."""
    table, _, key = path.rpartition(".")
    here, quote, best = "", "", None
    for number, line in enumerate(text.splitlines(), 1):
        if quote:
            quote = "" if quote in line else quote
            continue
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            here = header[1]
            best = number if here in (path, table) and table + key else best
        elif (found := re.match(r"""\s*["']?([^\s"'=]+)["']?\s*=\s*(.*)""", line)) is not None:
            if here == table and found[1] == key:
                return number
            if not here and found[1] == table:  # an inline table
                best = number
            quote = next((q for q in ("'''", '"""') if found[2].count(q) == 1), "")
    return best


def parse(source: Source) -> Language:
    """Return the language that a file describes. Raises ConfigError for the first mistake."""
    reader = _Reader(source, "", source.table)
    reader.known(_KEYS)
    for name, keys in _TABLES.items():
        if keys is not None:
            reader.table(name).known(keys)
    sample, limits, tests = (reader.table(name) for name in ("sample", "limits", "tests"))
    prepare = reader.text("prepare", "")
    if prepare not in get_args(Prepare):
        known = ", ".join(filter(None, get_args(Prepare)))
        raise source.error(f"prepare {prepare!r} is not known", "prepare", hint=f"known: {known}")
    language = Language(
        name=source.name,
        description=reader.text("description"),
        aliases=reader.words("aliases"),
        absent=reader.text("absent", ""),
        source=reader.text("source"),
        program=reader.text("program", ""),
        prepare=cast(Prepare, prepare),
        headers=reader.words("headers"),
        defines=reader.words("defines"),
        build=reader.words("build"),
        run=reader.words("run"),
        options=reader.words("options"),
        replaced_by=reader.words("replaced-by", ("*",)),
        prefix=reader.text("prefix", ""),
        suffix=reader.text("suffix", ""),
        warm=reader.text("warm", ""),
        env=reader.table("env").texts(),
        build_seconds=limits.number("build", BUILD_SECONDS, 1, _BUILD_MAX),
        processes=int(limits.number("processes", 1, 1, 32768)),
        packages={name: reader.table("packages").words(name) for name in reader.table("packages").values},
        sample_code=sample.text("code"),
        sample_output=sample.text("output"),
        tests=Tests(
            programs={row: tests.text(row) for row in ROWS if row in tests.values},
            cannot=cast("Mapping[Row, str]", tests.table("cannot").texts()),
            error_says=tests.text("error-says", ""),
        ),
    )
    _check(language, source)
    return language


def _check(language: Language, source: Source) -> None:
    for alias in language.aliases:
        if not _NAME.fullmatch(alias):
            raise source.error(
                f"alias {alias!r} cannot name a language", "aliases", hint="use small letters, digits and + . _ -"
            )
    for key, name in (("source", language.source), ("program", language.program or "prog")):
        if not _FILE.fullmatch(name):
            raise source.error(f"{key} {name!r} is not a plain file name", key, hint="write a name without a folder")
    if not language.run:
        raise source.error("run is missing", "run", hint='write run = ["interpreter", "{source}", "{arguments}"]')
    if language.build and not language.program:
        raise source.error("build without program", "build", hint='write program = "prog"')
    if language.prepare and not language.build:
        raise source.error("prepare without build", "prepare", hint="only what a compiler reads is prepared")
    for key, step in (("build", language.build), ("run", language.run)):
        for word in step:
            _check_word(word, key, source)
    _check_tables(language, source)


def _check_tables(language: Language, source: Source) -> None:
    for distribution, packages in language.packages.items():
        for package in packages:
            if not _PACKAGE.fullmatch(package):
                raise source.error(
                    f"{package!r} cannot name a package",
                    f"packages.{distribution}",
                    hint="write the package's plain name",
                )
    for row in language.tests.cannot:
        if row not in ROWS or row in language.tests.programs:
            raise source.error(
                f"tests.cannot: {row!r} is no test, or one that has a program",
                "tests.cannot",
                hint=f"tests: {', '.join(ROWS)}",
            )


def _check_word(word: str, key: str, source: Source) -> None:
    for found in _PLACEHOLDER.findall(word):
        if found not in (*_WHOLE, *_PART):
            known = " ".join((*_PART, *_WHOLE))
            raise source.error(f"{key}: unknown placeholder {found}", key, hint=f"known: {known}")
        if found in _WHOLE and word != found:
            raise source.error(
                f"{key}: {found} must be a word of its own, not part of {word!r}", key, hint=f'write "{found}"'
            )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to one table of a file."""

    source: Source
    name: str  # of the table, "" for the whole file
    values: Table

    def _error(self, problem: str, key: str, *, hint: str) -> ConfigError:
        path = f"{self.name}.{key}" if self.name else key
        where = f"[{self.name}]: " if self.name else ""
        return self.source.error(f"{where}{problem}", path, hint=hint)

    def known(self, keys: frozenset[str]) -> None:
        if unknown := sorted(set(self.values) - keys):
            raise self._error(f"unknown key {unknown[0]!r}", unknown[0], hint=f"known keys: {', '.join(sorted(keys))}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str) or "\0" in value:
            raise self._error(f"{key} must be a text", key, hint=f'write {key} = "..."')
        return value

    def words(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        value = self.values.get(key, list(default))
        if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
            raise self._error(f"{key} must be a list of texts", key, hint=f'write {key} = ["...", "..."]')
        return tuple(value)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._error(
                f"{key} must be a number from {low:g} to {high:g}", key, hint=f"write {key} = {default:g}"
            )
        return value

    def table(self, key: str) -> _Reader:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self._error(f"{key} must be a table", key, hint=f"write [{key}]")
        return _Reader(self.source, f"{self.name}.{key}" if self.name else key, value)

    def texts(self) -> Mapping[str, str]:
        for key, item in self.values.items():
            if not isinstance(item, str) or "\0" in item:
                raise self._error(f"{key} must be a text", key, hint=f'write {key} = "..."')
        return {key: str(item) for key, item in self.values.items()}
