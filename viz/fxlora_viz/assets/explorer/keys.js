// The keyboard, and the page that tells what it does.
const KEYS = [
  ["← ↑ → ↓", "go to the next node, along the edges"],
  ["Enter", "open a closed module; close the one around a node"],
  ["Esc", "clear the selection, then the search"],
  ["/", "search; Enter and Shift+Enter go from hit to hit"],
  ["n  N", "next hit, previous hit"],
  ["[  ]", "close a level, open a level"],
  ["f", "fit the whole picture"],
  ["w", "fit its width"],
  ["+  −", "nearer, farther"],
  ["Shift + arrows", "move the picture"],
  ...(TWO ? [["1 2 3 4", "before, after, both, diff"]] : []),
  ["t", "table of parameters"],
  ["m", "go to the tree of modules"],
  ["c  Shift+C", "copy the view as SVG, save it"],
  ["d", "light, dark, or as the system"],
  ["?", "this page"],
];
const PAGE_KEYS = new Set("/?fwtcdmnN[]+-=1234C".split(""));
const TERMS = [
  ["q_proj", "in a name or a class"],
  ["/layers\\.\\d+\\.mlp/", "a pattern in a name"],
  ["op:softmax", "an operation"],
  ["grad:true", "requires_grad"],
  ["rank:16", "also alpha: and scaling:"],
  ["type:linear", "a class"],
  ["verdict:bypassed", "what the plan and the effects say"],
  ["dtype:bf16", "also shape:, role:, adapter:, source:"],
  ...(TWO ? [["change:added", "added, removed, frozen, changed"]] : []),
  ["-norm", "without; several terms must all hold"],
];
function buildHelp() {
  const table = (title, pairs, tag) => el("section", {}, el("h3", {}, title), el("dl", {}, ...pairs.flatMap(([k, v]) => [el("dt", {}, ...k.split("  ").map((part) => el(tag, {}, part))), el("dd", {}, v)])));
  const legend = svg("svg", { class: "fxlora", width: DATA.legend.width + 16, height: DATA.legend.height + 8, viewBox: `-4 -4 ${DATA.legend.width + 16} ${DATA.legend.height + 8}`, "font-family": M.font });
  const shape = legendShape();
  if (shape) legend.append(shape);
  $("keys").replaceChildren(
    el("header", {}, el("h2", { id: "keys_title" }, "Keys and search"), el("button", { type: "button", class: "tiny", "aria-label": "Close", onclick: () => $("keys").close() }, "×")),
    el("div", { class: "columns" }, table("Keys", KEYS, "kbd"), table("Search terms", TERMS, "code")),
    el("section", {}, el("h3", {}, "Legend"), legend),
  );
}
function help() {
  const dialog = $("keys");
  if (dialog.open) return dialog.close();
  if (!dialog.childElementCount) buildHelp();
  dialog.showModal();
}
$("keys").addEventListener("click", (e) => e.target === $("keys") && $("keys").close());
document.addEventListener("keydown", (e) => {
  if (e.defaultPrevented || e.ctrlKey || e.metaKey || e.altKey) return;
  const at = document.activeElement;
  if ($("keys").open) {
    if (e.key === "?") e.preventDefault(), $("keys").close();
    return;
  }
  if (at && (at.tagName === "INPUT" || at.tagName === "SELECT" || at.tagName === "TEXTAREA")) {
    if (e.key === "Escape" && at !== $("q")) stage.focus();
    return;
  }
  const onStage = !at || at === document.body || stage.contains(at);
  if (DIRECTIONS[e.key] && onStage && shown) {
    if (e.shiftKey) pan(...DIRECTIONS[e.key].map((d) => -80 * d));
    else {
      const next = neighbour(e.key);
      if (next) select(next);
    }
  } else if (e.key === "Enter" && onStage && state.selected) enter();
  else if (e.key === "Escape") state.selected ? select("") : state.query && setQuery("");
  else if (e.key === "+" || e.key === "=") zoom(1.25);
  else if (e.key === "-" || e.key === "−") zoom(0.8);
  else if (/^[1-4]$/.test(e.key) && MODES.length) setMode(MODES[Number(e.key) - 1][0]);
  else if (SINGLE[e.key]) SINGLE[e.key]();
  else return;
  e.preventDefault();
});
const SINGLE = {
  "/": () => ($("q").focus(), $("q").select()),
  "?": help,
  f: () => shown && fitAll(),
  w: () => shown && fitWidth(),
  t: () => setTable(!state.table),
  c: () => copySvg(),
  C: () => saveSvg(),
  d: () => nextTheme(),
  m: () => focusRow(state.selected && rows.includes(standIn(state.selected)) ? standIn(state.selected) : rows[0]),
  n: () => hop(1),
  N: () => hop(-1),
  "[": () => deeper(-1),
  "]": () => deeper(1),
};
// Opens what is closed; closes what stands around a node.
function enter() {
  const id = standIn(state.selected);
  const box = boxes.get(id) || boxes.get(parentOf(id));
  if (box && box.kind !== "panel") toggle(box.id);
}
