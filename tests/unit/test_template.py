"""Frozen machines as files: noticed changes, disks without names, copies of memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pbotvm_qemu import paths, process, state, template
from pbotvm_qemu.config import MachineConfig
from pbotvm_qemu.errors import HostError, StateError

FINGERPRINT = {"QEMU program": "q", "memory": "1"}


@pytest.fixture
async def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> template.Template:
    """A template of random bytes, made as `create` makes one; qemu-img is stood in for by a plain file."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    async def overlay(argv: list[str], **_options: object) -> process.Completed:
        Path(argv[-2]).write_bytes(b"overlay" * 1000)
        return process.Completed(tuple(argv), 0, b"", b"")

    monkeypatch.setattr(process, "find_program", lambda _name, **_options: "qemu-img")
    monkeypatch.setattr(process, "run", overlay)
    directory = paths.MachinePaths("m").template
    ram = template.prepare(directory, 1 << 22)
    with ram.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"memory" * 1000)
    for name in ("state", "disk.qcow2"):
        (directory / name).write_bytes(os.urandom(5000))
    return await template.seal(directory, FINGERPRINT, disk_size=1 << 30, qemu_version=(7, 2))


async def test_a_sealed_template_is_found_again(sealed: template.Template) -> None:
    assert template.load("m") == sealed
    assert template.exists("m")
    assert not template.exists("n")
    found = template.matching("m", FINGERPRINT)
    found.verify()
    assert found.frozen.without_memory


async def test_another_fingerprint_is_refused_by_name(sealed: template.Template) -> None:
    assert sealed
    with pytest.raises(StateError, match="another QEMU program"):
        template.matching("m", FINGERPRINT | {"QEMU program": "r"})
    with pytest.raises(StateError, match="another kernel"):
        template.matching("m", FINGERPRINT | {"kernel": "k"})


@pytest.mark.parametrize("name", ["ram", "state", "disk.qcow2", "overlay.qcow2"])
async def test_every_change_of_a_file_is_noticed(sealed: template.Template, name: str) -> None:
    file = sealed.directory / name
    before = file.stat()
    file.chmod(0o600)
    with file.open("r+b") as stream:
        stream.write(b"x")
    file.chmod(before.st_mode)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StateError, match=f"{name} was changed") as caught:
        sealed.check()
    assert "create --force m" in str(caught.value.hint)
    with pytest.raises(StateError, match="wrong content"):
        sealed.verify()


async def test_a_file_that_is_gone_is_named(sealed: template.Template) -> None:
    (sealed.directory / "state").unlink()
    with pytest.raises(StateError, match="state: No such file"):
        sealed.check()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "files": {"ram": [1]}}', "[" * 100_000]
)
async def test_a_damaged_description_is_refused(sealed: template.Template, text: str) -> None:
    (sealed.directory / "template.json").write_text(text)
    with pytest.raises(StateError, match=r"damaged description|has format") as caught:
        template.load("m")
    assert caught.value.hint


async def test_a_description_without_a_file_is_refused(sealed: template.Template) -> None:
    description = sealed.directory / "template.json"
    table = json.loads(description.read_text())
    del table["files"]["ram"]
    description.write_text(json.dumps(table))
    with pytest.raises(StateError, match="wrong files"):
        template.load("m")


async def test_qemu_may_only_read_the_memory_where_it_can_do_with_that(sealed: template.Template) -> None:
    again = await template.seal(sealed.directory, FINGERPRINT, disk_size=1 << 30, qemu_version=template.PROTECTED_FROM)
    assert again.protected
    assert again.memory.protected
    assert (again.directory / "ram").stat().st_mode & 0o222 == 0
    assert not sealed.protected


async def test_a_disk_is_a_copy_without_a_name(sealed: template.Template, tmp_path: Path) -> None:
    folder = tmp_path / "clones"
    folder.mkdir()
    with await sealed.frozen.new_disk(folder) as one, await sealed.frozen.new_disk(folder) as two:
        assert list(folder.iterdir()) == []
        two.write(b"changed")
        assert paths.open_file(one.fileno()).read_bytes() == b"overlay" * 1000
    with pytest.raises(HostError, match="cannot make a disk"):
        await sealed.frozen.new_disk(folder / "nowhere")


async def test_private_memory_is_the_same_bytes_with_the_same_holes(sealed: template.Template) -> None:
    with template.private_memory(sealed) as copy:
        found = os.fstat(copy.fileno())
        assert paths.open_file(copy.fileno()).read_bytes() == (sealed.directory / "ram").read_bytes()
        assert found.st_size == 1 << 22
        assert found.st_blocks * 512 < 1 << 20


async def test_memory_of_nothing_but_holes_is_copied(sealed: template.Template) -> None:
    os.truncate(sealed.directory / "ram", 0)
    os.truncate(sealed.directory / "ram", 1 << 20)
    with template.private_memory(sealed) as copy:
        assert paths.open_file(copy.fileno()).read_bytes() == bytes(1 << 20)


async def test_a_template_is_held_as_long_as_its_user_lives(sealed: template.Template) -> None:
    class User:
        pass

    user = User()
    template.use(user, sealed)
    record = state.MachineRecord(
        name="m", uuid="u", created=1, state="ready", machine=MachineConfig(name="m"), image="i", languages=("sh",),
        accelerator="tcg", qemu="/qemu", fingerprint={}, build="build-00000001",
    )  # fmt: skip
    assert state.sweep(record) == [sealed.directory]
    del user
    assert state.sweep(record) == []
    with pytest.raises(StateError, match="cannot be used"):
        template.use(User(), sealed)
