"""The registry of languages: every shipped file, every kind of mistake, every way to name one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbotvm_qemu import languages
from pbotvm_qemu.errors import ConfigError, UnknownLanguageError
from pbotvm_qemu.languages import SETS, Registry

SHIPPED = sorted(Path(languages.__file__).parent.glob("*.toml"))
REGISTRY = Registry.load()
LEAST = 'description = "x"\nsource = "prog"\nrun = ["x"]\n'
SAMPLE = '[sample]\ncode = "x"\noutput = "y"\n'


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_language_is_complete(file: Path) -> None:
    language = REGISTRY.find(file.stem)
    assert language.description
    assert language.packages
    assert "hello world" in language.sample_output
    steps = language.steps(["-o1", "-o2"], ["a", "b c"])
    assert len(steps) == (2 if language.build else 1)
    words = [word for step in steps for word in step]
    assert not [word for word in words if "{" in word]
    assert {"-o1", "-o2"} <= set(words)
    assert any(language.source in word for word in words)


def test_sets_name_shipped_languages() -> None:
    assert {name for names in SETS.values() for name in names} <= REGISTRY.languages.keys()


def test_no_name_stands_for_two_languages() -> None:
    names = [name for item in REGISTRY.languages.values() for name in (item.name, *item.aliases)]
    assert len(names) == len(set(names))


def test_options_of_the_caller_replace_the_defaults() -> None:
    perl = REGISTRY.find("perl")
    assert set(perl.options) <= set(perl.steps([], [])[-1])
    assert not set(perl.options) & set(perl.steps(["-T"], [])[-1])


def test_words_of_the_caller_are_not_looked_into() -> None:
    assert "{source}" in REGISTRY.find("sh").steps([], ["{source}"])[-1]


@pytest.mark.parametrize("name", ["c", "C", "c11", "C11"])
def test_language_is_found_by_name_and_alias_in_any_case(name: str) -> None:
    assert REGISTRY.find(name).name == "c11"


def test_unknown_language_is_told_in_the_words_of_the_predecessor() -> None:
    with pytest.raises(UnknownLanguageError) as caught:
        REGISTRY.find("Klingon", ["sh", "bash"])
    assert str(caught.value) == "Language 'Klingon' is not supported."
    assert caught.value.hint == "Supported languages are: bash, sh"
    assert caught.value.exit_code == 2


def test_language_that_is_not_installed_is_not_supported() -> None:
    with pytest.raises(UnknownLanguageError, match="'perl' is not supported"):
        REGISTRY.find("perl", ["sh"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("core", tuple(sorted(SETS["core"]))),
        ("all", tuple(sorted(REGISTRY.languages))),
        ("perl, c ,perl,", ("c11", "perl")),
        ("sh,core", tuple(sorted(SETS["core"]))),
    ],
)
def test_selection_is_sorted_and_names_each_once(text: str, names: tuple[str, ...]) -> None:
    assert tuple(item.name for item in REGISTRY.select(text)) == names


@pytest.mark.parametrize("text", ["", " , ", "klingon", "core,klingon"])
def test_selection_of_nothing_or_unknown_is_refused(text: str) -> None:
    with pytest.raises(UnknownLanguageError) as caught:
        REGISTRY.select(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("description = ", "Invalid value"),
        ("extra = 1\n" + LEAST + SAMPLE, "unknown key 'extra'"),
        ('source = "prog"\nrun = ["x"]\n' + SAMPLE, "description must be a text"),
        ('description = "x"\nrun = ["x"]\n' + SAMPLE, "source must be a text"),
        ('description = "x"\nsource = "a/b"\nrun = ["x"]\n' + SAMPLE, "source 'a/b' is not a plain file name"),
        ('description = "x"\nsource = "prog"\n' + SAMPLE, "run is missing"),
        ('description = "x"\nsource = "prog"\nrun = "x"\n' + SAMPLE, "run must be a list of texts"),
        ('description = "x"\nsource = "prog"\nrun = [1]\n' + SAMPLE, "run must be a list of texts"),
        ('description = "x"\nsource = "prog"\nrun = ["\\u0000"]\n' + SAMPLE, "run must be a list of texts"),
        ('build = ["x"]\n' + LEAST + SAMPLE, "build without program"),
        ('program = "../p"\n' + LEAST + SAMPLE, "program '../p' is not a plain file name"),
        ('options = ["{x}"]\nsuffix = 1\n' + LEAST + SAMPLE, "suffix must be a text"),
        ('description = "x"\nsource = "prog"\nrun = ["{sauce}"]\n' + SAMPLE, "unknown placeholder {sauce}"),
        ('description = "x"\nsource = "prog"\nrun = ["-x{options}"]\n' + SAMPLE, "{options} must be a word of its own"),
        ('aliases = ["Big"]\n' + LEAST + SAMPLE, "alias 'Big' cannot name a language"),
        ("env = 1\n" + LEAST + SAMPLE, "env must be a table"),
        ("env = { A = 1 }\n" + LEAST + SAMPLE, "env must hold texts"),
        ("packages = 1\n" + LEAST + SAMPLE, "packages must be a table"),
        (LEAST + '[packages]\ndebian = "x"\n' + SAMPLE, "[packages]: debian must be a list of texts"),
        (LEAST, "[sample]: code must be a text"),
        (LEAST + '[sample]\ncode = "x"\n', "[sample]: output must be a text"),
    ],
)
def test_mistake_is_named_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Registry.load(tmp_path)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_file_whose_name_is_no_language_is_named(tmp_path: Path) -> None:
    (tmp_path / "My Language.toml").write_text(LEAST + SAMPLE)
    with pytest.raises(ConfigError, match="'My Language' cannot name a language"):
        Registry.load(tmp_path)


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"cannot read .*mine\.toml"):
        Registry.load(tmp_path)


def test_operator_adds_and_replaces_languages(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(LEAST + SAMPLE)
    (tmp_path / "sh.toml").write_text(LEAST + SAMPLE)
    registry = Registry.load(tmp_path)
    assert registry.find("mine").run == ("x",)
    assert registry.find("sh").description == "x"
    assert registry.languages.keys() == REGISTRY.languages.keys() | {"mine"}


def test_folder_of_the_operator_may_be_missing(tmp_path: Path) -> None:
    assert Registry.load(tmp_path / "none").languages == REGISTRY.languages
