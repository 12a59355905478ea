"""The explorer: a drawing as one HTML file that opens, closes, searches and compares; no network."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any
from xml.sax.saxutils import escape

import networkx as nx

from fxlora_viz import theme
from fxlora_viz.explorer_data import Sheet, explorer_data

# In this order they make one script; each file says in its first line what it is for.
SCRIPTS = (
    "model", "state", "query", "dot", "layout", "render", "stage", "tree", "panel", "table",
    "export", "keys", "main",
)  # fmt: skip
_CHROME = {
    "ground": "#F5F8FB", "sheet": "#FFFFFF", "ink": "#1B2430", "dim": "#5B6675", "line": "#D3DAE3",
    "accent": "#1F5A96", "blue": "#4E79A7", "hot": "#B04A00", "warm": "#FFE3C7", "tint": "#E1EBF7",
}  # fmt: skip


def page(
    graph: nx.MultiDiGraph, sheet: Sheet, title: str, still: str, direction: str, mode: str
) -> str:
    """Returns the page.

    Args:
        graph: the view of the sheet.
        sheet: what the view was made of.
        title: of the page.
        still: the drawing as SVG, which is what a reader without scripts sees; "" for none.
        direction: "TB" or "LR".
        mode: the theme: "auto", "light" or "dark".
    """
    data = explorer_data(graph, sheet, direction, mode)
    parts = {
        "title": escape(title),
        "style": _colours() + _asset("explorer", "explorer.css"),
        "still": still
        or "<p>This picture needs scripts: no layout engine was there to draw it.</p>",
        "data": embedded(data),
        "engine": _asset("viz-js", "viz-global.js"),
        "script": script(),
    }
    text = _asset("explorer", "page.html")
    # Cut at the marks first: what is put in may hold marks of its own.
    pieces = text.split("%%")
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))


def script() -> str:
    """Returns the page's own script, of all its files, without what only its authors read."""
    lines = [
        line.strip() for name in SCRIPTS for line in _asset("explorer", f"{name}.js").splitlines()
    ]
    kept = [line for line in lines if line and not line.startswith("//")]
    return '"use strict";\n(() => {\n' + "\n".join(kept) + "\n})();\n"


def embedded(data: Any) -> str:
    r"""Returns data as JSON that no HTML parser can take for anything else.

    >>> embedded(["</script>", "a & b"])
    '["\\u003c/script\\u003e","a \\u0026 b"]'
    """
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _asset(folder: str, name: str) -> str:
    place = resources.files("fxlora_viz") / "assets" / folder / name
    # Read as bytes: a text mode would turn the engine's own line endings around.
    return place.read_bytes().decode("utf-8")


def _colours() -> str:
    """Returns the page's colours as CSS variables, from the table the drawings use."""
    light = "".join(f"--{k}:{v};" for k, v in _CHROME.items())
    dark = "".join(f"--{k}:{theme.DARK[v]};" for k, v in _CHROME.items())
    light, dark = f"color-scheme:light;{light}", f"color-scheme:dark;{dark}"
    return (
        f":root{{{light}--font:{theme.FONT}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f':root[data-theme="light"]{{{light}}}:root[data-theme="dark"]{{{dark}}}\n'
    )
