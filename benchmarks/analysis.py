"""Analysis: fxlora on Llama shapes without weights, against wrapping, exporting and summarising them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fxlora
from benchmarks import child, models
from benchmarks.record import Case, sized, timed
from benchmarks.timing import Contender, Samples, interleave

WRAP = "get_peft_model"
FORWARD, EXPORT = "meta forward", "torch.export"
INFO, VIEW = "torchinfo", "torchview"
SITES, GRAPH, COMPARE = "trace + plan", "trace + plan + rewrite", "compare"
WRAP_TRACE = "get_peft_model, traced"
OURS = (SITES, GRAPH)
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


def trace_and_plan(model: nn.Module) -> object:
    """Finds every site and its verdict."""
    return fxlora.plan(fxlora.trace(model), lora_config())


def whole_graph(model: nn.Module) -> object:
    """Makes the rewritten graph."""
    traced = fxlora.trace(model)
    return fxlora.rewrite(traced, fxlora.plan(traced, lora_config()))


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
    SITES: trace_and_plan,
    GRAPH: whole_graph,
    COMPARE: compared,
    INFO: summarised,
    VIEW: viewed,
    EXPORT: exported,
}
FAST = (FORWARD, WRAP, SITES, GRAPH)
PAIRS = [
    *((ours, peer) for ours in OURS for peer in PEERS),
    (COMPARE, WRAP_TRACE),
    (COMPARE, EXPORT),
]


def run(quick: bool, say: Callable[[str], None]) -> list[Case]:
    """Measures the shapes, the growth with depth, and the peak of memory."""
    cases = []
    for shape in ("Llama-8B",) if quick else models.SHAPES:
        say(f"analysis: {shape}")
        cases.append(one_shape(shape, quick=quick))
    say("growth: 32 and 126 layers")
    cases += growth(quick=quick)
    cases += peaks(quick, say)
    return cases


def one_shape(shape: str, *, quick: bool) -> Case:
    """Measures every job on one shape; those that take seconds in fewer rounds."""

    def contender(job: Callable[[nn.Module], object]) -> Contender:
        return Contender(job, lambda: models.llama(shape))

    fast = FAST if quick else (*FAST, INFO)
    found = interleave({k: contender(JOBS[k]) for k in fast}, seconds=8, rounds=(2, 7))
    if not quick:
        slow = (WRAP_TRACE, COMPARE, VIEW, EXPORT, *OURS)
        once = {k: _twice(JOBS[k], shape) for k in slow}
        return _merged(shape, found, once)
    return timed("analysis", shape, found, PAIRS, floors=(FORWARD,))


def _twice(job: Callable[[nn.Module], object], shape: str) -> Samples:
    """Times a job that takes many seconds: twice, and the warm-up is one of the two."""
    got = interleave({"it": Contender(job, lambda: models.llama(shape))}, rounds=(1, 1))
    return got["it"]


def _merged(shape: str, found: dict[str, Samples], once: dict[str, Samples]) -> Case:
    """Joins the two passes: a slow peer is set against our time in its own pass."""
    slow = timed("analysis", shape, once, PAIRS)
    fast = timed("analysis", shape, found, PAIRS, floors=(FORWARD,))
    values = {**slow.values, **fast.values}
    taken = {(r["ours"], r["peer"]) for r in fast.ratios}
    more = tuple(r for r in slow.ratios if (r["ours"], r["peer"]) not in taken)
    ordered = {k: values[k] for k in JOBS if k in values}
    return Case("analysis", shape, "s", ordered, (FORWARD,), (*fast.ratios, *more))


def growth(*, quick: bool) -> list[Case]:
    """Measures one width at two depths: what grows is the part that each site costs."""
    depths = (8, 32) if quick else (32, 126)
    contenders = {}
    for depth in depths:
        for name in (WRAP, SITES, GRAPH):
            contenders[f"{name}, {depth} layers"] = Contender(
                JOBS[name], lambda depth=depth: models.llama("Llama-405B", depth)
            )
    found = interleave(contenders, seconds=8, rounds=(2, 5))
    few, many = depths
    pairs = [(f"{name}, {few} layers", f"{name}, {many} layers") for name in (WRAP, SITES, GRAPH)]
    return [timed("growth", f"Llama-405B's width, {few} and {many} layers", found, pairs)]


def peaks(quick: bool, say: Callable[[str], None]) -> list[Case]:
    """Measures the most memory each job holds above the model, each in a process of its own."""
    cases = []
    chosen = (WRAP, SITES, GRAPH) if quick else (WRAP, SITES, GRAPH, COMPARE, INFO, VIEW, EXPORT)
    for shape in ("Llama-8B",) if quick else models.SHAPES:
        values, notes = {}, {}
        for name in chosen:
            say(f"peak: {shape}, {name}")
            got = child.call("benchmarks.analysis:peak_of", {"name": name, "shape": shape}, timeout=120)
            if "failed" in got:
                notes[name] = got["failed"]
            else:
                values[name] = got["peak"]
        cases.append(sized("peak", shape, values, PAIRS, notes=notes))
    return cases


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
