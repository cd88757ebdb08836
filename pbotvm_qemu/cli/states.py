"""Commands about states of a machine: snapshots, and sessions with theirs."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from pbotvm_qemu.cli.base import Json, Machine, Name, app, config_for, print_json, say, until_done

snapshots = typer.Typer(help="Snapshots of a machine.", no_args_is_help=True)
app.add_typer(snapshots, name="snapshot")
sessions = typer.Typer(
    help="Sessions of a kept machine: several runs in one clone. `exec --keep` opens one.", no_args_is_help=True
)
app.add_typer(sessions, name="session")


@snapshots.command(name="list")
def snapshot_list(*, vm: Machine = None, as_json: Json = False) -> None:
    """List the snapshots."""
    from datetime import UTC, datetime

    from pbotvm_qemu import commands, config

    found = until_done(commands.snapshot_list(config_for(vm).machine.name))
    if as_json:
        print_json({"snapshots": found})
        return
    for item in found:
        when = datetime.fromtimestamp(int(str(item["date-sec"])), UTC).isoformat(" ", "seconds")
        typer.echo(f"{item['name']:20} {config.format_size(int(str(item['vm-state-size']))):>8}  {when}")


@snapshots.command(name="create")
def snapshot_create(tag: str, *, vm: Machine = None) -> None:
    """Save the running machine as it stands."""
    from pbotvm_qemu import commands

    until_done(commands.snapshot_create(config_for(vm).machine.name, tag))
    say(f"snapshot {tag} is taken")


@snapshots.command(name="revert")
def snapshot_revert(tag: str, *, vm: Machine = None) -> None:
    """Put the running machine back to a snapshot; later runs start from it too."""
    _revert(vm, tag)


@snapshots.command(name="delete")
def snapshot_delete(tag: str, *, vm: Machine = None) -> None:
    """Delete a snapshot."""
    from pbotvm_qemu import commands

    until_done(commands.snapshot_delete(config_for(vm).machine.name, tag))
    say(f"snapshot {tag} is deleted")


@app.command()
def revert(name: Name = None) -> None:
    """Put the running machine back to its clean snapshot."""
    from pbotvm_qemu.config import SNAPSHOT

    _revert(name, SNAPSHOT)


def _revert(name: str | None, tag: str) -> None:
    from pbotvm_qemu import commands

    way = until_done(commands.revert(config_for(name).machine.name, tag))
    say(f"reverted to snapshot {tag} by {way}")


Id = Annotated[str, typer.Argument(help="The session, as `session list` shows it.")]


def _ask_session(vm: str | None, question: dict[str, object]) -> dict[str, object]:
    from pbotvm_qemu import control

    name = config_for(vm).machine.name
    return until_done(
        control.ask(name, {key: value for key, value in question.items() if value is not None}, timeout=300.0)
    )


def _show_session(found: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        say(f"session {found['id']} is open on clone {found['clone']}")
        typer.echo(found["id"])


@sessions.command(name="open")
def session_open(
    *,
    vm: Machine = None,
    idle: Annotated[Optional[float], typer.Option(help="Seconds without use that end it.")] = None,
    as_json: Json = False,
) -> None:
    """Open a session on a clean clone, and print its id."""
    _show_session(_ask_session(vm, {"do": "session-open", "idle": idle}), as_json=as_json)


@sessions.command(name="list")
def session_list(*, vm: Machine = None, as_json: Json = False) -> None:
    """List the sessions."""
    found = _ask_session(vm, {"do": "session-list"})
    if as_json:
        print_json(found)
        return
    for item in found["sessions"]:  # type: ignore[attr-defined]
        saved = " ".join(item["saved"]) or "no saved state"
        typer.echo(f"{item['id']}  {item['clone']:20} {item['runs']:4} runs  idle {item['idle_s']:.0f} s  {saved}")


@sessions.command(name="end")
def session_end(id_: Id, *, vm: Machine = None) -> None:
    """End a session: its clone and its saved states are gone."""
    _ask_session(vm, {"do": "session-end", "id": id_})
    say(f"session {id_} has ended")


@sessions.command(name="save")
def session_save(id_: Id, tag: str, *, vm: Machine = None) -> None:
    """Save the state of a session's clone, memory and disk, under a tag."""
    _ask_session(vm, {"do": "session-save", "id": id_, "tag": tag})
    say(f"state {tag} of session {id_} is saved")


@sessions.command(name="revert")
def session_revert(id_: Id, tag: str, *, vm: Machine = None) -> None:
    """Put a session back to a saved state."""
    _ask_session(vm, {"do": "session-revert", "id": id_, "tag": tag})
    say(f"session {id_} is back at state {tag}")


@sessions.command(name="fork")
def session_fork(id_: Id, *, vm: Machine = None, as_json: Json = False) -> None:
    """Open a second session with a copy of this one's running machine, and print its id."""
    _show_session(_ask_session(vm, {"do": "session-fork", "id": id_}), as_json=as_json)
