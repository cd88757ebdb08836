"""Guest images: built from a recipe, kept by the recipe's hash, never changed; and the initramfs with the agent.

An image is a folder in the cache:

```text
root.qcow2     ext4 root file system, the backing file of every machine's disk
vmlinuz        the kernel
boot.cpio      initramfs without the agent: busybox, modules, /init
manifest.json  what it was made from, size and sha256 of each file; written last
```
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import shlex
import shutil
import stat
import tarfile
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu import config, paths, process
from pbotvm_qemu.errors import CommandError, HostError, ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pbotvm_qemu.languages import Language

    Progress = Callable[[str, float], None]  # name of a stage, and how much of all stages is done (0 to 1)

_FORMAT = 1  # of the folder; a change makes every image anew
_BUILD_TIMEOUT = 3600.0  # seconds for mmdebstrap, mirror included
_STEP_TIMEOUT = 900.0
FREE_MIN = 3 << 30  # bytes that a build needs on the cache's file system
_LANGUAGES_FREE = 12  # that FREE_MIN is enough for
_LANGUAGE_ROOM = 320 << 20  # bytes for each one more: archive, tree and disk exist at once
_FILES = ("root.qcow2", "vmlinuz", "boot.cpio")

# What mmdebstrap says at the begin of a stage, our name for it, and how much of the build is done by then.
_STAGES = (
    ("running apt-get update", "reading package lists", 0.02),
    ("downloading packages", "downloading packages", 0.05),
    ("extracting archives", "unpacking the base system", 0.15),
    ("installing essential", "installing the base system", 0.25),
    ("installing remaining", "installing languages", 0.35),
    ("running --customize-hook", "taking the kernel apart", 0.6),
    ("creating tarball", "packing", 0.65),
)


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image."""

    id: str
    directory: Path
    languages: tuple[str, ...]
    root_size: int  # bytes of the virtual disk
    files: tuple[tuple[str, int, str], ...]  # name, size in bytes, sha256
    build_s: float | None = None  # seconds that its build took; None for one of an earlier version

    @property
    def root(self) -> Path:
        """The backing file."""
        return self.directory / "root.qcow2"

    @property
    def kernel(self) -> Path:
        """The guest kernel."""
        return self.directory / "vmlinuz"

    @property
    def boot(self) -> Path:
        """The initramfs without the agent."""
        return self.directory / "boot.cpio"

    @property
    def size(self) -> int:
        """Bytes that it takes on the host's disk."""
        return sum(size for _name, size, _digest in self.files)

    @classmethod
    def load(cls, id_: str) -> Image:
        """Return the image `id_` after a look at its files' sizes.

        Raises ImageError when it is missing or damaged.
        """
        directory = paths.images() / id_
        again = "run `pbotvm-qemu create --force` to build it again"
        try:
            manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
            files = tuple((str(n), int(s), str(h)) for n, s, h in manifest["files"])
            build_s = None if manifest.get("build_s") is None else float(manifest["build_s"])
            image = cls(
                id_, directory, tuple(map(str, manifest["languages"])), int(manifest["root_size"]), files, build_s
            )
        except FileNotFoundError:
            raise ImageError(f"there is no image {id_}", hint=again) from None
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ImageError(f"image {id_} has a damaged manifest: {exc}", hint=again) from exc
        for name, size, _digest in image.files:
            try:
                found = (directory / name).stat().st_size
            except OSError:
                raise ImageError(f"image {id_} lacks its file {directory / name}", hint=again) from None
            if found != size:
                raise ImageError(f"{directory / name} is damaged: {found} bytes instead of {size}", hint=again)
        if {name for name, _, _ in image.files} != set(_FILES):
            raise ImageError(f"image {id_} has a damaged manifest: wrong files", hint=again)
        return image

    def verify(self) -> None:
        """Compare every byte with the manifest. Raises ImageError for the first file that differs."""
        for name, _size, digest in self.files:
            if _sha256(self.directory / name) != digest:
                raise ImageError(
                    f"{self.directory / name} is damaged: wrong sha256",
                    hint="run `pbotvm-qemu create --force` to build it again",
                )


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of."""

    directory: Path
    suite: str
    variant: str
    keyring: str
    kernel: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    exclude: tuple[str, ...]
    folders: tuple[str, ...]
    languages: tuple[str, ...]

    @classmethod
    def load(cls, languages: Iterable[Language], name: str = "debian-trixie") -> Recipe:
        """Return the recipe `name` for a guest with `languages`. Raises ImageError when its file is wrong."""
        directory = paths.recipes() / name
        chosen = sorted(languages, key=lambda language: language.name)
        try:
            table = tomllib.loads((directory / "recipe.toml").read_text("utf-8"))
            packages = {*table["packages"], *(package for item in chosen for package in item.packages_for(name))}
            return cls(
                directory=directory,
                suite=table["suite"],
                variant=table["variant"],
                keyring=table["keyring"],
                kernel=table["kernel"],
                modules=tuple(table["modules"]),
                packages=tuple(sorted(packages)),
                exclude=tuple(table["exclude"]),
                folders=tuple(table["folders"]),
                languages=tuple(language.name for language in chosen),
            )
        except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as exc:
            raise ImageError(f"recipe {directory}: {exc}", hint="install pbotvm-qemu again") from exc

    @property
    def id(self) -> str:
        """A hash of everything that decides what is in the image."""
        digest = hashlib.sha256()
        parts = (
            str(_FORMAT),
            self.suite,
            self.variant,
            self.kernel,
            *self.modules,
            "/",
            *self.packages,
            "/",
            *self.exclude,
            "/",
            *self.folders,
        )
        digest.update("\0".join(parts).encode())
        for file in (self.directory / "customize", paths.recipes() / "initramfs" / "init"):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


async def ensure(recipe: Recipe, progress: Progress, *, rebuild: bool = False) -> Image:
    """Return the image of `recipe`, building it when it is missing or damaged.

    Raises ImageError or HostError when it cannot be built; what was half built is gone then, also when cancelled.
    """
    paths.private(paths.cache_dir(), mode=0o755)
    paths.private(paths.images(), mode=0o755)
    with _alone(paths.images() / f"{recipe.id}.lock"):
        if not rebuild:
            with contextlib.suppress(ImageError):
                return Image.load(recipe.id)
        return await _build(recipe, progress)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold `lock` while the body runs. Raises ImageError when another process has it."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ImageError(
                "another process builds this image just now", hint="wait for it, then run the same command again"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


async def _build(recipe: Recipe, progress: Progress) -> Image:
    begin = time.monotonic()
    free = shutil.disk_usage(paths.images()).free
    need = FREE_MIN + max(0, len(recipe.languages) - _LANGUAGES_FREE) * _LANGUAGE_ROOM
    if free < need:
        raise HostError(
            f"{paths.images()} has {config.format_size(free)} of free space, an image needs {config.format_size(need)}",
            hint="free some space, or set XDG_CACHE_HOME to a larger disk",
        )
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=paths.images()))
    try:
        work.chmod(0o755)
        archive = await _bootstrap(recipe, work, progress)
        progress("writing the initramfs", 0.72)
        await asyncio.to_thread(_extract_boot, archive, recipe, work)
        root_size = await _make_root(archive, work, progress)
        progress("checking", 0.97)
        files = [(name, (work / name).stat().st_size, await asyncio.to_thread(_sha256, work / name)) for name in _FILES]
        for name in _FILES:
            (work / name).chmod(0o444)
        manifest = {
            "format": _FORMAT,
            "suite": recipe.suite,
            "languages": recipe.languages,
            "packages": recipe.packages,
            "root_size": root_size,
            "built": int(time.time()),
            "build_s": round(time.monotonic() - begin, 1),
            "files": files,
        }
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        target = paths.images() / recipe.id
        if target.exists():  # damaged, or to be rebuilt; machines that use it keep the open file
            shutil.rmtree(target)
        work.rename(target)
    except OSError as exc:
        raise ImageError(f"cannot build the image: {exc.strerror}: {exc.filename}", hint="check free space") from exc
    finally:
        if work.exists():
            shutil.rmtree(work, ignore_errors=True)
    return Image.load(recipe.id)


async def _bootstrap(recipe: Recipe, work: Path, progress: Progress) -> Path:
    """Run mmdebstrap; return the archive of the new root."""
    archive = work / "root.tar"
    argv = [
        process.find_program("mmdebstrap", package="mmdebstrap"),
        f"--variant={recipe.variant}",
        f"--include={','.join(recipe.packages)}",
        "--format=tar",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.exclude),
        '--aptopt=APT::Install-Recommends "false"',
        *(f'--essential-hook=mkdir -p "$1"{shlex.quote(folder)}' for folder in recipe.folders),
        f"--customize-hook={recipe.directory / 'customize'}",
    ]
    keyring = Path("/usr/share/keyrings") / recipe.keyring
    if keyring.is_file():
        argv.append(f"--keyring={keyring}")
    argv += [recipe.suite, str(archive)]
    if mirror := await _debian_mirror():
        argv.append(mirror)

    def follow(line: str) -> None:
        for said, stage, done in _STAGES:
            if said in line:
                progress(stage, done)

    progress("starting mmdebstrap", 0.0)
    temporary = work / "tmp"
    temporary.mkdir(mode=0o1777)
    temporary.chmod(0o1777)
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "PBOTVM_KERNEL": recipe.kernel,
        "PBOTVM_MODULES": " ".join(recipe.modules),
        "LC_ALL": "C.UTF-8",
    }
    try:
        result = await process.run(argv, timeout=_BUILD_TIMEOUT, env=environment, on_line=follow)
        result.check()
    except CommandError as exc:
        log = paths.images() / "build.log"
        log.write_bytes(exc.stderr or str(exc).encode())
        raise ImageError(f"cannot build the image: {exc}", hint=f"the whole log is in {log}") from exc
    return archive


async def _debian_mirror() -> str | None:
    """Return the Debian mirror of this host's own apt sources, or None: mmdebstrap then uses its default."""
    apt = shutil.which("apt-get")
    if not apt:
        return None
    listing = await process.run(
        [apt, "indextargets", "--format", "$(ORIGIN)\t$(LABEL)\t$(SITE)\t$(REPO_URI)", "Identifier: Packages"]
    )
    for line in listing.stdout.decode("utf-8", "replace").splitlines():
        origin, label, _site, uri = (line.split("\t") + [""] * 4)[:4]
        if origin == "Debian" and label == "Debian" and uri.startswith(("http://", "https://")):
            return uri
    return None


def _extract_boot(archive: Path, recipe: Recipe, work: Path) -> None:
    """Take kernel, modules and busybox out of the archive, and make the initramfs without the agent."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith("./.boot/") and member.isfile():
                file = tar.extractfile(member)
                assert file
                found[member.name.removeprefix("./.boot/")] = file.read()
    (work / "vmlinuz").write_bytes(found["vmlinuz"])
    order = []
    files = [
        ("bin/busybox", 0o755, found["busybox"]),
        ("init", 0o755, (paths.recipes() / "initramfs/init").read_bytes()),
    ]
    for module in recipe.modules:
        name, data = next((name, data) for name, data in found.items() if name.startswith(f"modules/{module}.ko"))
        files.append((f"modules/{module}.ko", 0o644, lzma.decompress(data) if name.endswith(".xz") else data))
        order.append(f"{module}.ko\n")
    files.append(("modules/order", 0o644, "".join(order).encode()))
    (work / "boot.cpio").write_bytes(cpio(files))


async def _make_root(archive: Path, work: Path, progress: Progress) -> int:
    """Make root.qcow2 from the archive; return the size of its virtual disk in bytes."""
    progress("unpacking", 0.75)
    tree = work / "tree"
    tree.mkdir(mode=0o755)
    state = work / "fakeroot"
    tar = [shutil.which("tar") or "tar", "-x", "--numeric-owner", "-p", "-f", str(archive), "-C", str(tree)]
    tar += ["--exclude=./.boot", "--exclude=./dev/*"]
    (await process.run(_as_root(tar, state), timeout=_STEP_TIMEOUT)).check()
    archive.unlink()
    progress("making the file system", 0.82)
    used = await asyncio.to_thread(_tree_size, tree)
    size = (used * 5 // 4 + (192 << 20)) >> 20 << 20
    raw = work / "root.raw"
    mke2fs = [
        process.find_program("mke2fs", package="e2fsprogs"),
        "-q", "-F", "-t", "ext4", "-L", "pbotvm", "-m", "0", "-b", "4096", "-i", "16384",
        # No journal: a machine is thrown away, never recovered. 64bit and resize_inode let a larger disk be filled.
        "-O", "^has_journal,64bit,resize_inode,^metadata_csum" + (",^orphan_file" if _knows_orphan_file() else ""),
        "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
        "-d", str(tree), str(raw), f"{size >> 10}k",
    ]  # fmt: skip
    (await process.run(_as_root(mke2fs, state), timeout=_STEP_TIMEOUT)).check()
    progress("writing the qcow2 file", 0.92)
    qemu_img = process.find_program("qemu-img", package="qemu-utils")
    convert = [qemu_img, "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(work / "root.qcow2")]
    (await process.run(convert, timeout=_STEP_TIMEOUT)).check()
    raw.unlink()
    await asyncio.to_thread(shutil.rmtree, tree, ignore_errors=True)
    shutil.rmtree(work / "tmp", ignore_errors=True)
    state.unlink(missing_ok=True)
    return size


def _knows_orphan_file() -> bool:
    """Tell whether mke2fs may turn the feature on by default (e2fsprogs 1.47); older ones refuse its name."""
    try:
        return "orphan_file" in Path("/etc/mke2fs.conf").read_text("utf-8")
    except OSError:
        return False


def _as_root(argv: Sequence[str], state: Path) -> list[str]:
    """Return `argv` for a process that sees itself, and the files it made, as root's."""
    if os.geteuid() == 0:
        return list(argv)
    fakeroot = process.find_program("fakeroot", package="fakeroot")
    known = ["-i", str(state)] if state.exists() else []
    return [fakeroot, *known, "-s", str(state), "--", *argv]


def _tree_size(tree: Path) -> int:
    """Return the bytes that the files below `tree` take in blocks of 4 KiB."""
    total = 0
    for directory, folders, files in os.walk(tree):
        total += 4096 * (1 + len(folders))
        for name in files:
            found = Path(directory, name).lstat()
            total += (found.st_size + 4095) // 4096 * 4096 if stat.S_ISREG(found.st_mode) else 0
    return total


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return an archive in the kernel's initramfs format ("newc") of (path, mode, content), folders included.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
    """
    out = bytearray()

    def add(name: str, mode: int, data: bytes) -> None:
        encoded = name.encode() + b"\0"
        numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out.extend(b"070701" + b"".join(b"%08X" % value for value in numbers) + encoded)
        out.extend(bytes(-len(out) % 4))
        out.extend(data)
        out.extend(bytes(-len(out) % 4))

    made: set[str] = set()
    number = 1
    for path, mode, data in files:
        for parent in reversed(Path(path).parents):
            if str(parent) not in (".", *made):
                made.add(str(parent))
                add(str(parent), stat.S_IFDIR | 0o755, b"")
                number += 1
        add(path, stat.S_IFREG | mode, data)
        number += 1
    add("TRAILER!!!", 0, b"")
    out.extend(bytes(-len(out) % 512))
    return bytes(out)


def write_initramfs(image: Image, target: Path) -> str:
    """Write the initramfs of `image` with today's agent to `target`; return its sha256.

    The kernel unpacks archives that stand one after another, so the agent is simply appended.
    """
    scripts = ("start", "network")
    agent = [(f"agent/{name}", 0o755, (paths.recipes() / "initramfs" / name).read_bytes()) for name in scripts]
    package = paths.guest_package()
    sources = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".h", ".ts"))
    agent += [(f"agent/guest/{path.relative_to(package)}", 0o644, path.read_bytes()) for path in sources]
    data = image.boot.read_bytes() + cpio(agent)
    temporary = target.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(target)
    return hashlib.sha256(data).hexdigest()


async def create_overlay(image: Image, target: Path, size: int) -> None:
    """Make the disk of a machine: a sparse qcow2 file of `size` bytes over the image.

    Raises ImageError when `size` is less than the image needs.
    """
    if size < image.root_size:
        need = config.format_size(-(-image.root_size // (1 << 20)) << 20)
        raise ImageError(
            f"a disk of {config.format_size(size)} is too small for this image", hint=f"use --disk-size {need} or more"
        )
    qemu_img = process.find_program("qemu-img", package="qemu-utils")
    argv = [qemu_img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image.root), str(target), str(size)]
    (await process.run(argv)).check(hint="check free space")


async def overlay_snapshots(disk: Path) -> list[dict[str, object]]:
    """Return the snapshots in the qcow2 file of a machine that does not run. Raises ImageError when it is damaged."""
    qemu_img = process.find_program("qemu-img", package="qemu-utils")
    result = await process.run([qemu_img, "info", "-U", "--output=json", str(disk)])
    try:
        return list(json.loads(result.check().stdout).get("snapshots", []))
    except (CommandError, ValueError) as exc:
        raise ImageError(f"{disk} is damaged: {exc}", hint="run `pbotvm-qemu create --force`") from exc


async def delete_overlay_snapshot(disk: Path, tag: str) -> None:
    """Delete snapshot `tag` from the disk of a machine that does not run."""
    qemu_img = process.find_program("qemu-img", package="qemu-utils")
    (await process.run([qemu_img, "snapshot", "-d", tag, str(disk)])).check()


async def repair_overlay(disk: Path) -> None:
    """Give back the clusters that a killed QEMU had taken and not yet recorded."""
    qemu_img = process.find_program("qemu-img", package="qemu-utils")
    result = await process.run([qemu_img, "check", "-q", "-r", "leaks", str(disk)])
    if result.status not in (0, 3):  # 3: leaks that it has just mended
        raise ImageError(f"{disk} is damaged: {result.stderr.decode(errors='replace').strip()[:200]}",
                         hint="run `pbotvm-qemu create --force`")  # fmt: skip


def built() -> set[str]:
    """Return the ids of all images in the cache."""
    return {manifest.parent.name for manifest in paths.images().glob("[0-9a-f]*/manifest.json")}


def unfinished_builds() -> list[Path]:
    """Return the folders that a build left behind when it was killed."""
    building = any(_held(lock) for lock in paths.images().glob("*.lock"))
    return [] if building else list(paths.images().glob(".building-*"))


def _held(lock: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
