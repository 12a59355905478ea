"""What a LoraConfig trains beside adapters: whole modules, and rows of an embedding; found by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxlora.config import task_heads
from fxlora.errors import ConfigError, ConfigTypeError, UnsupportedError, did_you_mean
from fxlora.freezing import UPCAST
from fxlora.matching import parameter_match
from fxlora.sites import Places
from fxlora.trace.shell import tree

# What PEFT's wrapper of an adapted layer holds.
_PARTS = tuple(
    "base_layer lora_dropout lora_dropout.default lora_A lora_A.default lora_B lora_B.default "
    "lora_embedding_A lora_embedding_B lora_magnitude_vector".split()
)
_UNCALLABLE = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class SavedModule:
    """A module of which a trainable copy takes the place (modules_to_save).

    Attributes:
        name: the path the copy is reached by; an alias is copied apart, as PEFT does.
        entry: the modules_to_save entry, or the task type's head, that names it.
        numel: how many parameters the copy has; 0 where `same_as` counts them.
        same_as: an earlier name of the same child of the same parent: one copy stands there.
    """

    name: str
    entry: str
    numel: int
    same_as: str = ""


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that train (trainable_token_indices).

    Attributes:
        name: the layer.
        indices: the rows.
        dim: the length of a row.
        tied_to: the layer whose rows this one shares; "" for a layer with rows of its own.
        trains: whether they do; inference_mode freezes them, but for those peft makes anew in
            float32 (peft.tuners.tuners_utils.cast_adapter_dtype).
        same_as: an earlier name of the same child of the same parent: these are its rows.
    """

    name: str
    indices: tuple[int, ...]
    dim: int
    tied_to: str = ""
    trains: bool = True
    same_as: str = ""

    @property
    def numel(self) -> int:
        """How many numbers of its own it has."""
        return 0 if self.tied_to or self.same_as else len(self.indices) * self.dim


def shield(config: Any) -> None:
    """Adds to modules_to_save, in the copy that is ours, what PEFT adds before it matches names."""
    if "score" in task_heads(config) and "SEQ" in str(config.task_type):
        config.modules_to_save = [*(config.modules_to_save or ()), *task_heads(config)]


def saved_modules(
    config: Any, model: nn.Module, adapted: Collection[str]
) -> tuple[SavedModule, ...]:
    """Finds the modules that are trained as a whole.

    PEFT matches here by `name.endswith(entry)`, without a dot, over every name of every module
    (peft.utils.other._set_trainable).

    Args:
        config: the resolved copy of the configuration.
        model: the traced model; read.
        adapted: names of the modules that get an adapter.

    Raises:
        ConfigTypeError: when an entry hits an adapted layer or a bare container, as in PEFT.
    """
    entries = list(dict.fromkeys([*(config.modules_to_save or ()), *task_heads(config)]))
    hung = adapted
    adapted = [*adapted, *_owners(config, model)]
    places = Places(dict(tree(model)))
    reached = {r: name for name in adapted for r in places.reached(name)}
    found: list[SavedModule] = []
    first: dict[tuple[int, str], str] = {}
    for name, module in tree(model):
        entry = next((e for e in entries if name and name.endswith(e)), None)
        if entry is None:
            continue
        _check_saved(name, module, entry, reached, found, config)
        same_as = first.setdefault(places.place(name), name)
        numel = sum(p.numel() for p in module.parameters()) if same_as == name else 0
        found.append(SavedModule(name, entry, numel, same_as if same_as != name else ""))
    _check_parts(entries, hung, config)  # after every fault that peft tells
    return tuple(found)


def _owners(config: Any, model: nn.Module) -> list[str]:
    """Returns the modules of which target_parameters adapts a parameter."""
    entries = config.target_parameters
    if not entries:
        return []
    return [
        name
        for name, module in tree(model, remove_duplicate=True)
        for last in module._parameters
        if name and parameter_match(entries, f"{name}.{last}") is not None
    ]


def _entry(entry: str, config: Any) -> str:
    """Returns how a message names an entry: one that a task type adds is in no list of the user's."""
    task = str(getattr(config.task_type, "value", config.task_type))
    added = f" (task_type={task!r} adds it)" if entry in task_heads(config) else ""
    return f"modules_to_save entry {entry!r}{added}"


def _check_parts(entries: Collection[str], adapted: Collection[str], config: Any) -> None:
    """Refuses an entry that hits a part of an adapter: PEFT matches when the adapters are there."""
    parts = [f"{name}.{part}" for name in adapted for part in _PARTS]
    for entry in entries:
        hit = next((p for p in parts if p.endswith(entry)), None)
        if hit is not None:
            raise UnsupportedError(
                f"{_entry(entry, config)} hits {hit!r}, a part of the adapter: an entry "
                "matches every name that ends with it, without a dot. Write more of the name"
            )


def _check_saved(
    name: str,
    module: nn.Module,
    entry: str,
    adapted: dict[str, str],
    found: list[SavedModule],
    config: Any,
) -> None:
    what = f"{_entry(entry, config)} hits {name!r}"
    inside = next((a for a in adapted if a == name or a.startswith(f"{name}.")), None)
    if inside is not None:
        first = adapted[inside]
        also = "" if first == inside else f", which is {first!r},"
        raise ConfigTypeError(
            f"{what}, and {inside!r}{also} gets an adapter: a module is adapted or trained as a whole. "
            f"An entry matches every name that ends with it, without a dot; write "
            f"exclude_modules=[{first!r}] or a longer entry"
        )
    if isinstance(module, _UNCALLABLE):
        raise ConfigTypeError(
            f"{what}, a {type(module).__name__}, which is never called. Name the modules inside it"
        )
    outer = next((s.name for s in found if name.startswith(f"{s.name}.")), None)
    if outer is not None:
        raise UnsupportedError(
            f"{what}, inside {outer!r}, which is trained as a whole already. Leave {entry!r} out"
        )


def missing_entries(config: Any, found: Collection[SavedModule]) -> Iterator[str]:
    """Yields the modules_to_save entries of the user's own that name nothing."""
    hit = {s.entry for s in found}
    for entry in config.modules_to_save or ():
        if entry not in hit and entry not in task_heads(config):
            yield entry


# ---- rows of an embedding ----------------------------------------------------------------------


def token_rows(
    config: Any, model: nn.Module, adapted: Collection[str], saved: Collection[SavedModule]
) -> tuple[TokenRows, ...]:
    """Finds the embeddings whose rows train, and the layers tied to them.

    Raises:
        ConfigError: when a layer is not there, is trained otherwise too, or a row is out of range.

    Source: peft.utils.other.set_additional_trainable_modules.
    """
    asked = config.trainable_token_indices
    if asked is None:
        return ()
    embedding, tied = _embedding_name(model), _tied_names(model)
    layers: dict[str, list[int]] = (
        asked if isinstance(asked, dict) else {embedding or "embed_tokens": asked}
    )
    own: dict[str, list[int]] = {}
    for entry, indices in layers.items():
        if entry in (config.modules_to_save or ()):
            raise ConfigError(
                f"{entry!r} is in modules_to_save and in trainable_token_indices; train all of it or "
                "some rows of it"
            )
        for name in _ending(entry, model):
            own.setdefault(name, list(indices))
    rows = {n: i for n, i in own.items() if not (n in tied and own.get(embedding) == i)}
    places = Places(dict(tree(model)))
    first: dict[tuple[int, str], str] = {}
    adapted = [r for a in (*adapted, *_owners(config, model)) for r in places.reached(a)]
    otherwise = {*adapted, *(s.name for s in saved)}
    found = []
    for name, indices in rows.items():  # one by one, as peft does: the first fault is the one told
        if name in otherwise:
            raise ConfigTypeError(
                f"trainable_token_indices hits {name!r}, which is adapted or in modules_to_save "
                "too; a layer is trained in one way"
            )
        rows_here = _rows(name, indices, model, not config.inference_mode)
        same_as = first.setdefault(places.place(name), name)
        found.append(replace(rows_here, same_as=same_as if same_as != name else ""))
    if embedding in rows and not (set(tied) & set(rows)):
        trains = not config.inference_mode
        found += [_rows(n, rows[embedding], model, trains, embedding) for n in tied]
    for f in found:
        if f.tied_to and f.name in adapted:
            raise UnsupportedError(
                f"trainable_token_indices trains rows of {f.tied_to!r}, and {f.name!r}, which is tied "
                f"to it, is adapted. Leave it out with exclude_modules=[{f.name!r}]"
            )
        if f.name in otherwise:
            raise ConfigTypeError(
                f"trainable_token_indices reaches {f.name!r}, tied to {f.tied_to!r}, which is in "
                "modules_to_save too; a layer is trained in one way"
            )
    for f in found:  # after every fault that peft tells
        _from_zero(f, model)
    return tuple(found)


def _embedding_name(model: nn.Module) -> str:
    if not hasattr(model, "get_input_embeddings"):
        return ""
    layer = model.get_input_embeddings()  # type: ignore[operator]
    return next((n for n, m in model.named_modules() if m is layer), "")


def _tied_names(model: nn.Module) -> list[str]:
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return []
    from peft.utils.other import _get_module_names_tied_with_embedding

    modules = dict(model.named_modules())
    return [n for n in _get_module_names_tied_with_embedding(model) if n in modules]


def _ending(entry: str, model: nn.Module) -> list[str]:
    names = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    found = [n for n in names if n.endswith(entry)]
    if not found:
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        raise ConfigError(
            f"trainable_token_indices names {entry!r}, and no module's name ends with that; the "
            f"embeddings are {layers}.{did_you_mean(entry, layers)}"
        )
    return found


def _rows(
    name: str, indices: list[int], model: nn.Module, trains: bool, tied_to: str = ""
) -> TokenRows:
    module = model.get_submodule(name)
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        raise ConfigError(
            f"trainable_token_indices hits {name!r}, a {type(module).__name__}; it needs an Embedding "
            "or the Linear tied to one"
        )
    count, dim = module.weight.shape
    bad = [i for i in indices if not isinstance(i, int) or not -count <= i < count]
    if bad:
        raise ConfigError(
            f"trainable_token_indices has {bad[0]!r} for {name!r}, which has rows 0 to {count - 1}"
        )
    trains = trains or module.weight.dtype in UPCAST
    return TokenRows(name, tuple(indices), dim, tied_to, trains)


def _from_zero(rows: TokenRows, model: nn.Module) -> None:
    """Refuses rows below zero: peft takes them, and its first forward fails on them."""
    below = [i for i in rows.indices if i < 0]
    if below:
        count = model.get_submodule(rows.name).weight.shape[0]  # type: ignore[index]
        raise ConfigError(
            f"trainable_token_indices has {below[0]} for {rows.name!r}: a row counts from 0, and "
            f"index_copy takes no negative ones. Write {below[0] + int(count)}"
        )
