"""In a notebook: graphs, plans and comparisons show themselves; a real notebook is executed."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fxlora_viz
import nbformat
import pytest
import torch
import zoo
from nbclient import NotebookClient
from peft import LoraConfig

import fxlora
from fxlora.html import html
from fxlora.text import table

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
needs_engine = pytest.mark.skipif(
    not fxlora_viz.available_engines(), reason="no layout engine: pip install fxlora[draw]"
)
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])

# ---- what prints as a table shows as one -------------------------------------------------------


def _lora() -> Any:
    return fxlora.rewrite(fxlora.trace(zoo.seed()), CONFIG)


def _coverage() -> Any:
    from fxlora.coverage import coverage

    traced = fxlora.trace(zoo.seed())
    return coverage(traced, fxlora.plan(traced, CONFIG))


def _choice() -> Any:
    from fxlora.choose import choose

    return choose(fxlora.trace(zoo.seed()), "all-linear")


def _explanation() -> Any:
    from fxlora.explain import explain

    traced = fxlora.trace(zoo.seed())
    return explain(traced, fxlora.plan(traced, CONFIG), "0")


def _memory() -> Any:
    from fxlora.memory import memory

    return memory(_lora(), (torch.zeros(1, 10),))


def _check() -> Any:
    from fxlora.check import Check, Row

    return Check((Row("base_model.model.0.lora_A.weight", "0.lora_A", "0", "adapter", "missing"),))


def _report() -> Any:
    from fxlora.lint import lint

    return lint(fxlora.trace(zoo.seed()), LoraConfig(r=64, target_modules=["0", "2"]))


def _found() -> Any:
    from fxlora.recognise import recognise

    return recognise(_lora())


VALUES: dict[str, Callable[[], Any]] = {
    "Plan": lambda: fxlora.plan(fxlora.trace(zoo.seed()), CONFIG),
    "Comparison": lambda: fxlora.compare(zoo.seed(), CONFIG, (torch.zeros(1, 10),)),
    "Effects": lambda: fxlora.effects(_lora()),
    "Coverage": _coverage,
    "Choice": _choice,
    "Explanation": _explanation,
    "Memory": _memory,
    "Check": _check,
    "Report": _report,
    "Found": _found,
}


def said(markup: str) -> list[str]:
    """Returns the words of an HTML text, read by a parser."""
    return " ".join(ET.fromstring(markup).itertext()).split()


def printed(text: str) -> list[str]:
    """Returns the words of a text, without the rules of its tables."""
    return [w for w in text.split() if set(w) != {"-"} or w == "-"]


def rulers(text: str) -> int:
    return sum(set(line) <= {"-", " "} and "-" in line for line in text.splitlines())


def test_every_class_that_prints_is_tried_here() -> None:
    found = set()
    for path in (ROOT / "fxlora").rglob("*.py"):
        found |= set(re.findall(r"^class (\w+)\(Printed\b", path.read_text("utf-8"), re.MULTILINE))
    assert found == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_what_prints_as_a_table_shows_the_same_words_as_html(name: str) -> None:
    value = VALUES[name]()
    bundle = value._repr_mimebundle_()
    assert bundle == {"text/plain": str(value), "text/html": value._repr_html_()}
    # One column's rule may be a single dash; a cell that is one stays.
    words = [w for w in said(bundle["text/html"]) if w != "-"]
    assert words == [w for w in printed(str(value)) if w != "-"]
    root = ET.fromstring(bundle["text/html"])
    assert len(list(root.iter("table"))) == rulers(str(value))


def test_a_table_is_one_for_screen_readers_and_for_any_theme() -> None:
    markup = html(
        ["2 sites", "", table(("site", "", "r"), [("q", "x2", "8"), ("v", "", "8")], (2,))]
    )
    root = ET.fromstring(markup)
    heads = [(th.get("scope"), th.text) for th in root.iter("th")]
    assert heads == [("col", "site"), ("col", "r"), ("row", "q"), ("row", "v")]
    assert root.find(".//table").get("aria-label") == "2 sites"  # type: ignore[union-attr]
    assert {len(tr) for tr in root.iter("tr")} == {3}
    for word in ("color", "background", "font-size", "<style", "class="):
        assert word not in markup


HOSTILE = "<script>alert(1)</script>\"'&amp;\x00\x1b[31m\ud800\nx</td></table>"


def test_hostile_names_are_shown_and_do_nothing() -> None:
    parts = [HOSTILE, f"warning: {HOSTILE}", table(("name", HOSTILE), [(HOSTILE, "  part")])]
    root = ET.fromstring(html(parts).encode("utf-8"))  # a half surrogate would not encode
    assert {e.tag for e in root.iter()} <= {
        "div", "p", "strong", "pre", "table", "thead", "tbody", "tr", "th", "td"
    }  # fmt: skip
    cells = ["".join(c.itertext()) for row in root.iter("tr") for c in row]
    assert "<script>alert(1)</script>\"'&amp;\ufffd\ufffd[31m\ufffd\nx</td></table>" in cells
    assert "\u00a0\u00a0part" in cells


def test_a_plan_of_a_thousand_sites_is_folded_into_few_rows() -> None:
    plan = VALUES["Plan"]()
    sites = tuple(
        replace(s, site=replace(s.site, name=f"layers.{i}.{s.name}"), reason="named")
        for i in range(1000)
        for s in plan
    )
    many = replace(plan, sites=sites)
    root = ET.fromstring(many._repr_html_())
    rows = [["".join(c.itertext()) for c in tr] for tr in root.iter("tr")]
    assert len(rows) - 1 == len(plan)
    assert {r[1] for r in rows[1:]} == {"x1000"}
    assert len(many._repr_html_()) < 4000


# ---- pictures beside others in one page --------------------------------------------------------


def drawings() -> tuple[fxlora_viz.Drawing, fxlora_viz.Drawing]:
    traced = fxlora.trace(zoo.seed())
    lora = fxlora.rewrite(traced, CONFIG)
    return fxlora_viz.draw(traced, theme="dark"), fxlora_viz.draw(traced, lora)


@needs_engine
def test_two_pictures_in_one_page_share_no_id_and_no_rule() -> None:
    one, other = (ET.fromstring(str(d._repr_svg_())) for d in drawings())
    ids = [[e.get("id") for e in root.iter() if e.get("id")] for root in (one, other)]
    assert not set(ids[0]) & set(ids[1])
    for root, mine in zip((one, other), ids, strict=True):
        assert len(mine) == len(set(mine))
        assert set(root.get("aria-labelledby", "").split()) <= set(mine)
        for edge in root.iter(f"{SVG}g"):
            for end in ("data-from", "data-to"):
                assert edge.get(end) is None or edge.get(end) in mine
        (name,) = root.get("class", "").split()
        style = re.sub(r"@media[^{]*\{(.*?\})\}", r"\1", root.find(f"{SVG}style").text or "")  # type: ignore[union-attr]
        selectors = [s for rule in style.split("}")[:-1] for s in rule.split("{")[0].split(",")]
        assert selectors
        assert all(f".{name}" in s.split(" ") or s == f".{name}" for s in selectors)
    assert one.get("class") != other.get("class")


@needs_engine
def test_a_picture_follows_the_notebooks_theme_and_else_the_readers() -> None:
    fixed, auto = (str(d._repr_svg_()) for d in drawings())
    for host in ('[data-jp-theme-light="false"] .', ".vscode-dark .", "prefers-color-scheme:dark"):
        assert host in auto
        assert host not in fixed
    used = set(re.findall(r"var\((--fx[0-9A-F]{6})\)", auto))
    for block in re.findall(r"\{((?:--fx[0-9A-F]{6}:#[0-9A-F]{6};?)+)\}", auto):
        assert used <= {pair.split(":")[0] for pair in block.split(";")}


@needs_engine
def test_a_notebooks_picture_is_the_saved_one_but_for_names_and_style() -> None:
    def shown(svg: str) -> list[Any]:
        root = ET.fromstring(svg)
        return [
            (e.tag, e.text, {k: v for k, v in e.attrib.items() if k not in named})
            for e in root.iter()
            if e.tag != f"{SVG}style" and e is not root
        ]

    named = {"id", "data-from", "data-to"}
    drawing = drawings()[1]
    assert shown(str(drawing._repr_svg_())) == shown(drawing.svg)
    assert drawing._repr_svg_() == drawings()[1]._repr_svg_()


# ---- a real notebook ---------------------------------------------------------------------------

MORE = [
    "print('IPython' in __import__('sys').modules)",
    "import fxlora.lint\nfxlora.lint.lint(traced, config)",
    "class Small(torch.nn.Module):\n"
    "    def forward(self, x):\n        return x + 1\n"
    "torch.fx.symbolic_trace(Small())",
    "fxlora_viz.engines.available_engines = lambda: ()\nfxlora_viz.draw(traced)",
    "traced  # without an engine",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    notebook = nbformat.read(ROOT / "examples" / "fxlora.ipynb", 4)
    notebook = copy.deepcopy(notebook)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in MORE]
    place = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    )
    client.execute()
    return notebook


def outputs(notebook: Any, source: str) -> list[Any]:
    """Returns what the only cell that ends so has put out, as (kind of output, its data)."""
    (cell,) = (c for c in notebook.cells if f"\n{c.source}".endswith(f"\n{source}"))
    return [(o.output_type, o.get("data", o.get("text"))) for o in cell.outputs]


def result(notebook: Any, source: str) -> dict[str, str]:
    ((kind, data),) = outputs(notebook, source)
    assert kind == "execute_result"
    return dict(data)


def test_the_example_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(ROOT / "examples" / "fxlora.ipynb", 4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)


@needs_engine
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("traced", ["layers.0 … 15", "q_proj", "sdpa"]),
        ("lora", ["layers.0 … 15", "q_proj", "lora_A"]),
        ("fxlora_viz.draw(traced, lora)", ["Before", "After LoRA"]),
    ],
)
def test_a_graph_and_a_drawing_show_themselves_as_svg(
    executed: Any, cell: str, words: list[str]
) -> None:
    data = result(executed, cell)
    assert set(data) == {"image/svg+xml", "text/plain"}
    root = ET.fromstring(data["image/svg+xml"])
    assert root.tag == f"{SVG}svg"
    text = " ".join(root.itertext())
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("plan", ["32 of 114 linear sites adapted", "model.layers.*.self_attn.q_proj", "x16"]),
        ("fxlora.effects(lora)", ["32 of 32 adapters live"]),
        ("fxlora.compare(model, config, (), inputs)", ["are equal", "the same computation"]),
        ("fxlora.lint.lint(traced, config)", ["LlamaForCausalLM: no findings"]),
    ],
)
def test_plans_comparisons_and_reports_show_themselves_as_html(
    executed: Any, cell: str, words: list[str]
) -> None:
    data = result(executed, cell)
    assert set(data) == {"text/html", "text/plain"}
    shown = " ".join(said(data["text/html"]))
    for word in words:
        assert word in shown
        assert word in data["text/plain"]


def test_a_graph_of_others_shows_as_it_always_did(executed: Any) -> None:
    source = MORE[2].split("\n", 1)[1]
    assert set(result(executed, source)) == {"text/plain"}


def test_without_an_engine_a_notebook_shows_text_and_says_what_to_install(executed: Any) -> None:
    data = result(executed, "fxlora_viz.draw(traced)")
    assert set(data) == {"text/plain"}
    assert data["text/plain"].startswith("<Drawing of ")
    assert "pip install fxlora[draw]" in data["text/plain"]
    last = executed.cells[-1].outputs
    assert [o.output_type for o in last] == ["stream", "execute_result"]
    assert "pip install fxlora[draw]" in last[0].text
    assert "Traceback" not in last[0].text
    assert set(last[1].data) == {"text/plain"}
