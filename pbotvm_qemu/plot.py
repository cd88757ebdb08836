"""The bench report as a picture, drawn by pygal, whose only importer this is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pbotvm_qemu.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

_BARS = {
    "boot": "cold boot",
    "virsh_revert": "virsh snapshot-revert",
    "restart": "new QEMU, -loadvm",
    "loadvm": "snapshot-load",
    "clone": "clone",
    "clone_spawned": "clone, QEMU spawned ahead",
    "hand_out": "clone from the pool",
}


def write(report: dict[str, object], target: Path) -> None:
    """Write how long each way to a clean, running guest takes as an SVG file.

    Raises HostError when pygal is not installed or the file cannot be written.
    """
    try:
        import pygal  # noqa: PLC0415 - only for a picture
    except ImportError as exc:
        raise HostError("the Python package pygal is not installed", hint="pip install 'pbotvm-qemu[plot]'") from exc
    figures, host = report["figures"], report["host"]
    assert isinstance(figures, dict)
    assert isinstance(host, dict)
    chart = pygal.HorizontalBar(
        title=f"Way to a clean, running guest, median in ms ({host['accelerator'].upper()}, {host['guest_memory']} guest)",
        logarithmic=True,
        show_legend=False,
        print_values=True,
        value_formatter=lambda value: f"{value:g}",
        x_labels=[label for name, label in reversed(_BARS.items()) if _has(figures, name)],
        js=(),
        width=900,
        height=420,
        style=pygal.style.CleanStyle(value_font_size=14, label_font_size=13),
    )
    values = [round(figures[name]["median"] * 1000, 1) for name in reversed(_BARS) if _has(figures, name)]
    chart.add("ms", values)
    try:
        target.write_bytes(chart.render(disable_xml_declaration=False) + b"\n")
    except OSError as exc:
        raise HostError(f"cannot write {target}: {exc.strerror}", hint="choose another file for --plot") from exc


def _has(figures: dict[str, dict[str, object]], name: str) -> bool:
    return bool(figures.get(name, {}).get("n"))
