"""One module under several names: what PEFT's wrapper is reached by, what is counted, what is saved."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora.errors import ConfigTypeError, UnsupportedError

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(10).view(2, 5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.att(x, x, x)[0]


class Raw(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class Experts(nn.Module):
    """A stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bti,eoi->bto", x, self.w)


class Block(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.shared(x))


class Past(Block):
    """Reads the shared weight past its module too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(x, self.shared[0].weight)


class Shared(nn.Module):
    """One container held by two blocks and called through both."""

    def __init__(self, inner: nn.Module, block: type[Block] = Block) -> None:
        super().__init__()
        shared = nn.Sequential(inner)
        self.a, self.b = block(shared), block(shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Alias(nn.Module):
    """One layer under two names of one parent: PEFT wraps the first only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a = inner
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def lin() -> nn.Module:
    return nn.Linear(8, 8)


# A model, what to adapt, how many calls the adapter is in effect at, and how many read past it.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, int]] = {
    "layer": (lambda: Shared(lin()), {"target_modules": ["shared.0"]}, 2, 0),
    "weight": (lambda: Shared(lin()), {"target_parameters": ["shared.0.weight"]}, 2, 0),
    "parameter": (lambda: Shared(Raw()), {"target_parameters": ["shared.0.w"]}, 2, 0),
    "experts": (lambda: Shared(Experts()), {"target_parameters": ["shared.0.w"]}, 2, 0),
    "attention": (lambda: Shared(Attention()), {"target_modules": ["att"]}, 2, 0),
    "layer-past": (lambda: Shared(lin(), Past), {"target_modules": ["shared.0"]}, 2, 2),
    "weight-past": (lambda: Shared(lin(), Past), {"target_parameters": ["shared.0.weight"]}, 2, 2),
    "alias-layer": (lambda: Alias(lin()), {"target_modules": ["a"]}, 1, 1),
    "alias-weight": (lambda: Alias(lin()), {"target_parameters": ["a.weight"]}, 1, 1),
    "alias-parameter": (lambda: Alias(Raw()), {"target_parameters": ["a.w"]}, 1, 1),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, LoraConfig, int, int]:
    make, settings, reached, past = CASES[request.param]
    torch.manual_seed(0)
    return make(), LoraConfig(r=4, **settings), reached, past


def test_the_adapter_is_in_effect_where_peft_s_wrapper_is_reached(case: Any) -> None:
    model, config, _, _ = case
    found = fxlora.compare(model, config, (X,))
    assert found.differences == ()
    assert found.certificate.equal or found.certificate.problem  # a wrapped attention has no trace
    assert all(d.equal for d in (*found.outputs, *found.gradients))
    assert {d.name for d in found.divergences} <= {"attention_out_proj_doubled", "tied_merge"}


def test_a_merge_keeps_what_the_adapter_does_not_reach(case: Any) -> None:
    model, config, _, _ = case
    lora = fxlora.rewrite(fxlora.trace(model, (X,)), config)
    for p in lora.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) * 0.1
    torch.testing.assert_close(fxlora.merge(lora)(X), lora(X))


def test_the_plan_counts_the_calls_the_adapter_does_not_reach(case: Any) -> None:
    model, config, reached, past = case
    plan = fxlora.plan(fxlora.trace(model, (X,)), config)
    for site in plan.adapted:
        assert (len(site.site.calls), site.bypassed) == (reached + past, past)
    effects = fxlora.effects(fxlora.rewrite(fxlora.trace(model, (X,)), config))
    assert {e.verdict for e in effects} == {"partial" if past else "live"}


# ---- modules trained as a whole ------------------------------------------------------------------


def test_a_block_that_holds_an_adapter_by_another_name_is_not_saved_whole() -> None:
    config = LoraConfig(r=4, target_modules=["shared.0"], modules_to_save=["b"])
    model = Shared(lin())
    kept = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    copied = kept.b.modules_to_save["default"]
    assert "shared.0.lora_A.default.weight" in dict(copied.named_parameters())  # as docs/parity.md
    with pytest.raises(ConfigTypeError) as e:
        fxlora.plan(fxlora.trace(model, (X,)), config)
    assert str(e.value) == (
        "modules_to_save entry 'b' hits 'b', and 'b.shared.0', which is 'a.shared.0', gets an "
        "adapter: a module is adapted or trained as a whole. An entry matches every name that ends "
        "with it, without a dot; write exclude_modules=['a.shared.0'] or a longer entry"
    )


@pytest.mark.parametrize("name", ["shared.0.weight", "a.shared.0.weight"])
def test_nor_one_that_holds_an_adapted_parameter(name: str) -> None:
    config = LoraConfig(r=4, target_parameters=[name], target_modules=[], modules_to_save=["b"])
    with pytest.raises(ConfigTypeError, match=r"'b\.shared\.0', which is 'a\.shared\.0', gets"):
        fxlora.plan(fxlora.trace(Shared(lin()), (X,)), config)


class Whole(nn.Module):
    """Holds its first layer under a name that no adapter is reached by."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.head = nn.Sequential(self.lin, nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(x))


def test_one_that_holds_the_layer_past_its_adapter_is() -> None:
    config = LoraConfig(r=4, target_modules=["lin"], modules_to_save=["head"])
    found = fxlora.compare(Whole(), config, (X,))
    assert found.differences == ()
    assert found.certificate.equal


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.norm(self.emb(i))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.own = nn.Linear(8, 8)
        self.ff = nn.Sequential(nn.Linear(8, 8))

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.ff(self.own(self.inner(i)))


class Listed(nn.Module):
    """One block by itself and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.x = Stage()
        self.blocks = nn.ModuleList([self.x])

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](i)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["inner"]},
        {"trainable_token_indices": {"emb": [1, 3]}},
        {"trainable_token_indices": {"emb": [1, 3]}, "modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_a_copy_reached_by_two_names_is_counted_once(settings: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules=["own"], **settings)
    found = fxlora.compare(Listed(), config, (TOKENS,))
    assert found.differences == ()
    plan = found.plan
    assert (plan.trainable, plan.total) == (found.peft_trainable, found.peft_total)
    assert "(0 parameters" not in str(plan)
    assert "(0 numbers" not in str(plan)


def test_compare_says_where_the_plan_counts_otherwise_than_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["fxlora.plan"], "_count", lambda *_: (1, 2))
    found = fxlora.compare(Shared(lin()), LoraConfig(r=4, target_modules=["shared.0"]), (X,))
    assert not found.equal
    assert found.differences == (
        "the plan counts 1 of 2 parameters trainable, the graph has 64 of 280",
    )


# ---- names -----------------------------------------------------------------------------------------


def test_a_suffix_of_a_second_name_only_targets_nothing_there() -> None:
    config = LoraConfig(r=4, target_modules=["0"])  # of blocks.0, and of x.ff.0
    found = fxlora.compare(Listed(), config, (TOKENS,))
    assert found.equal, found.differences
    assert [s.name for s in found.plan.adapted] == ["x.ff.0"]


def test_a_first_name_that_is_no_layer_is_refused_still() -> None:
    with pytest.raises(UnsupportedError, match=r"'x' is targeted .* and is a Stage"):
        fxlora.plan(fxlora.trace(Listed(), (TOKENS,)), LoraConfig(r=4, target_modules=["x", "own"]))


# ---- files -----------------------------------------------------------------------------------------


class Headed(nn.Module):
    """A head of several layers, one of them in a container of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(x))


class Plain(Headed):
    """A head that is one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)


FILES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]] = {
    "head-of-layers": (Headed, X, {"target_modules": ["lin"], "modules_to_save": ["head"]}),
    "head-of-one": (Plain, X, {"target_modules": ["lin"], "modules_to_save": ["head"]}),
    "second-name": (Listed, TOKENS, {"target_modules": ["own"]}),
    "second-name-lora-bias": (Listed, TOKENS, {"target_modules": ["own"], "lora_bias": True}),
    "second-name-of-a-copy": (Listed, TOKENS, {"target_modules": ["own"], "modules_to_save": ["norm"]}),
    "second-name-of-a-block": (Listed, TOKENS, {"target_modules": ["own"], "modules_to_save": ["inner"]}),
    "second-name-of-rows": (
        Listed, TOKENS, {"target_modules": ["own"], "trainable_token_indices": {"emb": [1, 3]}},
    ),
    "second-name-of-a-weight": (
        Listed, TOKENS, {"target_modules": [], "target_parameters": ["own.weight"]},
    ),
    "shared": (lambda: Shared(lin()), X, {"target_modules": ["shared.0"]}),
    "shared-weight": (lambda: Shared(lin()), X, {"target_parameters": ["shared.0.weight"]}),
    "shared-attention": (lambda: Shared(Attention()), X, {"target_modules": ["att"]}),
    "alias": (lambda: Alias(lin()), X, {"target_modules": ["a"]}),
}  # fmt: skip


@pytest.fixture(params=list(FILES))
def saved(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    make, given, settings = FILES[request.param]
    torch.manual_seed(0)
    return make(), given, settings


def wrapped(model: nn.Module, settings: dict[str, Any], bias: str, adapter: str = "default") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, bias=bias, **settings), adapter)
    for p in made.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) * 0.1
    return made.eval()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_files_are_peft_s_key_for_key_and_load_both_ways(
    saved: Any, bias: str, tmp_path: Path
) -> None:
    model, given, settings = saved
    theirs = wrapped(model, settings, bias)
    # PEFT misses the second names, in a file of its own too, and takes a bias of lora_B for a shard.
    warnings.simplefilter("ignore")
    theirs.save_pretrained(tmp_path / "peft")
    before = theirs(given)
    lora = fxlora.load_adapter(fxlora.trace(model.eval(), (given,)), tmp_path / "peft").eval()
    attention = "att" in settings.get("target_modules", ())
    if not attention:  # of which peft's doubles a projection
        assert torch.equal(lora(given), before)
    fxlora.save_adapter(lora, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "peft"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    back = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    # Without a gradient torch takes a fused attention, which rounds otherwise.
    torch.testing.assert_close(back(given), before, rtol=0, atol=1e-5 if attention else 0)


def test_a_head_that_peft_saved_under_another_adapter_name_loads(tmp_path: Path) -> None:
    settings = {"target_modules": ["lin"], "modules_to_save": ["head"]}
    theirs = wrapped(Headed(), settings, "all", "other")
    theirs.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert "base_model.model.head.modules_to_save.other.0.bias" in keys
    fxlora.load_adapter(fxlora.trace(Headed(), (X,)), tmp_path / "other")


def test_a_file_without_the_second_copies_of_a_bias_loads(tmp_path: Path) -> None:
    settings = {"target_modules": ["lin"], "modules_to_save": ["head"]}
    theirs = wrapped(Headed(), settings, "all")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if ".modules_to_save." not in k}, path)
    model = Headed()
    lora = fxlora.load_adapter(fxlora.trace(model, (X,)), tmp_path)
    assert "modules_to_save.default.0.bias" in " ".join(dict(lora.named_parameters()))
