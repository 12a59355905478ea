"""The docs say what the code does: the parity table is made from it, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxlora import divergences
from fxlora.config import _REFUSED_INITS, HONOURED, NEUTRAL, REFUSED
from fxlora.divergences import KNOWN
from fxlora.layers import _VARIANTS, KINDS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def parity_page() -> str:
    """Returns docs/parity.md as the code has it."""
    lines = [
        "# Parity",
        "",
        "Every field of `peft.LoraConfig` (0.21) is honoured, says nothing about the graph, or is",
        "refused by name before anything is changed. Made from `fxlora/config.py`; a test holds it",
        "(`FXLORA_WRITE_DOCS=1` rewrites it).",
        "",
        "| field | what fxlora does |",
        "|---|---|",
        *(f"| `{k}` | {v} |" for k, v in HONOURED.items()),
        *(f"| `{k}` | refused: {v} |" for k, v in REFUSED.items()),
        *(f"| `{k}` | says nothing about the graph |" for k in sorted(NEUTRAL)),
        "",
        "Of `init_lora_weights`, refused: "
        + "; ".join(f"`{k}`: {v}" for k, v in _REFUSED_INITS.items())
        + ".",
        "",
        "## Layers",
        "",
        "| layer | variants it takes beside plain LoRA |",
        "|---|---|",
        *(f"| {k} | {', '.join(_VARIANTS[k]) or 'none'} |" for k in KINDS),
        "",
        "Linear and the convolutions and embeddings include their subclasses. Any other module that",
        "is targeted is refused by name, as in PEFT.",
        "",
        "## Where PEFT's number or behaviour is off",
        "",
        "`fxlora.compare` names what bears on a plan, measures it, and proves the rest equal to PEFT",
        "with PEFT's mistake built into a second graph. Made from `fxlora/divergences.py`; tests hold",
        "each line against the installed peft.",
        "",
        "| name | shows in | what PEFT does | thread |",
        "|---|---|---|---|",
        *(f"| {k.name} | {k.when} | {k.what} | {k.thread or 'none known'} |" for k in KNOWN),
        "",
        *_deliberate(),
    ]
    return "\n".join(lines)


def _deliberate() -> list[str]:
    rows = getattr(divergences, "DELIBERATE", ())
    if not rows:
        return []
    return [
        "## Where fxlora answers otherwise on purpose",
        "",
        "| field | PEFT | fxlora | why |",
        "|---|---|---|---|",
        *(f"| {r.field} | {r.peft} | {r.ours} | {r.why} |" for r in rows),
        "",
    ]


def test_the_parity_page_is_the_code_s() -> None:
    import os

    page = ROOT / "docs" / "parity.md"
    if os.environ.get("FXLORA_WRITE_DOCS"):
        page.write_text(parity_page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == parity_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_and_picture_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_command_line_page_names_every_option() -> None:
    from fxlora.cli import _parser

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in _parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            for option in action.option_strings:
                assert option in page or option in ("-h", "--help"), option
