"""Commands that measure."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from pbotvm_qemu.cli.base import Json, Name, app, config_for, print_json, say, until_done


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

    report = until_done(benchmark.measure(config_for(name), rounds, say, growth=growth, domain=virsh))
    if plot:
        plots.write(report, Path(plot))
    if as_json:
        print_json(report)
    else:
        for line in benchmark.table(report):
            typer.echo(line)


def _bench_net(name: str | None, *, as_json: bool) -> None:
    from pbotvm_qemu import bench_net

    report = until_done(bench_net.measure(config_for(name), say))
    if as_json:
        print_json({"networks": report})
    else:
        for line in bench_net.table(report):
            typer.echo(line)


@app.command(name="bench-net", hidden=True)
def bench_net_inside(name: str, world: str) -> None:
    """Measure networks in the namespace that `bench --net` made."""
    from pbotvm_qemu import bench_net

    print_json(until_done(bench_net.inside(config_for(name), world)))
