"""Interleaved timing: every contender in one process, forwards then backwards, CPU and wall time."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

LEAST = 0.004  # a sample shorter than this is lost in the clock and the scheduler


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        run: the timed part; takes what `setup` returned.
        setup: made anew before every sample, outside the clock; None for a run that leaves no trace.
    """

    run: Callable[[Any], object]
    setup: Callable[[], Any] | None = None


@dataclass
class Samples:
    """Seconds per call of one contender, one entry a round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns what is kept: medians, minima, how many rounds."""
        if self.failed or not self.cpu:
            return {"failed": self.failed or "not run"}
        return {
            "median": statistics.median(self.cpu),
            "best": min(self.cpu),
            "wall": statistics.median(self.wall),
            "rounds": len(self.cpu),
        }


def nothing() -> None:
    """Waits for nothing: on a CPU a call has ended when it returns."""


def interleave(
    contenders: dict[str, Contender],
    *,
    seconds: float = 4.0,
    rounds: tuple[int, int] = (3, 25),
    warm: bool = True,
    wait: Callable[[], None] = nothing,
) -> dict[str, Samples]:
    """Times all contenders, A B C C B A in every round, so that a drift of the machine hits all.

    Every round has an order of its own, the same ones in every run: what runs before a contender
    leaves it a warm or a cold machine, and must not be the same one each time.

    Args:
        contenders: by name.
        seconds: about how long all of it may take; short contenders get more rounds.
        rounds: the fewest and the most rounds.
        warm: run each once before the clock; without it there are the fewest rounds.
        wait: waits until the device has done what was asked of it.

    Returns:
        Samples per contender. One that raises is left out from then on, and says why.
    """
    found = {name: Samples() for name in contenders}
    calls: dict[str, int] = {}
    spent = 0.0
    for name, c in contenders.items():  # a warm-up, which also says how long a call takes
        if not warm:
            calls[name] = 1
            continue
        try:
            if c.setup is None:
                _sample(c, 1, wait)
            cpu, wall = _sample(c, 1, wait)
        except Exception as e:  # noqa: BLE001 - a peer may fail in any way; its row says how
            found[name].failed = said(e)
            continue
        calls[name] = 1 if c.setup else max(1, min(2000, int(LEAST / max(cpu, wall, 1e-7))))
        spent += 2 * max(cpu, wall) * calls[name]
    many = max(rounds[0], min(rounds[1], int(seconds / max(spent, 1e-9)))) if warm else rounds[0]
    orders = random.Random(0)
    names = list(contenders)
    for _ in range(many):
        _round(contenders, calls, found, wait, orders.sample(names, len(names)))
    return found


def _round(
    contenders: dict[str, Contender],
    calls: dict[str, int],
    found: dict[str, Samples],
    wait: Callable[[], None],
    order: list[str],
) -> None:
    names = [name for name in order if name in calls]
    twice: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in [*names, *reversed(names)]:
        try:
            twice[name].append(_sample(contenders[name], calls[name], wait))
        except Exception as e:  # noqa: BLE001 - as above
            found[name].failed = found[name].failed or said(e)
    for name, pairs in twice.items():
        if found[name].failed:
            calls.pop(name, None)
            continue
        found[name].cpu.append(statistics.mean(cpu for cpu, _ in pairs))
        found[name].wall.append(statistics.mean(wall for _, wall in pairs))


def _sample(c: Contender, calls: int, wait: Callable[[], None]) -> tuple[float, float]:
    given = None
    if c.setup:  # what is built leaves cycles behind; a small step does not, and a sweep takes long
        given = c.setup()
        gc.collect()
    gc.disable()  # a collection belongs to whoever left the garbage, not to whom it meets
    try:
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            c.run(given)
        wait()
        return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls
    finally:
        gc.enable()


def ratio(ours: Samples, peer: Samples) -> dict[str, float]:
    """Returns peer / ours, so that above 1 we are faster.

    Returns:
        `median` of the rounds' ratios in CPU time, `best` from the two minima, and `wall`, the
        median in wall time. Empty when either side has no samples.

    >>> half = ratio(Samples([1.0, 1.0, 2.0], [1, 1, 1]), Samples([2.0, 2.0, 2.0], [3, 3, 3]))
    >>> half == {"median": 2.0, "best": 2.0, "wall": 3.0}
    True
    """
    if ours.failed or peer.failed or not ours.cpu or not peer.cpu:
        return {}
    if len(ours.cpu) != len(peer.cpu):  # not of one pass: of the medians
        return {
            "median": statistics.median(peer.cpu) / statistics.median(ours.cpu),
            "best": min(peer.cpu) / min(ours.cpu),
            "wall": statistics.median(peer.wall) / statistics.median(ours.wall),
        }
    return {
        "median": _middle(ours.cpu, peer.cpu),
        "best": min(peer.cpu) / min(ours.cpu),
        "wall": _middle(ours.wall, peer.wall),
    }


def _middle(ours: Iterable[float], peer: Iterable[float]) -> float:
    return statistics.median(b / a for a, b in zip(ours, peer, strict=True))


def recovered(ours: Samples, peer: Samples, floor: Samples) -> float | None:
    """Returns the share of the peer's time above the floor that ours does not spend.

    None where the peer is within 2 % of the floor: there is nothing to recover, only noise.
    """
    if not len(ours.cpu) == len(peer.cpu) == len(floor.cpu) > 0:
        return None
    tax = [p - f for p, f in zip(peer.cpu, floor.cpu, strict=True)]
    if statistics.median(tax) < 0.02 * statistics.median(peer.cpu):
        return None
    saved = [p - o for p, o in zip(peer.cpu, ours.cpu, strict=True)]
    return statistics.median(saved) / statistics.median(tax)


def together(one: Samples, other: Samples) -> Samples:
    """Returns the sum of two contenders, round by round; none where one of them stopped."""
    if len(one.cpu) != len(other.cpu):
        return Samples(failed=one.failed or other.failed or "not of one pass")
    return Samples(
        [a + b for a, b in zip(one.cpu, other.cpu, strict=True)],
        [a + b for a, b in zip(one.wall, other.wall, strict=True)],
    )


def said(e: BaseException) -> str:
    """Returns an exception as one short line."""
    lines = str(e).strip().splitlines()
    text = f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
    return text if len(text) <= 120 else text[:117] + "..."
