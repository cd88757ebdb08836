"""The command line: the only place that prints and exits. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pbotvm_qemu import __version__
from pbotvm_qemu.errors import OURS, PbotVMError, StateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import TypeVar

    from rich.console import Group

    from pbotvm_qemu.config import Config

    T = TypeVar("T")

app = typer.Typer(
    name="pbotvm-qemu",
    help="Run code from strangers in QEMU virtual machines that are put back to a clean snapshot.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
snapshots = typer.Typer(help="Snapshots of a machine.", no_args_is_help=True)
app.add_typer(snapshots, name="snapshot")
sessions = typer.Typer(
    help="Sessions of a kept machine: several runs in one clone. `exec --keep` opens one.", no_args_is_help=True
)
app.add_typer(sessions, name="session")
languages = typer.Typer(help="Languages: what a machine has, how each is run, and whether it works.")
app.add_typer(languages, name="languages")
networks = typer.Typer(help="Networks of machines: bridges, addresses, rules.", no_args_is_help=True)
app.add_typer(networks, name="net")


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
    from pbotvm_qemu import policy

    return [mode for mode in policy.MODES if mode.startswith(incomplete)]


def complete_network(incomplete: str) -> list[str]:
    """Return the networks whose names begin with `incomplete`, for the shell."""
    from pbotvm_qemu import addresses

    return [name for name in addresses.NAMES if name.startswith(incomplete)]


Name = Annotated[
    Optional[str],
    typer.Argument(help="The machine; default: PBOTVM_DOMAIN or pbot-vm.", autocompletion=complete_machine),
]
Pool = Annotated[Optional[int], typer.Option("--pool", help="Clean machines to keep ready and unused.")]
Revert = Annotated[
    Optional[str], typer.Option("--revert", help="The way back to clean: auto, clone, loadvm or restart.")
]
Machine = Annotated[
    Optional[str],
    typer.Option("--vm", help="The machine; default: PBOTVM_DOMAIN or pbot-vm.", autocompletion=complete_machine),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _config(name: str | None = None, **changes: object) -> Config:
    """Return the configuration of this call: defaults, file, environment, command line."""
    from pbotvm_qemu import config, paths

    loaded = config.load(paths.config_file())
    changed = config.override(loaded, "machine", name=config.machine_name(name) if name else None)
    for table in ("machine", "limits", "relay", "pool", "network"):
        mine = {key.removeprefix(f"{table}_"): value for key, value in changes.items() if key.startswith(f"{table}_")}
        changed = config.override(changed, table, **mine)
    return changed


def _run(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end; Ctrl-C and SIGTERM cancel it, so that it can clean up."""

    async def guarded() -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    return asyncio.run(guarded())


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print_json(value: object) -> None:
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


@app.command()
def doctor(*, as_json: Json = False) -> None:
    """Check what this host can do, why not, and what to type."""
    from dataclasses import asdict

    from pbotvm_qemu import doctor as checks

    found = _run(checks.examine(_config()))
    if as_json:
        _print_json({"checks": [asdict(check) for check in found]})
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
    from pbotvm_qemu import commands, creation, state

    config = _config(name, machine_memory=memory, machine_cpus=cpus, machine_disk_size=disk_size, machine_net=net)
    wanted = config.machine.name
    if if_missing and commands.summary(wanted)["state"] not in ("creating", "damaged"):
        _say(f"machine {wanted} exists already")
        return
    with _progress() as progress:
        record = _run(creation.create(config, languages, progress, force=force))
    if as_json:
        _print_json(commands.summary(state.ready(record.name).name))
    else:
        _say(f"machine {record.name} is ready; try: pbotvm-qemu exec -lang=sh echo hello world")


@contextlib.contextmanager
def _progress():  # type: ignore[no-untyped-def]
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
                _say(f"[{done * 100:3.0f} %] {stage}")

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


@app.command()
def run(
    name: Name = None,
    *,
    listen: Annotated[Optional[str], typer.Option(help="ADDR:PORT for PBot clients.")] = None,
    pool: Pool = None,
    revert: Revert = None,
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
        return _config(
            name, relay_host=host, relay_port=port, relay_no_auth=no_auth or None, pool_size=pool, pool_revert=revert
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
        _print_json({"name": config.machine.name, "state": "running", "relay": address, "pid": os.getpid()})
        sys.stdout.flush()
    else:
        _say(f"machine {config.machine.name} is ready" + (f"; PBot clients: {address}" if address else ""))


def _run_keeper(work: Coroutine[object, object, None]) -> None:
    """Run a keeper, which handles SIGTERM and SIGINT itself."""
    if logging.getLogger().level > logging.INFO:
        logging.getLogger("pbotvm_qemu").setLevel(logging.INFO)
    asyncio.run(work)


def _start(config: Config, *, relay: bool, arguments: list[str], as_json: bool) -> None:
    from pbotvm_qemu import commands

    kept = _run(commands.start(config, relay=relay, arguments=arguments))
    if as_json:
        _print_json({"name": config.machine.name, "state": "running", "relay": kept.relay, "pid": kept.keeper.pid})
    else:
        at = f"; PBot clients: {kept.relay}" if kept.relay else ""
        _say(f"machine {config.machine.name} is running (pid {kept.keeper.pid}){at}")


def _address(text: str | None) -> tuple[str | None, int | None]:
    if text is None:
        return None, None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{text!r} is not ADDR:PORT", hint="write for example 127.0.0.1:9000")
    return host.strip("[]") or None, int(port)


@app.command()
def start(name: Name = None, *, pool: Pool = None, revert: Revert = None, as_json: Json = False) -> None:
    """Keep a machine ready in the background, for `exec` only."""
    config = _config(name, pool_size=pool, pool_revert=revert)
    arguments = ["--verbose", "keep", config.machine.name, *_pool_arguments(config)]
    _start(config, relay=False, arguments=arguments, as_json=as_json)


def _pool_arguments(config: Config) -> list[str]:
    return ["--pool", str(config.pool.size), "--revert", config.pool.revert]


@app.command(hidden=True)
def keep(name: Name = None, *, pool: Pool = None, revert: Revert = None) -> None:
    """Keep a machine ready without a relay: what `start` puts into the background."""
    from pbotvm_qemu import commands

    config = _config(name, pool_size=pool, pool_revert=revert)
    _run_keeper(
        commands.keep(
            config,
            lambda: _config(name),
            relay=False,
            purpose="start",
            on_ready=lambda at: _ready(config, at, as_json=False),
        )
    )


@app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    code: Annotated[
        list[str] | None,
        typer.Argument(help="The program; words are joined by blanks. - reads it from --file or stdin."),
    ] = None,
    *,
    vm: Annotated[Optional[str], typer.Option("--vm", help="The machine.", autocompletion=complete_machine)] = None,
    lang: Annotated[str, typer.Option("--lang", help="The language.", autocompletion=complete_language)] = "sh",
    args: Annotated[
        str | None, typer.Option("--args", "--arguments", help="Arguments of the program, in one string.")
    ] = None,
    stdin: Annotated[Optional[str], typer.Option("--stdin", help="Text for standard input, instead of ours.")] = None,
    file: Annotated[Optional[str], typer.Option("--file", help="Read the program from this file.")] = None,
    put: Annotated[list[str] | None, typer.Option("--put", help="PATH[:NAME]: put a file beside the program.")] = None,
    get: Annotated[
        list[str] | None, typer.Option("--get", help="NAME[:PATH]: fetch a file that the program wrote.")
    ] = None,
    timeout: Annotated[Optional[float], typer.Option(help="Seconds that the program may take.")] = None,
    output_limit: Annotated[Optional[str], typer.Option(help="Most bytes that it may print, such as 64M.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Open a session for it, and say on stderr how to go on in it.")
    ] = False,
    session: Annotated[Optional[str], typer.Option("--session", help="Run it in this session.")] = None,
    as_json: Json = False,
) -> None:
    """Run a program on a clean machine; its output and exit status become ours."""
    from pbotvm_qemu import control, execution, running

    config = _config(vm, limits_wall=timeout, limits_output=output_limit)
    job = execution.prepare(
        code or [], lang=lang, vm=vm, args=args, stdin=stdin, file=file, put=put or [], get=get or []
    )
    if job.request.info:
        typer.echo(execution.info(job.request, config.machine.name))
        return
    if keep and session is not None:
        raise UsageError("--keep opens a session, --session uses one", hint="give one of them")
    if keep:
        session = str(_run(control.ask(config.machine.name, {"do": "session-open"}))["id"])
        _say(f"session {session} is open; go on with: pbotvm-qemu exec --session {session}")
    sink = execution.Sink(keep=as_json)
    result = _run(
        running.execute(
            config,
            job.request,
            on_output=sink.write,
            stdin=job.stdin(),
            code=job.code,
            files=job.files,
            collect=[name for name, _path in job.collect],
            session=session,
            on_wait=_say,
        )
    )
    outcome = result.outcome
    job.store(outcome)
    if as_json:
        _print_json(execution.report(result.language, outcome, sink) | {"session": session})
    else:
        for line in execution.remarks(outcome, config.limits):
            _say(line)
    raise typer.Exit(outcome.exit_code)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def client(words: Annotated[list[str], typer.Argument(help="A JSON object or the words of a request.")]) -> None:
    """Send one request to the relay, as PBot's vm-client does, and print the answer."""
    from pbotvm_qemu import execution

    relay = _config().relay
    line = execution.with_token(" ".join(words), relay.token)
    try:
        sys.stdout.buffer.write(_run(execution.ask_relay(relay.host, relay.port, line)))
    except StateError as exc:  # the words of PBot's vm-client, where a bot looks for them
        typer.echo(str(exc))
        raise


@app.command()
def stop(name: Name = None) -> None:
    """Stop a machine; programs under way get a while to end."""
    from pbotvm_qemu import commands

    wanted = _config(name).machine.name
    _say(f"machine {wanted} {'is stopped' if _run(commands.stop(wanted)) else 'was not running'}")


@app.command(name="list")
def list_machines(*, as_json: Json = False) -> None:
    """List the machines."""
    from pbotvm_qemu import commands, config, state

    found = [commands.summary(name) for name in state.names()]
    if as_json:
        _print_json({"machines": found})
        return
    if not found:
        _say("there is no machine yet; make one with `pbotvm-qemu create`")
    for item in found:
        if item["state"] == "damaged":
            typer.echo(f"{item['name']:20} damaged  {item['problem']}")
        else:
            memory = config.format_size(int(str(item["memory"])))
            typer.echo(
                f"{item['name']:20} {item['state']:8} {item['accelerator']}  {memory:>5}  {item['cpus']} cpu  "
                f"ports {item['serial']} {item['health']}  {' '.join(item['languages'])}"  # type: ignore[arg-type]
            )


@app.command()
def status(name: Name = None, *, as_json: Json = False) -> None:
    """Show all that is known of a machine."""
    from pbotvm_qemu import commands

    report = _run(commands.status(_config(name)))
    if as_json:
        _print_json(report)
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
    wanted = _config(name).machine.name
    endless = count is None and sys.stdout.isatty() and not as_json
    with contextlib.suppress(KeyboardInterrupt):
        _run(_top(wanted, interval, None if endless else count or 1, as_json=as_json))


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
                _print_json(found)
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

    wanted = _config(name).machine.name
    with contextlib.suppress(KeyboardInterrupt):
        _run(execution.watch_console(wanted, sys.stdout.buffer))


@app.command()
def logs(name: Name = None, *, lines: Annotated[int, typer.Option("-n", "--lines", min=1)] = 40) -> None:
    """Show the end of a machine's logs: its keeper's, QEMU's, the guest kernel's."""
    from pbotvm_qemu import commands

    for file in commands.log_files(_config(name).machine.name):
        _say(f"==> {file} <==")
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

    wanted = _config(name).machine.name
    _run(commands.remove(wanted, force=force))
    _say(f"machine {wanted} is gone")


@app.command()
def prune(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    images: Annotated[bool, typer.Option("--images", help="Also images that no machine uses.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what crashes left behind, and say what it was."""
    from pbotvm_qemu import commands

    found = _run(commands.prune(dry_run=dry_run, images=images))
    if as_json:
        _print_json({"left": [{"kind": item.kind, "what": item.what} for item in found], "removed": not dry_run})
        return
    for item in found:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {item.kind}: {item.what}")
    if not found:
        typer.echo("nothing was left behind")


@app.command(name="qemu-command")
def qemu_command(name: Name = None) -> None:
    """Print the exact QEMU command line without starting it."""
    from pbotvm_qemu import commands

    typer.echo(commands.qemu_command(_config(name)))
    _say(
        "descriptors 3 and 4 are socket pairs, to the monitor and to the agent; in a clone, 5 is its disk, "
        "6 takes its console, 8 is its third serial line"
    )


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

    found = commands.languages(_config(vm).machine.name)
    if as_json:
        _print_json({"languages": found})
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
        _print_json(found)
        return
    for key, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{inner} = {detail}" for inner, detail in value.items())
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if shown:
            typer.echo(f"{key + ':':16} {shown}")


@languages.command(name="test")
def try_languages(
    names: Annotated[
        list[str] | None, typer.Argument(help="Languages or sets; default: all that the machine has.",
                                         autocompletion=complete_language)
    ] = None,
    *,
    vm: Machine = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run the samples of languages in a real guest, and print a table of what works."""
    from dataclasses import asdict

    from pbotvm_qemu import commands, trial

    config = _config(vm)
    wanted = commands.installed_languages(config.machine.name, ",".join(names or []))
    reports = _run(
        trial.examine(
            config,
            wanted,
            lambda name, result: _say(f"{name}, {result.row}: {result.verdict} {result.detail}".rstrip()),
        )
    )
    if as_json:
        _print_json({"languages": [asdict(report) for report in reports]})
    else:
        for line in trial.table(reports):
            typer.echo(line)
    if not all(report.passed for report in reports):
        raise typer.Exit(OURS)


@app.command()
def bench(
    name: Name = None,
    *,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measurements of each figure.")] = 10,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also clone guests of 256 MiB to 2 GiB, which are made for it.")
    ] = False,
    virsh: Annotated[
        Optional[str], typer.Option("--virsh", help="A libvirt domain with a snapshot 1 to compare with.")
    ] = None,
    plot: Annotated[
        Optional[str], typer.Option("--plot", help="Draw the ways back to clean into this SVG file.")
    ] = None,
    net: Annotated[
        bool, typer.Option("--net", help="Measure networks instead: throughput and latency of each mode (root).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure boot, clones, exec and revert on this host."""
    from pathlib import Path

    if net:
        _bench_net(name, as_json=as_json)
        return

    from pbotvm_qemu import bench as benchmark
    from pbotvm_qemu import plot as plots

    report = _run(benchmark.measure(_config(name), rounds, _say, growth=growth, domain=virsh))
    if plot:
        plots.write(report, Path(plot))
    if as_json:
        _print_json(report)
    else:
        for line in benchmark.table(report):
            typer.echo(line)


def _bench_net(name: str | None, *, as_json: bool) -> None:
    from pbotvm_qemu import bench_net

    report = _run(bench_net.measure(_config(name), _say))
    if as_json:
        _print_json({"networks": report})
    else:
        for line in bench_net.table(report):
            typer.echo(line)


@app.command(name="bench-net", hidden=True)
def bench_net_inside(name: str, world: str) -> None:
    """Measure networks in the namespace that `bench --net` made."""
    from pbotvm_qemu import bench_net

    _print_json(_run(bench_net.inside(_config(name), world)))


@snapshots.command(name="list")
def snapshot_list(*, vm: Machine = None, as_json: Json = False) -> None:
    """List the snapshots."""
    from datetime import UTC, datetime

    from pbotvm_qemu import commands, config

    found = _run(commands.snapshot_list(_config(vm).machine.name))
    if as_json:
        _print_json({"snapshots": found})
        return
    for item in found:
        when = datetime.fromtimestamp(int(str(item["date-sec"])), UTC).isoformat(" ", "seconds")
        typer.echo(f"{item['name']:20} {config.format_size(int(str(item['vm-state-size']))):>8}  {when}")


@snapshots.command(name="create")
def snapshot_create(tag: str, *, vm: Machine = None) -> None:
    """Save the running machine as it stands."""
    from pbotvm_qemu import commands

    _run(commands.snapshot_create(_config(vm).machine.name, tag))
    _say(f"snapshot {tag} is taken")


@snapshots.command(name="revert")
def snapshot_revert(tag: str, *, vm: Machine = None) -> None:
    """Put the running machine back to a snapshot; later runs start from it too."""
    _revert(vm, tag)


@snapshots.command(name="delete")
def snapshot_delete(tag: str, *, vm: Machine = None) -> None:
    """Delete a snapshot."""
    from pbotvm_qemu import commands

    _run(commands.snapshot_delete(_config(vm).machine.name, tag))
    _say(f"snapshot {tag} is deleted")


@app.command()
def revert(name: Name = None) -> None:
    """Put the running machine back to its clean snapshot."""
    from pbotvm_qemu.config import SNAPSHOT

    _revert(name, SNAPSHOT)


def _revert(name: str | None, tag: str) -> None:
    from pbotvm_qemu import commands

    way = _run(commands.revert(_config(name).machine.name, tag))
    _say(f"reverted to snapshot {tag} by {way}")


Id = Annotated[str, typer.Argument(help="The session, as `session list` shows it.")]


def _ask_session(vm: str | None, question: dict[str, object]) -> dict[str, object]:
    from pbotvm_qemu import control

    name = _config(vm).machine.name
    return _run(control.ask(name, {key: value for key, value in question.items() if value is not None}, timeout=300.0))


def _show_session(found: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        _print_json(found)
    else:
        _say(f"session {found['id']} is open on clone {found['clone']}")
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
        _print_json(found)
        return
    for item in found["sessions"]:  # type: ignore[attr-defined]
        saved = " ".join(item["saved"]) or "no saved state"
        typer.echo(f"{item['id']}  {item['clone']:20} {item['runs']:4} runs  idle {item['idle_s']:.0f} s  {saved}")


@sessions.command(name="end")
def session_end(id_: Id, *, vm: Machine = None) -> None:
    """End a session: its clone and its saved states are gone."""
    _ask_session(vm, {"do": "session-end", "id": id_})
    _say(f"session {id_} has ended")


@sessions.command(name="save")
def session_save(id_: Id, tag: str, *, vm: Machine = None) -> None:
    """Save the state of a session's clone, memory and disk, under a tag."""
    _ask_session(vm, {"do": "session-save", "id": id_, "tag": tag})
    _say(f"state {tag} of session {id_} is saved")


@sessions.command(name="revert")
def session_revert(id_: Id, tag: str, *, vm: Machine = None) -> None:
    """Put a session back to a saved state."""
    _ask_session(vm, {"do": "session-revert", "id": id_, "tag": tag})
    _say(f"session {id_} is back at state {tag}")


@sessions.command(name="fork")
def session_fork(id_: Id, *, vm: Machine = None, as_json: Json = False) -> None:
    """Open a second session with a copy of this one's running machine, and print its id."""
    _show_session(_ask_session(vm, {"do": "session-fork", "id": id_}), as_json=as_json)


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
    waits = _run(
        network_commands.up(_config().network, wanted, uplink=uplink, within=within, dry_run=dry_run, on_step=step)
    )
    if as_json:
        _print_json({"steps": done, "done": not dry_run, "unconfirmed": waits})
    elif not done:
        _say("nothing to do: everything is there")
    if waits:
        _say(f"is this host still reached? then type within {within:.0f} s: pbotvm-qemu net confirm")


@networks.command(name="confirm")
def net_confirm() -> None:
    """Keep an uplink in its bridge, which else is put back after a while."""
    from pbotvm_qemu import network_commands

    _say(f"{_run(network_commands.confirm())} stays in its bridge")


@networks.command(name="rollback", hidden=True)
def net_rollback(*, after: Annotated[float, typer.Option(min=0)]) -> None:
    """Put an uplink back unless it is confirmed in time: what `net up` puts into the background."""
    from pbotvm_qemu import network_commands

    _say("put back" if _run(network_commands.roll_back(after)) else "confirmed")


@networks.command(name="down")
def net_down(which: Networks = None, *, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Take networks away again: only what we made."""
    from pbotvm_qemu import network_commands

    done, step = _steps(dry_run=dry_run, as_json=as_json)
    wanted = network_commands.names(which or [])
    _run(network_commands.down(wanted, dry_run=dry_run, on_step=step))
    if as_json:
        _print_json({"steps": done, "done": not dry_run})
    elif not done:
        _say("nothing to do: there is nothing of ours")


@networks.command(name="status")
def net_status(*, as_json: Json = False) -> None:
    """Show networks, guests, the policy, and what is in the way."""
    from pbotvm_qemu import network_commands

    report = _run(network_commands.status(_config().network))
    if as_json:
        _print_json(report)
        return
    for line in network_commands.lines(report):
        typer.echo(line)


def pbot_spelling(arguments: list[str]) -> list[str]:
    """Return `arguments` with PBot's single-dash options in `exec` spelled as the parser knows them.

    The first word that is no option of ours begins the program, or the options of its compiler, and whatever follows
    is passed on as it is: `exec -lang=sh -args 'a b' echo -lang=x`. The words after `client` all belong to the request.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in ("exec", "client"):
        return arguments
    begin = arguments.index(command) + 1
    changed, rest = arguments[:begin], arguments[begin:]
    while rest and rest[0] != "--":
        name, equals, _value = rest[0].lstrip("-").partition("=")
        flag = rest[0] in ("-h", "--help") or (command == "exec" and rest[0] in ("--json", "--keep"))
        valued = command == "exec" and rest[0].startswith("-") and name in _WITH_VALUE
        if not flag and not valued:
            break
        word = rest.pop(0)
        changed.append(word if flag or word.startswith("--") else f"-{word}")
        if valued and not equals and rest:
            changed.append(rest.pop(0))
    return [*changed, *([] if not rest or rest[0] == "--" else ["--"]), *rest]


_WITH_VALUE = ("lang", "vm", "args", "arguments", "stdin", "file", "put", "get", "timeout", "output-limit", "session")


def main() -> None:
    """Run the command line and exit."""
    try:
        app(args=pbot_spelling(sys.argv[1:]), prog_name="pbotvm-qemu")
    except PbotVMError as exc:
        if "--json" in sys.argv:
            _print_json({"error": str(exc), "hint": exc.hint, "kind": exc.kind, "exit_code": exc.exit_code})
        typer.secho(f"error: {exc}", fg="red", err=True)
        if exc.hint:
            typer.secho(f"hint: {exc.hint}", dim=True, err=True)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        typer.secho("interrupted; nothing was left behind", err=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
