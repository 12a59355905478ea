"""What prints as lines and tables, as HTML: how fxlora's values show themselves in a notebook."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import Any

from fxlora.text import Table


class Printed:
    """A value that prints as lines and tables, and shows the same in a notebook.

    A class says its parts once, in `_parts`: lines of text, and `fxlora.text.Table`s.
    """

    __slots__ = ()

    def _parts(self) -> Iterable[str]:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(self._parts())

    def _repr_html_(self) -> str:
        return html(self._parts())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # Both at once: left to itself IPython would add a repr of every site as the plain text.
        return {"text/plain": _sendable(str(self)), "text/html": self._repr_html_()}


def html(parts: Iterable[str]) -> str:
    """Returns lines and tables as HTML that brings no colour or font size of its own.

    >>> html(["2 sites", "warning: <none>"])
    '<div><p>2 sites</p><p><strong>warning:</strong> &lt;none&gt;</p></div>'
    """
    return f"<div>{''.join(_blocks(parts))}</div>"


def _blocks(parts: Iterable[str]) -> Iterator[str]:
    said = ""  # the line above a table names it
    for tables, some in groupby(parts, lambda p: isinstance(p, Table)):
        if tables:
            yield from (_table(t, said) for t in some if isinstance(t, Table))
            continue
        lines = "\n".join(some).split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), said)
        for blank, block in groupby(lines, lambda line: not line):
            if not blank:
                yield from _text(list(block))


def _text(lines: list[str]) -> Iterator[str]:
    if any(line.startswith(" ") for line in lines):
        # Spaces that place things: every letter as wide as the next, and a long line still wraps.
        style = "font-family:monospace;white-space:pre-wrap"
        yield f'<pre style="{style}">{_safe(chr(10).join(lines))}</pre>'
        return
    for line in lines:
        word, colon, rest = line.partition(": ")
        if colon and word in ("warning", "error", "note"):
            yield f"<p><strong>{word}:</strong> {_safe(rest)}</p>"
        else:
            yield f"<p>{_safe(line)}</p>"


def _table(table: Table, name: str) -> str:
    head = "".join(_cell(t, i, table, "col") for i, t in enumerate(table.head))
    rows = (
        "".join(_cell(t, i, table, "row" if i == 0 else "") for i, t in enumerate(row))
        for row in table.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    label = f' aria-label="{_safe(name)}"' if name else ""
    # A wide table scrolls by itself, by keyboard too, and not the whole notebook.
    return (
        f'<div style="overflow-x:auto" tabindex="0"><table{label}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, column: int, table: Table, scope: str) -> str:
    # Said on every cell: notebooks align cells right by a rule that an outer style cannot undo.
    style = f'style="text-align:{"right" if column in table.right else "left"}"'
    bare = text.lstrip(" ")
    inner = "\u00a0" * (len(text) - len(bare)) + _safe(bare)
    if not scope or not text:
        return f"<td {style}>{inner}</td>"  # a heading that says nothing is none
    weight = "" if scope == "col" else ";font-weight:normal"
    return f'<th scope="{scope}" {style[:-1]}{weight}">{inner}</th>'


def _safe(text: str) -> str:
    return escape(_sendable(text))


def _sendable(text: str) -> str:
    """Returns a text a notebook can store: no half of a surrogate pair, no control character."""
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text
    )
