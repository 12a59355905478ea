"""Hostile names in pictures, drawn at random: every format stays well formed, and nothing runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fxlora_viz
import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

import fxlora
from fxlora.facts import KEY, Frame, Source

SVG = "{http://www.w3.org/2000/svg}"
BROWSER = os.environ.get("FXLORA_BROWSER", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_engine = pytest.mark.skipif(
    not fxlora_viz.available_engines(), reason="no layout engine: pip install fxlora[draw]"
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and BROWSER != "required", reason="no chromium on the PATH"
)
PIECES = [
    '"', "'", "`", "\\", "\\N", "\\G", "\\L", "\\n", "\\", "\n", "\r\n", "\t", "\x00", "\x1b[31m", "\x7f",
    "\x85", "\u2028", "<script>alert(1)</script>", "</script>", "</title>", "</style>", "</svg>", "<b>",
    "<!--", "-->", "]]>", "<![CDATA[", "<?xml?>", "&", "&amp;", "&quot;", "&#34;", "&#x0;", "&lt;b&gt;",
    "node", "edge", "graph", "subgraph", "strict", "digraph", "end", "->", "--", "{", "}", "[", "]", "|",
    ";", ":", "/", "%%", "%%data%%", "%(s)s", "{0}", "${x}", "#", "1. x", "x" * 10_000, "\u202egnp.exe",
    "\u2066", "שלום", "العربية", "名前", "e\u0301", "😀", "👩‍👩‍👧", "\ud800", "\udc00", "\ufffe",
    "\U0010ffff", " ", "", "javascript:alert(1)", "url(x)", "__proto__", "onload=alert(1)",
]  # fmt: skip
NAMES = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=5).map("".join)
EIGHT = st.lists(NAMES, min_size=8, max_size=8)
ALL_PIECES = [PIECES[i : i + 8] + PIECES[: max(0, i + 8 - len(PIECES))] for i in range(0, 80, 8)]


def named(names: list[str]) -> fxlora_viz.Drawing:
    """Returns a drawing of a graph whose every name is one of these.

    Python and fx refuse some of them in a model: they are put into what the picture reads.
    """
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0"])
    traced = fxlora.trace(model)
    graph = fxlora.rewrite(traced, config)
    a, b, c, d, e, f, g, h = names
    graph.meta[KEY].model_class = a
    for node in graph.graph.nodes:
        stack = node.meta.get("module_stack", ())
        if len(stack) > 1:
            last = stack[-1]
            node.meta["module_stack"] = (
                Frame("", a, 0),
                Frame(b, c, 0),
                Frame(f"{b}.{d}{last.path}", e, last.call),
            )
        node.meta["source"] = Source(f, 1, g)
        node.meta["shape"] = (h, 4)
        for key in ("site", "adapter"):
            if key in node.meta:
                node.meta[key] = {"site": f"{b}.{d}", "adapter": h}[key]
    return fxlora_viz.draw(graph)


def check_svg(text: str, drawing: fxlora_viz.Drawing) -> None:
    root = ET.fromstring(text.encode("utf-8"))
    tags = {e.tag.removeprefix(SVG) for e in root.iter()}
    assert tags <= {
        "svg", "title", "desc", "style", "rect", "g", "text", "tspan", "path", "polygon", "circle"
    }  # fmt: skip
    keys = {k for e in root.iter() for k in e.attrib}
    assert not [k for k in keys if k.startswith("on") or k.endswith("href")]
    nodes = [e for e in root.iter(f"{SVG}g") if "fx" in e.get("class", "").split()]
    assert len(nodes) == drawing.graph.number_of_nodes()
    shown = ["".join(next(n.iter(f"{SVG}text")).itertext()) for n in nodes]
    assert shown == [data["title"] for _, data in drawing.graph.nodes(data=True)]


def check_dot(text: str, drawing: fxlora_viz.Drawing) -> None:
    assert text.isascii() or text.encode("utf-8")
    if "dot" not in fxlora_viz.available_engines():
        return
    command = ["dot", "-Tdot_json"]
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=True)
    read = json.loads(done.stdout.decode("utf-8"))
    found = {o["name"]: o for o in read["objects"] if "nodes" not in o and "label" in o}
    nodes = dict(drawing.graph.nodes(data=True))
    assert {n for n in found if not n.startswith("cluster_")} == set(nodes)
    for name, data in nodes.items():
        label = found[name]["label"].replace("\\n", "\x01").replace("\\\\", "\\")
        for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            label = label.replace(entity, char)
        said = "\x01".join((data["title"], *data["lines"]))
        # A name may hold a backslash before an n: both read as the break here, and only here.
        assert label.replace("\\\x01", "\x01") == said.replace("\\n", "\x01"), name


def check_others(drawing: fxlora_viz.Drawing, place: Path) -> None:
    ET.fromstring(drawing.save(place / "x.graphml").read_bytes())
    read = nx.read_graphml(place / "x.graphml", force_multigraph=True)
    assert set(read.nodes) == set(drawing.graph.nodes)
    data = json.loads(drawing.save(place / "x.json").read_bytes().decode("utf-8"))
    levels = {n["namespace"].count("/") for g in data["graphs"] for n in g["nodes"]}
    assert max(levels) <= 3
    first, *lines = drawing.save(place / "x.mmd").read_bytes().decode("utf-8").split("\n")
    assert first == "flowchart TB"
    assert all(line.count('"') in (0, 2) for line in lines)
    inside = [line.split('"')[1] for line in lines if '"' in line]
    assert not [t for t in inside if set("<>&`\\{}[]|") & set(t.replace("<br/>", ""))]
    assert all(line.replace("\t", " ").isprintable() for line in lines)


@needs_engine
@pytest.mark.parametrize("names", ALL_PIECES, ids=range(len(ALL_PIECES)))
def test_every_known_trick_leaves_every_format_well_formed(
    names: list[str], tmp_path: Path
) -> None:
    check(names, tmp_path)


@needs_engine
@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(names=EIGHT)
def test_random_names_leave_every_format_well_formed(names: list[str], tmp_path: Path) -> None:
    check(names, tmp_path)


def check(names: list[str], place: Path) -> None:
    drawing = named(names)
    check_svg(drawing.svg, drawing)
    check_svg(drawing.inline_svg, drawing)
    check_dot(drawing.dot, drawing)
    check_others(drawing, place)
    assert len(drawing.svg) < 60_000


class Scripts(HTMLParser):
    """Counts the elements of a page by tag, as a parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1


RUN = [
    "<script>document.title='ran'</script>", "</title><script>document.title='ran'</script>",
    "</style><img src=x onerror=document.title='ran'>", "\"'><svg onload=document.title='ran'>",
    "</script><script>document.title='ran'</script>", "-->]]><script>document.title='ran'</script>",
    "&lt;script&gt;document.title='ran'&lt;/script&gt;", "x" * 10_000,
]  # fmt: skip


@needs_engine
def test_a_page_has_the_same_elements_whatever_the_names(tmp_path: Path) -> None:
    pages = []
    for i, names in enumerate((RUN, [f"n{i}" for i in range(8)])):
        path = named(names).save(tmp_path / f"{i}.html")
        pages.append(Scripts(path.read_text(encoding="utf-8")).found)
    count = {k: n for k, n in pages[0].items() if k in ("script", "img", "svg", "style", "iframe")}
    assert count == {k: n for k, n in pages[1].items() if k in count}


@needs_browser
@needs_engine
def test_nothing_of_a_name_runs_in_a_browser(tmp_path: Path) -> None:
    assert CHROMIUM is not None, "FXLORA_BROWSER=required, and no chromium is on the PATH"
    drawing = named(RUN)
    plan = table_of(RUN)
    page = tmp_path / "page.html"
    body = f"{drawing.svg}{drawing.inline_svg}{plan}<p id='end'>end</p>"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>still</title>{body}", "utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'u'}",
        "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = Scripts(done.stdout).found
    assert '<p id="end">' in done.stdout
    assert "<title>still</title>" in done.stdout
    assert seen["svg"] == 2
    assert "script" not in seen
    assert "img" not in seen


def table_of(names: list[str]) -> str:
    from fxlora.html import html
    from fxlora.text import table

    return html([*names, table(names, [names])])


# ---- real models -------------------------------------------------------------------------------


def test_a_model_with_such_names_is_drawn_where_torch_takes_them(tmp_path: Path) -> None:
    model = nn.Sequential()
    for name in ("'q'", "<script>", "a&amp;b", "node", "end", "%%", "שלום", "x" * 3000):
        model.add_module(name, nn.Linear(4, 4))
    traced = fxlora.trace(model, (torch.zeros(1, 4),))
    config = LoraConfig(r=2, target_modules=["node", "<script>"])
    drawing = fxlora_viz.draw(traced, fxlora.rewrite(traced, config))
    check_dot(drawing.dot, drawing)
    check_others(drawing, tmp_path)
    if fxlora_viz.available_engines():
        check_svg(drawing.svg, drawing)
