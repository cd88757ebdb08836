"""Commands that keep a machine ready, with a relay or without, and stop it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pbotvm_qemu.cli.base import Json, Name, Pool, Revert, Transport, app, config_for, print_json, say, until_done
from pbotvm_qemu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pbotvm_qemu.config import Config


@app.command()
def run(
    name: Name = None,
    *,
    listen: Annotated[Optional[str], typer.Option(help="ADDR:PORT for PBot clients.")] = None,
    pool: Pool = None,
    revert: Revert = None,
    transport: Transport = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Listen beyond loopback without a token: whoever connects is served.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Go to the background once it is ready.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a machine ready, and listen for PBot's requests until stopped. SIGHUP reads the configuration again."""
    from pbotvm_qemu import commands

    host, port = _address(listen)

    def load() -> Config:
        return config_for(
            name,
            relay_host=host,
            relay_port=port,
            relay_no_auth=no_auth or None,
            pool_size=pool,
            pool_revert=revert,
            pool_transport=transport,
        )

    config = load()
    if detach:
        options = ["--listen", f"{config.relay.host}:{config.relay.port}", *(["--no-auth"] if no_auth else [])]
        arguments = ["--verbose", "run", config.machine.name, *options, *_pool_arguments(config)]
        _start(config, relay=True, arguments=arguments, as_json=as_json)
        return
    _run_keeper(
        commands.keep(config, load, relay=True, purpose="run", on_ready=lambda at: _ready(config, at, as_json=as_json))
    )


def _ready(config: Config, address: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"name": config.machine.name, "state": "running", "relay": address, "pid": os.getpid()})
        sys.stdout.flush()
    else:
        say(f"machine {config.machine.name} is ready" + (f"; PBot clients: {address}" if address else ""))


def _run_keeper(work: Coroutine[object, object, None]) -> None:
    """Run a keeper, which handles SIGTERM and SIGINT itself."""
    if logging.getLogger().level > logging.INFO:
        logging.getLogger("pbotvm_qemu").setLevel(logging.INFO)
    asyncio.run(work)


def _start(config: Config, *, relay: bool, arguments: list[str], as_json: bool) -> None:
    from pbotvm_qemu import commands

    kept = until_done(commands.start(config, relay=relay, arguments=arguments))
    if as_json:
        print_json({"name": config.machine.name, "state": "running", "relay": kept.relay, "pid": kept.keeper.pid})
    else:
        at = f"; PBot clients: {kept.relay}" if kept.relay else ""
        say(f"machine {config.machine.name} is running (pid {kept.keeper.pid}){at}")


def _address(text: str | None) -> tuple[str | None, int | None]:
    if text is None:
        return None, None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{text!r} is not ADDR:PORT", hint="write for example 127.0.0.1:9000")
    return host.strip("[]") or None, int(port)


@app.command()
def start(
    name: Name = None, *, pool: Pool = None, revert: Revert = None, transport: Transport = None, as_json: Json = False
) -> None:
    """Keep a machine ready in the background, for `exec` only."""
    config = config_for(name, pool_size=pool, pool_revert=revert, pool_transport=transport)
    arguments = ["--verbose", "keep", config.machine.name, *_pool_arguments(config)]
    _start(config, relay=False, arguments=arguments, as_json=as_json)


def _pool_arguments(config: Config) -> list[str]:
    wanted = config.pool
    return ["--pool", str(wanted.size), "--revert", wanted.revert, "--transport", wanted.transport]


@app.command(hidden=True)
def keep(name: Name = None, *, pool: Pool = None, revert: Revert = None, transport: Transport = None) -> None:
    """Keep a machine ready without a relay: what `start` puts into the background."""
    from pbotvm_qemu import commands

    config = config_for(name, pool_size=pool, pool_revert=revert, pool_transport=transport)
    _run_keeper(
        commands.keep(
            config,
            lambda: config_for(name),
            relay=False,
            purpose="start",
            on_ready=lambda at: _ready(config, at, as_json=False),
        )
    )


@app.command()
def stop(name: Name = None) -> None:
    """Stop a machine; programs under way get a while to end."""
    from pbotvm_qemu import commands

    wanted = config_for(name).machine.name
    say(f"machine {wanted} {'is stopped' if until_done(commands.stop(wanted)) else 'was not running'}")
