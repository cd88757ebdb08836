"""Configuration as frozen data: built-in defaults < config.toml < environment < command line.

The file is TOML with one table per class below and the field names with `-` for `_`:

```toml
[machine]
memory = "512M"
disk-size = "12G"

[limits]
wall = 10

[relay]
port = 9000
```

The environment variables are the predecessor's. Where an old and a new name exist, the new one wins. The predecessor's
own `vm-exec.json` is read as well when it lies beside config.toml, and is the weakest.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pbotvm_qemu import endpoints
from pbotvm_qemu.errors import ConfigError, UsageError
from pbotvm_qemu.network import policy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,12})\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

LOOPBACK = "127.0.0.1"
SNAPSHOT = "1"  # the predecessor's name for the clean snapshot


def parse_size(text: str, what: str = "size") -> int:
    """Return the number of bytes that `text` ("512M", "12G", "4096") means; units are powers of 1024.

    Raises UsageError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{what} {text!r} is not a size", hint="write a number with K, M, G or T, such as 512M")
    return int(match[1]) * _UNITS[match[2].upper()]


def format_size(count: int) -> str:
    """Return `count` bytes as a short text ("512M", "1.5G")."""
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f}{unit}" if value == int(value) else f"{value:.1f}{unit}"
    return f"{count}"


def machine_name(text: str) -> str:
    """Return `text` when it can name a machine (and so a folder and a socket).

    Raises UsageError otherwise.
    """
    if not _NAME.fullmatch(text):
        raise UsageError(
            f"{text!r} cannot name a machine",
            hint="use 1 to 40 letters, digits, dots, dashes and underscores; begin with a letter or digit",
        )
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """The hardware of one machine. Part of its snapshot: a change needs `create --force`."""

    name: str = "pbot-vm"
    memory: int = 512 << 20  # bytes
    cpus: int = 1
    disk_size: int = 12 << 30  # bytes; the file is sparse
    serial: int = 5555  # TCP port of the guest's third serial port
    health: int = 5556  # TCP port of the guest's fourth serial port
    cid: int = 7  # vsock context id, 0 for none; only on hosts with /dev/vhost-vsock
    vport: int = 5555  # vsock port of the guest's agent, 0 for none
    net: str = "none"  # network mode, see policy.MODES


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use. Counted in the guest; the host adds a deadline of its own."""

    wall: float = 10.0  # seconds
    cpu: float = 0.0  # seconds per process; 0 means as much as `wall`
    memory: int = 0  # bytes; 0 means all but what the guest itself needs
    processes: int = 200
    file_size: int = 1 << 30  # bytes per file
    output: int = 64 << 20  # bytes of stdout and stderr together


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """The front door for PBot's `vm-client`."""

    host: str = LOOPBACK
    port: int = 9000
    queue: int = 64  # requests that may wait
    queue_wait: float = 60.0  # seconds that a request may wait
    output: int = 1 << 20  # bytes of output kept for one reply
    editing: bool = True  # keep what channels run, and take `show`, `replace` and the like for edits of it
    language: str = ""  # of requests that name none; empty for the predecessor's: C, the newest that is installed
    token: str = field(default="", repr=False)  # what requests must carry; empty for none
    no_auth: bool = False  # listen beyond loopback without a token
    no_revert: bool = False  # leave machines as they are after a run: for looking into trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class PasteConfig:
    """Where `-paste` puts things: a folder, or a program that reads the text and prints where it is."""

    directory: str = ""
    url: str = ""  # put before the file's name in the answer; empty for the folder
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogConfig:
    """When an idle machine counts as sick. A program that runs is never judged: it has its limits."""

    interval: float = 15.0  # seconds between looks; 0 turns the watchdog off
    silence: float = 10.0  # seconds in which the agent must answer
    cpu: float = 50.0  # percent of one processor that QEMU may use while nothing runs
    samples: int = 5  # looks in a row over that


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The page for Prometheus."""

    host: str = LOOPBACK
    port: int = 0  # 0 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The clean machines that a keeper has."""

    size: int = 2  # kept ready and unused
    most: int = 0  # that live at once; 0 for as many as processors and memory carry
    revert: str = "auto"  # the way back to clean: "auto", "clone", "loadvm" or "restart"
    transport: str = "auto"  # how guests are reached, or one of `transports.NAMES`
    warm: tuple[str, ...] = ()  # languages whose sample each machine runs while it waits
    warm_recent: int = 2  # how many more of those that were used last, for clones under emulation; 0 for none
    share_memory: bool = True  # whether clones share the template's memory until they change it
    sessions: int = 4  # at once
    session_idle: float = 300.0  # seconds without use that end a session


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The networks of machines whose `net` is not "none". No part of a snapshot: it can be changed at any time."""

    subnet4: str = "auto"  # of mode nat: a private network of 32 addresses or more
    subnet6: str = "auto"  # of mode nat, a /64; "none" for guests without IPv6
    bridge: str = "pbot-br0"  # of mode bridge
    addresses: tuple[str, ...] = ()  # of guests in mode bridge: FIRST-LAST/PREFIX
    gateways: tuple[str, ...] = ()  # in mode bridge, one for each IP version
    dns: tuple[str, ...] = ()  # name servers of guests; empty for those of this host
    egress: str = "public"  # or "listed", see policy.Policy
    allow: tuple[str, ...] = ()
    rate: int = 10 << 20  # bytes per second of each guest in each direction, 0 for no limit
    connections: int = 128  # of each guest at once, 0 for no limit
    peers: bool = False  # whether guests in mode isolated reach each other
    dhcp: bool = False  # whether guests in mode nat can ask for their address (dnsmasq)
    forward: tuple[str, ...] = ()  # HOST-PORT:GUEST-PORT[/PROTOCOL], on the host's loopback
    machines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what is different for a machine, by name

    def of(self, machine: str) -> NetworkConfig:
        """Return the settings of machine `machine`."""
        return replace(self, **self.machines.get(machine, {}))

    def policy(self) -> policy.Policy:
        """Return what guests may do. The entries were checked when the configuration was read."""
        return policy.Policy(
            egress=self.egress,
            allow=tuple(map(policy.parse_allow, self.allow)),
            dns=self.dns,
            rate=self.rate,
            connections=self.connections,
            forward=tuple(map(policy.parse_forward, self.forward)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that can be configured."""

    machine: MachineConfig = field(default_factory=MachineConfig)
    limits: Limits = field(default_factory=Limits)
    relay: RelayConfig = field(default_factory=RelayConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    paste: PasteConfig = field(default_factory=PasteConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    endpoints: endpoints.Endpoints = field(default_factory=endpoints.Endpoints)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    explicit: frozenset[str] = frozenset()  # machine settings that the environment or the command line made


_SIZES = {("machine", "memory"), ("machine", "disk_size"), ("limits", "memory"), ("limits", "file_size"),
          ("limits", "output"), ("relay", "output"), ("network", "rate")}  # fmt: skip
_RANGES: dict[tuple[str, str], tuple[float, float]] = {
    ("machine", "memory"): (128 << 20, 1 << 40),
    ("machine", "cpus"): (1, 64),
    ("machine", "disk_size"): (1 << 20, 64 << 40),
    ("machine", "serial"): (0, 65535),
    ("machine", "health"): (0, 65535),
    ("machine", "cid"): (0, 0xFFFFFFFE),
    ("machine", "vport"): (0, 0xFFFFFFFE),
    ("limits", "wall"): (0.1, 86400),
    ("limits", "cpu"): (0, 86400),
    ("limits", "memory"): (0, 1 << 40),
    ("limits", "processes"): (1, 32768),
    ("limits", "file_size"): (0, 1 << 50),
    ("limits", "output"): (1, 1 << 50),
    ("relay", "port"): (0, 65535),
    ("relay", "queue"): (1, 100000),
    ("relay", "queue_wait"): (0, 86400),
    ("relay", "output"): (1, 1 << 30),
    ("pool", "size"): (0, 1000),
    ("pool", "most"): (0, 1000),
    ("pool", "warm_recent"): (0, 100),
    ("pool", "sessions"): (0, 1000),
    ("pool", "session_idle"): (1, 86400),
    ("watchdog", "interval"): (0, 86400),
    ("watchdog", "silence"): (0.1, 3600),
    ("watchdog", "cpu"): (1, 6400),
    ("watchdog", "samples"): (1, 1000),
    ("metrics", "port"): (0, 65535),
    ("network", "rate"): (0, 1 << 36),
    ("network", "connections"): (0, 1 << 20),
}
_OF_MACHINES = ("egress", "allow", "rate")  # keys of [network] that a machine can have of its own
_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("pool", "revert"): ("auto", "clone", "loadvm", "restart"),
    ("pool", "transport"): ("auto", "vsock", "vhost-user-vsock", "virtio-serial", "isa-serial"),
    ("machine", "net"): policy.MODES,
    ("network", "egress"): policy.EGRESS,
}

# (variables, newest first) -> where the value goes. Source: the predecessor's environment, both eras.
_ENVIRONMENT: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("PBOTVM_DOMAIN",), "machine", "name"),
    (("PBOTVM_SERIAL",), "machine", "serial"),
    (("PBOTVM_HEALTH", "PBOTVM_HEART"), "machine", "health"),
    (("PBOTVM_CID",), "machine", "cid"),
    (("PBOTVM_VPORT",), "machine", "vport"),
    (("PBOTVM_TIMEOUT",), "limits", "wall"),
    (("PBOTVM_ADDR", "PBOTVM_HOST"), "relay", "host"),
    (("PBOTVM_PORT", "PBOTVM_SERVER"), "relay", "port"),
    (("PBOTVM_TOKEN",), "relay", "token"),
    (("PBOTVM_NOREVERT",), "relay", "no_revert"),
)
_FALSE = ("", "0")  # in Perl, whose variables these are

# TOML's own words for what a key takes, and how that is written.
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list",
}
_EXAMPLES: dict[type, str] = {
    bool: "write true or false, without quotes",
    int: "write a plain number, such as 2",
    float: "write a plain number, such as 2.5",
    str: 'write it in quotes: "..."',
    tuple: 'write it in brackets: ["..."]',
}

_TABLES = ("machine", "limits", "relay", "pool", "paste", "watchdog", "metrics", "network")
_Table = TypeVar(
    "_Table",
    MachineConfig,
    Limits,
    RelayConfig,
    PoolConfig,
    PasteConfig,
    WatchdogConfig,
    MetricsConfig,
    NetworkConfig,
)

_KNOWN = ", ".join(f"[{name}]" for name in (*_TABLES, "machines", "aliases"))


def checked(table: _Table, table_name: str, changes: Mapping[str, object], source: str) -> _Table:
    """Return `table` with `changes` applied, each checked for type and range.

    `source` names where the values come from, for the message. Raises ConfigError for the first bad one.
    """
    defaults = {item.name: getattr(table, item.name) for item in fields(table)}
    values: dict[str, Any] = {}
    for name, raw in changes.items():
        if name not in defaults:
            known = ", ".join(sorted(key.replace("_", "-") for key in defaults))
            raise ConfigError(
                f"{source}: unknown key {name.replace('_', '-')!r} in [{table_name}]", hint=f"known keys: {known}"
            )
        values[name] = _value(table_name, name, raw, defaults[name], source)
    return replace(table, **values)


def _value(table: str, name: str, raw: object, default: object, source: str) -> object:
    what = f"{source}: {name.replace('_', '-')}"
    if (table, name) == ("network", "machines"):
        return _networks_of_machines(raw, what)
    value: object = raw
    if (table, name) in _SIZES and isinstance(raw, str):
        try:
            value = parse_size(raw)
        except UsageError as exc:
            raise ConfigError(f"{what}: {exc}", hint=exc.hint) from exc
    elif isinstance(raw, str | list):
        value = _converted(raw, default, what)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(
            f"{what} is {json.dumps(raw, default=str)}, not {_KINDS[type(default)]}", hint=_EXAMPLES[type(default)]
        )
    _check(table, name, value, raw, what)
    return value


def _check(table: str, name: str, value: object, raw: object, what: str) -> None:
    """Raise ConfigError when `value`, which has the right type, cannot be that key."""
    if (table, name) in _RANGES and isinstance(value, int | float):
        low, high = _RANGES[table, name]
        if not low <= value <= high:
            lowest, highest = (format_size(int(end)) if (table, name) in _SIZES else str(end) for end in (low, high))
            raise ConfigError(f"{what} is {raw}, out of range", hint=f"use a value from {lowest} to {highest}")
    if (table, name) in _WORDS and value not in _WORDS[table, name]:
        raise ConfigError(f"{what} is {raw!r}", hint=f"use one of: {', '.join(_WORDS[table, name])}")
    if (table, name) == ("machine", "name") and isinstance(value, str):
        try:
            machine_name(value)
        except UsageError as exc:
            raise ConfigError(f"{what}: {exc}", hint=exc.hint) from exc
    if (table, name) == ("machine", "cid") and value in (1, 2):
        raise ConfigError(f"{what} {value} is reserved", hint="use 0 for none, or 3 and above (vsock(7))")
    if table == "network":
        _check_network(name, value, what)


def _check_network(name: str, value: object, what: str) -> None:
    """Raise ConfigError when `value` cannot be the key `name` of [network]."""
    texts = value if isinstance(value, tuple) else (str(value),)
    for text in texts:
        if name == "allow":
            policy.parse_allow(text, what)
        elif name == "forward":
            policy.parse_forward(text, what)
        elif name in ("dns", "gateways"):
            policy.parse_address(text, what)
        elif name == "addresses":
            policy.parse_range(text, what)
        elif name in ("subnet4", "subnet6"):
            policy.parse_subnet(text, what, version=int(name[-1]))
        elif name == "bridge":
            policy.parse_interface(text, what)


def _networks_of_machines(raw: object, what: str) -> dict[str, dict[str, object]]:
    """Return the tables [network.machines.NAME], checked. Raises ConfigError for the first that is wrong."""
    if not isinstance(raw, dict) or not all(isinstance(table, dict) for table in raw.values()):
        raise ConfigError(f"{what} has no tables", hint='write [network.machines.NAME] and below it egress = "listed"')
    found: dict[str, dict[str, object]] = {}
    for machine, table in raw.items():
        _check("machine", "name", machine, machine, what)
        if unknown := sorted(set(table) - set(_OF_MACHINES)):
            raise ConfigError(
                f"{what}: unknown key {unknown[0]!r} of {machine}", hint=f"known keys: {', '.join(_OF_MACHINES)}"
            )
        defaults = NetworkConfig()
        found[machine] = {
            key: _value("network", key, value, getattr(defaults, key), f"{what}.{machine}")
            for key, value in table.items()
        }
    return found


def _converted(raw: str | list[object], default: object, what: str) -> object:
    """Return what a text (of the environment) or a TOML list means where `default` stands now."""
    if isinstance(default, bool) and isinstance(raw, str):
        return raw not in _FALSE
    if isinstance(default, tuple) and isinstance(raw, list):
        if not all(isinstance(word, str) and word for word in raw) or len(raw) > policy.ALLOW_MAX:
            raise ConfigError(f"{what} is no list of up to {policy.ALLOW_MAX} texts", hint='write ["...", "..."]')
        return tuple(raw)
    if isinstance(default, int | float) and isinstance(raw, str):
        try:
            return type(default)(raw)
        except ValueError as exc:
            raise ConfigError(f"{what} is {raw!r}, not a number", hint="write a plain number") from exc
    return raw


def load(file: Path, environment: Mapping[str, str] | None = None) -> Config:
    """Return the defaults changed by `file` (when it exists) and then by the environment.

    Raises ConfigError that names the file or variable.
    """
    config = Config()
    tables = _read(file)
    if unknown := sorted(set(tables) - {*_TABLES, "machines", "aliases"}):
        raise ConfigError(f"{file}: unknown table [{unknown[0]}]", hint=f"known tables: {_KNOWN}")
    config = _with_endpoints(config, file, tables)
    for name in _TABLES:
        config = _change(
            config, name, {key.replace("-", "_"): value for key, value in tables.get(name, {}).items()}, str(file)
        )
    environment = os.environ if environment is None else environment
    for variables, table, name in _ENVIRONMENT:
        for variable in variables:
            if value := environment.get(variable, ""):
                config = _change(config, table, {name: value}, f"environment variable {variable}", explicitly=True)
                break
    return config


def _with_endpoints(config: Config, file: Path, tables: Mapping[str, object]) -> Config:
    """Add the tables of machines, and what the predecessor's file beside `file` says; its default machine is ours."""
    old_file = file.with_name("vm-exec.json")
    old = endpoints.load_vm_exec(old_file) or endpoints.Endpoints()
    listed = endpoints.merge(old, endpoints.parse(tables.get("machines"), tables.get("aliases"), None, str(file)))
    config = replace(config, endpoints=listed)
    if listed.default is None:
        return config
    changes: dict[str, object] = {"name": listed.default}
    if found := old.machines.get(listed.default):
        changes |= {"serial": found.serial, "health": found.health, "cid": found.cid}
    return _change(config, "machine", changes, str(old_file))


def override(config: Config, table: str, **changes: object) -> Config:
    """Return `config` with settings from the command line; those that are None were not given.

    Raises ConfigError for a bad value.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    return _change(config, table, given, "command line", explicitly=True) if given else config


def _change(
    config: Config, table: str, changes: Mapping[str, object], source: str, *, explicitly: bool = False
) -> Config:
    changed: Any = checked(getattr(config, table), table, changes, source)
    explicit = config.explicit | changes.keys() if explicitly and table == "machine" else config.explicit
    return replace(config, explicit=explicit, **{table: changed})


def _read(file: Path) -> dict[str, dict[str, object]]:
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {file}: {exc}", hint="fix or remove the file") from exc
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{file}: {str(exc)[:200]}", hint="fix the file; it is TOML") from exc
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name!r} stands outside a table", hint=f"put it under one of {_KNOWN}")
    return tables
