"""`persist-key`: what a program leaves in the folder of that name is there for the next one."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import shelf
from pbotvm_qemu.config import Limits
from pbotvm_qemu.guest.source import keep

if TYPE_CHECKING:
    from pathlib import Path

    from tests.compat.door import Door

COUNT = "n=$(cat poll/n 2>/dev/null || echo 0); echo $((n + 1)) >poll/n; cat poll/n"


@pytest.fixture(autouse=True)
async def patient(door: Door) -> None:
    """Give programs time on a busy host."""
    await door.configure(limits=Limits(wall=60.0))


async def ask(door: Door, code: str, key: object = "poll", **keys: object) -> str:
    return (await door.code(f"-lang=sh {code}", **{"persist-key": key}, **keys)).rstrip("\n")


async def test_a_folder_lives_on_under_its_key(door: Door) -> None:
    assert [await ask(door, COUNT) for _ in range(3)] == ["1", "2", "3"]
    assert await ask(door, COUNT, factoid="#c:poll") == "4"
    assert await ask(door, "ls poll", key="other") == "ls: cannot access 'poll': No such file or directory\n [Exit 2]"
    assert await ask(door, "pwd; ls -d other", key="other") != ""
    assert "No such file" in await door.code("-lang=sh ls poll")
    assert await ask(door, COUNT) == "5"


async def test_folders_modes_and_bytes_are_kept(door: Door) -> None:
    await ask(
        door,
        "mkdir -p poll/a/b; printf 'a\\0b\\377' >'poll/a/b/x y'; printf '#!/bin/sh\\necho ran' >poll/p; chmod 700 poll/p",
    )
    assert await ask(door, "poll/p; od -An -tx1 'poll/a/b/x y'; rm -r poll/a") == "ran\n 61 00 62 ff"
    assert await ask(door, "ls poll") == "p"


async def test_an_int_is_a_key_too(door: Door) -> None:
    await ask(door, "echo kept >7/x", key=7)
    assert await ask(door, "cat 7/x", key="7") == "kept"


@pytest.mark.parametrize(
    ("ending", "said"), [("exit 3", "Exit 3."), ("kill -9 $$", "Exit 137."), ("kill -SEGV $$", "Exit 139.")]
)
async def test_a_program_that_fails_keeps_what_it_wrote(door: Door, ending: str, said: str) -> None:
    assert await ask(door, f"echo kept >poll/x; {ending}") == said
    assert await ask(door, "cat poll/x") == "kept"


async def test_a_program_that_is_ended_leaves_what_was_there(door: Door) -> None:
    await ask(door, "echo old >poll/x")
    await door.configure(limits=Limits(wall=2.0))
    assert await ask(door, "echo new >poll/x; sleep 60") == "[Timed-out]"
    await door.configure(limits=Limits(wall=60.0))
    assert await ask(door, "cat poll/x") == "old"


async def test_what_is_too_large_is_not_kept_and_said(door: Door) -> None:
    await ask(door, "echo old >poll/x")
    said = await ask(door, "echo new >poll/x; head -c 2000000 /dev/zero >poll/big; echo done")
    assert said == f"done\nthe folder poll is not kept: it has over {keep.SIZE_MAX} bytes"
    many = "cd poll; seq 3000 | xargs touch; echo done"  # each has a header
    said = await ask(door, many, channel="joe")
    assert "is not kept" in said
    assert await ask(door, "cat poll/x; ls poll") == "old\nx"


async def test_what_is_no_file_is_left_out(door: Door) -> None:
    await ask(door, "ln -s /etc/passwd poll/link; mkfifo poll/fifo; echo x >poll/x; ln poll/x poll/y")
    assert await ask(door, "ls poll; cat poll/y") == "x\ny\nx"


@pytest.mark.parametrize(
    "trick",
    ["mkdir .kept.new", "mkdir .kept", "rm -rf poll", "rm -rf poll; ln -s / poll", "rm -rf poll; echo x >poll", "chmod 0 poll"],
)  # fmt: skip
async def test_no_trick_with_the_folder_harms_the_next_run(door: Door, trick: str) -> None:
    await ask(door, COUNT)
    await ask(door, f"{trick}; echo tricked")
    assert await ask(door, COUNT) in ("1", "2")


async def test_an_archive_that_cannot_be_read_begins_anew(door: Door, tmp_path: Path) -> None:
    await ask(door, COUNT)
    (file,) = (tmp_path / "kept").glob("*.tar")
    file.write_bytes(b"no archive")
    said = await ask(door, COUNT)
    assert said.startswith("what was kept in poll cannot be read: ")
    assert said.endswith("1")
    assert await ask(door, COUNT) == "2"


@pytest.mark.parametrize("key", ["../x", "a/b", ".", "..", "a\0b"])
async def test_a_key_that_is_no_plain_name_is_refused(door: Door, tmp_path: Path, key: str) -> None:
    assert "is not a plain file name" in await ask(door, "echo ran", key=key)
    assert not list((tmp_path / "kept").glob("*.tar"))


@pytest.mark.parametrize("key", ["prog.sh", ".kept", "-rf", "a b", "é", "x" * 300, "", True])
async def test_an_odd_key_breaks_nothing(door: Door, key: object) -> None:
    said = await ask(door, "echo ran", key=key)
    assert said == "ran" or "cannot" in said or "twice" in said
    assert await ask(door, COUNT) == "1"


async def test_runs_with_one_key_take_turns(door: Door) -> None:
    counts = await asyncio.gather(*(ask(door, COUNT) for _ in range(10)))
    assert sorted(map(int, counts)) == list(range(1, 11))
    assert not door.desk._shelf._locks


async def test_keys_are_counted(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "KEYS_MAX", 2)
    for key in ("a", "b", "c"):
        assert await ask(door, f"echo {key} >{key}/x; cat {key}/x", key=key) == key
    assert len(list((tmp_path / "kept").glob("*.tar"))) == 2
    assert await ask(door, "cat a/x", key="a") == "a"


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed (scripts/setup --dev installs it)")
async def test_a_program_of_c_keeps_too(door: Door) -> None:
    code = '-lang=c11 -noheaders -g -include stdio.h FILE *f = fopen("poll/n", "a+"); fputs("x", f); rewind(f); char s[9] = ""; fgets(s, 9, f); puts(s);'
    assert [await door.code(code, **{"persist-key": "poll"}) for _ in range(2)] == ["x\n", "xx\n"]
