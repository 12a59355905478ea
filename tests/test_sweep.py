"""Every causal-LM class of transformers against peft, on meta, for all-linear (slow).

`docs/coverage.md` is the record: the test runs the sweep and holds it to that page, line by line.
`python tests/test_sweep.py` rewrites the page from a sweep.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "coverage.md"
MAPPING = "MODEL_FOR_CAUSAL_LM_MAPPING"

MEANING = {
    "equal": "names, shapes, flags, counts equal peft's, and the certificate holds",
    "peft": "traced, planned and rewritten; peft itself refuses or fails",
    "trace": "cannot be traced",
    "plan": "traced; the configuration is refused",
    "differs": "differs from peft",
    "build": "transformers cannot build it from its default config (or lacks a package)",
}


def sweep() -> list[dict[str, object]]:
    """Runs the sweep in two processes and returns its rows in the mapping's order."""
    import transformers
    from sweep import classes

    names = [name for name, _, _ in classes(MAPPING)]
    halves = [names[0::2], names[1::2]]
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "sweep.py"), MAPPING, *half],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for half in halves
    ]  # fmt: skip
    rows = [json.loads(line) for p in running for line in p.communicate()[0].splitlines()]
    assert all(p.returncode == 0 for p in running), transformers.__version__
    return sorted(rows, key=lambda r: names.index(str(r["name"])))


def _reason(detail: str) -> str:
    text = re.sub(r"\S*/(site-packages|lib/python[\d.]+)/", "", detail)
    # A set in peft's message prints in any order.
    text = re.sub(r"\{('[^{}]*')\}", lambda m: ", ".join(sorted(m[1].split(", "))), text)
    text = re.split(r" This line (chooses|makes)| Check that model", text)[0]
    return text.replace("|", "\\|").replace("\n", " ")[:220]


def page(rows: list[dict[str, object]]) -> str:
    """Returns docs/coverage.md for a sweep."""
    import peft
    import torch
    import transformers

    counts = {k: sum(r["status"] == k for r in rows) for k in MEANING}
    fixed = [str(r["name"]) for r in rows if r["status"] == "equal" and not r["dynamic"]]
    lines = [
        "# Coverage: causal language models",
        "",
        f"Every class of transformers {transformers.__version__}'s `{MAPPING}`, its default config",
        'cut to two layers, on the meta device, with `target_modules="all-linear"`: traced, planned,',
        "rewritten, and compared with peft "
        f"{peft.__version__} on torch {torch.__version__.partition('+')[0]}.",
        "Made by `python tests/test_sweep.py`; the slow test runs it again and holds it to this page.",
        "",
        "| result | classes | meaning |",
        "|---|---|---|",
        *(f"| {k} | {counts[k]} | {MEANING[k]} |" for k in MEANING if counts[k]),
        f"| | {len(rows)} | |",
        "",
        "Traced with fixed sizes (no symbolic ones): " + (", ".join(fixed) or "none") + ".",
        "",
        "| class | result | sites | reason |",
        "|---|---|---|---|",
        *(
            f"| {r['name']} | {r['status']} | {r['sites'] or ''} | {_reason(str(r['detail']))} |"
            for r in rows
        ),
        "",
    ]
    return "\n".join(lines)


def recorded() -> dict[str, str]:
    """Returns class -> result as the page has it."""
    found = re.findall(r"^\| (\w+) \| (\w+) \| \d* \|", PAGE.read_text(encoding="utf-8"), re.M)
    return dict(found)


@pytest.mark.slow
def test_every_causal_lm_class_is_what_the_coverage_page_says() -> None:
    import transformers

    now = {str(r["name"]): str(r["status"]) for r in sweep()}
    if f"transformers {transformers.__version__}'s" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page was made with another version of transformers")
    assert now == recorded()


def test_the_coverage_page_lists_no_difference_from_peft() -> None:
    results = recorded()
    assert len(results) > 150
    assert "differs" not in results.values()
    assert sum(v == "equal" for v in results.values()) > 130


if __name__ == "__main__":
    PAGE.write_text(page(sweep()), encoding="utf-8")
