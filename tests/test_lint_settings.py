"""The linter's settings, suppressions, formats and command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from peft import LoraConfig
from test_house import loaded_by

import fxlora
from fxlora.cli import main
from fxlora.errors import ConfigError
from fxlora.lint import Options, Report, Settings, lint
from fxlora.lint import settings as settings_file
from fxlora.lint.settings import discover, from_dict, load, overridden

HERE = Path(__file__).parent


# ---- settings ------------------------------------------------------------------------------------

TOML = """
[tool.fxlora.lint]
select = ["DEFAULT", "FXL406"]
ignore = ["uneven-scaling"]
fail-on = "error"
serve = "vllm"
max-lora-rank = 64
trained-b = 1

[tool.fxlora.lint.severity]
rank-above-layer = "note"

[tool.fxlora.lint.sites]
"layers.*.gate" = ["FXL106"]
"""
READ = Settings(
    select=("DEFAULT", "FXL406"), ignore=("uneven-scaling",), fail_on="error",
    severity={"rank-above-layer": "note"}, sites={"layers.*.gate": ("FXL106",)},
    options=Options(serve="vllm", max_lora_rank=64, trained_b=1.0),
)  # fmt: skip


def toml(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


needs_toml = pytest.mark.skipif(
    settings_file._toml_reader() is None, reason="Python 3.10 reads TOML with tomli only"
)


@needs_toml
def test_settings_are_read_from_toml_and_from_json_alike(tmp_path: Path) -> None:
    assert load(toml(tmp_path, "pyproject.toml", TOML)) == READ
    assert load(toml(tmp_path, "fxlora.toml", TOML.replace("tool.fxlora.", ""))) == READ
    table = {
        "select": ["DEFAULT", "FXL406"], "ignore": ["uneven-scaling"], "fail-on": "error",
        "serve": "vllm", "max-lora-rank": 64, "trained-b": 1.0,
        "severity": {"rank-above-layer": "note"}, "sites": {"layers.*.gate": ["FXL106"]},
    }  # fmt: skip
    assert load(toml(tmp_path, "plain.json", json.dumps(table))) == READ
    assert load(toml(tmp_path, "deep.json", json.dumps({"lint": table}))) == READ


@needs_toml
def test_the_nearest_project_s_settings_are_found(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    toml(tmp_path, "pyproject.toml", TOML)
    toml(inner, "pyproject.toml", "[tool.other]\nx = 1\n")
    assert discover(inner) == READ
    toml(tmp_path / "a", "fxlora.toml", "[lint]\nfail-on = 'note'\n")
    assert discover(inner) == Settings(fail_on="note")


def test_another_project_s_broken_file_is_not_ours_to_refuse(tmp_path: Path) -> None:
    toml(tmp_path, "pyproject.toml", "this is [not toml")
    assert discover(tmp_path) == discover(tmp_path.parent)


def test_without_a_toml_reader_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_file, "_toml_reader", lambda: None)
    path = toml(tmp_path, "fxlora.toml", "[lint]\n")
    with pytest.raises(ConfigError, match=r"Python 3\.10 has no TOML reader; use Python 3\.11"):
        load(path)
    assert load(toml(tmp_path, "s.json", '{"fail-on": "note"}')).fail_on == "note"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"slect": []}, "no setting 'slect'. Did you mean 'select'?"),
        ({"select": "FXL2"}, "select is 'FXL2'; write a list, such as ['FXL2']"),
        ({"ignore": ["bypased-adapter"]}, "Did you mean 'bypassed-adapter'?"),
        ({"severity": {"FXL201": "bad"}}, "'bad' is none of error, warning, note"),
        ({"severity": {"FXL999": "note"}}, "'FXL999' is no lint rule"),
        ({"severity": ["FXL201"]}, "severity is ['FXL201'], not a table"),
        ({"sites": {"a": "FXL201"}}, "sites['a'] is 'FXL201'; write a list"),
        ({"sites": {"a": ["nope"]}}, "'nope' is no lint rule"),
        ({"fail-on": "always"}, "fail-on: 'always' is none of error, warning, note"),
        ({"dtype": "bfloat17"}, "dtype='bfloat17' is none of 'bfloat16'"),
        ({"max-lora-rank": "64"}, "max-lora-rank is '64'; it takes a int, such as 16"),
        ({"max-lora-rank": True}, "max-lora-rank is True; it takes a int"),
        ({"max-lora-rank": 0}, "a rank is at least 1"),
        ({"trained-b": 0.0}, "trained-b=0.0: a size is above 0"),
        ({"input-require-grads": 1}, "input-require-grads is 1; it takes a bool"),
        ({"serve": "tgi"}, "serve='tgi' is none of 'none', 'vllm'"),
    ],
)
def test_a_wrong_setting_names_the_file_the_value_and_the_fix(
    table: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(table, "my.toml")
    assert message in str(error.value)
    assert str(error.value).startswith("my.toml")


def test_a_file_without_a_table_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \[tool.fxlora.lint\] table"):
        load(toml(tmp_path, "s.json", '{"a": 1}'))
    with pytest.raises(ConfigError, match="not JSON"):
        load(toml(tmp_path, "t.json", "{"))
    with pytest.raises(ConfigError, match="not a readable text file"):
        load(tmp_path / "none.json")


def test_the_command_line_wins_over_the_file() -> None:
    found = overridden(
        READ, {"select": None, "ignore": (), "severity": {"FXL301": "error"}, "fail_on": None},
        {"serve": None, "max_lora_rank": 8},
    )  # fmt: skip
    assert (found.select, found.ignore, found.fail_on) == (READ.select, (), "error")
    assert found.severity == {"rank-above-layer": "note", "FXL301": "error"}
    assert (found.options.serve, found.options.max_lora_rank) == ("vllm", 8)


# ---- suppressions --------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)  {a}
        self.b = nn.Linear(
            4, 4  {b}
        )
        self.unused = nn.Linear(4, 4)  {unused}
    def forward(self, x):
        x = self.a(x)  {call}
        return self.b(x)
"""
COUNT = iter(range(1000))


def module_of(folder: Path, **comments: str) -> ModuleType:
    name = f"suppressed_{next(COUNT)}"
    path = folder / f"{name}.py"
    comments = {"a": "", "b": "", "unused": "", "call": "", **comments}
    path.write_text(MODEL.format(**comments), encoding="utf-8")
    return loaded(name, path)


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # inspect finds a class's source by its module
    spec.loader.exec_module(module)
    return module


def suppressed(folder: Path, targets: Any = ("a", "b"), **comments: str) -> Report:
    """Lints a model of a rank too high for its layers, with these comments in its code."""
    sites = comments.pop("sites", None)
    traced = fxlora.trace(module_of(folder, **comments).Model(), (torch.zeros(2, 4),))
    config = LoraConfig(r=8, target_modules=list(targets))
    return lint(traced, config, Settings(sites=sites) if sites else None)


def rows(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    return [(f.rule, f.sites) for f in report]


@pytest.mark.parametrize("comments", [
    {"call": "# fxlora: ignore[FXL301]"},
    {"a": "# fxlora: ignore[FXL301]"},
    {"a": "# why not  # fxlora:ignore[rank-above-layer, FXL2]"},
    {"call": "# fxlora: ignore"},
    {"sites": {"a": ("FXL3",)}},
])  # fmt: skip
def test_a_suppression_hides_its_rule_at_its_site(tmp_path: Path, comments: Any) -> None:
    assert rows(suppressed(tmp_path)) == [("FXL301", ("a",)), ("FXL301", ("b",))]
    found = suppressed(tmp_path, **comments)
    assert rows(found) == [("FXL301", ("b",))]
    assert found.suppressed == 1
    assert "1 suppressed" in str(found)


def test_a_comment_may_stand_on_any_line_of_the_definition(tmp_path: Path) -> None:
    found = suppressed(tmp_path, b="# fxlora: ignore[FXL301]")
    assert rows(found) == [("FXL301", ("a",))]


def test_a_layer_that_is_never_called_is_suppressed_where_it_is_defined(tmp_path: Path) -> None:
    targets = ["unused"]
    found = suppressed(tmp_path, targets)
    assert [f.rule for f in found] == ["FXL203", "FXL301"]
    assert all(f.place is not None and f.place.line == 11 for f in found)
    found = suppressed(tmp_path, targets, unused="# fxlora: ignore[FXL203,FXL301]")
    assert rows(found) == []


PLACES = """
import torch
from collections import OrderedDict
from torch import nn
class Model(nn.Module):
    def __init__(this):
        super().__init__()
        this.a, this.b = nn.Linear(4, 4), nn.Linear(4, 4)  # line a b
        this.c, this.d = (
            nn.Linear(4, 4),  # line c
            nn.Linear(4, 4),  # line d
        )
        this.register_module("e", nn.Linear(4, 4))  # line e
        this.add_module("f", module=nn.Linear(4, 4))  # line f
        setattr(this, "g", nn.Linear(4, 4))  # line g
        this.net = nn.Sequential(  # line none
            nn.Linear(4, 4),  # line net.0
            nn.Sequential(
                nn.ReLU(),
                nn.Linear(4, 4),  # line net.1.1
            ),
            *[
                nn.Linear(4, 4)  # line net.2 net.3
                for _ in range(2)
            ],
            nn.Linear(4, 4),  # line net.4
        )
        this.named = nn.Sequential(OrderedDict([
            ("x", nn.Linear(4, 4)),  # line named.x
            ("y", nn.Linear(4, 4)),  # line named.y
        ]))
        this.rows = nn.ModuleList([
            nn.Linear(4, 4),  # line rows.0
            nn.Linear(4, 4),  # line rows.1
        ])
        this.many = nn.ModuleList(
            nn.Linear(4, 4)  # line many.0 many.1
            for _ in range(2)
        )
        this.table = nn.ModuleDict({
            "q": nn.Linear(4, 4),  # line table.q
            "k": nn.Linear(4, 4),  # line table.k
        })
        this.grown = nn.ModuleList([
            nn.Linear(4, 4),  # line none
        ])
        this.grown.insert(0, nn.Linear(4, 4))
    def forward(this, x):
        layers = [m for m in this.modules() if isinstance(m, nn.Linear)]
        for m in layers:
            x = m(x)
        return x
"""


def hidden_by(folder: Path, line: str) -> list[str]:
    """Returns the layers of PLACES whose finding a comment on one of its lines hides."""
    name = f"places_{next(COUNT)}"
    path = folder / f"{name}.py"
    commented = PLACES.replace(f"{line}\n", f"{line}  # fxlora: ignore[FXL301]\n")
    path.write_text(commented, encoding="utf-8")
    model = loaded(name, path).Model()
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    config = LoraConfig(r=8, target_modules=layers)
    report = lint(fxlora.trace(model, (torch.zeros(2, 4),)), config, Settings(select=("FXL301",)))
    found = {site for f in report for site in f.sites}
    return [n for n in layers if n not in found]


LINES = [line.strip() for line in PLACES.splitlines() if "# line" in line]


@pytest.mark.parametrize("line", LINES, ids=[x.partition("# line ")[2] for x in LINES])
def test_a_comment_is_found_where_a_layer_is_made(tmp_path: Path, line: str) -> None:
    sites = line.partition("# line ")[2].split()
    hidden = hidden_by(tmp_path, line)
    assert hidden == ([] if sites == ["none"] else sites)


@pytest.mark.parametrize(("comments", "where", "message"), [
    ({"call": "# fxlora: ignore[FXL201]"}, ":13", "of FXL201 held nothing back"),
    ({"sites": {"zzz": ("FXL301",)}}, "sites['zzz']", "of FXL301 held nothing back"),
    ({"a": "# fxlora: ignore[FXL9999]"}, ":7", "names 'FXL9999', which is no rule"),
    ({"a": "# fxlora: ignore[FXL301,nope]"}, ":7", "names 'nope', which is no rule"),
])  # fmt: skip
def test_a_suppression_that_holds_nothing_is_a_note(
    tmp_path: Path, comments: Any, where: str, message: str
) -> None:
    found = [f for f in suppressed(tmp_path, **comments) if f.rule == "FXL001"]
    assert len(found) == 1
    assert where in str(found[0])
    assert message in str(found[0])


def test_a_used_blanket_and_a_comment_at_a_layer_left_alone_are_no_note(tmp_path: Path) -> None:
    found = suppressed(tmp_path, a="# fxlora: ignore", unused="# fxlora: ignore[FXL203]")
    assert rows(found) == [("FXL301", ("b",))]


def test_a_suppression_of_a_rule_that_did_not_run_is_no_note(tmp_path: Path) -> None:
    assert "FXL001" not in {
        f.rule for f in suppressed(tmp_path, a="# fxlora: ignore[FXL301,FXL605]")
    }
    assert "FXL001" not in {f.rule for f in suppressed(tmp_path, a="# fxlora: ignore[FXL605]")}


def test_an_entry_of_the_configuration_is_suppressed_by_its_text() -> None:
    traced = fxlora.trace(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    config = LoraConfig(r=2, target_modules=["0", "zzz"])
    assert [f.rule for f in lint(traced, config)] == ["FXL101"]
    assert len(lint(traced, config, Settings(sites={"zzz": ("FXL101",)}))) == 0


# ---- formats -------------------------------------------------------------------------------------


def check_sarif(log: Any) -> None:
    """Holds a log to the required fields and types of SARIF 2.1.0 that it uses."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    assert set(log) == {"$schema", "version", "runs"}
    for run in log["runs"]:
        assert set(run) <= {"tool", "results", "columnKind"}
        assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
        driver = run["tool"]["driver"]
        assert set(driver) <= {"name", "version", "rules", "informationUri"}
        assert driver["name"]
        for r in driver["rules"]:
            assert set(r) <= {
                "id", "name", "shortDescription", "fullDescription", "help", "helpUri",
                "defaultConfiguration",
            }  # fmt: skip
            for key in ("shortDescription", "fullDescription", "help"):
                assert isinstance(r[key]["text"], str)
                assert r[key]["text"]
            assert r["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
            assert isinstance(r["defaultConfiguration"]["enabled"], bool)
        assert len({r["id"] for r in driver["rules"]}) == len(driver["rules"])
        for result in run["results"]:
            assert result["message"]["text"]
            assert result["level"] in ("none", "note", "warning", "error")
            assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
            assert all(isinstance(v, str) for v in result["partialFingerprints"].values())
            for location in result.get("locations", []):
                check_location(location)


def check_location(location: Any) -> None:
    assert location
    assert set(location) <= {"physicalLocation", "logicalLocations"}
    if "physicalLocation" in location:
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert not unquote(uri).startswith(("/", "file:"))
        assert ":" not in uri
        assert "\\" not in uri
        assert location["physicalLocation"].get("region", {"startLine": 1})["startLine"] >= 1
    for logical in location.get("logicalLocations", []):
        assert logical["fullyQualifiedName"].endswith(logical["name"])
        assert logical["kind"] in ("function", "member", "module", "type", "namespace")


def test_sarif_has_what_the_standard_requires(tmp_path: Path) -> None:
    found = suppressed(tmp_path, ["a", "b", "unused", "zzz"])
    log = json.loads(json.dumps(found.sarif()))
    check_sarif(log)
    results = log["runs"][0]["results"]
    assert [r["ruleId"] for r in results] == [f.rule for f in found]
    by_rule = {r["ruleId"]: r for r in results}
    (where,) = by_rule["FXL203"]["locations"]
    assert where["logicalLocations"][0]["fullyQualifiedName"] == "unused"
    assert where["physicalLocation"]["region"]["startLine"] == 11
    assert "locations" not in by_rule["FXL101"]


def test_a_line_in_the_project_is_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src models").mkdir()
    monkeypatch.chdir(tmp_path)
    found = suppressed(tmp_path / "src models")
    uris = {
        r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for r in found.sarif()["runs"][0]["results"]
    }
    assert all(u.startswith("src%20models/suppressed_") for u in uris)
    check_sarif(found.sarif())


def test_a_line_of_a_package_is_named_from_the_package() -> None:
    from lint_recipes import traced

    config = LoraConfig(r=16, target_modules="all-linear")
    (one,) = lint(traced("vit", num_labels=2), config)
    assert str(one.place).startswith("transformers/models/vit/modeling_vit.py:")


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (suppressed(tmp_path, ["b", "a", "zzz"]) for _ in "ab")
    strip = [
        r.to_dict() | {"findings": [{**f.to_dict(), "file": ""} for f in r]} for r in (one, two)
    ]
    assert strip[0] == strip[1]
    assert [x["partialFingerprints"] for x in one.sarif()["runs"][0]["results"]] == [
        x["partialFingerprints"] for x in two.sarif()["runs"][0]["results"]
    ]


def test_the_text_is_what_a_reader_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = suppressed(tmp_path, ["a", "zzz"])
    name = next(tmp_path.glob("*.py")).name
    assert str(found).splitlines() == [
        "warning: FXL101 unmatched-target: target_modules entry 'zzz' matches nothing, and PEFT "
        "says nothing of it",
        "  fix: leave it out, or name what is meant.",
        "",
        "warning: FXL301 rank-above-layer: a: r=8 on a weight of 4 x 4, whose updates have rank 4 "
        "at most",
        "  fix: rank_pattern={'a': 2}, or train the layer as a whole with modules_to_save",
        f"  at {name}:13 in forward",
        "",
        "Model: 2 warnings",
    ]


# ---- the command ---------------------------------------------------------------------------------


def run(*argv: str) -> int:
    return main(["lint", "tiny:sequential", *argv])


@pytest.fixture(autouse=True)
def _models_and_no_settings(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    if "tmp_path" not in request.fixturenames:
        monkeypatch.chdir(HERE)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["-r", "4", "-t", "0,2"], 0),
        (["-r", "8", "-t", "0,2"], 1),  # 5 outputs
        (["-r", "8", "-t", "0,2", "--fail-on", "error"], 0),
        (["-r", "8", "-t", "0,2", "--severity", "FXL301=error", "--fail-on", "error"], 1),
        (["-r", "8", "-t", "0,2", "--fail-on", "never"], 0),
        (["-r", "8", "-t", "0,2", "--ignore", "FXL3"], 0),
        (["-r", "8", "-t", "0,2", "--select", "FXL2,zero-scaling"], 0),
        (["-r", "4", "-t", "0,2", "--exclude-modules", "x"], 0),  # a note
        (["-r", "4", "-t", "0,2", "--exclude-modules", "x", "--fail-on", "note"], 1),
        (["-r", "4", "-t", "zzz"], 1),  # FXL100
        (["-r", "4", "-t", "0", "--dora", "--serve", "vllm"], 1),
        (["-r", "0", "-t", "0"], 2),
        (["-t", "0", "--severity", "FXL301"], 2),
        (["-t", "0", "--select", "nope"], 2),
        (["-t", "0", "--dtype", "int8"], 2),
        (["-t", "0", "--settings", "nowhere.toml"], 2),
        (["-t", "0", "--json", "--format", "sarif"], 2),
        (["-t", "0", "-r", "4", "-o", "no/such/folder.json"], 2),
    ],
)
def test_the_exit_code_is_for_ci(argv: list[str], code: int, capsys: Any) -> None:
    assert run(*argv) == code
    if code >= 2:
        err = capsys.readouterr().err
        assert err.startswith("fxlora: ")
        assert len(err.strip().splitlines()) == 1


def test_json_and_sarif_are_printed_and_written(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(HERE)
    assert run("-r", "8", "-t", "0,2", "--format", "json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert [f["rule"] for f in printed["findings"]] == ["FXL301", "FXL302"]
    assert printed["counts"] == {"error": 0, "warning": 2, "note": 0}
    # A Sequential has no code of its own that calls its layers, and our own is not it.
    assert {f["file"] for f in printed["findings"]} == {None}
    assert run("-r", "8", "-t", "0,2", "--json") == 1
    assert json.loads(capsys.readouterr().out) == printed
    target = tmp_path / "out.sarif"
    assert run("-r", "8", "-t", "0,2,zzz", "--format", "sarif", "-o", str(target)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Sequential: 3 warnings" in captured.err
    check_sarif(json.loads(target.read_text(encoding="utf-8")))
    assert [p.name for p in tmp_path.iterdir()] == ["out.sarif"]


def test_a_finding_about_the_configuration_lies_at_its_file(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:  # fmt: skip
    LoraConfig(r=2, target_modules=["0", "zzz"]).save_pretrained(tmp_path)
    monkeypatch.chdir(HERE)
    path = tmp_path / "adapter_config.json"
    (HERE / "tiny.py").exists()
    assert run("--config", str(path), "--format", "sarif") == 1
    (result,) = json.loads(capsys.readouterr().out)["runs"][0]["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.endswith("adapter_config.json")
    assert not uri.startswith("/")


def test_the_settings_of_the_folder_hold_for_the_command(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    assert run("-r", "8", "-t", "0,2") == 1
    toml(tmp_path, "s.json", '{"ignore": ["FXL3"]}')
    assert run("-r", "8", "-t", "0,2", "--settings", "s.json") == 0
    assert run("-r", "8", "-t", "0,2", "--settings", "s.json", "--ignore", "FXL1") == 1


@needs_toml
def test_the_settings_of_a_project_hold_without_being_named(tmp_path: Path, monkeypatch: Any) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    toml(tmp_path, "pyproject.toml", "[tool.fxlora.lint]\nignore = ['FXL3']\n")
    assert run("-r", "8", "-t", "0,2") == 0


def test_rules_are_listed_and_explained_without_a_model(capsys: Any) -> None:
    assert main(["lint", "--list-rules"]) == 0
    out = capsys.readouterr().out
    assert "FXL201  bypassed-adapter" in out
    assert "with --serve" in out
    assert main(["lint", "--explain-rule", "bypassed-adapter"]) == 0
    assert capsys.readouterr().out.startswith("# FXL201 bypassed-adapter\n")
    assert main(["lint", "--explain-rule", "FXL20"]) == 2
    assert main(["lint", "-t", "x"]) == 2
    assert "needs a MODEL" in capsys.readouterr().err


def test_import_fxlora_does_not_import_the_linter() -> None:
    statement = "import fxlora, sys\nassert not [m for m in sys.modules if 'fxlora.lint' in m]"
    assert "fxlora" in loaded_by(statement)
