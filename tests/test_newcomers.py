"""What people met who tried fxlora on models of their own; each was wrong once."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import fxlora_viz
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fxlora
from fxlora.cli import main
from fxlora.errors import ConfigError, ModelSpecError, TraceError, UnsupportedError
from fxlora.models import with_inputs

IDS = torch.arange(14).view(2, 7)


def olmo2(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=100, attn_implementation="eager", **settings,
    )  # fmt: skip
    return transformers.Olmo2ForCausalLM(config).eval()


def segformer() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[8, 16], sr_ratios=[2, 1],
        num_attention_heads=[1, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config).eval()


def filled(lora: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for name, p in lora.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn_like(p) * 0.1)
    return lora


# ---- the model that was given --------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("step", ["trace", "compare"])
def test_hooks_a_forward_puts_on_the_model_do_not_stay(asked: str, step: str) -> None:
    model = olmo2()
    kwargs = {"input_ids": IDS, "use_cache": False, asked: True}
    if step == "trace":
        graph = fxlora.trace(model, (), kwargs)
        assert (
            len(graph(**kwargs)[{"output_hidden_states": "hidden_states"}.get(asked, "attentions")])
            > 1
        )
    else:
        found = fxlora.compare(model, LoraConfig(target_modules=["q_proj"]), (), kwargs)
        assert found.equal, found.differences
        assert len(found.outputs) > 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    out = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert (len(out.hidden_states), len(out.attentions)) == (3, 2)


def test_a_model_that_always_hooks_itself_runs_after_a_trace_and_equals_peft() -> None:
    model, pixels = segformer(), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(model)(pixel_values=pixels).logits
    found = fxlora.compare(
        model, LoraConfig(target_modules=["q_proj"]), (), {"pixel_values": pixels}
    )
    assert found.equal, found.differences
    assert torch.equal(model(pixel_values=pixels).logits, before)


def test_attention_that_is_not_adapted_is_compared_on_one_path_and_a_note_says_so() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
            self.fc = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.attn(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    given = (torch.randn(2, 5, 16),)
    found = fxlora.compare(Attends().eval(), LoraConfig(target_modules=["fc"]), given)
    assert found.equal, found.differences
    assert any("torch.backends.mha" in n for n in found.notes)
    assert torch.backends.mha.get_fastpath_enabled()
    assert next(s for s in found.plan if s.name == "attn").site.calls[1:] == ()  # once, not twice

    class Again(Attends):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.attn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.again(x, x, x, need_weights=False)[0])

    plan = fxlora.plan(fxlora.trace(Again(), given), LoraConfig(target_modules=["fc"]))
    assert len(next(s for s in plan if s.name == "attn").site.calls) == 1


# ---- parameters ----------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bil, self.lstm = nn.Linear(8, 8), nn.Bilinear(8, 8, 8), nn.LSTM(8, 8)
        self.norm = nn.LayerNorm((5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.norm(self.lstm(h + self.bil(h, h))[0])


@pytest.mark.parametrize("name", ["bil.weight", "lstm.weight_ih_l0", "norm.weight"])
@pytest.mark.parametrize("read_too", [False, True])
def test_a_parameter_of_a_module_that_is_one_call_is_refused_and_not_dropped(
    name: str, read_too: bool
) -> None:
    class Reads(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x @ self.lstm.weight_ih_l0[:8]

    config = LoraConfig(r=2, target_modules=["a"], target_parameters=[name])
    traced = fxlora.trace(Reads() if read_too else Small(), (torch.randn(3, 5, 8),))
    with pytest.raises(UnsupportedError, match=f"'{name}'.*computes as a whole"):
        fxlora.plan(traced, config)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class Past(nn.Module):
    """Reads a parameter in its module's call, past it, or both."""

    def __init__(self, *where: str) -> None:
        super().__init__()
        self.where, self.a, self.inner = where, nn.Linear(8, 8), Inner()
        if "tied" in where:
            self.other = Inner()
            self.other.w = self.inner.w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if "inside" in self.where:
            y = self.inner(y)
        return y + x @ self.inner.w if "past" in self.where else y


@pytest.mark.parametrize(
    "where",
    [("inside",), ("past",), ("inside", "past"), ("inside", "tied"), ("inside", "past", "tied")],
)
def test_a_merge_changes_a_parameter_only_where_the_adapter_was(where: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = Past(*where), torch.randn(3, 8)
    config = LoraConfig(r=2, target_modules=["a"], target_parameters=["inner.w"])
    lora = filled(fxlora.rewrite(fxlora.trace(model, (x,)), config))
    assert not torch.allclose(lora(x), model(x), atol=1e-3)
    torch.testing.assert_close(fxlora.merge(lora)(x), lora(x), atol=1e-5, rtol=1e-5)
    said = [
        w
        for w in fxlora.plan(fxlora.trace(model, (x,)), config).warnings
        if "fails when it runs" in w
    ]
    assert bool(said) == ("past" in where)
    if "past" in where:
        with pytest.raises(AttributeError):
            get_peft_model(copy.deepcopy(model), config)(x)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_biases_tied_under_two_names_go_to_peft_and_come_from_it(name: str, tmp_path: Path) -> None:
    settings = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=64, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForMaskedLM")(settings).eval()
    kwargs = {"input_ids": IDS + 3}
    config = LoraConfig(r=2, target_modules=["query", "value"], bias="all")
    theirs = filled(get_peft_model(copy.deepcopy(model), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    traced = fxlora.trace(model, (), kwargs)
    ours = fxlora.load_adapter(traced, tmp_path / "theirs").eval()
    assert torch.equal(ours(**kwargs).logits, theirs(**kwargs).logits)
    fxlora.save_adapter(ours, tmp_path / "ours")
    files = [tmp_path / who / "adapter_model.safetensors" for who in ("ours", "theirs")]
    from safetensors.torch import load_file

    mine, other = map(load_file, files)
    assert mine.keys() == other.keys()
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert torch.equal(again(**kwargs).logits, theirs(**kwargs).logits)


# ---- pictures and words --------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.alias = self.shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alias(torch.relu(self.shared(x)))


def test_a_layer_called_by_its_second_name_is_drawn_without_the_adapter_of_the_first() -> None:
    traced = fxlora.trace(Twice(), (torch.randn(2, 16),))
    lora = fxlora.rewrite(traced, LoraConfig(target_modules=["shared"]))
    nodes = dict(fxlora_viz.draw(lora).graph.nodes(data=True))
    alias = next(d for d in nodes.values() if d["title"] == "alias")
    assert (alias["state"], alias["params"]) == ("frozen", 16 * 16 + 16)
    assert "lora_" not in alias["tooltip"]


def test_another_name_of_a_module_as_a_target_is_told_the_first() -> None:
    traced = fxlora.trace(Twice(), (torch.randn(2, 16),))
    for asked in (["alias"], ["aaa", "alias"]):
        with pytest.raises(
            ConfigError, match=r"'alias' is another name of 'shared'.*write 'shared'"
        ):
            fxlora.plan(traced, LoraConfig(target_modules=asked))


def test_layers_that_are_not_there_are_answered_with_those_that_are() -> None:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[99])
    with pytest.raises(ConfigError, match=r"layers 0-1\.") as e:
        fxlora.plan(fxlora.trace(olmo2()), config)
    assert "Did you mean" not in str(e.value)


def test_grouped_convolutions_that_refuse_a_rank_are_named_all_at_once() -> None:
    traced = fxlora.trace(segformer())
    settings = {"r": 6, "target_modules": r".*\.dwconv\.dwconv"}
    with pytest.raises(ConfigError, match=r"does not divide r=6, and 1 more") as e:
        fxlora.plan(traced, LoraConfig(**settings))
    ranks = ast.literal_eval(str(e.value).partition("rank_pattern=")[2])
    assert len(fxlora.plan(traced, LoraConfig(**settings, rank_pattern=ranks)).adapted) == 2


def test_rows_of_stages_leave_open_what_varies_in_them_only() -> None:
    text = str(fxlora.plan(fxlora.trace(segformer()), LoraConfig(target_modules=["q_proj"])))
    names = [line.split()[0] for line in text.splitlines() if "q_proj " in line]
    assert len(names) == len(set(names)) == 2


def test_a_run_that_failed_is_not_called_a_run_without_weights() -> None:
    x = torch.randn(3, 8)
    config = LoraConfig(r=2, target_modules=["a"], target_parameters=["inner.w"])
    text = str(fxlora.compare(Past("past"), config, (x,)))
    assert "not run: it failed" in text
    assert "not run: run=False" in str(
        fxlora.compare(olmo2(), LoraConfig(target_modules=["q_proj"]), run=False)
    )


def test_a_model_of_text_and_sound_gets_both() -> None:
    with torch.device("meta"):
        model = transformers.ClapModel(transformers.ClapConfig()).eval()
    assert fxlora.plan(fxlora.trace(model), LoraConfig(target_modules=["query"])).adapted


def test_operations_of_a_helper_have_its_name_and_not_that_of_one_it_calls() -> None:
    with torch.device("meta"):
        settings = transformers.DebertaV2Config(
            num_hidden_layers=2, relative_attention=True, pos_att_type=["c2p", "p2c"]
        )
        model = transformers.DebertaV2ForQuestionAnswering(settings).eval()
    nodes = fxlora_viz.draw(fxlora.trace(model)).graph.nodes(data=True)
    titles = {d["title"] for _, d in nodes}
    assert "disentangled_attention_bias" in titles
    assert "scaled_size_sqrt" not in titles


SIZES = """
import sys, torch, transformers, fxlora
small = dict(hidden_size=32, num_hidden_layers=1, state_size=8, vocab_size=50)
models = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**small)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**small, num_heads=4, head_dim=16, n_groups=1)
    ),
}
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = models[name]().eval()
    graph = fxlora.trace(model).graph
shapes = {str(d) for n in graph.nodes for d in n.meta.get("shape") or ()}
print(sorted(d for d in shapes if "256" in d))
"""


@pytest.mark.slow
def test_the_text_of_a_size_does_not_follow_from_what_was_traced_before() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SIZES, *before, "mamba2"],
            check=True, capture_output=True, text=True,
        ).stdout
        for before in ([], ["mamba"])
    ]  # fmt: skip
    assert said[0] == said[1]
    assert said[0].count("//") > 3


# ---- the command line ----------------------------------------------------------------------------

BRANCHES = """
import torch
from torch import nn

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y, which="left"):
        return (self.left if which == "left" else self.right)(x) + y.mean()

def both():
    return Branches(), (torch.randn(2, 8),), {"y": torch.randn(3), "which": "right"}

def ordered():
    from collections import OrderedDict
    return Branches(), OrderedDict(x=torch.randn(2, 8), y=torch.randn(3), which="right")

def wrong():
    return Branches(), torch.randn(2, 8)
"""


def test_a_callable_may_give_example_inputs_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "branches_given.py").write_text(BRANCHES)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "branches_given:both", "-t", "right"]) == 0
    assert "1 of 2 linear sites adapted at 1 call" in capsys.readouterr().out
    assert main(["compare", "branches_given:both", "-t", "right"]) == 0
    assert main(["memory", "branches_given:both", "-t", "right", "--dtype", "bfloat16"]) == 0
    assert main(["plan", "branches_given:ordered", "-t", "right"]) == 0
    with pytest.raises(ModelSpecError, match=r"a model and \(Tensor\); example inputs are"):
        with_inputs("branches_given:wrong")


def test_the_class_to_build_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "clip", "--architecture", "CLIPModel", "-t", "q_proj"]) == 0
    assert capsys.readouterr().out.startswith("CLIPModel:")
    assert main(["plan", "gpt2", "--architecture", "GPT2DoubleHeadsModel", "-t", "c_attn"]) == 0
    assert main(["plan", "clip", "--architecture", "CLIPModl", "-t", "q_proj"]) == 2
    assert "Did you mean 'CLIPModel'?" in capsys.readouterr().err
    assert main(["plan", "clip", "--architecture", "LlamaModel", "-t", "q_proj"]) == 2
    assert "no class of a clip model" in capsys.readouterr().err


# ---- a model that peft wrapped meanwhile -------------------------------------------------------


@pytest.mark.parametrize("first", ["embedding", "linear"])
def test_a_model_that_peft_changed_after_the_trace_is_named(first: str) -> None:
    layer, x = (
        (nn.Embedding(16, 8), torch.zeros(2, dtype=torch.long))
        if first == "embedding"
        else (nn.Linear(16, 8), torch.randn(2, 16))
    )
    model = nn.Sequential(layer, nn.Linear(8, 8))
    traced = fxlora.trace(model, (x,))
    config = LoraConfig(r=2, target_modules=["0", "1"])
    get_peft_model(model, config)
    with pytest.raises(TraceError, match=r"'0' was .* is now peft\..*copy\.deepcopy"):
        fxlora.plan(traced, config)


def test_compare_says_that_it_takes_the_model_and_not_its_graph() -> None:
    traced = fxlora.trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TraceError, match=r"fxlora\.compare\(model, config\)"):
        fxlora.compare(traced, LoraConfig(target_modules=["0"]))
