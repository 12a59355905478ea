"""Plain text: tables and counts."""

from __future__ import annotations

import re
from collections.abc import Sequence


def count(n: int, noun: str) -> str:
    """Returns a count with its noun.

    >>> count(1, "site"), count(2, "site")
    ('1 site', '2 sites')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def human(n: int) -> str:
    """Returns a large number the way a reader says it.

    >>> human(999), human(8_030_261_248)
    ('999', '8.03 B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.{2 if unit == 'B' else 1}f} {unit}"
    return str(n)


class Table(str):
    """A table as text that still knows its cells, for who shows it as something else.

    Attributes:
        head: the column titles.
        rows: the cells.
        right: the columns that align right.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int]

    def indented(self) -> Table:
        """Returns the table with its text two spaces further in."""
        out = Table("\n".join("  " + line for line in self.split("\n")))
        out.head, out.rows, out.right = self.head, self.rows, self.right
        return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """Returns aligned columns under a rule.

    Args:
        head: the column titles.
        rows: the cells, as text.
        right: the columns that align right.

    >>> print(table(("name", "r"), [("q_proj", "8")], right=(1,)))
    name    r
    ------  -
    q_proj  8
    """
    cells = [tuple(head), *(tuple(r) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        out = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(out).rstrip()

    rule = "  ".join("-" * w for w in widths)
    out = Table("\n".join([line(cells[0]), rule, *map(line, cells[1:])]))
    out.head, out.rows, out.right = cells[0], tuple(cells[1:]), frozenset(right)
    return out


def share_of(part: float, whole: float) -> float:
    """Returns a share; of nothing, none."""
    return part / whole if whole else 0.0


def open_indices(name: str) -> str:
    """Returns a name with its layer indices left open.

    >>> open_indices("model.layers.3.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def open_varied(names: Sequence[str]) -> str:
    """Returns names that differ in their indices as one, with those left open that differ.

    >>> open_varied(["layers.0.blocks.0.q", "layers.0.blocks.1.q"])
    'layers.0.blocks.*.q'
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(c[0] if len(set(c)) == 1 else "*" for c in columns)


def ranges(indices: list[int]) -> str:
    """Returns indices as ranges.

    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    out: list[list[int]] = []
    for i in sorted(indices):
        if out and out[-1][-1] == i - 1:
            out[-1].append(i)
        else:
            out.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in out)
