"""A drawing: the graphs it shows, and its forms as networkx graph, DOT, SVG and files."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import graphviz
import networkx as nx
from torch.fx import GraphModule

from fxlora.facts import check_plain
from fxlora.writing import write_whole
from fxlora_viz import files, formats
from fxlora_viz.brief import brief
from fxlora_viz.condense import condense
from fxlora_viz.dot import dot_text
from fxlora_viz.engines import EngineError, run_engine
from fxlora_viz.explorer import page
from fxlora_viz.explorer_data import Sheet
from fxlora_viz.focus import focus_on
from fxlora_viz.fold import fold
from fxlora_viz.layout import Layout, read_layout
from fxlora_viz.marks import Marks
from fxlora_viz.svg import inline_svg_text, svg_text
from fxlora_viz.view import view


class TooLargeError(ValueError):
    """A drawing with more nodes than anybody reads or any engine lays out in reasonable time."""


@dataclass(frozen=True)
class Options:
    """How to draw.

    Attributes:
        depth: how many levels of modules to open; None opens all.
        fold: draw a run of equal blocks once.
        focus: path of a module; only that module and what it reads and feeds is drawn.
        detail: "auto" sums up what no adapter touches where a sheet would have more nodes than one
            reads; "full" does not.
        direction: "TB" (downwards) or "LR" (to the right).
        theme: "auto" (the reader's scheme), "light" or "dark".
        engine: "auto", "dot" or "wasi".
        timeout: seconds an engine may take.
        max_nodes: the cap on drawn nodes.
    """

    depth: int | None = None
    fold: bool = True
    focus: str = ""
    detail: str = "auto"
    direction: str = "TB"
    theme: str = "auto"
    engine: str = "auto"
    timeout: float = 60.0
    max_nodes: int = 1500

    def __post_init__(self) -> None:
        """Refuses a value that no option takes."""
        for name, allowed in (
            ("detail", ("auto", "full")),
            ("direction", ("TB", "LR")),
            ("theme", ("auto", "light", "dark")),
            ("engine", ("auto", "dot", "wasi")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth={self.depth}: at least one level is drawn; None opens all")


class Drawing:
    """One sheet: a graph, or a graph before and after a rewrite.

    Shows itself in a notebook; `save` writes it to a file.

    Attributes:
        graph: the networkx graph of what is drawn, with every size, class and label.
        options: how it is drawn.
    """

    def __init__(
        self, graph: nx.MultiDiGraph, options: Options, sheet: Sheet | None = None
    ) -> None:
        """Keeps a view, how to draw it, and what it was made of (for the explorer)."""
        self.graph = graph
        self.options = options
        self._sheet = sheet

    @property
    def dot(self) -> str:
        """The DOT text; needs no engine."""
        return dot_text(self.graph, self.options.direction)

    @property
    def source(self) -> graphviz.Source:
        """The DOT text as the graphviz package's own object, to render, pipe or view with it."""
        return graphviz.Source(self.dot)

    @cached_property
    def layout(self) -> Layout:
        """Where everything goes, as an engine decided."""
        bare = dot_text(self.graph, self.options.direction, bare=True)
        text = run_engine(bare, "json0", self.options.engine, self.options.timeout)
        return read_layout(text, mirrored=self.options.direction == "LR")

    @cached_property
    def svg(self) -> str:
        """The SVG text."""
        return svg_text(self.graph, self.layout, self.options.theme)

    @cached_property
    def inline_svg(self) -> str:
        """The SVG text for a page that holds others, such as a notebook; shares no id or style."""
        return inline_svg_text(self.graph, self.layout, self.options.theme)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the drawing to a file, whole or not at all; see `fxlora.writing.write_whole`.

        Args:
            path: ends in .svg, .dot, .png, .pdf, .html, .graphml (networkx), .mmd (Mermaid) or
                .json (Model Explorer).

        Returns:
            The path.

        Raises:
            ValueError: for another suffix.
            EngineError: when no layout engine is installed; only .svg, .png and .pdf need one.
            OSError: when the file cannot be written.
        """
        suffix = files.suffix_of(path)
        return write_whole(path, self._content(suffix))

    def _content(self, suffix: str) -> bytes:
        if suffix == ".dot":
            return self.dot.encode("utf-8")
        if suffix == ".svg":
            return self.svg.encode("utf-8")
        if suffix == ".graphml":
            return formats.graphml(self.graph)
        if suffix == ".mmd":
            return formats.mermaid(self.graph, self.options.direction).encode("utf-8")
        if suffix == ".json":
            return formats.model_explorer_text(self.graph, self._title()).encode("utf-8")
        if suffix == ".html":
            return self._html().encode("utf-8")
        # A picture on paper has no reader's scheme to follow.
        mode = "dark" if self.options.theme == "dark" else "light"
        return files.convert(svg_text(self.graph, self.layout, mode), suffix)

    def _html(self) -> str:
        if self._sheet is None:
            return files.html_page(self.svg, escape(self._title()))
        # There, the reader closes what is too much.
        full = Drawing(view(list(self._sheet.panels)), self.options)
        try:
            still = full.svg
        except EngineError:
            still = ""  # the page brings an engine of its own
        return page(
            full.graph,
            self._sheet,
            self._title(),
            still,
            self.options.direction,
            self.options.theme,
        )

    def _title(self) -> str:
        panels = [d for d in self.graph.graph["boxes"].values() if d["kind"] == "panel"]
        return " / ".join(f"{d['label']}: {d['note']}" for d in panels)

    def _repr_svg_(self) -> str | None:
        try:
            return self.inline_svg
        except EngineError:
            return None

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        try:
            return {"image/svg+xml": self.inline_svg, "text/plain": repr(self)}
        except EngineError as error:  # the notebook shows text then, and what to do about it
            return {"text/plain": f"{self!r}\n{error}"}

    def __repr__(self) -> str:
        """Says what is drawn; lays nothing out."""
        return f"<Drawing of {self.graph.number_of_nodes()} nodes: {self._title()}>"


def draw(
    before: GraphModule,
    after: GraphModule | None = None,
    options: Options | None = None,
    **changes: Any,
) -> Drawing:
    """Draws a traced graph, or a traced graph beside its rewrite.

    Args:
        before: what `fxlora.trace` returned (or, alone, what `fxlora.rewrite` returned).
        after: what `fxlora.rewrite` made of it.
        options: how to draw.
        **changes: single options by name, such as `depth=2` or `fold=False`.

    Returns:
        The drawing; nothing is laid out until it is shown or saved.

    Raises:
        TypeError: for a graph that is none, or an option that does not exist.
        TooLargeError: for a drawing nobody could read; says what to do.
        UnsupportedError: for a graph that was optimized.

    >>> import torch, fxlora, fxlora_viz
    >>> traced = fxlora.trace(torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU()))
    >>> fxlora_viz.draw(traced)
    <Drawing of 4 nodes: Sequential: 220 params, all trainable>
    """
    chosen = _options(options, changes)
    graphs = [before] if after is None else [before, after]
    for graph in graphs:
        if not isinstance(graph, GraphModule):
            raise TypeError(
                f"draw takes the graphs of fxlora.trace and fxlora.rewrite, not a "
                f"{type(graph).__name__}: trace it first with fxlora.trace(model, args, kwargs)"
            )
        check_plain(graph, "a drawing")
    marks = [Marks(g) for g in graphs]
    panels = [m.on(condense(g, chosen.depth, m.cuts)) for g, m in zip(graphs, marks, strict=True)]
    if chosen.focus:
        panels = [focus_on(p, chosen.focus) for p in panels]
    whole, panels = panels, fold(panels, chosen.fold)
    sheet = Sheet(tuple(graphs), tuple(whole), tuple(panels), marks[-1].effects)
    if chosen.detail == "auto" and chosen.fold and not chosen.focus:
        panels = brief(panels)
    count = sum(len(p.items) for p in panels)
    if count > chosen.max_nodes:
        raise TooLargeError(_too_large(count, chosen))
    return Drawing(view(panels), chosen, sheet)


def _options(options: Options | None, changes: dict[str, Any]) -> Options:
    names = [f.name for f in fields(Options)]
    for name in changes:
        if name not in names:
            raise TypeError(f"draw has no option {name!r}; it takes {', '.join(names)}")
    return replace(options or Options(), **changes)


def _too_large(count: int, options: Options) -> str:
    ways = [] if options.fold else ["leave fold=True, which draws equal blocks once"]
    ways += ["open fewer levels with depth=2", "draw a part with focus='path.of.a.module'"]
    return (
        f"this drawing would have {count} nodes, more than max_nodes={options.max_nodes}: "
        f"{', or '.join(ways)}"
    )
