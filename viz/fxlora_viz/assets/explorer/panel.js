// The panel on the right: all that is known of the selection, or of the sheet.
const about = $("about");
const SAID = { frozen: "frozen", trainable: "trainable", partly: "partly trainable", "": "no parameters" };
function drawPanel() {
  const id = state.selected;
  about.replaceChildren(...(nodes.has(id) ? ofNode(nodes.get(id)) : boxes.has(id) ? ofBox(boxes.get(id)) : ofSheet()));
}
const pill = (text, style) => el("span", { class: `pill ${style}` }, text);
const row = (name, ...value) => (value.some((v) => v !== "" && v !== null && v !== undefined) ? [el("dt", {}, name), el("dd", {}, ...value)] : []);
const section = (title, ...content) => (content.flat().length ? [el("h3", {}, title), ...content.flat()] : []);
const facts = (...pairs) => (pairs.flat().length ? [el("dl", {}, ...pairs.flat())] : []);
// A long name may break after its dots.
const code = (text) => el("code", {}, ...short(text, 600).split(/(?<=\.)/).flatMap((part) => [part, el("wbr")]));
function header(title, path, ...pills) {
  return [
    el("header", {}, el("h2", {}, short(title, 160)), el("p", { class: "pills" }, ...pills.filter(Boolean)),
      path ? el("p", { class: "path" }, code(path), el("button", { type: "button", class: "tiny", title: "Copy the name", "aria-label": "Copy the name", onclick: () => copyText(path, "name") }, "Copy")) : ""),
  ];
}
function ofNode(n) {
  const path = named(n.path || "");
  const flips = n.change && n.change in SAID && n.panel === LAST;
  const state_ = n.state ? pill(`${flips ? "now " : ""}${SAID[n.state] || n.state}`, n.state === "frozen" ? "cool" : "hot") : "";
  const change = n.change && !flips ? pill(n.change in SAID ? `becomes ${SAID[n.change]}` : n.change, "line") : "";
  const heading = n.role && n.path ? `${n.title} of ${n.path.split(".").pop()}` : n.title;
  return [
    ...header(heading, path, state_, change, n.matched ? pill("matched", "dash") : "", idle(n) ? pill("inert", "dots") : ""),
    ...layerPicker(n.id),
    ...facts(
      row("Class", n.type && n.kind === "module" ? code(n.type) : n.type || ""),
      row("Role", n.role || ""),
      row("Output", n.out ? code(n.out) : ""),
      row("requires_grad", n.state ? (WEIGHTS.has(n.state) ? (n.state === "partly" ? "some" : "True") : "False") : ""),
      row("Gradient", n.grad ? "flows through the output" : n.out ? "none in the output" : ""),
      row("Parameters", n.params ? counted(n.params) : ""),
      row("Reads", (n.tags || []).join(", ")),
      row("Note", n.note || ""),
    ),
    ...adapters(n.site),
    ...weights(n),
    ...section("Connections", links("From", into.get(n.id)), links("To", outOf.get(n.id)), n.twin ? links(panelOf(n.twin) === LAST ? "After" : "Before", [n.twin], true) : []),
    ...section("Source", facts(
      row("Line", n.source ? code(n.source) : ""),
      row("fx nodes", ...(n.members || []).flatMap((m) => [code(m), " "]), n.fx > (n.members || []).length ? `and ${n.fx - n.members.length} more` : ""),
      row("Panel", TWO ? boxes.get(DATA.boxes.find((b) => b.panel === n.panel).id).label : ""),
    )),
    parentBox(n.id),
  ].filter(Boolean);
}
function parentBox(id, ...more) {
  const parent = boxes.get(parentOf(id));
  const around = parent && parent.kind !== "panel" ? [el("button", { type: "button", onclick: () => select(parent.id) }, `In ${short(titleOf(parent.id), 40)}`)] : [];
  if (around.length && !more.length) around.push(el("button", { type: "button", onclick: () => toggle(parent.id) }, "Close it"));
  return around.length || more.length ? el("p", { class: "do" }, ...more, ...around) : null;
}
// Which block of a fold gives the names, for whatever stands inside one.
function layerPicker(id) {
  const around = [boxes.get(id), ...ancestors(id)].filter((b) => b && b.kind === "fold" && (b.members || []).length > 1);
  return around.map((b) => {
    const pick = el("select", { "aria-label": `Show layer of ${short(b.label, 60)}`, onchange: (e) => setLayer(b.key, Number(e.target.value)) }, ...b.members.map((m, i) => el("option", { value: i, selected: i === (state.layers.get(b.key) || 0) }, short(m.split(".").slice(-2).join("."), 60))));
    const step = (by) => el("button", { type: "button", class: "tiny", "aria-label": by < 0 ? "Layer before" : "Next layer", onclick: () => setLayer(b.key, (state.layers.get(b.key) || 0) + by) }, by < 0 ? "‹" : "›");
    return el("p", { class: "layer" }, el("span", {}, `Show layer`), step(-1), pick, step(1), el("span", { class: "dim" }, `of ${b.members.length}`));
  });
}
function setLayer(key, k) {
  const fold = folds.find((f) => f.key === key);
  if (!fold) return;
  state.layers.set(key, Math.max(0, Math.min(fold.members.length - 1, k)));
  changed();
  say(`Names of ${short(fold.members[state.layers.get(key)], 80)}`);
}
function adapters(site) {
  const entries = (site && DATA.sites[site]) || [];
  return entries.flatMap((e) => section(
    entries.length > 1 ? `LoRA · ${e.adapter}` : "LoRA",
    facts(
      row("Plan", pill(e.plan, /^adapted/.test(e.plan) ? "hot" : "cool")),
      row("Reason", e.reason || ""),
      row("Verdict", e.effect ? pill(e.effect, /^live$/.test(e.effect) ? "good" : "dots") : ""),
      row("Why", e.effect ? e.why || "" : ""),
      row("Adapter", e.adapter ? code(e.adapter) : ""),
      row("rank", e.rank !== undefined ? String(e.rank) : ""),
      row("alpha", e.alpha || ""),
      row("scaling", e.scaling ? `× ${e.scaling}` : ""),
      row("Sites", e.count > 1 ? plural(e.count, "equal site") : ""),
      row("Calls", e.calls > 1 ? `shared by ${e.calls} calls` : ""),
    ),
  ));
}
function weights(n) {
  const list_ = (n.weights || []).slice(0, 40).map((i) => {
    const p = DATA.parameters[i];
    return el("li", {}, el("button", { type: "button", class: "weight", onclick: () => showRow(i), title: "Show in the table" },
      code(short(named(p.name), 200)),
      el("span", { class: "dim" }, `${p.shape} · ${p.dtype}${p.count > 1 ? ` · × ${p.count}` : ""} · ${p.flags[PANELS.indexOf(n.panel)] || "absent"}${p.tied ? ` · tied to ${short(named(p.tied), 80)}` : ""}`)));
  });
  return list_.length ? section("Parameters", [el("ul", { class: "weights" }, ...list_)]) : [];
}
function links(name, ids, all) {
  const found = [...new Set(ids || [])].filter((id) => all || isShown(id)).slice(0, 12);
  return found.length ? [el("p", { class: "links" }, el("span", { class: "dim" }, name), ...found.map((id) => el("button", { type: "button", class: "link", onclick: () => go(id) }, short(titleOf(id), 40))))] : [];
}
// Goes to a node, in the view that shows it.
function go(id) {
  if (!isShown(id)) state.mode = TWO ? "both" : state.mode;
  find(id);
}
function ofBox(b) {
  const counts = [...changesOf(b.id)].map(([c, k]) => `${k} ${CHANGES[c]}`).join(", ");
  return [
    ...header(titleOf(b.id), named(b.path || ""), b.trains ? pill(b.trains === b.params ? "all trainable" : "partly trainable", "hot") : pill(b.params ? "frozen" : "no parameters", "cool"), b.kind === "site" ? pill("LoRA site", "dash") : ""),
    ...layerPicker(b.id),
    ...facts(
      row("Kind", { fold: "equal blocks, drawn once", block: "block", module: "module", site: "an adapted layer" }[b.kind] || b.kind),
      row("Class", b.kind !== "site" ? b.note : ""),
      row("Parameters", b.params ? counted(b.params) : "none"),
      row("Trainable", b.trains ? `${b.trains.toLocaleString("en")} (${share(b.trains, b.params)})` : "none"),
      row("Inside", plural(allInside(b.id).length, "node")),
      row("Changed", TWO ? counts : ""),
    ),
    ...(b.kind === "site" ? adapters(b.path) : []),
    parentBox(b.id, el("button", { type: "button", onclick: () => toggle(b.id) }, isClosed(b) ? "Open" : "Close"), el("button", { type: "button", onclick: () => only(b.id) }, "Close all others")),
  ].filter(Boolean);
}
const share = (part, whole) => (whole ? `${((100 * part) / whole).toPrecision(3)} %` : "");
function ofSheet() {
  const panels = DATA.boxes.filter((b) => b.kind === "panel" && shownPanels().includes(b.panel));
  const about_ = panels.flatMap((b) => [el("h3", {}, short(b.label, 100)), el("p", {}, short(b.note, 300)), ...facts(
    row("Parameters", b.params ? counted(b.params) : ""),
    row("Trainable", b.trains ? `${b.trains.toLocaleString("en")} (${share(b.trains, b.params)})` : "none"),
    row("Drawn", plural(DATA.nodes.filter((n) => n.panel === b.panel).length, "node")),
  )]);
  const counts = new Map();
  for (const n of DATA.nodes) if (n.change && (n.panel === LAST || n.change === "removed")) counts.set(n.change, (counts.get(n.change) || 0) + 1);
  const changes = [...counts].map(([c, k]) => el("button", { type: "button", class: "link", onclick: () => setQuery(`change:${c}`) }, `${k} ${CHANGES[c] || c}`));
  return [
    el("header", {}, el("h2", {}, "This sheet")),
    ...about_,
    ...(TWO && changes.length ? section("What the rewrite did", [el("p", { class: "links" }, ...changes)]) : []),
    ...(DATA.trouble ? section("Without verdicts", [el("p", { class: "warn" }, DATA.trouble)]) : []),
    ...section("Getting around", [el("p", { class: "dim" }, "Select a node for its facts. Double-click a module's name to close it. Press ", el("kbd", {}, "?"), " for the keys.")]),
  ];
}
