"""The pictures, measured: nothing overlaps, no text is cut off, colours hold, other formats read back."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import fxlora_viz
import networkx as nx
import pytest
import torch
import zoo
from fxlora_viz import metrics, theme
from fxlora_viz.names import quantity
from peft import LoraConfig
from torch import nn

import fxlora
from fxlora import models

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
needs_engine = pytest.mark.skipif(
    not fxlora_viz.available_engines(), reason="no layout engine: pip install fxlora[draw]"
)
Rect = tuple[float, float, float, float]


def _gallery() -> Any:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "examples" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module
    spec.loader.exec_module(module)
    return module


gallery = _gallery()
ENTRIES = {e.name: e for e in gallery.GALLERY}
SMALL = ("sequential", "walls", "encoder", "unet")
NODES, BYTES = 120, 150_000  # of one readable sheet


def zoo_drawing(name: str, **options: Any) -> fxlora_viz.Drawing:
    entry = zoo.ZOO[name]
    traced = fxlora.trace(entry.build().eval(), (), entry.inputs(*entry.sizes[0]))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=entry.targets)
    return fxlora_viz.draw(traced, fxlora.rewrite(traced, config), **options)


# ---- measured from the SVG -------------------------------------------------------------------


def outline(group: ET.Element) -> Rect:
    """Returns the bounds of the last shape of a group, which is the outline."""
    for shape in reversed(list(group)):
        tag = shape.tag.removeprefix(SVG)
        if tag == "rect":
            x, y, w, h = (float(shape.get(k, "0")) for k in ("x", "y", "width", "height"))
            return x, y, x + w, y + h
        if tag == "circle":
            x, y, r = (float(shape.get(k, "0")) for k in ("cx", "cy", "r"))
            return x - r, y - r, x + r, y + r
        if tag == "polygon":
            points = [tuple(map(float, p.split(","))) for p in shape.get("points", "").split()]
            xs, ys = zip(*points, strict=True)
            return min(xs), min(ys), max(xs), max(ys)
    raise AssertionError(ET.tostring(group)[:200])


def text_box(text: ET.Element) -> Rect:
    """Returns what a line of text covers, by the metrics table."""
    size, words = float(text.get("font-size", "10")), "".join(text.itertext())
    classes = text.get("class", "").split()
    wide = metrics.width(words, size, bold=bool({"t", "h"} & set(classes)))
    x, y = float(text.get("x", "0")), float(text.get("y", "0"))
    left = x - wide / 2 if "m" in classes else x
    return left, y - 0.72 * size, left + wide, y + 0.2 * size


def overlap(a: Rect, b: Rect, slack: float = 0.6) -> bool:
    return (
        a[0] < b[2] - slack and b[0] < a[2] - slack and a[1] < b[3] - slack and b[1] < a[3] - slack
    )


def within(a: Rect, b: Rect, slack: float = 0.6) -> bool:
    inside = a[0] >= b[0] - slack and a[1] >= b[1] - slack
    return inside and a[2] <= b[2] + slack and a[3] <= b[3] + slack


def faults(svg: str) -> list[str]:
    """Returns everything that overlaps or is cut off in a picture."""
    root = ET.fromstring(svg)
    found = []
    groups = [g for g in root.iter(f"{SVG}g") if g.get("id")]
    nodes = {g.get("id", ""): g for g in groups if "fx" in g.get("class", "").split()}
    boxes = {g.get("id", ""): outline(g) for g in groups if "fx_box" in g.get("class", "").split()}
    shapes = {k: outline(g) for k, g in nodes.items()}
    for (a, ra), (b, rb) in itertools.combinations(shapes.items(), 2):
        if overlap(ra, rb):
            found.append(f"node {a} and node {b}")
    for (a, ra), (b, rb) in itertools.combinations(boxes.items(), 2):
        if overlap(ra, rb) and not within(ra, rb) and not within(rb, ra):
            found.append(f"box {a} and box {b}")
    for a, ra in shapes.items():
        for b, rb in boxes.items():
            if overlap(ra, rb) and not within(ra, rb):
                found.append(f"node {a} across the edge of box {b}")
        for text in nodes[a].iter(f"{SVG}text"):
            if not within(text_box(text), ra):
                found.append(f"text {''.join(text.itertext())!r} leaves node {a}")
    for group in groups:
        if "fx_edge" in group.get("class", "").split():
            for text in group.iter(f"{SVG}text"):
                for b, rb in shapes.items():
                    if overlap(text_box(text), rb):
                        found.append(f"label {text.text!r} over node {b}")
    labels = [g for g in root.iter(f"{SVG}g") if "fx_label" in g.get("class", "").split()]
    for group in labels:
        for text in group.iter(f"{SVG}text"):
            area = text_box(text)
            for b, rb in shapes.items():
                if overlap(area, rb):
                    found.append(f"box label {''.join(text.itertext())!r} over node {b}")
    _, _, width, height = map(float, root.get("viewBox", "").split())
    sheet = (0.0, 0.0, width, height)
    for k, r in {**boxes, **shapes}.items():
        if not within((r[0] + 22, r[1] + 22, r[2] + 22, r[3] + 22), sheet):
            found.append(f"{k} leaves the sheet")
    return found


@needs_engine
@pytest.mark.parametrize("name", SMALL)
def test_nothing_overlaps_and_no_text_is_cut_off(name: str) -> None:
    assert faults(ENTRIES[name].drawing().svg) == []


@needs_engine
@pytest.mark.parametrize("direction", ["TB", "LR"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "albert"])
def test_nothing_overlaps_in_small_models_of_real_classes(name: str, direction: str) -> None:
    assert faults(zoo_drawing(name, direction=direction).svg) == []


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in SMALL])
def test_nothing_overlaps_in_the_gallery(name: str) -> None:
    drawing = ENTRIES[name].drawing()
    assert faults(drawing.svg) == []
    assert drawing.graph.number_of_nodes() <= NODES
    assert len(drawing.svg.encode()) < BYTES


@needs_engine
def test_the_measure_sees_an_overlap_and_a_cut_text() -> None:
    drawing = ENTRIES["sequential"].drawing()
    first, second, *_ = drawing.layout.nodes
    drawing.layout.nodes[second] = drawing.layout.nodes[first]
    drawing.graph.nodes[first]["title"] = "a name that is much wider than its node"
    found = faults(drawing.svg)
    assert any(f == f"node {first} and node {second}" for f in found)
    assert any(f"leaves node {first}" in f for f in found)


def test_the_gallery_page_shows_every_picture_of_the_script_and_no_other() -> None:
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery.page()
    files = {p.stem for p in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert files == set(ENTRIES)
    for path in (ROOT / "docs" / "pictures").glob("*.svg"):
        ET.parse(path)


# ---- what is summed up -------------------------------------------------------------------------


def test_a_block_that_another_one_shows_but_for_a_part_is_a_card_that_says_so() -> None:
    drawing, full = zoo_drawing("t5"), zoo_drawing("t5", detail="full")
    cards = [d for _, d in drawing.graph.nodes(data=True) if d["kind"] == "again"]
    assert len(cards) == 4  # encoder and decoder, before and after
    assert {(d["title"], d["lines"]) for d in cards} == {
        ("block.1 … 2", ("2 as block.0", "without relative_attention_bias"))
    }
    assert drawing.graph.number_of_nodes() < 130 < full.graph.number_of_nodes()
    assert not [n for n, d in full.graph.nodes(data=True) if d["kind"] == "again"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("swin", ("1 as layers.0", "at other sizes", "1 as layers.0", "at other sizes, 6 blocks")),
        (
            "segformer",
            ("2 as stages.0", "at other sizes", "1 as stages.0", "without sequence_reduction",
             "at other sizes"),
        ),
    ],
)  # fmt: skip
def test_stages_at_other_widths_are_a_card_that_counts_what_it_holds(
    model: str, said: tuple[str, ...]
) -> None:
    traced = fxlora.trace(models.build(model))
    lora = fxlora.rewrite(traced, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    graph = fxlora_viz.draw(traced, lora).graph
    before, after = (d for _, d in graph.nodes(data=True) if d["kind"] == "again" and
                     d["title"].startswith(("layers", "stages")))  # fmt: skip
    assert after["lines"][:-1] == before["lines"][:-1] == said
    first, last = (int(n) for n in re.findall(r"\d+", after["title"]))
    stage = after["title"].partition(".")[0]
    held = [
        p for n, p in lora.named_parameters()
        if any(f"{stage}.{i}." in n for i in range(first, last + 1))
    ]  # fmt: skip
    every, trains = (
        sum(p.numel() for p in some) for some in (held, [p for p in held if p.requires_grad])
    )
    assert after["lines"][-1] == f"{quantity(every)} params, {quantity(trains)} train"
    assert (
        graph.number_of_nodes()
        <= 120
        < fxlora_viz.draw(traced, lora, detail="full").graph.number_of_nodes()
    )


class Cell(nn.Module):
    """A residual block of one adapted map and others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Stage(nn.Module):
    """Blocks of one width, behind a map from another."""

    def __init__(self, given: int, blocks: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(given, width)
        self.blocks = nn.ModuleList([Cell(width) for _ in range(blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        for block in self.blocks:
            x = block(x)
        return x


class Stages(nn.Module):
    """Stages of so many blocks and such widths."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        before = [8, *(width for _, width in shapes)]
        self.stages = nn.ModuleList(
            [Stage(g, n, w) for g, (n, w) in zip(before, shapes, strict=False)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def cards_of(*shapes: tuple[int, int], **settings: Any) -> dict[str, tuple[str, ...]]:
    traced = fxlora.trace(Stages(*shapes), (torch.randn(2, 8),))
    lora = fxlora.rewrite(traced, LoraConfig(**{"r": 4, "target_modules": ["a"], **settings}))
    nodes = fxlora_viz.draw(traced, lora).graph.nodes(data=True)
    return {d["title"]: d["lines"] for _, d in nodes if d["kind"] == "again"}


WIDTHS = [(2, 16), (2, 32), (2, 64), (2, 48), (2, 24), (2, 40)]
SECOND = [f"stages.1.blocks.{i}.a" for i in range(2)]


def test_a_card_stands_for_equal_scalings_and_ranks_only() -> None:
    assert cards_of(*WIDTHS)["stages.1 … 5"][:2] == ("5 as stages.0", "at other sizes")
    for pattern in ("alpha_pattern", "rank_pattern"):
        settings: Any = {pattern: dict.fromkeys(SECOND, 2), "lora_alpha": 4}
        assert list(cards_of(*WIDTHS, **settings)) == ["stages.2 … 5"], pattern


def test_a_card_says_how_many_blocks_when_only_their_number_differs() -> None:
    cards = cards_of((2, 8), (6, 8), (2, 16), (2, 24), (2, 40), (2, 48), (2, 64))
    assert cards["stages.1"][:2] == ("1 as stages.0", "6 blocks")
    assert "at other sizes" not in cards["stages.1"]


def test_what_a_card_refers_to_is_drawn() -> None:
    cards = cards_of((2, 16), (2, 24), (6, 24), (2, 64), (2, 48), (2, 40))
    named = {
        line.partition(" as ")[2] for lines in cards.values() for line in lines if " as " in line
    }
    assert named
    assert not named & set(cards)


class Tower(nn.Module):
    """Layers of an adapted map and a part that nothing adapts."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(i) for i in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Rest(nn.Module):
    """Maps that no adapter is asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Layer(nn.Module):
    """Of a width of its own, so that no two layers fold."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.attn, self.rest = nn.Linear(8, 8), Rest(8 + index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.rest(self.attn(x))


def tower(layers: int, targets: list[str], **options: Any) -> fxlora_viz.Drawing:
    traced = fxlora.trace(Tower(layers), (torch.randn(2, 8),))
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=targets))
    return fxlora_viz.draw(traced, lora, **options)


def test_modules_that_nothing_adapts_are_closed_in_both_panels_and_keep_their_parameters() -> None:
    full, drawing = tower(8, ["attn"], detail="full"), tower(8, ["attn"])
    assert full.graph.number_of_nodes() > NODES >= drawing.graph.number_of_nodes()
    closed = [d for _, d in drawing.graph.nodes(data=True) if d["title"] == "rest"]
    assert len(closed) == 16
    assert sorted(d["params"] for d in closed) == sorted(2 * [17 * (8 + i) + 8 for i in range(8)])
    for each in (full, drawing):
        total = [0, 0]
        for _, d in each.graph.nodes(data=True):
            total["ba".index(d["panel"])] += d["params"]
        assert total[0] == sum(p.numel() for p in Tower(8).parameters())
    assert faults(drawing.svg) == []


def test_a_module_with_an_adapter_inside_stays_open() -> None:
    drawing = tower(8, ["up"])
    assert not [n for n, d in drawing.graph.nodes(data=True) if d["title"] == "rest"]
    assert len([n for n, d in drawing.graph.nodes(data=True) if d["role"] == "lora_A"]) == 8


def test_a_sheet_with_room_closes_nothing() -> None:
    assert not [n for n, d in tower(2, ["attn"]).graph.nodes(data=True) if d["title"] == "rest"]


class Scaled(nn.Module):
    """A product with a number and a quotient by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) * 0.125) / 8


def test_a_plain_number_is_written_on_the_arrow_through_it() -> None:
    traced = fxlora.trace(Scaled(), (torch.randn(2, 4),))
    drawing = fxlora_viz.draw(traced)
    titles = {n: d["title"] for n, d in drawing.graph.nodes(data=True)}
    labels = {(titles[u], titles[v]): d["label"] for u, v, d in drawing.graph.edges(data=True)}
    assert labels == {("x", "a"): "", ("a", "b"): "×0.125", ("b", "output"): "÷8"}


# ---- adapters that learn nothing ---------------------------------------------------------------


def sites(drawing: fxlora_viz.Drawing) -> dict[str, tuple[str, str]]:
    boxes = drawing.graph.graph["boxes"].values()
    return {b["label"]: (b["verdict"], b["note"]) for b in boxes if b["kind"] == "site"}


def titles(drawing: fxlora_viz.Drawing, style: str) -> list[tuple[str, str]]:
    nodes = drawing.graph.nodes(data=True)
    return [(d["site"], d["title"]) for _, d in nodes if d["style"] == style]


def test_every_verdict_is_said_on_its_site() -> None:
    assert sites(ENTRIES["walls"].drawing()) == {
        "read_past": ("bypassed", "bypassed: the weight is read past it"),
        "partial": ("partial", "partial: 1 of 2 uses adapted"),
        "unused": ("inert", "never called"),
        "cut": ("cut", "cut: no gradient arrives"),
        "dead": ("dead", "dead: reaches no output"),
        "live": ("live", ""),
    }


def test_adapters_that_learn_nothing_are_drawn_idle_and_counted() -> None:
    drawing = ENTRIES["walls"].drawing()
    idle = {s for s, t in titles(drawing, "idle") if t in "AB"}
    assert idle == {"read_past", "unused", "cut", "dead"}
    assert titles(drawing, "unused") == [("unused", "W")]
    assert "4 of 6 adapters learn nothing" in repr(drawing)


def test_a_frozen_adapter_is_said_to_be_frozen_where_a_gradient_passes_through_it_too() -> None:
    lora = fxlora.rewrite(
        fxlora.trace(Scaled(), (torch.randn(2, 4),)), LoraConfig(target_modules=["a", "b"])
    )
    for name, p in lora.named_parameters():
        if name.startswith("b.lora_"):
            p.requires_grad_(False)
    drawing = fxlora_viz.draw(lora)
    assert sites(drawing) == {"a": ("live", ""), "b": ("cut", "frozen: does not train")}
    assert {s for s, t in titles(drawing, "idle") if t in "AB"} == {"b"}
    assert "gradient" not in str([d["label"] for _, _, d in drawing.graph.edges(data=True)])


def test_the_adapter_that_is_bypassed_feeds_nothing_and_stands_beside_its_weight() -> None:
    graph = ENTRIES["encoder"].drawing().graph
    ghosts = {d["title"]: n for n, d in graph.nodes(data=True) if d["verdict"] == "bypassed"}
    assert set(ghosts) == {"out_proj.weight", "A", "B"}
    assert len({graph.nodes[n]["box"] for n in ghosts.values()}) == 1
    assert list(graph.successors(ghosts["A"])) == [ghosts["B"]]
    assert list(graph.successors(ghosts["B"])) == list(graph.predecessors(ghosts["A"])) == []
    assert "bypassed: its weight is read past the module" in graph.nodes[ghosts["A"]]["tooltip"]


def test_where_a_gradient_ends_is_said_on_the_arrow() -> None:
    graph = ENTRIES["walls"].drawing().graph
    labels = [d["label"] for _, _, d in graph.edges(data=True) if "gradient" in d["label"]]
    assert labels == ["✕ detach: no gradient"]


def test_an_adapter_of_a_layer_called_often_says_how_often() -> None:
    assert set(sites(zoo_drawing("albert")).values()) >= {("live", "shared by 4 calls")}


def test_layers_alike_but_for_a_bypass_are_drawn_apart() -> None:
    class Layer(nn.Module):
        def __init__(self, past: bool) -> None:
            super().__init__()
            self.lin, self.past = nn.Linear(4, 4), past

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(x, self.lin.weight) if self.past else 0
            out: torch.Tensor = self.lin(x) + y
            return out

    model = nn.Sequential(Layer(False), Layer(False), Layer(True))
    traced = fxlora.trace(model, (torch.zeros(2, 4),))
    drawing = fxlora_viz.draw(
        traced, fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["lin"]))
    )
    assert "partial" in {d["verdict"] for _, d in drawing.graph.nodes(data=True)}


def test_a_picture_of_live_adapters_says_nothing_of_idle_ones() -> None:
    drawing = ENTRIES["sequential"].drawing()
    assert "learn" not in repr(drawing)
    assert titles(drawing, "idle") == []


# ---- blocks that are drawn already -------------------------------------------------------------


def alternating() -> fxlora_viz.Drawing:
    import transformers

    config = transformers.LlamaConfig(**{**zoo._LLAMA, "num_hidden_layers": 8})
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.zeros(1, 8, dtype=torch.long)
    traced = fxlora.trace(model, (), {"input_ids": ids, "use_cache": False})
    lora = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[2, 5])
    return fxlora_viz.draw(traced, fxlora.rewrite(traced, lora))


def test_blocks_equal_to_ones_drawn_above_are_one_card_that_counts_them() -> None:
    drawing = alternating()
    cards = [d for _, d in drawing.graph.nodes(data=True) if d["kind"] == "again"]
    assert [(d["panel"], d["title"], d["lines"]) for d in cards] == [
        (p, "layers.3 … 7", ("4 as layers.0 … 1", "1 as layers.2")) for p in "ba"
    ]
    assert "layers.3 … 4 as layers.0 … 1; layers.5 as layers.2" in cards[0]["tooltip"]
    labels = {b["label"] for b in drawing.graph.graph["boxes"].values()}
    assert {"layers.0 … 1", "layers.2"} <= labels
    assert not {"layers.3 … 4", "layers.5"} & labels


def test_a_card_stands_in_the_flow() -> None:
    graph = alternating().graph
    for node in [n for n, d in graph.nodes(data=True) if d["kind"] == "again"]:
        assert graph.in_degree(node) == 1
        assert [graph.nodes[n]["title"] for n in graph.successors(node)] == ["norm"]
    assert nx.is_directed_acyclic_graph(graph)


# ---- towers ------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_decoder_stands_beside_its_encoder_and_reads_it_through_ports(name: str) -> None:
    drawing = zoo_drawing(name)
    graph = drawing.graph
    far = {v for _, v, d in graph.edges(data=True) if d["far"]}
    ports = {p for p in far if graph.nodes[p]["kind"] != "again"}  # a card reads as its block does
    assert ports
    assert {graph.nodes[p]["title"].split()[0] for p in ports} == {"from"}
    for port in ports:
        assert graph.in_degree(port) == 1
        assert graph.out_degree(port) >= 2
    tops = {
        (d["panel"], d["title"]): drawing.layout.nodes[n][1]
        for n, d in graph.nodes(data=True)
        if d["kind"] == "input"
    }
    assert max(tops.values()) - min(tops.values()) < 60
    assert faults(drawing.svg) == []


# ---- colours -----------------------------------------------------------------------------------


def rgb(color: str) -> tuple[float, float, float]:
    """Returns linear light."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return r, g, b


def contrast(a: str, b: str) -> float:
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (rgb(a), rgb(b)))
    return (high + 0.05) / (low + 0.05)


def painted(color: str, mode: str) -> str:
    return color if mode == "light" else theme.DARK[color]


TEXTS = [
    (theme.INK, name, fill) for name, (fill, _, _) in {**theme.NODES, **theme.BOXES}.items()
] + [
    *((theme.DIM, name, theme.NODES[name][0]) for name in ("frozen", "op", "io", "again", "unused")),
    (theme.HOT_TEXT, "trainable", theme.NODES["trainable"][0]),
    (theme.HOT, "idle", theme.NODES["idle"][0]),
    *((theme.DIM, name, theme.BOXES[name][0]) for name in ("panel", "fold", "block", "module")),
    *((theme.HOT, name, theme.BOXES[name][0]) for name in ("panel", "fold", "module", "site")),
    *((theme.ACCENT, name, theme.BOXES[name][0]) for name in ("fold", "block")),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_text_has_the_contrast_wcag_asks_for(mode: str) -> None:
    low = {
        (color, name): round(contrast(painted(color, mode), painted(fill, mode)), 2)
        for color, name, fill in TEXTS
        if contrast(painted(color, mode), painted(fill, mode)) < 4.5
    }
    assert low == {}


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_lines_that_carry_meaning_stand_out_from_the_ground(mode: str) -> None:
    ground = painted("#FFFFFF", mode)
    lines = [theme.NODES[n][1] for n in ("frozen", "trainable", "io", "idle", "unused", "again")]
    lines += [theme.EDGES[n][0] for n in ("kept", "added", "idle")]
    assert {c: contrast(painted(c, mode), ground) for c in lines
            if contrast(painted(c, mode), ground) < 3} == {}  # fmt: skip


# Machado, Oliveira and Fernandes 2009, severity 1, on linear light.
SIGHTS = {
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                     (-0.011820, 0.042940, 0.968881)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                   (-0.003882, -0.048116, 1.051998)),
    "achromatopsia": ((0.2126, 0.7152, 0.0722),) * 3,
}  # fmt: skip


def seen(color: str, sight: str) -> tuple[float, float, float]:
    """Returns a colour in CIE Lab, as somebody sees it."""
    light = rgb(color)
    r, g, b = (
        min(max(sum(m * c for m, c in zip(row, light, strict=True)), 0.0), 1.0)
        for row in SIGHTS[sight]
    )
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(a: str, b: str, sight: str) -> float:
    pairs = zip(seen(a, sight), seen(b, sight), strict=True)
    return float(sum((x - y) ** 2 for x, y in pairs) ** 0.5)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_frozen_and_trainable_differ_for_every_eye(mode: str, sight: str) -> None:
    frozen, trainable = theme.NODES["frozen"], theme.NODES["trainable"]
    line = difference(painted(frozen[1], mode), painted(trainable[1], mode), sight)
    edge = difference(
        painted(theme.EDGES["quiet"][0], mode), painted(theme.EDGES["added"][0], mode), sight
    )
    assert line > 10 or trainable[2] >= 2 * frozen[2]
    assert edge > 10
    # Without any colour the width of the line says it, and a dash what is idle.
    assert trainable[2] >= 2 * frozen[2]
    assert theme.EDGES["added"][1] > 1.5 * theme.EDGES["quiet"][1]


def test_every_colour_has_a_dark_twin() -> None:
    used = {c for t in (theme.NODES, theme.BOXES, theme.EDGES) for v in t.values() for c in v
            if isinstance(c, str)}  # fmt: skip
    assert used <= set(theme.DARK)


@needs_engine
def test_a_picture_brings_its_own_ground() -> None:
    for mode, ground in (("light", "#FFFFFF"), ("dark", theme.DARK["#FFFFFF"])):
        drawing = zoo_drawing("seed", theme=mode)
        assert 'class="fx_ground"' in drawing.svg
        assert f".fx_ground{{fill:{ground}}}" in drawing.svg


# ---- notebooks ---------------------------------------------------------------------------------


class _Shell:
    """As much of IPython as the registration needs."""

    def __init__(self) -> None:
        self.display_formatter = self
        self.formatters = {"image/svg+xml": self}
        self.known: dict[type, Any] = {}

    def for_type(self, kind: type, show: Any) -> None:
        self.known[kind] = show


@needs_engine
def test_a_notebook_shows_fxloras_graphs_and_leaves_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import types

    from fxlora_viz import notebook
    from torch.fx import GraphModule, symbolic_trace

    shell = _Shell()
    fake = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert notebook.register()
    show = shell.known[GraphModule]
    assert show(fxlora.trace(zoo.seed())).startswith("<svg")
    assert show(symbolic_trace(zoo.seed())) is None
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not notebook.register()


# ---- other formats -----------------------------------------------------------------------------

HOSTILE = [
    '"quoted"',
    "<script>",
    "a&b",
    "end",
    "line\nbreak",
    "1. x",
    "`code`",
    "שלום",
    "x" * 9999,
]


def hostile() -> fxlora_viz.Drawing:
    from fxlora.facts import Frame

    plain = fxlora.trace(nn.Sequential(*(nn.Linear(4, 4) for _ in HOSTILE)))
    calls = [n for n in plain.graph.nodes if n.op == "call_module"]
    for node, name in zip(calls, HOSTILE, strict=True):
        node.meta["module_stack"] = (Frame("", "Sequential", 0), Frame(f"m.{name}", name, 0))
    return fxlora_viz.draw(plain)


FORMATS = {"walls": lambda: ENTRIES["walls"].drawing(), "hostile": hostile}


@pytest.mark.parametrize("name", FORMATS)
def test_networkx_reads_the_graphml_back(name: str, tmp_path: Path) -> None:
    drawing = FORMATS[name]()
    read = nx.read_graphml(drawing.save(tmp_path / "x.graphml"), force_multigraph=True)
    assert set(read.nodes) == set(drawing.graph.nodes)
    assert sorted(read.edges()) == sorted(drawing.graph.edges())
    for node, data in read.nodes(data=True):
        assert data["verdict"] == drawing.graph.nodes[node]["verdict"]
        assert all(isinstance(v, str) for v in data.values())


@pytest.mark.parametrize("name", FORMATS)
def test_mermaid_text_is_well_formed(name: str, tmp_path: Path) -> None:
    drawing = FORMATS[name]()
    first, *lines = drawing.save(tmp_path / "x.mmd").read_text(encoding="utf-8").splitlines()
    assert first == "flowchart TB"
    depth = 0
    for line in lines:
        depth += line.startswith("subgraph ") - (line == "end")
        assert depth >= 0
        assert line.count('"') in (0, 2), line
        assert "<script" not in line
    assert depth == 0
    assert sum("-->" in x or "-.->" in x for x in lines) == drawing.graph.number_of_edges()


@pytest.mark.parametrize("name", FORMATS)
def test_model_explorer_gets_every_node_edge_and_namespace(name: str, tmp_path: Path) -> None:
    drawing = FORMATS[name]()
    data = json.loads(drawing.save(tmp_path / "x.json").read_text(encoding="utf-8"))
    nodes = [n for g in data["graphs"] for n in g["nodes"]]
    assert {n["id"] for n in nodes} == set(drawing.graph.nodes)
    edges = sorted((e["sourceNodeId"], n["id"]) for n in nodes for e in n["incomingEdges"])
    assert edges == sorted(drawing.graph.edges())
    for node in nodes:
        assert set(node) == {"id", "label", "namespace", "attrs", "incomingEdges"}
        assert all(isinstance(v, str) for pair in node["attrs"] for v in pair.values())


def test_namespaces_of_model_explorer_are_the_boxes(tmp_path: Path) -> None:
    drawing = ENTRIES["encoder"].drawing()
    data = json.loads(drawing.save(tmp_path / "x.json").read_text(encoding="utf-8"))
    found = {n["namespace"] for n in data["graphs"][1]["nodes"]}
    assert "layers.0 … 3 × 4/self_attn/out_proj" in found


# ---- engines -----------------------------------------------------------------------------------


@pytest.mark.skipif("wasi" not in fxlora_viz.available_engines(), reason="pip install fxlora[draw]")
@pytest.mark.parametrize("name", SMALL)
def test_a_picture_is_the_same_with_and_without_a_system_graphviz(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graphs = ENTRIES[name].graphs()
    drawn = []
    for folder in (tmp_path / "with", tmp_path / "without"):
        folder.mkdir()
        if folder.name == "with":  # of any version: this one lays out nothing when it is called
            (folder / "dot").write_text("#!/bin/sh\necho '{}'\n", encoding="utf-8")
            (folder / "dot").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        assert ("dot" in fxlora_viz.available_engines()) == (folder.name == "with")
        drawn.append(fxlora_viz.draw(*graphs).svg)
    assert drawn[0] == drawn[1]


@pytest.mark.skipif(len(fxlora_viz.available_engines()) < 2, reason="needs both engines")
@pytest.mark.parametrize("name", SMALL)
def test_both_engines_draw_the_same_things_in_the_same_rows(name: str) -> None:
    graphs = ENTRIES[name].graphs()
    found, layouts = [], []
    for engine in ("dot", "wasi"):
        drawing = fxlora_viz.draw(*graphs, engine=engine)
        layouts.append(drawing.layout)
        root = ET.fromstring(drawing.svg)
        texts = sorted("".join(t.itertext()) for t in root.iter(f"{SVG}text"))
        ids = [(g.get("id"), g.get("class")) for g in root.iter(f"{SVG}g") if g.get("id")]
        found.append((texts, ids))
    assert found[0] == found[1]
    one, other = layouts
    for part in ("nodes", "boxes", "edges"):
        assert set(getattr(one, part)) == set(getattr(other, part))
    # Two versions of Graphviz round and pad otherwise; side by side they may swap siblings, which
    # no row, box or edge depends on.
    assert abs(one.width - other.width) <= 0.035 * one.width
    assert abs(one.height - other.height) <= 0.015 * one.height
    for node, (_, y) in one.nodes.items():
        assert abs(y - other.nodes[node][1]) <= 0.015 * one.height, node
