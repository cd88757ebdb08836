r"""The registry of languages: one TOML file each, beside this module and in the operator's configuration folder.

`perl.toml`, for example:

```toml
description = "Perl 5"
source = "prog.pl"                                       # what the program is called in its directory
run = ["perl", "{options}", "{source}", "{arguments}"]   # {options} and {arguments} become any number of words
options = ["-w"]                                         # used when the caller gives none

[packages]
debian = ["perl"]

[sample]                                                 # warms the machine up, and tests it
code = 'print "hello world\\n";'
output = "hello world\\n"
```

A compiled language has `build` too, and `program`, the name of what that makes.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import ConfigError, UnknownLanguageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SETS: Mapping[str, tuple[str, ...]] = {"core": ("bash", "bc", "c11", "lua", "perl", "python3", "sh", "tcl")}

_NAME = re.compile(r"[a-z0-9][a-z0-9+._-]{0,31}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PLACEHOLDERS = ("{options}", "{arguments}")
_KEYS = {
    "description", "aliases", "source", "program", "build", "run", "options", "suffix", "env", "packages", "sample",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """How to build and run a program of one language."""

    name: str
    description: str
    aliases: tuple[str, ...]
    source: str
    program: str
    build: tuple[str, ...]
    run: tuple[str, ...]
    options: tuple[str, ...]
    suffix: str  # appended to every program
    env: Mapping[str, str]
    packages: tuple[str, ...]  # of Debian
    sample_code: str
    sample_output: str

    def steps(self, options: Iterable[str], arguments: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Return the argument lists that build (where needed) and run a program."""
        words = {"{options}": tuple(options) or self.options, "{arguments}": tuple(arguments)}
        return tuple(self._fill(step, words) for step in (self.build, self.run) if step)

    def _fill(self, step: tuple[str, ...], words: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        filled: list[str] = []
        for word in step:
            if word in words:
                filled += words[word]
            else:
                filled.append(word.replace("{source}", self.source).replace("{program}", self.program))
        return tuple(filled)


def parse(name: str, text: str, where: str) -> Language:
    """Return the language that TOML `text` describes; `where` names it in messages.

    Raises ConfigError for the first mistake.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{where}: {str(exc)[:200]}", hint="fix the file; it is TOML") from exc
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} cannot name a language", hint="use small letters, digits and + . _ -")
    if unknown := sorted(set(table) - _KEYS):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}", hint=f"known keys: {', '.join(sorted(_KEYS))}")
    reader = _Reader(table, where)
    for section, known in (("packages", {"debian"}), ("sample", {"code", "output"})):
        if unknown := sorted(set(reader.table(section)) - known):
            raise ConfigError(
                f"{where} [{section}]: unknown key {unknown[0]!r}", hint=f"known keys: {', '.join(sorted(known))}"
            )
    language = Language(
        name=name,
        description=reader.text("description"),
        aliases=reader.words("aliases"),
        source=reader.text("source"),
        program=reader.text("program", ""),
        build=reader.words("build"),
        run=reader.words("run"),
        options=reader.words("options"),
        suffix=reader.text("suffix", ""),
        env=reader.mapping("env"),
        packages=_Reader(reader.table("packages"), f"{where} [packages]").words("debian"),
        sample_code=_Reader(reader.table("sample"), f"{where} [sample]").text("code"),
        sample_output=_Reader(reader.table("sample"), f"{where} [sample]").text("output"),
    )
    _check(language, where)
    return language


def _check(language: Language, where: str) -> None:
    for alias in language.aliases:
        if not _NAME.fullmatch(alias):
            raise ConfigError(f"{where}: alias {alias!r} cannot name a language", hint="use small letters and digits")
    for key, name in (("source", language.source), ("program", language.program or "prog")):
        if not _FILE.fullmatch(name):
            raise ConfigError(f"{where}: {key} {name!r} is not a plain file name", hint="write a name without a folder")
    if not language.run:
        raise ConfigError(f"{where}: run is missing", hint='write run = ["interpreter", "{source}", "{arguments}"]')
    if language.build and not language.program:
        raise ConfigError(f"{where}: build without program", hint='write program = "prog"')
    for word in (*language.build, *language.run):
        for found in re.findall(r"\{[^}]*\}", word):
            whole = found in _PLACEHOLDERS
            if not whole and found not in ("{source}", "{program}"):
                raise ConfigError(
                    f"{where}: unknown placeholder {found}", hint="known: {source} {program} {options} {arguments}"
                )
            if whole and word != found:
                raise ConfigError(f"{where}: {found} must be a word of its own, not part of {word!r}")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to one TOML table."""

    values: Mapping[str, object]
    where: str

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: {key} must be a text", hint=f'write {key} = "..."')
        return value

    def words(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
            raise ConfigError(f"{self.where}: {key} must be a list of texts", hint=f'write {key} = ["...", "..."]')
        return tuple(value)

    def table(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {key} must be a table", hint=f"write [{key}]")
        return value

    def mapping(self, key: str) -> Mapping[str, str]:
        value = self.table(key)
        if not all(isinstance(item, str) for item in value.values()):
            raise ConfigError(f"{self.where}: {key} must hold texts", hint=f'write {key} = {{ NAME = "value" }}')
        return {name: str(item) for name, item in value.items()}


class Registry:
    """All languages that are known, by name and alias."""

    def __init__(self, languages: Iterable[Language]) -> None:
        self.languages = {language.name: language for language in languages}
        self._aliases = {alias: item for item in self.languages.values() for alias in item.aliases}

    @classmethod
    def load(cls, extra: Path | None = None) -> Registry:
        """Return our own languages, with those in folder `extra` added or replaced.

        Raises ConfigError that names the first bad file.
        """
        found: dict[str, Language] = {}
        for folder in (Path(__file__).parent, extra):
            if folder is None or not folder.is_dir():
                continue
            for file in sorted(folder.glob("*.toml")):
                try:
                    text = file.read_text("utf-8")
                except (OSError, UnicodeDecodeError) as exc:
                    raise ConfigError(f"cannot read {file}: {exc}", hint="fix or remove the file") from exc
                found[file.stem] = parse(file.stem, text, str(file))
        return cls(found.values())

    def find(self, name: str, installed: Iterable[str] | None = None) -> Language:
        """Return the language called `name`, in any case, by name or alias.

        Raises UnknownLanguageError, with the predecessor's words and a list, when it is not known or not among
        `installed`.
        """
        wanted = name.lower()
        language = self.languages.get(wanted) or self._aliases.get(wanted)
        available = sorted(self.languages if installed is None else installed)
        if language is None or language.name not in available:
            raise UnknownLanguageError(
                f"Language '{name[:64]}' is not supported.", hint=f"Supported languages are: {', '.join(available)}"
            )
        return language

    def select(self, text: str) -> tuple[Language, ...]:
        """Return the languages that `text` names: a set (`core`), `all`, or names with commas; sorted, each once.

        Raises UnknownLanguageError for a name that is neither.
        """
        names: set[str] = set()
        for word in filter(None, (part.strip() for part in text.split(","))):
            names.update(SETS.get(word) or (self.languages if word == "all" else [self.find(word).name]))
        if not names:
            raise UnknownLanguageError("no language was named", hint="write core, all, or names with commas")
        return tuple(self.languages[name] for name in sorted(names))
