"""The benchmarks' own arithmetic, on numbers that are known; no test here looks at a real time."""

from __future__ import annotations

import doctest
import gc
import itertools
import time
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import child, models, record, tables, timing
from benchmarks.__main__ import LATEST, PICTURE, compared
from benchmarks.record import Case, Run
from benchmarks.timing import Contender, Samples

ROOT = Path(__file__).parent.parent


def samples(*cpu: float, wall: float = 1.0) -> Samples:
    return Samples(list(cpu), [wall] * len(cpu))


def trivial() -> Run:
    """A run of one pair that really was timed, with a peer that fails."""

    def refuses(_: object) -> None:
        raise ValueError("no\nmore")

    found = timing.interleave(
        {
            "floor": Contender(lambda _: sum(range(10))),
            "ours": Contender(lambda _: sum(range(1000))),
            "peer": Contender(lambda _: sum(range(2000))),
            "broken": Contender(refuses),
        },
        seconds=0.01,
        rounds=(2, 2),
    )
    pairs = [("ours", "peer"), ("ours", "broken")]
    case = record.timed("forward", "a sum", found, pairs, floors=("floor",))
    sizes = record.sized("saved", "a size", {"f": 1.0, "a": 3.0, "b": 2.0}, [("a", "b")], floor="f")
    return Run("2026-01-02", {"cores": "2"}, {"torch": "0"}, True, (case, sizes), ("No GPU.",))


def test_ratios_are_peer_over_ours_by_rounds_by_minima_and_by_wall() -> None:
    found = timing.ratio(samples(1, 2, 4, wall=2), samples(3, 4, 4, wall=3))
    assert found == {"median": 2.0, "best": 3.0, "wall": 1.5}


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians() -> None:
    # One slow round on both sides must not count for either.
    found = timing.ratio(samples(1, 10, 4), samples(2, 20, 40))
    assert found["median"] == 2.0


def test_a_side_without_samples_gives_no_ratio() -> None:
    assert timing.ratio(Samples(failed="refuses"), samples(1)) == {}


def test_recovered_is_the_share_of_the_tax_above_the_floor() -> None:
    assert timing.recovered(samples(3), samples(4), samples(2)) == 0.5
    assert timing.recovered(samples(5), samples(4), samples(2)) == -0.5
    assert timing.recovered(samples(1), samples(1), samples(0.99)) is None


def test_what_can_be_recovered_is_above_the_floor_and_what_adapters_cost_in_any_case() -> None:
    found = {"ours": samples(3), "peer": samples(5), "base": samples(1), "least": samples(2)}
    case = record.timed("step", "a step", found, [("ours", "peer")], floors=("base", "least"))
    (ratio,) = case.ratios
    assert (ratio["recovered"], ratio["avoidable"]) == (0.5, 1.0)


def test_every_round_has_an_order_of_its_own_and_goes_back() -> None:
    order: list[str] = []
    named = {n: Contender(lambda _, n=n: order.append(n), setup=lambda: None) for n in "abcd"}
    gc.freeze()  # what other tests hold need not be looked through before each of a hundred calls
    try:
        timing.interleave(named, seconds=0.0, rounds=(12, 12))
    finally:
        gc.unfreeze()
    said = "".join(order)[4:]  # behind the warm-up
    rounds = [said[i : i + 8] for i in range(0, len(said), 8)]
    assert len(rounds) == 12
    assert all(sorted(r[:4]) == list("abcd") and r[:4] == r[:3:-1] for r in rounds)
    before = {n: {x for x, y in itertools.pairwise(said) if y == n} for n in "abcd"}
    assert all(len(names) == 4 for names in before.values())  # everybody, and itself at the turn


def test_contenders_are_run_there_and_back_and_setups_are_outside_the_clock() -> None:
    order: list[str] = []

    def slow() -> str:
        time.sleep(0.02)
        return "built"

    def run(name: str) -> Contender:
        return Contender(lambda given: order.append(f"{name} {given}"), slow)

    found = timing.interleave({"a": run("a"), "b": run("b")}, seconds=0, rounds=(1, 1))
    warm_up, measured = order[:2], order[2:]
    assert warm_up == ["a built", "b built"]
    assert measured == measured[::-1]
    assert sorted(measured[:2]) == ["a built", "b built"]
    assert len(found["a"].wall) == 1


def test_a_failing_peer_is_a_row_and_not_the_end_of_the_run() -> None:
    case = trivial().cases[0]
    assert case.values["broken"] == {"failed": "ValueError: no"}
    assert [(r["ours"], r["peer"]) for r in case.ratios] == [("ours", "peer")]


def test_a_floor_is_taken_off_both_sizes() -> None:
    (found,) = trivial().cases[1].ratios
    assert found == {"ours": "a", "peer": "b", "median": 0.5, "whole": 2 / 3}


def test_a_run_comes_back_from_its_file_and_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(trivial_text := (run := trivial()).to_json(), encoding="utf-8")
    assert record.read(path) == run
    path.write_text(trivial_text.replace('"format": 1', '"format": 0'), encoding="utf-8")
    with pytest.raises(ValueError, match="format 0; this script reads 1"):
        record.read(path)


def test_the_page_shows_floors_losses_failures_and_the_missing_gpu() -> None:
    page = tables.page(trivial(), "p.svg")
    assert "*floor*" in page
    assert "ValueError: no" in page
    assert "**0.50**" in page
    assert "No GPU." in page
    assert "2 ratios; 1 of them are losses." in page


def test_a_change_of_every_ratio_is_told_and_a_lost_row_too() -> None:
    def run(*ratios: tuple[str, float]) -> Run:
        cases = tuple(
            Case("g", n, "s", {}, ratios=({"ours": "a", "peer": "b", "median": r},))
            for n, r in ratios
        )
        return Run("2026-01-02", {}, {}, True, cases)

    text = compared(run(("x", 2.0), ("y", 1.0)), run(("x", 3.0), ("z", 1.0)))
    assert "+50.0%  g / x: a against b: 2.00 -> 3.00" in text
    assert "gone  g / y: a against b" in text
    assert "new  g / z: a against b" in text


def test_groups_not_measured_again_are_kept() -> None:
    old = trivial()
    new = Run("2026-02-03", {}, {}, False, (Case("saved", "new", "bytes", {}),))
    assert [c.name for c in record.joined(old, new).cases] == ["a sum", "new"]


def test_a_child_that_hangs_computes_without_end_or_raises_is_stopped_and_says_why(
    tmp_path: Path,
) -> None:
    text = """\
import time
def hangs(): time.sleep(600)
def computes():
    while True: pass
def raises(): raise ValueError("no more")
"""
    (tmp_path / "peers.py").write_text(text, encoding="utf-8")

    def call(name: str, patience: float) -> dict[str, str]:
        return child.call(f"peers:{name}", {}, timeout=1, path=tmp_path, patience=patience)

    assert call("hangs", 3) == {"failed": "stopped at 3 s"}
    assert call("computes", 300) == {"failed": "stopped at 1 s of CPU"}
    assert call("raises", 300) == {"failed": "ValueError: no more"}


@pytest.mark.parametrize("module", [timing, record, tables, models], ids=lambda m: m.__name__)
def test_the_examples_in_docstrings_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_the_docs_page_is_made_from_the_committed_numbers() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == tables.page(record.read(LATEST), PICTURE)
