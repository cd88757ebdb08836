"""Commands about machines: make, show, remove, and the check of this host."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pbotvm_qemu.cli.base import (
    Interrupted,
    Json,
    Name,
    app,
    complete_language,
    complete_mode,
    config_for,
    print_json,
    progress,
    say,
    until_done,
)
from pbotvm_qemu.errors import OURS

if TYPE_CHECKING:
    from rich.console import Group


@app.command()
def doctor(*, as_json: Json = False) -> None:
    """Check what this host can do, why not, and what to type."""
    from dataclasses import asdict

    from pbotvm_qemu import doctor as checks

    found = until_done(checks.examine(config_for()))
    if as_json:
        print_json({"checks": [asdict(check) for check in found]})
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in found:
            typer.secho(f"{check.status:4}  ", fg=colours[check.status], nl=False)
            typer.echo(f"{check.name:16} {check.detail}")
            if check.hint and check.status != "ok":
                typer.echo(f"      {'':16} -> {check.hint}")
    if any(check.status == "fail" for check in found):
        raise typer.Exit(OURS)


@app.command()
def create(
    name: Name = None,
    *,
    languages: Annotated[
        str, typer.Option(help="A set (core, all) or names with commas.", autocompletion=complete_language)
    ] = "core",
    memory: Annotated[Optional[str], typer.Option(help="Guest memory, such as 512M.")] = None,
    cpus: Annotated[Optional[int], typer.Option(help="Number of processors.")] = None,
    disk_size: Annotated[Optional[str], typer.Option(help="Size of the sparse disk, such as 12G.")] = None,
    net: Annotated[
        Optional[str], typer.Option(help="Network mode; default: none.", autocompletion=complete_mode)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it anew when it exists.")] = False,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Do nothing when it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Build the image, boot, warm up every language, and take the clean snapshot."""
    from pbotvm_qemu import commands, creation, image

    config = config_for(name, machine_memory=memory, machine_cpus=cpus, machine_disk_size=disk_size, machine_net=net)
    wanted = config.machine.name
    if if_missing and commands.summary(wanted)["state"] not in ("creating", "damaged"):
        say(f"machine {wanted} exists already")
        return
    with progress() as on_progress:
        begin = time.monotonic()
        record = until_done(
            creation.create(config, languages, on_progress, force=force), undone="nothing was left behind"
        )
        seconds = time.monotonic() - begin
    if as_json:
        print_json(commands.summary(record.name) | {"seconds": round(seconds, 1)})
    else:
        say(f"{commands.image_text(image.Image.load(record.image))}; the machine was made in {seconds:.0f} s")
        say(f"machine {record.name} is ready; try: pbotvm-qemu exec -lang=sh echo hello world")


@app.command(name="list")
def list_machines(*, as_json: Json = False) -> None:
    """List the machines."""
    from pbotvm_qemu import commands, config, state

    found = [commands.summary(name) for name in state.names()]
    if as_json:
        print_json({"machines": found})
        return
    if not found:
        say("there is no machine yet; make one with `pbotvm-qemu create`")
    for item in found:
        if item["state"] == "damaged":
            typer.echo(f"{item['name']:20} damaged  {item['problem']}")
        else:
            memory = config.format_size(int(str(item["memory"])))
            size = config.format_size(int(str(item["image_bytes"]))) if item["image_bytes"] else "?"
            typer.echo(
                f"{item['name']:20} {item['state']:8} {item['accelerator']}  {memory:>5}  {item['cpus']} cpu  image {size:>7}  "
                f"ports {item['serial']} {item['health']}  {' '.join(item['languages'])}"  # type: ignore[arg-type]
            )


@app.command()
def status(name: Name = None, *, as_json: Json = False) -> None:
    """Show all that is known of a machine."""
    from pbotvm_qemu import commands

    report = until_done(commands.status(config_for(name)))
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for inner, detail in value.items():
                typer.echo(f"  {inner + ':':14} {detail}")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            typer.echo(f"{key + ':':16} {shown}")


@app.command()
def top(
    name: Name = None,
    *,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 1.0,
    count: Annotated[Optional[int], typer.Option(min=1, help="Looks; default: until Ctrl-C, or 1 into a file.")] = None,
    as_json: Json = False,
) -> None:
    """Show live figures of a kept machine and of each of its QEMU processes."""
    wanted = config_for(name).machine.name
    endless = count is None and sys.stdout.isatty() and not as_json
    with contextlib.suppress(Interrupted):
        until_done(_top(wanted, interval, None if endless else count or 1, as_json=as_json))


async def _top(name: str, interval: float, count: int | None, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from pbotvm_qemu import top as figures

    console = Console()
    before = await figures.look(name)
    with (
        Live(console=console, auto_refresh=False)
        if console.is_terminal and not as_json
        else contextlib.nullcontext() as live
    ):
        while count is None or count > 0:
            await asyncio.sleep(interval)
            now = await figures.look(name)
            found = figures.report(name, before, now)
            before = now
            count = None if count is None else count - 1
            if as_json:
                print_json(found)
                sys.stdout.flush()
            elif live:
                live.update(_top_table(found), refresh=True)
            else:
                console.print(_top_table(found))


def _top_table(found: dict[str, object]) -> Group:
    """Return the picture of one look."""
    from rich.console import Group
    from rich.table import Table

    from pbotvm_qemu.config import format_size

    words = ", ".join(f"{key} {found[key]}" for key in ("ready", "busy", "waiting", "runs", "runs_per_s", "deaths"))
    table = Table(box=None)
    for heading in ("QEMU", "CPU %", "resident", "of its own"):
        table.add_column(heading, justify="right")
    for item in found["processes"]:  # type: ignore[attr-defined]
        sizes = (format_size(item[key] >> 20 << 20) for key in ("rss", "pss"))
        table.add_row(str(item["pid"]), f"{item['cpu_percent']:.1f}", *sizes)
    return Group(f"{found['machine']}: {words}", table)


@app.command()
def console(name: Name = None) -> None:
    """Watch the guest's serial console until Ctrl-C. Nobody can log in there."""
    from pbotvm_qemu import execution

    wanted = config_for(name).machine.name
    with contextlib.suppress(Interrupted):
        until_done(execution.watch_console(wanted, sys.stdout.buffer))


@app.command()
def logs(name: Name = None, *, lines: Annotated[int, typer.Option("-n", "--lines", min=1)] = 40) -> None:
    """Show the end of a machine's logs: its keeper's, QEMU's, the guest kernel's."""
    from pbotvm_qemu import commands

    for file in commands.log_files(config_for(name).machine.name):
        say(f"==> {file} <==")
        text = file.read_bytes()[-(1 << 18) :].decode("utf-8", "replace")
        for line in text.splitlines()[-lines:]:
            typer.echo(
                "".join(character if character.isprintable() or character == "\t" else "?" for character in line)
            )


@app.command()
def rm(
    name: Name = None, *, force: Annotated[bool, typer.Option("--force", help="Also when it runs.")] = False
) -> None:
    """Delete a machine. Its image stays in the cache, see prune."""
    from pbotvm_qemu import commands

    wanted = config_for(name).machine.name
    until_done(commands.remove(wanted, force=force))
    say(f"machine {wanted} is gone")


@app.command()
def prune(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    images: Annotated[bool, typer.Option("--images", help="Also images that no machine uses.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what crashes left behind, and say what it was."""
    from pbotvm_qemu import commands

    found = until_done(commands.prune(dry_run=dry_run, images=images))
    if as_json:
        print_json({"left": [{"kind": item.kind, "what": item.what} for item in found], "removed": not dry_run})
        return
    for item in found:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {item.kind}: {item.what}")
    if not found:
        typer.echo("nothing was left behind")


@app.command(name="qemu-command")
def qemu_command(name: Name = None) -> None:
    """Print the exact QEMU command line without starting it."""
    from pbotvm_qemu import commands

    typer.echo(commands.qemu_command(config_for(name)))
    say(
        "descriptors 3 and 4 are socket pairs, to the monitor and to the agent; in a clone, 5 is its disk, "
        "6 takes its console, 8 is its third serial line"
    )
