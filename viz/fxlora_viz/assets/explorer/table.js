// The table of parameters, bound to the picture: sorted, filtered, and only as much of it built as is seen.
const HIGH = 28; // pixels of a row; the style sheet says the same
const flag = (p, i) => p.flags[i] || "";
const entryOf = (p) => ((p.site && DATA.sites[p.site]) || [])[0] || {};
const COLUMNS = [
  { id: "name", title: "Name", value: (p) => named(p.name) },
  { id: "shape", title: "Shape", value: (p) => p.shape, by: (p) => p.each || 0 },
  { id: "count", title: "×", number: true, value: (p) => p.count, by: (p) => p.count },
  { id: "total", title: "Total", number: true, value: (p) => quantity((p.each || 0) * p.count), by: (p) => (p.each || 0) * p.count },
  { id: "dtype", title: "dtype", value: (p) => p.dtype },
  ...(TWO ? [{ id: "before", title: "Before", value: (p) => flag(p, 0), flag: true }] : []),
  { id: "after", title: TWO ? "After" : "requires_grad", value: (p) => flag(p, PANELS.length - 1), flag: true },
  { id: "rank", title: "Rank", number: true, value: (p) => (/lora_/.test(p.name) ? entryOf(p).rank ?? "" : ""), by: (p) => Number(/lora_/.test(p.name) && entryOf(p).rank) || 0 },
  { id: "verdict", title: "Verdict", value: (p) => entryOf(p).effect || (entryOf(p).plan === "adapted" ? "" : entryOf(p).plan) || "" },
];
const sorting = { by: "", down: false };
let filter = "";
let listed = []; // indices of parameters, in the order of the table
let current = 0;
const box_ = $("table");
let body = null;
function buildTable() {
  const heads = COLUMNS.map((c) => el("th", { scope: "col", "aria-sort": "none", class: c.number ? "num" : "", "data-column": c.id }, el("button", { type: "button", onclick: () => sortBy(c.id) }, c.title)));
  body = el("tbody");
  box_.replaceChildren(
    el("header", {}, el("h2", {}, "Parameters"), el("output", { id: "counted" }),
      el("input", { id: "narrow", type: "search", placeholder: "Filter by name, shape, dtype …", "aria-label": "Filter the table", autocomplete: "off", spellcheck: "false", oninput: (e) => { filter = e.target.value; drawTable(); } }),
      el("button", { type: "button", class: "tiny", "aria-label": "Close the table", onclick: () => setTable(false) }, "×")),
    el("div", { class: "scroll", tabindex: -1, onscroll: () => requestAnimationFrame(drawRows) },
      el("table", { role: "grid", "aria-label": "Parameters" }, el("thead", {}, el("tr", {}, ...heads)), body)),
  );
  body.addEventListener("click", (e) => {
    const tr = e.target.closest("tr[data-i]");
    if (tr) pick(Number(tr.dataset.i));
  });
  body.addEventListener("keydown", (e) => {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -1e9, End: 1e9 };
    if (e.key === "Enter" || e.key === " ") pick(listed[current]);
    else if (moves[e.key]) step(moves[e.key]);
    else return;
    e.preventDefault();
    e.stopPropagation();
  });
}
const scroller = () => box_.querySelector(".scroll");
function step(by) {
  current = Math.max(0, Math.min(listed.length - 1, current + by));
  scrollTo_(current);
  drawRows();
  const tr = body.querySelector(`tr[data-i="${listed[current]}"]`);
  if (tr) tr.focus();
}
function scrollTo_(at) {
  const view = scroller();
  const high = view.clientHeight - HIGH; // the heading stays
  if (at * HIGH < view.scrollTop) view.scrollTop = at * HIGH;
  else if ((at + 1) * HIGH > view.scrollTop + high) view.scrollTop = (at + 1) * HIGH - high;
}
function pick(i) {
  current = Math.max(0, listed.indexOf(i));
  const readers_ = readers.get(i) || [];
  const found = [...readers_].reverse().find(isShown) || readers_[readers_.length - 1];
  if (found) go(found);
  else say(`${short(DATA.parameters[i].name, 120)} is not drawn`);
}
function sortBy(id) {
  Object.assign(sorting, { by: id, down: sorting.by === id ? !sorting.down : id !== "name" && Boolean(COLUMNS.find((c) => c.id === id).by) });
  drawTable();
}
function setTable(on) {
  state.table = on;
  changed();
  if (on) $("narrow").focus();
  else stage.focus();
}
function drawTable() {
  box_.hidden = !state.table;
  $("tabled").setAttribute("aria-pressed", String(state.table));
  if (!state.table) return;
  if (!body) buildTable();
  const needle = filter.trim().toLowerCase();
  const chosen = (p) => {
    if (state.chips.has("trainable") && p.flags[p.flags.length - 1] !== "frozen" && p.flags.some((f) => f === "trains" || f === "mixed")) return true;
    if (state.chips.has("matched") && /^adapted/.test(entryOf(p).plan || "")) return true;
    return state.chips.has("idle") && /lora_/.test(p.name) && entryOf(p).effect && !/^(live|partial)/.test(entryOf(p).effect);
  };
  listed = DATA.parameters.map((_, i) => i).filter((i) => {
    const p = DATA.parameters[i];
    if (state.chips.size && !chosen(p)) return false;
    return !needle || COLUMNS.some((c) => String(c.value(p)).toLowerCase().includes(needle)) || p.name.toLowerCase().includes(needle);
  });
  const column = COLUMNS.find((c) => c.id === sorting.by);
  if (column) {
    const value = column.by || ((p) => String(column.value(p)));
    const sign = sorting.down ? -1 : 1;
    const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
    listed.sort((a, b) => sign * order(value(DATA.parameters[a]), value(DATA.parameters[b])) || a - b);
  }
  for (const th of box_.querySelectorAll("th")) th.setAttribute("aria-sort", th.dataset.column !== sorting.by ? "none" : sorting.down ? "descending" : "ascending");
  $("counted").textContent = listed.length === DATA.parameters.length ? plural(listed.length, "row") : `${listed.length} of ${plural(DATA.parameters.length, "row")}`;
  box_.querySelector("table").setAttribute("aria-rowcount", listed.length + 1);
  drawRows();
}
const chosenRows = () => new Set(nodes.has(state.selected) ? nodes.get(state.selected).weights || [] : boxes.has(state.selected) ? allInside(state.selected).flatMap((n) => n.weights || []) : []);
function drawRows() {
  if (!state.table || !body) return;
  const view = scroller();
  const fits = Math.ceil((view.clientHeight || 300) / HIGH);
  // A filter that leaves few rows is drawn before the browser takes the scrolling back.
  const top = Math.min(Math.floor(view.scrollTop / HIGH), Math.max(0, listed.length - fits));
  const from = Math.max(0, top - 6);
  const upto = Math.min(listed.length, from + fits + 12);
  const on = chosenRows();
  current = Math.min(current, Math.max(0, listed.length - 1));
  const focused = body.contains(document.activeElement) && document.activeElement.dataset.i;
  const space = (n) => {
    if (n <= 0) return [];
    const cell = el("td", { colspan: COLUMNS.length });
    cell.style.height = `${n * HIGH}px`;
    return [el("tr", { class: "space", "aria-hidden": "true" }, cell)];
  };
  const built = listed.slice(from, upto).map((i, k) => {
    const p = DATA.parameters[i];
    const cells = COLUMNS.map((c) => {
      const text = String(c.value(p));
      return el("td", { class: `${c.number ? "num" : ""}${c.flag ? ` flag ${text}` : ""}`, title: c.id === "name" ? short(text, 300) + (p.tied ? `\ntied to ${short(p.tied, 200)}` : "") : null }, short(text, 160));
    });
    return el("tr", { "data-i": i, "aria-rowindex": from + k + 2, "aria-selected": String(on.has(i)), tabindex: from + k === current ? 0 : -1 }, ...cells);
  });
  body.replaceChildren(...space(from), ...built, ...space(listed.length - upto));
  const again = focused && body.querySelector(`tr[data-i="${focused}"]`);
  if (again) again.focus({ preventScroll: true });
}
// Brings a parameter into sight, where it is listed.
function showRow(i) {
  if (!state.table) {
    state.table = true;
    changed();
  }
  if (!listed.includes(i)) {
    filter = $("narrow").value = "";
    drawTable();
  }
  current = Math.max(0, listed.indexOf(i));
  scrollTo_(current);
  drawRows();
}
function followSelection() {
  if (!state.table) return;
  const on = chosenRows();
  const at = listed.findIndex((i) => on.has(i));
  if (at >= 0) {
    current = at;
    scrollTo_(at);
  }
  drawRows();
}
