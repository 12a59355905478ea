"""What was recognised: one low-rank pair at one call, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from fxlora.html import Printed
from fxlora.text import count, table


@dataclass(frozen=True)
class LowRank:
    """One pair of factors, at one place where its product is added.

    Attributes:
        form: "branch" (y + s B A x), "rows" (the same behind an embedding) or "delta" (W + s B A).
        base: the node of the base map; of a delta, the weight it is added to.
        x: the input base and branch share; None for a delta.
        down, up: the nodes that multiply by A and by B; of a delta, the node of the product twice.
        out: the sum. `between` are the nodes from `up` to it.
        weight, a, b: the names of the base weight and of the two factors.
        b_bias: the name of the bias of B; "" when it has none.
        r, in_features, out_features: of the map; channels of a convolution.
        scaling: the number that multiplies the product relative to the base.
        scaled_by: the names of tensors that multiply it too.
        dropout: the probability on the branch's input; 0 when there is none.
        gains: DoRA's m / |W + s B A|, where the pair has one.
        turned: whether A, and B, are stored transposed to (r, in) and (out, r).
        rows: which rows of the base map the product is added to, where it is for a part of a fused
            layer: () for all of them, None when the graph computes the index.
        base_turned: whether the base map reads its weight as (in, out).
        calls: at how many places the same pair is added.
    """

    form: str
    base: Node
    x: Node | None
    down: Node
    up: Node
    out: Node
    between: tuple[Node, ...]
    weight: str
    a: str
    b: str
    b_bias: str
    r: int
    in_features: int
    out_features: int
    scaling: float
    scaled_by: tuple[str, ...]
    dropout: float
    gains: tuple[Node, ...]
    turned: tuple[bool, bool]
    rows: tuple[range, ...] | None = ()
    base_turned: bool = False
    calls: int = 1

    @property
    def site(self) -> str:
        """The path of what holds the base weight; a lone parameter's own name."""
        owner, _, last = self.weight.rpartition(".")
        return owner if last == "weight" else self.weight

    @property
    def variant(self) -> str:
        """`"dora"` or `""`."""
        return "dora" if self.gains else ""

    @property
    def where(self) -> str:
        """The rows as text: `0:64`, or `0:16, 48:64, ...`; "" for all of them."""
        if self.rows is None:
            return "some rows"
        shown = [f"{r.start}:{r.stop}" for r in self.rows[:2]]
        return ", ".join(shown + (["..."] if len(self.rows) > 2 else []))

    @property
    def low_rank(self) -> bool:
        """Whether r is below both widths; a pair of any r is found."""
        return self.r < min(self.in_features, self.out_features)


class Found(Printed, tuple[LowRank, ...]):
    """The pairs of a graph, in its order; prints as a table."""

    __slots__ = ()

    def _parts(self) -> Iterable[str]:
        head = ("site", "form", "A", "B", "r", "out x in", "scaling", "dropout", "calls")
        rows = [
            (
                (p.site or "(root)") + (f" [{p.where}]" if p.where else ""), p.variant or p.form, p.a, p.b, str(p.r),
                f"{p.out_features} x {p.in_features}",
                " * ".join([f"{p.scaling:g}", *p.scaled_by]), f"{p.dropout:g}", str(p.calls),
            )
            for p in self
        ]  # fmt: skip
        title = count(len(self), "low-rank pair")
        return [title, "", table(head, rows, right=(4, 6, 7, 8))] if rows else [title]
