"""A run as Markdown: one section a group, one row a case, losses in bold; the docs page is this."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.record import ORDER, Case, Run

_TITLES = {
    "analysis": (
        "Analysis",
        "CPU time on Llama shapes without weights (meta device), every linear layer adapted. The "
        "floor is one forward pass without values. `compare` proves the rewritten graph against "
        "peft's, so it is set against wrapping and tracing peft's model. torchinfo and torchview "
        "look at the base without LoRA, torchview at its default depth and without layout; export "
        "is the non-strict one.",
    ),
    "growth": (
        "Growth with depth",
        "One width, two depths; the ratio is the deep one over the shallow one, so here less is "
        "better and nothing is a loss.",
    ),
    "peak": (
        "Peak memory of the analysis",
        "The most a process of its own held above what the built model holds.",
    ),
    "drawing": (
        "Drawing",
        "From the model to an SVG file, each in a process of its own, stopped at so many seconds of CPU. The "
        "others draw peft's wrapped model, ours the model before and after on one sheet; wrapping, "
        "tracing and rewriting are in the time. Llama-8B is on meta. FxGraphDrawer gets an "
        "exported graph, because symbolic tracing follows neither peft nor transformers. A small "
        "count of nodes is not a loss or a gain by itself: torchview's default depth ends at "
        "peft's wrapper.",
    ),
    "forward": (
        "Forward",
        "Milliseconds of CPU time, without gradients. The floors are the frozen base, and the two "
        "thin products of every adapter by themselves, which no way of computing the same bits can "
        "leave out. `recovered` is the share of peft's time above the base that ours does not spend, "
        "and `of what can be` its share of the time above both floors; they are left out where peft "
        "is within 2 % of the floor.",
    ),
    "step": (
        "Training step",
        "Forward, loss, backward, AdamW (fused, as in transformers' Trainer). The floors are the "
        "frozen base's forward pass; base + dx: its loss and backward pass to the first embedding "
        "(of one layer, to its input), with no optimizer; and the adapters' six thin products and "
        "their AdamW by themselves. `recovered` is reckoned from base + dx, `of what can be` from "
        "base + dx and the products.",
    ),
    "gpu": ("GPU", "Wall time after a wait for the device."),
    "compile": (
        "torch.compile",
        "Cold: a process each with an empty cache, the first step, compilers included. Then all "
        "compiled in one process, interleaved.",
    ),
    "saved": (
        "Saved for the backward pass",
        "Bytes by autograd's own hooks, every storage once, parameters left out. The floor is the "
        "frozen base with dx; the ratio is of what lies above it, LoRA's own share, and beside it of "
        "the whole. In brackets behind the bytes: what lies above the floor, per token and width. "
        "`error` is the distance from fp64 in units of peft's own distance. Memory mode makes SwiGLU again as well, so of a whole Llama its share above the "
        "floor is smaller than LoRA's own; of q, k, v alone it is just that.",
    ),
    "memory mode": (
        "What memory mode costs",
        "Forward, loss and backward, without an optimizer. Below 1 is the price of saving less.",
    ),
    "frontier": (
        "The frontier",
        "Adapters in the last layers only. Gradient checkpointing as it is usually switched on "
        "asks for the embeddings' gradient, which the step does not need. Against peft without "
        "checkpointing, the frontier graph pays for what it makes again.",
    ),
    "startup": (
        "Start-up",
        "Seconds of CPU of whole processes, from nothing to the printed plan. What it is set against "
        "are floors, the imports it cannot avoid: no ratio here can reach 1, and none is a loss.",
    ),
}

_HEAD = """\
# Benchmarks

Made by `bash benchmarks/run.sh` from `benchmarks/results/latest.json`; a test holds that this page
is that file's. `--quick` is the short form, `--against OLD.json` prints what moved.
"""

_HOW = """\
Peer and ours are measured in one run, in turn and back (A B C C B A, in another order in every
round), with the same base weights and adapters, B not zero, the same mask branch, loss and optimizer.
Freed memory stays with the process (`run.sh` asks malloc for it), because fetching it anew costs more
than a small kernel, and whom it hits is chance. A ratio is peer over ours: **above 1 ours is faster
or smaller**, and a ratio below 0.99 is a loss and is set in bold. Of each ratio: the median of the
rounds in CPU time, then the ratio of the two minima, then the median in wall time. Where the three
disagree, the row is noise. One thread.
"""


def page(found: Run, picture: str) -> str:
    """Returns the docs page."""
    on = ", ".join(f"{k} {v}" for k, v in found.machine.items())
    with_ = ", ".join(f"{k} {v}" for k, v in found.versions.items())
    quick = " Some or all of it in the short form." if found.quick else ""
    lines = "\n".join(found.lines)
    return "\n".join(
        [
            _HEAD,
            f"{found.date}, on two shared cores: {on}. {with_}.{quick} {lines}".rstrip(),
            "",
            _HOW,
            f"![Every ratio, by group]({picture})",
            "",
            _losses(found),
            "",
            body(found),
        ]
    )


def _losses(found: Run) -> str:
    ratios = [r for c in found.cases if c.group not in _NO_LOSS for r in c.ratios]
    lost = sum(r["median"] < _LOSS for r in ratios)
    absent = [g for g in ORDER if g != "gpu" and not any(c.group == g for c in found.cases)]
    more = f" Not measured in this file: {', '.join(absent)}." if absent else ""
    return f"{len(ratios)} ratios; {lost} of them are losses.{more}"


_LOSS = 0.99
_COLUMNS = ("bits", "error")  # notes that are columns
_NO_LOSS = ("growth", "startup")


def body(found: Run) -> str:
    """Returns the tables alone."""
    parts = []
    for group in dict.fromkeys([*ORDER, *(c.group for c in found.cases)]):
        cases = [c for c in found.cases if c.group == group]
        if not cases:
            continue
        title, text = _TITLES.get(group, (group, ""))
        parts += [f"## {title}", "", *([_wrapped(text), ""] if text else [])]
        parts += [*_TABLES.get(group, _wide)(cases), ""]
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(head), _row(["---", *["---:"] * (len(head) - 1)]), *(_row(r) for r in rows)]


def _wide(cases: list[Case]) -> list[str]:
    """One row a case, one column a contender, one column a ratio."""
    names = list(dict.fromkeys(n for c in cases for n in c.values))
    pairs = list(dict.fromkeys((r["ours"], r["peer"]) for c in cases for r in c.ratios))
    notes = list(dict.fromkeys(k for c in cases for k in c.notes if k.startswith(_COLUMNS)))
    head = ["case", *(_column(n, cases) for n in names)]
    head += [f"{ours} against {peer}" for ours, peer in pairs]
    head += [": ".join(reversed(n.split(", ", 1))) for n in notes]
    rows = []
    for c in cases:
        cells = [_value(c, c.values.get(n)) for n in names]
        cells += [_ratio(c, ours, peer) for ours, peer in pairs]
        rows.append([c.name, *cells, *(c.notes.get(n, "") for n in notes)])
    return [*_table(head, rows), *_remarks(cases)]


def _column(name: str, cases: list[Case]) -> str:
    return f"*{name}*" if any(name in c.floors for c in cases) else name


def _value(case: Case, value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    if "failed" in value:
        return str(value["failed"])
    more = f" ({value['own']:.1f})" if "own" in value else ""
    return amount(value["median"], case.unit) + more


def amount(number: float, unit: str) -> str:
    """Returns a number with the unit that reads best.

    >>> amount(0.00123, "s"), amount(2.5, "s"), amount(3 * 2**20, "bytes")
    ('1.23 ms', '2.50 s', '3.0 MiB')
    """
    if unit == "s":
        return f"{number * 1000:.3g} ms" if number < 1 else f"{number:.2f} s"
    if unit == "bytes":
        return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"
    return f"{number:.1f}"


def _ratio(case: Case, ours: str, peer: str) -> str:
    for r in case.ratios:
        if (r["ours"], r["peer"]) == (ours, peer):
            text = figure(r["median"], loss=case.group not in _NO_LOSS)
            more = [f"{r[k]:.2f}" for k in ("best", "wall") if r.get(k) is not None]
            text += f" ({', '.join(more)})" if more else ""
            if r.get("whole") is not None:
                text += f" (whole {r['whole']:.2f})"
            if r.get("recovered") is not None:
                text += f"; {r['recovered']:.0%} recovered"
                if r.get("avoidable") is not None:
                    text += f", {r['avoidable']:.0%} of what can be"
            return text
    return ""


def figure(ratio: float, *, loss: bool = True) -> str:
    """Returns a ratio, a loss in bold.

    >>> figure(1.256), figure(0.9), figure(0.9, loss=False), figure(31.4)
    ('1.26', '**0.90**', '0.90', '31')
    """
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    return f"**{text}**" if loss and ratio < _LOSS else text


def _remarks(cases: list[Case]) -> list[str]:
    """Notes that are no column of their own, as a list below the table."""
    found = [
        f"- {c.name}: {k}: {v}"
        for c in cases
        for k, v in c.notes.items()
        if not k.startswith(_COLUMNS)
    ]
    return ["", *found] if found else []


def _tall(cases: list[Case]) -> list[str]:
    """One row a contender, one column a case: for few cases with many contenders."""
    names = list(dict.fromkeys(n for c in cases for n in c.values))
    rows = [[_column(n, cases), *(_value(c, c.values.get(n)) for c in cases)] for n in names]
    found = _table(["", *(c.name for c in cases)], rows)
    pairs = list(dict.fromkeys((r["ours"], r["peer"]) for c in cases for r in c.ratios))
    ratios = [[f"{a} against {b}", *(_ratio(c, a, b) for c in cases)] for a, b in pairs]
    if ratios:
        found += ["", *_table(["ratio", *(c.name for c in cases)], ratios)]
    return [*found, *_remarks(cases)]


def _drawn(cases: list[Case]) -> list[str]:
    """One row a drawer and model, with what the picture is like."""
    head = ["model", "drawer", "CPU", "wall", "nodes", "canvas, pt", "kB", "against it"]
    rows = []
    for c in cases:
        for name, v in c.values.items():
            if "failed" in v:
                rows.append([c.name, name, v["failed"].replace("|", "/"), *[""] * 5])
                continue
            rows.append(
                [
                    c.name,
                    name,
                    f"{v['median']:.2f} s",
                    f"{v['wall']:.2f} s",
                    f"{v['nodes']:,}",
                    f"{v['width']:,.0f} × {v['height']:,.0f}",
                    f"{v['bytes'] / 1000:,.0f}",
                    next((figure(r["median"]) for r in c.ratios if r["peer"] == name), ""),
                ]
            )
    table = _table(head, rows)
    table[1] = _row(["---", "---", *["---:"] * 6])
    return table


_TABLES: dict[str, Callable[[list[Case]], list[str]]] = {
    "analysis": _tall,
    "growth": _tall,
    "peak": _tall,
    "drawing": _drawn,
    "compile": _tall,
    "startup": _tall,
}
