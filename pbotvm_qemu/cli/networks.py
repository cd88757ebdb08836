"""Commands about networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pbotvm_qemu.cli.base import Json, app, complete_network, config_for, print_json, say, until_done

if TYPE_CHECKING:
    from collections.abc import Callable

networks = typer.Typer(help="Networks of machines: bridges, addresses, rules.", no_args_is_help=True)
app.add_typer(networks, name="net")
Networks = Annotated[
    list[str] | None,
    typer.Argument(help="nat, isolated or bridge; default: nat and isolated.", autocompletion=complete_network),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def _steps(*, dry_run: bool, as_json: bool) -> tuple[list[str], Callable[[str], None]]:
    """Return a list of steps, and what takes each and shows it at once, unless JSON comes later."""
    done: list[str] = []

    def step(what: str) -> None:
        done.append(what)
        if not as_json:
            typer.echo(f"would {what}" if dry_run else what)

    return done, step


@networks.command(name="up")
def net_up(
    which: Networks = None,
    *,
    uplink: Annotated[
        Optional[str], typer.Option(help="The interface of this host that goes into network bridge.")
    ] = None,
    within: Annotated[
        float, typer.Option("--confirm-within", min=1, max=3600, help="Seconds until an uplink is put back.")
    ] = 30.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make what guests' networks need, as far as it is missing; give running guests today's policy."""
    from pbotvm_qemu import network_commands

    done, step = _steps(dry_run=dry_run, as_json=as_json)
    wanted = network_commands.names(which or [])
    waits = until_done(
        network_commands.up(config_for().network, wanted, uplink=uplink, within=within, dry_run=dry_run, on_step=step)
    )
    if as_json:
        print_json({"steps": done, "done": not dry_run, "unconfirmed": waits})
    elif not done:
        say("nothing to do: everything is there")
    if waits:
        say(f"is this host still reached? then type within {within:.0f} s: pbotvm-qemu net confirm")


@networks.command(name="confirm")
def net_confirm() -> None:
    """Keep an uplink in its bridge, which else is put back after a while."""
    from pbotvm_qemu import network_commands

    say(f"{until_done(network_commands.confirm())} stays in its bridge")


@networks.command(name="rollback", hidden=True)
def net_rollback(*, after: Annotated[float, typer.Option(min=0)]) -> None:
    """Put an uplink back unless it is confirmed in time: what `net up` puts into the background."""
    from pbotvm_qemu import network_commands

    say("put back" if until_done(network_commands.roll_back(after)) else "confirmed")


@networks.command(name="down")
def net_down(which: Networks = None, *, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Take networks away again: only what we made."""
    from pbotvm_qemu import network_commands

    done, step = _steps(dry_run=dry_run, as_json=as_json)
    wanted = network_commands.names(which or [])
    until_done(network_commands.down(wanted, dry_run=dry_run, on_step=step))
    if as_json:
        print_json({"steps": done, "done": not dry_run})
    elif not done:
        say("nothing to do: there is nothing of ours")


@networks.command(name="status")
def net_status(*, as_json: Json = False) -> None:
    """Show networks, guests, the policy, and what is in the way."""
    from pbotvm_qemu import network_commands

    report = until_done(network_commands.status(config_for().network))
    if as_json:
        print_json(report)
        return
    for line in network_commands.lines(report):
        typer.echo(line)
