"""Beyond PEFT: every use of a weight, parts of fused layers, single calls; equal to dense weights."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import fxlora_viz
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from test_slices import FUSED
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxlora
from fxlora import dense
from fxlora.errors import AdapterError, CheckpointError, ConfigError, UnsupportedError
from fxlora.example_inputs import for_model
from fxlora.facts import info
from fxlora.plan import Plan
from fxlora.rewrite import held_of

torch.manual_seed(0)
_IDS = torch.randint(0, 11, (2, 5))


class Reads(nn.Module):
    """One weight of each kind, read in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.e = nn.Embedding(11, 6)
        self.c = nn.Linear(6, 4)
        self.gpt = transformers.pytorch_utils.Conv1D(5, 6)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.e(ids)
        x = self.a(x) + self.b(x).tanh() + F.linear(x, self.a.weight) + x @ self.a.weight.t()
        x = x + (x @ self.a.weight).sin() + F.linear(x, self.a.weight.transpose(0, 1)).cos()
        x = x + torch.einsum("bti,oi->bto", x, self.a.weight)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        y = F.linear(x, self.c.weight, self.c.bias)
        z = F.linear(x, self.e.weight) + F.embedding(ids, self.e.weight).sum(-1, keepdim=True)
        w = self.gpt(x) + x @ self.gpt.weight + torch.matmul(x, self.gpt.weight)
        back = y.cos() @ self.c.weight.to(y.dtype) + w @ self.gpt.weight.T
        return y, z, back, w


def with_values(lora: GraphModule) -> GraphModule:
    for i, (name, p) in enumerate(lora.named_parameters()):
        if "lora_" in name:
            torch.manual_seed(i)
            p.data.normal_(std=0.5)
    return lora


def dense_model(model: nn.Module, lora: GraphModule) -> nn.Module:
    """Returns the model with W + s B A in its own parameters: what full reach comes to."""
    made = copy.deepcopy(model)
    held = held_of(lora, "default", None)
    with torch.no_grad():
        for p in held.plan.adapted:
            a, b = dense.factors(held, p)
            delta = (b @ a) * p.scaling
            layer: Any = made.get_submodule(p.site.owner)
            weight = layer.in_proj_weight if p.kind == "MultiheadAttention" else layer.weight
            rows = [i for r in p.site.rows for i in r] or list(range(delta.shape[0]))
            if p.kind in ("Conv1D", "Embedding"):
                weight[:, rows] += delta.t()
            else:
                weight[rows] += delta
    return made


def first(out: Any) -> torch.Tensor:
    return out if torch.is_tensor(out) else out[0]


@pytest.fixture(scope="module")
def reads() -> tuple[nn.Module, GraphModule]:
    torch.manual_seed(0)
    model = Reads().double()
    return model, fxlora.trace(model, (_IDS,))


CASES = [
    ["a"], ["e"], ["c"], ["gpt"], ["mha.out_proj"], ["mha"], ["mha.q"], ["mha.v", "mha.k"],
    ["a", "e", "c", "gpt", "mha.out_proj", "mha.q"],
]  # fmt: skip


@pytest.mark.parametrize("targets", CASES, ids=lambda t: "+".join(t))
def test_every_use_of_a_weight_computes_with_the_dense_sum(
    reads: tuple[nn.Module, GraphModule], targets: list[str]
) -> None:
    model, traced = reads
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    lora = with_values(fxlora.rewrite(traced, config, reach=("uses", "slices")))
    other = dense_model(model, lora)
    base, wanted = model(_IDS), other(_IDS)
    assert any(not torch.allclose(b, w) for b, w in zip(base, wanted, strict=True))
    for merged in (lora, fxlora.merge(lora)):
        for ours, theirs in zip(merged(_IDS), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)  # float64: rounding only
    assert {e.verdict for e in fxlora.effects(lora)} == {"live"}


@pytest.mark.parametrize("targets", CASES, ids=lambda t: "+".join(t))
def test_every_use_gets_the_gradient_of_the_dense_sum(
    reads: tuple[nn.Module, GraphModule], targets: list[str]
) -> None:
    """d/dA and d/dB by hand from the gradient of the dense weight: s B^T G and s G A^T."""
    model, traced = reads
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    lora = with_values(fxlora.rewrite(traced, config, reach=("uses", "slices")))
    other = dense_model(model, lora)
    sum(o.sin().sum() for o in lora(_IDS)).backward()
    sum(o.sin().sum() for o in other(_IDS)).backward()
    held = held_of(lora, "default", None)
    for p in held.plan.adapted:
        a, b = dense.factors(held, p)
        layer: Any = other.get_submodule(p.site.owner)
        weight = layer.in_proj_weight if p.kind == "MultiheadAttention" else layer.weight
        g = weight.grad.t() if p.kind in ("Conv1D", "Embedding") else weight.grad
        g = g[[i for r in p.site.rows for i in r] or slice(None)]
        names = ("lora_embedding_A.default", "lora_embedding_B.default")
        if p.form != "rows":
            names = ("lora_A.default.weight", "lora_B.default.weight")
        grads = dict(lora.named_parameters())
        torch.testing.assert_close(grads[f"{p.prefix}.{names[0]}"].grad, p.scaling * b.t() @ g)
        torch.testing.assert_close(grads[f"{p.prefix}.{names[1]}"].grad, p.scaling * g @ a.t())


def test_no_dense_sum_is_held_where_the_algebra_allows(
    reads: tuple[nn.Module, GraphModule],
) -> None:
    """Linear maps by a function, their transposes and lookups get a branch, no B A."""
    _, traced = reads
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["c", "gpt", "e"]), reach="uses")
    assert not [n for n in lora.graph.nodes if n.meta.get("role") == "delta"]
    whole = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["a"]), reach="uses")
    products = [
        n for n in whole.graph.nodes if n.meta.get("role") == "delta" and n.target == "matmul"
    ]
    assert len(products) == 1  # the einsum takes the weight whole


def test_without_reach_the_graph_is_pefts() -> None:
    model = Reads()
    result = fxlora.compare(model, LoraConfig(r=2, target_modules=["a", "c", "e"]), (_IDS,), {})
    assert not result.differences
    plan = fxlora.plan(fxlora.trace(model, (_IDS,)), LoraConfig(target_modules=["a"]))
    assert plan["a"].bypassed == 6
    assert not plan.beyond_peft


@pytest.mark.parametrize("name", FUSED)
def test_parts_of_fused_layers_compute_with_the_dense_sum(name: str) -> None:
    model = FUSED[name][0]().double()
    args, kwargs = for_model(model, (), None)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q", "v_proj", "up"], rank_pattern={"q": 3},
        lora_bias=False,
    )  # fmt: skip
    traced = fxlora.trace(model, args, kwargs)
    lora = with_values(fxlora.rewrite(traced, config, reach="slices"))
    plan = info(lora).plan
    assert [p.name.rpartition(".")[2] for p in plan.adapted] == [
        p for p in FUSED[name][1] if p in ("q", "v", "up")
    ]
    assert {p.name.rpartition(".")[2]: p.r for p in plan.adapted}["q"] == 3
    wanted = first(dense_model(model, lora)(*args, **kwargs))
    assert not torch.allclose(first(model(*args, **kwargs)), wanted)
    got = first(lora(*args, **kwargs))
    torch.testing.assert_close(got, wanted)
    exported = torch.export.export(lora, args, kwargs)
    torch.testing.assert_close(first(exported.module()(*args, **kwargs)), got)


def test_a_graph_with_reach_compiles_whole(reads: tuple[nn.Module, GraphModule]) -> None:
    _, traced = reads
    config = LoraConfig(r=2, target_modules=["a", "e", "c", "mha.out_proj", "mha.q"])
    lora = with_values(fxlora.rewrite(traced, config, reach=("uses", "slices")))
    compiled = torch.compile(lora, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(_IDS), lora(_IDS), strict=True):
        torch.testing.assert_close(ours, theirs)


ENCODER = nn.TransformerEncoder(
    nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2,
    enable_nested_tensor=False,
)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [["out_proj", "linear1"], ["self_attn.q", "self_attn.v"]])
def test_torch_s_encoder_is_reached_whole(targets: list[str], training: bool) -> None:
    """With peft, out_proj's adapters get no gradient, and a part of in_proj has no name."""
    model = copy.deepcopy(ENCODER).double().train(training)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    lora = with_values(fxlora.rewrite(fxlora.trace(model, (x,)), config, reach=("uses", "slices")))
    out = lora(x)
    torch.testing.assert_close(out, dense_model(model, lora)(x))
    out.sum().backward()
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)


def test_mamba_s_dt_proj_is_reached() -> None:
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4
    )
    model = transformers.MambaForCausalLM(config).double().eval()
    args, kwargs = for_model(model, (), None)
    traced = fxlora.trace(model, args, kwargs)
    lora_config = LoraConfig(r=2, target_modules=["dt_proj", "x_proj"])
    before = {e.site.rpartition(".")[2]: e.verdict for e in fxlora.effects(
        fxlora.rewrite(traced, lora_config))}  # fmt: skip
    assert before == {"dt_proj": "bypassed", "x_proj": "live"}
    lora = with_values(fxlora.rewrite(traced, lora_config, reach="uses"))
    assert {e.verdict for e in fxlora.effects(lora)} == {"live"}
    wanted = dense_model(model, lora)(*args, **kwargs).logits
    torch.testing.assert_close(lora(*args, **kwargs)[0], wanted)


def test_an_unmatched_entry_that_names_a_part_says_so() -> None:
    model = FUSED["phi3"][0]()
    traced = fxlora.trace(model, *for_model(model, (), None))
    plan = fxlora.plan(traced, LoraConfig(target_modules=["k_proj", "o_proj"]))
    said = "'k_proj' is a part of 'model.layers.0.self_attn.qkv_proj' (rows 32:48)"
    assert said in plan.warnings[0]
    with pytest.raises(ConfigError, match=re.escape(said)):
        fxlora.plan(traced, LoraConfig(target_modules=["k_proj"]))


def test_the_parts_of_a_layer_are_drawn_in_its_box() -> None:
    model = FUSED["gpt2"][0]()
    traced = fxlora.trace(model, *for_model(model, (), None))
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["q", "v"]), reach="slices")
    text = fxlora_viz.draw(traced, lora).dot
    for part in ("A · q", "B · q", "A · v", "B · v"):
        assert text.count(part) == 1
    assert text.count('label="c_attn') == 2  # before: the layer; after: the box of the site


# ---- one adapter for each call -------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, three calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.a(self.a(x).tanh()).sin() + self.a(x)
        return out


def test_every_call_of_a_shared_layer_has_its_own_adapter() -> None:
    model = Twice().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    traced = fxlora.trace(model, (x,))
    lora = with_values(fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["a"]), reach="calls"))
    held = held_of(lora, "default", None)
    w, b = model.a.weight, model.a.bias
    deltas = {p.name: dense.delta(held, p) for p in held.plan.adapted}
    assert sorted(deltas) == ["a.call_0", "a.call_1", "a.call_2"]

    def call(x: torch.Tensor, i: int) -> torch.Tensor:
        return F.linear(x, w + deltas[f"a.call_{i}"], b)

    order = {p.name: p.site.calls[0].node for p in held.plan.adapted}
    nodes = list(traced.graph.nodes)
    inner, last, outer = (int(n[-1]) for n in sorted(order, key=lambda n: nodes.index(order[n])))
    # The graph calls in Python's order: the inner one, the one around it, the one beside.
    wanted = call(call(x, inner).tanh(), last).sin() + call(x, outer)
    torch.testing.assert_close(lora(x), wanted)
    assert {e.verdict for e in fxlora.effects(lora)} == {"live"}
    with pytest.raises(AdapterError, match="one weight cannot hold them all"):
        fxlora.merge(lora)


def test_albert_has_one_adapter_for_every_layer_it_runs() -> None:
    config = transformers.AlbertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        embedding_size=8, vocab_size=50,
    )  # fmt: skip
    model = transformers.AlbertModel(config).eval()
    args, kwargs = for_model(model, (), None)
    traced = fxlora.trace(model, args, kwargs)
    lora_config = LoraConfig(r=2, target_modules=["query"], rank_pattern={"query": 4})
    plan = fxlora.plan(traced, lora_config, reach="calls")
    assert len(plan.adapted) == 3
    assert {p.r for p in plan.adapted} == {4}
    assert not plan.warnings
    assert plan.trainable == 3 * fxlora.plan(traced, lora_config).trainable


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reach", "message"),
    [
        ("slice", r"reach has 'slice': one or several of \['uses', 'slices', 'calls'\]. Did you"),
        (["uses", 3], "reach has 3"),
        (7, "reach=7"),
    ],
)
def test_an_unknown_reach_is_refused(reach: Any, message: str) -> None:
    traced = fxlora.trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=message):
        fxlora.plan(traced, LoraConfig(target_modules=["0"]), reach=reach)


@pytest.mark.parametrize(
    ("settings", "reach", "error", "message"),
    [
        ({"target_modules": ["c"], "use_dora": True}, "uses", UnsupportedError, "plain LoRA only"),
        ({"target_modules": ["c"], "lora_bias": True}, "uses", UnsupportedError, "lora_bias=True"),
        ({"target_modules": ["mha.q"], "use_dora": True}, "slices", ConfigError, "use_dora"),
        (
            {"target_modules": ["mha.q"], "init_lora_weights": "pissa"}, "slices", ConfigError,
            "'pissa' is about the whole weight, and the adapter of 'mha.q' is for a part of 'mha'",
        ),
        (
            {"target_modules": ["a"], "use_dora": True}, "calls", ConfigError,
            "'a' is for one of 2 calls",
        ),
    ],
)  # fmt: skip
def test_what_needs_a_weight_of_its_own_is_refused(
    settings: dict[str, Any], reach: str, error: type, message: str
) -> None:
    class Aliased(Reads):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = super().forward(ids)
            return (*out, self.a(out[2]))

    traced = fxlora.trace(Aliased().double(), (_IDS,))
    with pytest.raises(error, match=message):
        fxlora.plan(traced, LoraConfig(r=2, **settings), reach=reach)


def test_a_layer_adapted_as_a_whole_is_not_adapted_in_parts() -> None:
    model = FUSED["gpt2"][0]()
    traced = fxlora.trace(model, *for_model(model, (), None))
    plan = fxlora.plan(traced, LoraConfig(target_modules=r".*c_attn.*"), reach="slices")
    assert [p.name for p in plan.adapted] == ["transformer.h.0.attn.c_attn"]
    assert plan["transformer.h.0.attn.c_attn.q"].reason == "its layer is adapted as a whole"


def test_a_plan_made_with_another_reach_is_refused() -> None:
    traced = fxlora.trace(nn.Sequential(nn.Linear(2, 2)))
    plan = fxlora.plan(traced, LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"give it to fxlora\.plan"):
        fxlora.rewrite(traced, plan, reach="uses")


# ---- on disk -------------------------------------------------------------------------------------


def fused(name: str, **settings: Any) -> tuple[nn.Module, GraphModule, Any]:
    model = FUSED[name][0]()
    args, kwargs = for_model(model, (), None)
    traced = fxlora.trace(model, args, kwargs)
    config = LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **settings)
    return model, with_values(fxlora.rewrite(traced, config, reach="slices")), kwargs


def test_an_adapter_beyond_peft_is_saved_in_a_form_peft_refuses(tmp_path: Path) -> None:
    model, lora, kwargs = fused("phi3", target_modules=["q", "v", "down_proj"])
    (tmp_path / "adapter_config.json").write_text("{}")  # of an earlier save
    with pytest.warns(UserWarning, match="PEFT refuses to load, because .*qkv_proj.q is a part of"):
        fxlora.save_adapter(lora, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_model.safetensors", "fxlora_config.json",
    ]  # fmt: skip
    stored = json.loads((tmp_path / "fxlora_config.json").read_text())
    assert (stored["format"], stored["reach"]) == (1, ["slices"])
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    again = fxlora.load_adapter(fxlora.trace(model, **{"kwargs": kwargs}), tmp_path)
    assert torch.equal(first(again(**kwargs)), first(lora(**kwargs)))
    assert info(again).plan.reach == ("slices",)


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    model, lora, kwargs = fused("gpt2", target_modules=["q"])
    with pytest.warns(UserWarning, match="fxlora's own form"):
        fxlora.save_adapter(lora, tmp_path)
    path = tmp_path / "fxlora_config.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format is 2; this fxlora reads 1"):
        fxlora.load_adapter(fxlora.trace(model, **{"kwargs": kwargs}), tmp_path)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("rslora", [False, True])
def test_parts_are_saved_for_peft_as_one_adapter_of_the_whole_layer(
    name: str, rslora: bool, tmp_path: Path
) -> None:
    model, lora, kwargs = fused(
        name, target_modules=["q", "v", "c_proj", "down_proj"], rank_pattern={"q": 5},
        use_rslora=rslora, alpha_pattern={"v": 8},
    )  # fmt: skip
    fxlora.save_adapter(lora, tmp_path, as_peft=True)
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(first(theirs(**kwargs)), first(lora(**kwargs)))
        assert not torch.allclose(first(model(**kwargs)), first(lora(**kwargs)))
    again = fxlora.load_adapter(fxlora.trace(model, **{"kwargs": kwargs}), tmp_path)
    torch.testing.assert_close(first(again(**kwargs)), first(lora(**kwargs)))


def test_what_no_peft_adapter_represents_is_not_saved_as_one(tmp_path: Path) -> None:
    model = Twice()
    traced = fxlora.trace(model, (torch.randn(3, 4),))
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["a"]), reach="calls")
    with pytest.raises(CheckpointError, match=r"a\.call_0 is one call of a, which no PEFT adapter"):
        fxlora.save_adapter(lora, tmp_path / "new", as_peft=True)
    assert not (tmp_path / "new").exists()


def test_reach_that_finds_nothing_more_is_saved_as_pefts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    traced = fxlora.trace(model, (torch.randn(2, 3),))
    config = LoraConfig(r=2, target_modules=["0"])
    lora = fxlora.rewrite(traced, config, reach=("uses", "slices", "calls"))
    fxlora.save_adapter(lora, tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))


# ---- beside other adapters -----------------------------------------------------------------------


def test_adapters_of_another_reach_stand_beside_one_another(
    reads: tuple[nn.Module, GraphModule],
) -> None:
    _, traced = reads
    one = with_values(fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["c"])))
    plan: Plan = fxlora.plan(one, LoraConfig(r=2, target_modules=["c"]), "wide", reach="uses")
    both = with_values(fxlora.adapters.add(one, plan, "wide"))
    alone = fxlora.adapters.set_active(both, "wide")
    again = with_values(fxlora.rewrite(traced, LoraConfig(r=2, target_modules=["c"]), reach="uses"))
    for name, p in alone.named_parameters():
        if ".wide." in name:
            p.data.copy_(again.get_parameter(name.replace(".wide.", ".default.")).data)
    for ours, theirs in zip(alone(_IDS), again(_IDS), strict=True):
        torch.testing.assert_close(ours, theirs)
    together = fxlora.adapters.set_active(both, ["default", "wide"])
    y = together(_IDS)[0] - both(_IDS)[0]
    torch.testing.assert_close(y, alone(_IDS)[0] - fxlora.adapters.disable(both)(_IDS)[0])
