"""Machines that a relay may hand requests to, by name and alias: a table of config.toml, or the predecessor's file.

A request can only choose among these names. Addresses, ports and commands come from here and from nowhere else.

```toml
[aliases]
main = "pbot-vm"
test = "old-vm"

[machines.old-vm]      # a guest of PBot's that somebody else keeps
addr = "127.0.0.1"
serial = 7777
health = 7778          # `heart` instead says that its guest-server is of the seed's era
cid = 0
vport = 5555
revert = ["virsh", "snapshot-revert", "old-vm", "1"]

[machines.second]      # one of ours, kept by another `run` or `start`
```
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FILE_MAX = 1 << 20  # bytes of vm-exec.json
_NUMBERS = {"serial": 65535, "health": 65535, "heart": 65535, "cid": 0xFFFFFFFE, "vport": 0xFFFFFFFF}
_KEYS = {"addr", "vagrant", "revert", *_NUMBERS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a guest is reached. Without `serial` and `cid` it is a machine of ours, found by its name."""

    name: str
    addr: str = "127.0.0.1"
    serial: int = 0  # TCP port, 0 for none
    health: int = 0  # TCP port, 0 for none
    cid: int = 0  # vsock context id, 0 for none
    vport: int = 5555
    seed: bool = False  # heartbeat and `:end:` instead of health check and empty line
    revert: tuple[str, ...] = ()  # a command of the operator's

    @property
    def reachable(self) -> bool:
        """Whether a guest-server can be talked to there."""
        return bool(self.serial or self.cid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """All machines that are listed, and other names for them."""

    machines: Mapping[str, Endpoint] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None  # the predecessor's `default-machine`

    def resolve(self, name: str) -> str:
        """Return the machine's own name for a name or alias, in any case; `name` itself when neither is listed."""
        for table in (self.aliases, {key: key for key in self.machines}):
            for key, value in table.items():
                if key.lower() == name.lower():
                    return value
        return name

    def shown(self, own: str) -> list[str]:
        """Return the names to choose from: the aliases when there are any, as in the predecessor, else all names."""
        return sorted(self.aliases) if self.aliases else sorted({own, *self.machines})


def parse(machines: object, aliases: object, default: object, source: str) -> Endpoints:
    """Return what the tables say. Raises ConfigError that names the first wrong value, and `source`."""
    found: dict[str, Endpoint] = {}
    for name, table in _table(machines, "machines", source).items():
        found[name] = _endpoint(name, _table(table, f"machines.{name}", source), source)
    names: dict[str, str] = {}
    for alias, target in _table(aliases, "aliases", source).items():
        if not isinstance(target, str) or not target:
            raise ConfigError(f"{source}: alias {alias!r} is not a name", hint="write the name of a machine")
        names[alias] = target
    if default is not None and not isinstance(default, str):
        raise ConfigError(f"{source}: default-machine is not a name", hint="write the name of a machine")
    listed = Endpoints(machines=found, aliases=names)
    chosen = listed.resolve(default) if default else None
    return Endpoints(machines=found, aliases=names, default=chosen)


def _endpoint(name: str, table: Mapping[str, object], source: str) -> Endpoint:
    where = f"{source}: machine {name!r}"
    if unknown := sorted(set(table) - _KEYS):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}", hint=f"known keys: {', '.join(sorted(_KEYS))}")
    numbers: dict[str, int] = {}
    for key, high in _NUMBERS.items():
        value = table.get(key, 5555 if key == "vport" else 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
            raise ConfigError(f"{where}: {key} is {value!r}", hint=f"use a whole number from 0 to {high}")
        numbers[key] = value
    if numbers["cid"] in (1, 2):
        raise ConfigError(
            f"{where}: cid {numbers['cid']} is reserved", hint="use 0 for none, or 3 and above (vsock(7))"
        )
    addr = table.get("addr", "127.0.0.1")
    if not isinstance(addr, str) or not addr:
        raise ConfigError(f"{where}: addr is {addr!r}", hint="write an address, such as 127.0.0.1")
    revert = table.get("revert", [])
    if not isinstance(revert, list) or not all(isinstance(word, str) and word for word in revert):
        raise ConfigError(f"{where}: revert is not a list of words", hint='write revert = ["program", "argument"]')
    return Endpoint(
        name=name,
        addr=addr,
        serial=numbers["serial"],
        health=numbers["health"] or numbers["heart"],
        cid=numbers["cid"],
        vport=numbers["vport"],
        seed="heart" in table and "health" not in table,
        revert=tuple(revert),
    )


def _table(value: object, name: str, source: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {name} is not a table", hint="see docs/operations.md")
    return value


def load_vm_exec(file: Path) -> Endpoints | None:
    """Return what the predecessor's `vm-exec.json` says, or None when there is no such file.

    Raises ConfigError when it cannot be read. Keys that nobody knows are an error, as everywhere.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(_FILE_MAX)
        table = json.loads(data)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}", hint="fix or remove the file") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{file}: {str(exc)[:200]}", hint="fix the file; it is JSON") from exc
    if not isinstance(table, dict):
        raise ConfigError(f"{file} does not hold a JSON object", hint="fix or remove the file")
    return parse(table.get("machines"), table.get("aliases"), table.get("default-machine"), str(file))


def merge(base: Endpoints, over: Endpoints) -> Endpoints:
    """Return both, where `over` wins."""
    return Endpoints(
        machines={**base.machines, **over.machines},
        aliases={**base.aliases, **over.aliases},
        default=over.default or base.default,
    )
