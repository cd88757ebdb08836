"""What all commands share: the application, types of options, completion, and how to print."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Optional, cast

import typer

from pbotvm_qemu import __version__

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import TypeVar

    from pbotvm_qemu.config import Config

    T = TypeVar("T")

app = typer.Typer(
    name="pbotvm-qemu",
    help="Run code from strangers in QEMU virtual machines that are put back to a clean snapshot.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_machine(incomplete: str) -> list[str]:
    """Return the machines whose names begin with `incomplete`, for the shell."""
    from pbotvm_qemu import state

    return [name for name in state.names() if name.startswith(incomplete)]


def complete_language(incomplete: str) -> list[str]:
    """Return the languages whose names begin with `incomplete`, for the shell."""
    from pbotvm_qemu.languages import Registry

    return [name for name in sorted(Registry.load().languages) if name.startswith(incomplete)]


def complete_mode(incomplete: str) -> list[str]:
    """Return the network modes that begin with `incomplete`, for the shell."""
    from pbotvm_qemu.network import policy

    return [mode for mode in policy.MODES if mode.startswith(incomplete)]


def complete_network(incomplete: str) -> list[str]:
    """Return the networks whose names begin with `incomplete`, for the shell."""
    from pbotvm_qemu.network import addresses

    return [name for name in addresses.NAMES if name.startswith(incomplete)]


def complete_transport(incomplete: str) -> list[str]:
    """Return the transports whose names begin with `incomplete`, for the shell."""
    from pbotvm_qemu import transports

    return [name for name in (transports.AUTO, *transports.NAMES) if name.startswith(incomplete)]


Name = Annotated[
    Optional[str],
    typer.Argument(help="The machine; default: PBOTVM_DOMAIN or pbot-vm.", autocompletion=complete_machine),
]
Pool = Annotated[Optional[int], typer.Option("--pool", help="Clean machines to keep ready and unused.")]
Revert = Annotated[
    Optional[str], typer.Option("--revert", help="The way back to clean: auto, clone, loadvm or restart.")
]
Transport = Annotated[
    Optional[str],
    typer.Option(
        "--transport",
        help="How guests are reached: auto, vsock, vhost-user-vsock, virtio-serial or isa-serial.",
        autocompletion=complete_transport,
    ),
]
Machine = Annotated[
    Optional[str],
    typer.Option("--vm", help="The machine; default: PBOTVM_DOMAIN or pbot-vm.", autocompletion=complete_machine),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def config_for(name: str | None = None, **changes: object) -> Config:
    """Return the configuration of this call: defaults, file, environment, command line."""
    from pbotvm_qemu import config, paths

    loaded = config.load(paths.config_file())
    changed = config.override(loaded, "machine", name=config.machine_name(name) if name else None)
    for table in ("machine", "limits", "relay", "pool", "network"):
        mine = {key.removeprefix(f"{table}_"): value for key, value in changes.items() if key.startswith(f"{table}_")}
        changed = config.override(changed, table, **mine)
    return changed


def until_done(work: Coroutine[object, object, T], *, undone: str = "") -> T:
    """Run `work` to its end; Ctrl-C and SIGTERM cancel it, so that it can clean up. A second Ctrl-C does not wait for that.

    Raises Interrupted afterwards, with the text `undone`: how things are then.
    """
    interrupted = False

    async def guarded() -> T | None:
        nonlocal interrupted
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            interrupted = True
            return None

    try:
        answer = asyncio.run(guarded())
    except KeyboardInterrupt:
        raise Interrupted("interrupted while cleaning up; `pbotvm-qemu prune` removes what was left") from None
    if interrupted:
        raise Interrupted(f"interrupted; {undone}" if undone else "interrupted")
    return cast("T", answer)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, and what became of the work. Typer ends without a word at a KeyboardInterrupt."""


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    typer.echo(text, err=True)


def print_json(value: object) -> None:
    """Print a line for programs, on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pbotvm-qemu {__version__}")
        raise typer.Exit


@app.callback()
def common(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set up what all commands share."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


@contextlib.contextmanager
def progress():  # type: ignore[no-untyped-def]
    """Show stages on stderr: a bar on a terminal, a line for each stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def line(stage: str, done: float) -> None:
            nonlocal last
            if stage != last:
                last = stage
                say(f"[{done * 100:3.0f} %] {stage}")

        yield line
        return
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("starting", total=1.0)
        yield lambda stage, done: bars.update(bar, description=stage, completed=done)
