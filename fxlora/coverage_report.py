"""A coverage as text: a table where few ranges change, a bar for each layer where many do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxlora.coverage import Coverage, Part, Row, Tally
from fxlora.text import count, human, share_of, table

_COLUMNS = 6  # more ranges than this are drawn as one bar, a character a layer
_WIDTH = 64


def coverage_parts(c: Coverage, marks: Mapping[str, str]) -> list[str]:
    """Returns a coverage as a table; `marks` are the signs of its bars."""
    adapted, total = sum(r.adapted for r in c.rows), sum(len(r.sites) for r in c.rows)
    at = ", ".join(f"{s}={n}" for s, n in c.sizes.items())
    lines = [
        f"{c.model_class}: {adapted} of {count(total, 'linear site')} adapted, "
        f"{_percent(c.share_of_parameters)} of their parameters, {_percent(c.share_of_flops)} of "
        f"their FLOPs{f' (at {at})' if at else ''}",
        f"{marks['adapted']} adapted  {marks['partial']} partly  {marks['not']} not",
    ]
    for container in dict.fromkeys(r.container for r in c.rows):
        rows = [r for r in c.rows if r.container == container]
        lines += ["", _section(c, container, rows, marks)]
    lines += ["", _totals(c)]
    if c.unknown:
        lines.append(
            f"{count(c.unknown, 'call')} of unknown shape left out of the FLOPs: the trace ran "
            "without example inputs"
        )
    return [*lines, *(f"note: {a}" for a in c.advice)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _section(c: Coverage, container: str, rows: list[Row], marks: Mapping[str, str]) -> str:
    columns = _columns(rows)
    bar = len(columns) > _COLUMNS
    heads = (
        [_range(columns[0][0], columns[-1][-1])] if bar else [_range(x[0], x[-1]) for x in columns]
    )
    every = sorted({i for r in rows for i in r.layers})
    cells = []
    for r in rows:
        drawn = _drawn(r, columns, every if bar else None, marks)
        cells.append((r.target, "x".join(map(str, r.shape)), *drawn, *_numbers(c, r)))
        for p in r.parts:
            # What holds for the whole layer is not said again of its parts.
            own = _drawn(p, columns, every if bar else None, marks) if r.tally.partly else None
            cells.append(_part_cells(c, r, p, own or [""] * len(drawn)))
    n = len(heads) or 1
    title = container or ("outside of the layers" if len(c.rows) > len(rows) else "target")
    head = (title, "weight", *(heads or ["adapted"]), "r", "params", "FLOPs", "adapter", "note")
    if not any(row[-1] for row in cells):
        head, cells = head[:-1], [row[:-1] for row in cells]
    return table(head, cells, right=tuple(range(2 + n, 6 + n)))


def _columns(rows: list[Row]) -> list[list[int]]:
    """Returns the layers as runs in which no row changes."""
    out: list[list[int]] = []
    before: Any = None
    for i in sorted({i for r in rows for i in r.layers}):
        lists = [x for r in rows for x in (r.layers, *(p.layers for p in r.parts))]
        now = tuple(x.get(i) for x in lists)
        if out and now == before and out[-1][-1] == i - 1:
            out[-1].append(i)
        else:
            out.append([i])
        before = now
    return out


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _drawn(
    r: Row | Part, columns: list[list[int]], bar: list[int] | None, marks: Mapping[str, str]
) -> list[str]:
    """Returns the cells that say what is adapted: one a range of layers, one bar, or one word."""
    if not columns:
        return [f"{marks[r.tally.state]} {r.tally.words}"]
    if bar is not None:
        return [_bar(r, bar, marks)]
    return [_cell(r.layers.get(run[0], Tally()), len(run), marks) for run in columns]


def _cell(tally: Tally, layers: int, marks: Mapping[str, str]) -> str:
    return f"{marks[tally.state] * min(layers, 8)} {tally.words}" if tally.total else ""


def _bar(r: Row | Part, every: list[int], marks: Mapping[str, str]) -> str:
    """Returns one character for each layer; for several where there are too many."""
    step = -(-len(every) // _WIDTH)
    out = []
    for i in range(0, len(every), step):
        states = {r.layers[n].state for n in every[i : i + step] if n in r.layers}
        out.append(marks["" if not states else states.pop() if len(states) == 1 else "partial"])
    return "".join(out)


def _numbers(c: Coverage, r: Row) -> tuple[str, ...]:
    ranks = f"{r.ranks[0]}-{r.ranks[-1]}" if len(r.ranks) > 1 else "".join(map(str, r.ranks))
    return (
        ranks,
        _percent(share_of(r.parameters, c.parameters)),
        _percent(share_of(r.flops, c.flops)),
        human(r.trainable) if r.trainable else "",
        "; ".join(filter(None, ("router" if r.role == "router" else "", r.note))),
    )


def _part_cells(c: Coverage, r: Row, p: Part, drawn: list[str]) -> tuple[str, ...]:
    return (
        f"  .{p.part}",
        f"rows {p.rows}",
        *drawn,
        "",
        _percent(p.share * share_of(r.parameters, c.parameters)),
        _percent(p.share * share_of(r.flops, c.flops)),
        "",
        "",
    )


def _totals(c: Coverage) -> str:
    return (
        f"covered: {human(c.covered_parameters)} of {human(c.parameters)} parameters "
        f"({_percent(c.share_of_parameters)}), {human(c.covered_flops)} of {human(c.flops)} FLOPs "
        f"({_percent(c.share_of_flops)}); adapters: {human(c.trainable)} trainable"
    )
