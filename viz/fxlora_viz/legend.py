"""The legend of a sheet: one entry for each kind of thing that is drawn on it."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from fxlora_viz import metrics

_ROW, _GAP, _SIZE = 26.0, 24.0, 10.5


@dataclass(frozen=True)
class Legend:
    """A laid-out legend."""

    svg: str
    width: float
    height: float


def legend(graph: nx.MultiDiGraph, width: float) -> Legend:
    """Returns the legend of a view, in rows of at most `width` points."""
    x, y, widest = 0.0, 12.0, 0.0
    parts = []
    for sample, size, text in _entries(graph):
        wide = size + 7 + metrics.width(text, _SIZE)
        if x and x + wide > width:
            x, y = 0.0, y + _ROW
        parts.append(
            f'<g transform="translate({x:.1f} {y:.1f})">{sample}'
            f'<text x="{size + 7:g}" y="3.6" font-size="{_SIZE}">{text}</text></g>'
        )
        widest = max(widest, x + wide)
        x += wide + _GAP
    return Legend("".join(parts), widest, y + 14.0)


def _entries(graph: nx.MultiDiGraph) -> list[tuple[str, float, str]]:
    nodes = [d for _, d in graph.nodes(data=True)]
    edges = [d for _, _, d in graph.edges(data=True)]
    states = {d["state"] for d in nodes if d["shape_name"] == "box"}
    found: list[tuple[bool, str, float, str]] = [
        ("frozen" in states, _box("frozen"), 30, "frozen (requires_grad=False)"),
        (bool(states & {"trainable", "partly"}), _box("trainable"), 30,
         "trainable (requires_grad=True)"),
        (any(d["role"] == "lora_A" for d in nodes), _hourglass(), 34, "lora_A, lora_B: trainable"),
        (any(d["role"] == "magnitude" for d in nodes), _m(), 30,
         "DoRA: the sum is rescaled by g = m / |W + sBA|"),
        (any(d["style"] == "idle" for d in nodes), _hourglass("idle"), 34,
         "adapter that learns nothing: bypassed, never called, cut or dead"),
        (any(d["matched"] for d in nodes), _box("trainable fx_matched"), 30, "matched call site"),
        (any(d["style"] == "again" for d in nodes), _box("again"), 30, "equal to blocks drawn above"),
        (any(d["style"] == "op" for d in nodes), _box("op"), 30, "operation, no parameters"),
        (any(d["style"] == "added" for d in edges), _line("added"), 30, "added by the rewrite"),
        (any(d["style"] == "quiet" for d in edges), _line("quiet"), 30, "no gradient reaches it"),
        (any(d["dashed"] for d in edges), _line("kept fx_skip"), 30, "residual"),
    ]  # fmt: skip
    return [(sample, size, text) for shown, sample, size, text in found if shown]


def _box(style: str) -> str:
    return f'<g class="fx_{style}"><rect class="s" x="1" y="-8" width="28" height="16" rx="5"/></g>'


def _m() -> str:
    text = '<text class="t m" x="15" y="4" font-size="11">m</text>'
    return _box("trainable").replace("</g>", f"{text}</g>")


def _hourglass(style: str = "trainable") -> str:
    return f'<g class="fx_{style}"><polygon class="s" points="1,-8 33,-8 27,8 7,8"/></g>'


def _line(style: str) -> str:
    head = '<polygon points="30,0 24,-2.3 24,2.3"/>'
    return f'<g class="fx_edge fx_{style}"><path d="M0,0H24"/>{head}</g>'
