"""Analysis: fxlora on Llama shapes without weights, against wrapping, exporting and summarising them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx import GraphModule

import fxlora
from benchmarks import child, models
from benchmarks.record import Case, sized, timed
from benchmarks.timing import Contender, interleave

WRAP = "get_peft_model"
FORWARD, EXPORT = "meta forward", "torch.export"
INFO, VIEW = "torchinfo", "torchview"
SITES, TRACE, GRAPH, COMPARE = "plan", "trace", "trace + plan + rewrite", "compare"
RUNNABLE = "the same, its code written"
WRAP_TRACE = "get_peft_model, traced"
OURS = (SITES, TRACE, GRAPH)
PEERS = (WRAP, EXPORT, INFO, VIEW)


def lora_config() -> LoraConfig:
    """Returns the configuration: every linear layer of every block."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def tokens() -> torch.Tensor:
    """Returns sixteen token ids without values."""
    return torch.zeros(1, 16, dtype=torch.long, device="meta")


class _Logits(nn.Module):
    """A model whose answer is one tensor; torchview fails on transformers' cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Runs the model."""
        return self.model(input_ids=ids).logits


def planned(model: nn.Module) -> object:
    """Finds every site and its verdict, from the model itself."""
    return fxlora.plan(model, lora_config())


def traced(model: nn.Module) -> GraphModule:
    """Makes the graph of the model as it is."""
    return fxlora.trace(model)


def whole_graph(model: nn.Module) -> GraphModule:
    """Makes the rewritten graph."""
    traced = fxlora.trace(model)
    return fxlora.rewrite(traced, fxlora.plan(traced, lora_config()))


def ready_to_run(model: nn.Module) -> object:
    """Makes the rewritten graph and the Python code it runs by, which is written when asked for."""
    return whole_graph(model).code


def compared(model: nn.Module) -> object:
    """Proves the rewritten graph against peft's model: wraps it, traces both, compares."""
    return fxlora.compare(model, lora_config())


def wrapped(model: nn.Module) -> object:
    """Wraps the model as peft does."""
    return get_peft_model(model, lora_config())


def wrapped_and_traced(model: nn.Module) -> object:
    """Wraps the model as peft does, and traces what comes out."""
    return fxlora.trace(get_peft_model(model, lora_config()).base_model.model)


def forward(model: nn.Module) -> object:
    """Runs the model without values, once."""
    with torch.no_grad():
        return model(input_ids=tokens())


def exported(model: nn.Module) -> object:
    """Exports the model, without strict mode, which is the faster one."""
    given = {"input_ids": tokens(), "use_cache": False}
    return torch.export.export(model, (), given, strict=False)


def summarised(model: nn.Module) -> object:
    """Makes torchinfo's table."""
    import torchinfo

    return torchinfo.summary(model, input_data={"input_ids": tokens()}, verbose=0)


def viewed(model: nn.Module) -> object:
    """Makes torchview's graph at its default depth, without laying it out."""
    import torchview

    return torchview.draw_graph(_Logits(model), input_data=(tokens(),), device="meta")


JOBS: dict[str, Callable[[nn.Module], object]] = {
    FORWARD: forward,
    WRAP: wrapped,
    WRAP_TRACE: wrapped_and_traced,
    SITES: planned,
    TRACE: traced,
    GRAPH: whole_graph,
    RUNNABLE: ready_to_run,
    COMPARE: compared,
    INFO: summarised,
    VIEW: viewed,
    EXPORT: exported,
}
FAST = (FORWARD, WRAP, SITES, TRACE, GRAPH)
PAIRS = [
    *((ours, peer) for ours in OURS for peer in PEERS),
    (RUNNABLE, WRAP),
    (COMPARE, WRAP_TRACE),
    (COMPARE, EXPORT),
]


def run(quick: bool, say: Callable[[str], None]) -> Iterator[Case]:
    """Measures the shapes, the growth with depth, and the peak of memory."""
    shapes = ("Llama-8B", "Llama-405B") if quick else tuple(models.SHAPES)
    for shape in shapes:
        say(f"analysis: {shape}")
        yield one_shape(shape, quick=quick)
    if not quick:
        say("growth with depth")
        yield growth()
    for shape in ("Llama-8B",) if quick else ("Llama-8B", "Llama-405B"):
        say(f"peak: {shape}")
        yield peak_memory(shape, quick=quick)


def one_shape(shape: str, *, quick: bool) -> Case:
    """Measures every job on one shape; those that take many seconds once, there and back."""

    def contenders(names: tuple[str, ...]) -> dict[str, Contender]:
        return {k: Contender(JOBS[k], lambda: models.llama(shape)) for k in names}

    if quick:
        found = interleave(contenders(FAST), seconds=2, rounds=(1, 2))
        return timed("analysis", shape, found, PAIRS, floors=(FORWARD,))
    fast = interleave(contenders((*FAST, RUNNABLE, INFO)), seconds=6, rounds=(2, 5))
    slow = interleave(contenders((WRAP_TRACE, COMPARE, VIEW, EXPORT)), rounds=(1, 1), warm=False)
    made = timed("analysis", shape, {**fast, **slow}, PAIRS, floors=(FORWARD,))
    return replace(made, values={k: made.values[k] for k in JOBS})


def growth() -> Case:
    """Measures one width at two depths: what grows is the part that each site costs."""
    few, many = 32, 126
    contenders = {
        f"{name}, {depth} layers": Contender(
            JOBS[name], lambda depth=depth: models.llama("Llama-405B", depth)
        )
        for depth in (few, many)
        for name in (WRAP, SITES, GRAPH)
    }
    found = interleave(contenders, seconds=6, rounds=(2, 3))
    pairs = [(f"{name}, {few} layers", f"{name}, {many} layers") for name in (WRAP, SITES, GRAPH)]
    return timed("growth", f"Llama-405B's width, {few} and {many} layers", found, pairs)


def peak_memory(shape: str, *, quick: bool) -> Case:
    """Measures the most memory each job holds above the model, each in a process of its own."""
    jobs = (WRAP, SITES, GRAPH) if quick else (WRAP, SITES, GRAPH, COMPARE, INFO, VIEW, EXPORT)

    def one(name: str) -> dict[str, Any]:
        given = {"name": name, "shape": shape}
        return child.call("benchmarks.analysis:peak_of", given, timeout=90)

    with ThreadPoolExecutor(2) as pool:  # memory is not time: two may run at once
        got = dict(zip(jobs, pool.map(one, jobs), strict=True))
    values = {k: v["peak"] for k, v in got.items() if "failed" not in v}
    notes = {k: v["failed"] for k, v in got.items() if "failed" in v}
    return sized("peak", shape, values, PAIRS, notes=notes)


def peak_of(name: str, shape: str) -> dict[str, Any]:
    """Runs one job in this process; returns the peak above what the built model holds."""
    job = JOBS[name]
    job(models.llama("Llama-8B", 1))  # imports and first calls are not the job's
    model = models.llama(shape)
    before = child.reset_peak()
    started = time.process_time()
    kept = job(model)
    return {
        "peak": child.peak() - before,
        "cpu": time.process_time() - started,
        "kept": type(kept).__name__,
    }
