"""Small models of real classes, each with the inputs it is traced on and others it must run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


@dataclass
class Entry:
    """One model of the zoo.

    Attributes:
        build: makes the model, with weights, on the CPU.
        inputs: makes its keyword inputs from a batch size and a length.
        targets: LoRA target modules that reach its attention.
        sizes: (batch, length) of the trace, then of the other runs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    targets: Any
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(2, 16), (3, 9)])
    task_type: str | None = None


def _ids(batch: int, length: int, vocab: int = 99) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length))


def _padding(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return mask


def _text(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length)}


def _masked(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length), "attention_mask": _padding(batch, length)}


def _causal(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length), "use_cache": False}


def _causal_masked(batch: int, length: int) -> Inputs:
    return {**_masked(batch, length), "use_cache": False}


def _seq2seq(batch: int, length: int) -> Inputs:
    return {
        "input_ids": _ids(batch, length),
        "attention_mask": _padding(batch, length),
        "decoder_input_ids": _ids(batch, length - 3),
        "use_cache": False,
    }


def _config(name: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**settings)


def _model(cls: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, cls)(_config(config, **settings))

    return build


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99, "n_positions": 64}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 99,
}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_dropout_prob": 0.1,
}


def seed() -> nn.Sequential:
    """Returns the seed's network: 325 parameters."""
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


ZOO: dict[str, Entry] = {
    "seed": Entry(seed, lambda b, n: {"input": torch.randn(b, 10)}, ["0", "2"]),
    "gpt2": Entry(_model("GPT2LMHeadModel", "GPT2Config", **_GPT2), _causal, ["c_attn", "c_proj"]),
    "llama": Entry(_model("LlamaForCausalLM", "LlamaConfig", **_LLAMA), _causal, "all-linear"),
    "llama_padded": Entry(
        _model("LlamaForCausalLM", "LlamaConfig", **_LLAMA), _causal_masked, ["q_proj", "v_proj"]
    ),
    "qwen3": Entry(
        _model("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=8), _causal, "all-linear"
    ),
    "bert": Entry(_model("BertModel", "BertConfig", **_BERT), _masked, ["query", "value"]),
    "t5": Entry(
        _model("T5ForConditionalGeneration", "T5Config", **_T5), _seq2seq, ["q", "v", "wo"]
    ),
    "vit": Entry(
        _model("ViTForImageClassification", "ViTConfig", **_VIT),
        lambda b, n: {"pixel_values": torch.randn(b, 3, 16, 16)},
        "all-linear",
    ),
    "whisper": Entry(
        _model("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
        lambda b, n: {
            "input_features": torch.randn(b, 8, 40),
            "decoder_input_ids": _ids(b, n),
            "use_cache": False,
        },
        ["q_proj", "v_proj", "fc1"],
    ),
    "qwen3_moe": Entry(
        _model(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **_LLAMA,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        _causal,
        ["q_proj", "v_proj"],
    ),
    "albert": Entry(
        _model(
            "AlbertModel",
            "AlbertConfig",
            hidden_size=32,
            embedding_size=16,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=99,
            hidden_dropout_prob=0.1,
        ),
        _masked,
        "all-linear",
    ),
}


def tensors(value: Any) -> list[torch.Tensor]:
    """Returns the tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []
