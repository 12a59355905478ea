"""Every class of transformers' auto-mappings against peft, on meta, for all-linear (slow).

`docs/coverage.md` is the record: the test runs the sweep and holds it to that page, class by class.
`python tests/test_sweep.py` rewrites the page from a sweep.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "coverage.md"

MEANING = {
    "equal": "names, shapes, flags, counts equal peft's, and the certificate holds",
    "peft": "traced, planned and rewritten; peft itself refuses or fails",
    "trace": "cannot be traced",
    "plan": "traced; the configuration is refused",
    "differs": "differs from peft",
    "build": "transformers cannot build it from its default config, or lacks a package for it",
}


def sweep(script: str = "sweep.py") -> list[dict[str, Any]]:
    """Runs a sweep in two processes and returns its rows in the mappings' order."""
    from sweep import classes

    names = [name for _, name, _, _ in classes()]
    halves = [names[0::2], names[1::2]]
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / script), *half],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for half in halves
    ]  # fmt: skip
    rows = [json.loads(line) for p in running for line in p.communicate()[0].splitlines()]
    assert all(p.returncode == 0 for p in running)
    return sorted(rows, key=lambda r: names.index(str(r["name"])))


def _reason(row: dict[str, Any]) -> str:
    text = re.sub(r"\S*/(site-packages|lib/python[\d.]+)/", "", row["detail"])
    text = text.replace(f"{row['name']} cannot be traced: ", "")
    # A set in peft's message prints in any order.
    text = re.sub(r"\{('[^{}]*')\}", lambda m: ", ".join(sorted(m[1].split(", "))), text)
    text = re.split(r" This line makes| Check (?:that model|out the)| You can install", text)[0]
    # The error's last words, kept short: what kind of obstacle the line before it is.
    text = re.sub(r" This line chooses its path by .*", " It depends on a tensor's values.", text)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 260 else text[:257] + "..."


def page(rows: list[dict[str, Any]]) -> str:
    """Returns docs/coverage.md for a sweep."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    used = [k for k in MEANING if any(r["status"] == k for r in rows)]
    totals = [
        f"| {task} | {len(of)} | " + " | ".join(str(_count(of, k) or "") for k in used) + " |"
        for task, of in [*((t, _of(rows, t)) for t in tasks), ("**all**", rows)]
    ]
    lines = [
        *_head(),
        "",
        "| task | classes | " + " | ".join(used) + " |",
        "|---|" + "---|" * (len(used) + 1),
        *totals,
        "",
        *(f"- *{k}*: {MEANING[k]}" for k in used),
        "",
        *(line for task in tasks for line in _section(task, _of(rows, task))),
    ]
    return "\n".join(lines)


def _of(rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    return [r for r in rows if r["task"] == task]


def _count(rows: list[dict[str, Any]], status: str) -> int:
    return sum(r["status"] == status for r in rows)


def _head() -> list[str]:
    import peft
    import torch
    import transformers

    versions = f"peft {peft.__version__} on torch {torch.__version__.partition('+')[0]}"
    return [
        "# Coverage",
        "",
        f"Every class of transformers {transformers.__version__}'s auto-mappings for seven tasks, "
        "in eval mode, on the",
        'meta device, with `target_modules="all-linear"` and experts that are bare parameters in',
        f"`target_parameters`: traced, planned, rewritten, and compared with {versions}.",
        "A class of two tasks counts under the first. Made by `python tests/test_sweep.py`; the "
        "slow test runs",
        "it again and holds it to this page.",
        "",
        "Each model is built from its default config, cut to two layers (two blocks per stage), "
        "and run on the",
        "example inputs fxlora makes from the config. What a default config leaves open and the "
        "model then needs is",
        "filled in (a padding token, the size of an alphabet, a number of experts). Models that "
        "chat about images or",
        "sounds run on text alone: the linear layers of their towers are adapted, and not called.",
    ]


def _section(task: str, rows: list[dict[str, Any]]) -> list[str]:
    equal = [r for r in rows if r["status"] == "equal"]
    moving, fixed = ([r for r in equal if r["dynamic"] is d] for d in (True, False))
    return [
        f"## {task}",
        "",
        "| result | classes, with the number of adapted sites, or the reason |",
        "|---|---|",
        *(
            f"| {label} | {', '.join(_entry(r) for r in of)} |"
            for label, of in (("equal", moving), ("equal, on the traced sizes only", fixed))
            if of
        ),
        *(f"| {r['status']} | {_entry(r)}: {_reason(r)} |" for r in rows if r not in equal),
        "",
    ]


def _entry(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['sites']})" if row["sites"] else row["name"]


def recorded() -> dict[str, str]:
    """Returns class -> result as the page has it."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        m = re.match(rf"\| ({'|'.join(MEANING)})(?:, on [^|]*)? \| (.*) \|$", line)
        if m and m[1] == "equal":
            found.update(dict.fromkeys(re.findall(r"(\w+)(?: \(\d+\))?(?:,|$)", m[2]), "equal"))
        elif m:
            found[re.match(r"\w+", m[2])[0]] = m[1]  # type: ignore[index]
    return found


@pytest.mark.slow
def test_every_class_is_what_the_coverage_page_says() -> None:
    import peft
    import transformers

    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}'s" not in text:
        pytest.skip("the page was made with another version of transformers")
    if f"peft {peft.__version__} on" not in text:
        pytest.skip("the page was made with another version of peft")
    assert {r["name"]: r["status"] for r in sweep()} == recorded()


@pytest.mark.slow
def test_the_static_verdict_is_autograd_s_on_every_class() -> None:
    rows = sweep("gradient_sweep.py")
    assert not [r for r in rows if r["status"] == "differs"]
    count = Counter(r["status"] for r in rows)
    # What cannot be built or traced is on the coverage page; what has no kernel on meta is little.
    assert count["agree"] > 350, count
    assert count["run"] < 50, [r for r in rows if r["status"] == "run"]


def test_the_coverage_page_lists_no_difference_from_peft() -> None:
    results = list(recorded().values())
    assert len(results) > 450
    assert "differs" not in results
    assert "plan" not in results
    assert results.count("equal") > 400


if __name__ == "__main__":
    PAGE.write_text(page(sweep()), encoding="utf-8")
