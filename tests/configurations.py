"""Random small networks with named layers of every kind, and random LoraConfigs for them.

Both are data: a `Wide` prints how it is built, a drawn configuration is a dict of fields. Values
are good and bad; which of them PEFT takes is for PEFT to say.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from torch import nn
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D
from zoo import ZOO

import fxlora
from fxlora.sites import kind_of

WIDTH, VOCAB = 6, 11
_X = (2, 3, WIDTH)


# ---- parts: all map (batch, length, WIDTH) to the same ------------------------------------------


class Attn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 8)
        self.down_proj = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attn = Attn()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Blocks one level down, so that a layer index has a name in front of its name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Gpt(nn.Module):
    """transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(8, WIDTH)
        self.c_proj = Conv1D(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(torch.tanh(self.c_attn(x)))


class Convolved(nn.Module):
    """A grouped convolution over the length, and one over both dimensions."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups, bias=groups == 1)
        self.conv2 = nn.Conv2d(2, 2, (1, 3), padding=(0, 1), groups=groups % 2 + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.conv2(torch.stack((x, y), 1)).mean(1)


class Text(nn.Module):
    """A language model's two ends, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(x.argmax(-1)) + x)[..., :WIDTH]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mha(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """One layer under two names, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = self.one
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(self.one(x)))) + self.two(x)


class Experts(nn.Module):
    """Stacks of weights, and parameters of other dimensions beside them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((3, WIDTH, 8), (3, 8, WIDTH)) if is_transposed else ((3, 8, WIDTH), (3, WIDTH, 8))
        self.up = nn.Parameter(torch.randn(shapes[0]) / 3)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.down = nn.Parameter(torch.randn(shapes[1]) / 3)
        self.router = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        up, down = self.up, self.down
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        each = torch.bmm(torch.tanh(torch.bmm(flat.expand(3, *flat.shape), up)), down)
        weights = torch.softmax(flat @ self.router.t(), -1)
        return (each * weights.t().unsqueeze(-1)).sum(0).view_as(x) * self.scale


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(is_transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(torch.tanh(self.gate(x)))


class Half(nn.Module):
    """Layers in half precision between layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)
        self.words = nn.Embedding(VOCAB, WIDTH).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x.to(torch.bfloat16)) + self.words(x.argmax(-1))).to(x.dtype)


class Squared(nn.Module):
    """A parameter of three dimensions in a layer PEFT does not adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bilinear(x, x)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.ModuleList(Block() for _ in range(2)),
    "model": Decoder,
    "gpt": Gpt,
    "plain_conv": lambda: Convolved(1),
    "grouped_conv": lambda: Convolved(2),
    "text": lambda: Text(False),
    "tied": lambda: Text(True),
    "heads": Heads,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "twice": Twice,
    "moe": lambda: Mixture(False),
    "transposed_moe": lambda: Mixture(True),
    "low": Half,
    "squared": Squared,
    "classifier": lambda: nn.Linear(WIDTH, WIDTH),
    "qa_outputs": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
}
SMALL_TRANSFORMERS = ("gpt2", "llama", "bert")


class Settings:
    """A config as transformers has one: a model type, and whether the two ends are tied."""

    def __init__(self, model_type: str, tied: bool) -> None:
        self.model_type, self.tie_word_embeddings = model_type, tied

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Net(nn.Module):
    """Parts one after another, and a parameter of the model itself."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.randn(WIDTH, WIDTH))
        for name in parts:
            self.add_module(name, PARTS[name]())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            for layer in part if isinstance(part, nn.ModuleList) else (part,):
                x = layer(x)
        return x @ self.top


class Typed(Net):
    """A network with a config."""

    def __init__(self, parts: tuple[str, ...], model_type: str) -> None:
        super().__init__(parts)
        self.config = Settings(model_type, "tied" in parts)


class Embedded(Typed):
    """A network that can be asked for its embedding, as transformers' models can."""

    def __init__(self, parts: tuple[str, ...], model_type: str) -> None:
        super().__init__(parts, model_type)
        if "tied" in parts:
            self._tied_weights_keys = {"tied.lm_head.weight": "tied.embed_tokens.weight"}

    def get_input_embeddings(self) -> nn.Module:
        owner = getattr(self, "tied", None) or self.text
        return owner.embed_tokens


@dataclass(frozen=True)
class Wide:
    """How a network is built.

    Attributes:
        parts: names in PARTS; or one name in SMALL_TRANSFORMERS.
        model_type: of the config-like object the network has; "" when it has none.
    """

    parts: tuple[str, ...]
    model_type: str = ""

    def build(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Makes the model and its example inputs: the same bits every time."""
        torch.manual_seed(3)
        if self.parts[0] in SMALL_TRANSFORMERS:
            entry = ZOO[self.parts[0]]
            return entry.build(), (), entry.inputs(2, 6)
        if not self.model_type:
            net = Net(self.parts)
        else:
            typed = Embedded if {"text", "tied"} & set(self.parts) else Typed
            net = typed(self.parts, self.model_type)
        return net, (torch.randn(_X),), {}


@functools.cache
def traced(spec: Wide) -> tuple[nn.Module, GraphModule]:
    """Returns the model and its trace; made once, because nothing may change either."""
    model, args, kwargs = spec.build()
    return model, fxlora.trace(model, args, kwargs)


class Names(NamedTuple):
    """The modules, the layers an adapter may hang on, and the parameters of a network."""

    modules: tuple[str, ...]
    layers: tuple[str, ...]
    parameters: tuple[str, ...]


@functools.cache
def names(spec: Wide) -> Names:
    """Returns what may be named of a network: by name, and by dotted suffix."""
    model, _ = traced(spec)
    modules = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    layers = [n for n, m in model.named_modules() if n and kind_of(type(m)) is not None]
    parameters = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    return Names(*(tuple(_suffixes(n)) for n in (modules, layers or modules, parameters)))


def _suffixes(full: list[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in full:
        parts = name.split(".")
        for i in range(len(parts)):
            found[".".join(parts[i:])] = None
    return sorted(found, key=lambda n: (n.count("."), n))


@st.composite
def wides(draw: Any) -> Wide:
    """Draws a network."""
    if draw(st.integers(0, 9)) == 9:
        return Wide((draw(st.sampled_from(SMALL_TRANSFORMERS)),))
    parts = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=3, unique=True))
    kind = draw(st.sampled_from(("", "", "", "llama", "opt", "mamba", "unheard_of")))
    return Wide(tuple(parts), kind)


# ---- configurations ------------------------------------------------------------------------------

WRONG = st.sampled_from(
    (None, "x", "", 1.5, True, False, 0, 3, -1, (), [], {}, [None], [1], {"x": 1})
)
ODD_PATTERNS = st.sampled_from(
    (None, [], "x", True, {"(": 2}, {"[a-": 2}, {"*": 3}, {1: 2}, {"q_proj": 2, "(": 3}, {None: 2})
)
REGEXES = (
    ".*", r".*\.q_proj", "q_proj|v_proj", r".*(proj|lin)", "(", "[", "*", "^layers", r"\d", "",
    "all-linear", "ALL-LINEAR", "All-Linear", r".*\.(0|1)\..*_proj",
)  # fmt: skip
INITS = (
    True,
    True,
    False,
    False,
    0,
    "gaussian",
    "gaussian",
    "Gaussian",
    "pissa",
    "pissa_niter_2",
    "olora",
    "OLoRA",
    "orthogonal",
    "orthogonal",
    "mica",
    "pissa_niter_x",
    "PiSSA",
    "pissa_",
    "pissa_niter_2_niter_3",
    "Orthogonal",
    "MICA",
    "eva",
    "corda",
    "loftq",
    "lora_ga",
    "nonsense",
    "",
    1,
    1.5,
    ["gaussian"],
)
ODD_ROWS = ([], [11], [99], (0, 1), [1.5], [None], [True], 3, "x")


def _containers(listed: st.SearchStrategy[list[Any]]) -> st.SearchStrategy[Any]:
    return st.one_of(listed, listed, listed.map(tuple), listed.map(set))


def _names(modules: tuple[str, ...]) -> st.SearchStrategy[str]:
    odd = st.sampled_from(
        ("", "0", "1", "nothing", "proj", "(", ".*", "layers.0", "default", "weight")
    )
    return st.one_of(*[st.sampled_from(modules)] * 5, odd)


def _patterns(modules: tuple[str, ...], values: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    one = st.sampled_from(modules)
    key = st.one_of(
        _names(modules).filter(lambda n: n != "("),
        st.lists(one, min_size=2, max_size=2).map("|".join),
        one.map(lambda n: f"^{n}"),
        one.map(lambda n: f"{n}$"),
        st.sampled_from((".*", r".*proj", r"\d", "q_proj", "layers")),
    )
    return st.dictionaries(key, st.sampled_from(values), min_size=1, max_size=3)


def _bd(modules: tuple[str, ...], blocks: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    listed = st.one_of(st.none(), st.lists(_names(modules), max_size=2))
    drawn = st.fixed_dictionaries(
        {
            "target_modules_bd_a": listed,
            "target_modules_bd_b": listed,
            "nblocks": st.sampled_from(blocks),
            "match_strict": st.booleans(),
        }
    )
    return st.one_of(drawn, drawn.filter(_bd_is_one).map(lambda d: BdLoraConfig(**d)))


def _bd_is_one(values: dict[str, Any]) -> bool:
    first, second = values["target_modules_bd_a"] or (), values["target_modules_bd_b"] or ()
    return not set(first) & set(second)


def _rows(modules: tuple[str, ...], rows: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    layers = st.sampled_from(("embed_tokens", "embed_tokens", "lm_head", "wte", "nothing"))
    layer = st.one_of(layers, layers, _names(modules))
    drawn = st.sampled_from(rows)
    return st.one_of(drawn, st.dictionaries(layer, drawn, min_size=1, max_size=2))


def good(modules: tuple[str, ...], parameters: tuple[str, ...]) -> dict[str, Any]:
    """Returns a strategy of values PEFT may take, for every field a plan reads."""
    of = st.sampled_from
    listed = _containers(st.lists(_names(modules), max_size=3, unique=True))
    flag = of((True, True, False))
    named = st.lists(of(parameters), min_size=1, max_size=3, unique=True)
    layers = st.lists(of((0, 1, -1, 2)), max_size=2)
    return {
        "r": of((1, 2, 3, 4, 8, 12)),
        "lora_alpha": of((1, 5, 0, -3, 7.5, float("inf"))),
        "lora_dropout": of((0.0, 0.3, 1.0, 1, 0)),
        "use_rslora": flag,
        "rank_pattern": _patterns(modules, (1, 2, 3, 4, 6)),
        "alpha_pattern": _patterns(modules, (1, 2, 3.5, 0, -1)),
        "target_modules": st.one_of(listed, listed, of(REGEXES), _names(modules), st.none()),
        "exclude_modules": st.one_of(listed, listed, of(REGEXES), _names(modules)),
        "layers_to_transform": st.one_of(of((0, 1, -1, 7)), layers, layers),
        "layers_pattern": of(("layers", ["layers"], "h", ["blocks", "layers"], [], "", "lay.rs")),
        "modules_to_save": st.lists(_names(modules), max_size=2),
        "target_parameters": named,
        "bias": of(("none", "all", "lora_only", "boft_only")),
        "lora_bias": flag,
        "fan_in_fan_out": flag,
        "use_dora": flag,
        "kasa_config": st.just(KasaConfig()),
        "use_bdlora": _bd(modules, (1, 2, 2, 3)),
        "init_lora_weights": of(INITS[:16]),
        "trainable_token_indices": _rows(modules, ([0], [0, 2], [2, 0], [0, 0], [-1], [10])),
        "inference_mode": flag,
        "task_type": of(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION")),
    }  # fmt: skip


def bad(modules: tuple[str, ...], parameters: tuple[str, ...]) -> dict[str, Any]:
    """Returns a strategy of values that are odd or wrong, for the same fields."""
    of = st.sampled_from
    layer = of((0, 1, "0", True, 1.0))
    flag = of((None, 0, 1, "x", []))
    saved = _containers(st.lists(_names(modules), max_size=3))
    named = st.one_of(of(parameters), of(parameters), _names(modules))
    return {
        "r": of((0, -1, True, False, 2.0, "4", None)),
        "lora_alpha": of((float("nan"), "8", None, True, [1])),
        "lora_dropout": of((-0.5, 1.5, None, "0.1", True, float("nan"), [0.1])),
        "use_rslora": flag,
        "rank_pattern": st.one_of(_patterns(modules, (0, -1, True, 2.0, "4", None)), ODD_PATTERNS),
        "alpha_pattern": st.one_of(_patterns(modules, (True, "4", None)), ODD_PATTERNS),
        "target_modules": WRONG,
        "exclude_modules": WRONG,
        "layers_to_transform": st.one_of(
            of(((0,), {0}, "0", 1.0, ())), st.lists(layer, max_size=2), WRONG
        ),
        "layers_pattern": of(("lay[", ("layers",), {"layers"}, 5, True, [1], "0")),
        "modules_to_save": st.one_of(saved, _names(modules), WRONG),
        "target_parameters": st.one_of(
            _containers(st.lists(named, max_size=3, unique=True)), named, WRONG
        ),
        "bias": of(("_only", "x", "", None, True, ["all"])),
        "lora_bias": flag,
        "fan_in_fan_out": flag,
        "use_dora": flag,
        "kasa_config": of(({}, {"beta": 1.0}, True, "x", {"beta": "x"})),
        "use_bdlora": st.one_of(_bd(modules, (5, 0, -1, "2")), WRONG),
        "init_lora_weights": of(INITS[16:]),
        "trainable_token_indices": st.one_of(_rows(modules, ODD_ROWS), WRONG),
        "inference_mode": flag,
        "task_type": of(("SEQ_2_SEQ_LM", "nonsense", None, 5)),
    }  # fmt: skip


@st.composite
def fields(draw: Any, spec: Wide) -> dict[str, Any]:
    """Draws the fields of a LoraConfig: likely targets, a few good values, and at most one bad one."""
    modules, layers, parameters = names(spec)
    fine, odd = good(modules, parameters), bad(modules, parameters)
    chosen: dict[str, Any] = {"r": draw(st.sampled_from((1, 2, 4))), "lora_alpha": 6}
    likely = st.lists(st.sampled_from(layers), min_size=1, max_size=3, unique=True)
    chosen["target_modules"] = draw(
        st.one_of(likely, likely, likely, st.sampled_from(("all-linear", None, [])))
    )
    few = st.lists(st.sampled_from(sorted(fine)), min_size=0, max_size=3, unique=True)
    for name in draw(few):
        chosen[name] = draw(fine[name])
    if chosen["target_modules"] in (None, []) or draw(st.integers(0, 9)) == 9:
        chosen["target_parameters"] = draw(fine["target_parameters"])
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(odd)))
        chosen[name] = draw(odd[name])
    return chosen


def config(chosen: dict[str, Any]) -> tuple[LoraConfig, Exception | None]:
    """Makes a LoraConfig; where its constructor refuses, one whose fields were set afterwards."""
    chosen = copy.deepcopy(chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return LoraConfig(**chosen), None
        except Exception as e:
            made = LoraConfig()
            for name, value in chosen.items():
                setattr(made, name, value)
            return made, e
