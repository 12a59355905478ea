"""Parts for random networks (see networks.py) through which a gradient passes, or not, or in part."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from networks import BOTH, GIVES, TAKES, WIDTH, Network, Part, Residual, _part, parts
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _lin() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Flat(nn.Module):
    """A layer behind a function with a gradient that is zero everywhere, or with none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = _lin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if self.how == "straight through":
            return x + y + (torch.round(y) - y).detach()
        if self.how == "mode":
            return x + torch.div(y, 0.5, rounding_mode="floor")
        if self.how == "beside":
            return y.sign() * y
        if self.how == "fill_":
            y.fill_(0.5)
            return x + y
        if self.how == "zero_ a part":
            y[:, :2].zero_()
            return x + y
        return x + getattr(torch, self.how)(y)


class Chosen(nn.Module):
    """Layers whose numbers choose, and layers that are chosen from."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = _lin()
        self.one = _lin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score, y = self.lin(x), self.one(x)
        if self.how == "argmax":
            return x + score.argmax(-1, keepdim=True).to(x.dtype)
        if self.how == "where":
            return torch.where(score > 0, y, x)
        if self.how == "masked_fill":
            return y.masked_fill(score > 0, 0.25)
        if self.how == "masked_fill_":
            return y.masked_fill_(score.gt(0), 0.25)
        if self.how == "set where":
            y[score > 0] = 0.5
            return y + x
        if self.how == "one_hot":
            hot = F.one_hot(score.argmax(-1), WIDTH).to(x.dtype)
            return y * (hot + 1)
        if self.how == "topk":
            values, at = score.topk(2, dim=-1)
            return y.scatter(-1, at, values)
        if self.how == "scatter_":
            return torch.zeros_like(x).scatter_(-1, score.argsort(-1), y)
        if self.how == "gather":
            return y.gather(-1, score.sort(-1).indices)
        if self.how == "max":
            values, at = score.max(-1, keepdim=True)
            return y * values + at
        weights, at = torch.topk(torch.softmax(score, -1), 2)
        return y + weights.sum(-1, keepdim=True) * at.sum(-1, keepdim=True)


class Dead(nn.Module):
    """A layer that is run for nothing, or for a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = _lin()
        self.one = _lin()
        self.register_buffer("state", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, spare = self.lin(x), self.one(x)
        if self.how == "buffer":
            self.state.copy_(spare.detach().mean(0))
            return y + self.state
        if self.how == "no_grad":
            with torch.no_grad():
                self.state.mul_(0.5).add_(spare.mean(0))
            return y + self.state
        if self.how == "shape":
            return y + torch.ones_like(spare) * spare.size(0)
        if self.how == "overwritten":
            spare = torch.relu(y)  # the name, not the tensor
        if self.how == "copied over":
            spare.copy_(y)
            return spare + x
        if self.how == "times a detached":
            return y * spare.detach()
        return spare if self.how == "overwritten" else y


class Written(nn.Module):
    """Writes one after another, through views and through results of writes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = _lin()
        self.two = _lin()
        self.same, self.drop = nn.Identity(), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.lin(x), self.two(x)
        out = torch.zeros_like(x)
        if self.how == "through a cast":
            out.to(x.dtype).type_as(x).add_(y)
            return out + z
        if self.how == "through a layer":
            self.same(out).add_(y)
            return out + z
        if self.how == "through a dropout":
            self.drop(out).add_(y)
            return out + F.dropout(z, 0.25, self.training)
        if self.how == "through one of two views":
            one, other = out.view(-1), out.t()
            one.add_(y.reshape(-1))
            return other.t() + z
        if self.how == "covered by a view":
            y[:, :] = z
            y.view(-1)[:].add_(x.reshape(-1))
            return y
        if self.how == "through a detached":
            y.detach().add_(z)
            return y + x
        if self.how == "view under no_grad":
            with torch.no_grad():
                seen = y[None]
            return seen[0] + z
        if self.how == "chain":
            out.add_(y).add_(z)
            return out
        if self.how == "under no_grad":
            with torch.no_grad():
                y.add_(z)
            return y + x
        if self.how == "copy by index":
            out[:, [1, 0]].add_(y[:, :2])
            return out + z
        if self.how == "view of a view":
            out.view(-1, 2, 2)[:, 0].t().add_(y[:, :2].t())
            return out + z
        if self.how == "into a detached":
            base = z * 1
            base.detach().add_(y.detach())
            return base
        if self.how == "before the write":
            early = out + x
            out.add_(y)
            return early + z
        if self.how == "twice":
            out[:, 0] = y[:, 0]
            out[:, 1] = z[:, 0]
            return out
        if self.how == "covered":
            out[:] = y
            out[:] = z
            return out
        if self.how == "covered, then viewed":
            out[:] = y
            out[:] = z
            return out[None].transpose(0, 1)[:, 0]
        if self.how == "out=":
            torch.add(y.detach(), z.detach(), out=out)
            return out + y
        return out.index_copy_(1, torch.tensor([0, 2]), y[:, :2]) + z


class Slices(nn.Module):
    """A layer's weight, read in pieces beside the layer's own call."""

    def __init__(self, how: str, call_too: bool) -> None:
        super().__init__()
        self.how, self.call_too = how, call_too
        self.lin = _lin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b = self.lin.weight, self.lin.bias
        if self.how == "halves":
            y = torch.cat([F.linear(x, w[:2], b[:2]), F.linear(x, w[2:], b[2:])], -1)
        elif self.how == "chunk":
            first, second = w.chunk(2, 1)
            y = F.linear(x[:, :2], first) + F.linear(x[:, 2:], second, b)
        elif self.how == "detached":
            y = F.linear(x, w.detach(), b)
        elif self.how == "norm":
            y = x * w.norm() + b
        else:
            y = x @ w.t()
        return y + self.lin(x) if self.call_too else y


class Attention(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, weights: bool, read: str) -> None:
        super().__init__()
        self.weights, self.read = weights, read
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x[None]
        out, seen = self.mha(y, y, y, need_weights=self.weights or self.read == "weights")
        return x + (out[0] if self.read == "output" else seen[0].square().sum(-1, keepdim=True))


class Encoder(nn.Module):
    """torch's encoder layer, alone or in a stack."""

    def __init__(self, layers: int, first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=first)
        self.enc: nn.Module = (
            layer if layers == 1 else nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.enc(x[None])[0]


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, wall: bool) -> None:
        super().__init__()
        self.wall = wall
        self.lin = _lin()
        self.one = _lin()

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.lin(x))
        return self.one(y.detach() if self.wall else y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self._block, x, use_reentrant=False)
        return out


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


class Own(nn.Module):
    """An autograd function of the model's own, and regions that switch gradients on and off."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lin = _lin()
        self.one = _lin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if self.how == "function":
            return x + _Reversed.apply(y)
        if self.how == "switched":
            with torch.set_grad_enabled(False):
                z = self.one(y)
            return y + z
        if self.how == "detach_":
            y = y * 2
            y.detach_()
            return y + self.one(x)
        if self.how == "cast":
            with torch.no_grad():
                z = y.to(y.dtype)
            return z + x
        if self.how == "fresh leaf":
            return x + y.detach().requires_grad_() * self.one(x)
        if self.how == "data":
            return y.data + self.one(x)
        with torch.no_grad():
            y = y + x
            with torch.set_grad_enabled(True):
                y = self.one(y)
        return y


_FLAT = "round sign floor ceil trunc mode beside fill_".split()
_WRITES = (
    "chain", "under no_grad", "copy by index", "view of a view", "into a detached",
    "before the write", "twice", "covered", "covered, then viewed", "out=", "index_copy_",
    "through a cast", "through a layer", "through a dropout", "through one of two views",
    "covered by a view", "through a detached", "view under no_grad",
)  # fmt: skip
WALLS = (
    _part(Flat, how=(*_FLAT, "straight through", "zero_ a part")),
    _part(Chosen, how=("argmax", "where", "masked_fill", "masked_fill_", "set where", "one_hot",
                       "topk", "scatter_", "gather", "max", "router")),
    _part(Dead, how=("buffer", "no_grad", "shape", "overwritten", "copied over",
                     "times a detached", "nothing")),
    _part(Written, how=_WRITES),
    _part(Slices, how=("halves", "chunk", "detached", "norm", "turned"), call_too=BOTH),
    _part(Attention, weights=BOTH, read=("output", "weights")),
    _part(Encoder, layers=(1, 2), first=BOTH),
    _part(Checkpointed, wall=BOTH),
    _part(Own, how=("function", "switched", "detach_", "cast", "fresh leaf", "data", "nested")),
)  # fmt: skip
# Each way of writing, stopping and hiding, alone.
ALONE = [
    *(Part(Written, (("how", how),)) for how in _WRITES),
    *(Part(Flat, (("how", how),)) for how in _FLAT),
    *(Part(Own, (("how", how),)) for how in ("function", "detach_", "cast", "fresh leaf", "data")),
    *(Part(Dead, (("how", how),)) for how in ("no_grad", "copied over", "times a detached")),
]
_wall = st.one_of(*WALLS)
_walled = st.one_of(_wall, _wall.map(lambda p: Part(Residual, (("inner", p),))))


@st.composite
def walled_networks(draw: Any) -> Network:
    """Draws a network with at least one of the parts here, among those of every other law."""
    some = st.one_of(parts, _walled)
    listed = [*draw(st.lists(some, max_size=2)), draw(_wall), *draw(st.lists(some, max_size=1))]
    return Network(
        tuple(listed),
        takes=draw(st.sampled_from(sorted(TAKES))),
        gives=draw(st.sampled_from(GIVES)),
        layout=draw(st.sampled_from(("list", "sequential"))),
        double=draw(st.booleans()),
        grad=draw(st.booleans()),
        training=draw(st.booleans()),
    )
