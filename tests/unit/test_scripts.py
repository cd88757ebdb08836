"""The shell scripts: they parse, and say and do the right thing on hosts of every kind (all programs are stubs)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
TYPED = sorted(path for path in (ROOT / "scripts").iterdir() if path.name != "lib.sh")
SCRIPTS = [*TYPED, ROOT / ".ci/run"]
SHELL = shutil.which("dash") or "/bin/sh"

# Ordinary tools of every host: the real ones. Everything else in a test is a stub.
TOOLS = ["cat", "chmod", "cksum", "cp", "date", "dirname", "env", "mkdir", "mv", "rm", "sed", "tr", "true"]
HOST = [
    "qemu-system-x86_64",
    "qemu-img",
    "mmdebstrap",
    "mke2fs",
    "tar",
    "dpkg",
    "mount",
    "setpriv",
    "fakeroot",
    "newuidmap",
]

# Answers the questions of the scripts like a Python 3.{minor}, and makes an environment with a copy of itself.
PYTHON = """#!{shell}
echo "{name} $*" >>"$CALLS"
case $* in
-) [ {minor} -ge 11 ] && echo "3{minor} $0" ;;
-m\\ venv*) mkdir .venv/bin && cp "$0" .venv/bin/python ;;
-c*) echo 3.{minor} ;;
esac
"""


class Host:
    """A checkout and a PATH of stubs; `calls` lists what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.checkout = folder / "checkout"
        self.log = folder / "calls"
        self.keyring = folder / "keyring.gpg"
        self.bin.mkdir()
        self.log.touch()
        (self.checkout / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        for script in (ROOT / "scripts").iterdir():
            shutil.copy(script, self.checkout / "scripts")
        # Nothing of the host that runs the tests is to be found.
        lib = self.checkout / "scripts/lib.sh"
        text = lib.read_text()
        for old, new in (
            (r"^admin_path=.*", f"admin_path={folder}/sbin"),
            (r"^debian_keyring=.*", f"debian_keyring={self.keyring}"),
            (r" /usr/bin/python3 ", " "),
        ):
            text, found = re.subn(old, new, text, flags=re.MULTILINE)
            assert found == 1, old
        lib.write_text(text)
        for tool in TOOLS:
            found_tool = shutil.which(tool)
            assert found_tool, tool
            (self.bin / tool).symlink_to(found_tool)
        self.user(0)

    def stub(self, name: str, body: str = "", *, folder: Path | None = None) -> None:
        """Add a program that records its call and then does `body`."""
        path = (folder or self.bin) / name
        path.unlink(missing_ok=True)
        path.write_text(f'#!{SHELL}\necho "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)

    def user(self, number: int) -> None:
        self.stub("id", f"echo {number}")

    def python(self, name: str, minor: int) -> None:
        path = self.bin / name
        path.write_text(PYTHON.format(shell=SHELL, name=name, minor=minor))
        path.chmod(0o755)

    def complete(self) -> None:
        """Install everything that the program needs."""
        for name in HOST:
            self.stub(name)
        self.keyring.touch()
        self.python("python3", 11)

    def calls(self, name: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.split()[0] == name]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Little is set, as under cron: HOME is not.
        environment = {"PATH": str(self.bin), "CALLS": str(self.log)} | environment
        return subprocess.run(
            [SHELL, f"scripts/{script}", *arguments],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


def pip_calls(host: Host) -> list[str]:
    return [call for call in host.calls("python3") if "pip install" in call]


def made(host: Host) -> int:
    return sum("-m venv" in call for call in host.calls("python3"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "scripts/lib.sh"], ids=lambda path: path.name)
def test_parses(path: Path) -> None:
    subprocess.run([SHELL, "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_can_be_typed(path: Path) -> None:
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/sh"
    assert "set -eu" in lines


def test_nothing_is_installed_when_nothing_is_missing(host: Host) -> None:
    host.complete()
    host.stub("apt-get", "exit 1")
    done = host.run("setup")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not host.calls("apt-get")


def test_a_second_run_starts_no_pip_and_looks_for_no_python(host: Host) -> None:
    host.complete()
    assert host.run("setup").returncode == 0
    assert (made(host), len(pip_calls(host))) == (1, 1)
    before = host.calls("python3")
    assert host.run("setup").returncode == 0
    new = host.calls("python3")[len(before) :]
    assert not [call for call in new if "-m" in call or call.endswith(" -")]


def test_more_extras_or_a_changed_project_file_are_installed_into_the_same_venv(host: Host) -> None:
    host.complete()
    host.stub("ip")
    host.stub("nft")
    host.stub("dnsmasq")
    host.stub("iperf3")
    host.stub("cpio")
    host.stub("gcc")
    host.stub("g++")
    host.stub("gdb")
    host.stub("nc")
    host.stub("systemd-analyze")
    assert host.run("setup").returncode == 0
    assert host.run("setup", "--dev").returncode == 0
    assert [call.split()[-1] for call in pip_calls(host)] == [".", ".[dev]"]
    with (host.checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert host.run("setup").returncode == 0
    assert [call.split()[-1] for call in pip_calls(host)] == [".", ".[dev]", ".[dev]"], "dev is not taken away again"
    assert made(host) == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda venv: (venv / "bin/python").unlink(),
        lambda venv: (venv / "pbotvm-setup").write_text(""),
        lambda venv: shutil.rmtree(venv / "bin"),
    ],
    ids=["its Python vanished", "interrupted", "half deleted"],
)
def test_a_broken_venv_is_made_anew(host: Host, harm: Callable[[Path], object]) -> None:
    host.complete()
    assert host.run("setup").returncode == 0
    harm(host.checkout / ".venv")
    done = host.run("setup")
    assert done.returncode == 0, done.stderr
    assert "making .venv" in done.stderr
    assert made(host) == 2


def test_a_moved_checkout_gets_a_new_venv(host: Host) -> None:
    host.complete()
    assert host.run("setup").returncode == 0
    host.checkout = host.checkout.rename(host.checkout.with_name("moved"))
    assert host.run("setup").returncode == 0
    assert made(host) == 2


def test_a_venv_made_by_hand_is_completed_not_thrown_away(host: Host) -> None:
    host.complete()
    assert host.run("setup").returncode == 0
    (host.checkout / ".venv/pbotvm-setup").unlink()
    assert host.run("setup").returncode == 0
    assert (made(host), len(pip_calls(host))) == (1, 2)


def test_pip_that_fails_is_explained_and_tried_again(host: Host) -> None:
    host.complete()
    python = host.bin / "python3"
    python.write_text(python.read_text() + "case $* in *pip*) [ -e online ] ;; esac\n")
    done = host.run("setup")
    assert done.returncode == 1
    assert "pip failed" in done.stderr
    (host.checkout / "online").touch()
    assert host.run("setup").returncode == 0


def test_missing_packages_are_named_and_installed_by_root(host: Host) -> None:
    host.complete()
    for name in ("qemu-img", "mke2fs"):
        (host.bin / name).unlink()
    install = "case $* in *install*) for name in qemu-img mke2fs; do : >$HERE/$name; chmod +x $HERE/$name; done ;; esac"
    host.stub("apt-get", install)
    done = host.run("setup", HERE=str(host.bin))
    assert done.returncode == 0, done.stderr
    assert "installing these packages, and what they depend on: qemu-utils e2fsprogs\n" in done.stderr
    update, installation = host.calls("apt-get")
    assert update.endswith(" update")
    assert installation.endswith(" install -y --no-install-recommends qemu-utils e2fsprogs")
    assert done.stdout == ""


def test_an_ordinary_user_installs_through_sudo(host: Host) -> None:
    host.complete()
    host.user(1000)
    (host.bin / "fakeroot").unlink()
    host.stub("sudo", '"$@"')
    host.stub("apt-get", f"case $* in *install*) : >{host.bin}/fakeroot; chmod +x {host.bin}/fakeroot ;; esac")
    done = host.run("setup")
    assert done.returncode == 0, done.stderr
    assert sum("DEBIAN_FRONTEND=noninteractive apt-get" in call for call in host.calls("sudo")) == 2
    assert host.calls("apt-get")[1].endswith(" fakeroot")


def test_root_needs_neither_fakeroot_nor_uidmap(host: Host) -> None:
    host.complete()
    (host.bin / "fakeroot").unlink()
    (host.bin / "newuidmap").unlink()
    assert host.run("setup").returncode == 0


def test_programs_outside_the_path_of_a_user_are_found(host: Host, tmp_path: Path) -> None:
    host.complete()
    (tmp_path / "sbin").mkdir()
    (host.bin / "mke2fs").rename(tmp_path / "sbin/mke2fs")
    assert host.run("setup").returncode == 0


def test_without_sudo_the_line_for_root_is_printed(host: Host) -> None:
    host.user(1000)
    host.stub("apt-get")
    host.stub("apt-cache", "echo '  Candidate: 3.11.2-1+b1'")
    done = host.run("setup")
    assert done.returncode == 1
    packages = "python3 python3-venv qemu-system-x86 qemu-utils mmdebstrap e2fsprogs tar dpkg mount util-linux"
    packages += " debian-archive-keyring fakeroot uidmap"
    assert f"    apt-get install -y --no-install-recommends {packages}\n" in done.stderr
    assert not host.calls("apt-get")


def test_sudo_that_refuses_ends_with_the_line_for_root(host: Host) -> None:
    host.complete()
    host.user(1000)
    (host.bin / "qemu-img").unlink()
    host.stub("apt-get")
    host.stub("sudo", "exit 1")
    done = host.run("setup")
    assert done.returncode == 1
    assert "    apt-get install -y --no-install-recommends qemu-utils\n" in done.stderr
    assert len(host.calls("sudo")) == 1, "asked for the password once, not twice"


def test_apt_that_fails_ends_the_set_up(host: Host) -> None:
    host.complete()
    (host.bin / "qemu-img").unlink()
    host.stub("apt-get", "exit 100")
    done = host.run("setup")
    assert done.returncode == 1
    assert "apt-get could not install them" in done.stderr
    assert not made(host)


def test_without_apt_the_missing_programs_are_listed(host: Host) -> None:
    host.complete()
    (host.bin / "mmdebstrap").unlink()
    (host.bin / "python3").unlink()
    done = host.run("setup")
    assert done.returncode == 1
    assert "mmdebstrap" in done.stderr
    for line in (
        "dnf install python3 mmdebstrap",
        "pacman -S python mmdebstrap",
        "zypper install python313 mmdebstrap",
    ):
        assert line in done.stderr
    assert "no apt-get" in done.stderr


def test_an_old_python_is_joined_by_a_newer_one_when_apt_has_it(host: Host) -> None:
    host.complete()
    host.python("python3", 10)
    shutil.copy(host.bin / "python3", host.bin / "new")
    known = "python3) v=3.10.6-1~22.04.1 ;; python3.11) v=3.11.0-1 ;; *) v='(none)' ;;"
    host.stub("apt-cache", f'case $2 in {known} esac; echo "Candidate: $v"')
    new = host.bin / "python3.11"
    host.stub("apt-get", f"case $* in *install*) sed 's/10/11/' {host.bin}/new >{new}; chmod +x {new} ;; esac")
    done = host.run("setup")
    assert done.returncode == 0, done.stderr
    assert host.calls("apt-get")[1].endswith(" python3.11 python3.11-venv")


def test_no_python_anywhere_is_said(host: Host) -> None:
    host.complete()
    host.python("python3", 9)
    host.stub("apt-get")
    host.stub("apt-cache", "case $2 in python3) v=3.9.2-3 ;; *) v='(none)' ;; esac; echo \"Candidate: $v\"")
    done = host.run("setup")
    assert done.returncode == 1
    assert "no Python 3.11 or newer" in done.stderr
    assert "PYTHON=" in done.stderr


def test_the_newest_python_is_taken_unless_one_is_named(host: Host) -> None:
    host.complete()
    host.python("python3.13", 13)
    host.python("python3.10", 10)
    done = host.run("setup")
    assert f"making .venv with {host.bin}/python3.13\n" in done.stderr
    shutil.rmtree(host.checkout / ".venv")
    done = host.run("setup", PYTHON="python3")
    assert f"making .venv with {host.bin}/python3\n" in done.stderr
    shutil.rmtree(host.checkout / ".venv")
    done = host.run("setup", PYTHON="python3.10")
    assert done.returncode == 1
    assert "PYTHON=python3.10 is not" in done.stderr


def test_unit_asks_for_nothing_but_python(host: Host) -> None:
    host.python("python3", 12)
    done = host.run("unit", "-k", "wire")
    assert done.returncode == 0, done.stderr
    assert host.calls("python3")[-1].endswith("-m pytest tests/unit -k wire")


def test_unit_takes_files(host: Host) -> None:
    host.python("python3", 12)
    (host.checkout / "tests/unit").mkdir(parents=True)
    (host.checkout / "tests/unit/test_a.py").touch()
    host.run("unit", "tests/unit/test_a.py::test_it", "-x")
    assert host.calls("python3")[-1].endswith("-m pytest tests/unit/test_a.py::test_it -x")


def program(host: Host, body: str) -> None:
    """Set the host up, and put a stub in the place of the program itself."""
    host.complete()
    assert host.run("setup").returncode == 0
    host.stub("pbotvm-qemu", body, folder=host.checkout / ".venv/bin")


def test_demo_ends_with_what_the_machine_said(host: Host) -> None:
    program(host, "case $1 in create) echo created ;; exec) echo hello world ;; esac")
    done = host.run("demo", PBOTVM_DOMAIN="mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello world\n"
    assert host.calls("pbotvm-qemu") == [
        "pbotvm-qemu create --if-missing mine",
        "pbotvm-qemu exec --vm mine -lang=sh echo hello world",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[ $1 != create ]", "could not be created"),
        ("[ $1 != exec ]", "did not run"),
        ("echo rubbish", "something else: rubbish"),
    ],
)
def test_demo_fails_loudly(host: Host, body: str, message: str) -> None:
    program(host, body)
    done = host.run("demo")
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr


def test_bench_passes_arguments_and_status_on(host: Host) -> None:
    program(host, "exit 3")
    assert host.run("bench", "--json").returncode == 3
    assert host.calls("pbotvm-qemu") == ["pbotvm-qemu bench --json"]


@pytest.mark.parametrize("script", ["setup", "demo"])
def test_wrong_usage(host: Host, script: str) -> None:
    done = host.run(script, "--nonsense")
    assert done.returncode == 2
    assert "Usage:" in done.stderr
