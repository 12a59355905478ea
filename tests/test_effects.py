"""Whether an adapter's gradient arrives: the static verdict is autograd's, and each verdict has a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import ROWS, Row
from networks import Network, Part, networks
from networks import tensors as leaves
from peft import LoraConfig
from test_gradients import disagreements
from test_laws import configs, guarded, law
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F
from walls import ALONE, Attention, walled_networks
from zoo import ZOO, tensors

import fxlora
from fxlora.effects import Effect, effects, reached_parameters
from fxlora.errors import AdapterError, ConfigError
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


TARGETS = (None, "all-linear", ["mha"], ["out_proj", "linear1"], ["lin", "one", "two"])


# A network, a configuration, and which of the adapted sites, by position, are frozen afterwards.
Case = tuple[Network, LoraConfig, tuple[int, ...]]


@st.composite
def walled_cases(draw: Any) -> Case:
    """Draws a network with walls in it, or any other, a configuration, and what is frozen."""
    spec, config = (
        draw(st.one_of(walled_networks(), walled_networks(), networks())),
        draw(configs()),
    )
    targets = draw(st.sampled_from(TARGETS))
    if targets is not None:
        config.target_modules = set(targets) if isinstance(targets, list) else targets
    return spec, config, draw(st.sampled_from(((), (), (0,), (1,), (0, 2))))


def rewritten(spec: Network, config: LoraConfig) -> GraphModule:
    """Returns a rewritten network; under all-linear where the configuration adapts nothing of it."""
    traced = fxlora.trace(spec.build(), *spec.inputs(3), dynamic=False)
    try:
        return fxlora.rewrite(traced, config)
    except ConfigError:
        return fxlora.rewrite(traced, LoraConfig(r=2, target_modules="all-linear"))


def freeze(lora: GraphModule, frozen: tuple[int, ...]) -> None:
    """Freezes the adapters of some sites."""
    for at, planned in enumerate(info(lora).plan.adapted):
        if at in frozen:
            for _, p in adapter_parameters(lora, planned.name):
                p.requires_grad_(False)


def adapter_parameters(lora: GraphModule, site: str) -> list[tuple[str, nn.Parameter]]:
    prefix = f"{info(lora).plan[site].prefix}.lora_"
    return [(n, p) for n, p in lora.named_parameters() if n.startswith(prefix)]


def agree(case: Case) -> None:
    """A parameter is reached exactly when autograd gives it a gradient, live when it is not zeros."""
    spec, config, frozen = case
    try:
        lora = filled(rewritten(spec, config))
    except ConfigError:
        hypothesis.reject()
    freeze(lora, frozen)
    lora.train(spec.training)
    args, kwargs = spec.inputs(3)
    if guarded(lora, (args, kwargs)) is None:
        return
    found = arrived(lora, list(leaves(lora(*args, **kwargs))))
    assert reached_parameters(lora) == found
    names = [str(n.target) for n in lora.graph.nodes if n.op == "placeholder"]
    given = dict(zip(names, args, strict=False)) | kwargs
    assert disagreements(lora, *(given[n] for n in names)) == []
    found_live = list(effects(lora))
    moved = {e.site for e in found_live if moves(lora, e)}
    for seed in range(8):
        if all(e.site in moved for e in found_live if e.live):
            break
        # Numbers can make zeros too: a ReLU all of whose inputs are negative. Others will not.
        redraw(lora, seed)
        args, kwargs = spec.inputs(3, seed + 1)
        arrived(lora, list(leaves(lora(*args, **kwargs))))
        moved |= {e.site for e in found_live if moves(lora, e)}
    for e in found_live:
        witnessed(lora, e)
        assert e.live == (e.site in moved), e


def redraw(lora: GraphModule, seed: int) -> None:
    """Gives every parameter other numbers: of several sizes, for large ones drive a tanh to its end."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0, 0.3, 0.1)[seed % 3])
            p.grad = None


def moves(lora: GraphModule, e: Effect) -> bool:
    """Whether the last backward pass gave an adapter a gradient other than zeros."""
    mine = [p.grad for _, p in adapter_parameters(lora, e.site)]
    return any(g is not None and bool(g.abs().sum() > 0) for g in mine)


def witnessed(lora: GraphModule, e: Effect) -> None:
    """A witness starts at the adapter and goes along the graph, to the output or to the wall."""
    nodes = {n.name: n for n in lora.graph.nodes}
    path = [nodes[name] for name in e.witness]
    if e.verdict not in ("live", "partial", "cut"):
        assert not path
        return
    assert path[0].meta["site"] == e.site
    assert path[0].meta["role"] in ("lora_A", "lora_B")
    for before, after in pairwise(path):
        written = bool(before.meta.get("mutates")) and before < after
        assert before in after.all_input_nodes or written, (before, after)
    assert (path[-1].op == "output") == e.live
    if e.verdict == "cut" and not any(p.requires_grad for _, p in adapter_parameters(lora, e.site)):
        assert e.reason.startswith("the adapter is frozen")
    else:
        assert e.live or path[-1].name in e.reason


@pytest.mark.parametrize("part", ALONE, ids=repr)
def test_the_static_verdict_is_autograd_s_on_every_wall_alone(part: Part) -> None:
    agree((Network((part,)), LoraConfig(r=2, target_modules="all-linear"), ()))


@law(120)
@given(walled_cases())
def test_the_static_verdict_is_autograd_s_on_random_networks(
    case: Case,
) -> None:
    agree(case)


@pytest.mark.slow
@law(10_000)
@given(walled_cases())
def test_the_static_verdict_is_autograd_s_on_thousands_of_random_networks(
    case: Case,
) -> None:
    agree(case)


# ---- one call after another ----------------------------------------------------------------------

AT = torch.tensor([[0, 2, 1, 3]] * 2)
# A call on the layer's output h and another tensor x -> what a backward pass makes of it.
CALLS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], str]] = {
    "argmax": (lambda h, x: h.argmax(-1, keepdim=True) * x, "nothing"),
    "greater": (lambda h, x: (h > 0) * x, "nothing"),
    "data": (lambda h, x: h.data * x, "nothing"),
    "count": (lambda h, x: torch.linalg.vector_norm(h, 0) * x, "nothing"),
    "norm": (lambda h, x: torch.linalg.vector_norm(h, 2) * x, "numbers"),
    "bessel": (lambda h, x: torch.special.bessel_j0(h) * x, "nothing"),
    "target": (lambda h, x: F.hinge_embedding_loss(x, h.abs()) * x, "nothing"),
    "and in place": (lambda h, x: (x * 1).logical_and_(h), "nothing"),
    "cast by example": (lambda h, x: x.type_as(h), "nothing"),
    "round": (lambda h, x: h.round() * x, "zeros"),
    "sign in place": (lambda h, x: h.sign_() * x, "zeros"),
    "rounded division": (lambda h, x: torch.div(h, 0.3, rounding_mode="floor"), "zeros"),
    "filled": (lambda h, x: h.fill_(2.0) * x, "zeros"),
    "filled by a tensor": (lambda h, x: (x * 1).fill_(h.sum()), "numbers"),
    "copied over": (lambda h, x: h.copy_(x), "zeros"),
    "copied": (lambda h, x: (x * 1).copy_(h), "numbers"),
    "compared in place": (lambda h, x: h.gt_(x), "zeros"),
    "drawn over": (lambda h, x: h.normal_(), "zeros"),
    "drawn about": (lambda h, x: torch.normal(h, 1.0), "zeros"),
    "drawn with this spread": (lambda h, x: torch.normal(x, std=h.abs()), "zeros"),
    "drawn at this rate": (lambda h, x: torch.poisson(h.abs()) * x, "zeros"),
    "rounded division in place": (
        lambda h, x: (h * 1).div_(0.3, rounding_mode="floor"), "zeros"),
    "rounded division by another name": (
        lambda h, x: (h * 1).divide_(0.3, rounding_mode="trunc"), "zeros"),
    "distances that are counts": (lambda h, x: torch.cdist(h, x, 0), "zeros"),
    "a count by its method": (lambda h, x: h.norm(p=0) * x, "nothing"),
    "a distance that is a count": (lambda h, x: torch.dist(h, x, 0) * x, "nothing"),
    "angle": (lambda h, x: torch.angle(h) * x, "zeros"),
    "angle of complex numbers": (lambda h, x: torch.angle(torch.fft.rfft(h)), "numbers"),
    "sign of complex numbers": (lambda h, x: torch.sgn(torch.fft.rfft(h)).imag, "numbers"),
    "the device only": (lambda h, x: torch.eye(4, device=h.device) @ x.t(), "nothing"),
    "a leaf of its own": (lambda h, x: torch.zeros_like(h, requires_grad=True) * x, "nothing"),
    "a statistic": (
        lambda h, x: (F.batch_norm(h, m := x[0] * 1, x[1].abs(), training=True), m)[1], "nothing"),
    "beside another": (lambda h, x: torch.broadcast_tensors(h, x)[1] * x, "nothing"),
    "sign of another": (lambda h, x: torch.copysign(x, h), "zeros"),
    "magnitude": (lambda h, x: torch.copysign(h, x), "numbers"),
    "straight through": (lambda h, x: h + (h.round() - h).detach(), "numbers"),
    "ordered": (lambda h, x: h.sort(-1).values * AT, "numbers"),
    "positions": (lambda h, x: h.sort(-1).indices * x, "nothing"),
    "picked": (lambda h, x: h.gather(-1, AT), "numbers"),
    "picked by": (lambda h, x: x.gather(-1, h.argsort(-1)), "nothing"),
    "masked": (lambda h, x: torch.where(h > 0, x, x * 2), "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_does_to_a_gradient_is_what_autograd_does(name: str) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return CALLS[name][0](self.lin(x), x)

    torch.manual_seed(0)
    x = torch.randn(2, 4) + 0.1
    lora = filled(fxlora.rewrite(fxlora.trace(One(), (x,)), LoraConfig(target_modules=["lin"])))
    assert disagreements(lora, x) == []
    found = arrived(lora, tensors(lora(x)))
    (e,) = effects(lora)
    assert reached_parameters(lora) == found
    assert bool(found) == (CALLS[name][1] != "nothing")
    assert e.live == moves(lora, e) == (CALLS[name][1] == "numbers")
    assert ("is zero everywhere" in e.reason) == (CALLS[name][1] == "zeros")
    witnessed(lora, e)


class Pair(nn.Module):
    """Two layers, and a function of the model and its input."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same, self.flat, self.split = nn.Identity(), nn.Flatten(), nn.Unflatten(1, (2, 2))
        self.drop = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


# Another name of a tensor's memory, in the model m in eval mode.
ALIASES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "float": lambda m, y: y.float(),
    "to": lambda m, y: y.to(torch.float32),
    "type_as": lambda m, y: y.type_as(y),
    "identity": lambda m, y: m.same(y),
    "flatten layer": lambda m, y: m.flat(y.view(4, 2, 2)),
    "unflatten layer": lambda m, y: m.split(y).view(4, 4),
    "dropout": lambda m, y: F.dropout(y, 0.5, m.training),
    "dropout of nothing": lambda m, y: F.dropout(y, 0.0, True),
    "dropout layer": lambda m, y: m.drop(y),
    "ravel": lambda m, y: y.ravel().view(4, 4),
    "adjoint": lambda m, y: y.adjoint(),
    "broadcast_to": lambda m, y: torch.broadcast_to(y, (4, 4)),
    "narrow": lambda m, y: torch.narrow(input=y, dim=1, start=0, length=4),
    "conj": lambda m, y: y.conj(),
    "positive": lambda m, y: torch.positive(y),
    "contiguous": lambda m, y: y.contiguous(),
    "broadcast together": lambda m, y: torch.broadcast_tensors(y, y[0] * 2)[0],
    "complex": lambda m, y: torch.view_as_real(torch.view_as_complex(y.view(4, 2, 2))).view(4, 4),
}  # fmt: skip
COPIES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "double": lambda m, y: y.double().float(),
    "contiguous": lambda m, y: y.t().contiguous(),
    "reshape": lambda m, y: y.t().reshape(16).view(4, 4),
    "flatten": lambda m, y: y.t().flatten().view(4, 4),
    "clone": lambda m, y: y.clone(),
    "picked": lambda m, y: y[[0, 1, 2, 3]],
}


def written(
    view: Callable[[Any, torch.Tensor], torch.Tensor],
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        view(m, y).add_(m.one(x))
        return y + m.two(x)

    return function


@pytest.mark.parametrize("name", ALIASES)
def test_a_write_through_another_name_of_a_tensor_is_live(name: str) -> None:
    found = verdicts(Pair(written(ALIASES[name])).eval(), "all-linear", torch.randn(4, 4))
    assert {n: e.verdict for n, e in found.items()} == {"one": "live", "two": "live"}


@pytest.mark.parametrize("name", COPIES)
def test_a_write_into_a_copy_of_a_tensor_is_dead(name: str) -> None:
    found = verdicts(Pair(written(COPIES[name])), "all-linear", torch.randn(4, 4))
    assert {n: e.verdict for n, e in found.items()} == {"one": "dead", "two": "live"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["dropout", "dropout layer"])
def test_what_a_dropout_hands_on_follows_from_the_mode_of_the_graph(
    name: str, training: bool
) -> None:
    x = torch.randn(4, 4)
    traced = fxlora.trace(Pair(written(ALIASES[name])).train(not training), (x,))
    lora = filled(fxlora.rewrite(traced, LoraConfig(r=2, target_modules="all-linear")))
    lora.train(training)
    assert reached_parameters(lora) == arrived(lora, tensors(lora(x)))
    assert next(iter(effects(lora))).verdict == ("dead" if training else "live")


def over(y: torch.Tensor, index: Any, value: torch.Tensor) -> torch.Tensor:
    y[index] = value
    return y


# All of y is written over by v.
COVERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "every slice": lambda y, v: over(y, (slice(None), slice(None)), v),
    "an ellipsis and a slice": lambda y, v: over(y, (..., slice(None)), v),
    "as rows": lambda y, v: y.view(-1).copy_(v.view(-1)),
    "with one more dimension": lambda y, v: y[None].copy_(v),
    "turned": lambda y, v: y.t().copy_(v),
    "from the first to the last": lambda y, v: y[:, 0:4].copy_(v),
    "zeroed first": lambda y, v: (y[None].zero_(), y.add_(v)),
}


@pytest.mark.parametrize("name", COVERS)
def test_what_is_written_over_through_a_view_of_all_of_it_is_cut(name: str) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.two(x)
        COVERS[name](y, m.one(x))
        return y

    found = verdicts(Pair(function), "all-linear", torch.randn(4, 4))
    assert {n: e.verdict for n, e in found.items()} == {"one": "live", "two": "cut"}
    assert "is zero everywhere" in found["two"].reason


def test_a_part_that_is_written_over_leaves_the_rest_live() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.two(x)
        y[:, 1:].copy_(m.one(x)[:, 1:])
        y.view(2, 8)[:, :1].zero_()
        return y

    found = verdicts(Pair(function), "all-linear", torch.randn(4, 4))
    assert {e.verdict for e in found.values()} == {"live"}


def test_a_write_through_a_detached_name_is_cut_and_leaves_the_tensor_s_gradient() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.two(x)
        y.detach().add_(m.one(x))
        return y * 2

    found = verdicts(Pair(function), "all-linear", torch.randn(4, 4))
    assert {n: e.verdict for n, e in found.items()} == {"one": "cut", "two": "live"}


def test_what_was_read_before_a_detach_in_place_is_live() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y, z = m.one(x), m.two(x)
        early = y * 2
        y.detach_()
        z.detach_()
        return early + y + z

    found = verdicts(Pair(function), "all-linear", torch.randn(4, 4))
    assert {n: e.verdict for n, e in found.items()} == {"one": "live", "two": "cut"}


# ---- one case for each verdict -------------------------------------------------------------------


class Cases(nn.Module):
    """One linear layer for every fate an adapter can have."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("live", "past", "both", "unused", "cut", "quiet", "flat", "dead", "twice"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dead(x)
        cut = self.cut(x).detach()
        with torch.no_grad():
            quiet = self.quiet(x)
        flat = torch.round(self.flat(x))
        y = self.live(x) + F.linear(x, self.past.weight)
        y = y + self.both(x) + F.linear(x, self.both.weight)
        return self.twice(self.twice(y)) + cut + quiet + flat


def verdicts(model: nn.Module, targets: Any, *args: Any, **settings: Any) -> dict[str, Effect]:
    traced = fxlora.trace(model, args)
    lora = fxlora.rewrite(traced, LoraConfig(r=2, target_modules=targets, **settings))
    filled(lora)
    found = {e.site: e for e in effects(lora)}
    assert reached_parameters(lora) == arrived(lora, tensors(lora(*args)))
    for e in found.values():
        witnessed(lora, e)
        assert e.live == moves(lora, e), e
    return found


def test_every_verdict_is_told_from_the_graph() -> None:
    found = verdicts(Cases(), "all-linear", torch.randn(2, 4))
    assert {n: e.verdict for n, e in found.items()} == {
        "live": "live", "past": "bypassed", "both": "partial", "unused": "inert", "cut": "cut",
        "quiet": "cut", "flat": "cut", "dead": "dead", "twice": "live",
    }  # fmt: skip
    assert "detach" in found["cut"].reason
    assert "shared by 2 calls" in found["twice"].reason
    assert found["past"].bypassing == found["past"].bypassing[:1] != ()
    assert found["live"].witness[-1] == "output"
    assert found["cut"].witness[-1].startswith("detach")
    assert "torch.no_grad()" in found["quiet"].reason
    assert found["flat"].reason == "the derivative of 'round' is zero everywhere (round_1)"
    assert found["dead"].witness == found["past"].witness == found["unused"].witness == ()


def test_an_alias_is_adapted_where_its_first_name_stands() -> None:
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.rest = nn.Module()
    model.rest.b = model.a
    model.forward = lambda x: model.rest.b(model.a(x))
    found = verdicts(model, ["a"], torch.randn(2, 4))
    assert found["a"].verdict == "partial"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_half_of_an_encoder_s_adapters_are_bypassed(training: bool) -> None:
    # In eval mode torch's fused kernel would read every weight past its layer; a graph has none.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    found = verdicts(model, ["out_proj", "linear1"], torch.randn(2, 3, 8))
    assert {n.rpartition(".")[2]: e.verdict for n, e in found.items()} == {
        "out_proj": "bypassed", "linear1": "live",
    }  # fmt: skip
    assert len(found) == 4
    assert found["layers.1.linear1"].witness[-1] == "output"
    everything = verdicts(model, "all-linear", torch.randn(2, 3, 8))
    assert [n for n, e in everything.items() if not e.live] == [
        "layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj",
    ]  # fmt: skip


def attention(targets: Any, read: str = "output") -> dict[str, str]:
    spec = Network((Part(Attention, (("weights", True), ("read", read))),))
    (x,), _ = spec.inputs(3)
    return {n: e.verdict for n, e in verdicts(spec.build(), targets, x).items()}


def test_attention_s_own_adapters_are_live_where_its_output_is_read() -> None:
    prefix = "body.0.mha"
    assert attention(["mha"]) == {prefix: "live", f"{prefix}.out_proj": "live"}
    assert attention(["mha"], "weights") == {prefix: "live", f"{prefix}.out_proj": "dead"}


@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"])
def test_attention_s_output_layer_is_bypassed_alone_and_under_all_linear(targets: Any) -> None:
    assert attention(targets) == {"body.0.mha.out_proj": "bypassed"}


def decoder(cls: str, config: str, **settings: Any) -> tuple[dict[str, str], list[str]]:
    """Returns the verdicts of a tiny model under all-linear, and the names of what is left out."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}
    made = getattr(transformers, config)(**sizes, **settings)
    inputs = {"input_ids": torch.randint(3, 90, (2, 8)), "use_cache": False}
    traced = fxlora.trace(getattr(transformers, cls)(made), (), inputs)
    lora = filled(fxlora.rewrite(traced, LoraConfig(r=2, target_modules="all-linear")))
    assert reached_parameters(lora) == arrived(lora, tensors(lora(**inputs)))
    for e in effects(lora):
        witnessed(lora, e)
        assert e.live == moves(lora, e), e
    short = {e.site.partition("layers.")[2]: e.verdict for e in effects(lora)}
    left = [p.name.partition("layers.")[2] for p in info(lora).plan if not p.adapted]
    return short, [n for n in left if n]


ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


@pytest.mark.filterwarnings("ignore")
def test_mamba_s_step_projection_is_bypassed() -> None:
    found, _ = decoder("MambaForCausalLM", "MambaConfig", state_size=4, time_step_rank=2)
    assert {n: v for n, v in found.items() if n.startswith("0.")} == {
        "0.mixer.in_proj": "live", "0.mixer.x_proj": "live", "0.mixer.dt_proj": "bypassed",
        "0.mixer.out_proj": "live",
    }  # fmt: skip


def test_all_linear_skips_deepseek_s_dense_and_shared_mlps() -> None:
    found, left = decoder(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", **ATTENTION, **EXPERTS, n_routed_experts=4,
        n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    dense = [f"0.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    shared = [f"1.mlp.shared_experts.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    assert left == [*dense, *shared]
    routed = ("1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "1.mlp.gate.weight")
    assert {n: v for n, v in found.items() if "mlp" in n} == dict.fromkeys(routed, "live")
    assert set(found.values()) == {"live"}


def test_all_linear_adapts_qwen_s_router_and_its_gradient_arrives() -> None:
    found, left = decoder(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **ATTENTION, **EXPERTS, num_experts=4, head_dim=8
    )
    assert left == []
    assert {n: v for n, v in found.items() if n.startswith("0.mlp")} == {
        "0.mlp.gate.weight": "live", "0.mlp.experts.gate_up_proj": "live",
        "0.mlp.experts.down_proj": "live",
    }  # fmt: skip


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
