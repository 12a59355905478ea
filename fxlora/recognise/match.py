"""Where a sum adds a low-rank product to a linear map of the same input.

branch   W x + b + s * B(A(dropout(x)))         at a sum of two outputs
delta    W + s * B A                            at a sum of two weights
dora     (g - 1) W x + g s B A x + W x + b      the same with a gain g = m / |W + s B A|
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fxlora.recognise.delta import delta
from fxlora.recognise.found import Found, LowRank
from fxlora.recognise.maps import Map, Maps
from fxlora.recognise.reading import ADDS, SUBS, Chain, is_in_place, name_of
from fxlora.recognise.rows import INTO_ROWS, Span, narrowed, rows_added, sides


@dataclass(frozen=True)
class _Term:
    """One summand of a sum: where it ends, what multiplies it, and the nodes on the way."""

    end: Node
    chain: Chain
    path: tuple[Node, ...] = field(default=())
    span: Span | None = None  # which of its last coordinates; None for all


def recognise(graph: GraphModule | ExportedProgram) -> Found:
    """Finds every place where a graph adds a low-rank pair to a linear map, whoever made it.

    By structure alone: no name is read. A and B are parameters, nothing but scales, casts, dropout
    and reshapes that keep rows stands between them, and the base is a linear map of the same input.

    Args:
        graph: a `torch.fx.GraphModule` (of `fxlora.trace`, `torch.fx.symbolic_trace` or a rewrite)
            or a `torch.export.ExportedProgram`, decomposed or not; read.

    Returns:
        The pairs in the order of the graph; prints as a table.

    >>> import torch
    >>> class Lora(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w, self.p, self.q = (torch.nn.Linear(8, 8), torch.nn.Linear(8, 2, bias=False),
    ...                                   torch.nn.Linear(2, 8, bias=False))
    ...     def forward(self, x):
    ...         return self.w(x) + 2 * self.q(self.p(x))
    >>> [(f.site, f.a, f.b, f.r, f.scaling) for f in recognise(torch.fx.symbolic_trace(Lora()))]
    [('w', 'p.weight', 'q.weight', 2, 2.0)]
    """
    matcher = _Matcher(Maps(graph))
    found = matcher.run()
    calls = Counter((p.a, p.b, p.weight) for p in found)
    return Found(replace(p, calls=calls[p.a, p.b, p.weight]) for p in found)


class _Matcher:
    """One pass over the sums of a graph."""

    def __init__(self, reader: Maps) -> None:
        self._read = reader
        self._at: dict[Node, set[Node]] = {}  # sum -> the maps by B that were found there

    def run(self) -> list[LowRank]:
        """Returns the pairs found at every sum, in order."""
        found: list[LowRank] = []
        for node in self._read.graph.nodes:
            if not node.users and not is_in_place(name_of(node)):
                continue  # peft's ParamWrapper leaves a sum behind that nobody reads
            pairs = self._sum(node)
            self._at[node] = {p.up for p in pairs}
            found += pairs or delta(self._read, node)
        # The W + s B A inside DoRA's norm is a part of its gain, and no pair of its own.
        inside = self._read.behind([g for p in found for g in p.gains])
        return [p for p in found if p.form != "delta" or p.out not in inside]

    def _sum(self, node: Node) -> list[LowRank]:
        both = operands(node)
        if both is None:
            return []
        found: list[LowRank] = []
        for i, (more, factor) in enumerate(both):
            if i == 0 and name_of(node) in INTO_ROWS:
                continue
            bases: list[tuple[_Term, Map]] | None = None
            for term in list(self._terms(more, factor)):
                branch = self._branch(term)
                if branch is None:
                    continue
                if bases is None:
                    other, sign = both[1 - i]
                    bases = [(t, m) for t in self._terms(other, sign)
                             if (m := self._read.map(t.end)) is not None]  # fmt: skip
                pair = next(
                    (p for t, m in bases if (p := self._pair(node, term, branch, t, m))), None
                )
                if pair is not None:
                    found.append(pair)
        return found

    def _terms(self, start: Node, factor: float) -> Iterator[_Term]:
        """Yields what a value is the sum of, without the pairs already found inside it."""
        todo: list[tuple[Node, Chain, tuple[Node, ...], frozenset[Node], Span | None]]
        todo = [(start, Chain(start, factor), (), frozenset(), None)]
        while todo:
            at, so_far, path, known, span = todo.pop()
            chain = self._read.back(at)
            chain.scale *= so_far.scale
            chain.named = [*so_far.named, *chain.named]
            chain.gains = [*so_far.gains, *chain.gains]
            chain.dropout = max(so_far.dropout, chain.dropout)
            path = (*path, *chain.nodes)
            part = narrowed(chain.end, span)
            if part is not None:
                todo.append((part[0], chain, (*path, chain.end), known, part[1]))
                continue
            inner = operands(chain.end)
            if inner is None:
                if chain.end not in known:
                    yield _Term(chain.end, chain, path, span)
                continue
            if name_of(chain.end) in INTO_ROWS:
                del inner[1]  # of some rows only, so no summand of the whole
            known = known | self._at.get(chain.end, set())
            for side, sign in reversed(inner):
                less = Chain(side, chain.scale * sign, chain.named, chain.dropout, chain.gains)
                todo.append((side, less, (*path, chain.end), known, span))

    def _branch(self, term: _Term) -> tuple[Map, Map, Chain] | None:
        """Returns the maps by B and by A behind a summand, and the chains between and before."""
        up = self._read.map(term.end)
        if up is None or up.kind == "embedding" or (up.kind == "conv" and not up.pointwise):
            return None
        between = self._read.back(up.x)
        down = self._read.map(between.end)
        if down is None or down.bias is not None or down.out_features != up.in_features:
            return None
        if up.kind != down.kind and (up.kind, down.kind) != ("linear", "embedding"):
            return None
        if between.dropout or not (self._leaf(up) and self._leaf(down)):
            return None
        passed = {*term.path, term.end, *between.nodes, between.end}
        changed = [*term.path, term.end, *between.nodes, between.end]
        if any(w not in passed for n in changed for w in self._read.written(n)
               if not self._is_sum_into(w, term)):  # fmt: skip
            return None
        return up, down, between

    def _is_sum_into(self, writer: Node, term: _Term) -> bool:
        """Whether the write is a sum that comes after the whole term."""
        return name_of(writer) in ADDS and self._read.order[writer] > self._read.order[term.end]

    def _leaf(self, m: Map) -> bool:
        """Whether a map's weight is a parameter of two or more dimensions."""
        if m.node.op != "call_module":
            return True
        weight = self._read.module(m.node)._parameters.get("weight")
        return weight is not None or type(self._read.module(m.node)).__name__ == (
            "BlockDiagonalLinear"
        )

    def _pair(
        self, out: Node, term: _Term, branch: tuple[Map, Map, Chain], base: _Term, m: Map
    ) -> LowRank | None:
        up, down, between = branch
        kind = "embedding" if down.kind == "embedding" else up.kind
        rows = _rows(out, term, up, base, m)
        if m.kind != kind or rows == _NOT_ADDED:
            return None
        if m.kind != "conv" and m.in_features != down.in_features:
            return None
        if m.tensor is down.tensor or m.tensor is up.tensor:
            return (
                None  # y + V y with y = W x is the model's own residual: W is no factor of itself
            )
        before = self._shared(m.x, down.x)
        if before is None or before.gains:
            return None
        source = before.end
        if self._rewritten(source, m.node, down.node):
            return None
        named = [*term.chain.named, *up.named, *between.named, *down.named, *before.named]
        for n in (*base.chain.named, *m.named):
            if n not in named:
                return None
            named.remove(n)
        scale = term.chain.scale * up.scale * between.scale * down.scale * before.scale
        own = base.chain.scale * m.scale
        if own == 0 or (base.chain.gains and not term.chain.gains):
            return None
        return LowRank(
            "rows" if kind == "embedding" else "branch", m.node, source, down.node, up.node, out,
            tuple(dict.fromkeys(term.path)), m.weight, down.weight, up.weight, up.bias or "",
            down.out_features, m.in_features, up.out_features, scale / own, tuple(named),
            before.dropout, tuple(dict.fromkeys(term.chain.gains)), (down.turned, up.turned),
            rows, m.turned,
        )  # fmt: skip

    def _shared(self, one: Node, other: Node) -> Chain | None:
        """Returns the way from the branch's input back to the first value the base reads too."""
        alike, chain = {one}, Chain(one)
        while (before := self._read.step(chain)) is not None and chain.plain:
            alike.add(before)
            chain.end = before
        chain = Chain(other)
        while chain.end not in alike:
            before = self._read.step(chain)
            if before is None:
                return None
            chain.end = before
        return chain

    def _rewritten(self, source: Node, one: Node, other: Node) -> bool:
        """Whether the input is written to in place between the two that read it."""
        order = self._read.order
        first, last = sorted((order[one], order[other]))
        return any(first < order[w] < last for w in self._read.written(source))


_NOT_ADDED = (range(0),)


def _rows(out: Node, term: _Term, up: Map, base: _Term, m: Map) -> tuple[range, ...] | None:
    """Returns which rows of the base map get the product; () for all, _NOT_ADDED where none fit."""
    if term.span is not None and term.span != (0, up.out_features):
        return _NOT_ADDED
    if name_of(out) in INTO_ROWS:
        try:
            rows = rows_added(out, -1)
        except ValueError:
            return _NOT_ADDED
    elif base.span is not None:
        rows = (range(*base.span),)
    else:
        return () if m.out_features == up.out_features else _NOT_ADDED
    if m.kind != "linear" or (rows is not None and sum(map(len, rows)) != up.out_features):
        return _NOT_ADDED
    return rows


def operands(node: Node) -> list[tuple[Node, float]] | None:
    """Returns the two tensors a sum or difference adds, each with its factor; None for no sum."""
    name = name_of(node)
    if name in INTO_ROWS:
        to, more = sides(node)
        plain = isinstance(to, Node) and isinstance(more, Node) and not node.kwargs.get("alpha")
        return [(to, 1.0), (more, 1.0)] if plain else None
    if name not in ADDS and name not in SUBS:
        return None
    right = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    left = node.args[0] if node.args else node.kwargs.get("input")
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    if not isinstance(alpha, (int, float)):
        return None
    return [(left, 1.0), (right, float(-alpha if name in SUBS else alpha))]
