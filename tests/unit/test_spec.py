"""The check of a `run` frame: what passes comes out unchanged, anything else is refused by name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbotvm_qemu.guest import spec, wire

LIMITS: dict[str, object] = {
    "wall": 10.0, "cpu": 0, "memory": 0, "processes": 10, "file_size": 1 << 20, "output": 1 << 20,
}  # fmt: skip
LEAST: dict[str, object] = {"steps": [["true"]], "limits": LIMITS}
# What JSON can carry, with the surrogates by which Python stands for bytes that are no UTF-8.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
names = words.filter(lambda word: bool(word) and "/" not in word and word not in (".", ".."))
specs = st.builds(
    spec.RunSpec,
    files=st.lists(st.builds(spec.File, names, st.integers(0, 1 << 20)), max_size=4, unique_by=lambda file: file.name).map(tuple),
    steps=st.lists(
        st.tuples(words.filter(bool), words).map(tuple), min_size=1, max_size=8
    ).map(tuple),
    env=st.dictionaries(words.filter(lambda word: bool(word) and "=" not in word), words, max_size=3),
    stdin=st.booleans(),
    limits=st.builds(
        spec.Limits,
        wall=st.floats(0.01, 86400),
        cpu=st.floats(0, 86400),
        memory=st.integers(0, 1 << 50),
        processes=st.integers(1, 1 << 22),
        file_size=st.integers(0, 1 << 60),
        output=st.integers(0, 1 << 60),
        build=st.floats(0, 86400),
    ),
    collect=st.lists(names, max_size=4).map(tuple),
    report=st.one_of(st.just(()), st.tuples(words.filter(bool), words)),
    language=words,
)  # fmt: skip


@given(specs)
def test_request_survives_the_way_into_the_guest(wanted: spec.RunSpec) -> None:
    assert spec.parse(json.loads(json.dumps(wanted.to_json()))) == wanted


def test_least_request_is_enough() -> None:
    parsed = spec.parse(LEAST)
    assert (parsed.files, parsed.steps, parsed.env, parsed.stdin, parsed.collect) == ((), (("true",),), {}, False, ())


def test_unknown_keys_are_ignored() -> None:
    assert spec.parse(LEAST | {"later": 1}) == spec.parse(LEAST)


@pytest.mark.parametrize("stdin", [1, "yes", None, [], "true"])
def test_input_is_asked_for_by_true_alone(stdin: object) -> None:
    assert spec.parse(LEAST | {"stdin": stdin}).stdin is False


anything: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=8),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)


@given(st.sampled_from(["files", "steps", "env", "limits", "collect"]), anything)
def test_any_json_is_accepted_or_refused(key: str, value: object) -> None:
    with contextlib.suppress(spec.BadRequestError):
        assert spec.parse(LEAST | {key: value}).steps


@pytest.mark.parametrize("language", [1, None, ["c"], "x" * 256, "a\0b", "\ud800"])
def test_a_language_that_cannot_be_named_is_refused(language: object) -> None:
    with pytest.raises(spec.BadRequestError, match="language"):
        spec.parse(LEAST | {"language": language})


@pytest.mark.parametrize("name", ["prog.c", "-rf", " ", "...", "a b", "ü", "x" * 255, "\udcff"])
def test_plain_file_name_passes(name: str) -> None:
    assert spec.file_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "a/b", "../x", "a\0", "x" * 256, "ü" * 128, "\ud800", 1, None, ["x"]]
)
def test_other_file_names_are_refused(name: object) -> None:
    with pytest.raises(spec.BadRequestError):
        spec.file_name(name)


@pytest.mark.parametrize("key", list(LIMITS))
@pytest.mark.parametrize("value", [-1, True, None, "1", float("nan"), float("inf"), 1 << 61])
def test_limit_out_of_range_is_named(key: str, value: object) -> None:
    with pytest.raises(spec.BadRequestError, match=f"limits: {key}"):
        spec.parse(LEAST | {"limits": LIMITS | {key: value}})


@pytest.mark.parametrize("key", list(LIMITS))
def test_limit_too_large_for_a_float_is_refused(key: str) -> None:
    with pytest.raises(spec.BadRequestError):
        spec.parse(LEAST | {"limits": LIMITS | {key: 10**400}})


def test_files_together_have_a_limit() -> None:
    half = wire.FILES_BYTES_MAX // 2
    spec.parse(LEAST | {"files": [{"name": "a", "size": half}, {"name": "b", "size": half}]})
    with pytest.raises(spec.BadRequestError, match="together"):
        spec.parse(LEAST | {"files": [{"name": "a", "size": half}, {"name": "b", "size": half + 1}]})


def test_longest_argument_of_linux_passes_and_one_byte_more_does_not() -> None:
    most = "x" * (128 * 1024 - 1)
    assert spec.parse(LEAST | {"steps": [["echo", most]]}).steps[0][1] == most
    with pytest.raises(spec.BadRequestError, match="argument"):
        spec.parse(LEAST | {"steps": [["echo", most + "x"]]})
