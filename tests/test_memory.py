"""What a training step holds: what autograd really saves, in peft's model and in ours, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import ZOO

import fxlora
from fxlora.errors import ConfigError
from fxlora.memory import memory, sweep_text
from fxlora.trace.arguments import tensors_inside
from fxlora.trace.recorder import Recorder

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        vocab_size=100, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def really_saved(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """Returns the bytes autograd saves when a model really runs: storages once, no parameters."""
    model.train()
    there = [*model.parameters(), *model.buffers(), *kwargs.values()]
    seen = {t.untyped_storage().data_ptr() for t in there if isinstance(t, torch.Tensor)}
    kept: list[torch.Tensor] = []
    total = 0

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal total
        kept.append(t)
        key = t.untyped_storage().data_ptr()
        if key not in seen:
            seen.add(key)
            total += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(**kwargs)
    del out
    return total


CONFIGS: dict[str, dict[str, Any]] = {
    "q": {"r": 4, "target_modules": ["q_proj"]},
    "all": {"r": 8, "target_modules": ALL},
    "dropout": {"r": 8, "target_modules": ALL, "lora_dropout": 0.05},
    "last layer": {"r": 8, "target_modules": ALL, "layers_to_transform": [2]},
    "bias": {"r": 8, "target_modules": ["v_proj"], "bias": "all"},
    "dora": {"r": 8, "target_modules": ["q_proj"], "use_dora": True},
    "head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_is_what_autograd_saves_in_pefts_model(name: str, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    kwargs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    traced = fxlora.trace(model, (), kwargs)
    found = memory(fxlora.rewrite(traced, LoraConfig(**CONFIGS[name])), (), kwargs)
    theirs = get_peft_model(llama().to(dtype), LoraConfig(**CONFIGS[name])).base_model.model
    assert found.saved == really_saved(theirs, kwargs)
    trains = [p for p in theirs.parameters() if p.requires_grad]
    assert found.trains == sum(p.numel() for p in trains)
    assert found.gradients == sum(p.numel() * p.element_size() for p in trains)
    assert found.optimizer == 8 * found.trains


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "qwen3_moe"])
def test_saved_is_what_autograd_saves_when_the_graph_runs(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs(2, 8)
    traced = fxlora.trace(entry.build(), (), inputs)
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules="all-linear"))
    found = memory(lora, (), inputs)
    assert found.saved == really_saved(lora, inputs)
    assert 0 < found.saved_by_lora < found.saved


def test_full_fine_tuning_is_the_traced_graph() -> None:
    kwargs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    model = llama()
    found = memory(fxlora.trace(model, (), kwargs), (), kwargs)
    assert found.saved == really_saved(model, kwargs)
    assert (found.adapters, found.saved_by_lora) == (0, 0)
    assert found.trains == sum(p.numel() for p in model.parameters())


def test_weights_on_the_meta_device_and_other_sizes() -> None:
    kwargs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    with torch.device("meta"):
        empty = llama()
    config = LoraConfig(**CONFIGS["all"])
    lora = fxlora.rewrite(
        fxlora.trace(empty.to(torch.bfloat16), (), {k: v.to("meta") if torch.is_tensor(v) else v for k, v in kwargs.items()}),
        config,
    )  # fmt: skip
    longer = {"input_ids": torch.randint(0, 99, (1, 40)), "use_cache": False}
    real = fxlora.rewrite(fxlora.trace(llama().to(torch.bfloat16), (), kwargs), config)
    found = memory(lora, (), longer)
    assert found.saved == really_saved(real, longer)
    assert found.weights == sum(
        p.numel() * 2 for n, p in real.named_parameters() if "lora_" not in n
    ) + sum(b.numel() * 2 for b in real.buffers() if b.is_floating_point())


def test_nothing_given_is_changed() -> None:
    kwargs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    lora = fxlora.rewrite(fxlora.trace(llama().eval(), (), kwargs), LoraConfig(**CONFIGS["all"]))
    before = [(n, id(p), p.dtype, p.requires_grad) for n, p in lora.named_parameters()]
    code, training = lora.code, [m.training for m in lora.modules()]
    memory(lora, (), kwargs)
    assert before == [(n, id(p), p.dtype, p.requires_grad) for n, p in lora.named_parameters()]
    assert (code, training) == (lora.code, [m.training for m in lora.modules()])


def test_it_prints_alone_and_as_a_sweep() -> None:
    kwargs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    traced = fxlora.trace(llama(), (), kwargs)
    each = [
        memory(fxlora.rewrite(traced, LoraConfig(r=r, target_modules=["q_proj"])), (), kwargs,
               label=f"q r={r}", optimizer="sgd")
        for r in (2, 4)
    ]  # fmt: skip
    assert "saved for backward" in str(each[0])
    assert "input_ids [2, 24]" in str(each[0])
    text = sweep_text(each)
    assert [line.split("  ")[0] for line in text.splitlines()[4:]] == ["q r=2", "q r=4"]
    assert each[0].optimizer == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, r"optimizer='adam' is none of .* Did you mean 'adamw'"),
    ],
)
def test_an_unknown_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    traced = fxlora.trace(nn.Sequential(nn.Linear(2, 2)), (torch.randn(1, 2),))
    with pytest.raises(ConfigError, match=message):
        memory(traced, (torch.randn(1, 2),), **settings)


def test_a_missing_input_is_named() -> None:
    kwargs = {"input_ids": torch.randint(0, 99, (2, 24)), "use_cache": False}
    traced = fxlora.trace(llama(), (), kwargs)
    with pytest.raises(ConfigError, match="no input 'input_ids' was given"):
        memory(traced, (), {"use_cache": False})


class Batch(NamedTuple):
    x: torch.Tensor
    more: Any


@dataclass
class Fields:
    x: torch.Tensor
    more: Any


@pytest.mark.parametrize(
    "nest",
    [
        lambda x, y: (x, y),
        lambda x, y: {"x": x, "more": [y]},
        Batch,
        lambda x, y: Batch(x, {"y": (y, 3)}),
        Fields,
    ],
    ids=["tuple", "dict", "named", "named and nested", "dataclass"],
)
def test_inputs_inside_of_others_are_no_more_saved_than_inputs(nest: Any) -> None:
    def flat(value: Any) -> list[torch.Tensor]:
        return list(tensors_inside([value]))

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, given: Any) -> torch.Tensor:
            x, y = flat(given)
            return self.a(x) * y

    given = nest(torch.randn(4, 8), torch.randn(4, 8))
    lora = fxlora.rewrite(fxlora.trace(Takes(), (given,)), LoraConfig(r=2, target_modules=["a"]))
    found = memory(lora, (given,))
    assert found.saved == 4 * 2 * 4  # A x alone
    assert all(type(t) is torch.Tensor for t in flat(given))


def test_a_model_with_a_function_of_its_own_is_measured() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)
    model = transformers.BloomForCausalLM(config)
    kwargs = {"input_ids": torch.randint(3, 90, (2, 8)), "use_cache": False}
    lora = fxlora.rewrite(
        fxlora.trace(model, (), kwargs), LoraConfig(r=2, target_modules="all-linear")
    )
    assert memory(lora, (), kwargs).saved == really_saved(lora, kwargs)


def test_a_graph_that_runs_adds_nothing_to_what_was_traced() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    class Has(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Twice.apply(x) + Twice.apply(-x) * 3

    x = torch.randn(2)
    traced = fxlora.trace(Has(), (x,))
    first, second = (n.target for n in traced.graph.nodes if n.name.startswith("apply"))
    assert first is second
    with mock.patch.object(Recorder, "run", side_effect=AssertionError("it is recorded again")):
        assert torch.equal(traced(x), Has()(x))
