"""The registry of languages: every shipped file, every kind of mistake, every way to name one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pbotvm_qemu import languages
from pbotvm_qemu.errors import ConfigError, UnknownLanguageError
from pbotvm_qemu.languages import ROWS, SETS, Registry

SHIPPED = sorted(Path(languages.__file__).parent.glob("*.toml"))
REGISTRY = Registry.load()
LEAST = 'description = "x"\nsource = "prog"\nrun = ["x"]\n'
SAMPLE = '[sample]\ncode = "x"\noutput = "y"\n'


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_language_is_complete(file: Path) -> None:
    language = REGISTRY.find(file.stem)
    assert language.description
    assert bool(language.packages_for("debian-trixie")) != bool(language.absent)
    assert "hello world" in language.sample_output
    steps = language.steps(["-o1", "-o2"], ["a", "b c"])
    assert len(steps) == (2 if language.build else 1)
    words = [word for step in steps for word in step if not word.startswith("{")]
    assert not re.findall(r"\{(source|program|prepared|options|arguments)\}", " ".join(words))
    assert {"-o1", "-o2"} <= set(words)
    assert any(language.source in word for word in words)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_language_is_tried_in_every_way_that_it_can(file: Path) -> None:
    tests = REGISTRY.find(file.stem).tests
    assert {*tests.programs, *tests.cannot, "hello"} == set(ROWS)
    assert tests.error_says


def test_every_language_of_the_predecessor_is_there() -> None:
    names = (
        "bash bc bf c11 c2x c89 c99 clang clang11 clang2x clang89 clang99 clang++ clisp c++ freebasic go haskell java javascript "
        "ksh lua perl php python python3 qbasic ruby scheme sh tcl tendra zsh"
    )
    for name in [*names.split(), "cpp", "clangpp", "basic", "js"]:
        assert REGISTRY.find(name)


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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("py", "add it with `pbotvm-qemu languages add python3 --vm m`"),
        ("qbasic", "Debian has no package of the FreeBASIC compiler (fbc)"),
        ("klingon", "Supported languages are: bash, sh"),
    ],
)
def test_an_operator_is_told_how_to_add_what_a_machine_lacks(name: str, hint: str) -> None:
    with pytest.raises(UnknownLanguageError) as caught:
        REGISTRY.find(name, ["sh", "bash"], machine="m")
    assert caught.value.hint == hint


def test_language_that_is_not_installed_is_not_supported() -> None:
    with pytest.raises(UnknownLanguageError, match="'perl' is not supported"):
        REGISTRY.find("perl", ["sh"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("core", tuple(sorted(SETS["core"]))),
        ("all", tuple(sorted(name for name, item in REGISTRY.languages.items() if not item.absent))),
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
    ("text", "line", "said"),
    [
        ("description = ", 1, "Invalid value"),
        (LEAST + "x = [\n", 4, "Invalid"),
        (LEAST + SAMPLE + "[sample]\n", 7, "Cannot declare"),
        ("extra = 1\n" + LEAST + SAMPLE, 1, "unknown key 'extra'"),
        (LEAST + SAMPLE + "[sauce]\n", 7, "unknown key 'sauce'"),
        (LEAST + SAMPLE + "colour = 1\n", 7, "[sample]: unknown key 'colour'"),
        (LEAST + SAMPLE + "[tests]\nnonsense = ''\n", 8, "[tests]: unknown key 'nonsense'"),
        (LEAST + SAMPLE + "[limits]\nwall = 3\n", 8, "[limits]: unknown key 'wall'"),
        ('source = "prog"\nrun = ["x"]\n' + SAMPLE, None, "description must be a text"),
        ('description = 3\nsource = "prog"\nrun = ["x"]\n' + SAMPLE, 1, "description must be a text"),
        ('description = "x"\nrun = ["x"]\n' + SAMPLE, None, "source must be a text"),
        ('description = "x"\nsource = "a/b"\nrun = ["x"]\n' + SAMPLE, 2, "source 'a/b' is not a plain file name"),
        ('description = "x"\nsource = "prog"\n' + SAMPLE, None, "run is missing"),
        ('description = "x"\nsource = "prog"\nrun = "x"\n' + SAMPLE, 3, "run must be a list of texts"),
        ('description = "x"\nsource = "prog"\nrun = [1]\n' + SAMPLE, 3, "run must be a list of texts"),
        ('description = "x"\nsource = "prog"\nrun = ["\\u0000"]\n' + SAMPLE, 3, "run must be a list of texts"),
        ('build = ["x"]\n' + LEAST + SAMPLE, 1, "build without program"),
        ('prepare = "c"\n' + LEAST + SAMPLE, 1, "prepare without build"),
        ('prepare = "fortran"\n' + LEAST + SAMPLE, 1, "prepare 'fortran' is not known"),
        ('program = "../p"\n' + LEAST + SAMPLE, 1, "program '../p' is not a plain file name"),
        ('options = ["{x}"]\nsuffix = 1\n' + LEAST + SAMPLE, 2, "suffix must be a text"),
        ('description = "x"\nsource = "prog"\nrun = ["{sauce}"]\n' + SAMPLE, 3, "unknown placeholder {sauce}"),
        (
            'description = "x"\nsource = "prog"\nrun = ["-x{options}"]\n' + SAMPLE,
            3,
            "{options} must be a word of its own",
        ),
        ('aliases = ["Big"]\n' + LEAST + SAMPLE, 1, "alias 'Big' cannot name a language"),
        ("env = 1\n" + LEAST + SAMPLE, 1, "env must be a table"),
        ("env = { A = 1 }\n" + LEAST + SAMPLE, 1, "[env]: A must be a text"),
        (LEAST + SAMPLE + "[env]\nB = 'b'\nA = 1\n", 9, "[env]: A must be a text"),
        ("packages = 1\n" + LEAST + SAMPLE, 1, "packages must be a table"),
        (LEAST + '[packages]\ndebian = "x"\n' + SAMPLE, 5, "[packages]: debian must be a list of texts"),
        (LEAST + '[packages]\ndebian = ["x y"]\n' + SAMPLE, 5, "'x y' cannot name a package"),
        (LEAST + "[limits]\nbuild = 0\n" + SAMPLE, 5, "[limits]: build must be a number from 1 to 3600"),
        (LEAST + "[limits]\nbuild = true\n" + SAMPLE, 5, "[limits]: build must be a number"),
        (LEAST + SAMPLE + "[tests.cannot]\nhello2 = 'x'\n", 7, "'hello2' is no test"),
        ('like = "klingon"\n' + LEAST + SAMPLE, 1, "like = 'klingon' names no language file"),
        ('like = "mine"\n' + LEAST + SAMPLE, 1, "like = 'mine' names no language file"),
        ("like = 3\n" + LEAST + SAMPLE, 1, "like = '3' names no language file"),
        (LEAST, None, "[sample]: code must be a text"),
        (LEAST + '[sample]\ncode = "x"\n', 4, "[sample]: output must be a text"),
        (LEAST + "note = '''\nrun = 1\n'''\nsuffix = 2\n" + SAMPLE, 4, "unknown key 'note'"),
    ],
)
def test_mistake_is_named_with_file_and_line_and_the_others_still_work(
    tmp_path: Path, text: str, line: int | None, said: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    (tmp_path / "good.toml").write_text(LEAST + SAMPLE)
    registry = Registry.load(tmp_path)
    problem = registry.problems["mine"]
    where = f"{file}:{line}: " if line else f"{file}: "
    assert str(problem).startswith(where), problem
    assert said in str(problem)
    assert problem.hint
    assert registry.languages.keys() == {*REGISTRY.languages, "good"}
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        registry.find("mine")


def test_file_whose_name_is_no_language_is_named(tmp_path: Path) -> None:
    (tmp_path / "My Language.toml").write_text(LEAST + SAMPLE)
    assert "'My Language' cannot name a language" in str(Registry.load(tmp_path).problems["My Language"])


def test_file_that_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"# a\n# \xff\n")
    (tmp_path / "huge.toml").write_bytes(b"#" * (2 << 20))
    (tmp_path / "deep.toml").write_text("x = " + "[" * 100000)
    problems = Registry.load(tmp_path).problems
    assert "mine.toml:2: not UTF-8" in str(problems["mine"])
    assert "longer than" in str(problems["huge"])
    assert "deep.toml" in str(problems["deep"])


def test_a_broken_replacement_does_not_bring_back_what_it_was_to_replace(tmp_path: Path) -> None:
    (tmp_path / "perl.toml").write_text("run = 1\n")
    registry = Registry.load(tmp_path)
    with pytest.raises(ConfigError, match=r"perl\.toml"):
        registry.find("perl")
    assert registry.find("python3")


def test_operator_adds_and_replaces_languages(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(LEAST + SAMPLE)
    (tmp_path / "sh.toml").write_text(LEAST + SAMPLE)
    registry = Registry.load(tmp_path)
    assert registry.find("mine").run == ("x",)
    assert registry.find("sh").description == "x"
    assert registry.languages.keys() == REGISTRY.languages.keys() | {"mine"}


def test_a_file_takes_over_what_it_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "freebasic.toml").write_text('like = "freebasic"\nabsent = ""\n[packages]\ndebian = ["my-fbc"]\n')
    (tmp_path / "c17.toml").write_text('like = "c11"\noptions = ["-std=c17"]\n[tests]\nstatus = "return 3;"\n')
    registry = Registry.load(tmp_path)
    assert not registry.problems
    assert registry.find("freebasic").packages_for("debian-trixie") == ("my-fbc",)
    assert registry.find("freebasic").run == REGISTRY.find("freebasic").run
    assert registry.find("freebasic") in registry.select("all")
    c17, c11 = registry.find("c17"), REGISTRY.find("c11")
    assert (c17.options, c17.headers, c17.tests.programs["stdin"]) == (
        ("-std=c17",),
        c11.headers,
        c11.tests.programs["stdin"],
    )
    assert registry.find("c").name == "c11"


def test_files_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('like = "two"\n' + LEAST + SAMPLE)
    (tmp_path / "two.toml").write_text('like = "one"\n' + LEAST + SAMPLE)
    assert set(Registry.load(tmp_path).problems) == {"one", "two"}


def test_folder_of_the_operator_may_be_missing(tmp_path: Path) -> None:
    assert Registry.load(tmp_path / "none").languages == REGISTRY.languages


def test_packages_are_of_the_recipe_before_those_of_the_distribution(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(LEAST + SAMPLE + '[packages]\ndebian = ["a"]\ndebian-trixie = ["b"]\n')
    mine = Registry.load(tmp_path).find("mine")
    assert [mine.packages_for(name) for name in ("debian-trixie", "debian-sid", "fedora")] == [("b",), ("a",), ()]


@pytest.mark.parametrize(
    ("given", "expected"), [((), ("-a", "-b")), (("-x1",), ("-x1",)), (("-c",), ("-a", "-b", "-c")), (("-y",), ("-y",))]
)
def test_only_the_options_that_a_file_names_replace_its_own(
    tmp_path: Path, given: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    text = 'options = ["-a", "-b"]\nreplaced-by = ["-x*", "-y"]\n' + LEAST.replace('["x"]', '["x", "{options}"]')
    (tmp_path / "mine.toml").write_text(text + SAMPLE)
    assert Registry.load(tmp_path).find("mine").steps(given, ())[-1] == ("x", *expected)


def test_flags_of_the_preparation_do_not_replace_the_options_of_the_compiler() -> None:
    c11 = REGISTRY.find("c11")
    build = c11.steps(["-nomain", "-include", "math.h"], [])[0]
    assert json.loads(build[1])["flags"] == ["-nomain", "-include", "math.h"]
    assert set(c11.options) <= set(build)
    assert not set(c11.options) & set(c11.steps(["-noheaders", "-O2"], [])[0])


@pytest.mark.parametrize("name", ["perl", "clang89", "c", "CPP"])
def test_one_language_is_the_same_read_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.toml").write_text("run = 1\n")
    alone = Registry.load(tmp_path, only=name.lower())
    assert alone.find(name) == REGISTRY.find(name)
    assert len(alone.languages) in (1, len(REGISTRY.languages))
