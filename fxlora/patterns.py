"""The shortest of a few forms of a regular expression that takes exactly some of many names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from fxlora.suffixes import smallest_lists


def smallest_regex(universe: Iterable[str], wanted: Iterable[str]) -> str:
    r"""Returns a short pattern that matches the whole of each wanted name and of no other.

    Names that share their beginning or their choices share their text; numbers become `\d+` where
    all there are is wanted, and digit classes where some are. The shortest of a few forms.

    >>> names = [f"layers.{i}.{n}_proj" for i in range(12) for n in "qkv"]
    >>> smallest_regex(names, [n for n in names if n.endswith("v_proj")])
    '.*\\.v_proj'
    >>> smallest_regex(names, [n for n in names if n[-6] in "qk" and int(n[7:-7]) > 8])
    '.*\\.(1[01]|9)\\.(k|q)_proj'
    """
    every, take = list(universe), set(wanted)
    forms = [f for f in _forms(every, take) if _takes(f, every) == take]
    return min(forms, key=lambda f: (len(f), f))


def _takes(pattern: str, names: Iterable[str]) -> set[str]:
    compiled = re.compile(pattern)
    return {n for n in names if compiled.fullmatch(n)}


def _forms(every: list[str], take: set[str]) -> Iterator[str]:
    """Yields patterns, some of which may take too much; the last takes exactly what it should."""
    lists = smallest_lists(every, take)
    if lists is not None and not lists.excluded:
        whole = [t for t in lists.targets if t in take]
        suffixes = [t for t in lists.targets if t not in take]
        ends = language(segments(set(suffixes)), set()) if suffixes else ""
        alone = language(segments(set(whole)), set()) if whole else ""
        if ends:
            yield "|".join(filter(None, (rf".*\.{ends}", alone)))
        yield rf"(.*\.)?{language(segments(set(lists.targets)), set())}"
    parts, universe = segments(take), segments(set(every))
    shared = min((len(p) for p in parts), default=1) - 1
    for cut in range(shared, 0, -1):
        if len({p[:cut] for p in parts}) == 1:
            tails = {p[cut:] for p in parts}
            yield rf".*\.{language(tails, {p[cut:] for p in universe if p[:cut] in {q[:cut] for q in parts}})}"
    yield language(parts, universe)


def segments(names: set[str]) -> set[tuple[str, ...]]:
    """Returns names as tuples of their dotted parts."""
    return {tuple(n.split(".")) for n in names}


def language(names: set[tuple[str, ...]], universe: set[tuple[str, ...]]) -> str:
    r"""Returns a pattern for names given as segments, those with equal continuations merged.

    Args:
        names: what the pattern takes.
        universe: all there is at this place, for where `\d+` will do; empty for nothing known.
    """
    rests: dict[str, set[tuple[str, ...]]] = {}
    for first, *rest in sorted(names):
        rests.setdefault(first, set()).add(tuple(rest))
    groups: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first, rest_set in rests.items():
        groups.setdefault(frozenset(rest_set), []).append(first)
    options = []
    numbers = {u[0] for u in universe if u and u[0].isdigit()}
    for continuations, heads in groups.items():
        text = _heads(heads, numbers)
        onward = {c for c in continuations if c}
        if onward:
            below = {u[1:] for u in universe if len(u) > 1 and u[0] in heads}
            tail = rf"\.{language(onward, below)}"
            text += tail if () not in continuations else f"({tail})?"
        options.append(text)
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"


def _heads(heads: list[str], numbers: set[str]) -> str:
    digits = {h for h in heads if h.isdigit()}
    words = [h for h in heads if not h.isdigit()]
    options = [_words(words)] if words else []
    if digits:
        # Two numbers or more: a single one is a name that happens to be a number.
        options.append(r"\d+" if len(digits) > 1 and numbers == digits else _digits(digits))
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"


def _words(words: list[str]) -> str:
    """Returns an alternation of words, what all begin and end with said once.

    >>> _words(["q_proj", "k_proj"]), _words(["fc1"])
    ('(q|k)_proj', 'fc1')
    """
    if len(words) == 1:
        return re.escape(words[0])
    least = min(map(len, words))
    end = next(n for n in range(least, -1, -1) if len({w[len(w) - n :] for w in words}) == 1)
    end = end - 1 if end == least else end  # leave every word something to differ in
    end = 0 if end < 3 else end
    inner = [re.escape(w[: len(w) - end]) for w in words]
    return f"({'|'.join(inner)}){re.escape(words[0][len(words[0]) - end :])}"


def _digits(numbers: set[str]) -> str:
    """Returns a pattern for exactly these numbers.

    >>> _digits({str(n) for n in range(16)}), _digits({"7"})
    ('([02-9]|1[0-5]?)', '7')
    """
    rests: dict[str, set[str]] = {}
    for n in numbers:
        rests.setdefault(n[0], set()).add(n[1:])
    groups: dict[frozenset[str], list[str]] = {}
    for first in sorted(rests):
        groups.setdefault(frozenset(rests[first]), []).append(first)
    options = []
    for continuations, firsts in groups.items():
        onward = {c for c in continuations if c}
        tail = _digits(onward) if onward else ""
        if tail and "" in continuations:
            tail = f"{tail if _is_one(tail) else f'({tail})'}?"
        options.append(_class(firsts) + tail)
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"


def _is_one(text: str) -> bool:
    return len(text) == 1 or text == r"\d" or bool(re.fullmatch(r"\[[^]]*\]|\([^()]*\)", text))


def _class(digits: list[str]) -> str:
    if len(digits) == 10:
        return r"\d"
    if len(digits) == 1:
        return digits[0]
    runs: list[list[str]] = []
    for d in digits:
        if runs and int(d) == int(runs[-1][-1]) + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    return f"[{''.join(map(_run, runs))}]"


def _run(run: list[str]) -> str:
    return "".join(run) if len(run) < 3 else f"{run[0]}-{run[-1]}"
