"""PEFT's adapter directories, in and out: safetensors and JSON, nothing is ever unpickled.

An adapter PEFT cannot represent (see `fxlora.reach`) is written beside, not as, one of PEFT's: its
settings are in `fxlora_config.json`, `{"format": 1, "reach": [...], "config": {...}}` with PEFT's own
fields under "config", and there is no `adapter_config.json`, so that PEFT refuses the directory
instead of loading a part of it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxlora import adapters
from fxlora.blocks import as_whole_layers
from fxlora.check import Check, check_tensors
from fxlora.config import init_name, task_heads
from fxlora.errors import AdapterError, CheckpointError, did_you_mean
from fxlora.facts import info
from fxlora.keys import entries
from fxlora.plan import ADAPTER, Plan, corrected_fan_in_fan_out
from fxlora.plan import plan as make_plan
from fxlora.reach import checked

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
BEYOND = "fxlora_config.json"
_FORMAT = 1


def save_adapter(
    lora: GraphModule,
    directory: str | os.PathLike[str],
    adapter: str = ADAPTER,
    *,
    as_peft: bool = False,
) -> Path:
    """Writes an adapter as `PeftModel.save_pretrained` does; peft loads it.

    Two files: `adapter_model.safetensors` and `adapter_config.json`, each written whole or not at
    all; both are there beside the old ones before either of these is replaced. An adapter by another name than "default" goes to a folder of its name, as in PEFT. The
    keys of rank_pattern and alpha_pattern keep their order, which PEFT's own file loses.

    An adapter that reaches further than PEFT can (`reach=` of `fxlora.plan`) is written in a form of
    our own that PEFT refuses, and a warning says so.

    Args:
        lora: a rewritten graph, with its values.
        directory: made when it is not there.
        adapter: the adapter's name; it is not stored.
        as_peft: whether to write adapters of parts of fused layers as what they are to PEFT: one
            adapter of the whole layer with a block-diagonal lora_B and the sum of the ranks.

    Returns:
        The folder that holds the files.

    Raises:
        AdapterError: when the graph has no such adapter.
        CheckpointError: when the adapter has no values (it is on the meta device), when a value of
            its configuration is none that JSON has, and when a file stands where the folder should
            or a folder where a file should. Nothing was written then.
    """
    facts = info(lora)
    if adapter not in facts.adapters:
        have = list(facts.adapters)
        raise AdapterError(
            f"no adapter {adapter!r} to save; the graph has {have}.{did_you_mean(adapter, have)}"
        )
    tensors = tensors_of(lora, adapter)
    empty = next((k for k, t in tensors.items() if t.device.type == "meta"), None)
    if empty is not None:
        raise CheckpointError(f"{empty} is on the meta device and has no values to save")
    plan: Plan = facts.adapters[adapter]
    name = BEYOND if plan.beyond_peft and not as_peft else CONFIG
    if as_peft and plan.beyond_peft:
        config, tensors = as_whole_layers(plan, tensors)
        plan = dataclasses.replace(plan, config=config, sites=_as_layers(plan))
    settings = settings_of(plan, facts.model)
    if name == BEYOND:
        settings = {"format": _FORMAT, "reach": list(plan.reach), "config": settings}
    contents = {WEIGHTS: _safetensors(tensors), name: _json(settings)}
    folder = Path(directory) if adapter == ADAPTER else Path(directory) / adapter
    _make(folder)
    # A configuration of the other form, from an earlier save, would speak of other tensors.
    _replace(folder, contents, CONFIG if name == BEYOND else BEYOND)
    if name == BEYOND:
        warnings.warn(
            f"{folder}: written in fxlora's own form ({BEYOND}), which PEFT refuses to load, because "
            f"{plan.beyond_peft[0]}. load_adapter reads it",
            stacklevel=2,
        )
    return folder


def _as_layers(plan: Plan) -> tuple[Any, ...]:
    """Returns the planned sites with parts named as their layers, for what depends on the names."""
    return tuple(
        dataclasses.replace(
            p, site=dataclasses.replace(p.site, name=p.site.owner, of="", rows=())
        ) if p.adapted else p
        for p in plan.sites
    )  # fmt: skip


def _make(folder: Path) -> None:
    """Makes a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        taken = next(p for p in (folder, *folder.parents) if p.exists() and not p.is_dir())
        raise CheckpointError(
            f"{taken} is a file, and an adapter is a folder of two files; nothing was written. Give "
            "another folder, or move the file away"
        ) from None


def tensors_of(lora: GraphModule, adapter: str) -> dict[str, torch.Tensor]:
    """Returns what the file holds: name on disk -> tensor."""
    held = {**dict(lora.named_parameters(remove_duplicate=False)), **dict(lora.named_buffers())}
    return {
        e.key: held[e.name].detach().cpu().contiguous() if held[e.name].device.type != "meta"
        else held[e.name].detach()
        for e in entries(lora, adapter)
    }  # fmt: skip


def _safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    own = {k: t.clone() for k, t in tensors.items()}  # the format takes no shared memory
    return save(own, metadata={"format": "pt"})


def _json(settings: dict[str, Any]) -> bytes:
    """Returns the configuration's file.

    Raises:
        CheckpointError: names the field JSON has no form for; PEFT's own save fails there too.
    """
    for field, value in settings.get("config", settings).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as e:
            text = f", or str() of it: {str(value)!r}" if isinstance(value, os.PathLike) else ""
            raise CheckpointError(
                f"{field}={value!r} cannot be written to {CONFIG}: {e}; nothing was written. Set it "
                f"to plain text, numbers, lists or dicts{text}"
            ) from None
    return json.dumps(settings, indent=2).encode()


def _replace(folder: Path, contents: dict[str, bytes], outdated: str) -> None:
    """Puts files in a folder in place of older ones, all of them or none, and removes another."""
    for name in (*contents, outdated):
        taken = folder / name
        if taken.is_dir() and not taken.is_symlink():
            raise CheckpointError(
                f"{taken} is a folder, and an adapter has a file by that name; nothing was written. "
                "Give another folder, or move that one away"
            )
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in contents}
    try:
        # What can fail for want of space or permission comes before anything is replaced: new
        # weights beside an old configuration are an adapter that no longer loads.
        for name, content in contents.items():
            parts[name].write_bytes(content)
        for name, part in parts.items():
            os.replace(part, folder / name)
        (folder / outdated).unlink(missing_ok=True)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def settings_of(plan: Plan, model: nn.Module) -> dict[str, Any]:
    """Returns the content of adapter_config.json: the resolved configuration, as PEFT saves it."""
    config = copy.deepcopy(plan.config)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    if task_heads(config):
        config.modules_to_save = [
            *dict.fromkeys([*(config.modules_to_save or ()), *task_heads(config)])
        ]
    config.fan_in_fan_out = corrected_fan_in_fan_out(plan.adapted, config)
    settings = config.to_dict()
    settings["target_modules"] = _short(config.target_modules, model)
    if config.task_type is None:
        made = type(model)
        settings["auto_mapping"] = {
            "base_model_class": made.__name__,
            "parent_library": made.__module__,
        }
    return {k: _plain(settings[k]) for k in sorted(settings)}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)  # PEFT writes a set in any order
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "value", value)


def _short(targets: Any, model: nn.Module) -> Any:
    """Returns long lists of targets as suffixes, as PEFT does from 20 entries on."""
    from peft.tuners import tuners_utils

    least = getattr(tuners_utils, "MIN_TARGET_MODULES_FOR_OPTIMIZATION", None)
    if least is None or isinstance(targets, str) or targets is None or len(targets) < least:
        return targets
    suffixes = tuple(f".{t}" for t in targets)
    others = [n for n, _ in model.named_modules() if n not in targets and not n.endswith(suffixes)]
    found = tuners_utils._find_minimal_target_modules(targets, others)
    return found if len(found) < len(targets) else targets


# ---- reading -----------------------------------------------------------------------------------


def load_adapter(
    graph: GraphModule,
    directory: str | os.PathLike[str],
    adapter: str = ADAPTER,
    *,
    strict: bool = True,
    trainable: bool = False,
) -> GraphModule:
    """Loads an adapter that PEFT, or `save_adapter`, wrote.

    Into a graph that has an adapter of that name and shape the values are copied in place: no
    trace, no rewrite, and an optimizer keeps its parameters (hot-swapping, the way
    `load_state_dict` does it). Any other graph is left as it is, and a new one with the adapter is
    returned; on a traced graph it is active, beside other adapters it is not.

    Args:
        graph: a traced or rewritten graph, with weights.
        directory: PEFT's directory, or one with a folder of the adapter's name in it.
        adapter: the name the adapter has, or gets, in the graph.
        strict: whether any missing, unexpected or misshapen tensor refuses the whole load. When
            False, what fits is loaded and a warning says what was left.
        trainable: whether a new adapter trains; PEFT's are loaded frozen.

    Returns:
        The graph with the adapter in it: `graph` itself when only values were copied.

    Raises:
        CheckpointError: when the directory does not fit; then nothing was loaded.
    """
    folder = find(directory, adapter)
    config, reach = read_config(folder), read_reach(folder)
    config.inference_mode = not trainable
    tensors = read_tensors(folder)
    facts = info(graph)
    if adapter in facts.adapters:
        _check_same(facts.adapters[adapter], _planned(facts.base, config, adapter, reach), folder)
        made = graph
    else:
        _check_redrawn(config, folder, strict)
        base = facts.base if facts.base is not None else graph
        made = adapters.add(graph, _planned(base, config, adapter, reach), adapter)
    report = check_tensors(made, adapter, tensors, config)
    if not report.fits:
        if strict:
            raise CheckpointError(f"{folder} does not fit the graph; nothing was loaded.\n{report}")
        warnings.warn(f"{folder}: loaded in part.\n{report}", stacklevel=2)
    _copy_in(made, report)
    return made


def _planned(base: GraphModule, config: Any, adapter: str, reach: tuple[str, ...]) -> Plan:
    try:
        return make_plan(base, config, adapter, reach=reach)
    except ValueError as e:
        raise CheckpointError(f"{CONFIG} does not fit the model: {e}") from e


def find(directory: str | os.PathLike[str], adapter: str = ADAPTER) -> Path:
    """Returns the folder that holds an adapter's two files.

    Raises:
        CheckpointError: when there is none, or when its weights are a pickle.
    """
    start = Path(directory)
    for folder in (start, start / adapter):
        if not (folder / CONFIG).is_file() and not (folder / BEYOND).is_file():
            continue
        if (folder / WEIGHTS).is_file():
            return folder
        if (folder / PICKLED).is_file():
            raise CheckpointError(
                f"{folder / PICKLED} is a pickle, which can run any code and is never read. Let peft "
                "load and save it again: save_pretrained(..., safe_serialization=True)"
            )
        raise CheckpointError(f"{folder} has {CONFIG} and no {WEIGHTS}")
    inside = sorted(p.parent.name for p in start.glob(f"*/{CONFIG}")) if start.is_dir() else []
    more = f"; there are adapters in its folders {inside}" if inside else ""
    raise CheckpointError(f"{start} has no {CONFIG}{more}")


def read_config(folder: Path) -> Any:
    """Returns the `peft.LoraConfig` of an adapter folder.

    Raises:
        CheckpointError: for JSON that is no LoraConfig, and for fields this peft does not know.
    """
    from peft import LoraConfig

    path, settings = _settings(folder)
    if path.name == BEYOND:
        settings = settings.get("config")
    if not isinstance(settings, dict) or settings.get("peft_type", "LORA") != "LORA":
        found = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise CheckpointError(f"{path}: peft_type is {found!r}; fxlora reads LORA adapters")
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    set_unknown = sorted(k for k, v in settings.items() if k not in known and v)
    if set_unknown:
        raise CheckpointError(
            f"{path}: the installed peft's LoraConfig has no field {set_unknown[0]!r} "
            f"(={settings[set_unknown[0]]!r}), so what it says cannot be honoured; upgrade peft"
        )
    settings = {k: v for k, v in settings.items() if k in known}
    settings["auto_mapping"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that do not apply; the plan says it better
        try:
            return LoraConfig(**settings)
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{path}: {e}") from None


def read_reach(folder: Path) -> tuple[str, ...]:
    """Returns how far beyond PEFT an adapter folder says its adapter reaches.

    Raises:
        CheckpointError: for a form this version does not know.
    """
    path, settings = _settings(folder)
    if path.name != BEYOND:
        return ()
    if settings.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: format is {settings.get('format')!r}; this fxlora reads {_FORMAT}"
        )
    try:
        return checked(settings.get("reach", ()))
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _settings(folder: Path) -> tuple[Path, Any]:
    """Returns the configuration file of a folder, and what it holds."""
    path = folder / (BEYOND if (folder / BEYOND).is_file() else CONFIG)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path}: not a readable JSON file: {e}") from None
    if path.name == BEYOND and not isinstance(settings, dict):
        raise CheckpointError(f"{path}: a {type(settings).__name__}, no object")
    return path, settings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter folder by their names on disk.

    Raises:
        CheckpointError: when the file is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file: {e}") from None


def read_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Returns meta tensors of the shapes in an adapter folder; reads the file's header only."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as f:
            return {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file: {e}") from None


# ---- what fits -----------------------------------------------------------------------------------


def _facts(plan: Plan) -> Iterator[tuple[str, Any]]:
    for p in plan.adapted:
        yield f"rank of {p.name}", p.r
        yield f"scaling of {p.name}", p.scaling
        yield f"variant of {p.name}", p.variant or "plain LoRA"
    for s in plan.saved:
        yield f"module trained as a whole {s.name}", True
    for t in plan.tokens:
        yield f"trainable rows of {t.name}", t.indices
    how = str(init_name(plan.config)).partition("_niter")[0]
    yield "base weights changed by", how if how in ("pissa", "olora") else "nothing"


def _check_same(live: Plan, stored: Plan, folder: Path) -> None:
    """Refuses to copy values into a graph that would compute something else with them."""
    mine, theirs = dict(_facts(live)), dict(_facts(stored))
    for what in [*mine, *(t for t in theirs if t not in mine)]:
        if mine.get(what) != theirs.get(what):
            raise CheckpointError(
                f"{folder} holds another adapter than the graph's {live.adapter!r}: {what} is "
                f"{theirs.get(what, 'not there')} on disk and {mine.get(what, 'not there')} in the "
                "graph. Nothing was loaded. For a graph made by that file: "
                "fxlora.load_adapter(traced, directory)"
            )


def _check_redrawn(config: Any, folder: Path, strict: bool) -> None:
    if strict and "_niter_" in str(init_name(config)):
        raise CheckpointError(
            f"{folder} was drawn with init_lora_weights={config.init_lora_weights!r}, a randomized "
            "SVD: the base weights it was trained on cannot be drawn again (PEFT draws others and "
            "says nothing). Load it into the graph that drew it, or pass strict=False"
        )


def _copy_in(lora: GraphModule, report: Check) -> None:
    parameters = {
        **dict(lora.named_parameters(remove_duplicate=False)),
        **dict(lora.named_buffers()),
    }
    with torch.no_grad():
        for row in report.rows:
            if row.status != "fits" or row.kind == "again":
                continue
            target, value = parameters[row.name], report.tensors[row.key]
            if target.device.type == "meta":
                raise CheckpointError(
                    f"{row.name} is on the meta device; load into a model that has its weights"
                )
            if row.kind == "adapter":
                target.copy_(value)
            elif not torch.equal(target.detach().cpu(), value.to(target.dtype)):
                # A base tensor: the graph gets its own, for the model's must stay as it is.
                target.data = value.to(device=target.device, dtype=target.dtype, copy=True)
