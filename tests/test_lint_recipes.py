"""No false alarm: the standard recipes on the most used architectures, and the true alarms by name."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from lint_recipes import ARCHITECTURES, RECIPES, targets, traced
from peft import LoraConfig
from torch.fx import GraphModule

from fxlora.lint import Report, Settings, lint
from fxlora.lint.context import Options

# (architecture, recipe) -> rule -> why the alarm is true.
TRUE = {
    ("qwen3_moe", "all-linear"): {"FXL106": "PEFT translates `gate` to the router's gate.weight"},
    ("mixtral", "all-linear"): {
        "FXL106": "PEFT translates `gate` to the router's gate.weight",
        "FXL301": "the router has 8 outputs, fewer than the rank",
    },
    ("deepseek_v3", "all-linear"): {
        "FXL106": "PEFT translates `gate` to the router's gate.weight",
        "FXL112": "the dense and the shared MLPs have the experts' names and are passed over "
        "(huggingface/peft#3711)",
    },
}


@lru_cache(maxsize=2)
def graph(name: str) -> GraphModule:
    return traced(name)


def report(name: str, recipe: str) -> Report:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets(name, recipe))
    return lint(graph(name), config)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_standard_recipe_raises_no_false_alarm(name: str, recipe: str) -> None:
    found = report(name, recipe)
    assert {f.rule for f in found} == set(TRUE.get((name, recipe), {})), str(found)


def test_the_architectures_are_at_least_twenty() -> None:
    assert len(ARCHITECTURES) >= 20
    assert set(TRUE) <= {(n, r) for n in ARCHITECTURES for r in RECIPES}


def test_the_recipes_adapt_what_they_name() -> None:
    """A recipe that matches nothing would raise no alarm either."""
    for name, recipe in (("llama", "q/v"), ("bert", "attention"), ("t5", "q/v")):
        plan_of = report(name, recipe)
        assert not any(f.rule == "FXL100" for f in plan_of)
        config = LoraConfig(r=16, target_modules=targets(name, recipe))
        import fxlora

        names = {s.name for s in fxlora.plan(graph(name), config).adapted}
        assert all(any(n.endswith(f".{t}") for n in names) for t in targets(name, recipe))


def test_a_two_label_classifier_under_all_linear_is_a_true_alarm() -> None:
    found = lint(
        traced("vit", num_labels=2), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    assert [(f.rule, f.where) for f in found] == [("FXL301", "classifier")]


@pytest.mark.filterwarnings("ignore")
def test_mamba_and_llava_alarm_where_they_should() -> None:
    import transformers
    from sweep import build

    import fxlora
    from fxlora.example_inputs import for_model

    def rules(cls: str, names: object) -> set[tuple[str, str]]:
        kind = getattr(transformers, cls)
        model = build(kind.config_class, kind)
        made = fxlora.trace(model, *for_model(model, (), None))
        found = lint(made, LoraConfig(r=4, target_modules=names))  # type: ignore[arg-type]
        return {(f.rule, f.where) for f in found}

    assert rules("MambaForCausalLM", "all-linear") == {
        ("FXL113", "target_modules"), ("FXL201", "backbone.layers.*.mixer.dt_proj"),
    }  # fmt: skip
    assert rules("MambaForCausalLM", ["in_proj", "x_proj"]) == set()
    towers = rules("LlavaForConditionalGeneration", ["q_proj", "v_proj"])
    assert {r for r, _ in towers} == {"FXL107"}
    assert all(".vision_tower." in where for _, where in towers)
    assert rules("LlavaForConditionalGeneration", r".*language_model.*\.q_proj") == set()


def test_a_tower_that_is_entered_is_told_by_its_pixels() -> None:
    import transformers

    import fxlora

    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 99,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=98, image_seq_length=4
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(0, 90, (2, 12))
    ids[:, 2:6] = 98
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "use_cache": False}
    made = fxlora.trace(model, (), inputs)
    found = lint(made, LoraConfig(r=4, target_modules=["q_proj", "linear_1"]))
    tower = "model.vision_tower.encoder.layers"
    assert {(f.rule, f.where, len(f.sites)) for f in found} == {
        ("FXL107", f"{tower}.*.self_attn.q_proj", 3),
        # LLaVA reads the features of the last layer but one.
        ("FXL205", f"{tower}.2.self_attn.q_proj", 1),
    }


def test_a_tied_head_an_engine_and_a_checkpoint_on_real_models() -> None:
    told = Settings(options=Options(serve="vllm", gradient_checkpointing="reentrant"))
    found = lint(graph("gpt2"), LoraConfig(r=4, target_modules=["c_attn", "lm_head"]), told)
    assert {(f.rule, f.where) for f in found} == {
        ("FXL501", "lm_head"), ("FXL601", "lm_head"), ("FXL602", "transformer.h.*.attn.c_attn"),
        ("FXL407", "transformer.h.*.attn.c_attn"),
    }  # fmt: skip
