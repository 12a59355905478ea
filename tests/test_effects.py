"""Whether an adapter's gradient arrives: the static verdict is autograd's, and each verdict has a case."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from matrix import ROWS, Row
from networks import Network, networks
from networks import tensors as leaves
from peft import LoraConfig
from test_laws import configs, fill_b, guarded, law, planned
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F
from zoo import ZOO, tensors

import fxlora
from fxlora.effects import Effect, effects, reached_parameters
from fxlora.errors import AdapterError
from fxlora.facts import info

RUN = [r for r in ROWS if r.device != "meta"]


def arrived(lora: GraphModule, outputs: list[torch.Tensor]) -> set[str]:
    """Returns the parameters a backward pass gives a gradient."""
    for p in lora.parameters():
        p.grad = None
    loss = [o.float().square().sum() for o in outputs if o.requires_grad and o.is_floating_point()]
    if loss:
        torch.stack(loss).sum().backward()
    return {n for n, p in lora.named_parameters() if p.grad is not None}


def filled(lora: GraphModule) -> GraphModule:
    with torch.no_grad():
        for p in lora.parameters():
            if p.requires_grad:
                p.data = p + torch.randn_like(p) * 0.1
    return lora


@pytest.mark.parametrize("row", RUN, ids=lambda r: r.id)
def test_the_static_verdict_is_autograd_s_over_the_matrix(row: Row) -> None:
    args, kwargs = row.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = filled(fxlora.rewrite(fxlora.trace(row.build(), args, kwargs), row.config()))
        found = arrived(lora, tensors(lora(*args, **kwargs)))
    assert reached_parameters(lora) == found


@pytest.mark.parametrize("name", ZOO)
def test_the_static_verdict_is_autograd_s_on_real_models(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs(2, 8)
    traced = fxlora.trace(entry.build(), (), inputs)
    lora = filled(fxlora.rewrite(traced, LoraConfig(r=2, target_modules="all-linear")))
    found = arrived(lora, tensors(lora(**inputs)))
    assert reached_parameters(lora) == found
    plan = info(lora).plan
    for e in effects(lora):
        assert e.live == any(n.startswith(f"{plan[e.site].prefix}.lora_") for n in found), e


def agree(spec: Network, config: LoraConfig) -> None:
    _, traced, plan = planned(spec, config)
    lora = fxlora.rewrite(traced, plan)
    fill_b(lora)
    lora.train(spec.training)
    args, kwargs = spec.inputs(3)
    if guarded(lora, (args, kwargs)) is None:
        return
    found = arrived(lora, list(leaves(lora(*args, **kwargs))))
    assert reached_parameters(lora) == found


@law(150)
@given(networks(), configs())
def test_the_static_verdict_is_autograd_s_on_random_networks(
    spec: Network, config: LoraConfig
) -> None:
    agree(spec, config)


@pytest.mark.slow
@law(3_000)
@given(networks(), configs())
def test_the_static_verdict_is_autograd_s_on_three_thousand_random_networks(
    spec: Network, config: LoraConfig
) -> None:
    agree(spec, config)


# ---- one case for each verdict -------------------------------------------------------------------


class Cases(nn.Module):
    """One linear layer for every fate an adapter can have."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("live", "past", "both", "unused", "cut", "rounded", "dead", "twice"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dead(x)
        cut = self.cut(x).detach()
        with torch.no_grad():
            rounded = self.rounded(x)
        y = self.live(x) + F.linear(x, self.past.weight)
        y = y + self.both(x) + F.linear(x, self.both.weight)
        return self.twice(self.twice(y)) + cut + rounded


def verdicts(model: nn.Module, targets: Any, *args: Any, **settings: Any) -> dict[str, Effect]:
    traced = fxlora.trace(model, args)
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=targets, **settings))
    filled(lora)
    found = {e.site: e for e in effects(lora)}
    real = arrived(lora, tensors(lora(*args)))
    for site, e in found.items():
        assert e.live == any(n.startswith(f"{site}.lora_") for n in real), e
    return found


def test_every_verdict_is_told_from_the_graph() -> None:
    found = verdicts(Cases(), "all-linear", torch.randn(2, 4))
    assert {n: e.verdict for n, e in found.items()} == {
        "live": "live", "past": "bypassed", "both": "partial", "unused": "inert", "cut": "cut",
        "rounded": "cut", "dead": "dead", "twice": "live",
    }  # fmt: skip
    assert "detach" in found["cut"].reason
    assert "shared by 2 calls" in found["twice"].reason
    assert found["past"].bypassing == found["past"].bypassing[:1] != ()
    assert found["live"].witness[-1] == "output"
    assert found["cut"].witness[-1].startswith("detach")


def test_an_alias_is_adapted_where_its_first_name_stands() -> None:
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.rest = nn.Module()
    model.rest.b = model.a
    model.forward = lambda x: model.rest.b(model.a(x))
    found = verdicts(model, ["a"], torch.randn(2, 4))
    assert found["a"].verdict == "partial"


@pytest.mark.filterwarnings("ignore")
def test_half_of_an_encoder_s_adapters_are_bypassed() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = verdicts(model, ["out_proj", "linear1"], torch.randn(2, 3, 8))
    assert {n.rpartition(".")[2]: e.verdict for n, e in found.items()} == {
        "out_proj": "bypassed", "linear1": "live",
    }  # fmt: skip
    assert len(found) == 4


def test_attention_s_own_adapters_are_live() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.mha(x, x, x, need_weights=False)[0]
            return out

    found = verdicts(Attention(), ["mha"], torch.randn(2, 3, 8))
    assert {n: e.verdict for n, e in found.items()} == {"mha": "live", "mha.out_proj": "live"}


def test_albert_s_one_adapter_serves_every_layer() -> None:
    entry = ZOO["albert"]
    traced = fxlora.trace(entry.build(), (), entry.inputs(2, 8))
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=entry.targets))
    layers = entry.build().config.num_hidden_layers
    shared = [e for e in effects(lora) if e.calls > 1]
    assert shared
    assert all(e.verdict == "live" and e.calls == layers for e in shared)


def test_a_graph_without_active_adapters_has_no_effects() -> None:
    traced = fxlora.trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(AdapterError, match="no adapter is active"):
        effects(traced)
    lora = fxlora.rewrite(traced, LoraConfig(target_modules=["0"]))
    assert "1 of 1 adapter live" in str(effects(lora))
    with pytest.raises(AdapterError, match="no adapter is active"):
        effects(fxlora.adapters.disable(lora))
