"""The initramfs archive, and images that are missing or damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import image, paths
from pbotvm_qemu.errors import ImageError
from pbotvm_qemu.languages import Registry

if TYPE_CHECKING:
    from pathlib import Path

FILES = [("bin/sh", 0o755, b"#!"), ("etc/a/b", 0o644, bytes(4097)), ("etc/a/c", 0o600, b""), ("init", 0o755, b"x" * 5)]


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of each member, by the kernel's description of the format."""
    members: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name_at = at + 110
        name = data[name_at : name_at + fields[11] - 1].decode()
        content_at = (name_at + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return members
        assert name not in members
        members[name] = (fields[1], data[content_at : content_at + fields[6]])
        at = (content_at + fields[6] + 3) // 4 * 4


def test_archive_holds_files_and_their_folders_before_them() -> None:
    members = read_newc(image.cpio(FILES))
    assert list(members) == ["bin", "bin/sh", "etc", "etc/a", "etc/a/b", "etc/a/c", "init"]
    for name, mode, data in FILES:
        assert members[name] == (stat.S_IFREG | mode, data)
    assert members["etc/a"] == (stat.S_IFDIR | 0o755, b"")


def test_archives_can_stand_one_after_another() -> None:
    assert len(image.cpio(FILES)) % 512 == 0
    assert len(image.cpio([])) % 512 == 0


@pytest.mark.skipif(not shutil.which("cpio"), reason="the cpio program is not installed")
def test_cpio_unpacks_the_archive(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet"], input=image.cpio(FILES), cwd=tmp_path, check=True)
    for name, mode, data in FILES:
        assert (tmp_path / name).read_bytes() == data
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = paths.images() / "abc"
    folder.mkdir(parents=True)
    files = []
    for name in ("root.qcow2", "vmlinuz", "boot.cpio"):
        data = image.cpio(FILES) if name == "boot.cpio" else name.encode()
        (folder / name).write_bytes(data)
        files.append([name, len(data), hashlib.sha256(data).hexdigest()])
    (folder / "manifest.json").write_text(json.dumps({"files": files, "languages": ["sh"], "root_size": 1 << 30}))
    return folder


def test_whole_image_is_loaded_and_verified(directory: Path) -> None:
    loaded = image.Image.load("abc")
    loaded.verify()
    assert (loaded.languages, loaded.root_size, loaded.kernel) == (("sh",), 1 << 30, directory / "vmlinuz")
    assert image.built() == {"abc"}


@pytest.mark.usefixtures("directory")
def test_missing_image_says_how_to_build_it() -> None:
    with pytest.raises(ImageError, match="no image def") as caught:
        image.Image.load("def")
    assert "create --force" in str(caught.value.hint)


def test_truncated_file_is_named_at_once(directory: Path) -> None:
    (directory / "vmlinuz").write_bytes(b"vm")
    with pytest.raises(ImageError, match=r"vmlinuz is damaged: 2 bytes instead of 7"):
        image.Image.load("abc")


def test_missing_file_is_named(directory: Path) -> None:
    (directory / "boot.cpio").unlink()
    with pytest.raises(ImageError, match=r"lacks its file .*boot\.cpio"):
        image.Image.load("abc")


def test_file_of_the_same_size_and_other_bytes_is_found(directory: Path) -> None:
    (directory / "vmlinuz").write_bytes(b"VMLINUZ")
    with pytest.raises(ImageError, match="vmlinuz is damaged: wrong sha256"):
        image.Image.load("abc").verify()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"files":[],"languages":[],"root_size":1}', '{"files":[["x"]],"languages":[],"root_size":1}',
     '{"files":[],"languages":[],"root_size":"x"}', '{"files":1,"languages":[],"root_size":1}'],
)  # fmt: skip
def test_damaged_manifest_is_said(directory: Path, text: str) -> None:
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ImageError, match="damaged manifest"):
        image.Image.load("abc")


@pytest.mark.usefixtures("directory")
def test_initramfs_is_the_boot_archive_and_todays_agent(tmp_path: Path) -> None:
    target = tmp_path / "initramfs.cpio"
    digest = image.write_initramfs(image.Image.load("abc"), target)
    data = target.read_bytes()
    boot = image.cpio(FILES)
    assert digest == hashlib.sha256(data).hexdigest()
    assert data.startswith(boot)
    agent = read_newc(data[len(boot) :])
    assert {f"agent/guest/{file.name}" for file in paths.guest_package().glob("*.py")} < agent.keys()
    assert agent["agent/start"][0] == stat.S_IFREG | 0o755


@pytest.mark.usefixtures("directory")
async def test_disk_smaller_than_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="too small") as caught:
        await image.create_overlay(image.Image.load("abc"), tmp_path / "disk", (1 << 30) - 1)
    assert "--disk-size 1G" in str(caught.value.hint)


def test_recipe_is_told_apart_by_what_is_in_it() -> None:
    registry = Registry.load()
    core, sh = (image.Recipe.load(registry.select(text)) for text in ("core", "sh"))
    assert core.id != sh.id
    assert core.id == image.Recipe.load(reversed(registry.select("core"))).id


def test_unknown_recipe_is_an_error_of_the_image() -> None:
    with pytest.raises(ImageError, match="recipe"):
        image.Recipe.load([], "no-such-recipe")
