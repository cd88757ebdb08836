"""The registry of languages: one TOML file each, beside this module and in the operator's configuration folder.

`schema.py` says what a file may hold. A bad file is refused by name and line, and takes only its own language with it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import ConfigError, UnknownLanguageError
from pbotvm_qemu.languages.schema import ROWS, Language, Row, Source, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["ROWS", "SETS", "Language", "Registry", "Row"]

_CORE = ("bash", "bc", "c11", "lua", "perl", "python", "python3", "sh", "tcl")
SETS: Mapping[str, tuple[str, ...]] = {
    "core": _CORE,
    "popular": (
        *_CORE,
        "awk",
        "c++",
        "c2x",
        "c89",
        "c99",
        "go",
        "java",
        "javascript",
        "php",
        "ruby",
        "rust",
        "sql",
        "zsh",
    ),
}

_FILE_MAX = 1 << 20  # bytes of one language file
_LIKE_MAX = 4  # files that stand on one another


class Registry:
    """All languages that are known, by name and alias; and the files that were refused."""

    def __init__(self, languages: Iterable[Language], problems: Mapping[str, ConfigError] | None = None) -> None:
        self.languages = {language.name: language for language in languages}
        self.problems = dict(problems or {})  # by the name of the language that is not there because of it
        self._aliases: dict[str, Language] = {}
        for language in self.languages.values():
            for alias in language.aliases:
                self._aliases.setdefault(alias, language)

    @classmethod
    def load(cls, extra: Path | None = None, *, only: str | None = None) -> Registry:
        """Return our own languages, with those in folder `extra` added or replaced.

        A file that is refused is in `problems`; so is the language that it would have replaced. When `only` is the
        name of a file, just that language is read: who runs one program need not wait for fifty files.
        """
        files = _Files(extra)
        wanted = [only] if only is not None and only in files.names else list(files.names)
        languages = []
        problems: dict[str, ConfigError] = {}
        for name in wanted:
            try:
                languages.append(parse(files.resolve(files.source(name))))
            except ConfigError as exc:
                problems[name] = exc
        return cls(languages, problems)

    def find(self, name: str, installed: Iterable[str] | None = None, *, machine: str = "") -> Language:
        """Return the language called `name`, in any case, by name or alias.

        `machine` is the one with the `installed` languages, for the hint to an operator.

        Raises UnknownLanguageError, with the predecessor's words and a list, when it is not known or not among
        `installed`; ConfigError when its file was refused.
        """
        wanted = name.lower()
        if wanted in self.problems:
            raise self.problems[wanted]
        language = self.languages.get(wanted) or self._aliases.get(wanted)
        available = sorted(self.languages if installed is None else installed)
        if language is None or language.name not in available:
            hint = f"Supported languages are: {', '.join(available)}"
            if machine and language is not None:
                hint = language.absent or f"add it with `pbotvm-qemu languages add {language.name} --vm {machine}`"
            raise UnknownLanguageError(f"Language '{name[:64]}' is not supported.", hint=hint)
        return language

    def select(self, text: str) -> tuple[Language, ...]:
        """Return the languages that `text` names, sorted, each once.

        `text` is a set (`core`, `popular`), `all` for all that a package brings, or names with commas. Raises
        UnknownLanguageError for a name that is neither, ConfigError for one whose file was refused.
        """
        names: set[str] = set()
        for word in filter(None, (part.strip() for part in text.split(","))):
            if word == "all":
                names.update(name for name, language in self.languages.items() if not language.absent)
            else:
                names.update(self.find(name).name for name in SETS.get(word, (word,)))
        if not names:
            sets = ", ".join([*SETS, "all"])
            raise UnknownLanguageError("no language was named", hint=f"write {sets}, or names with commas")
        return tuple(self.languages[name] for name in sorted(names))


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(_FILE_MAX + 1)
        if len(data) > _FILE_MAX:
            raise ConfigError(f"{file}: longer than {_FILE_MAX} bytes", hint="fix or remove the file")
        return data.decode("utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}", hint="fix or remove the file") from exc
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{file}:{line}: not UTF-8 text", hint="fix or remove the file") from exc


class _Files:
    """The language files of the package and of the operator, read when they are asked for."""

    def __init__(self, extra: Path | None) -> None:
        self._shipped = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.toml"))}
        own = {file.stem: file for file in sorted(extra.glob("*.toml"))} if extra is not None and extra.is_dir() else {}
        self.names = {**self._shipped, **own}

    def source(self, name: str) -> Source:
        """Return the file of language `name`. Raises ConfigError when it cannot be read."""
        return _source(self.names[name])

    def resolve(self, source: Source) -> Source:
        """Return `source` with all that it takes over through `like`. Raises ConfigError when that leads nowhere."""
        base, here = source, source
        for _ in range(_LIKE_MAX):
            name = here.table.get("like")
            if name is None:
                return base
            here = self._liked(name, here, source)
            base = base.like(here)
        raise source.error(
            "like leads through too many files, or in a circle", "like", hint="name a file without `like`"
        )

    def _liked(self, name: object, here: Source, source: Source) -> Source:
        # A file that replaces one of ours may stand on what it replaces.
        files = self._shipped if name == here.name else self.names
        file = files.get(name) if isinstance(name, str) else None
        if file is not None and str(file) != here.where:
            with contextlib.suppress(ConfigError):  # which is told of that file
                return _source(file)
        raise source.error(
            f"like = {str(name)[:40]!r} names no language file that can be read",
            "like",
            hint="name another language file",
        )


def _source(file: Path) -> Source:
    return Source.decode(file.stem, _read(file), str(file))
