"""Small random networks: every way a model may hold and read a weight, drawn from a printable spec.

A `Network` is data: its repr is the failing example, and `build()` makes the same module again.
All parts map (batch, WIDTH) to (batch, WIDTH), so any list of them is a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

WIDTH = 4
SHIFT = torch.tensor([0.5, -1.0, 0.25, 2.0])  # a constant that no module owns


# ---- parts: one linear map, read one way -----------------------------------------------------


class Linear(nn.Module):
    """One linear layer, called as a module."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class Bottleneck(nn.Module):
    """Two layers of other shapes than the rest, and a name that is a suffix of another."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 3, bias=bias)
        self.up_lin = nn.Linear(3, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up_lin(F.gelu(self.lin(x)))


class Transposed(nn.Module):
    """transformers' Conv1D, whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = Conv1D(3, WIDTH)
        self.back = Conv1D(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.lin(x))


class Functional(nn.Module):
    """A parameter of its own, multiplied without a layer around it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "linear":
            return F.linear(x, self.w, self.bias)
        if self.how == "addmm":
            return torch.addmm(self.bias, x, self.w)
        if self.how == "einsum":
            return torch.einsum("bi,oi->bo", x, self.w)
        if self.how == "method":
            return x.matmul(self.w.t())
        return x @ self.w + self.bias


class Bypass(nn.Module):
    """A layer whose weight is read without calling the layer."""

    def __init__(self, call_too: bool, bias: bool) -> None:
        super().__init__()
        self.call_too = call_too
        self.lin = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.lin.weight, self.lin.bias)
        return y + self.lin(x) if self.call_too else y


class Shared(nn.Module):
    """One layer called several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.lin(x))
        return x


class Alias(nn.Module):
    """One layer under two names."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.call == "first":
            return self.a(x)
        if self.call == "second":
            return self.b(x)
        return self.b(torch.relu(self.a(x)))


class AliasedBlock(nn.Module):
    """A block with a layer in it, under two names; the inner name exists twice too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear(True)
        self.again = self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.tanh(self.inner(x)))


class TiedPair(nn.Module):
    """Two layers that share one Parameter."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class TiedEmbedding(nn.Module):
    """A language model's two ends: the embedding is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x.argmax(-1)) + x)


# ---- parts: structure ------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, index: int, differ: str) -> None:
        super().__init__()
        odd = index == 1
        inner = 3 if odd and differ == "shape" else WIDTH
        self.index = index  # differs always, is never read
        self.scale = 2.0 if odd and differ == "attribute" else 1.0
        self.settings = {"act": "relu" if odd and differ == "nested attribute" else "tanh"}
        self.wide = odd and differ == "dtype flag"
        self.lin = nn.Linear(WIDTH, inner, bias=not (odd and differ == "bias"))
        self.back = nn.Linear(inner, WIDTH)
        self.drop = nn.Dropout(0.5 if odd and differ == "dropout" else 0.25)
        if differ == "buffer":
            self.register_buffer("shift", torch.full((WIDTH,), float(index)))
        else:
            self.shift = None
        if odd and differ == "frozen":
            self.lin.requires_grad_(False)
        if odd and differ == "mode":
            self.drop.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x.double() if self.wide and x.dtype is torch.float64 else x)
        h = torch.relu(h) if self.settings["act"] == "relu" else torch.tanh(h)
        h = self.drop(self.back(h)) * self.scale
        return x + (h if self.shift is None else h + self.shift)


class Blocks(nn.Module):
    """Three blocks of one class; the middle one may differ in one respect."""

    def __init__(self, differ: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(i, differ) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, state: dict[str, Any], bias: Any = None) -> Any:
        y = self.lin(x) if bias is None else self.lin(x) + bias
        return y, {"sum": state["sum"] + y, "last": [y]}


class Passing(nn.Module):
    """Blocks that hand a tuple and a dict on, and get a keyword only sometimes."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.bias = bias
        self.layers = nn.ModuleList(_Pair() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: dict[str, Any] = {"sum": torch.zeros_like(x), "last": []}
        for i, layer in enumerate(self.layers):
            x, state = layer(x, state, bias=x if self.bias and i == 1 else None)
        return x + state["sum"] + state["last"][0]


class Repeated(nn.Module):
    """An nn.Sequential that holds one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        lin = nn.Linear(WIDTH, WIDTH)
        self.seq = nn.Sequential(lin, nn.ReLU(), lin)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: Part) -> None:
        super().__init__()
        self.inner = inner.build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Unused(nn.Module):
    """A layer that is never called beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


# ---- parts: everything around a linear map ------------------------------------------------------


class Dropout(nn.Module):
    """Dropout, as a module or as a function that is told the mode."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3) if module else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop is not None:
            return self.drop(x)
        return F.dropout(x, 0.3, training=self.training)


class InPlace(nn.Module):
    """A tensor that is written to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        out = torch.zeros_like(x)
        if self.how == "add_":
            return y.add_(x)
        if self.how == "operator":
            y += x
            return y
        if self.how == "statement":
            y.add_(x)
            return y
        if self.how == "setitem":
            out[:, 1] = y[:, 0]
            return out + x
        if self.how == "view":
            out[:, :2].add_(y[:, 2:])
            return out + x
        out.index_add_(1, torch.tensor([1, 0]), y[:, :2])
        return out + x


class Buffer(nn.Module):
    """A tensor that is no parameter: a buffer, a lifted constant, or a plain attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how in ("persistent", "fleeting"):
            self.register_buffer("shift", torch.randn(WIDTH), persistent=how == "persistent")
        if how == "attribute":
            self.shift = torch.randn(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "global":
            return x + SHIFT.to(x.dtype)
        if self.how == "inline":
            return x * torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=x.dtype)
        if self.how == "attribute":
            return x + self.shift.to(x.dtype)
        return x + self.shift


class Halves(nn.Module):
    """One projection, cut in two."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if self.how == "chunk":
            a, b = y.chunk(2, dim=-1)
        elif self.how == "split":
            a, b = torch.split(y, WIDTH, dim=-1)
        elif self.how == "slice":
            a, b = y[:, :WIDTH], y[..., WIDTH:]
        else:
            a, b = y.view(x.size(0), 2, -1).unbind(1)
        return a * torch.sigmoid(b)


class Views(nn.Module):
    """Heads: view, transpose, and back, by the sizes of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, d = x.shape
        y = x.view(b, 2, d // 2).transpose(1, 2)
        return (y.reshape(b, -1) + x[:, [1, 0, 3, 2]]) / x.size(-1)


class Region(nn.Module):
    """A layer behind a wall gradient does not pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                y = self.lin(x)
            return x + y
        if self.how == "nested":
            with torch.no_grad():
                y = x * 2
                with torch.enable_grad():
                    y = self.lin(y)
                y = y + 1
            return x + y
        if self.how == "decorator":
            return x + self._quiet(x)
        return x + self.lin(x).detach()

    @torch.no_grad()
    def _quiet(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class Branch(nn.Module):
    """Python that chooses: by a setting, by a size the weights fix, or by the batch."""

    def __init__(self, on: str, setting: int) -> None:
        super().__init__()
        self.on, self.setting = on, setting
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.on == "setting":
            first = self.setting > 1
        elif self.on == "width":
            first = x.size(1) == WIDTH
        else:
            first = x.size(0) > self.setting
        return self.one(x) if first else self.two(x)


class Norm(nn.Module):
    """A normalisation with parameters, and for batch norm with state."""

    def __init__(self, batch: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if batch else nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Sizes(nn.Module):
    """Numbers computed from sizes, and positions made of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        if self.how == "scalar":
            return x * (n**0.5) + n // 2
        if self.how == "arange":
            return x + torch.arange(n, dtype=x.dtype)[:, None]
        if self.how == "cat":
            return torch.cat([x, x.new_ones(n, 1)], dim=1)[:, 1:]
        return F.pad(x, (0, 0, 1, 0))[1 : n + 1]  # every row stays: a lost one has no gradient


# ---- specs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A part's class and its options; `build()` draws its weights from torch's generator."""

    cls: type[nn.Module]
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        return self.cls(**dict(self.options))

    def __repr__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{k}={v!r}' for k, v in self.options)})"


@dataclasses.dataclass
class Batch:
    """A dataclass input or output."""

    x: torch.Tensor
    extra: Any = None


class Named(NamedTuple):
    """A named tuple input or output."""

    x: torch.Tensor
    extra: Any = None


class Net(nn.Module):
    """The parts of a spec, one after another, behind one shape of inputs and outputs."""

    def __init__(self, spec: Network) -> None:
        super().__init__()
        self.gives = spec.gives
        built = [p.build() for p in spec.parts]
        self.body: nn.Module = (
            nn.Sequential(*built) if spec.layout == "sequential" else nn.ModuleList(built)
        )
        self.layout = spec.layout

    def run(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> Any:
        seen = [x]
        if self.layout == "sequential":
            x = self.body(x)
        else:
            for part in self.body:
                x = part(x)
                seen.append(x)
        if extra is not None:
            x = x + extra
        if self.gives == "tensor":
            return x
        if self.gives == "dict":
            return {"x": x, "seen": seen, "none": None, "n": 3}
        if self.gives == "tuple":
            return x, [seen[0] * 2, (x,)]
        if self.gives == "named":
            return Named(x, (seen[-1], x))
        return Batch(x, {"twice": x * 2})


class Plain(Net):
    """One tensor."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(x)


class Optional(Net):
    """A second tensor that may be left out, and a flag."""

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None, flag: bool = True) -> Any:
        return self.run(x, extra if flag else None)


class Keyword(Net):
    """Keyword-only arguments."""

    def forward(self, *, x: torch.Tensor, extra: torch.Tensor | None = None) -> Any:
        return self.run(x, extra)


class Star(Net):
    """Any number of tensors."""

    def forward(self, *xs: torch.Tensor) -> Any:
        return self.run(*xs)


class Nested(Net):
    """A dict of containers."""

    def forward(self, batch: dict[str, Any]) -> Any:
        (x,), extra = batch["x"], batch["more"]["extra"]
        return self.run(x, extra)


class Fields(Net):
    """A dataclass or a named tuple, read by field."""

    def forward(self, batch: Any) -> Any:
        return self.run(batch.x, batch.extra)


TAKES: dict[str, type[Net]] = {
    "plain": Plain,
    "optional": Optional,
    "given": Optional,
    "keyword": Keyword,
    "star": Star,
    "nested": Nested,
    "dataclass": Fields,
    "named": Fields,
}
GIVES = ("tensor", "dict", "tuple", "named", "dataclass")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as data.

    Attributes:
        parts: run one after another.
        takes: the shape of the inputs, a key of TAKES.
        gives: the shape of the outputs, one of GIVES.
        layout: whether the parts live in a "list" or a "sequential".
        double: float64 instead of float32.
        grad: whether the example input requires grad.
        training: the mode the model is in when it is traced.
    """

    parts: tuple[Part, ...]
    takes: str = "plain"
    gives: str = "tensor"
    layout: str = "list"
    double: bool = False
    grad: bool = False
    training: bool = False

    def build(self) -> Net:
        """Returns the model; the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = TAKES[self.takes](self)
        flags = [(m, m.training) for m in model.modules()]
        model.train(self.training)
        for m, mode in flags:  # a block may have put a child of its own in eval mode
            if not mode:
                m.eval()
        return model.double() if self.double else model

    def inputs(self, batch: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns (args, kwargs) for one call."""
        draw = torch.Generator().manual_seed(100 + seed)
        dtype = torch.float64 if self.double else torch.float32
        x = torch.randn(batch, WIDTH, generator=draw, dtype=dtype).requires_grad_(self.grad)
        extra = torch.randn(batch, WIDTH, generator=draw, dtype=dtype)
        return {
            "plain": ((x,), {}),
            "optional": ((x,), {"flag": False}),
            "given": ((x, extra), {}),
            "keyword": ((), {"x": x, "extra": extra}),
            "star": ((x, extra), {}),
            "nested": (({"x": (x,), "more": {"extra": extra}},), {}),
            "dataclass": ((Batch(x, extra),), {}),
            "named": ((Named(x),), {}),
        }[self.takes]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields every tensor of an output, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for k in value:
            yield from tensors(value[k])
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors(getattr(value, f.name))


# ---- strategies ------------------------------------------------------------------------------------


def _part(cls: type[nn.Module], **options: Any) -> st.SearchStrategy[Part]:
    return st.fixed_dictionaries({k: st.sampled_from(v) for k, v in options.items()}).map(
        lambda chosen: Part(cls, tuple(chosen.items()))
    )


BOTH = (True, False)
DIFFER = (
    "nothing", "attribute", "nested attribute", "shape", "dtype flag", "bias", "frozen", "buffer",
    "dropout", "mode",
)  # fmt: skip

SITES = (
    _part(Linear, bias=BOTH),
    _part(Bottleneck, bias=BOTH),
    _part(Transposed),
    _part(Bypass, call_too=BOTH, bias=BOTH),
    _part(Shared, times=(2, 3)),
    _part(Alias, call=("both", "first", "second")),
    _part(AliasedBlock),
    _part(TiedPair, bias=BOTH),
    _part(TiedEmbedding),
    _part(Blocks, differ=DIFFER),
    _part(Passing, bias=BOTH),
    _part(Repeated),
    _part(Unused),
    _part(InPlace, how=("add_", "operator", "statement", "setitem", "view", "index_add_")),
    _part(Halves, how=("chunk", "split", "slice", "unbind")),
    _part(Region, how=("no_grad", "nested", "decorator", "detach")),
    _part(Branch, on=("setting", "width", "batch"), setting=(1, 2)),
)
OTHERS = (
    _part(Functional, how=("linear", "addmm", "einsum", "method", "operator")),
    _part(Dropout, module=BOTH),
    _part(Buffer, how=("persistent", "fleeting", "global", "inline", "attribute")),
    _part(Views),
    _part(Norm, batch=BOTH),
    _part(Sizes, how=("scalar", "arange", "cat", "pad")),
)
_site = st.one_of(*SITES)
_flat = st.one_of(*SITES, *OTHERS)
parts = st.one_of(_flat, _flat.map(lambda p: Part(Residual, (("inner", p),))))


@st.composite
def networks(draw: Any, **fixed: Any) -> Network:
    """Draws a network with at least one layer LoRA could adapt; `fixed` pins fields of the spec."""
    listed = [*draw(st.lists(parts, max_size=2)), draw(_site), *draw(st.lists(parts, max_size=1))]
    chosen: dict[str, Any] = {
        "takes": draw(st.sampled_from(sorted(TAKES))),
        "gives": draw(st.sampled_from(GIVES)),
        "layout": draw(st.sampled_from(("list", "sequential"))),
        "double": draw(st.booleans()),
        "grad": draw(st.booleans()),
        "training": draw(st.booleans()),
    }
    return Network(tuple(listed), **{**chosen, **fixed})
