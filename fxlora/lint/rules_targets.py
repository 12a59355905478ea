"""Rules 1xx: what the configuration names, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator

from fxlora import extras, matching
from fxlora.config import task_heads
from fxlora.errors import did_you_mean
from fxlora.lint.context import Context, shown
from fxlora.lint.finding import Hit, Rule, Severity
from fxlora.lint.flow import Blocks
from fxlora.plan import PlannedSite
from fxlora.text import count

_PARTS = {
    "q_proj": "q", "q_lin": "q", "query": "q", "k_proj": "k", "k_lin": "k", "key": "k",
    "v_proj": "v", "v_lin": "v", "value": "v", "gate_proj": "gate", "w1": "gate",
    "up_proj": "up", "w3": "up",
}  # fmt: skip


def _named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def nothing_adapted(_: Context) -> Iterator[Hit]:
    """FXL100: reported by the run itself, because there is no plan to look at."""
    yield from ()


def unmatched_target(context: Context) -> Iterator[Hit]:
    """FXL101: an entry that is the name or the dotted suffix of no layer."""
    names = [s.name for s in context.sites if s.kind != "Parameter"]
    last = sorted({n.rpartition(".")[2] for n in names})
    resolved = context.config.target_modules
    for entry in context.plan.targets:
        # A name PEFT translated for this model (a v4 MoE name) has matched as something else.
        renamed = resolved is not None and entry not in resolved
        if renamed or any(_named(n, entry) for n in names):
            continue
        part = _part(context, entry)
        yield Hit(
            f"target_modules entry {entry!r} matches nothing{part}, and PEFT says nothing of it",
            f"leave it out, or name what is meant.{did_you_mean(entry, last)}",
            subject=entry,
        )
    parameters = [s.name for s in context.sites if s.kind == "Parameter"]
    for entry in sorted(context.asked.target_parameters or ()):
        if matching_parameter(entry, parameters):
            continue
        yield Hit(
            f"target_parameters entry {entry!r} matches nothing",
            f"leave it out, or name what is meant.{did_you_mean(entry, parameters)}",
            subject=entry,
        )


def matching_parameter(entry: str, names: list[str]) -> bool:
    """Says whether target_parameters would find a parameter."""
    return any(matching.parameter_match([entry], n) is not None for n in names)


def _part(context: Context, entry: str) -> str:
    """Returns where the rows are that the entry means, when a fused layer holds them."""
    part = _PARTS.get(entry.rpartition(".")[2])
    found = next((s for s in context.slices if s.part == part), None) if part else None
    if found is None:
        return ""
    return f" (here it is rows {found.where} of {found.site.rpartition('.')[2]!r})"


def half_matched_target(context: Context) -> Iterator[Hit]:
    """FXL102: an entry whose layer some blocks do not have, where another stands in its place."""
    if context.limits_layers:
        return
    for entry in context.plan.targets:
        for group in context.blocks:
            yield from _half(context, entry, group)


def _half(context: Context, entry: str, group: Blocks) -> Iterator[Hit]:
    matched: dict[int, str] = {}
    for i in group.indices:
        inside = [s.name for s in context.sites if s.name.startswith(group.prefix(i))]
        hit = next((n for n in inside if _named(n, entry) and n in context.names), None)
        if hit is not None:
            matched[i] = hit.removeprefix(group.prefix(i))
    if not matched or len(matched) == len(group.indices):
        return
    relative = next(iter(matched.values()))
    parent = relative.rpartition(".")[0]
    for i in group.indices:
        if i in matched or any(s.name == group.prefix(i) + relative for s in context.sites):
            continue
        # Of a hybrid model the other blocks have no such part at all: nothing stands in its place.
        place = group.prefix(i) + (f"{parent}." if parent else "")
        instead = [s.name for s in context.sites if s.name.startswith(place) and s.calls]
        if instead and not any(n in context.names for n in instead):
            yield Hit(
                f"target_modules entry {entry!r} matches in {len(matched)} of "
                f"{len(group.indices)} blocks of {group.path}; this layer stands in its place "
                "elsewhere and gets no adapter",
                "name it too (a bare parameter goes into target_parameters), or limit the rest "
                "with layers_to_transform",
                site=instead[0],
            )


def uneven_layers(context: Context) -> Iterator[Hit]:
    """FXL103: the same layer adapted in some blocks and left alone in others."""
    if context.limits_layers:
        return
    for group in context.blocks:
        seen: dict[str, list[tuple[str, bool]]] = {}
        for s in context.sites:
            index = next((i for i in group.indices if s.name.startswith(group.prefix(i))), None)
            if index is not None:
                relative = s.name.removeprefix(group.prefix(index))
                seen.setdefault(relative, []).append((s.name, s.name in context.names))
        for rows in seen.values():
            taken = sum(adapted for _, adapted in rows)
            if not 0 < taken < len(rows):
                continue
            for name, adapted in rows:
                if not adapted:
                    yield Hit(
                        f"not adapted, while the same layer is in {taken} of {len(rows)} blocks "
                        f"of {group.path}; layers_to_transform does not say so",
                        "name the layer by its suffix, or say which blocks with layers_to_transform",
                        site=name,
                    )


def unmatched_pattern_key(context: Context) -> Iterator[Hit]:
    """FXL104: a rank_pattern or alpha_pattern key that is about no adapted layer."""
    for which in ("rank_pattern", "alpha_pattern"):
        for key in getattr(context.asked, which):
            # A key PEFT translated for this model has become another one.
            translated = key not in getattr(context.config, which)
            if not translated and not any(_keyed(key, n) for n in context.names):
                last = sorted({n.rpartition(".")[2] for n in context.names})
                yield Hit(
                    f"{which} key {key!r} matches no adapted site, so it changes nothing",
                    f"leave it out, or write the end of a name.{did_you_mean(key, last)}",
                    subject=key,
                )


def _keyed(key: str, name: str) -> bool:
    return matching.pattern_value({key: True}, name, False)[0] is True


def overlapping_pattern_keys(context: Context) -> Iterator[Hit]:
    """FXL105: two keys that give one layer different values."""
    for which in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(context.config, which)
        for p in context.adapted:
            hits = [k for k in pattern if _keyed(k, p.name)]
            if len({pattern[k] for k in hits}) > 1:
                yield Hit(
                    f"{which} keys {', '.join(f'{k!r}: {pattern[k]}' for k in hits)} all match; the "
                    f"first wins here, and saving sorts them, so {sorted(hits)[0]!r} wins after a "
                    "reload",
                    "write keys of which one matches each layer",
                    site=p.name,
                )


def router_adapted(context: Context) -> Iterator[Hit]:
    """FXL106: an adapter on the scores that choose experts."""
    for p in context.adapted:
        chooser = context.routers.get(p.name)
        if chooser is not None:
            yield Hit(
                "its scores choose what runs next (they end in "
                f"{chooser.target if chooser.op == 'call_method' else _name(chooser)}): this is a "
                "router, and adapting it moves tokens between experts",
                _without(p) + ", or ignore this rule there when it is meant",
                site=p.name,
            )


def _name(node: object) -> str:
    return str(getattr(getattr(node, "target", None), "__name__", "topk"))


def _without(p: PlannedSite) -> str:
    if p.kind == "Parameter":  # PEFT takes a parameter whatever exclude_modules says
        return f"name the layers that are meant, without {_owner(p.name)!r}, instead of all-linear"
    return f"leave it out with exclude_modules=[{_owner(p.name)!r}]"


def _owner(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def tower_adapted(context: Context) -> Iterator[Hit]:
    """FXL107: adapters in the tower of another modality, beside those of the text model."""
    feeding, idle = set(context.tower), set(context.unentered)
    inside = [p for p in context.adapted if p.name in feeding | idle]
    if not inside or len(inside) == len(context.adapted):
        return
    text = [p.name for p in context.adapted if p.name not in feeding | idle]
    for p in inside:
        if not _same_entry(context, p.name, text):
            continue
        how = (
            "it sees the image or sound only, before the stream of tokens"
            if p.name in feeding
            else "the traced inputs never enter it, a tower for another modality"
        )
        yield Hit(
            f"{how}; the same entry adapts the text model",
            "target the text model by a longer suffix or a regular expression, leave the tower out "
            "with exclude_modules, or ignore this rule there when it is meant",
            site=p.name,
        )


def _same_entry(context: Context, name: str, others: list[str]) -> bool:
    """Says whether what targets a layer targets one of the others too."""
    entries = [e for e in context.plan.targets if _named(name, e)]
    # A pattern, all-linear, and a name PEFT translated are one entry for everything.
    return not entries or any(_named(n, e) for e in entries for n in others)


def unmatched_module_to_save(context: Context) -> Iterator[Hit]:
    """FXL108: a modules_to_save entry that names nothing."""
    names = [n for n, _ in context.model.named_modules() if n]
    last = sorted({n.rpartition(".")[2] for n in names})
    for entry in extras.missing_entries(context.config, context.plan.saved):
        yield Hit(
            f"modules_to_save entry {entry!r} matches no module, and PEFT says nothing of it",
            f"leave it out, or name a module.{did_you_mean(entry, last)}",
            subject=entry,
        )


def broad_module_to_save(context: Context) -> Iterator[Hit]:
    """FXL109: a modules_to_save entry that hits more than the module it names."""
    implied = set(task_heads(context.config))
    by_entry: dict[str, list[extras.SavedModule]] = {}
    for s in context.plan.saved:
        if s.entry not in implied and not s.same_as:
            by_entry.setdefault(s.entry, []).append(s)
    for entry, saved in by_entry.items():
        odd = [s.name for s in saved if not _named(s.name, entry)]
        if len(saved) == 1 and not odd:
            continue
        total = sum(s.numel for s in saved)
        yield Hit(
            f"modules_to_save entry {entry!r} trains {count(len(saved), 'module')} as a whole "
            f"({total:,} parameters): {shown([s.name for s in saved])}; PEFT takes every name that "
            "ends with the entry, without a dot",
            "write more of the name of the one that is meant",
            subject=entry,
        )


def experts_left_out(context: Context) -> Iterator[Hit]:
    """FXL110: all-linear on a model whose experts are bare parameters."""
    if not any(p.reason.startswith("all-linear") for p in context.plan):
        return
    for p in context.plan:
        if p.kind == "Parameter" and not p.adapted and len(p.site.shape) == 3 and p.site.calls:
            yield Hit(
                f"all-linear takes nn.Linear and Conv1D only: these {p.site.shape[0]} maps of one "
                "parameter stay frozen",
                f"add target_parameters=[{_owner(p.name)!r}], or name the layers that are meant "
                "instead of all-linear",
                site=p.name,
            )


def all_linear_incomplete(context: Context) -> Iterator[Hit]:
    """FXL112: a linear layer all-linear passes over."""
    if str(context.asked.target_modules).lower() != "all-linear":
        return
    for p in context.plan:
        head = p.name in context.output_layers or "output layer" in p.reason
        passed = p.rule == "none" and p.name and p.site.calls and not head
        if p.kind in ("Linear", "Conv1D") and passed:
            yield Hit(
                "all-linear was asked for and this linear layer is left out: PEFT translates its "
                "name to the experts' parameter",
                "name it by its full name or a longer suffix in a second adapter, or accept that "
                "it stays frozen",
                site=p.name,
            )


def fails_in_peft(context: Context) -> Iterator[Hit]:
    """FXL113: what PEFT refuses, or builds and cannot run; the plan knows it."""
    for warning in context.plan.warnings:
        if warning.startswith("peft refuses") or "fails when it runs" in warning:
            first = warning.split(" ", 1)[0]
            site = first if first in context.names else ""
            what, _, fix = warning.partition(": " if not site else ". ")
            message = what.removeprefix(f"{site} is ") if site else what
            yield Hit(message, fix, site=site, subject="" if site else "target_modules")


def unmatched_exclusion(context: Context) -> Iterator[Hit]:
    """FXL111: an exclude_modules entry that excludes nothing."""
    excluded = context.config.exclude_modules
    names = [s.name for s in context.sites]
    if not excluded or isinstance(excluded, str):
        if excluded and not any(p.verdict == "excluded" for p in context.plan):
            yield Hit(
                f"exclude_modules={excluded!r} matches no layer's whole name",
                "it is one pattern for the whole name; start it with .*",
                subject=excluded,
            )
        return
    last = sorted({n.rpartition(".")[2] for n in names})
    modules = [n for n, _ in context.model.named_modules()]
    for entry in sorted(excluded):
        if not any(_named(n, entry) for n in (*names, *modules)):
            yield Hit(
                f"exclude_modules entry {entry!r} excludes nothing",
                f"leave it out, or name what is meant.{did_you_mean(entry, last)}",
                subject=entry,
            )


_W = Severity.WARNING
RULES = (
    Rule(
        "FXL100", "nothing-adapted", Severity.ERROR, nothing_adapted,
        finds="A configuration that adapts nothing at all.",
        why="PEFT raises `ValueError` for it, after the model was loaded. Here it is a finding, so "
        "that a job which checks many configurations goes on to the next.",
        example="""\
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
report = lint(fxlora.trace(model), LoraConfig(target_modules=["proj"]))""",
        fix="Take a name out of the candidates the message lists.",
        threads=("huggingface/peft#1206",),
    ),
    Rule(
        "FXL101", "unmatched-target", _W, unmatched_target,
        finds="An entry of `target_modules` or `target_parameters` that matches nothing, beside "
        "entries that do.",
        why="PEFT raises only when no entry matches. A misspelt or foreign name beside a right one "
        "is dropped without a word, and a part of the model that was meant to train stays frozen. "
        "Where the name means some rows of a fused layer, the message says which.",
        example="""\
model = nn.Sequential(OrderedDict(q_proj=nn.Linear(4, 4), head=nn.Linear(4, 2)))
report = lint(fxlora.trace(model), LoraConfig(r=2, target_modules=["q_proj", "foobar_proj"]))""",
        fix="Leave the entry out, or write the name the model uses: `fxlora plan` lists them.",
        threads=("huggingface/peft#3693", "huggingface/trl#6773"),
    ),
    Rule(
        "FXL102", "half-matched-target", _W, half_matched_target,
        finds="An entry of `target_modules` that matches in some of the repeated blocks only, where "
        "the others have another layer in the same place that gets no adapter.",
        why="In a mixture of experts with a few dense blocks `gate_proj` names the dense ones: three "
        "of sixty blocks are adapted, and the count of trainable parameters looks plausible. Blocks "
        "that have no such part at all (the state-space blocks of a hybrid) are not reported.",
        example="""\
class Block(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.mlp = nn.Sequential(OrderedDict([(name, nn.Linear(4, 4))]))

    def forward(self, x):
        return self.mlp(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(n) for n in ("up_proj", "fused", "fused"))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

report = lint(fxlora.trace(Model()), LoraConfig(r=2, target_modules=["up_proj"]))""",
        fix="Name the layer that stands in its place too, or say that only some blocks are meant "
        "with `layers_to_transform`.",
        threads=("huggingface/peft#3554", "huggingface/peft#3711", "unslothai/unsloth#11014"),
    ),
    Rule(
        "FXL103", "uneven-layers", _W, uneven_layers,
        finds="A layer that is adapted in some of the repeated blocks and left alone in others that "
        "have it too, without `layers_to_transform` saying so.",
        why="A regular expression, a full name among suffixes or an exclusion that catches a digit "
        "(`1` in `11`) leaves holes. The result trains and is worse.",
        example="""\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(OrderedDict(up=nn.Linear(4, 4))) for _ in range(4)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

config = LoraConfig(r=2, target_modules=["layers.0.up", "layers.2.up"])
report = lint(fxlora.trace(Model()), config)""",
        fix="Use the suffix, or say which blocks are meant with `layers_to_transform`.",
        threads=("huggingface/peft#3658",),
    ),
    Rule(
        "FXL104", "unmatched-pattern-key", _W, unmatched_pattern_key,
        finds="A key of `rank_pattern` or `alpha_pattern` that matches no adapted layer.",
        why="The layer that was meant keeps the default rank or scaling.",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8), down=nn.Linear(8, 8)))
config = LoraConfig(r=2, target_modules=["up"], rank_pattern={"down": 4})
report = lint(fxlora.trace(model), config)""",
        fix="A key is a regular expression for the end of a name; it must match an adapted layer.",
    ),
    Rule(
        "FXL105", "overlapping-pattern-keys", _W, overlapping_pattern_keys,
        finds="Several keys of `rank_pattern` or `alpha_pattern` that match one layer with "
        "different values.",
        why="The first key wins. Saving an adapter sorts the keys, so after a reload another one may "
        "win: a size mismatch for ranks, another scaling, in silence, for alphas.",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8), down=nn.Linear(8, 8)))
config = LoraConfig(r=2, target_modules=["up"], rank_pattern={"up": 4, ".*p": 1})
report = lint(fxlora.trace(model), config)""",
        fix="Write keys of which exactly one matches each layer.",
    ),
    Rule(
        "FXL106", "router-adapted", _W, router_adapted,
        finds="An adapter on a router: a linear map whose scores go through a softmax or a sigmoid "
        "into a `topk` or `argmax` that chooses what runs next. Decided from the dataflow.",
        why="A trained router moves tokens between experts that were trained for others, its "
        "load-balancing loss is usually off in fine-tuning, and most serving engines have no adapter "
        "for it. On transformers 5 `all-linear` adapts the router of Qwen3-MoE, as the parameter "
        "`gate.weight`.",
        example="""\
class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        best, index = self.router(x).softmax(-1).topk(2, -1)
        y = torch.einsum("bd,bkde->bke", x, self.experts[index])
        return self.out((y * best.unsqueeze(-1)).sum(1))

traced = fxlora.trace(Mixture(), (torch.randn(3, 8),))
report = lint(traced, LoraConfig(r=2, target_modules=["router", "out"]))""",
        fix="Leave it out with `exclude_modules`, or ignore the rule at that site when training the "
        "router is the point.",
        threads=("unslothai/unsloth#4907", "huggingface/peft#3009"),
    ),
    Rule(
        "FXL107", "tower-adapted", _W, tower_adapted,
        finds="One entry that adapts layers of an image or sound tower that feeds the stream of tokens, "
        "and of the text model: layers into which pixels flow and no text does. Traced "
        "on text alone: layers of a tower that is never entered.",
        why="`q_proj` is the suffix of a layer in both. The tower then trains by surprise: more "
        "memory, worse images, and an adapter that engines for the text model refuse. Two towers "
        "that meet in a product (CLIP) or in cross-attention (Whisper) are not reported.",
        example="""\
class Chat(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32, 8)
        self.vision = nn.Sequential(OrderedDict(q_proj=nn.Linear(6, 8)))
        self.text = nn.Sequential(OrderedDict(q_proj=nn.Linear(8, 8)))

    def forward(self, ids, pixels):
        return self.text(torch.cat([self.vision(pixels), self.words(ids)], 1))

inputs = (torch.zeros(2, 5, dtype=torch.long), torch.randn(2, 3, 6))
report = lint(fxlora.trace(Chat(), inputs), LoraConfig(r=2, target_modules=["q_proj"]))""",
        fix="Name the text model's layers by a longer suffix or a regular expression such as "
        r"`.*language_model.*\.q_proj`, or leave the tower out with `exclude_modules`.",
        threads=("huggingface/peft#2615", "haotian-liu/LLaVA#1380"),
    ),
    Rule(
        "FXL108", "unmatched-module-to-save", _W, unmatched_module_to_save,
        finds="An entry of `modules_to_save` that matches no module.",
        why="PEFT is silent: the head that should be trained stays at its random start, and is not "
        "in the checkpoint.",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(4, 4), score=nn.Linear(4, 2)))
config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["classifier"])
report = lint(fxlora.trace(model), config)""",
        fix="Write the name the model uses.",
    ),
    Rule(
        "FXL109", "broad-module-to-save", _W, broad_module_to_save,
        finds="An entry of `modules_to_save` that hits several modules, or one whose name only ends "
        "with the same letters.",
        why="PEFT matches by `name.endswith(entry)`, without a dot: `head` also takes `lm_head`, and "
        "`proj` all seven projections of every Llama block. Each becomes a full trainable copy.",
        example="""\
model = nn.Sequential(
    OrderedDict(up=nn.Linear(4, 4), lm_head=nn.Linear(4, 4), head=nn.Linear(4, 2))
)
config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
report = lint(fxlora.trace(model), config)""",
        fix="Write more of the name of the one module that is meant.",
    ),
    Rule(
        "FXL110", "experts-left-out", _W, experts_left_out,
        finds="`all-linear` on a model whose experts are bare 3-D parameters, which it does not take.",
        why="Most of such a model's weights are in its experts. `all-linear` sounds like all of them, "
        "adapts attention (and on some models the router), and says nothing.",
        example="""\
class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.inner = nn.Module()
        self.inner.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.bmm(self.q_proj(x), self.inner.experts)

traced = fxlora.trace(Mixture(), (torch.randn(4, 3, 8),))
report = lint(traced, LoraConfig(r=2, target_modules="all-linear"))""",
        fix="Add the parameters to `target_parameters`, or name the layers that are meant so that "
        "leaving the experts out is said.",
        threads=("unslothai/unsloth#11014", "huggingface/peft#3711"),
    ),
    Rule(
        "FXL111", "unmatched-exclusion", Severity.NOTE, unmatched_exclusion,
        finds="An entry of `exclude_modules` that excludes nothing.",
        why="What it was meant to leave out may be adapted.",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(4, 4), gate=nn.Linear(4, 4)))
config = LoraConfig(r=2, target_modules=["up"], exclude_modules=["gat"])
report = lint(fxlora.trace(model), config)""",
        fix="Write the name the model uses: the same rules hold as for `target_modules`.",
    ),
    Rule(
        "FXL112", "all-linear-incomplete", _W, all_linear_incomplete,
        finds="A called linear layer that `all-linear` leaves out, though it is no output layer and "
        "nothing excludes it.",
        why="On transformers 5 PEFT translates the old names of experts, such as `gate_proj`, to the "
        "parameter that holds them all. On DeepSeek-V3 the dense blocks and the shared experts have "
        "linear layers of the same names, and those are passed over in silence.",
        example="""\
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

config = DeepseekV3Config(
    hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1,
    num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8,
    qk_nope_head_dim=8, first_k_dense_replace=1, vocab_size=99,
)
model = DeepseekV3ForCausalLM(config).eval()
inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": False}
traced = fxlora.trace(model, (), inputs)
settings = Settings(select=("FXL112",))
report = lint(traced, LoraConfig(r=2, target_modules="all-linear"), settings)""",
        fix="Name those layers in a second adapter, by a suffix that is no expert's name.",
        threads=("huggingface/peft#3711",),
    ),
    Rule(
        "FXL113", "fails-in-peft", Severity.ERROR, fails_in_peft,
        finds="A target PEFT refuses for this model type (Mamba's `out_proj` and `conv1d`), a "
        "subclass of nn.Linear whose forward is no linear map, or a layer called by keyword "
        "(`layer(input=x)`), or a parameter that is read past the module that holds it (an "
        "nn.ParameterList's): the adapted model fails.",
        why="The error comes from PEFT after the model was loaded, or from the first batch.",
        example="""\
class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pair = nn.Linear(8, 8), Pair(8, 8)

    def forward(self, x):
        return self.pair(self.a(x))[0]

traced = fxlora.trace(Model(), (torch.randn(2, 8),))
report = lint(traced, LoraConfig(r=2, target_modules=["a", "pair"]))""",
        fix="Leave those layers out with `exclude_modules`, or do what the message says.",
    ),
)  # fmt: skip
