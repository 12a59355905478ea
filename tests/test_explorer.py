"""The explorer, driven in a real browser: what it shows, what it answers to, what it never does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fxlora_viz
import pytest
import test_pictures
import torch
import zoo
from fxlora_viz import explorer, theme
from fxlora_viz.engines import EngineError
from fxlora_viz.reading import Reading
from peft import LoraConfig
from torch import nn
from torch.fx import GraphModule

import fxlora
from fxlora.facts import Frame, Source

SVG = "{http://www.w3.org/2000/svg}"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
needs_engine = test_pictures.needs_engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for the module; FXLORA_BROWSER=required forbids going without."""
    why = ""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((p for p in map(shutil.which, names) if p), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        why = "playwright is not installed: pip install fxlora[dev]"
    if path is None:
        why = f"no browser: none of {', '.join(names)} is on the PATH"
    if why:
        if os.environ.get("FXLORA_BROWSER") == "required":
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Explorer:
    """One open page, and everything it complained about or asked the network for."""

    def __init__(self, browser: Any, file: Path, hash: str = "", **context: Any) -> None:
        context = {"viewport": {"width": 1280, "height": 800}, **context}
        self.context = browser.new_context(**context)
        # Written down instead of copied: what a test copies is nobody's clipboard.
        self.context.add_init_script(
            "Object.defineProperty(navigator, 'clipboard', {value: "
            "{writeText: async (text) => { window.copied = text; }}})"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.say(m.text))
        self.page.on("pageerror", lambda e: self.say(f"{e}"))
        self.page.on("dialog", lambda d: (self.say(f"dialog {d.message}"), d.dismiss()))
        self.context.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(file.as_uri() + hash)

    def say(self, text: str) -> None:
        self.errors.append(text)

    def ready(self) -> Explorer:
        self.page.wait_for_selector("html[data-state=ready]", state="attached")
        return self

    def press(self, *keys: str) -> Explorer:
        for key in keys:
            self.page.keyboard.press(key)
            self.ready()
        return self

    def search(self, text: str) -> str:
        self.page.fill("#q", text)
        self.page.wait_for_timeout(30)
        return str(self.page.inner_text("#hits"))

    def go(self, hash: str) -> Explorer:
        self.page.evaluate("(h) => { location.hash = h; }", hash)
        self.page.wait_for_timeout(30)
        return self.ready()

    @property
    def hash(self) -> str:
        return str(self.page.evaluate("location.hash"))

    @property
    def status(self) -> str:
        return str(self.page.inner_text("#status"))

    @property
    def about(self) -> str:
        return str(self.page.inner_text("#about"))

    def ids(self, selector: str = "#still g.fx") -> list[str]:
        return list(self.page.eval_on_selector_all(selector, "all => all.map(e => e.id)"))

    def edges(self) -> set[tuple[str, str]]:
        found = self.page.eval_on_selector_all(
            "#still .fxlora > g > .fx_edge", "all => all.map(e => [e.dataset.from, e.dataset.to])"
        )
        return {(a, b) for a, b in found}

    def svg(self) -> str:
        """Returns the picture as the page copies it."""
        self.page.evaluate("window.copied = ''")
        self.page.click("#copy")
        self.page.wait_for_function("window.copied")
        return str(self.page.evaluate("window.copied"))

    def close(self) -> None:
        assert self.errors == []
        assert [u for u in self.requests if not u.startswith(("file:", "blob:", "data:"))] == []
        self.context.close()


# ---- pages, each made once ---------------------------------------------------------------------


def walls() -> fxlora_viz.Drawing:
    drawing: fxlora_viz.Drawing = test_pictures.ENTRIES["walls"].drawing()
    return drawing


def llama() -> fxlora_viz.Drawing:
    entry = zoo.ZOO["llama"]
    traced = fxlora.trace(entry.build().eval(), (), entry.inputs(*entry.sizes[0]))
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    return fxlora_viz.draw(traced, fxlora.rewrite(traced, config))


def stack() -> fxlora_viz.Drawing:
    model = nn.Sequential(*(nn.Linear(4 + i, 5 + i) for i in range(200)))
    return fxlora_viz.draw(fxlora.trace(model))


NAMES = [
    '"quoted"', "</script><script>window.pwned=1</script>", "<img src=x onerror='window.pwned=1'>",
    "a&b&amp;c", "line\nbreak\r\x00\x1b[31m", "back\\slash", "\u202egnp.exe", "שלום", "名前",
    "x" * 10_000, "]]>", "-->", "{curly|brace}", "😀", "\ud800", "subgraph", "digraph", "\\N",
    "__proto__", "constructor", "a b", "%%data%%", "%E0%A4%A", "~,=#", "javascript:window.pwned=1",
]  # fmt: skip


def hostile() -> fxlora_viz.Drawing:
    plain = fxlora.trace(nn.Sequential(*(nn.Linear(4, 4) for _ in range(2 * len(NAMES)))))
    calls = [n for n in plain.graph.nodes if n.op == "call_module"]
    # fx refuses such names in its code: give them to the picture by way of the meta it reads.
    for i, node in enumerate(calls):
        name = NAMES[i // 2]
        inner = Frame(f"m.{name}.{i % 2}", name, 0)
        node.meta["module_stack"] = (Frame("", "S", 0), Frame(f"m.{name}", name, 0), inner)
        node.meta["source"] = Source(f"{name}.py", 1, name)
        node.meta["shape"], node.meta["dtype"] = (name, 4 + i), torch.float32
    # These paths own no parameter, and a module without any is drawn closed: say they do.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reading, "is_simple", lambda _, path: path.endswith((".0", ".1")))
        return fxlora_viz.draw(plain)


PAGES = {"walls": walls, "llama": llama, "stack": stack, "hostile": hostile}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a page, once: name -> (drawing, file)."""
    folder, found = tmp_path_factory.mktemp("pages"), {}

    def make(name: str) -> tuple[fxlora_viz.Drawing, Path]:
        if name not in found:
            drawing = PAGES[name]()
            found[name] = drawing, drawing.save(folder / f"{name}.html")
        return found[name]

    return make


@pytest.fixture
def visit(browser: Any, made: Any) -> Iterator[Any]:
    """Opens pages; at the end none of them may have complained or used the network."""
    opened: list[Explorer] = []

    def open_(name: str, hash: str = "", **context: Any) -> Explorer:
        opened.append(Explorer(browser, made(name)[1], hash, **context).ready())
        return opened[-1]

    yield open_
    for explorer_ in opened:
        explorer_.close()


def panel(drawing: fxlora_viz.Drawing, name: str) -> dict[str, dict[str, Any]]:
    return {i: d for i, d in drawing.graph.nodes(data=True) if d["panel"] == name}


# ---- opening -----------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", ["walls", "llama"])
def test_it_opens_with_the_still_picture_and_asks_nobody_for_anything(
    visit: Any, made: Any, name: str
) -> None:
    drawing, _ = made(name)
    at = visit(name)
    assert sorted(at.ids()) == sorted(drawing.graph.nodes)
    assert at.page.evaluate("document.documentElement.dataset.layoutMs") is None
    assert len(at.requests) >= 1  # the page itself: requests are seen


@needs_engine
def test_without_scripts_the_picture_is_there_and_no_dead_controls(browser: Any, made: Any) -> None:
    drawing, file = made("walls")
    at = Explorer(browser, file, java_script_enabled=False)
    assert at.page.is_visible("#still svg")
    assert at.page.locator("#still svg g.fx").count() == drawing.graph.number_of_nodes()
    assert not at.page.is_visible("#bar")
    assert not at.page.is_visible("#status")
    at.close()


def test_without_an_engine_the_page_lays_itself_out(
    browser: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> bytes:
        raise EngineError("no engine")

    drawing = walls()
    monkeypatch.setattr("fxlora_viz.drawing.run_engine", none)
    at = Explorer(browser, drawing.save(tmp_path / "x.html")).ready()
    assert sorted(at.ids()) == sorted(drawing.graph.nodes)
    assert test_pictures.faults(at.svg()) == []
    at.close()


# ---- opening and closing modules ----------------------------------------------------------------


def lifted(drawing: fxlora_viz.Drawing, closed: set[str]) -> set[tuple[str, str]]:
    """Returns the edges between what is seen when these boxes are closed."""
    boxes = drawing.graph.graph["boxes"]

    def seen(node: str) -> str:
        found, at = node, drawing.graph.nodes[node]["box"]
        while at:
            found, at = (at if at in closed else found), boxes[at]["parent"]
        return found

    pairs = {(seen(u), seen(v)) for u, v, d in drawing.graph.edges(data=True) if not d["far"]}
    return {(a, b) for a, b in pairs if a != b}


@needs_engine
def test_closing_a_module_lays_out_again_with_its_edges_lifted(visit: Any, made: Any) -> None:
    drawing, _ = made("llama")
    at = visit("llama")
    first = at.svg()
    boxes = drawing.graph.graph["boxes"]
    shut = {b for b, d in boxes.items() if d["label"] == "mlp"}
    assert len(shut) == 2
    at.page.focus("#stage")
    at.press("f")
    at.page.click("#still .fx_label[data-box^=a_][data-box$=mlp] .chevron")
    at.ready()
    assert {b for b in at.ids() if b in boxes} == shut
    assert at.edges() == lifted(drawing, shut)
    assert "Closed model.layers" in at.status
    assert test_pictures.faults(at.svg()) == []
    at.page.focus("#stage")
    at.press("Enter")
    assert at.svg() == first


@needs_engine
def test_levels_open_one_after_the_other(visit: Any, made: Any) -> None:
    drawing, _ = made("llama")
    at = visit("llama", "#open=")
    boxes = drawing.graph.graph["boxes"]
    assert [boxes[b]["kind"] for b in at.ids() if b in boxes] == ["fold", "fold"]
    assert test_pictures.faults(at.svg()) == []
    at.page.focus("#stage")
    at.press("]", "]", "]")
    assert sorted(at.ids()) == sorted(drawing.graph.nodes)
    at.press("[", "[", "[")
    assert at.edges() == lifted(drawing, {b for b, d in boxes.items() if d["kind"] != "panel"})


@needs_engine
def test_a_layout_that_fails_leaves_everything_as_it_was(browser: Any, made: Any) -> None:
    drawing, file = made("llama")
    at = Explorer(browser, file).ready()
    at.page.evaluate(
        "void (Worker.prototype.postMessage = function (m) "
        "{ setTimeout(() => this.onmessage({data: {id: m.id, error: 'out of luck'}})) })"
    )
    at.page.focus("#stage")
    at.press("[")
    assert sorted(at.ids()) == sorted(drawing.graph.nodes)
    assert "No layout: out of luck" in at.status
    assert at.hash == ""
    at.close()


# ---- views -------------------------------------------------------------------------------------


@needs_engine
def test_each_view_shows_its_side_and_a_difference_marks_what_changed(
    visit: Any, made: Any
) -> None:
    drawing, _ = made("walls")
    before, after = panel(drawing, "b"), panel(drawing, "a")
    at = visit("walls")
    at.page.click("#modes [data-mode=before]")
    assert sorted(at.ready().ids()) == sorted(before)
    at.page.click("#modes [data-mode=after]")
    assert sorted(at.ready().ids()) == sorted(after)
    at.page.click("#modes [data-mode=diff]")
    assert sorted(at.ready().ids()) == sorted(after)
    keys = {d["key"] for d in before.values()}
    added = sorted(i for i, d in after.items() if d["key"] not in keys)
    marked = at.page.eval_on_selector_all(
        "#still .badge_added", "all => all.map(e => e.dataset.of)"
    )
    assert sorted(marked) == added
    assert f"{len(added)} added" in at.status
    assert test_pictures.faults(at.svg()) == []
    at.page.click("#modes [data-mode=both]")
    assert sorted(at.ready().ids()) == sorted(drawing.graph.nodes)
    assert at.page.get_attribute("#modes [data-mode=both]", "aria-checked") == "true"


@needs_engine
def test_a_difference_shows_what_was_taken_away_where_it_stood(
    browser: Any, tmp_path: Path
) -> None:
    traced = fxlora.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["0"]))
    drawing = fxlora_viz.draw(lora, traced)
    at = Explorer(browser, drawing.save(tmp_path / "x.html"), "#mode=diff").ready()
    keys = {d["key"] for d in panel(drawing, "a").values()}
    gone = sorted(i for i, d in panel(drawing, "b").items() if d["key"] not in keys)
    assert len(gone) == 3
    marked = at.page.eval_on_selector_all(
        "#still .badge_removed", "all => all.map(e => e.dataset.of)"
    )
    assert sorted(marked) == gone
    assert any(v in gone for _, v in at.edges())
    assert any(u in gone for u, _ in at.edges())
    at.close()


# ---- pointer -----------------------------------------------------------------------------------


@needs_engine
def test_wheel_drag_and_pinch_move_the_picture_and_a_drag_selects_nothing(visit: Any) -> None:
    at = visit("walls", has_touch=True)

    def camera() -> list[float]:
        at.page.wait_for_timeout(60)
        text = at.page.get_attribute("#still svg", "viewBox")
        return [float(v) for v in str(text).split()]

    first = camera()
    at.page.mouse.move(600, 400)
    at.page.mouse.wheel(0, -200)
    near = camera()
    assert near[2] < first[2]
    at.page.mouse.down()
    at.page.mouse.move(1100, 450, steps=8)  # beyond the stage, and it still moves
    at.page.mouse.up()
    moved = camera()
    scale = near[2] / at.page.evaluate("document.getElementById('stage').clientWidth")
    assert moved[2] == near[2]
    assert near[0] - moved[0] == pytest.approx(500 * scale, abs=1)
    assert near[1] - moved[1] == pytest.approx(50 * scale, abs=1)
    assert at.hash == ""
    touch = at.context.new_cdp_session(at.page)

    def fingers(kind: str, *xs: int) -> None:
        points = [{"x": x, "y": 400, "id": i} for i, x in enumerate(xs)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", 550, 650)
    fingers("touchMove", 500, 700)
    fingers("touchMove", 450, 750)
    fingers("touchEnd")
    assert camera()[2] < 0.6 * moved[2]


# ---- search and filters --------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize(
    ("term", "count"),
    [
        ("read_past", 6), ("READ_PAST", 6), ('"read_past.w"', 2), ("/^live$/", 5), ("op:relu", 2),
        ("op:nothing", 0), ("lora_A rank:4", 6), ("rank:5", 0), ("lora_A alpha:16", 6), ("alpha:1", 0), ("verdict:bypassed", 3), ("lora_A", 6),
        ("lora_A verdict:inert", 1), ("lora_A -verdict:inert", 5), ("change:added", 17),
        ("/(a/", None), ("no:such field", 0),
    ],
)  # fmt: skip
def test_a_term_finds_what_it_says(visit: Any, walls_page: Explorer, term: str, count: Any) -> None:
    found = walls_page.search(term)
    if count is None:
        assert found == "pattern?"
        assert walls_page.page.get_attribute("#q", "aria-invalid") == "true"
    else:
        assert found == ("1 hit" if count == 1 else f"{count} hits")
        assert walls_page.page.locator("#still .overlay .hit").count() == count


@pytest.fixture(scope="module")
def walls_page(browser: Any, made: Any) -> Iterator[Explorer]:
    at = Explorer(browser, made("walls")[1]).ready()
    yield at
    at.close()


@needs_engine
def test_grad_finds_what_the_graph_says_of_requires_grad(walls_page: Explorer, made: Any) -> None:
    nodes = [d for _, d in made("walls")[0].graph.nodes(data=True)]

    def said(d: dict[str, Any]) -> bool:
        return d["state"] in ("trainable", "partly") if d["state"] else bool(d["requires_grad"])

    assert walls_page.search("grad:true") == f"{sum(map(said, nodes))} hits"
    assert walls_page.search("grad:false") == f"{sum(not said(d) for d in nodes)} hits"


@needs_engine
def test_hits_are_walked_around_and_a_hit_in_a_closed_module_opens_it(visit: Any) -> None:
    at = visit("llama", "#open=")
    assert at.search("/mlp\\.up_proj$/") == "2 hits"
    assert at.page.locator("#still .overlay .hit").count() == 2
    at.page.focus("#q")
    at.press("Enter")
    assert "1 / 2" in at.page.inner_text("#hits")
    first = at.page.get_attribute("#stage", "aria-activedescendant") or at.hash
    assert any(i.endswith("mlp_up_proj") for i in at.ids())
    at.press("Enter")
    assert "2 / 2" in at.page.inner_text("#hits")
    at.press("Shift+Enter")
    assert "1 / 2" in at.page.inner_text("#hits")
    assert first


@needs_engine
def test_filters_leave_what_they_name_and_dim_the_rest(visit: Any, made: Any) -> None:
    drawing, _ = made("walls")
    idle = sorted(i for i, d in drawing.graph.nodes(data=True) if d["style"] in ("idle", "unused"))
    at = visit("walls")
    at.page.click("[data-chip=idle]")
    bright = sorted(at.ids("#still g.fx:not(.dim)"))
    assert set(idle) <= set(bright)
    roles = {drawing.graph.nodes[i]["role"] for i in set(bright) - set(idle)}
    assert roles <= {"lora_A", "lora_B"}
    at.page.click("[data-chip=trainable]")
    more = at.ids("#still g.fx:not(.dim)")
    trains = {i for i, d in drawing.graph.nodes(data=True) if d["state"] in ("trainable", "partly")}
    assert set(more) == set(bright) | trains
    at.page.click("[data-chip=trainable]")
    at.page.click("[data-chip=idle]")
    assert at.ids("#still g.fx.dim") == []


# ---- links ---------------------------------------------------------------------------------------


@needs_engine
def test_a_link_brings_back_what_was_seen(visit: Any, made: Any) -> None:
    at = visit("llama")
    at.page.focus("#stage")
    at.press("4", "[", "t")
    at.page.fill("#q", "q_proj")
    at.page.click("[data-chip=trainable]")
    at.page.focus("#q")
    at.press("Enter")
    at.page.select_option("#about .layer select", "1")
    hash_ = at.hash
    for part in ("node=", "mode=diff", "q=q_proj", "show=trainable", "table=1", "layer="):
        assert part in hash_
    again = visit("llama", hash_)
    assert again.hash == hash_
    assert again.svg() == at.svg()
    assert again.about == at.about
    assert again.page.is_visible("#table")
    again.go("")
    assert again.svg() == visit("llama").svg()
    again.go(hash_)
    assert again.svg() == at.svg()


@needs_engine
def test_a_link_may_name_a_module_by_its_path(visit: Any) -> None:
    at = visit("llama", "#node=model.layers.0.mlp&open=model.layers.0")
    assert at.about.startswith("mlp")
    at.go("#node=model.layers.0.self_attn.q_proj:lora_A")
    assert "lora_A" in at.about


@needs_engine
def test_a_link_to_nothing_says_so_and_shows_the_picture(visit: Any, made: Any) -> None:
    at = visit("walls", "#node=no.such&open=nor.this&mode=sideways&layer=x~9&show=all&%E0%A4%A")
    assert "no.such" in at.status
    assert "nor.this" in at.status
    assert at.ids()


# ---- keyboard ------------------------------------------------------------------------------------


@needs_engine
def test_everything_is_done_without_a_mouse(visit: Any, made: Any) -> None:
    drawing, _ = made("llama")
    at = visit("llama", "#mode=after")
    at.page.focus("#stage")
    at.press("ArrowDown")
    seen = ["input_ids"]
    for _ in range(3):
        at.press("ArrowDown")
        seen.append(at.about.split("\n")[0])
    # Down follows the edges: input, embedding, what enters the block, its first norm.
    assert seen[1] == "embed_tokens"
    assert seen[3] == "input_layernorm"
    at.press("ArrowUp", "ArrowUp", "ArrowUp")
    assert at.about.startswith("input_ids")
    at.press("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown")
    chosen = at.hash
    assert "self_attn" in chosen
    at.press("ArrowRight")
    assert at.hash != chosen
    at.press("Enter")
    assert any(i in drawing.graph.graph["boxes"] for i in at.ids())
    at.press("Enter")
    assert not any(i in drawing.graph.graph["boxes"] for i in at.ids())
    at.press("/")
    assert at.page.evaluate("document.activeElement.id") == "q"
    at.page.keyboard.type("lm_head")
    at.page.wait_for_timeout(30)
    at.press("Enter", "Escape", "Escape")
    assert at.about.startswith("lm_head")
    at.press("t")
    assert at.page.is_visible("#table")
    at.press("Escape", "t")
    assert not at.page.is_visible("#table")
    at.press("?")
    assert at.page.is_visible("#keys")
    at.press("Escape")
    assert not at.page.is_visible("#keys")
    at.press("f", "w", "+", "-", "d", "c")
    at.page.wait_for_function("window.copied")
    assert "Copied" in at.status


@needs_engine
def test_the_tree_is_one_stop_of_tab_and_moves_as_trees_do(visit: Any) -> None:
    at = visit("llama", "#mode=after")
    stops = at.page.locator("#tree [tabindex='0']")
    assert stops.count() == 1
    at.page.focus("#stage")
    at.press("m", "End")

    def here(name: str) -> Any:
        return at.page.evaluate(f"document.activeElement.getAttribute('{name}')")

    assert here("role") == "treeitem"
    at.press("Home")
    assert here("aria-level") == "1"
    at.press("l")  # type ahead: the first name with this letter
    assert "layers_0" in here("data-id")
    assert here("aria-expanded") == "true"
    fold = here("data-id")
    at.press("ArrowRight")
    assert here("aria-level") == "3"
    at.press("ArrowLeft", "ArrowLeft")
    assert (here("data-id"), here("aria-expanded")) == (fold, "false")
    assert fold in at.ids()
    at.press("ArrowRight")
    assert here("aria-expanded") == "true"
    assert fold not in at.ids()
    at.press("ArrowDown", "Enter")
    assert here("aria-selected") == "true"
    assert stops.count() == 1


# ---- the table and the panel -----------------------------------------------------------------------


@needs_engine
def test_a_row_and_its_node_are_selected_together(visit: Any, made: Any) -> None:
    at = visit("llama", "#table=1")
    name = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    at.page.click(f"#table tr[data-i]:has-text('{name}')")
    at.ready()
    assert at.about.startswith("B of q_proj")
    assert "rank" in at.about
    assert "live" in at.about
    at.page.focus("#stage")
    at.press("f")
    at.page.click("#still g.fx[id$=lm_head] >> nth=-1")
    chosen = at.page.locator("#table tr[aria-selected=true]")
    assert chosen.count() == 1
    assert "lm_head.weight" in chosen.inner_text()
    at.page.fill("#narrow", "lora_a")
    names = at.page.locator("#table tbody td:first-child").all_inner_texts()
    assert len(names) == 2
    assert all("lora_A" in n for n in names), names
    at.page.fill("#narrow", "")
    at_once = at.page.evaluate(
        """() => {
          document.querySelector("#table .scroll").scrollTop = 1e6;
          const narrow = document.getElementById("narrow");
          narrow.value = "lora_b";
          narrow.dispatchEvent(new Event("input"));
          const cells = [...document.querySelectorAll("#table tbody td:first-child")];
          return cells.map((e) => e.innerText);
        }"""
    )
    assert len(at_once) == 2
    assert all("lora_B" in n for n in at_once), at_once
    at.page.fill("#narrow", "")
    at.page.click("th[data-column=total] button")
    assert at.page.get_attribute("th[data-column=total]", "aria-sort") == "descending"
    down = at.page.locator("#table tbody td:first-child").all_inner_texts()
    at.page.click("th[data-column=total] button")
    assert at.page.get_attribute("th[data-column=total]", "aria-sort") == "ascending"
    assert at.page.locator("#table tbody td:first-child").all_inner_texts() != down


@needs_engine
def test_a_long_table_builds_only_the_rows_that_are_seen(visit: Any) -> None:
    at = visit("stack", "#table=1")
    assert "400 rows" in at.page.inner_text("#counted")
    assert at.page.locator("#table tr[data-i]").count() < 60
    at.page.focus("#table tr[data-i]")
    at.press("End")
    assert "199.bias" in at.page.locator("#table tr[data-i]").last.inner_text()
    assert at.page.locator("#table tr[data-i]").count() < 60
    at.press("Enter")
    assert "199" in at.about


@needs_engine
def test_a_fold_shows_the_names_of_the_layer_that_is_picked(visit: Any) -> None:
    at = visit("llama", "#node=model.layers.0.self_attn.q_proj&table=1")
    assert "model.layers.0.self_attn.q_proj" in at.about
    at.page.click("#about .layer button[aria-label='Next layer']")
    assert "model.layers.1.self_attn.q_proj" in at.about
    assert "model.layers.0.self_attn.q_proj" not in at.about
    assert "model.layers.1.self_attn.q_proj.weight" in at.page.inner_text("#table")
    assert "layer=model.layers.0~1" in at.hash
    assert at.search("/layers\\.1\\.mlp\\.up/") != "0 hits"


@needs_engine
def test_the_panel_tells_rank_verdict_and_source(visit: Any) -> None:
    at = visit("walls", "#node=cut:lora_A")
    if "lora_A" not in at.about:
        at.go(f"#node={quote(next(i for i in at.ids() if 'cut' in i and 'lora_a' in i.lower()))}")
    text = at.about
    for word in ("Class", "rank", "4", "alpha", "scaling", "cut", "detach", "Line", "fx nodes"):
        assert word in text


# ---- taking it away --------------------------------------------------------------------------------


@needs_engine
def test_a_copy_is_a_whole_svg_file_without_the_pages_own_signs(visit: Any, made: Any) -> None:
    drawing, _ = made("llama")
    at = visit("llama", "#q=q_proj&node=lm_head&show=trainable")
    root = ET.fromstring(at.svg())
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox") == ET.fromstring(drawing.svg).get("viewBox")
    (style,) = root.iter(f"{SVG}style")
    assert "prefers-color-scheme" in (style.text or "")
    words = " ".join(e.get("class", "") for e in root.iter()).split()
    assert {"chevron", "overlay", "dim", "near", "chosen"} & set(words) == set()

    def things(text: str) -> list[Any]:
        return sorted(
            (
                e.tag,
                e.get("id", ""),
                " ".join((e.get("class") or "").split()),
                (e.text or "").strip(),
            )
            for e in ET.fromstring(text).iter()
            if e.tag != f"{SVG}style"
        )

    # Of the first view, it is the still picture itself.
    assert things(at.svg()) == things(drawing.svg)


@needs_engine
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_reader_until_the_reader_chooses(visit: Any, scheme: Any) -> None:
    at = visit("walls", color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    node = "getComputedStyle(document.querySelector('#still .fx_frozen .s')).fill"
    first = at.page.evaluate(f"[{ground}, {node}]")
    at.page.focus("#stage")
    at.press("d")
    light = at.page.evaluate(f"[{ground}, {node}]")
    at.press("d")
    dark = at.page.evaluate(f"[{ground}, {node}]")
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    assert first == (light if scheme == "light" else dark)
    assert "@media" not in at.svg()


def test_colours_of_the_page_are_told_apart_by_everybody() -> None:
    chrome = explorer._CHROME
    for table in (chrome, {k: theme.DARK[v] for k, v in chrome.items()}):
        for ink in ("ink", "dim", "accent", "hot"):
            for ground in ("ground", "sheet"):
                assert contrast(table[ink], table[ground]) >= 4.5, (ink, ground)
        assert contrast(table["accent"], table["tint"]) >= 4.5
        assert contrast(table["ink"], table["warm"]) >= 4.5
        assert contrast(table["blue"], table["sheet"]) >= 3


def contrast(a: str, b: str) -> float:
    """Returns the contrast ratio of WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# ---- names nobody should give -----------------------------------------------------------------------


@needs_engine
def test_hostile_names_run_nothing_and_break_nothing(visit: Any, made: Any) -> None:
    drawing, _ = made("hostile")
    at = visit("hostile", "#table=1")
    assert len(at.ids()) == drawing.graph.number_of_nodes()
    at.page.focus("#stage")
    at.press("[")
    closed = at.ids()
    assert len(closed) < drawing.graph.number_of_nodes()
    shut = [i for i in closed if i in drawing.graph.graph["boxes"]]
    assert len(shut) == len(NAMES)
    for box in (shut[1], shut[9], shut[14], shut[22]):  # a tag, a long one, no text at all, %
        at.page.eval_on_selector(
            f"#{box}", "g => g.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
        )
        link = at.hash
        at.go("")
        at.go(link)
        assert at.hash == link
    for name in NAMES:
        at.search(name[:200].replace("\x00", " "))
    at.search("")
    ET.fromstring(at.svg())
    at.press("]", "?")
    assert at.page.evaluate("window.pwned") is None
    assert at.page.locator("#app script, #app img, #app iframe").count() == 0


def test_no_script_of_ours_turns_text_into_markup_or_code() -> None:
    text = explorer.script()
    for danger in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "fetch(",
        "XMLHttpRequest",
        "import(",
        "http:",
        "https:",
    ):
        assert danger not in text.replace('"http://www.w3.org/2000/svg"', ""), danger
    page = (resources.files("fxlora_viz") / "assets" / "explorer" / "page.html").read_text()
    policy = re.search(r'Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'")
    assert "unsafe-eval'" not in policy.group(1).replace("'wasm-unsafe-eval'", "")


def test_the_engine_brings_its_licence() -> None:
    folder = resources.files("fxlora_viz") / "assets" / "viz-js"
    assert "MIT" in (folder / "LICENSE").read_text()
    assert "Michael Daines" in (folder / "LICENSE").read_text()


_SCRIPT = """
import hashlib, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest, test_explorer
path = test_explorer.llama().save(Path(tempfile.mkdtemp()) / "x.html")
print("digest", hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_page_has_the_same_bytes_in_every_process() -> None:
    digests = set()
    for seed in ("0", "1234"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT.format(tests=str(Path(__file__).parent))],
            capture_output=True, text=True, env=env, check=True,
        )  # fmt: skip
        digests.update(line for line in done.stdout.splitlines() if line.startswith("digest"))
    assert len(digests) == 1


# ---- the large ones ---------------------------------------------------------------------------------


def large(name: str) -> tuple[GraphModule, GraphModule]:
    entries = test_pictures.ENTRIES
    if name != "llama-405b":
        graphs: tuple[GraphModule, GraphModule] = entries[name].graphs()
        return graphs
    import transformers

    path = Path(test_pictures.gallery.LLAMA)
    shape = {
        **json.loads(path.read_text(encoding="utf-8")), "hidden_size": 16384,
        "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    }  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    traced = fxlora.trace(model.eval(), ())
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return traced, fxlora.rewrite(traced, config)


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("name", ["llama-8b", "llama-405b", "deepseek-v3"])
def test_a_large_model_opens_closes_and_compares(browser: Any, tmp_path: Path, name: str) -> None:
    drawing = fxlora_viz.draw(*large(name), detail="full")  # a page sums nothing up: it opens
    file = drawing.save(tmp_path / "x.html")
    if name == "llama-8b":
        assert file.stat().st_size <= 1_600_000
    at = Explorer(browser, file).ready()
    assert sorted(at.ids()) == sorted(drawing.graph.nodes)
    at.page.focus("#stage")
    at.press("4", "[", "[")
    assert test_pictures.faults(at.svg()) == []
    at.press("3", "[", "[", "[", "]")
    assert test_pictures.faults(at.svg()) == []
    assert at.search("rank:16") != "0 hits" or name == "deepseek-v3"
    at.close()
