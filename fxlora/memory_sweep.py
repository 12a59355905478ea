"""One configuration beside others: what each would hold in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import GraphModule

from fxlora.choose import choose
from fxlora.config import resolved_copy
from fxlora.errors import ConfigError, FxloraError
from fxlora.memory import Memory, memory
from fxlora.rewrite import rewrite
from fxlora.roles import place_of
from fxlora.sites import sites


def configured(
    traced: GraphModule, config: Any, reach: Iterable[str], args: Any, kwargs: Any, optimizer: str,
    mark: str = "",
) -> Memory:  # fmt: skip
    """Returns what a training step with one configuration holds; `mark` stands before its label."""
    lora = rewrite(traced, config, reach=tuple(reach))
    return memory(lora, args, kwargs, optimizer=optimizer, label=mark + _label(config))


def _label(config: Any) -> str:
    targets = config.target_modules
    if not isinstance(targets, str):
        named = sorted(targets or config.target_parameters or ())
        targets = ",".join(named) if len(named) < 6 else f"{len(named)} targets"
    more = f", dropout {config.lora_dropout:g}" if config.lora_dropout else ""
    return f"{targets or 'the default'} r={config.r}{more}"


def sweep(traced: GraphModule, config: Any, args: Any, kwargs: Any, optimizer: str) -> list[Memory]:
    """Returns what other choices would hold: by role, by depth, with dropout, and everything.

    Args:
        traced: what `fxlora.trace` returned; read.
        config: a `peft.LoraConfig` whose rank is taken; None for r=8.
        args: the example inputs.
        kwargs: the same by name.
        optimizer: one of `fxlora.memory.OPTIMIZERS`.

    Raises:
        ConfigError: when the configuration itself cannot be honoured.
    """
    # A wrong rank would be wrong in every choice, and look like a model without such layers.
    r = 8 if config is None else resolved_copy(config).r
    found = []
    for label, made in _choices(traced, r):
        try:
            lora = rewrite(traced, made)
        except ConfigError:
            continue  # a model without such layers
        found.append(memory(lora, args, kwargs, optimizer=optimizer, label=label))
    full = memory(traced, args, kwargs, optimizer=optimizer, label="everything (no LoRA)")
    return [*found, full]


def _choices(traced: GraphModule, r: int) -> Iterator[tuple[str, Any]]:
    from peft import LoraConfig

    layers = sorted({n for s in sites(traced) if (n := place_of(s.name).layer) is not None})
    last = layers[-max(1, len(layers) // 4) :]
    words = {f"attention r={r}": "attention", f"mlp r={r}": "mlp"}
    if len(layers) > 1:
        span = f"{last[0]}-{last[-1]}"
        words[f"all-linear, layers {span} r={r}"] = f"all-linear @ {span}"
    for label, text in words.items():
        try:
            choice = choose(traced, text)
        except FxloraError:
            continue
        if choice.exact:
            yield label, LoraConfig(r=r, **choice.fields())
    yield f"all-linear r={r}", LoraConfig(r=r, target_modules="all-linear")
    yield f"all-linear r={8 * r}", LoraConfig(r=8 * r, target_modules="all-linear")
    dropped = LoraConfig(r=r, target_modules="all-linear", lora_dropout=0.05)
    yield f"all-linear r={r}, dropout 0.05", dropped
