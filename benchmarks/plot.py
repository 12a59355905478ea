"""Every ratio of a run as a dot on one logarithmic line per group; ours is better to the right."""

from __future__ import annotations

from pathlib import Path

from benchmarks.record import ORDER, Run

_INK, _GAIN, _LOSS = "#44546A", "#2F6DA8", "#B04A00"
_SKIP = ("growth", "startup")  # set against a floor or themselves, not against a peer


def save(found: Run, path: Path) -> None:
    """Writes the plot; the same run gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fxlora", "svg.fonttype": "none", "font.size": 9})
    rows = _rows(found)
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.2))
    for y, (_, ratios) in enumerate(rows):
        for ratio in ratios:
            lost = ratio < 0.99
            axes.plot(
                [ratio],
                [y],
                marker="x" if lost else "o",  # a loss is another shape, not another colour only
                color=_LOSS if lost else _GAIN,
                markersize=6,
                alpha=0.65,
                linestyle="",
            )
    axes.set_xscale("log")
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 10, 40, 100, 400) if _in(t, rows)]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("peer / ours: right of the line ours is faster or smaller; × is a loss")
    axes.grid(axis="x", color="#DDE3EA", linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def _rows(found: Run) -> list[tuple[str, list[float]]]:
    rows: dict[str, list[float]] = {}
    for group in dict.fromkeys([*ORDER, *(c.group for c in found.cases)]):
        for case in found.cases:
            if case.group == group and group not in _SKIP:
                for r in case.ratios:
                    rows.setdefault(f"{group}: {r['ours']}", []).append(r["median"])
    return list(rows.items())


def _in(tick: float, rows: list[tuple[str, list[float]]]) -> bool:
    every = [r for _, ratios in rows for r in ratios] or [1.0]
    return min([*every, 1.0]) / 1.5 <= tick <= max([*every, 1.0]) * 1.5
