"""The command line of QEMU is a pure function of a plan."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from pbotvm_qemu import plan as plans
from pbotvm_qemu.config import MachineConfig
from pbotvm_qemu.errors import PbotVMError
from pbotvm_qemu.image import Image
from pbotvm_qemu.plan import Boot, Console, Descriptors, Memory, Plan

PLAN = Plan(
    config=MachineConfig(name="m", serial=0, health=0), uuid="u-u", qemu="/usr/bin/qemu", accelerator="tcg",
    boot=Boot(Path("/i/vmlinuz"), Path("/m/initramfs.cpio")), disk=Path("/m/disk.qcow2"),
    console=Console(Path("/r/console.sock"), Path("/m/console.log")), vsock=False,
)  # fmt: skip


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv[:-1]) if word == option]


def qemu(plan: Plan, descriptors: Descriptors | None = None) -> list[str]:
    argv = plans.command(plan, descriptors or Descriptors())
    return argv[argv.index("--") + 1 :]


def test_qemu_is_confined() -> None:
    argv = qemu(PLAN)
    assert argv[0] == "/usr/bin/qemu"
    assert values(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert values(argv, "-nic") == ["none"]
    assert values(argv, "-display") == ["none"]
    assert {"-nodefaults", "-no-user-config", "-no-reboot", "-only-migratable"} <= set(argv)


def test_rights_are_given_up_before_qemu_starts() -> None:
    front = plans.command(PLAN, Descriptors())
    front = front[: front.index("--")]
    assert Path(front[0]).name == "setpriv"
    assert "--no-new-privs" in front
    assert values(front, "--pdeathsig") == ["KILL"]


def test_root_becomes_an_ordinary_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    front = plans.command(PLAN, Descriptors())
    uid = int(values(front, "--reuid")[0])
    assert uid > 0
    assert {"--clear-groups", "--inh-caps=-all", "--bounding-set=-all"} <= set(front)


def test_accelerator_is_the_one_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert values(qemu(replace(PLAN, accelerator="kvm")), "-accel") == ["kvm"]
    assert values(qemu(PLAN), "-accel")[0].startswith("tcg")
    with pytest.raises(PbotVMError):
        qemu(replace(PLAN, accelerator="hvf"))


def test_snapshot_is_loaded_only_when_there_is_one() -> None:
    assert "-loadvm" not in qemu(PLAN)
    assert values(qemu(replace(PLAN, loadvm="1")), "-loadvm") == ["1"]


def test_port_0_is_no_port() -> None:
    chardevs = values(qemu(PLAN), "-chardev")
    assert "null,id=serial" in chardevs
    assert "null,id=health" in chardevs
    assert not [item for item in chardevs if "port=" in item]


def test_ports_are_of_this_host_alone() -> None:
    plan = replace(PLAN, config=replace(PLAN.config, serial=5555, health=5556))
    ports = [item for item in values(qemu(plan), "-chardev") if "port=" in item]
    assert len(ports) == 2
    assert all("host=127.0.0.1" in item for item in ports)


def test_comma_in_a_path_is_written_twice() -> None:
    plan = replace(PLAN, disk=Path("/a,b/disk"), console=Console(Path("/c,d"), Path("/e,f")))
    argv = " ".join(qemu(plan))
    assert "filename=/a,,b/disk," in argv
    assert "path=/c,,d," in argv
    assert "logfile=/e,,f," in argv


def test_vsock_comes_with_its_descriptor() -> None:
    argv = qemu(replace(PLAN, vsock=True), Descriptors(vsock=9))
    assert "vhost-vsock-pci,id=vsock0,guest-cid=7,vhostfd=9" in values(argv, "-device")
    assert "vsock" not in " ".join(qemu(PLAN))


def test_descriptors_are_those_that_are_inherited() -> None:
    chardevs = values(qemu(PLAN, Descriptors(monitor=31, agent=32)), "-chardev")
    assert "socket,id=monitor,fd=31" in chardevs
    assert "socket,id=agent,fd=32" in chardevs


def test_printed_command_is_the_one_that_is_started() -> None:
    plan = replace(PLAN, vsock=True, disk=Path("/a b/d'isk"))
    text = plans.command_text(plan)
    assert shlex.split(text.replace("\\\n", " ")) == plans.command(plan, Descriptors(vsock=7))


def test_clone_has_the_hardware_of_what_was_frozen_and_no_file_of_its_own() -> None:
    plan = replace(PLAN, config=replace(PLAN.config, serial=5555, health=5556))
    argv = qemu(plan.restored(Memory(Path("/t,1/ram"))), Descriptors(overlay=11, console=12, serial=13))
    assert values(argv, "-device") == values(qemu(plan), "-device")
    assert values(argv, "-add-fd") == ["fd=11,set=1", "fd=12,set=2"]
    assert "filename=/dev/fdset/1," in " ".join(values(argv, "-blockdev"))
    assert "memory-backend-file,id=ram0,size=512M,mem-path=/t,,1/ram,share=off" in values(argv, "-object")
    assert not [item for item in values(argv, "-chardev") if "port=" in item or "path=/r" in item]
    assert "socket,id=serial,fd=13" in values(argv, "-chardev")
    assert values(argv, "-incoming") == ["defer"]
    assert "-S" in argv
    assert "-kernel" not in argv


def test_memory_is_read_only_where_qemu_can_map_it_so() -> None:
    assert Memory(Path("/r"), protected=True).argument("1M").endswith("share=off,readonly=on,rom=off")
    assert Memory(Path("/r"), shared=True, protected=True).argument("1M").endswith("share=on")
    assert Memory().argument("1M") == "memory-backend-ram,id=ram0,size=1M"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "qemu"
    file.write_text("x")
    return file


IMAGE = Image(
    "i", Path("/i"), ("sh",), 1, (("root.qcow2", 1, "r"), ("vmlinuz", 1, "k"), ("boot.cpio", 1, "b"))
)  # fmt: skip


def fingerprint(
    program: Path, config: MachineConfig = PLAN.config, image: Image = IMAGE, **changes: str
) -> dict[str, str]:
    accelerator = changes.get("accelerator", "tcg")
    return plans.fingerprint(config, image, str(program), accelerator, changes.get("initramfs", "s"), vsock=False)


def test_fingerprint_is_the_same_for_the_same_and_ignores_ports(program: Path) -> None:
    other = replace(PLAN.config, serial=1, health=2)
    assert fingerprint(program) == fingerprint(program, other)


def differing(one: dict[str, str], two: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


def test_fingerprint_notices_what_a_snapshot_depends_on(program: Path) -> None:
    was = fingerprint(program)
    more = replace(PLAN.config, memory=1 << 30)
    assert differing(was, fingerprint(program, more)) == {"memory", "devices"}
    more = replace(PLAN.config, cpus=2)
    assert differing(was, fingerprint(program, more)) == {"processors", "devices"}
    assert differing(was, fingerprint(program, accelerator="kvm")) == {"accelerator", "CPU model", "devices"}
    assert differing(was, fingerprint(program, initramfs="t")) == {"initramfs"}
    for name, said in (("vmlinuz", "kernel"), ("root.qcow2", "root image")):
        files = tuple((n, s, "other" if n == name else h) for n, s, h in IMAGE.files)
        assert differing(was, fingerprint(program, image=replace(IMAGE, files=files))) == {said}
    program.write_text("another")
    assert differing(was, fingerprint(program)) == {"QEMU program"}
    assert plans.fingerprint(PLAN.config, IMAGE, str(program), "tcg", "s", vsock=True)["vsock"] == "yes"


def test_a_network_card_is_part_of_the_fingerprint_and_the_network_is_not(program: Path) -> None:
    was = fingerprint(program)
    nat = fingerprint(program, replace(PLAN.config, net="nat"))
    assert differing(was, nat) == {"devices"}
    assert (
        nat
        == fingerprint(program, replace(PLAN.config, net="isolated"))
        == fingerprint(program, replace(PLAN.config, net="bridge"))
    )
    assert differing(nat, fingerprint(program, replace(PLAN.config, net="user"))) == {"devices"}
    kernel = plans.fingerprint(
        replace(PLAN.config, net="nat"), IMAGE, str(program), "tcg", "s", vsock=False, vhost=True
    )
    assert differing(nat, kernel) == {"devices", "vhost-net"}


def test_the_tap_of_a_card_is_inherited(program: Path) -> None:
    del program
    plan = replace(PLAN, config=replace(PLAN.config, net="nat"))
    descriptors = Descriptors(taps=(9,))
    assert 9 in descriptors.numbers()
    assert "tap,id=net0,fd=9" in plans.command(plan, descriptors)
    assert "tap,id=net0,fd=" in plans.command_text(plan)
