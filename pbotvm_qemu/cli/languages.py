"""Commands about languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pbotvm_qemu.cli.base import (
    Json,
    Machine,
    app,
    complete_language,
    config_for,
    print_json,
    progress,
    say,
    until_done,
)
from pbotvm_qemu.errors import OURS

if TYPE_CHECKING:
    from pbotvm_qemu.installing import Change

languages = typer.Typer(help="Languages: what a machine has, how each is run, and whether it works.")
app.add_typer(languages, name="languages")


@languages.callback(invoke_without_command=True)
def list_languages(
    context: typer.Context,
    *,
    vm: Machine = None,
    as_json: Json = False,
) -> None:
    """List the languages: which a machine has, and why not the others."""
    if context.invoked_subcommand:
        return
    from pbotvm_qemu import commands

    found = commands.languages(config_for(vm).machine.name)
    if as_json:
        print_json({"languages": found})
    else:
        for item in found:
            aliases = f" ({', '.join(item['aliases'])})" if item["aliases"] else ""  # type: ignore[arg-type]
            mark = "yes" if item["installed"] else "no"
            why = f"; {item['why']}" if item["why"] else ""
            typer.echo(f"{mark:4} {item['name']}{aliases}: {item['description']}{why}")
    _refused_languages()


def _refused_languages() -> None:
    """Tell of language files that were refused; the others work."""
    from pbotvm_qemu import paths
    from pbotvm_qemu.languages import Registry

    for problem in Registry.load(paths.user_languages()).problems.values():
        typer.secho(f"warning: {problem}", fg="yellow", err=True)
        if problem.hint:
            typer.secho(f"hint: {problem.hint}", dim=True, err=True)


@languages.command(name="show")
def show_language(
    name: Annotated[str, typer.Argument(help="Its name or an alias.", autocompletion=complete_language)],
    *,
    as_json: Json = False,
) -> None:
    """Show all that is known of a language."""
    from pbotvm_qemu import commands

    found = commands.language(name)
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{inner} = {detail}" for inner, detail in value.items())
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if shown:
            typer.echo(f"{key + ':':16} {shown}")


_UNDONE = "the machine is as it was"
Wanted = Annotated[list[str], typer.Argument(help="Languages or sets.", autocompletion=complete_language)]


@languages.command(name="add")
def add_languages(names: Wanted, *, vm: Machine = None, as_json: Json = False) -> None:
    """Give a machine more languages: built and tried beside it while it goes on serving, then put in place."""
    from pbotvm_qemu import installing

    with progress() as on_progress:
        change = until_done(installing.add(config_for(vm), ",".join(names), on_progress), undone=_UNDONE)
    _show_change(change, as_json=as_json)


@languages.command(name="remove")
def remove_languages(names: Wanted, *, vm: Machine = None, as_json: Json = False) -> None:
    """Take languages away from a machine, which goes on serving meanwhile."""
    from pbotvm_qemu import installing

    with progress() as on_progress:
        change = until_done(installing.remove(config_for(vm), names, on_progress), undone=_UNDONE)
    _show_change(change, as_json=as_json)


def _show_change(change: Change, *, as_json: bool) -> None:
    from pbotvm_qemu import commands

    name = change.record.name
    if change.late:
        say("the interrupt came too late: the new template is in place; `pbotvm-qemu languages` adds and removes")
    if as_json:
        more = {"added": change.added, "removed": change.removed, "seconds": change.seconds, "kept": change.kept,
                "left": change.left, "remark": change.remark}  # fmt: skip
        print_json(commands.summary(name) | more)
        return
    what = f"has {', '.join(change.added)} now" if change.added else f"is without {', '.join(change.removed)} now"
    say(f"machine {name} {what}, after {change.seconds:.0f} s; {commands.image_text(change.image)}")
    if change.kept:
        say("the running machine uses the new template from its next clone on")
    if change.remark:
        say(f"{change.remark}\nhint: pbotvm-qemu stop {name} && pbotvm-qemu start {name}")
    if change.left:
        say("sessions still use the old template; `pbotvm-qemu prune` removes it after their end")


@languages.command(name="test")
def try_languages(
    names: Annotated[
        list[str] | None, typer.Argument(help="Languages or sets; default: all that the machine has.",
                                         autocompletion=complete_language)
    ] = None,
    *,
    vm: Machine = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Languages to try at once.")] = 1,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run the samples of languages in a real guest, and print a table of what works."""
    from dataclasses import asdict

    from pbotvm_qemu import commands, trial

    config = config_for(vm)
    wanted = commands.installed_languages(config.machine.name, ",".join(names or []))
    reports = until_done(
        trial.examine(
            config,
            wanted,
            lambda name, result: say(f"{name}, {result.row}: {result.verdict} {result.detail}".rstrip()),
            jobs=jobs,
        )
    )
    if as_json:
        print_json({"languages": [asdict(report) | {"ratio": report.ratio} for report in reports]})
    else:
        for line in trial.table(reports):
            typer.echo(line)
    if not all(report.passed for report in reports):
        raise typer.Exit(OURS)
