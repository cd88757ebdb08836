"""What `scripts/fuzz` runs: libFuzzer, through atheris, on each target in a process of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from pbotvm_qemu import paths

TOP = Path(__file__).resolve().parents[2]
LENGTH = 4096  # bytes of the longest input
SLOW = 10  # seconds for one input until it counts as a hang
MEMORY = 1024  # MiB of a process until it counts as a leak
_STAT = re.compile(r"^stat::(\w+): +(\d+)", re.MULTILINE)


def fuzz_one(name: str, arguments: list[str]) -> None:
    """Run libFuzzer on target `name` in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["pbotvm_qemu"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    report = Path(os.environ["PBOTVM_FUZZ_REPORT"])
    slowest = 0.0

    def feed(data: bytes) -> None:
        nonlocal slowest
        begin = time.perf_counter()
        target.feed(data)
        took = time.perf_counter() - begin
        if took > slowest:  # written at once: libFuzzer ends the process without a word to Python
            slowest = took
            new = report.with_suffix(".new")
            new.write_text(json.dumps([took, len(data)]))
            new.replace(report)

    atheris.Setup([sys.argv[0], *arguments], feed)
    atheris.Fuzz()


def reached(name: str, corpus: Path) -> dict[str, tuple[int, int]]:
    """Return, for each of our modules, the lines that the corpus reaches inside functions, and how many there are."""
    code = (
        "import sys, json; from pathlib import Path; from tests.fuzz.lines import count;"
        "print(json.dumps(count(sys.argv[1], Path(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(corpus)], cwd=TOP, capture_output=True, check=True, timeout=600
    )
    return {module: (lines[0], lines[1]) for module, lines in json.loads(done.stdout).items()}


def fuzz(name: str, runs: int) -> bool:
    """Fuzz target `name`, print its figures, and tell whether nothing was found."""
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus = paths.cache_dir() / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    report = corpus.parent / f"{name}.json"
    report.unlink(missing_ok=True)
    argv = [
        sys.executable, "-m", "tests.fuzz", "--in-process", name, f"-runs={runs}", f"-max_len={LENGTH}",
        f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY}", "-print_final_stats=1", "-verbosity=1",
        f"-artifact_prefix={corpus.parent}/{name}-", str(corpus),
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(
        argv, cwd=TOP, env=os.environ | {"PBOTVM_FUZZ_REPORT": str(report)}, capture_output=True, text=True, check=False
    )
    took = time.monotonic() - begin
    stats = {key: int(value) for key, value in _STAT.findall(done.stderr)}
    if done.returncode or not stats.get("number_of_executed_units"):
        sys.stdout.write(done.stdout[-4000:] + done.stderr[-6000:])
        print(f"{name}: ended with {done.returncode}; the input is named above, and is in {corpus.parent}")
        return False
    edges = re.findall(r"\bcov: (\d+)", done.stderr)
    slowest, length = json.loads(report.read_text())
    lines = reached(name, corpus)
    print(
        f"{name} ({target.side}): {stats['number_of_executed_units']} inputs in {took:.0f} s, {len(list(corpus.iterdir()))} kept, "
        f"{edges[-1] if edges else '?'} edges, at most {stats['peak_rss_mb']} MiB, "
        f"the longest took {slowest * 1000:.1f} ms ({length} bytes)"
    )
    print(
        "    lines reached: " + ", ".join(f"{module} {got}/{there}" for module, (got, there) in lines.items()),
        flush=True,
    )
    return True


def main() -> int:
    """Fuzz the targets that are named, or all."""
    if sys.argv[1:2] == ["--in-process"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
        return 0
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("--runs", type=int, default=300_000, help="inputs for each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(TARGETS)}; default: all")
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    passed = [fuzz(name, options.runs) for name in options.targets or TARGETS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
