"""The docs say what the code does: the parity table is made from it, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxlora.config import HONOURED, NEUTRAL, REFUSED

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
        "Layers: `nn.Linear` and its subclasses, transformers' `Conv1D`, and 2-D and 3-D parameters",
        "through `target_parameters`. A targeted Embedding, convolution or MultiheadAttention is",
        "refused by name.",
        "",
    ]
    return "\n".join(lines)


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
