"""The most used architectures and the recipes people train them with, each in its own names."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from sweep import build
from torch.fx import GraphModule

import fxlora
from fxlora.example_inputs import for_model


class Architecture(NamedTuple):
    """One architecture.

    Attributes:
        model: the transformers class; its config class is the model's own.
        qv: the names of its query and value projections, or of the layer that fuses them.
        attention: the names of all of its attention's projections.
    """

    model: str
    qv: list[str]
    attention: list[str]


_QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LLAMA = (["q_proj", "v_proj"], _QKVO)
_OUT = ["q_proj", "k_proj", "v_proj", "out_proj"]
_BERT = (["query", "value"], ["query", "key", "value", "attention.output.dense"])
_FUSED = (["query_key_value"], ["query_key_value", "dense"])

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", *_LLAMA),
    "mistral": Architecture("MistralForCausalLM", *_LLAMA),
    "qwen2": Architecture("Qwen2ForCausalLM", *_LLAMA),
    "qwen3": Architecture("Qwen3ForCausalLM", *_LLAMA),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", *_LLAMA),
    "mixtral": Architecture("MixtralForCausalLM", *_LLAMA),
    "smollm3": Architecture("SmolLM3ForCausalLM", *_LLAMA),
    "gemma2": Architecture("Gemma2ForCausalLM", *_LLAMA),
    "gemma3": Architecture("Gemma3ForCausalLM", *_LLAMA),
    "phi3": Architecture("Phi3ForCausalLM", ["qkv_proj"], ["qkv_proj", "o_proj"]),
    "gpt2": Architecture("GPT2LMHeadModel", ["c_attn"], ["c_attn", "attn.c_proj"]),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", *_FUSED),
    "falcon": Architecture("FalconForCausalLM", *_FUSED),
    "bloom": Architecture("BloomForCausalLM", *_FUSED),
    "opt": Architecture("OPTForCausalLM", ["q_proj", "v_proj"], _OUT),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM", ["q_b_proj", "kv_b_proj"],
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    ),
    "bert": Architecture("BertForMaskedLM", *_BERT),
    "roberta": Architecture("RobertaForMaskedLM", *_BERT),
    "distilbert": Architecture(
        "DistilBertForMaskedLM", ["q_lin", "v_lin"], ["q_lin", "k_lin", "v_lin", "out_lin"]
    ),
    "t5": Architecture("T5ForConditionalGeneration", ["q", "v"], ["q", "k", "v", "o"]),
    "vit": Architecture("ViTForImageClassification", ["q_proj", "v_proj"], _QKVO),
    "whisper": Architecture("WhisperForConditionalGeneration", ["q_proj", "v_proj"], _OUT),
    "clip": Architecture("CLIPModel", ["q_proj", "v_proj"], _OUT),
}  # fmt: skip
RECIPES = ("all-linear", "q/v", "attention")


def targets(name: str, recipe: str) -> Any:
    """Returns the target_modules of a recipe."""
    if recipe == "all-linear":
        return recipe
    one = ARCHITECTURES[name]
    return one.qv if recipe == "q/v" else one.attention


# One dense block and one of experts; as many labels as ImageNet has.
_SETTINGS = {"deepseek_v3": {"first_k_dense_replace": 1}, "vit": {"num_labels": 1000}}


def traced(name: str, **settings: Any) -> GraphModule:
    """Returns an architecture traced, from its default config cut to two layers of each kind."""
    import transformers

    cls = getattr(transformers, ARCHITECTURES[name].model)
    model = build(partial(cls.config_class, **{**_SETTINGS.get(name, {}), **settings}), cls)
    return fxlora.trace(model, *for_model(model, (), None))
