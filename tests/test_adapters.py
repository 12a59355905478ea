"""Derived graphs follow the graph they come from: its base tensors, flags, modes and hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fxlora
from fxlora import adapters
from fxlora.errors import AdapterError
from fxlora.facts import info

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.lin0(x)))
        out: torch.Tensor = self.head(torch.relu(self.lin1(x)))
        return out


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["lin0"], **settings})


def traced() -> torch.fx.GraphModule:
    return fxlora.trace(Mlp(), (X,))


def peft_directory(folder: Path, **settings: Any) -> torch.Tensor:
    """Saves an adapter of peft's with everything moved; returns what it computes."""
    model = get_peft_model(Mlp(), config(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
        model.save_pretrained(folder)
        out: torch.Tensor = model(X)
    return out


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_base_tensors_of_a_file_are_in_every_derived_graph(tmp_path: Path, bias: str) -> None:
    expected = peft_directory(tmp_path, bias=bias)
    lora = fxlora.load_adapter(traced(), tmp_path).eval()
    again = adapters.add(lora, config(target_modules=["lin1"]), "other")
    derived = [
        lora,
        adapters.set_active(lora, "default"),
        adapters.enable(adapters.disable(lora)),
        again,
        adapters.delete(again, "other"),
    ]
    with torch.no_grad():
        for graph in derived:
            assert torch.equal(graph(X), expected)
        torch.testing.assert_close(fxlora.merge(lora)(X), expected)
        fxlora.save_adapter(adapters.set_active(lora, "default"), tmp_path / "again")
        back = fxlora.load_adapter(traced(), tmp_path / "again").eval()
        assert torch.equal(back(X), expected)


def test_a_moved_graph_stays_where_it_was_moved() -> None:
    lora = fxlora.rewrite(traced(), config(init_lora_weights=False)).double().eval()
    with torch.no_grad():
        expected = lora(X.double())
        assert torch.equal(adapters.set_active(lora, "default")(X.double()), expected)
        torch.testing.assert_close(fxlora.merge(lora)(X.double()), expected)
    pissa = fxlora.rewrite(traced(), config(init_lora_weights="pissa")).double().eval()
    with torch.no_grad():
        assert torch.equal(adapters.set_active(pissa, "default")(X.double()), pissa(X.double()))
        assert adapters.disable(pissa)(X.double()).dtype == torch.float64


def test_a_derived_graph_is_in_the_mode_of_the_one_it_comes_from() -> None:
    lora = fxlora.rewrite(traced(), config()).eval()
    made = [adapters.disable(lora), adapters.set_active(lora, "default"), fxlora.merge(lora)]
    assert not any(m.training for g in made for m in g.modules())
    assert adapters.disable(lora.train()).training


def test_a_frozen_adapter_stays_frozen_when_another_comes(tmp_path: Path) -> None:
    peft_directory(tmp_path)
    lora = fxlora.load_adapter(traced(), tmp_path)
    for graph in (
        fxlora.load_adapter(lora, tmp_path, "b"),
        adapters.add(lora, config(), "c"),
        adapters.combine(lora, {"default": 1.0}, "d", "linear"),
    ):
        assert not any(p.requires_grad for p in graph.parameters())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ["head"]}, {"target_modules": ["head"]}),
        ({"modules_to_save": ["head"]}, {"target_modules": ["head"], "use_dora": True}),
        ({"modules_to_save": ["lin1"]},
         {"target_modules": [], "target_parameters": ["lin1.weight"]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_a_module_trained_as_a_whole_and_adapted_is_refused_before_anything_runs(
    first: dict[str, Any], second: dict[str, Any], order: tuple[str, str]
) -> None:
    both = adapters.add(fxlora.rewrite(traced(), config(**first)), config(**second), "other")
    with pytest.raises(AdapterError, match="only one of them can be active"):
        adapters.set_active(both, order)
    adapters.set_active(both, "other")(X)


@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_a_layer_and_its_weight_can_be_adapted_together(order: tuple[str, str]) -> None:
    by_weight = config(
        target_modules=[], target_parameters=["lin0.weight"], init_lora_weights=False
    )
    lora = fxlora.rewrite(traced(), by_weight)
    both = adapters.add(lora, config(init_lora_weights=False), "other")
    live = adapters.set_active(both, order).eval()
    with torch.no_grad():
        torch.testing.assert_close(fxlora.merge(live)(X), live(X))


@pytest.mark.parametrize(
    "name", ["", "a.b", "../up", "/tmp/x", "a\\b", "keys", "class", "train", 5, True, "x" * 300]
)
def test_a_name_that_cannot_be_an_adapter_s_is_refused(name: Any) -> None:
    lora = fxlora.rewrite(traced(), config())
    with pytest.raises(AdapterError, match="adapter="):
        adapters.add(lora, config(), name)


@pytest.mark.parametrize("settings", [{"bias": "all", "modules_to_save": ["head"]}])
def test_peft_s_file_with_a_bias_written_twice_is_read(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected = peft_directory(tmp_path, **settings)
    lora = fxlora.load_adapter(traced(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(lora(X), expected)


def test_comparing_leaves_a_limited_embedding_alone() -> None:
    model = nn.Sequential(nn.Embedding(20, 6, max_norm=0.1), nn.Linear(6, 3))
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(20).view(4, 5)
    assert fxlora.compare(model, config(target_modules=["1"]), (ids,)).equal
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- merging ------------------------------------------------------------------------------------


def perturbed(lora: torch.fx.GraphModule) -> torch.fx.GraphModule:
    with torch.no_grad():
        for p in lora.parameters():
            if p.requires_grad:
                p.data = p + 0.1
    return lora


def test_a_merged_graph_has_flags_of_its_own_for_a_module_trained_as_a_whole() -> None:
    lora = perturbed(fxlora.rewrite(traced(), config(modules_to_save=["head"])))
    merged = fxlora.merge(lora)
    flags = {n: p.requires_grad for n, p in lora.named_parameters()}
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == dict.fromkeys(
        [n for n, _ in Mlp().named_parameters()], True
    )
    assert merged.head.weight.data_ptr() == (  # type: ignore[union-attr]
        lora.get_parameter("head.modules_to_save.default.weight").data_ptr()
    )
    for wanted in (False, True):
        merged.requires_grad_(wanted)
        assert {n: p.requires_grad for n, p in lora.named_parameters()} == flags
    lora.requires_grad_(False)
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runs", [0, 3])
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_a_normalisation_of_old_is_merged_as_it_computes_whether_it_ran_or_not(
    wrap: Any, runs: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(6, 8)), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # what the hook computed last is of other numbers
    for _ in range(runs):
        model(X)
    lora = perturbed(fxlora.rewrite(fxlora.trace(model, (X,)), config(target_modules=["0"]))).eval()
    merged = fxlora.merge(lora)
    torch.testing.assert_close(merged(X), lora(X))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embed(x))
        return out


def test_a_merged_graph_says_which_tied_weight_is_two_now() -> None:
    x = torch.arange(5)
    lora = perturbed(fxlora.rewrite(fxlora.trace(Tied(), (x,)), config(target_modules=["head"])))
    with torch.no_grad():
        lora.get_parameter("head.lora_B.default.weight").fill_(0.5)
    merged = fxlora.merge(lora)
    (note,) = [n for n in info(merged).notes if "ties" in n]
    assert note.startswith("head.weight is no longer embed.weight, to which the model ties it")
    assert "untied weights" in note
    tied = Tied()
    tied.load_state_dict(merged.state_dict())
    assert not torch.allclose(tied(x), merged(x))
    tied.head.weight = nn.Parameter(torch.empty(5, 6))
    tied.load_state_dict(merged.state_dict())
    torch.testing.assert_close(tied(x), merged(x))


def test_an_untouched_tie_gives_no_note() -> None:
    class Both(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.mid = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.mid(self.embed(x)))
            return out

    graph = fxlora.trace(Both(), (torch.arange(5),))
    merged = fxlora.merge(fxlora.rewrite(graph, config(target_modules=["mid"])))
    assert not [n for n in info(merged).notes if "ties" in n]


# ---- without weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["svd", "linear", "cat", "ties"])
def test_adapters_without_values_are_not_combined(how: str) -> None:
    graph = fxlora.trace(Mlp().to("meta"), (X.to("meta"),))
    both = adapters.add(fxlora.rewrite(graph, config()), config(), "other")
    with pytest.raises(AdapterError, match=r"adapter 'default' is on the meta device.*load the"):
        adapters.combine(both, {"default": 0.5, "other": 0.5}, "mix", how, density=0.5)
