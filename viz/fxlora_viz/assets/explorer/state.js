// What the reader has chosen: the view, what is open, the selection; and its form as a link.
const MODES = TWO ? [["before", "Before"], ["after", "After"], ["both", "Both"], ["diff", "Diff"]] : [];
const START = TWO ? "both" : "after";
const state = {
  mode: START,
  closed: new Set(), // keys of boxes: both panels open and close together
  selected: "",
  layers: new Map(), // key of a fold -> which of its blocks gives the names
  query: "",
  chips: new Set(),
  table: false,
  theme: DATA.theme,
};
function shownPanels(mode = state.mode) {
  if (!TWO || mode === "both") return PANELS;
  return [mode === "before" ? PANELS[0] : LAST];
}
const isShown = (id) => shownPanels().includes(panelOf(id)) || (state.mode === "diff" && (nodes.get(id) || {}).change === "removed");
const isClosed = (box) => box.kind !== "panel" && state.closed.has(box.key);
// The node or the outermost closed box that stands for something in the picture.
function standIn(id, closed = state.closed) {
  let found = id;
  for (let at = id; at; at = parentOf(at)) {
    const b = boxes.get(at);
    if (b && b.kind !== "panel" && closed.has(b.key)) found = at;
  }
  return found;
}

// ---- the layer whose names are shown ----
const folds = FOLDABLE.map((k) => boxesOf.get(k)[boxesOf.get(k).length - 1]).filter((b) => (b.members || []).length > 1);
const bare = (member) => member.replace(/ \(call \d+\)$/, "");
const byLength = [...folds].sort((a, b) => b.path.length - a.path.length);
// The name something has in the chosen block: the inner fold first, then the one around it.
function named(name) {
  if (!state.layers.size || !name) return name;
  let found = name;
  for (const fold of byLength) {
    const from = bare(fold.members[0]);
    const to = bare(fold.members[state.layers.get(fold.key) || 0]);
    if (from !== to && (found === from || found.startsWith(`${from}.`))) found = to + found.slice(from.length);
  }
  return found;
}

// ---- links ----
// A box goes by its path; where that is no text an address can hold, by its identifier.
function told(key) {
  if (plain(key) !== key) return boxesOf.get(key)[0].id;
  return key.startsWith("box:") ? key.slice(4) : key;
}
const keyOf = (text) => boxes.has(text) && boxes.get(text).kind !== "panel" ? boxes.get(text).key : [`box:${text}`, text, `site:${text}`].find((k) => boxesOf.has(k) && k !== "panel");
function findThing(text) {
  if (nodes.has(text) || (boxes.has(text) && boxes.get(text).kind !== "panel")) return text;
  for (const panel of [...PANELS].reverse()) {
    const n = DATA.nodes.find((o) => o.panel === panel && o.key === text) || null;
    if (n) return n.id;
  }
  const key = keyOf(text);
  if (key) return boxesOf.get(key)[boxesOf.get(key).length - 1].id;
  const byPath = [...DATA.nodes].reverse().find((o) => o.path === text);
  return byPath ? byPath.id : "";
}
function nameOf(id) {
  const key = nodes.has(id) ? nodes.get(id).key : told(boxes.get(id).key);
  return plain(key) === key && findThing(key) === id ? key : id;
}
const list = (keys) => keys.map((k) => encodeURIComponent(told(k))).join(",");
function toHash() {
  const parts = [];
  if (state.selected) parts.push(`node=${encodeURIComponent(nameOf(state.selected))}`);
  if (state.closed.size) {
    const shut = FOLDABLE.filter((k) => state.closed.has(k));
    const open = FOLDABLE.filter((k) => !state.closed.has(k));
    // What is inside a closed box counts only once that box is open: leave it to the longer list.
    const [a, b] = [`open=${list(open)}`, `closed=${list(shut)}`];
    parts.push(a.length <= b.length ? a : b);
  }
  if (state.mode !== START) parts.push(`mode=${state.mode}`);
  for (const [key, k] of state.layers) if (k) parts.push(`layer=${encodeURIComponent(told(key))}~${k}`);
  if (state.query) parts.push(`q=${encodeURIComponent(plain(state.query))}`);
  if (state.chips.size) parts.push(`show=${[...state.chips].join(",")}`);
  if (state.table) parts.push("table=1");
  return parts.length ? `#${parts.join("&")}` : "";
}
const decoded = (text) => {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
};
// Reads a link into the state; what it names and the page has not is left out, and said.
function fromHash(hash) {
  Object.assign(state, { mode: START, selected: "", query: "", table: false });
  state.closed = new Set();
  state.layers = new Map();
  state.chips = new Set();
  const missing = [];
  for (const part of hash.replace(/^#/, "").split("&").filter(Boolean)) {
    const cut = part.indexOf("=");
    const [name, raw] = cut < 0 ? [part, ""] : [part.slice(0, cut), part.slice(cut + 1)];
    const keys = () => raw.split(",").filter(Boolean).map(decoded).map((t) => keyOf(t) || (missing.push(t), "")).filter(Boolean);
    if (name === "mode" && MODES.some(([m]) => m === raw)) state.mode = raw;
    else if (name === "open") {
      const open = new Set(keys());
      // Whatever stands around an open box is open, too.
      for (const k of [...open]) for (const b of boxesOf.get(k)) for (const a of ancestors(b.id)) open.add(a.key);
      state.closed = new Set(FOLDABLE.filter((k) => !open.has(k)));
    } else if (name === "closed") state.closed = new Set(keys());
    else if (name === "node") {
      state.selected = findThing(decoded(raw));
      if (!state.selected) missing.push(decoded(raw));
    } else if (name === "q") state.query = decoded(raw);
    else if (name === "show") raw.split(",").filter((c) => CHIPS.some(([id]) => id === c)).forEach((c) => state.chips.add(c));
    else if (name === "table") state.table = raw === "1";
    else if (name === "layer") {
      const at = raw.lastIndexOf("~");
      const fold = folds.find((f) => f.key === keyOf(decoded(raw.slice(0, at))));
      const k = Number(raw.slice(at + 1));
      if (fold && k > 0 && k < fold.members.length) state.layers.set(fold.key, k);
    }
  }
  if (state.selected && !isShown(state.selected)) {
    state.selected = isShown(twinOf(state.selected) || state.selected) ? twinOf(state.selected) : state.selected;
    if (!isShown(state.selected)) state.mode = START;
  }
  return missing;
}
