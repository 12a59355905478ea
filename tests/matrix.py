"""The conformance matrix: every kind of layer, every option of LoraConfig, one tiny model a row.

A row is data. What is asserted of it stands in test_matrix.py; what a row says of itself here
(which of PEFT's known mistakes bear on it, what PEFT refuses) is asserted there too.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import LoraConfig
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
WIDTH = 6
VOCAB = 31


@dataclass(frozen=True)
class Row:
    """One model under one configuration.

    Attributes:
        id: the row's name.
        make: makes the model.
        given: makes its example inputs.
        settings: of the LoraConfig; rank 4 and alpha 6 unless they say otherwise, because a
            scaling of 1.5 is no power of two, so one applied elsewhere shows in the last bit.
        dtype, device: of the model and its floating inputs.
        training: the mode the model is given in.
        divergent: the known mistakes of PEFT's that bear on the row, by name.
        unmergeable: a pattern of our refusal to merge; PEFT then refuses too, or merges wrongly.
        untraceable: why PEFT's wrapped model has no trace; "" when it has one.
        refused: a pattern of our refusal; "" when the configuration is taken.
        peft_takes: whether PEFT takes what we refuse.
        dead: parts of names of adapters that no gradient reaches, in PEFT either.
        residual: the initialisation changes the base weight.
        dense: whether the adapted layer is one dense weight everywhere it is used.
    """

    id: str
    make: Callable[[], nn.Module]
    given: Callable[[], Inputs]
    settings: dict[str, Any] = field(hash=False)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = True
    divergent: tuple[str, ...] = ()
    unmergeable: str = ""
    untraceable: str = ""
    refused: str = ""
    peft_takes: bool = False
    dead: tuple[str, ...] = ()
    residual: bool = False
    dense: bool = True

    def build(self) -> nn.Module:
        """Makes the model: the same bits every time."""
        torch.manual_seed(3)
        return self.make().to(self.device, self.dtype).train(self.training)

    def inputs(self) -> Inputs:
        """Makes the example inputs: the same bits every time."""
        torch.manual_seed(4)
        args, kwargs = self.given()
        return tuple(map(self._placed, args)), {k: self._placed(v) for k, v in kwargs.items()}

    def config(self) -> LoraConfig:
        """Makes the configuration; a new one, because PEFT writes into it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**{"r": 4, "lora_alpha": 6, **copy.deepcopy(self.settings)})

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    @property
    def forward_differs(self) -> bool:
        """Whether PEFT's output is known to be off."""
        return bool(FORWARD & set(self.divergent))

    @property
    def dead_in_eval(self) -> bool:
        """Whether torch's own layer goes past the layers inside it in eval mode, adapters and all."""
        return "encoder_fast_path" in self.divergent


# Of the known mistakes, those that change what PEFT computes before anything is merged or saved.
FORWARD = {
    "attention_out_proj_doubled",
    "conv_dilation",
    "conv_padding_mode",
    "embedding_max_norm",
    "tied_base_changed",
}


# ---- networks ----------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two linear layers around a dropout."""

    def __init__(self, bias: bool = True, layer: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.lin0 = layer(WIDTH, 10, bias=bias)
        self.drop = nn.Dropout(0.1)
        self.lin1 = nn.Linear(10, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.drop(torch.relu(self.lin0(x))))


class Kin(nn.Linear):
    """A subclass that computes what its parent does."""


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def normed() -> nn.Module:
    """Returns the two layers with a first weight that is computed from two other parameters."""
    model = Mlp()
    nn.utils.parametrizations.weight_norm(model.lin0)
    return model


class Bare(nn.Module):
    """A linear layer of the model's own making."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, WIDTH) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class OwnParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Bare()
        self.lin1 = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.q_proj(x) @ self.k_proj(x).transpose(-1, -2), -1)
        return self.o_proj(weights @ self.v_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Stack(nn.Module):
    """Three blocks and a head, named as transformers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Model(nn.Module):
    """The stack one name further down: PEFT finds a layer's index behind two names only."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Text(nn.Module):
    """An embedding, transformers' Conv1D, a linear layer."""

    def __init__(self, embedding: Callable[[], nn.Embedding]) -> None:
        super().__init__()
        self.emb = embedding()
        self.conv1d = Conv1D(5, WIDTH)
        self.lin0 = nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin0(torch.relu(self.conv1d(self.emb(ids))))


class Scaled(nn.Embedding):
    """Gemma's embedding: a scale in a buffer that no checkpoint holds."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(width**0.5), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """Bart's embedding: a scale that is a Python number."""

    embed_scale = 1.7

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Language(nn.Module):
    """An embedding whose weight is the output layer's, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.tanh(self.mid(self.embed(ids))))


class TiedPair(nn.Module):
    """Two linear layers that share one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Twice(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.lin(x))
        return x


class Prefixed(nn.Module):
    """A layer whose name ends as an entry of modules_to_save, without a dot before it."""

    def __init__(self) -> None:
        super().__init__()
        self.old_lin1 = nn.Linear(WIDTH, WIDTH)
        self.lin0 = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.old_lin1(x))


class Alias(nn.Module):
    """One layer under two names, called through both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Convolutions(nn.Module):
    """A convolution of any dimension, a mean over space, a linear layer."""

    def __init__(
        self, layer: Callable[..., nn.Module], norm: bool, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.conv = layer(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **settings})
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.lin0 = nn.Linear(settings.get("out_channels", 8), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(torch.tanh(self.norm(self.conv(x))).flatten(2).mean(-1))


class Heads(nn.Module):
    """nn.MultiheadAttention, then a linear layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(**{"embed_dim": 8, "num_heads": 2, **settings})
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, other: Any = None, **masks: Any) -> torch.Tensor:
        other = x if other is None else other
        return self.lin0(self.mha(x, other, other, **masks)[0])


class Encoder(nn.Module):
    """torch's own transformer layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Experts(nn.Module):
    """Two stacks of expert weights, as transformers' mixtures hold them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (3, 8, WIDTH), (3, WIDTH, 4)
        turn = (0, 2, 1) if is_transposed else (0, 1, 2)
        self.gate_up_proj = nn.Parameter((torch.randn(up) / 3).permute(turn).contiguous())
        self.down_proj = nn.Parameter((torch.randn(down) / 3).permute(turn).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = torch.bmm(x.expand(3, *x.shape), up).chunk(2, -1)
        return torch.bmm(F.silu(gate) * value, down).sum(0)


class Mixture(nn.Module):
    """Experts between two linear layers."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.lin0 = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(is_transposed)
        self.lin1 = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.experts(torch.tanh(self.lin0(x))))


# ---- inputs and small transformers -------------------------------------------------------------


def _floats(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(*shape),), {})


def _ids() -> Inputs:
    # Padding, a row read twice, and every row that trains alone in some row of the matrix.
    return (torch.tensor([[1, 10, 5, 0, 7, 2, 3], [4, 30, 30, 0, 11, 12, 13]]),), {}


def _tokens(**more: Any) -> Callable[[], Inputs]:
    ids = torch.tensor([[1, 5, 2, 9, 4, 3, 8], [6, 7, 30, 30, 29, 11, 10]])
    return lambda: ((), {"input_ids": ids, **more})


def _pairs() -> Inputs:
    ids = torch.randint(1, VOCAB, (2, 6))
    return (), {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}


def _pixels() -> Inputs:
    return (), {"pixel_values": torch.randn(2, 3, 8, 8)}


def _sound() -> Inputs:
    ids = torch.randint(3, VOCAB, (2, 5))
    features = torch.randn(2, 8, 24)
    return (), {"input_features": features, "decoder_input_ids": ids, "use_cache": False}


MASKED = {"attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
X = _floats(5, WIDTH)
SEQUENCE = _floats(2, 5, WIDTH)


def _hf(cls: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, cls)(getattr(transformers, config)(**settings))

    return make


_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
_ONE = {"num_hidden_layers": 1}
_DECODER = {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0}
_TIED = {**_DECODER, "tie_word_embeddings": True}
_MOE = {
    **_DECODER,
    **_ONE,
    "head_dim": 8,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
_WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": VOCAB,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB, "n_positions": 32}
_VIT = {**_SIZES, **_ONE, "image_size": 8, "patch_size": 4}

_llama = _hf("LlamaForCausalLM", "LlamaConfig", **{**_DECODER, **_ONE})
_llama_two = _hf("LlamaForCausalLM", "LlamaConfig", **_DECODER)
_llama_tied = _hf("LlamaForCausalLM", "LlamaConfig", **{**_TIED, **_ONE})
_llama_classes = _hf("LlamaForSequenceClassification", "LlamaConfig", **{**_DECODER, **_ONE})
_gpt2 = _hf("GPT2LMHeadModel", "GPT2Config", **_GPT2)
_BERT = {**_SIZES, **_ONE}
_bert = _hf("BertModel", "BertConfig", **_BERT)
_bert_classes = _hf("BertForSequenceClassification", "BertConfig", **_BERT)
_bert_tokens = _hf("BertForTokenClassification", "BertConfig", **_BERT)
_bert_answers = _hf("BertForQuestionAnswering", "BertConfig", **_BERT)
_gemma = _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **{**_TIED, **_ONE}, head_dim=8)
_mixtral = _hf("MixtralForCausalLM", "MixtralConfig", **_MOE)
_qwen3_moe = _hf("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE)
_gpt_oss = _hf("GptOssForCausalLM", "GptOssConfig", **_MOE)
_t5 = _hf("T5ForConditionalGeneration", "T5Config", **_T5)
_vit = _hf("ViTForImageClassification", "ViTConfig", **_VIT)
_whisper = _hf("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER)

CAUSAL, TOKENS = _tokens(use_cache=False), _tokens()
PADDED = _tokens(**MASKED)


NEW_PARAMETERS = "peft's attention puts other parameters into the layer at every call"
NO_SHAPE = "without its dilation lora_A gives another shape than the base"


def _conv(
    dim: int, settings: dict[str, Any], config: dict[str, Any], norm: bool = False
) -> dict[str, Any]:
    """Returns a convolution row's model, inputs and configuration."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return {
        "make": lambda: Convolutions(layer, norm, settings),
        "given": _floats(2, 4, *(7, 6, 5)[:dim]),
        "settings": {"target_modules": ["conv"], **config},
    }


def _text(config: dict[str, Any], **embedding: Any) -> dict[str, Any]:
    """Returns an embedding row's model, inputs and configuration."""
    cls = embedding.pop("cls", nn.Embedding)
    return {
        "make": lambda: Text(lambda: cls(VOCAB, WIDTH, **embedding)),
        "given": _ids,
        "settings": config,
    }


def _heads(settings: dict[str, Any], given: Callable[[], Inputs], **config: Any) -> dict[str, Any]:
    """Returns an attention row's model, inputs and configuration."""
    return {
        "make": lambda: Heads(**settings),
        "given": given,
        "settings": {"target_modules": ["mha"], **config},
        "divergent": ("attention_out_proj_doubled",),
        "untraceable": NEW_PARAMETERS,
    }


def _mixture(given_transposed: bool = False, **config: Any) -> dict[str, Any]:
    """Returns a mixture-of-experts row's model, inputs and configuration."""
    return {"make": lambda: Mixture(given_transposed), "given": X, "settings": config}


# ---- rows --------------------------------------------------------------------------------------

BOTH = {"target_modules": ["lin0", "lin1"]}
ONE = {"target_modules": ["lin0"]}


def _mlp(id: str, settings: dict[str, Any], **more: Any) -> Row:
    return Row(f"linear-{id}", more.pop("make", Mlp), more.pop("given", X), settings, **more)


def _linear() -> list[Row]:
    return [
        _mlp("pattern", {"target_modules": "lin0"}),
        _mlp("first", ONE),
        _mlp("second", {"target_modules": ["lin1"]}),
        _mlp("both", BOTH),
        _mlp("any-of-two-patterns", {"target_modules": r"lin0|lin1"}),
        _mlp("all-linear", {"target_modules": "all-linear"}),
        _mlp("excluded", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
        _mlp("dropout", {**BOTH, "lora_alpha": 4, "lora_dropout": 0.1}),
        _mlp("dropout-of-everything", {**ONE, "lora_dropout": 1.0}, dead=("lora_",)),
        _mlp(
            "given-in-eval",
            {**BOTH, "lora_dropout": 0.5},
            training=False,
            divergent=("eval_dropout",),
        ),
        _mlp("without-bias", BOTH, make=lambda: Mlp(bias=False)),
        _mlp("three-dimensional-input", BOTH, given=SEQUENCE),
        _mlp("one-dimensional-input", BOTH, given=_floats(WIDTH)),
        _mlp("rslora", {**BOTH, "use_rslora": True}),
        _mlp("alpha-32", {**BOTH, "lora_alpha": 32}),
        _mlp("negative-alpha", {**BOTH, "lora_alpha": -2.5}),
        _mlp("rank-1", {**BOTH, "r": 1}),
        _mlp("rank-above-the-dimensions", {**BOTH, "r": 16}),
        _mlp("rank-pattern", {**BOTH, "rank_pattern": {"lin1": 2}}),
        _mlp("alpha-pattern", {**BOTH, "alpha_pattern": {"^lin0": 5}}),
        _mlp(
            "patterns-whose-order-matters",
            {**BOTH, "rank_pattern": {"lin1": 2, "lin.": 3}, "alpha_pattern": {"lin0": 9}},
            divergent=("sorted_patterns",),
        ),
        _mlp("fan-in-fan-out-corrected", {**BOTH, "fan_in_fan_out": True}),
        _mlp("bias-all", {**ONE, "bias": "all"}),
        _mlp("bias-lora-only", {**ONE, "bias": "lora_only"}),
        _mlp("lora-bias", {**BOTH, "lora_bias": True, "lora_alpha": 32}),
        _mlp("lora-bias-dropout", {**BOTH, "lora_bias": True, "lora_dropout": 0.2}),
        _mlp("lora-bias-and-bias-all", {**BOTH, "lora_bias": True, "bias": "all"}),
        _mlp(
            "lora-bias-without-a-bias",
            {**ONE, "lora_bias": True},
            make=lambda: Mlp(bias=False),
            unmergeable="has no bias",
        ),
    ]  # fmt: skip


def _initialised() -> list[Row]:
    return [
        _mlp("init-random", {**BOTH, "init_lora_weights": False}),
        _mlp("init-none", {**BOTH, "init_lora_weights": None}),
        _mlp("init-gaussian", {**BOTH, "init_lora_weights": "gaussian"}),
        _mlp("init-pissa", {**BOTH, "init_lora_weights": "pissa"}, residual=True),
        _mlp(
            "init-pissa-niter",
            {**BOTH, "init_lora_weights": "pissa_niter_4", "r": 2},
            residual=True,
            divergent=("pissa_niter_reload",),
        ),
        _mlp("init-pissa-dropout", {**BOTH, "init_lora_weights": "pissa", "lora_dropout": 0.1},
            residual=True),
        _mlp("init-olora", {**BOTH, "init_lora_weights": "olora"}, residual=True),
        _mlp("init-orthogonal", {**BOTH, "init_lora_weights": "orthogonal"}),
        _mlp("init-mica", {**BOTH, "init_lora_weights": "mica"}),
        _mlp("init-mica-dropout", {**ONE, "init_lora_weights": "mica", "lora_dropout": 0.1}),
    ]  # fmt: skip


def _variants() -> list[Row]:
    blocks = {"target_modules_bd_a": ["lin0"], "target_modules_bd_b": ["lin1"], "nblocks": 2}
    loose = BdLoraConfig(target_modules_bd_b=["lin0"], nblocks=2, match_strict=False)
    return [
        _mlp("dora", {**ONE, "use_dora": True}),
        _mlp("dora-both", {**BOTH, "use_dora": True}),
        _mlp("dora-alpha-32-rslora", {**BOTH, "use_dora": True, "lora_alpha": 32,
                                     "use_rslora": True}),
        _mlp("dora-dropout", {**BOTH, "use_dora": True, "lora_dropout": 0.2}),
        _mlp("dora-dropout-without-bias", {**BOTH, "use_dora": True, "lora_dropout": 0.2},
            make=lambda: Mlp(bias=False)),
        _mlp("dora-bias-all", {**BOTH, "use_dora": True, "bias": "all"}),
        _mlp("dora-gaussian", {**BOTH, "use_dora": True, "init_lora_weights": "gaussian"}),
        _mlp("dora-pissa", {**BOTH, "use_dora": True, "init_lora_weights": "pissa"}, residual=True),
        _mlp("dora-rank-pattern", {**BOTH, "use_dora": True, "rank_pattern": {"lin1": 2}}),
        _mlp("kasa", {**ONE, "kasa_config": KasaConfig()}, residual=True),
        _mlp("kasa-dropout", {**BOTH, "kasa_config": KasaConfig(), "r": 3, "lora_dropout": 0.1},
            residual=True),
        _mlp("block-diagonal-a-and-b", {**BOTH, "use_bdlora": BdLoraConfig(**blocks)}),
        _mlp("block-diagonal-dropout", {**BOTH, "use_bdlora": BdLoraConfig(**blocks),
                                       "lora_dropout": 0.1}),
        _mlp("bf16-block-diagonal", {**BOTH, "use_bdlora": BdLoraConfig(**blocks)},
            dtype=torch.bfloat16),
        _mlp("block-diagonal-b-and-plain", {**BOTH, "use_bdlora": loose}),
    ]  # fmt: skip


def _other_linear() -> list[Row]:
    return [
        _mlp("bf16", BOTH, dtype=torch.bfloat16),
        _mlp("bf16-dropout-rslora", {**BOTH, "lora_dropout": 0.1, "use_rslora": True},
            dtype=torch.bfloat16),
        _mlp("bf16-dora", {**BOTH, "use_dora": True}, dtype=torch.bfloat16),
        
        _mlp("fp64", BOTH, dtype=torch.float64),
        _mlp("fp16-meta", {**BOTH, "lora_dropout": 0.1}, dtype=torch.float16, device="meta"),
        _mlp("fp16-meta-dora", {**BOTH, "use_dora": True}, dtype=torch.float16, device="meta"),
        _mlp("subclass", ONE, make=lambda: Mlp(layer=Kin)),
        _mlp("subclass-with-its-own-forward", ONE, make=lambda: Mlp(layer=Doubled),
            divergent=("own_forward_merge",), unmergeable="forward of its own", dense=False),
        _mlp("weight-norm", {**ONE, "lora_dropout": 0.1}, make=normed,
            divergent=("own_forward_merge",), dense=False),
        _mlp("called-three-times", {"target_modules": ["lin"], "lora_dropout": 0.1}, make=Twice),
        _mlp("called-three-times-dora", {"target_modules": ["lin"], "use_dora": True}, make=Twice),
        _mlp("alias", {"target_modules": ["a"]}, make=Alias, divergent=("tied_merge",), dense=False),
        _mlp("tied-pair", {"target_modules": ["a"]}, make=TiedPair, divergent=("tied_merge",),
            dense=False),
        _mlp("tied-pair-pissa", {"target_modules": ["a"], "init_lora_weights": "pissa"},
            make=TiedPair, divergent=("tied_base_changed", "tied_merge"), residual=True,
            dense=False),
    ]  # fmt: skip


def _selection() -> list[Row]:
    def stack(id: str, settings: dict[str, Any], **more: Any) -> Row:
        return Row(f"stack-{id}", more.pop("make", Stack), SEQUENCE, settings, **more)

    qv = {"target_modules": ["q_proj", "v_proj"]}
    return [
        stack("suffixes", qv),
        stack("one-layer", {**qv, "layers_to_transform": 1}, make=Model),
        stack("two-layers", {**qv, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
        stack("more-targets-than-twenty", {"target_modules": "all-linear", "lora_dropout": 0.1}),
        stack("digits", {"target_modules": ["mlp.0", "mlp.2"]}),
        stack("pattern", {"target_modules": r".*\.[12]\.attn\.(q|o)_proj", "use_dora": True}),
        stack("excluded-pattern", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
        stack(
            "rank-and-alpha-patterns",
            {
                "target_modules": ["q_proj", "k_proj", "o_proj"],
                "rank_pattern": {r"layers\.0\.attn\.q_proj": 2, "o_proj": 3},
                "alpha_pattern": {"layers.1.attn.o_proj": 5, "k_proj": 7},
            },
        ),
        stack("whole-container", {**qv, "modules_to_save": ["mlp", "head"]}),
        stack("whole-norms", {**qv, "modules_to_save": ["norm"], "lora_dropout": 0.1}),
        stack("bias-all", {**qv, "bias": "all"}),
        stack("bias-lora-only", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
        Row("linear-whole-layer", Mlp, X, {**ONE, "modules_to_save": ["lin1"]}),
        Row("linear-whole-layer-dora", Mlp, X, {**ONE, "modules_to_save": ["lin1"],
                                                "use_dora": True}),
        Row("linear-whole-layer-bf16", Mlp, X, {**ONE, "modules_to_save": ["lin1"]},
            dtype=torch.bfloat16),
    ]  # fmt: skip


def _texts() -> list[Row]:
    conv1d = {"target_modules": ["conv1d"]}
    rows = {
        "conv1d": _text(conv1d),
        "conv1d-dropout-rslora": _text({**conv1d, "lora_dropout": 0.1, "use_rslora": True}),
        "conv1d-fan-in-fan-out": _text({**conv1d, "fan_in_fan_out": True}),
        "conv1d-and-linear-fan-in-fan-out": _text(
            {"target_modules": ["conv1d", "lin0"], "fan_in_fan_out": True}
        ),
        "conv1d-dora": _text({**conv1d, "use_dora": True}),
        "conv1d-dora-dropout": _text({**conv1d, "use_dora": True, "lora_dropout": 0.2}),
        "conv1d-lora-bias": _text({**conv1d, "lora_bias": True}),
        "conv1d-pissa": {**_text({**conv1d, "init_lora_weights": "pissa"}), "residual": True},
        "conv1d-gaussian": _text({**conv1d, "init_lora_weights": "gaussian"}),
        "conv1d-mica": _text({**conv1d, "init_lora_weights": "mica"}),
        "conv1d-bf16": {**_text(conv1d), "dtype": torch.bfloat16},
    }  # fmt: skip
    return [Row(f"text-{id}", **row) for id, row in rows.items()]


def _embeddings() -> list[Row]:
    emb, both = {"target_modules": ["emb"]}, {"target_modules": ["emb", "conv1d"]}
    rows = {
        "embedding": _text(emb),
        "embedding-conv1d": _text(both),
        "embedding-conv1d-linear": _text({"target_modules": ["emb", "conv1d", "lin0"]}),
        "embedding-dropout-ignored": _text({**emb, "lora_dropout": 0.5}),
        "embedding-padding": _text({**emb, "use_rslora": True}, padding_idx=0),
        "embedding-frequency": _text(emb, scale_grad_by_freq=True),
        "embedding-scaled": _text(both, cls=Scaled),
        "embedding-scaled-by-a-number": _text(emb, cls=ScaledByNumber),
        "embedding-max-norm": {
            **_text(emb, max_norm=1.5), "divergent": ("embedding_max_norm",), "dense": False,
            "unmergeable": "max_norm",
        },
        "embedding-dora": _text({**emb, "use_dora": True}),
        "embedding-conv1d-dora": _text({**both, "use_dora": True}),
        "embedding-dora-dropout": _text({**both, "use_dora": True, "lora_dropout": 0.3}),
        "embedding-dora-padding": _text({**emb, "use_dora": True}, padding_idx=0),
        "embedding-dora-scaled": _text({**emb, "use_dora": True}, cls=Scaled),
        "embedding-init-random": _text({**emb, "init_lora_weights": False}),
        "embedding-init-gaussian": _text({**emb, "init_lora_weights": "gaussian"}),
        "embedding-mica": _text({**emb, "init_lora_weights": "mica"}),
        "embedding-mica-bf16": {
            **_text({**emb, "init_lora_weights": "mica"}), "dtype": torch.bfloat16,
        },
        "embedding-bf16": {**_text(both), "dtype": torch.bfloat16},
        "embedding-fp16-meta": {**_text(both), "dtype": torch.float16, "device": "meta"},
        "embedding-bias-all": _text({**emb, "bias": "all"}),
    }  # fmt: skip
    return [Row(f"text-{id}", **row) for id, row in rows.items()]


def _rows_and_ties() -> list[Row]:
    conv1d = {"target_modules": ["conv1d"]}
    rows = {
        "embedding-whole": _text({**conv1d, "modules_to_save": ["emb"]}),
        "tokens": _text({**conv1d, "trainable_token_indices": {"emb": [1, 10]}}),
        "tokens-padding": _text(
            {**conv1d, "trainable_token_indices": {"emb": [0, 5, 7]}}, padding_idx=0
        ),
        "tokens-scaled": _text({**conv1d, "trainable_token_indices": {"emb": [2, 3]}}, cls=Scaled),
        "tokens-bf16": {
            **_text({**conv1d, "trainable_token_indices": {"emb": [1, 10]}}),
            "dtype": torch.bfloat16,
        },
        "language-tied-embedding": {
            "make": Language, "given": _ids, "settings": {"target_modules": ["embed"]},
            "divergent": ("tied_merge",), "dense": False,
        },
        "language-tied-head": {
            "make": Language, "given": _ids, "settings": {"target_modules": ["lm_head"]},
            "divergent": ("tied_merge",), "dense": False,
        },
        "language-tied-both": {
            "make": Language, "given": _ids, "settings": {"target_modules": ["embed", "lm_head"]},
            "divergent": ("tied_merge",), "dense": False,
        },
        "language-tied-whole-embedding": {
            "make": Language, "given": _ids, "dense": False,
            "settings": {"target_modules": ["mid"], "modules_to_save": ["embed"]},
        },
        "language-tied-whole-both": {
            "make": Language, "given": _ids, "dense": False,
            "settings": {"target_modules": ["mid"], "modules_to_save": ["embed", "lm_head"]},
        },
        "language-tied-tokens-of-one": {
            "make": Language, "given": _ids, "dense": False, "divergent": ("tied_merge",),
            "settings": {"target_modules": ["mid"], "trainable_token_indices": {"embed": [3, 4]}},
        },
    }  # fmt: skip
    return [Row(f"text-{id}", **row) for id, row in rows.items()]


def _convolutions() -> list[Row]:
    dora = {"use_dora": True}
    rows = {
        "1d": _conv(1, {}, {}),
        "1d-dora": _conv(1, {}, dora),
        "1d-dora-dropout": _conv(1, {}, {**dora, "lora_dropout": 0.2}),
        "1d-strided-padded": _conv(1, {"stride": 2, "padding": 1}, {"lora_dropout": 0.1}),
        "1d-groups": {**_conv(1, {"groups": 2}, {}), "unmergeable": "grouped", "dense": False},
        "1d-dilation": {
            **_conv(1, {"dilation": 2}, {}), "divergent": ("conv_dilation",),
            "untraceable": NO_SHAPE,
        },
        "1d-dilation-padded": {
            **_conv(1, {"dilation": 2, "padding": "same"}, {}), "divergent": ("conv_dilation",),
        },
        "1d-lora-bias": _conv(1, {}, {"lora_bias": True}),
        "2d": _conv(2, {}, {}),
        "2d-and-linear": _conv(2, {}, {"target_modules": ["conv", "lin0"]}),
        "2d-strided-padded": _conv(2, {"stride": (2, 1), "padding": (1, 0)}, {"use_rslora": True}),
        "2d-padding-same": _conv(2, {"padding": "same", "kernel_size": (3, 2)}, {}),
        "2d-padding-valid": _conv(2, {"padding": "valid"}, {}),
        "2d-without-bias": _conv(2, {"bias": False}, {"lora_dropout": 0.2}),
        "2d-pointwise": _conv(2, {"kernel_size": 1}, {}),
        "2d-groups": {**_conv(2, {"groups": 2}, {}), "unmergeable": "grouped", "dense": False},
        "2d-groups-rank-8": {
            **_conv(2, {"groups": 4}, {"r": 8, "lora_dropout": 0.1}), "unmergeable": "grouped", "dense": False,
        },
        "2d-depthwise": {
            **_conv(2, {"groups": 4, "out_channels": 4}, {}), "unmergeable": "grouped", "dense": False,
        },
        "2d-dilation": {
            **_conv(2, {"dilation": (2, 1)}, {}), "divergent": ("conv_dilation",),
            "untraceable": NO_SHAPE,
        },
        "2d-circular": {
            **_conv(2, {"padding": 1, "padding_mode": "circular"}, {}),
            "divergent": ("conv_padding_mode",),
        },
        "2d-reflect-dilated": {
            **_conv(2, {"padding": 2, "padding_mode": "reflect", "dilation": 2}, {}),
            "divergent": ("conv_dilation", "conv_padding_mode"), "untraceable": NO_SHAPE,
        },
        "2d-norm": _conv(2, {}, {}, norm=True),
        "2d-norm-whole": _conv(2, {}, {"modules_to_save": ["norm"]}, norm=True),
        "2d-init-random": _conv(2, {}, {"init_lora_weights": False}),
        "2d-gaussian": _conv(2, {}, {"init_lora_weights": "gaussian"}),
        "2d-lora-bias": _conv(2, {}, {"lora_bias": True, "lora_alpha": 32}),
        "2d-bias-all": _conv(2, {}, {"bias": "all"}),
        "2d-bf16": {**_conv(2, {}, {}), "dtype": torch.bfloat16},
        "2d-fp16-meta": {**_conv(2, {}, dora), "dtype": torch.float16, "device": "meta"},
    }  # fmt: skip
    return [Row(f"conv-{id}", **row) for id, row in rows.items()]


def _convolutions_dora_and_3d() -> list[Row]:
    dora = {"use_dora": True}
    rows = {
        "2d-dora": _conv(2, {}, dora),
        "2d-dora-and-linear": _conv(2, {}, {**dora, "target_modules": ["conv", "lin0"]}),
        "2d-dora-dropout": _conv(2, {"stride": 2, "padding": 1}, {**dora, "lora_dropout": 0.2}),
        "2d-dora-groups": {**_conv(2, {"groups": 2}, dora), "unmergeable": "grouped", "dense": False},
        "2d-dora-without-bias": _conv(2, {"bias": False}, dora),
        "2d-dora-dilation": {
            **_conv(2, {"dilation": 2}, {**dora, "lora_dropout": 0.1}),
            "divergent": ("conv_dilation",), "untraceable": NO_SHAPE,
        },
        "3d": _conv(3, {}, {}),
        "3d-and-linear": _conv(3, {}, {"target_modules": ["conv", "lin0"]}),
        "3d-lora-bias": _conv(3, {}, {"lora_bias": True, "lora_alpha": 32}),
        "3d-dora": _conv(3, {"padding": 1}, dora),
        "3d-dora-and-linear": _conv(3, {}, {**dora, "target_modules": ["conv", "lin0"]}),
        "3d-pointwise": {**_conv(3, {"kernel_size": 1}, {}), "divergent": ("conv3d_merge",)},
        "3d-pointwise-dora": {**_conv(3, {"kernel_size": 1}, dora), "divergent": ("conv3d_merge",)},
        "3d-flat-kernel": {
            **_conv(3, {"kernel_size": (1, 1, 3)}, {}), "divergent": ("conv3d_merge",),
        },
        "3d-kernel-1-3-3": _conv(3, {"kernel_size": (1, 3, 3), "stride": (1, 2, 1)}, {}),
    }  # fmt: skip
    return [Row(f"conv-{id}", **row) for id, row in rows.items()]


def _attention() -> list[Row]:
    seq = _floats(5, 2, 8)
    first = {"batch_first": True}
    upper = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fast = {"divergent": ("encoder_fast_path",)}
    layer = {"make": Encoder, "given": _floats(2, 5, 8), **fast}
    rows = {
        "plain": _heads({}, seq),
        "and-linear": _heads({}, seq, target_modules=["mha", "lin0"]),
        "batch-first": _heads(first, _floats(2, 5, 8), lora_dropout=0.1),
        "causal-mask": _heads({}, lambda: (seq()[0], {"attn_mask": upper})),
        "padding-mask": _heads(
            first, lambda: (_floats(2, 5, 8)()[0], {"key_padding_mask": padded}), use_rslora=True
        ),
        "without-weights": _heads(
            first, lambda: (_floats(2, 5, 8)()[0], {"need_weights": False}), bias="all"
        ),
        "cross": _heads({}, lambda: ((torch.randn(5, 2, 8), torch.randn(4, 2, 8)), {})),
        "without-bias": _heads({"bias": False}, seq, init_lora_weights=False),
        "bf16": {**_heads({}, seq), "dtype": torch.bfloat16},
        "dropout": _heads({"dropout": 0.2}, seq),
        "encoder-layer": {**layer, "settings": {"target_modules": ["linear1", "linear2"]}},
        "encoder-layer-given-in-eval": {
            **layer, "settings": {"target_modules": ["linear1", "linear2"]}, "training": False,
        },
        "encoder-layer-norm-first": {
            **layer, "make": lambda: Encoder(norm_first=True),
            "settings": {"target_modules": ["linear1"], "lora_dropout": 0.1},
        },
        "encoder-layer-all": {
            **layer,
            "settings": {"target_modules": ["self_attn", "linear1", "linear2"]},
            "divergent": ("attention_out_proj_doubled", "encoder_fast_path"),
            "untraceable": NEW_PARAMETERS,
        },
        "encoder-layer-dora": {**layer, "settings": {"target_modules": ["linear1"],
                                                     "use_dora": True}},
    }  # fmt: skip
    return [Row(f"attention-{id}", **row) for id, row in rows.items()]


def _parameters() -> list[Row]:
    stacks = {"target_parameters": ["gate_up_proj", "down_proj"]}
    bf16 = {"dtype": torch.bfloat16}
    rows = {
        "own": {"make": OwnParameters, "given": X, "settings": {"target_parameters": ["lin0.weight"]}},
        "own-and-layer": {
            "make": OwnParameters, "given": X,
            "settings": {"target_parameters": ["lin0.weight"], "target_modules": ["lin1"]},
        },
        "of-a-layer": {
            "make": Mlp, "given": X,
            "settings": {"target_parameters": ["lin1.weight"], "target_modules": ["lin0"]},
        },
        "of-two-layers": {
            "make": Mlp, "given": X,
            "settings": {"target_parameters": ["lin0.weight", "lin1.weight"], "target_modules": []},
        },
        "rslora": {
            "make": OwnParameters, "given": X,
            "settings": {"target_parameters": ["lin0.weight"], "use_rslora": True,
                         "init_lora_weights": False},
        },
        "experts-up": _mixture(target_parameters=["experts.gate_up_proj"]),
        "experts-down": _mixture(target_parameters=["down_proj"], init_lora_weights=False),
        "experts-both": _mixture(**stacks),
        "experts-both-reversed": _mixture(target_parameters=["down_proj", "gate_up_proj"]),
        "experts-transposed": _mixture(True, target_parameters=["gate_up_proj"]),
        "experts-transposed-both": _mixture(True, **stacks, use_rslora=True),
        "experts-and-layers": _mixture(**stacks, target_modules=["lin0", "lin1"]),
        "experts-rank-pattern": _mixture(
            **stacks, rank_pattern={"experts.down_proj": 2}, alpha_pattern={"gate_up_proj": 5}
        ),
        "experts-bf16": {**_mixture(**stacks), **bf16},
        "experts-fp16-meta": {
            **_mixture(**stacks), "dtype": torch.float16, "device": "meta",
        },
        "experts-and-whole-layer": _mixture(**stacks, modules_to_save=["lin1"]),
    }  # fmt: skip
    return [Row(f"parameter-{id}", **row) for id, row in rows.items()]


def _llamas() -> list[Row]:
    qv = {"target_modules": ["q_proj", "v_proj"]}
    causal = {"task_type": "CAUSAL_LM"}
    llama = {"make": _llama, "given": CAUSAL}
    rows: dict[str, dict[str, Any]] = {
        "llama": {**llama, "settings": {**qv, **causal}},
        "llama-all-linear": {**llama, "settings": {"target_modules": "all-linear", **causal,
                                                   "lora_dropout": 0.1}},
        "llama-default-targets": {**llama, "settings": {}},
        "llama-padded": {"make": _llama, "given": _tokens(**MASKED, use_cache=False),
                         "settings": {**qv, "use_rslora": True}},
        "llama-dora": {"make": _llama_two, "given": CAUSAL, "settings": {**qv, **causal, "use_dora": True,
                                             "lora_dropout": 0.1}},
        "llama-one-layer": {"make": _llama_two, "given": CAUSAL, "settings": {**qv, "layers_to_transform": [1]}},
        "llama-pissa": {**llama, "settings": {**qv, "init_lora_weights": "pissa"},
                        "residual": True},
        "llama-embedding-and-head": {
            **llama, "settings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], **causal},
        },
        "llama-whole-embedding-and-head": {
            **llama, "settings": {**qv, "modules_to_save": ["embed_tokens", "lm_head"], **causal},
        },
        "llama-tokens": {**llama, "settings": {**qv, "trainable_token_indices": [1, 5]}},
        "llama-bf16": {**llama, "settings": {**qv, **causal}, "dtype": torch.bfloat16},
        "llama-fp16-meta": {**llama, "settings": {"target_modules": "all-linear"},
                            "dtype": torch.float16, "device": "meta"},
    }  # fmt: skip
    return [Row(f"model-{id}", **row) for id, row in rows.items()]


def _tied_llamas() -> list[Row]:
    qv = {"target_modules": ["q_proj", "v_proj"]}
    causal = {"task_type": "CAUSAL_LM"}
    tied = {"make": _llama_tied, "given": CAUSAL}
    rows: dict[str, dict[str, Any]] = {
        "llama-tied": {**tied, "settings": {**qv, **causal}},
        "llama-tied-embedding": {
            **tied, "settings": {"target_modules": ["embed_tokens"], **causal},
            "divergent": ("tied_merge",), "dense": False,
        },
        "llama-tied-whole-embedding": {
            **tied, "settings": {**qv, "modules_to_save": ["embed_tokens"], **causal},
            "dense": False,
        },
        "llama-tied-whole-head": {
            **tied, "settings": {**qv, "modules_to_save": ["lm_head"], **causal}, "dense": False,
        },
        "llama-tied-tokens-list": {
            **tied, "settings": {**qv, "trainable_token_indices": [1, 5], **causal},
            "dense": False,
        },
        "llama-tied-tokens-dict": {
            **tied, "dense": False,
            "settings": {**qv, "trainable_token_indices": {"embed_tokens": [2, 9, 4]}, **causal},
        },
        "llama-classes": {"make": _llama_classes, "given": CAUSAL,
                          "settings": {**qv, "task_type": "SEQ_CLS"}},
        "llama-classes-without-task": {"make": _llama_classes, "given": CAUSAL,
                                       "settings": {"target_modules": "all-linear"}},
    }  # fmt: skip
    return [Row(f"model-{id}", **row) for id, row in rows.items()]


def _other_transformers() -> list[Row]:
    causal = {"task_type": "CAUSAL_LM"}
    rows: dict[str, dict[str, Any]] = {
        "gpt2-default-targets": {"make": _gpt2, "given": CAUSAL, "settings": causal},
        "gpt2-all-linear-dora": {
            "make": _gpt2, "given": CAUSAL,
            "settings": {"target_modules": "all-linear", "use_dora": True, **causal},
        },
        "gpt2-fan-in-fan-out": {
            "make": _gpt2, "given": CAUSAL,
            "settings": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True,
                         "lora_dropout": 0.1, **causal},
        },
        "bert": {"make": _bert, "given": PADDED,
                 "settings": {"target_modules": ["query", "value"]}},
        "bert-all-linear": {"make": _bert, "given": TOKENS,
                            "settings": {"target_modules": "all-linear", "bias": "all"}},
        "bert-embeddings": {
            "make": _bert, "given": TOKENS,
            "settings": {"target_modules": ["word_embeddings", "position_embeddings", "key"]},
        },
        "bert-classes": {"make": _bert_classes, "given": PADDED,
                         "settings": {"target_modules": ["query"], "task_type": "SEQ_CLS"}},
        "bert-classes-all-linear": {
            "make": _bert_classes, "given": TOKENS,
            "settings": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        },
        "bert-token-classes": {"make": _bert_tokens, "given": TOKENS,
                               "settings": {"target_modules": ["value"], "task_type": "TOKEN_CLS"}},
        "bert-answers": {"make": _bert_answers, "given": TOKENS,
                         "settings": {"target_modules": ["value"], "task_type": "QUESTION_ANS"}},
        "bert-features": {"make": _bert, "given": TOKENS,
                          "settings": {"target_modules": ["query"],
                                       "task_type": "FEATURE_EXTRACTION", "lora_dropout": 0.1}},
    }  # fmt: skip
    return [Row(f"model-{id}", **row) for id, row in rows.items()]


def _mixtures_and_others() -> list[Row]:
    qv = {"target_modules": ["q_proj", "v_proj"]}
    moe = {"target_parameters": ["gate_up_proj", "down_proj"]}
    rows: dict[str, dict[str, Any]] = {
        "gemma-scaled-embedding": {
            "make": _gemma, "given": CAUSAL,
            "settings": {"target_modules": ["embed_tokens", "q_proj"]},
            "divergent": ("tied_merge",), "dense": False,
        },
        "gemma-tokens": {
            "make": _gemma, "given": CAUSAL, "dense": False,
            "settings": {**qv, "trainable_token_indices": [3, 8]},
        },
        "mixtral-parameters": {"make": _mixtral, "given": CAUSAL,
                               "settings": {**moe, "target_modules": ["q_proj"]}},
        "qwen3-moe": {"make": _qwen3_moe, "given": CAUSAL, "settings": qv},
        "qwen3-moe-parameters": {"make": _qwen3_moe, "given": CAUSAL, "settings": {**moe, **qv}},
        "qwen3-moe-converted": {
            "make": _qwen3_moe, "given": CAUSAL,
            "settings": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        },
        "qwen3-moe-meta": {"make": _qwen3_moe, "given": CAUSAL, "settings": {**moe, **qv},
                           "dtype": torch.bfloat16, "device": "meta"},
        "gpt-oss-parameters": {"make": _gpt_oss, "given": CAUSAL, "settings": {**moe, **qv}},
        "t5": {"make": _t5, "given": _pairs,
               "settings": {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM",
                            "lora_dropout": 0.1}},
        "t5-all-linear-dora": {
            "make": _t5, "given": _pairs,
            "settings": {"target_modules": "all-linear", "use_dora": True},
        },
        "vit": {"make": _vit, "given": _pixels,
                "settings": {"target_modules": ["q_proj", "v_proj"],
                             "modules_to_save": ["classifier"]}},
        "vit-convolution": {"make": _vit, "given": _pixels,
                            "settings": {"target_modules": ["projection"]}},
        "whisper": {"make": _whisper, "given": _sound, "settings": qv},
        "whisper-all-linear": {"make": _whisper, "given": _sound,
                               "settings": {"target_modules": "all-linear", "lora_dropout": 0.1}},
    }  # fmt: skip
    return [Row(f"model-{id}", **row) for id, row in rows.items()]


def _refusals() -> list[Row]:
    """Rows we refuse by name; most of them PEFT refuses too, with half of the model wrapped."""

    def mlp(id: str, settings: dict[str, Any], refused: str, **more: Any) -> Row:
        return Row(id, more.pop("make", Mlp), X, settings, refused=refused, **more)

    ours_only = {"peft_takes": True}
    bd = BdLoraConfig(target_modules_bd_a=["nothing"], nblocks=2)
    return [
        mlp("velora", {**ONE, "velora_config": VeloraConfig(num_groups=2)}, "velora", **ours_only),
        mlp("montecarlo", {**ONE, "monteclora_config": MontecloraConfig(num_samples=2)},
            "monteclora", **ours_only),
        Row("activated", _llama, CAUSAL, {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
                                          "alora_invocation_tokens": [1]},
            refused="alora_invocation_tokens", **ours_only),
        mlp("arrow", {**ONE, "arrow_config": ArrowConfig()}, "arrow_config"),
        mlp("quantised-activations", {**ONE, "use_qalora": True}, "use_qalora", **ours_only),
        mlp("init-eva", {**ONE, "init_lora_weights": "eva", "eva_config": EvaConfig()}, "eva",
            **ours_only),
        mlp("init-corda", {**ONE, "init_lora_weights": "corda"}, "corda"),
        mlp("init-lora-ga", {**ONE, "init_lora_weights": "lora_ga"}, "lora_ga", **ours_only),
        mlp("init-loftq", {**ONE, "init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
            "loftq"),
        mlp("layer-replication", {**ONE, "layer_replication": [(0, 1), (0, 1)]},
            "layer_replication"),
        mlp("weight-tying", {**ONE, "modules_to_save": ["lin1"], "ensure_weight_tying": True},
            "ensure_weight_tying", **ours_only),
        mlp("no-match", {"target_modules": ["lin2"]}, "lin2.*Did you mean"),
        mlp("rank-0", {**ONE, "r": 0}, "r=0"),
        mlp("rank-0-in-a-pattern", {**ONE, "rank_pattern": {"lin0": 0}}, "rank_pattern"),
        mlp("dropout-above-1", {**ONE, "lora_dropout": 1.5}, "lora_dropout"),
        mlp("unknown-init", {**ONE, "init_lora_weights": "pisa"}, "pisa.*Did you mean"),
        mlp("bad-bias", {**ONE, "bias": "some"}, "bias='some'"),
        mlp("orthogonal-odd-rank", {**ONE, "r": 3, "init_lora_weights": "orthogonal"}, "even"),
        mlp("kasa-rank-too-high", {**ONE, "r": 6, "kasa_config": KasaConfig()}, "r=6"),
        mlp("two-variants", {**ONE, "use_dora": True, "kasa_config": KasaConfig()}, "dora and kasa"),
        mlp("mica-and-dora", {**ONE, "use_dora": True, "init_lora_weights": "mica"}, "dora and .*mica"),
        mlp("block-diagonal-strict", {**ONE, "use_bdlora": bd}, "use_bdlora"),
        mlp("block-diagonal-indivisible",
            {**ONE, "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], nblocks=4)}, "nblocks|block"),
        mlp("parameter-lora-bias", {"target_parameters": ["lin0.weight"], "lora_bias": True},
            "lora_bias", make=OwnParameters),
        mlp("layer-adapted-and-whole", {"target_modules": ["old_lin1"], "modules_to_save": ["lin1"]},
            "modules_to_save", make=Prefixed),
        mlp("tokens-of-nothing", {**ONE, "trainable_token_indices": {"emb": [1]}}, "emb"),
        mlp("parameter-with-dropout", {"target_parameters": ["lin0.weight"], "lora_dropout": 0.1},
            "lora_dropout", make=OwnParameters),
        mlp("parameter-dora", {"target_parameters": ["lin0.weight"], "use_dora": True}, "dora",
            make=OwnParameters),
        mlp("parameter-of-one-dimension", {"target_parameters": ["lin1.bias"]}, "1 dimensions",
            make=OwnParameters),
        mlp("parameter-of-an-adapted-layer", {**ONE, "target_parameters": ["lin0.weight"]},
            "target_parameters"),
        mlp("layers-without-index", {**ONE, "layers_to_transform": [0], "target_modules": ["lin"]},
            "lin"),
    ]  # fmt: skip


def _refused_layers() -> list[Row]:
    heads = {"make": Heads, "given": _floats(5, 2, 8)}
    kdim = {
        "make": lambda: Heads(kdim=6, vdim=6),
        "given": lambda: ((torch.randn(5, 2, 8), torch.randn(5, 2, 6)), {}),
    }
    texts = {
        "kasa-conv1d": (_text({"target_modules": ["conv1d"], "r": 2, "kasa_config": KasaConfig()}),
                        "kasa"),
        "kasa-embedding": (_text({"target_modules": ["emb"], "kasa_config": KasaConfig()}), "kasa"),
        "lora-bias-embedding": (_text({"target_modules": ["emb"], "lora_bias": True}), "lora_bias"),
        "tokens-and-whole": (
            _text({"target_modules": ["conv1d"], "modules_to_save": ["emb"],
                   "trainable_token_indices": {"emb": [1]}}), "trainable_token_indices"),
        "norm-targeted": (_conv(2, {}, {"target_modules": ["norm"]}, norm=True), "norm"),
        "groups-and-rank": (_conv(2, {"groups": 4, "out_channels": 8}, {"r": 6}), "groups"),
        "attention-dora": ({**heads, "settings": {"target_modules": ["mha"], "use_dora": True}},
                           "dora"),
        "attention-other-widths": ({**kdim, "settings": {"target_modules": ["mha"]}},
                                   "dim|width|embed"),
        "top-level-parameter": (
            {"make": Bare, "given": X, "settings": {"target_parameters": ["weight"]}}, "weight"),
    }  # fmt: skip
    return [Row(id, **row, refused=refused) for id, (row, refused) in texts.items()]


ROWS: list[Row] = [
    *_linear(),
    *_initialised(),
    *_variants(),
    *_other_linear(),
    *_selection(),
    *_texts(),
    *_embeddings(),
    *_rows_and_ties(),
    *_convolutions(),
    *_convolutions_dora_and_3d(),
    *_attention(),
    *_parameters(),
    *_llamas(),
    *_tied_llamas(),
    *_other_transformers(),
    *_mixtures_and_others(),
]
if Version(peft.__version__) < Version("0.21.2"):
    # PEFT's sequence-to-sequence class then calls what transformers 5.23 no longer has.
    ROWS = [r for r in ROWS if r.id != "model-t5"]
REFUSED: list[Row] = [*_refusals(), *_refused_layers()]
if importlib.util.find_spec("scipy") is None:
    # PEFT asks for it when the configuration is made, before there is anything to refuse.
    REFUSED = [r for r in REFUSED if r.id != "init-loftq"]
