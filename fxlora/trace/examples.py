"""Example inputs for a transformers model, built from its config; nothing is loaded or fetched."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxlora.errors import TraceError

BATCH, LENGTH, TARGET_LENGTH = 2, 16, 10


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is a transformers PreTrainedModel; never imports transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def inputs(model: nn.Module) -> dict[str, Any]:
    """Returns keyword inputs for a transformers model.

    Token ids for text, pixels for vision, features or samples for audio, and decoder ids beside
    them for an encoder-decoder; on the device of the model's parameters. A model that chats about
    images or sounds gets text alone, which it can do with. `use_cache=False` is passed where the
    model knows it: an adapter is trained without a cache.

    Raises:
        TraceError: for a model whose main input is none of these; names it.
    """
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    made = _tensors(model, config, names)
    devices = [p.device for p in model.parameters()]
    device = max(devices, key=devices.count)  # a legacy constructor may have left one on the CPU
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    made = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in made.items()}
    if _takes_cache(model, config, names):
        return {**made, "use_cache": False}
    return made


def _tensors(model: nn.Module, config: Any, names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    main = _main_input(model, names)
    made = {main: _BUILDERS[main](config)}
    if "decoder_input_ids" in names:
        made.update(_decoder_ids(model, config))
    made.update(_beside(model, config, main, names))
    if not _classifies_text(model) or "input_ids" not in made:
        return made
    eos = _find(config, "eos_token_id")
    if isinstance(eos, int):
        made["input_ids"][:, -1] = eos  # where BART's classifier and its like look
    # Without a padding token it refuses more rows than one.
    rows = BATCH if _find(config, "pad_token_id") is not None else 1
    return {k: v[:rows] for k, v in made.items()}


def _takes_cache(model: nn.Module, config: Any, names: Mapping[str, Any]) -> bool:
    if _find(config, "use_cache") is None:
        return False
    if "use_cache" in names:
        return True
    # A classifier over an encoder-decoder makes its own choice, and passes the rest on.
    own = _classifies_text(model) and getattr(config, "is_encoder_decoder", False)
    return not own and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())


def _main_input(model: nn.Module, names: Mapping[str, Any]) -> str:
    """Returns the input to build: the model's main one, or another it takes in its place."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    for name in (main, *names):
        if name in _BUILDERS:
            return name
    raise TraceError(
        f"{type(model).__name__} takes {main!r} as its main input, which fxlora has no example "
        f"for; pass inputs yourself: fxlora.trace(model, (), {{{main!r}: ...}})"
    )


def _decoder_ids(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """Returns the decoder's ids; none where the model is not one, or shifts the encoder's ids."""
    # A classifier looks for the end of the text at the same places in both.
    if not getattr(config, "is_encoder_decoder", False) or _classifies_text(model):
        return {}
    shape: tuple[int, ...] = (BATCH, TARGET_LENGTH)
    if getattr(config, "model_type", "") == "dia":  # a decoder of sound: one id per channel
        shape = (*shape, config.decoder_config.num_channels)
    return {"decoder_input_ids": torch.zeros(shape, dtype=torch.long)}


def _beside(
    model: nn.Module, config: Any, main: str, names: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns the inputs a model cannot do without beside its main one."""
    made: dict[str, torch.Tensor] = {}
    if "input_ids" in names and main == "pixel_values":
        made["input_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if "pixel_values" in names and main == "input_ids" and _is_two_tower(model):
        made["pixel_values"] = _pixels(config)
    if "input_features" in names and main == "input_ids" and _is_two_tower(model, "audio"):
        made["input_features"] = _features(config)
    if "bbox" in names:
        made["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if "lang_ids" in names:
        made["lang_ids"] = torch.zeros(BATCH, dtype=torch.long)
    if "spatial_shapes" in names:
        made.update(_patches(config))
    if getattr(config, "model_type", "") == "voxtral_realtime":  # text and sound in step
        frames = 2 * config.downsample_factor * LENGTH
        made["input_features"] = torch.zeros(BATCH, _find(config, "num_mel_bins"), frames)
    return made


def _classifies_text(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _is_two_tower(model: nn.Module, other: str = "image") -> bool:
    """Whether a model of text and images (CLIP) or sounds (CLAP) needs both.

    A model that chats about either can do with text alone.
    """
    return hasattr(model, f"get_{other}_features") and hasattr(model, "get_text_features")


def _parts(config: Any) -> Iterator[Any]:
    """Yields a config and the configs in it: text before vision before audio, then the others."""
    yield config
    values = {k: v for k, v in vars(config).items() if hasattr(v, "to_dict")}
    for name in sorted(values, key=lambda k: (*_ORDER, k).index(k)):
        yield from _parts(values[name])


def _find(config: Any, *names: str) -> Any:
    """Returns the first of the settings that a config, or a config in it, has."""
    parts = list(_parts(config))
    found = (getattr(c, name, None) for name in names for c in parts)
    return next((value for value in found if value is not None), None)


def _text(config: Any) -> torch.Tensor:
    # MusicGen's decoder reads one row of ids per codebook, Kyutai's one id more in each place.
    codebooks = getattr(config, "num_codebooks", None) or 0
    if getattr(config, "model_type", "") == "kyutai_speech_to_text":
        return torch.full((BATCH, LENGTH, codebooks + 1), 3, dtype=torch.long)
    return torch.full((BATCH * (codebooks or 1), LENGTH), 3, dtype=torch.long)


def _pixels(config: Any) -> torch.Tensor:
    size = _find(config, "image_size") or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _find(config, "num_channels") or 3
    shape: tuple[int, ...] = (BATCH, channels, height, width)
    frames = _find(config, "num_frames")
    # Perceiver's config has the settings of all its tasks at once.
    if frames and getattr(config, "model_type", "") != "perceiver":
        shape = (BATCH, frames, channels, height, width)
    return torch.zeros(shape)


def _patches(config: Any) -> dict[str, torch.Tensor]:
    """Returns square images that were cut into patches beforehand."""
    side = int(_find(config, "num_patches") ** 0.5)
    width = (_find(config, "num_channels") or 3) * _find(config, "patch_size") ** 2
    return {
        "pixel_values": torch.zeros(BATCH, side * side, width),
        "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH, 2), side),
    }


def _features(config: Any) -> torch.Tensor:
    bins = _find(config, "num_mel_bins") or 80
    # Whisper insists on the full window: two frames per encoder position.
    if getattr(config, "model_type", "") == "whisper":
        return torch.zeros(BATCH, bins, 2 * config.max_source_positions)
    if getattr(config, "model_type", "") in ("clap", "clap_audio_model"):
        return torch.zeros(BATCH, 1, 1001, bins)  # ten seconds, in one channel
    if getattr(config, "model_type", "").startswith("granite_speech5"):
        bins *= 4  # its encoder reads four frames at a time
    per_channel = _find(config, "input_feat_per_channel", "feature_projection_input_dim")
    return torch.zeros(BATCH, 64, per_channel or bins)


def _samples(config: Any) -> torch.Tensor:
    if getattr(config, "model_type", "") == "audio-spectrogram-transformer":
        return torch.zeros(BATCH, config.max_length, config.num_mel_bins)
    return torch.zeros(BATCH, 8000)


_ORDER = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
_BUILDERS = {
    "input_ids": _text,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _features,
    "input_values": _samples,
}
