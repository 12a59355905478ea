"""The linter's settings: which rules run, how severe they are, what is ignored where; and their files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fxlora.errors import ConfigError, did_you_mean
from fxlora.lint.catalog import RULES, rule, selected
from fxlora.lint.context import Options
from fxlora.lint.finding import Severity
from fxlora.lint.rules_merging import DTYPES
from fxlora.lint.rules_serving import ENGINES

_CHOICES: dict[str, tuple[str, ...]] = {
    "gradient_checkpointing": ("", "none", "reentrant", "non-reentrant"),
    "dtype": ("", *DTYPES),
    "serve": ("", "none", *ENGINES),
}
_OPTIONS = {f.name.replace("_", "-"): f for f in dataclasses.fields(Options)}
_KEYS = ("select", "ignore", "severity", "sites", "fail-on", *_OPTIONS)


@dataclass(frozen=True)
class Settings:
    """How a run is set up; a value.

    Attributes:
        select: selectors of the rules that run; see `fxlora.lint.catalog.selected`.
        ignore: selectors of the rules that do not.
        severity: rule -> "error", "warning" or "note", where it shall not be the rule's own.
        sites: pattern of site names -> selectors of rules that are ignored there; `*` is any text.
        fail_on: "error", "warning", "note" or "never": from which severity a run fails.
        options: what the graph cannot know.

    Raises:
        ConfigError: when a value is none of those it may be.
    """

    select: tuple[str, ...] = ("DEFAULT",)
    ignore: tuple[str, ...] = ()
    severity: Mapping[str, str] = field(default_factory=dict)
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fail_on: str = "warning"
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.severities()
        for selectors in self.sites.values():
            for s in selectors:
                selected(s)
        if self.fail_on != "never":
            severity(self.fail_on, "fail-on")
        for name, choices in _CHOICES.items():
            value = getattr(self.options, name)
            if value not in choices:
                shown = ", ".join(repr(c) for c in choices if c)
                raise ConfigError(
                    f"{name.replace('_', '-')}={value!r} is none of {shown}."
                    f"{did_you_mean(str(value), choices)}"
                )

        if not 0 < self.options.trained_b < math.inf:
            raise ConfigError(
                f"trained-b={self.options.trained_b!r}: a size is above 0, and finite"
            )
        if self.options.max_lora_rank < 1:
            raise ConfigError(f"max-lora-rank={self.options.max_lora_rank!r}: a rank is at least 1")

    def severities(self) -> dict[str, Severity]:
        """Returns the id of every rule that runs, with its severity."""
        own = {rule(k).id: severity(v, f"severity of {k}") for k, v in self.severity.items()}
        on = {r.id for s in self.select for r in selected(s)}
        off = {r.id for s in self.ignore for r in selected(s)}
        return {r.id: own.get(r.id, r.severity) for r in RULES if r.id in on - off}

    @property
    def threshold(self) -> Severity | None:
        """The severity from which a run fails; None for never."""
        return None if self.fail_on == "never" else severity(self.fail_on, "fail-on")


def severity(word: Any, where: str) -> Severity:
    """Returns a severity by its name.

    Raises:
        ConfigError: when it is none.
    """
    try:
        return Severity[str(word).upper()]
    except KeyError:
        raise ConfigError(f"{where}: {word!r} is none of error, warning, note") from None


def from_dict(table: Mapping[str, Any], where: str) -> Settings:
    """Returns settings from a table of a file.

    Raises:
        ConfigError: names the key or the value that is wrong, and the file.
    """
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"{where}: no setting {key!r}.{did_you_mean(key, _KEYS)}")
    made: dict[str, Any] = {}
    for key in ("select", "ignore"):
        if key in table:
            made[key] = _words(table[key], f"{where}: {key}")
    for key in ("severity", "sites"):
        if not isinstance(table.get(key, {}), Mapping):
            raise ConfigError(f"{where}: {key} is {table[key]!r}, not a table")
    made["severity"] = dict(table.get("severity", {}))
    sites = table.get("sites", {})
    made["sites"] = {k: _words(v, f"{where}: sites[{k!r}]") for k, v in sites.items()}
    if "fail-on" in table:
        made["fail_on"] = table["fail-on"]
    options = {
        f.name: _typed(table[k], f.default, f"{where}: {k}")
        for k, f in _OPTIONS.items()
        if k in table
    }
    try:
        return Settings(**made, options=Options(**options))
    except ConfigError as e:
        raise ConfigError(str(e) if str(e).startswith(where) else f"{where}: {e}") from None


def _words(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{where} is {value!r}; write a list, such as [{str(value)!r}]")
    return tuple(str(v) for v in value)


def _typed(value: Any, default: Any, where: str) -> Any:
    wanted = type(default)
    # An int will do for a float; a bool, which is an int to Python, will not.
    if isinstance(value, wanted) and isinstance(value, bool) is (wanted is bool):
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise ConfigError(f"{where} is {value!r}; it takes a {wanted.__name__}, such as {default!r}")


# ---- files -------------------------------------------------------------------------------------


def load(path: str | Path) -> Settings:
    """Reads settings from a .json file, a `fxlora.toml` or a `pyproject.toml`.

    A TOML file has them in `[tool.fxlora.lint]`, a file of fxlora's own also in `[lint]`.

    Raises:
        ConfigError: when the file or a value in it is wrong.
    """
    path = Path(path)
    table = _table(_parsed(path))
    if table is None:
        raise ConfigError(f"{path}: has no [tool.fxlora.lint] table (and no [lint] table)")
    return from_dict(table, str(path))


def discover(start: Path) -> Settings | None:
    """Finds the settings of a project: `fxlora.toml` or a table in `pyproject.toml`, from `start` up."""
    for folder in (start, *start.parents):
        own, project = folder / "fxlora.toml", folder / "pyproject.toml"
        if own.is_file():
            return load(own)
        # Looked at as text first: another project's file is not ours to parse, or to refuse.
        if project.is_file() and "tool.fxlora" in _text(project):
            table = _table(_parsed(project))
            if table is not None:
                return from_dict(table, str(project))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not a readable text file: {e}") from None


def _parsed(path: Path) -> Any:
    text = _text(path)
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as e:
            raise ConfigError(f"{path}: not JSON: {e}") from None
    reader = _toml_reader()
    if reader is None:
        raise ConfigError(
            f"{path}: Python 3.10 has no TOML reader; use Python 3.11, pip install tomli, or give "
            "the settings as JSON with --settings FILE.json"
        )
    try:
        return reader.loads(text)
    except ValueError as e:
        raise ConfigError(f"{path}: not TOML: {e}") from None


def _toml_reader() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _table(data: Any) -> Mapping[str, Any] | None:
    if not isinstance(data, Mapping):
        return None
    for path in (("tool", "fxlora", "lint"), ("lint",)):
        at: Any = data
        for key in path:
            at = at.get(key) if isinstance(at, Mapping) else None
        if isinstance(at, Mapping):
            return at
    # A JSON file may be the table itself.
    return data if set(data) & set(_KEYS) else None


def overridden(
    settings: Settings, changes: Mapping[str, Any], options: Mapping[str, Any]
) -> Settings:
    """Returns settings with what a command line says in the place of what a file said."""
    made = {k: v for k, v in changes.items() if v is not None}
    if "severity" in made:
        made["severity"] = {**settings.severity, **made["severity"]}
    given = {k: v for k, v in options.items() if v is not None}
    return replace(settings, **made, options=replace(settings.options, **given))
