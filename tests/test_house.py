"""The house: which file may import which, what an import costs, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Data flows down this list; a file may import what stands above it.
LAYERS = [
    ["errors", "text", "writing"],
    ["html"],
    ["facts"],
    [
        "trace.sizes",
        "trace.operators",
        "trace.regions",
        "trace.known",
        "trace.shell",
        "trace.bulk",
        "trace.lazy",
    ],
    ["trace.arguments", "trace.paths", "trace.guards", "trace.likeness"],
    ["trace.repeats"],
    ["trace.recorder"],
    ["trace.replay", "trace.examples"],
    ["trace.concrete", "trace.symbolic", "trace.modes"],
    ["trace.tracer"],
    ["trace"],
    ["example_inputs", "sites", "config", "matching", "freezing"],
    ["gradients", "runtime", "slices"],
    ["initialise", "layers", "extras", "targets", "reach"],
    ["advice"],
    ["plan"],
    ["build", "nodes", "tree"],
    ["branches", "dense"],
    ["weights"],
    ["uses"],
    ["rewrite", "divergences", "effects"],
    ["combine", "merge", "keys", "memory"],
    ["adapters", "check", "blocks"],
    ["checkpoint"],
    ["recognise.found", "recognise.reading"],
    ["recognise.maps", "recognise.rows"],
    ["recognise.delta"],
    ["recognise.match"],
    ["recognise.strip"],
    ["recognise.lift"],
    ["recognise"],
    ["dtypes", "peft_side", "models"],
    ["canonical"],
    ["compare"],
    ["flops", "roles", "fused", "suffixes"],
    ["optimize.report", "optimize.functions", "optimize.segments"],
    ["optimize.edit", "optimize.grouping"],
    ["optimize.flatten", "optimize.dropouts", "optimize.casts", "optimize.scalings"],
    [
        "optimize.products",
        "optimize.shared_casts",
        "optimize.reads",
        "optimize.checkpoints",
        "optimize.groups",
    ],
    ["optimize.orders", "optimize.frontier"],
    ["optimize.run"],
    ["optimize"],
    ["coverage", "patterns"],
    ["choose", "coverage_report", "ladder"],
    ["explain", "memory_sweep"],
    ["explain_report"],
    ["report"],
    ["lint.definitions", "lint.finding", "lint.flow"],
    ["lint.context"],
    [
        "lint.rules_effects",
        "lint.rules_merging",
        "lint.rules_serving",
        "lint.rules_shapes",
        "lint.rules_targets",
        "lint.rules_training",
    ],
    ["lint.catalog"],
    ["lint.pages", "lint.settings"],
    ["lint.suppressions"],
    ["lint.run"],
    ["lint.formats"],
    ["lint"],
    [""],
    ["cli_values"],
    ["cli_commands"],
    ["cli"],
    ["__main__"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
# Said once, at the moment it is printed: a plan and a comparison know how to print themselves.
LATE = {
    ("lint.finding", "lint.formats"),
    ("plan", "report"),
    ("compare", "report"),
    ("effects", "report"),
    ("coverage", "coverage_report"),
    ("explain", "explain_report"),
}


def files() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "fxlora").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "fxlora").with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


def imports(path: Path, package: str) -> set[str]:
    out = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            here = ROOT / node.module.replace(".", "/")
            for a in node.names:
                # "from fxlora.trace import sizes" is an import of the file sizes, not of trace.
                inner = (here / f"{a.name}.py").exists()
                out.add(f"{node.module}.{a.name}" if inner else node.module)
    return {m for m in out if m == package or m.startswith(package + ".")}


def violations(sources: dict[str, Path]) -> list[str]:
    known, found = set(sources), []
    for name, path in sources.items():
        for target in imports(path, "fxlora"):
            short = target.removeprefix("fxlora").lstrip(".")
            if short not in known or short == name or (name, short) in LATE:
                continue
            if short == "" and name in ("cli_values", "cli_commands", "__main__"):
                continue
            if RANK[short] >= RANK[name] and not (short == "" or name == ""):
                found.append(f"{name} imports {short}")
    return found


def test_every_file_has_a_place_and_imports_only_what_stands_above_it() -> None:
    assert set(files()) == set(RANK)
    assert violations(files()) == []


def test_the_layer_test_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "errors.py"
    bad.write_text("from fxlora.compare import compare\n", encoding="utf-8")
    assert violations({**files(), "errors": bad}) == ["errors imports compare"]


@pytest.mark.parametrize("name", [n for n in files() if not n.startswith("cli")])
def test_the_core_never_imports_drawing_and_transformers_only_where_a_model_is_named(
    name: str,
) -> None:
    path = files()[name]
    assert imports(path, "fxlora_viz") == set()
    assert name == "models" or imports(path, "transformers") == set()


def test_every_file_says_its_purpose_in_its_first_line() -> None:
    for path in files().values():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc, path
        assert len(doc.splitlines()[0]) > 20, path


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_fxlora_is_light() -> None:
    heavy = {"peft", "transformers", "networkx", "graphviz", "fxlora_viz", "accelerate"}
    assert heavy & loaded_by("import fxlora") == set()


def test_the_light_import_test_can_fail() -> None:
    assert "networkx" in loaded_by("import fxlora, networkx")
