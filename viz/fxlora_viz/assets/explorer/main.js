// What happens when the reader does something: the state changes, then everything that shows it.
const say = (text) => ($("status").textContent = plain(text));
const busy = (on) => {
  $("busy").hidden = !on;
  document.documentElement.dataset.state = on ? "busy" : "ready";
};
const stillRoot = $("still").querySelector("svg");
let still = null;
const pictures = new Map(); // mode and what is closed -> picture
let lastGood = null;
let turn = 0;
// What is inside a closed box makes no difference to the picture.
function pictureKey() {
  const seen = FOLDABLE.filter((k) => state.closed.has(k) && boxesOf.get(k).some((b) => standIn(b.id) === b.id));
  return `${state.mode} ${seen.join("\n")}`;
}
async function pictureNow() {
  const key = pictureKey();
  if (still && key === `${START} `) return still;
  if (!pictures.has(key)) {
    const view = visible(state.mode, new Set(state.closed));
    const began = performance.now();
    const layout = await layoutOf(view);
    document.documentElement.dataset.layoutMs = String(Math.round(performance.now() - began));
    pictures.set(key, adopt(picture(view, layout), false));
    if (pictures.size > 40) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(key);
}
// Shows what the state says; a layout that fails leaves the picture and the state as they were.
async function redraw(anchor, then) {
  const mine = ++turn;
  const slow = setTimeout(() => busy(true), 120);
  document.documentElement.dataset.state = "busy";
  try {
    const next = await pictureNow();
    if (mine !== turn) return;
    if (next !== shown) show(next, anchor);
    lastGood = { mode: state.mode, closed: new Set(state.closed) };
    if (then) then();
  } catch (error) {
    if (mine !== turn) return;
    if (lastGood) {
      Object.assign(state, { mode: lastGood.mode, closed: new Set(lastGood.closed) });
      changed();
    }
    say(`No layout: ${error.message}`);
  } finally {
    clearTimeout(slow);
    if (mine === turn) busy(false);
  }
}
// Everything but the picture.
function changed() {
  search();
  drawTree();
  drawPanel();
  drawBar();
  drawTable();
  mark();
  remember();
}
function remember() {
  const hash = toHash();
  if (hash === location.hash) return;
  try {
    history.replaceState(null, "", hash || location.pathname + location.search);
  } catch {
    written = hash; // a page without an address of its own
    location.hash = hash;
  }
}
let written = null;
addEventListener("hashchange", () => {
  if (location.hash === toHash() || location.hash === written) return;
  restore();
});
function restore() {
  const missing = fromHash(location.hash);
  const wanted = state.selected;
  if (wanted) for (const b of ancestors(wanted)) state.closed.delete(b.key);
  $("q").value = state.query;
  changed();
  if (missing.length) say(`Not in this picture: ${short(missing.join(", "), 200)}`);
  return redraw(null, () => {
    if (!wanted) return;
    reveal(standIn(wanted), true);
    if (!missing.length) say(spoken(wanted));
  });
}

// ---- what a reader does ----
function select(id, how = {}) {
  state.selected = id;
  drawPanel();
  markTree();
  mark();
  followSelection();
  remember();
  if (!id) return;
  const drawn = standIn(id);
  if (!how.still) reveal(drawn, how.readable);
  stage.setAttribute("aria-activedescendant", drawn);
  say(spoken(id));
}
function spoken(id) {
  if (boxes.has(id)) return `${short(named(boxes.get(id).path || boxes.get(id).label), 160)}, ${isClosed(boxes.get(id)) ? "closed" : "open"}`;
  const n = nodes.get(id);
  return [short(named(n.path || n.title), 160), n.role || n.type, n.out, SAID[n.state || ""], n.matched ? "matched" : ""].filter(Boolean).join(" · ");
}
// Selects a node wherever it is, opening what is closed around it.
function find(id) {
  const shut = ancestors(id).filter(isClosed);
  for (const b of shut) state.closed.delete(b.key);
  state.selected = id;
  changed();
  followSelection();
  say(spoken(id));
  redraw(null, () => reveal(standIn(id), true));
}
function toggle(id) {
  const b = boxes.get(id);
  const shut = !isClosed(b);
  const inside = state.selected && allInside(id).some((n) => n.id === state.selected);
  if (shut) state.closed.add(b.key);
  else state.closed.delete(b.key);
  if (!state.selected || inside || state.selected !== id) state.selected = id;
  changed();
  say(`${shut ? "Closed" : "Opened"} ${short(named(b.path), 160)}`);
  redraw({ from: id, to: id }, () => reveal(id));
}
function openBoxes(ids) {
  for (const id of ids) if (boxes.has(id)) state.closed.delete(boxes.get(id).key);
  changed();
  redraw({ from: ids[0], to: ids[0] });
}
// Closes everything that neither holds this box nor is in it.
function only(id) {
  const kept = new Set([boxes.get(id).key, ...ancestors(id).map((b) => b.key)]);
  const inside = (b) => ancestors(b.id).some((a) => a.key === boxes.get(id).key);
  state.closed = new Set(FOLDABLE.filter((k) => !kept.has(k) && !boxesOf.get(k).some(inside)));
  changed();
  redraw({ from: id, to: id }, () => reveal(id));
}
const depthNow = () => Math.min(DEEPEST + 1, ...FOLDABLE.filter((k) => state.closed.has(k)).map((k) => level.get(k)));
function setDepth(depth) {
  state.closed = new Set(FOLDABLE.filter((k) => level.get(k) >= depth));
  changed();
  say(state.closed.size ? `${plural(depth - 1, "level")} open` : "All levels open");
  redraw(null, () => state.selected && reveal(standIn(state.selected)));
}
const deeper = (by) => setDepth(Math.max(1, Math.min(DEEPEST + 1, depthNow() + by)));
function setMode(mode) {
  if (!MODES.some(([m]) => m === mode) || mode === state.mode) return;
  state.mode = mode;
  // The selection goes along to the side that is shown.
  if (state.selected && !isShown(state.selected)) state.selected = twinOf(state.selected);
  changed();
  untouched = true;
  say(`View: ${MODES.find(([m]) => m === mode)[1]}${mode === "diff" ? `. ${diffSaid()}` : ""}`);
  redraw(null, () => state.selected && reveal(standIn(state.selected)));
}
function diffSaid() {
  const counts = new Map();
  for (const n of DATA.nodes) if (n.change && (n.panel === LAST || n.change === "removed")) counts.set(n.change, (counts.get(n.change) || 0) + 1);
  return [...counts].map(([c, k]) => `${k} ${CHANGES[c] || c}`).join(", ") || "nothing changed";
}
function setQuery(text) {
  state.query = text;
  if ($("q").value !== text) $("q").value = text;
  search();
  mark();
  markTree();
  drawBar();
  remember();
  // Of what is found, something is in sight.
  if (hits.length && !hits.some((id) => inSight(standIn(id)))) reveal(standIn(hits[0]));
}
function hop(by) {
  if (!hits.length) return;
  const at = hits.indexOf(state.selected);
  const next = at < 0 ? (by > 0 ? 0 : hits.length - 1) : (at + by + hits.length) % hits.length;
  find(hits[next]);
  drawBar();
}
function setChip(id) {
  if (!state.chips.delete(id)) state.chips.add(id);
  changed();
  const passing = DATA.nodes.filter((n) => isShown(n.id) && passes(n)).length;
  say(state.chips.size ? `${plural(passing, "node")} shown` : "All nodes shown");
}
const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
const pageStyle = document.head.appendChild(el("style"));
function setTheme(theme) {
  state.theme = theme;
  const { light, dark } = DATA.css;
  pageStyle.textContent = theme === "auto" ? `${light}@media (prefers-color-scheme:dark){${dark}}` : DATA.css[theme];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const [sign, said] = THEMES[theme];
  $("theme").textContent = sign;
  $("theme").title = `Theme: ${said} (d)`;
  $("theme").setAttribute("aria-label", `Theme: ${said}`);
}
function nextTheme() {
  const order = Object.keys(THEMES);
  setTheme(order[(order.indexOf(state.theme) + 1) % 3]);
  say(`Theme: ${THEMES[state.theme][1]}`);
}

// ---- the bar ----
function buildBar() {
  $("modes").hidden = !MODES.length;
  MODES.forEach(([id, title], i) => $("modes").append(el("button", { type: "button", role: "radio", "data-mode": id, "aria-checked": "false", title: `${title} (${i + 1})`, onclick: () => setMode(id) }, title)));
  $("modes").addEventListener("keydown", (e) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (!by) return;
    e.preventDefault();
    const at = MODES.findIndex(([m]) => m === state.mode);
    setMode(MODES[(at + by + MODES.length) % MODES.length][0]);
    $("modes").querySelector('[aria-checked="true"]').focus();
  });
  for (const [id, title, told_] of CHIPS) $("chips").append(el("button", { type: "button", class: `chip ${id}`, "data-chip": id, "aria-pressed": "false", title: told_, onclick: () => setChip(id) }, el("i", { "aria-hidden": "true" }), title, el("b")));
  for (let d = 1; d <= DEEPEST + 1; d++) $("depth").append(el("option", { value: d }, d > DEEPEST ? "All open" : d === 1 ? "All closed" : plural(d - 1, "level")));
  $("depth").append(el("option", { value: 0, hidden: true }, "Mixed"));
  $("depth").addEventListener("change", (e) => setDepth(Number(e.target.value)));
  $("less").onclick = () => deeper(-1);
  $("more").onclick = () => deeper(1);
  $("fit").onclick = () => shown && fitAll();
  $("tabled").onclick = () => setTable(!state.table);
  $("copy").onclick = copySvg;
  $("theme").onclick = nextTheme;
  $("help").onclick = help;
  $("prev").onclick = () => hop(-1);
  $("next").onclick = () => hop(1);
  let soon = 0;
  $("q").addEventListener("input", () => {
    clearTimeout(soon);
    soon = setTimeout(() => setQuery($("q").value), DATA.nodes.length > 600 ? 120 : 0);
  });
  $("q").addEventListener("keydown", (e) => {
    if (e.key === "Enter") {
      clearTimeout(soon);
      if (state.query !== $("q").value) setQuery($("q").value);
      hop(e.shiftKey ? -1 : 1);
    } else if (e.key === "Escape") {
      if ($("q").value) setQuery("");
      else stage.focus();
    } else if (e.key === "ArrowDown") stage.focus();
    else return;
    e.preventDefault();
  });
}
function drawBar() {
  for (const b of $("modes").children) {
    const on = b.dataset.mode === state.mode;
    b.setAttribute("aria-checked", String(on));
    b.tabIndex = on ? 0 : -1;
  }
  for (const b of $("chips").children) {
    const [, , , test] = CHIPS.find(([id]) => id === b.dataset.chip);
    b.setAttribute("aria-pressed", String(state.chips.has(b.dataset.chip)));
    const count = DATA.nodes.filter((n) => isShown(n.id) && test(n)).length;
    b.querySelector("b").textContent = count;
    b.disabled = !count && !state.chips.has(b.dataset.chip);
  }
  const depth = depthNow();
  const even = FOLDABLE.every((k) => state.closed.has(k) === level.get(k) >= depth);
  $("depth").value = String(even ? depth : 0);
  $("less").disabled = depth <= 1;
  $("more").disabled = depth > DEEPEST;
  const at = hits.indexOf(state.selected);
  $("hits").textContent = fault ? "pattern?" : state.query.trim() ? (at >= 0 ? `${at + 1} / ${hits.length}` : plural(hits.length, "hit")) : "";
  $("hits").title = fault;
  $("q").setAttribute("aria-invalid", String(Boolean(fault)));
  $("prev").disabled = $("next").disabled = !hits.length;
}
function start() {
  setTheme(DATA.theme);
  buildBar();
  if (stillRoot) {
    still = adopt(stillRoot, true);
    lastGood = { mode: START, closed: new Set() };
  }
  addEventListener("beforeprint", () => shown && fitAll());
  restore().then(() => {
    if (!$("status").textContent) say(`${plural(DATA.nodes.length, "node")} · ${plural(DATA.parameters.length, "row")} of parameters`);
    document.documentElement.dataset.firstMs = String(Math.round(performance.now()));
    // The engine takes a moment to start: do that while the reader looks.
    (window.requestIdleCallback || setTimeout)(() => ask("").catch(() => {}));
  });
}
start();
