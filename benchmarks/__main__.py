"""The command line: which groups to run, where the JSON goes, what the docs page is made from."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.record import Case, Run, changes, joined, rank, read

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LATEST = RESULTS / "latest.json"
PICTURE = "benchmarks.svg"
GROUPS = ("analysis", "drawing", "run", "gpu", "compile", "saved", "startup")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what was asked for; returns the exit code."""
    asked = _parser().parse_args(arguments)
    unknown = [g for g in asked.groups if g not in GROUPS]
    if unknown:
        print(f"no group {unknown[0]!r}; there are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    if asked.page:
        publish(read(asked.json or LATEST))
        return 0
    if importlib.util.find_spec("matplotlib") is None:  # said now, not after half an hour
        print("the plot needs matplotlib: pip install 'fxlora[bench]'", file=sys.stderr)
        return 2
    found = measure(asked.groups or list(GROUPS), quick=asked.quick)
    target = asked.json or (HERE.parent / "out" / "benchmarks.json" if asked.quick else LATEST)
    if asked.groups and target.exists():
        found = joined(read(target), found)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(found.to_json(), encoding="utf-8")
    from benchmarks import plot, tables

    text = tables.page(found, target.with_suffix(".svg").name)
    (target.with_suffix(".md")).write_text(text, encoding="utf-8") if asked.quick else None
    plot.save(found, target.with_suffix(".svg"))
    print(tables.body(found))
    print(f"{target} {target.with_suffix('.svg')}")
    if target == LATEST:
        publish(found)
    if asked.against:
        print(compared(read(asked.against), found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all")
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds")
    parser.add_argument("--json", type=Path, help="where the numbers go, instead of results/")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="print every change")
    parser.add_argument(
        "--page", action="store_true", help="measure nothing; make docs/benchmarks.md of the JSON"
    )
    return parser


def measure(groups: Sequence[str], *, quick: bool) -> Run:
    """Runs groups one after the other, in this process with one thread."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import torch

    from benchmarks.machine import machine, versions

    torch.set_num_threads(1)
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(stop, signal.default_int_handler)
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {what}", file=sys.stderr, flush=True)

    cases: list[Case] = []
    lines = [] if torch.cuda.is_available() else ["No GPU was there."]
    try:
        for group in GROUPS:
            if group in groups:
                for case in _runner(group)(quick, say):
                    cases.append(case)  # one by one: what was measured outlives an interrupt
    except KeyboardInterrupt:
        lines.append("Stopped by hand before the end.")
    cases.sort(key=lambda c: rank(c.group))
    return Run(
        date=datetime.date.today().isoformat(),
        machine=machine(),
        versions=versions(),
        quick=quick,
        cases=tuple(cases),
        lines=tuple(lines),
    )


def _runner(group: str) -> Callable[[bool, Callable[[str], None]], Iterable[Case]]:
    from benchmarks import analysis, compiled, drawing, gpu, running, saved, startup

    return {
        "analysis": analysis.run,
        "drawing": drawing.run,
        "run": running.run,
        "gpu": gpu.run,
        "compile": compiled.run,
        "saved": saved.run,
        "startup": startup.run,
    }[group]


def publish(found: Run) -> None:
    """Writes the docs page and its plot."""
    from benchmarks import plot, tables

    docs = HERE.parent / "docs"
    plot.save(found, docs / PICTURE)
    page = docs / "benchmarks.md"
    page.write_text(tables.page(found, PICTURE), encoding="utf-8")
    print(page)


def compared(old: Run, new: Run) -> str:
    """Returns every ratio then and now, and by how much it moved."""
    lines = [f"then {old.date}, now {new.date}"]
    for name, before, after in changes(old, new):
        if before is None or after is None:
            lines.append(f"{'new' if before is None else 'gone':>8}  {name}")
        else:
            lines.append(f"{after / before - 1:+8.1%}  {name}: {before:.2f} -> {after:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
