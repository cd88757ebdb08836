"""Which languages machines are kept warm in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pbotvm_qemu import config, keeper
from pbotvm_qemu.errors import ConfigError
from pbotvm_qemu.guest.spec import Limits, RunSpec
from pbotvm_qemu.warmth import Warmth

LIMITS = Limits(wall=1.0, cpu=0, memory=0, processes=1, file_size=0, output=1)
SAMPLES: dict[str, tuple[RunSpec, list[bytes]]] = {
    name: (RunSpec((), ((name,),), {}, stdin=False, limits=LIMITS, collect=(), language=name), [])
    for name in ("bash", "c11", "perl", "sh")
}


def test_the_named_come_first_and_then_what_was_used_last() -> None:
    warmth = Warmth(SAMPLES, always=("sh",), recent=2)
    for name in ("bash", "c11", "perl", "c11", "sh"):
        warmth.used(name)
    assert warmth.wanted == ("sh", "c11", "perl")
    assert [warmth.next(done) for done in ((), ("sh",), ("perl", "sh"), ("c11", "perl", "sh"))] == [
        "sh",
        "c11",
        "c11",
        None,
    ]
    assert warmth.sample("perl") == SAMPLES["perl"]


@pytest.mark.parametrize("name", ["", "cobol"])
def test_what_the_machine_does_not_have_is_not_wanted(name: str) -> None:
    warmth = Warmth(SAMPLES, always=("cobol",), recent=2)
    warmth.used(name)
    assert warmth.wanted == ()
    assert warmth.next(()) is None


def test_without_recent_only_the_named_are_wanted() -> None:
    warmth = Warmth(SAMPLES, always=("sh",))
    warmth.used("perl")
    assert list(warmth.wanted) == ["sh"]


def test_a_sample_that_fails_three_times_in_a_row_is_not_wanted_for_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    warmth = Warmth(SAMPLES, always=("sh",), recent=1)
    warmth.used("perl")
    for _ in range(3):
        warmth.failed("perl", RuntimeError("QEMU was killed"))
        warmth.worked("perl")
    for number in range(3):
        assert list(warmth.wanted) == ["sh", "perl"]
        warmth.failed("perl", RuntimeError(f"failure {number}"))
    assert list(warmth.wanted) == ["sh"]
    assert "failure 2" in caplog.text
    assert "not kept warm in perl for 600 s" in caplog.text
    now += 600
    assert list(warmth.wanted) == ["sh", "perl"]


def test_a_language_in_the_configuration_that_nobody_knows_is_told_with_its_place() -> None:
    record: Any = SimpleNamespace(languages=("sh",), accelerator="tcg", name="m")
    way: Any = SimpleNamespace(single=False)
    wanted = config.override(config.Config(), "pool", warm=("cobol",))
    with pytest.raises(ConfigError, match=r"warm in \[pool\]: .*'cobol'") as caught:
        keeper.warmth(record, wanted, way)
    assert "config.toml" in str(caught.value.hint)
    known = keeper.warmth(record, config.override(wanted, "pool", warm=("dash",)), way)
    assert known.wanted == ("sh",)
