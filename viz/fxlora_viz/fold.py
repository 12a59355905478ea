"""Panels -> panels in which a run of equal blocks is drawn once, and modules have boxes.

Blocks are equal when they have the same parts, shapes, parameters, flags and adapters in all of
the panels: so both sides of a before/after sheet fold alike, and a layer the rewrite left out
stands alone. Whether gradient reaches an activation is no part of it: the first block's input never
carries any, and would always stand alone; a mixed flag is said on the node instead.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from fxlora_viz.again import again
from fxlora_viz.looks import look
from fxlora_viz.names import clean, tensor
from fxlora_viz.picture import Arrow, Box, Item, Panel
from fxlora_viz.picture import inside as inside_box
from fxlora_viz.ports import with_ports

Frame = tuple[str, int]
_WORTH = 6  # blocks of fewer nodes are simply drawn again
_LEAVES = 3  # so many equal single nodes in a row are folded; two are simply drawn


def fold(panels: list[Panel], enabled: bool = True) -> list[Panel]:
    """Returns the panels with boxes, and with equal neighbouring blocks drawn once.

    Args:
        panels: the panels of one sheet; not changed.
        enabled: False draws every block; boxes are made all the same.
    """
    keys = _Keys(panels)
    return [_Folder(panel, keys, enabled).result() for panel in panels]


class _Keys:
    """What a block looks like in all panels: equal keys, equal pictures."""

    def __init__(self, panels: list[Panel]) -> None:
        self._indexes = [_Index(p) for p in panels]
        self._known: dict[Frame, tuple[Any, ...]] = {}

    def of(self, frame: Frame) -> tuple[Any, ...]:
        """Returns the key of a module call."""
        if frame not in self._known:
            self._known[frame] = tuple(i.key(frame) for i in self._indexes)
        return self._known[frame]


class _Index:
    """The items of one panel by the module call they run in, and their arrows."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self.inside: dict[Frame, list[str]] = {}
        for key, item in panel.items.items():
            for frame in item.frames:
                self.inside.setdefault(frame, []).append(key)
        self.into: dict[str, list[Arrow]] = {}
        self.out: dict[str, list[Arrow]] = {}
        for arrow in panel.arrows:
            self.into.setdefault(arrow.target, []).append(arrow)
            self.out.setdefault(arrow.source, []).append(arrow)

    def key(self, frame: Frame) -> tuple[Any, ...]:
        """Returns everything the picture shows of a block, with its outside numbered."""
        inside = {k: i for i, k in enumerate(self.inside.get(frame, ()))}
        outside: dict[str, int] = {}
        rows = []
        for key in inside:
            wires = []
            for a in self.into.get(key, ()):
                if a.source in inside:
                    wires.append((inside[a.source], a.label))
                else:
                    number = outside.setdefault(a.source, len(outside))
                    wires.append((-1 - number, a.label))
            leaves = any(a.target not in inside for a in self.out.get(key, ()))
            item = self.panel.items[key]
            rows.append((*look(item, frame[0]), tuple(wires), leaves, self._tags(item, frame)))
        return tuple(rows)

    def _tags(self, item: Item, frame: Frame) -> tuple[str, ...]:
        # Two layers that read different masks are different layers. A table a block computes for
        # itself is named by operations inside it, which differ from block to block: skip those.
        return tuple(k for k, frames in item.tag_keys if frame not in frames) + item.tags


@dataclass
class _Segment:
    """Neighbouring items at one level: a loose item, or everything in one module call."""

    frame: Frame | None
    keys: list[str]
    count: int = 1
    last: str = ""
    calls: bool = False
    folded: bool = False  # itself a fold, or one is inside


class _Folder:
    """Folds one panel; the partition comes from the shared keys."""

    def __init__(self, panel: Panel, keys: _Keys, enabled: bool) -> None:
        self._panel = panel
        self._keys = keys
        self._enabled = enabled
        self._stands_for: dict[str, str] = {}  # item of a folded block -> item that is drawn
        self._block_of: dict[str, list[tuple[str, int]]] = {}  # item -> folds and its turn in them
        self._boxes: dict[str, Box] = {}
        self._home: dict[str, str] = {}
        self._entries: list[tuple[str, Frame]] = []
        self._whole: set[str] = set()  # modules trained as a whole whose box says so

    def result(self) -> Panel:
        """Returns the folded panel."""
        self._level(list(self._panel.items), 0, "")
        self._sites()
        items = self._merged()
        panel = replace(
            self._panel,
            items=items,
            arrows=self._arrows(),
            boxes=self._boxes,
            home={k: h for k, h in self._home.items() if k in items},
        )
        for box, frame in self._entries:
            _add_entry(panel, box, frame)
        return again(with_ports(panel))

    def _merged(self) -> dict[str, Item]:
        """Returns the drawn items, each with the flags of all it stands for."""
        flags: dict[str, list[bool | None]] = {}
        for key, item in self._panel.items.items():
            flags.setdefault(self._drawn(key), []).append(item.grad)
        found = {}
        for key, grads in flags.items():
            item = self._panel.items[key]
            reached = grads.count(True)
            if 0 < reached < len(grads):
                note = f"gradient in {reached} of {len(grads)} blocks"
                item = replace(item, grad=True, note=note)
            if item.whole and item.whole not in self._whole and item.weights:
                item = replace(item, lines=(*item.lines, "trained as a whole"))
            found[key] = item
        return found

    # ---- levels ------------------------------------------------------------------------------

    def _level(self, keys: list[str], depth: int, parent: str) -> bool:
        """Boxes and folds the items of one level; returns whether a fold is at it or below."""
        segments = self._fold_runs(self._segments(keys, depth))
        found = [s.count > 1 or self._has_fold(s.keys, depth + 1) for s in segments]
        earlier: dict[Any, str] = {}
        for segment, inner in zip(segments, found, strict=True):
            frame = segment.frame
            if frame is None or (segment.count == 1 and self._is_plain(segment, frame)):
                self._home.update(dict.fromkeys(segment.keys, parent))
                continue
            through = segment.count == 1 and (
                # A wrapper around everything, or around the only folds, says nothing.
                len(segments) == 1 or (inner and found.count(True) == 1)
            ) and not _is_numbered(frame[0])  # fmt: skip
            numbered = self._has_equal_class(segments, frame)
            at = parent if through else self._box(segment, frame, parent, numbered)
            if not through and self._enabled and len(segment.keys) >= _WORTH:
                self._note_equal(segment, frame, at, earlier)
            if self._is_leaf(segment, frame):
                self._home.update(dict.fromkeys(segment.keys, at))
            else:
                self._level(segment.keys, depth + 1, at)
        return any(found)

    def _note_equal(
        self, segment: _Segment, frame: Frame, box: str, earlier: dict[Any, str]
    ) -> None:
        """Notes on the box of a block which earlier one shows the same."""
        if _is_numbered(frame[0]) and not segment.calls:
            family = (frame[0].rpartition(".")[0], self._keys.of(frame))
            first = earlier.setdefault(family, box)
            if first != box:
                self._boxes[box] = replace(self._boxes[box], same_as=first)

    def _has_fold(self, keys: list[str], depth: int) -> bool:
        todo = [(keys, depth)]
        while todo:
            some, at = todo.pop()
            for s in self._fold_runs(self._segments(some, at), dry=True):
                if s.count > 1:
                    return True
                if s.frame is not None and not self._is_leaf(s, s.frame):
                    todo.append((s.keys, at + 1))
        return False

    def _segments(self, keys: list[str], depth: int) -> list[_Segment]:
        found: list[_Segment] = []
        for key in keys:
            frames = self._panel.items[key].frames
            frame = frames[depth] if len(frames) > depth else None
            if found and frame is not None and found[-1].frame == frame:
                found[-1].keys.append(key)
            else:
                found.append(_Segment(frame, [key], last=frame[0] if frame else ""))
        return found

    def _is_plain(self, segment: _Segment, frame: Frame) -> bool:
        """Whether a segment needs no box: one module, or a LoRA site, which has its own."""
        items = [self._panel.items[k] for k in segment.keys]
        return self._is_leaf(segment, frame) or all(i.site == frame[0] for i in items)

    def _has_equal_class(self, segments: list[_Segment], frame: Frame) -> bool:
        """Whether a numbered module has a neighbour of its class: one of several blocks."""
        types = self._panel.types
        same = [
            s
            for s in segments
            if s.frame is not None
            and _same_family(s.frame, frame)
            and types.get(s.frame[0]) is types.get(frame[0])
        ]
        return _is_numbered(frame[0]) and len(same) > 1

    def _is_leaf(self, segment: _Segment, frame: Frame) -> bool:
        items = [self._panel.items[k] for k in segment.keys]
        return len(items) == 1 and items[0].frames[-1] == frame and items[0].kind == "module"

    # ---- runs --------------------------------------------------------------------------------

    def _fold_runs(self, segments: list[_Segment], dry: bool = False) -> list[_Segment]:
        if not self._enabled:
            return segments
        found: list[_Segment] = []
        i = 0
        while i < len(segments):
            run = self._run(segments, i)
            first = segments[i]
            single = first.frame is not None and self._is_leaf(first, first.frame)
            if len(run) > 1 and not (single and len(run) < _LEAVES):
                if not dry:
                    self._replace(run)
                last = run[-1].frame
                assert first.frame is not None
                assert last is not None
                found.append(
                    _Segment(first.frame, first.keys, len(run), last[0], first.frame[0] == last[0])
                )
            else:
                found += run if single else [first]
                run = run if single else run[:1]
            i += len(run)
        return found

    def _run(self, segments: list[_Segment], start: int) -> list[_Segment]:
        first = segments[start]
        run = [first]
        if first.frame is None or (
            any(self._panel.items[k].role for k in first.keys) and len(first.keys) == 1
        ):
            return run
        for segment in segments[start + 1 :]:
            if segment.frame is None or not _same_family(first.frame, segment.frame):
                break
            if self._keys.of(segment.frame) != self._keys.of(first.frame):
                break
            run.append(segment)
        return run

    def _replace(self, run: list[_Segment]) -> None:
        name = run[0].keys[0]
        for turn, segment in enumerate(run):
            for kept, key in zip(run[0].keys, segment.keys, strict=True):
                self._block_of.setdefault(key, []).append((name, turn))
                if turn:
                    self._stands_for[key] = kept

    # ---- boxes -------------------------------------------------------------------------------

    def _box(self, segment: _Segment, frame: Frame, parent: str, numbered: bool) -> str:
        path, call = frame
        key = f"box:{path}" if call == 0 else f"box:{path}#{call}"
        kind = "fold" if segment.count > 1 else "block" if numbered else "module"
        cls = self._panel.types.get(path)
        note = clean(cls.__name__, 60) if cls is not None and kind != "module" else ""
        if kind == "fold":
            note = (
                f"{note}, called {segment.count} times" if segment.calls else f"{note}, identical"
            )
        if all(self._panel.items[k].whole in (path, "") for k in segment.keys) and any(
            self._panel.items[k].whole for k in segment.keys
        ):
            note = f"{note}, trained as a whole".removeprefix(", ")
            self._whole.add(path)
        self._boxes[key] = Box(key, kind, _box_label(segment, path), note, segment.count, parent)
        if kind != "module" and len(segment.keys) > 1:
            self._entries.append((key, frame))
        return key

    def _sites(self) -> None:
        """Puts a box around every LoRA site."""
        for key, item in self._panel.items.items():
            if not item.site or key in self._stands_for:
                continue
            base = item.unit or key.partition(":")[0]
            box = f"site:{base}"
            if box not in self._boxes:
                label = _site_label(item)
                parent = self._home.get(key, "")
                self._boxes[box] = Box(
                    box, "site", clean(label, 60), item.said, parent=parent, verdict=item.verdict
                )
            self._home[key] = box

    # ---- arrows ------------------------------------------------------------------------------

    def _arrows(self) -> list[Arrow]:
        found: dict[tuple[str, str], Arrow] = {}
        carried: dict[str, bool] = {}  # target in a fold -> whether a later block's input has grad
        for a in self._panel.arrows:
            turns = dict(self._block_of.get(a.source, ()))
            crossing = any(turns.get(name, t) != t for name, t in self._block_of.get(a.target, ()))
            if crossing:  # from one block of a fold to the next: the fold says so
                target = self._drawn(a.target)
                carried[target] = carried.get(target, False) or bool(a.grad)
                continue
            source, target = self._drawn(a.source), self._drawn(a.target)
            before = found.get((source, target))
            if before is None or (a.grad and not before.grad):
                found[source, target] = replace(a, source=source, target=target)
        return [
            replace(a, grad=True) if carried.get(a.target) and self._enters(a) else a
            for a in found.values()
        ]

    def _enters(self, arrow: Arrow) -> bool:
        folds = {name for name, _ in self._block_of.get(arrow.target, ())}
        return not folds <= {name for name, _ in self._block_of.get(arrow.source, ())}

    def _drawn(self, key: str) -> str:
        while key in self._stands_for:
            key = self._stands_for[key]
        return key


def _is_numbered(path: str) -> bool:
    return path.rpartition(".")[2].isdigit() and "." in path


def _same_family(a: Frame, b: Frame) -> bool:
    if a[0] == b[0]:
        return True
    pa, pb = a[0].rpartition("."), b[0].rpartition(".")
    return pa[0] == pb[0] and pa[2].isdigit() and pb[2].isdigit()


def _box_label(segment: _Segment, path: str) -> str:
    parent, _, tail = path.rpartition(".")
    name = f"{parent.rpartition('.')[2]}.{tail}" if tail.isdigit() and parent else tail
    if segment.count > 1 and not segment.calls:
        # A run is consecutive, but the numbers need not be: reversed or strided lists are named
        # by their ends all the same.
        name = f"{name} … {segment.last.rpartition('.')[2]}"
    return clean(name, 80)


def _site_label(item: Item) -> str:
    label = item.site.rpartition(".")[2]
    if item.type == "MultiheadAttention" and item.weights:
        return item.weights[0].name.rpartition(".")[2].removesuffix("_weight")  # in_proj
    if item.type == "Parameter" or (label.isdigit() and "." in item.site):
        return ".".join(item.site.split(".")[-2:])
    return label


def _add_entry(panel: Panel, box: str, frame: Frame) -> None:
    """Adds the node by which a block's main input enters, so that its residual starts inside."""
    inside = inside_box(panel, box)
    entering = [a for a in panel.arrows if a.target in inside and a.source not in inside]
    first = next((a for k in panel.items if k in inside for a in entering if a.target == k), None)
    if first is None:
        return
    source = panel.items[first.source]
    key = f"entry:{box}"
    text = tensor(source.shape, source.dtype)
    entry = Item(
        key, "entry", _argument(panel.types.get(frame[0])), (text,) if text else (),
        shape=source.shape, dtype=source.dtype, grad=source.grad, path=frame[0],
        members=(),
    )  # fmt: skip
    moved = [a for a in entering if a.source == first.source]
    entry.grad = any(a.grad for a in moved) if first.grad is not None else None
    panel.arrows = [a for a in panel.arrows if a not in moved]
    panel.arrows.append(Arrow(first.source, key, "", source.grad))
    panel.arrows += [replace(a, source=key) for a in moved]
    items: dict[str, Item] = {}
    for k, item in panel.items.items():
        if k in inside and key not in items:
            items[key] = entry
        items[k] = item
    panel.items = items
    panel.home[key] = box


def _argument(cls: type | None) -> str:
    """Returns what a block calls its first argument."""
    forward = getattr(cls, "forward", None)
    try:
        names = list(inspect.signature(forward).parameters) if forward is not None else []
    except (TypeError, ValueError):
        names = []
    plain = [n for n in names[1:] if n not in ("args", "kwargs", "input")]
    return plain[0] if plain else "input"
