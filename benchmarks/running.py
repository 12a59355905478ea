"""Forward and training step: peft's model, its inner model, our graphs, and the floors below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks import models
from benchmarks.machine import has_bf16
from benchmarks.models import BASE, DX, PAIRS, PEFT, PRODUCTS, Sides
from benchmarks.record import Case, timed
from benchmarks.timing import Contender, interleave, nothing, said


@dataclass(frozen=True)
class Work:
    """A model at several sizes.

    Attributes:
        name: of the model in the table.
        make: builds it in a dtype.
        config: fields of the LoraConfig.
        inputs: makes keyword inputs for so many tokens, given the dtype.
        at: (regime, tokens of the forward pass, tokens of the training step), per regime.
        seconds: about how long one case may take.
    """

    name: str
    make: Callable[[torch.dtype], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[int, torch.dtype], dict[str, Any]]
    at: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    seconds: float = 2.0


def _rows(width: int) -> Callable[[int, torch.dtype], dict[str, Any]]:
    def make(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        return {"x": torch.randn(tokens, width).to(dtype)}

    return make


def _seed_rows(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"input": torch.randn(tokens, 10).to(dtype)}


def _words(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    del dtype
    return {"input_ids": torch.randint(0, 30000, (1, tokens))}


LORA = {"r": 16, "lora_alpha": 32}
ALL = {**LORA, "target_modules": "all-linear"}


def works(quick: bool) -> list[Work]:
    """Returns what is measured; sizes at which one call takes many seconds here are left out."""
    if quick:
        return [
            _site(768, (("fp32", (1, 128), (128,)), ("default", (16,), (16,)))),
            _seed((("fp32", (1, 128), (16,)),)),
            _llama("Llama 4 x 256", 4, 256, 688, 1000, (("fp32", (16,), (16,)),)),
        ]
    few, many = (1, 16, 128), (1, 16, 128, 1024)
    rest = ("default", "bf16", "autocast")
    if has_bf16():
        narrow = tuple((r, many, many) for r in ("fp32", *rest))
        wide = narrow
        whole = tuple((r, few, (16, 128)) for r in ("fp32", *rest))
        last = (("fp32", (1024,), ()), ("default", (1024,), (1024,)))
    else:
        # bf16 is then eight times slower than fp32: sizes at which one step takes many seconds are
        # left out.
        narrow = (("fp32", many, many), *((r, many, few) for r in rest))
        thin = tuple((r, (1, 16), (16,)) for r in rest)
        wide = (("fp32", many, few), *thin)
        whole = (("fp32", few, (16, 128)), *thin)
        last = (("fp32", (1024,), ()),)
    return [
        _seed((("fp32", many, many), ("default", few, few))),
        _site(768, narrow),
        _llama("Llama 150M", 12, 896, 2432, 32000, whole, 12.0),
        _site(4096, wide),
        Work("GPT-2", models.gpt2, ALL, _words, whole, 12.0),
        _llama("Llama 150M", 12, 896, 2432, 32000, last, 12.0),
    ]


_At = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


def _site(width: int, at: _At) -> Work:
    config = {**LORA, "target_modules": ["proj"]}
    return Work(
        f"one site, {width} wide",
        lambda dtype: models.in_dtype(lambda: models.Site(width), dtype),
        config,
        _rows(width),
        at,
        1.0,
    )


def _seed(at: _At) -> Work:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]}
    return Work("the seed", models.seed, config, _seed_rows, at, 0.8)


def _llama(
    name: str, layers: int, hidden: int, inner: int, vocab: int, at: _At, seconds: float = 2.0
) -> Work:
    def words(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        del dtype
        return {"input_ids": torch.randint(0, vocab, (1, tokens))}

    return Work(
        name,
        lambda dtype: models.small_llama(
            dtype, layers=layers, hidden=hidden, inner=inner, vocab=vocab
        ),
        ALL,
        words,
        at,
        seconds,
    )


def run(quick: bool, say: Callable[[str], None]) -> Iterator[Case]:
    """Measures the forward pass and the training step of every model, regime and size."""
    for work in works(quick):
        for regime, passes, steps in work.at:
            for tokens in passes:
                say(f"forward: {work.name}, {regime}, {tokens} tokens")
                yield measure(work, regime, tokens, train=False)
            for tokens in steps:
                say(f"step: {work.name}, {regime}, {tokens} tokens")
                yield measure(work, regime, tokens, train=True)


def measure(work: Work, regime: str, tokens: int, *, train: bool, device: str = "cpu") -> Case:
    """Measures one case on all sides."""
    torch.manual_seed(models.SEED)
    dtype = models.base_dtype(regime)
    inputs = {k: v.to(device) for k, v in work.inputs(tokens, dtype).items()}
    made = models.sides(
        work.make(dtype), LoraConfig(**work.config), inputs, regime, train=train, device=device
    )
    contenders = _steps(made, regime, device) if train else _passes(made, regime, device)
    layers = models.factors(made.peft, tokens, regime)
    contenders[PRODUCTS] = Contender(_products(layers, made.peft, train))
    notes = _bits(made, regime, train, device)
    floors = (BASE, DX, PRODUCTS) if train else (BASE, PRODUCTS)
    on_gpu = device != "cpu"
    found = interleave(
        contenders,
        seconds=work.seconds,
        rounds=(3, 25),
        wait=torch.cuda.synchronize if on_gpu else nothing,
    )
    if on_gpu:
        for sample in found.values():  # a GPU's time is not the CPU's: wall time after a wait
            sample.cpu = list(sample.wall)
    group = "gpu" if on_gpu else "step" if train else "forward"
    name = f"{work.name}, {regime}, {tokens} token{'s' if tokens > 1 else ''}"
    if on_gpu:
        name += ", step" if train else ", forward"
    return timed(group, name, found, PAIRS, floors=floors, notes=notes)


def _passes(made: Sides, regime: str, device: str) -> dict[str, Contender]:
    def contender(module: nn.Module) -> Contender:
        def once(_: Any) -> None:
            with torch.no_grad(), models.regime_context(regime, device):
                module(**made.inputs)

        return Contender(once)

    return {BASE: contender(made.base), **{k: contender(v) for k, v in made.named().items()}}


def _steps(made: Sides, regime: str, device: str) -> dict[str, Contender]:
    found = {BASE: Contender(lambda _: _base_pass(made, regime, device))}
    found[DX] = Contender(lambda _: backward(made.base, made.inputs, regime, device, dx=True))
    for name, module in made.named().items():
        found[name] = Contender(_training(module, made.inputs, regime, device))
    return found


def _base_pass(made: Sides, regime: str, device: str) -> None:
    with models.regime_context(regime, device):
        made.base(**made.inputs)


def _training(
    module: nn.Module, inputs: dict[str, Any], regime: str, device: str
) -> Callable[[Any], None]:
    """Returns one training step: forward, loss, backward, AdamW."""
    optimizer = _adamw([p for p in module.parameters() if p.requires_grad])

    def once(_: Any) -> None:
        backward(module, inputs, regime, device, dx=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def _products(
    layers: list[models.Factors], adapted: nn.Module, train: bool
) -> Callable[[Any], None]:
    """Returns what adapters cost in any case: their products, and in training their AdamW."""
    optimizer = None
    if train:
        own = [nn.Parameter(p.detach().clone()) for p in adapted.parameters() if p.requires_grad]
        for p in own:
            p.grad = torch.ones_like(p)
        optimizer = _adamw(own)

    def once(_: Any) -> None:
        with torch.no_grad():
            models.multiply(layers, train=train)
        if optimizer is not None:
            optimizer.step()

    return once


def _adamw(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer of every side; fused is the default of transformers' Trainer."""
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def backward(
    module: nn.Module, inputs: dict[str, Any], regime: str, device: str, *, dx: bool
) -> torch.Tensor:
    """Runs forward, loss and backward.

    A single layer stands in the middle of a network, so the gradient of its input is asked for
    on every side; in a language model it is asked for (`dx`) of the first embedding, for the floor.

    Returns:
        The output.
    """
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
    try:
        with models.regime_context(regime, device):
            out = models.tensor_out(module(**given))
            loss = _loss(out, given)
        loss.backward()
    finally:
        if hook is not None:
            hook.remove()
    return out


def _loss(out: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    if "input_ids" not in given:
        return out.float().square().mean()
    # Each token is its own label, so that a single token has a loss as well.
    return nn.functional.cross_entropy(out.flatten(0, 1).float(), given["input_ids"].flatten())


def _bits(made: Sides, regime: str, train: bool, device: str) -> dict[str, str]:
    """Says of each graph how its output, and in training its gradients, agree with peft's."""
    found = {}
    theirs = _answers(made.peft, made, regime, train, device)
    for name, module in made.named().items():
        if name.startswith(PEFT):
            continue
        try:
            mine = _answers(module, made, regime, train, device)
        except Exception as e:  # noqa: BLE001 - a row that fails says how
            found[f"bits, {name}"] = said(e)
            continue
        said_of = [models.agreement(a, b) for a, b in zip(mine, theirs, strict=True)]
        off = [s for s in said_of if s != "same bits"]
        worst = max(off, key=lambda s: float(s.split()[0])) if off else "same bits"
        found[f"bits, {name}"] = worst
    return found


def _answers(
    module: nn.Module, made: Sides, regime: str, train: bool, device: str
) -> list[torch.Tensor]:
    if not train:
        with torch.no_grad(), models.regime_context(regime, device):
            return [models.tensor_out(module(**made.inputs))]
    out = backward(module, made.inputs, regime, device, dx=False)
    trained = [p for p in module.parameters() if p.requires_grad]
    grads = [p.grad for p in trained if p.grad is not None]
    for p in trained:
        p.grad = None
    return [out.detach(), *grads]
