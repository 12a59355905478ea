"""The models that are measured: their shapes, and one model as base, as peft's, and as our graphs."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx import GraphModule

import fxlora

# Layers, hidden size, inner size, heads, key and value heads, as Meta published them.
SHAPES = {
    "Llama-8B": (32, 4096, 14336, 32, 8),
    "Llama-70B": (80, 8192, 28672, 64, 8),
    "Llama-405B": (126, 16384, 53248, 128, 8),
}
REGIMES = {
    "fp32": "base and adapters in fp32",
    "bf16": "base and adapters in bf16",
    "default": "peft's default: base in bf16, adapters in fp32",
    "autocast": "the same under torch.autocast in bf16",
}
SEED = 0


def llama(shape: str, layers: int | None = None) -> nn.Module:
    """Builds a Llama of that shape on the meta device, in bf16; `layers` overrides its depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    deep, hidden, inner, heads, kv = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers or deep,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def small_llama(
    dtype: torch.dtype, *, layers: int, hidden: int, inner: int, vocab: int = 32000
) -> nn.Module:
    """Builds a Llama with random weights on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        use_cache=False,
    )
    return in_dtype(lambda: LlamaForCausalLM(config), dtype)


def gpt2(dtype: torch.dtype) -> nn.Module:
    """Builds GPT-2, 124M, with random weights and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return in_dtype(lambda: GPT2LMHeadModel(config), dtype)


def seed(dtype: torch.dtype) -> nn.Module:
    """Builds the smallest model of the README."""
    return in_dtype(lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), dtype)


class Site(nn.Module):
    """One adapted layer and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer."""
        return self.proj(x)


class Triple(nn.Module):
    """Three layers that read one input, as q, k and v do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the three."""
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


def in_dtype(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Builds a module whose parameters are of that dtype; buffers a model keeps in fp32 stay so."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def base_dtype(regime: str) -> torch.dtype:
    """Returns the dtype of the base in a regime."""
    return torch.float32 if regime == "fp32" else torch.bfloat16


@contextlib.contextmanager
def regime_context(regime: str, device: str = "cpu") -> Iterator[None]:
    """Opens autocast where the regime says so."""
    if regime != "autocast":
        yield
        return
    with torch.autocast(device, dtype=torch.bfloat16):
        yield


@dataclass
class Sides:
    """One model with the same adapters on every side.

    Attributes:
        base: frozen, without adapters.
        peft: the `PeftModel`; its inner model is `peft.base_model.model`.
        plain: the rewritten graph, as it is drawn and certified.
        optimized: the graph that is meant to run, where this version has one.
        memory: the graph that saves least for the backward pass, where this version has one.
        inputs: keyword inputs of all of them.
    """

    base: nn.Module
    peft: nn.Module
    plain: GraphModule
    optimized: nn.Module | None
    memory: nn.Module | None
    inputs: dict[str, Any]

    def named(self) -> dict[str, nn.Module]:
        """Returns the adapted sides by the names the tables use."""
        found: dict[str, nn.Module] = {
            PEFT: self.peft,
            INNER: self.peft.base_model.model,
            PLAIN: self.plain,
        }
        if self.optimized is not None:
            found[OPTIMIZED] = self.optimized
        return found


BASE, DX, PRODUCTS = "base", "base + dx", "adapters' products"
PEFT, INNER = "peft", "peft, inner model"
PLAIN, OPTIMIZED, MEMORY = "plain graph", "optimized graph", "memory mode"
PAIRS = [(PLAIN, PEFT), (OPTIMIZED, PEFT), (OPTIMIZED, INNER)]


@dataclass(frozen=True)
class Factors:
    """A and B of one adapted layer, and tensors of the shapes they meet in a step."""

    a: torch.Tensor
    b: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    grad: torch.Tensor


def factors(adapted: nn.Module, tokens: int, regime: str) -> list[Factors]:
    """Returns the factors of every adapted layer, for the floor of what their products take.

    Six thin products a layer and a step are in every way of computing LoRA that keeps peft's bits;
    five where nothing before the layer wants a gradient, which is counted as six all the same.
    """
    dtype = torch.bfloat16 if regime in ("bf16", "autocast") else torch.float32
    trained = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
    found = []
    for name, a in trained.items():
        if ".lora_A." not in name:
            continue
        b = trained[name.replace(".lora_A.", ".lora_B.")]
        r, m, n = a.shape[0], a.shape[1], b.shape[0]
        x, h, grad = (torch.randn(tokens, k).to(a.device, dtype) for k in (m, r, n))
        found.append(Factors(a.to(dtype), b.to(dtype), x, h, grad))
    return found


def multiply(layers: list[Factors], *, train: bool) -> None:
    """Computes the products of every layer's adapter: two forward, and four backward."""
    for f in layers:
        torch.mm(torch.mm(f.x, f.a.t()), f.b.t())
        if train:
            of_h = torch.mm(f.grad, f.b)
            torch.mm(f.grad.t(), f.h)
            torch.mm(of_h.t(), f.x)
            torch.mm(of_h, f.a)


def sides(
    model: nn.Module,
    config: LoraConfig,
    inputs: dict[str, Any],
    regime: str,
    *,
    train: bool,
    device: str = "cpu",
) -> Sides:
    """Puts the same adapters, with nonzero B, on every side of one model."""
    model = model.to(device).train(train)
    traced = fxlora.trace(model, (), inputs)
    plain = fxlora.rewrite(traced, config)
    # Every side reads the very same base weights: where a copy lies in memory is worth percents.
    shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    theirs = get_peft_model(
        copy.deepcopy(model, shared), copy.deepcopy(config), autocast_adapter_dtype=regime != "bf16"
    ).train(train)
    if regime == "bf16":
        for p in plain.parameters():
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
    _same_values(plain, theirs)
    base = model.requires_grad_(False)
    return Sides(base, theirs, plain, optimized(plain, "exact"), optimized(plain, "memory"), inputs)


def _same_values(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives both sides one set of adapters; B is not zero, or half of what is wrong stays hidden."""
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    other = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    if {f"base_model.model.{n}" for n in mine} != set(other):
        raise AssertionError("peft trains other parameters than we do")
    made = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name in sorted(mine):
            p, q = mine[name], other[f"base_model.model.{name}"]
            if p.dtype != q.dtype or p.shape != q.shape:
                raise AssertionError(f"{name} is {p.dtype} here and {q.dtype} in peft")
            value = torch.randn(p.shape, generator=made) * 0.02
            p.copy_(value)
            q.copy_(value)


def optimized(plain: GraphModule, mode: str) -> nn.Module | None:
    """Returns the graph to run, in `mode` "exact" or "memory"; None where this version has none."""
    make = getattr(fxlora, "optimize", None)
    if make is None or (mode != "exact" and mode not in _modes()):
        return None
    made: nn.Module = make(plain, mode=mode)
    return made


def _modes() -> tuple[str, ...]:
    """Returns the modes that this version's optimize takes."""
    from fxlora.optimize import run

    return tuple(getattr(run, "MODES", ("exact",)))


def tensor_out(out: Any) -> torch.Tensor:
    """Returns the one tensor that a model's answer is about."""
    return out if isinstance(out, torch.Tensor) else out.logits


def agreement(a: torch.Tensor, b: torch.Tensor) -> str:
    """Says whether two tensors hold the same bits, else how far they are apart.

    >>> agreement(torch.ones(2), torch.ones(2))
    'same bits'
    """
    if torch.equal(a, b):
        return "same bits"
    far = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
    return f"{far:.0e} apart"


def frontier(plain: GraphModule) -> nn.Module | None:
    """Returns the graph that recomputes layers, only those a gradient reaches, where there is one."""
    make = getattr(fxlora, "optimize", None)
    if make is None or "checkpoint" not in inspect.signature(make).parameters:
        return None
    made: nn.Module = make(plain, checkpoint=True)
    return made
