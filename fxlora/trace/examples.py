"""Example inputs for a transformers model, built from its config; nothing is loaded or fetched."""

from __future__ import annotations

import inspect
import sys
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
    them for an encoder-decoder; on the device of the model's parameters. `use_cache=False` is
    passed where the model knows it: an adapter is trained without a cache.

    Raises:
        TraceError: for a model whose main input is none of these; names it.
    """
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    devices = [p.device for p in model.parameters()]
    device = max(devices, key=devices.count)  # a legacy constructor may have left one on the CPU
    main = getattr(model, "main_input_name", "input_ids")
    made: dict[str, Any] = {}
    builder = _BUILDERS.get(main)
    if builder is None:
        raise TraceError(
            f"{type(model).__name__} takes {main!r} as its main input, which fxlora has no example "
            f"for; pass inputs yourself: fxlora.trace(model, (), {{{main!r}: ...}})"
        )
    made[main] = builder(config, device)
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = torch.zeros(
            BATCH, TARGET_LENGTH, dtype=torch.long, device=device
        )
    if "input_ids" in names and main == "pixel_values":
        made["input_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)
    if "pixel_values" in names and main == "input_ids" and _is_two_tower(model):
        made["pixel_values"] = _pixels(config, device)
    if "bbox" in names:
        made["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long, device=device)
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    made = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}
    takes_cache = "use_cache" in names or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values()
    )
    if takes_cache and _find(config, "use_cache") is not None:
        made["use_cache"] = False
    return made


def _text(config: Any, device: torch.device) -> torch.Tensor:
    # MusicGen's decoder reads one row of ids per codebook.
    rows = BATCH * (getattr(config, "num_codebooks", None) or 1)
    return torch.full((rows, LENGTH), 3, dtype=torch.long, device=device)


def _is_two_tower(model: nn.Module) -> bool:
    """Whether a text-and-image model needs both (CLIP); a chat model can do with text alone."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _find(config: Any, *names: str) -> Any:
    """Returns the first of the settings that a config, or a config in it, has."""
    nested = [getattr(config, k, None) for k in _PARTS]
    for name in names:
        for c in (config, *nested):
            value = getattr(c, name, None)
            if value is not None:
                return value
    return None


def _pixels(config: Any, device: torch.device) -> torch.Tensor:
    size = _find(config, "image_size") or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _find(config, "num_channels") or 3
    shape: tuple[int, ...] = (BATCH, channels, height, width)
    frames = _find(config, "num_frames")
    if frames:
        shape = (BATCH, frames, channels, height, width)
    return torch.zeros(shape, device=device)


def _features(config: Any, device: torch.device) -> torch.Tensor:
    bins = _find(config, "num_mel_bins") or 80
    positions = _find(config, "max_source_positions")
    # Whisper insists on the full window: two frames per encoder position.
    if getattr(config, "model_type", "") == "whisper":
        return torch.zeros(BATCH, bins, 2 * positions, device=device)
    per_channel = _find(config, "input_feat_per_channel", "feature_projection_input_dim")
    return torch.zeros(BATCH, 64, per_channel or bins, device=device)


def _samples(config: Any, device: torch.device) -> torch.Tensor:
    if getattr(config, "model_type", "") == "audio-spectrogram-transformer":
        return torch.zeros(BATCH, config.max_length, config.num_mel_bins, device=device)
    return torch.zeros(BATCH, 8000, device=device)


_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
_BUILDERS = {
    "input_ids": _text,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _features,
    "input_values": _samples,
}
