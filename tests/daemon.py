"""The daemon `vhost-device-vsock`: the host's own, or the one of Debian sid, which runs on older suites too."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

from pbotvm_qemu import image
from pbotvm_qemu.vhost_user import PROGRAM

_SUITE = "sid"
_MIRROR = "http://deb.debian.org/debian"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def folder(work: Path) -> Path:
    """Return a folder with the program, fetched into `work` when the host does not have it."""
    if found := shutil.which(PROGRAM):
        return Path(found).parent
    mirror = asyncio.run(image._debian_mirror()) or _MIRROR
    sources = work / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYRING}] {mirror} {_SUITE} main\n")
    for name in ("state/lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    apt = ["apt-get", "-q", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-"]
    apt += [
        "-o",
        f"Dir::State={work / 'state'}",
        "-o",
        "Dir::State::status=/dev/null",
        "-o",
        f"Dir::Cache={work / 'cache'}",
    ]
    apt += ["-o", "APT::Sandbox::User=root"]
    for words in (["update"], ["download", PROGRAM]):
        subprocess.run([*apt, *words], cwd=work, check=True, capture_output=True, timeout=300)
    (package,) = work.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, work / "root"], check=True, timeout=60)
    return work / "root/usr/bin"
