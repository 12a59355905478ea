"""A LoraConfig read once: a copy that may be resolved, every value checked, every field accounted."""

from __future__ import annotations

import copy
import re
from dataclasses import fields
from typing import Any

from fxlora.errors import ConfigError, UnsupportedError

# Fields a rewrite honours. The docs' parity table is made from these two tables.
HONOURED = {
    "r": "rank of every adapter that rank_pattern does not name",
    "lora_alpha": "scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora",
    "use_rslora": "see lora_alpha",
    "lora_dropout": "nn.Dropout before lora_A when above zero",
    "target_modules": "exact names and dotted suffixes, a regular expression, or all-linear",
    "target_parameters": "2-D and 3-D parameters, by name or dotted suffix",
    "exclude_modules": "the same rules, checked first",
    "layers_to_transform": "layer indices, for suffix matches",
    "layers_pattern": "the name in front of the layer index",
    "rank_pattern": "first matching key wins",
    "alpha_pattern": "first matching key wins",
    "fan_in_fan_out": "corrected per layer by its class, as PEFT does",
    "bias": "none, all, or lora_only",
    "lora_bias": "a bias on lora_B, inside the scaling",
    "init_lora_weights": "True, False and gaussian",
}
# Fields that say nothing about the graph.
NEUTRAL = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision "
    "inference_mode runtime_config megatron_core qalora_group_size".split()
)
REFUSED = {
    "modules_to_save": "a trainable copy of a whole module",
    "use_dora": "DoRA rescales the base output by a learned magnitude",
    "use_qalora": "QA-LoRA pools the input in groups and needs a GPTQ layer",
    "megatron_config": "needs megatron-core",
    "trainable_token_indices": "selected embedding rows are replaced, not adapted",
    "loftq_config": "LoftQ quantizes the base weight",
    "eva_config": "EVA needs data",
    "corda_config": "CorDA needs data",
    "lora_ga_config": "LoRA-GA needs gradients of data",
    "velora_config": "VeLoRA approximates the gradient of lora_A",
    "alora_invocation_tokens": "aLoRA switches on at a token found at run time",
    "monteclora_config": "MonteCLoRA samples lora_A",
    "layer_replication": "layers are repeated before tracing; replicate them, then trace",
    "use_bdlora": "block-diagonal lora_A or lora_B",
    "arrow_config": "Arrow routes per token between adapters",
    "kasa_config": "KaSA truncates the base weight",
    "ensure_weight_tying": "ties adapters across tied modules",
}
_INITS = (True, False, None, "gaussian")


def resolved_copy(config: Any) -> Any:
    """Returns a checked copy of a LoraConfig that may be changed.

    Args:
        config: a `peft.LoraConfig`; read, never changed.

    Raises:
        TypeError: when it is not a LoraConfig.
        UnsupportedError: names the first field that is set and not honoured.
        ConfigError: names a value PEFT would refuse, or would only fail on later.
    """
    if not hasattr(config, "peft_type") or not hasattr(config, "target_modules"):
        raise TypeError(
            f"config is a {type(config).__name__}; pass a peft.LoraConfig, for example "
            'LoraConfig(r=8, target_modules=["q_proj", "v_proj"])'
        )
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UnsupportedError(
            f"peft_type={config.peft_type!r}: fxlora rewrites LORA only; pass a peft.LoraConfig"
        )
    _check_support(config)
    _check_values(config)
    return copy.deepcopy(config)


def _default(f: Any) -> Any:
    import dataclasses

    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _check_support(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in HONOURED or f.name in NEUTRAL or value == _default(f) or not value:
            continue
        why = REFUSED.get(f.name, "fxlora does not know this field")
        raise UnsupportedError(
            f"{f.name}={value!r} is not supported yet: {why}. Leave it at {_default(f)!r}; "
            "docs/parity.md lists what is"
        )


def _check_values(config: Any) -> None:
    _check_rank("r", config.r)
    _check_number("lora_alpha", config.lora_alpha)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, getattr(config, name))
    dropout = config.lora_dropout
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or dropout > 1:
        raise ConfigError(f"lora_dropout={dropout!r}: give a probability from 0.0 to 1.0")
    if dropout < 0:
        raise ConfigError(
            f"lora_dropout={dropout!r} is negative; PEFT reads that as no dropout at all. "
            "Say 0.0 if that is what you mean"
        )
    if config.init_lora_weights not in _INITS:
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported yet; "
            "use True, False or 'gaussian'"
        )
    bias = config.bias
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        raise ConfigError(f"bias={bias!r}: one of 'none', 'all', 'lora_only'")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        _check_names(name, getattr(config, name))
    if isinstance(config.modules_to_save, str):
        raise ConfigError(
            f"modules_to_save={config.modules_to_save!r} is a string, which PEFT would read letter "
            f"by letter; write [{config.modules_to_save!r}]"
        )
    _check_layers(config.layers_to_transform)


def _check_rank(name: str, r: Any) -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise ConfigError(f"{name}={r!r}: a rank is a positive int")
    if r <= 0:
        raise ConfigError(f"{name}={r}: a rank is at least 1")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: a number")


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise ConfigError(f"{name}={pattern!r}: a dict from name patterns to numbers, or {{}}")
    for key, value in pattern.items():
        _check_regex(name, key)
        if name == "rank_pattern":
            _check_rank(f"rank_pattern[{key!r}]", value)
        else:
            _check_number(f"alpha_pattern[{key!r}]", value)


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as e:
        raise ConfigError(f"{name}={pattern!r} is not a regular expression: {e}") from None


def _check_names(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        if name != "layers_pattern" and value.lower() != "all-linear":
            _check_regex(name, value)
        return
    try:
        bad = [v for v in value if not isinstance(v, str)]
    except TypeError:
        raise ConfigError(f"{name}={value!r}: a string or a list of strings") from None
    if bad:
        raise ConfigError(f"{name} holds {bad[0]!r}, which is not a string")


def _check_layers(value: Any) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return
    raise ConfigError(f"layers_to_transform={value!r}: an int or a list of ints")
