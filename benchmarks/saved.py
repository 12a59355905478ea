"""What autograd saves for the backward pass, LoRA's own share of it, and where a step may stop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks import models
from benchmarks.models import DX, MEMORY, OPTIMIZED, PEFT, PLAIN
from benchmarks.record import Case, sized, timed
from benchmarks.running import backward
from benchmarks.timing import Contender, interleave

LORA = {"r": 16, "lora_alpha": 32}
CHECKPOINTED = "peft, gradient checkpointing"
FRONTIER = "frontier graph"


def saved_bytes(module: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Returns the bytes that `run` leaves for a backward pass.

    Every storage counts once; parameters and buffers of the module do not count.

    Args:
        module: whose parameters are left out.
        run: the forward pass, up to the loss; its answer is kept alive until all is counted.
    """
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    held: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = run()
    total = sum(s.nbytes() for s in held.values())
    del answer
    return total


def run(quick: bool, say: Callable[[str], None]) -> Iterator[Case]:
    """Measures a q/k/v triple, a whole Llama, and adapters in its last layers only."""
    tokens, width = (32, 256) if quick else (64, 512)  # bytes per token and width stay
    for regime, dropout in _REGIMES[:2] if quick else _REGIMES:
        label = regime + (f", dropout {dropout}" if dropout else "")
        say(f"saved: {label}")
        yield _triple(regime, dropout, label, tokens, width)
        yield from _whole(regime, dropout, label, 2 if quick else 4, tokens, width)
    for last in (1,) if quick else (2, 4, 8):
        say(f"frontier: last {last} layers")
        yield from frontier(4 if quick else 8, last, tokens, width)


_REGIMES = (("default", 0.0), ("fp32", 0.0), ("bf16", 0.0), ("autocast", 0.0), ("fp32", 0.1))
_PAIRS = [(PLAIN, PEFT), (OPTIMIZED, PEFT), (MEMORY, PEFT)]


def _triple(regime: str, dropout: float, label: str, tokens: int, width: int) -> Case:
    dtype = models.base_dtype(regime)
    torch.manual_seed(models.SEED)
    x = torch.randn(tokens, width).to(dtype)
    made = models.sides(
        models.in_dtype(lambda: models.Triple(width), dtype),
        LoraConfig(**LORA, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"]),
        {"x": x},
        regime,
        train=True,
    )
    case = _case(f"q, k, v of {width}, {label}", made, regime, tokens * width)
    return case if dropout else replace(case, notes={**case.notes, **_errors(made, regime)})


def _whole(
    regime: str, dropout: float, label: str, layers: int, tokens: int, width: int
) -> list[Case]:
    inputs = {"input_ids": torch.randint(0, 1000, (1, tokens))}
    made = models.sides(
        _llama(regime, layers, width),
        LoraConfig(**LORA, lora_dropout=dropout, target_modules="all-linear"),
        inputs,
        regime,
        train=True,
    )
    cases = [_case(f"Llama {layers} x {width}, {label}", made, regime, tokens * width)]
    if made.memory is not None:
        sides = {PEFT: made.peft, OPTIMIZED: made.optimized, MEMORY: made.memory}
        found = interleave(
            {k: _step(v, inputs, regime) for k, v in sides.items() if v is not None},
            seconds=4,
            rounds=(1, 9),
        )
        pairs = [(OPTIMIZED, PEFT), (MEMORY, PEFT)]
        cases.append(timed("memory mode", f"Llama {layers} x {width}, {label}", found, pairs))
    return cases


def _step(module: nn.Module, inputs: dict[str, Any], regime: str) -> Contender:
    def once(_: Any) -> None:
        backward(module, inputs, regime, "cpu", dx=False)
        for p in module.parameters():
            p.grad = None

    return Contender(once)


def error(
    module: nn.Module, exact: list[torch.Tensor], inputs: dict[str, Any], regime: str
) -> float:
    """Returns how far a module's output and gradients are from the exact ones, relative, as rms."""
    mine = _answers(module, inputs, regime)
    off = [
        ((a.double() - e).norm() / e.norm().clamp_min(1e-300)).item()
        for a, e in zip(mine, exact, strict=True)
    ]
    return (sum(o * o for o in off) / len(off)) ** 0.5


def _answers(module: nn.Module, inputs: dict[str, Any], regime: str) -> list[torch.Tensor]:
    """Returns the output, the gradient of the input, and those of the adapters."""
    given = {k: v.detach().clone().requires_grad_(True) for k, v in inputs.items()}
    with models.regime_context(regime):
        out = models.tensor_out(module(**given))
    out.backward(torch.ones_like(out))
    trained = [p for p in module.parameters() if p.requires_grad]
    grads = [p.grad for p in trained if p.grad is not None]
    for p in trained:
        p.grad = None
    return [out.detach(), *(v.grad for v in given.values() if v.grad is not None), *grads]


def _errors(made: models.Sides, regime: str) -> dict[str, str]:
    """Says how far each graph is from fp64, as a multiple of peft's own distance."""
    exact_inputs = {k: v.double() for k, v in made.inputs.items()}
    exact = _answers(copy.deepcopy(made.peft).double(), exact_inputs, "fp32")
    theirs = error(made.peft, exact, made.inputs, regime)
    ours = {OPTIMIZED: made.optimized, MEMORY: made.memory}
    return {
        f"error, {k}": f"{error(v, exact, made.inputs, regime) / theirs:.2f}"
        for k, v in ours.items()
        if v is not None
    }


def _llama(regime: str, layers: int, width: int) -> nn.Module:
    return models.small_llama(
        models.base_dtype(regime), layers=layers, hidden=width, inner=3 * width, vocab=1000
    )


def _case(name: str, made: models.Sides, regime: str, unit: int) -> Case:
    sides = {PEFT: made.peft, PLAIN: made.plain, OPTIMIZED: made.optimized, MEMORY: made.memory}
    values = {DX: float(_saved(made.base, made.inputs, regime, dx=True))}
    for key, module in sides.items():
        if module is not None:
            values[key] = float(_saved(module, made.inputs, regime, dx=False))
    made_of = sized("saved", name, values, _PAIRS, floor=DX)
    for key, value in made_of.values.items():
        if key != DX:  # comparable over sizes, and with the figures of papers
            value["own"] = (values[key] - values[DX]) / unit
    return made_of


def _saved(module: nn.Module, inputs: dict[str, Any], regime: str, *, dx: bool) -> int:
    """Counts one forward pass, with the gradient of the input (or the embeddings) asked for."""
    given = {
        k: v.detach().requires_grad_(True) if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    words = not any(v.is_floating_point() for v in given.values())
    hook = None
    if words and dx:
        hook = module.get_input_embeddings().register_forward_hook(
            lambda _m, _a, out: out.requires_grad_(True)
        )

    def forward() -> torch.Tensor:
        with models.regime_context(regime):
            return models.tensor_out(module(**given))

    try:
        return saved_bytes(module, forward)
    finally:
        if hook is not None:
            hook.remove()


def frontier(layers: int, last: int, tokens: int, width: int) -> list[Case]:
    """Measures a step with adapters in the last layers only: time, and what is saved.

    Gradient checkpointing as it is usually switched on asks for the gradient of the embeddings,
    so that the whole model is run again and differentiated; a step needs no more than what lies
    above the first adapter.
    """
    config = LoraConfig(
        **LORA,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        layers_to_transform=list(range(layers - last, layers)),
    )
    inputs = {"input_ids": torch.randint(0, 1000, (1, tokens))}
    made = models.sides(_llama("fp32", layers, width), config, inputs, "fp32", train=True)
    checkpointed = models.sides(_llama("fp32", layers, width), config, inputs, "fp32", train=True)
    checkpointed.peft.enable_input_require_grads()
    checkpointed.peft.base_model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    sides: dict[str, nn.Module | None] = {
        PEFT: made.peft,
        CHECKPOINTED: checkpointed.peft,
        PLAIN: made.plain,
        OPTIMIZED: made.optimized,
        FRONTIER: models.frontier(made.plain),
    }
    there = {k: v for k, v in sides.items() if v is not None}
    name = f"adapters in the last {last} of {layers} layers"
    pairs = [(PLAIN, PEFT), (OPTIMIZED, PEFT), (FRONTIER, PEFT), (FRONTIER, CHECKPOINTED)]

    found = interleave(
        {k: _step(v, inputs, "fp32") for k, v in there.items()}, seconds=4, rounds=(2, 9)
    )
    values = {k: float(_saved(v, inputs, "fp32", dx=False)) for k, v in there.items()}
    return [
        timed("frontier", f"{name}, time", found, pairs),
        sized("frontier", f"{name}, saved", values, pairs),
    ]
