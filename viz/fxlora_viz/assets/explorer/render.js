// A visible view and its layout -> SVG elements, with the classes and shapes of the still picture.
const M = DATA.measures;
const PAD = 22;
const r1 = (v) => String(Math.round(v * 10) / 10);
function picture(view, layout) {
  const width = Math.max(layout.width, DATA.legend.width) + 2 * PAD;
  const height = layout.height + DATA.legend.height + 2 * PAD;
  const root = svg("svg", { class: "fxlora", role: "img", "font-family": M.font, "aria-labelledby": "fx_title", width: r1(width), height: r1(height), viewBox: `0 0 ${r1(width)} ${r1(height)}` });
  const panels = view.open.filter((b) => b.kind === "panel");
  root.append(svg("title", { id: "fx_title" }, panels.map((b) => `${b.label}: ${b.note}`).join(" / ")));
  root.append(svg("rect", { class: "fx_ground", width: r1(width), height: r1(height) }));
  const sheet = svg("g", { transform: `translate(${PAD} ${PAD})` });
  const laid = view.open.filter((b) => layout.boxes.has(b.id));
  sheet.append(...laid.map((b) => boxShape(b, layout.boxes.get(b.id))));
  view.edges.forEach((e, i) => layout.edges.has(i) && sheet.append(edgeShape(e, i, layout.edges.get(i))));
  for (const id of view.drawn.keys()) {
    if (!layout.nodes.has(id)) continue;
    const [x, y] = layout.nodes.get(id);
    sheet.append(nodes.has(id) ? nodeShape(nodes.get(id), x, y) : closedShape(boxes.get(id), x, y));
  }
  if (view.mode === "diff") for (const [id, at] of layout.nodes) sheet.append(...badge(id, ...at));
  sheet.append(...laid.map((b) => boxLabel(b, layout.boxes.get(b.id))));
  const legend = legendShape();
  if (legend) sheet.append(svg("g", { class: "fx_legend", transform: `translate(8 ${r1(layout.height + 14)})` }, legend));
  root.append(sheet);
  return root;
}
function legendShape() {
  // Made by us of constants, never of names.
  const doc = new DOMParser().parseFromString(`<svg xmlns="${SVG_NS}">${DATA.legend.svg}</svg>`, "image/svg+xml");
  if (doc.querySelector("parsererror")) return null;
  const g = svg("g");
  g.append(...[...doc.documentElement.childNodes].map((c) => document.importNode(c, true)));
  return g;
}
function boxShape(b, [x0, y0, x1, y1]) {
  const radius = { panel: 12, fold: 12, block: 12 }[b.kind] || 9;
  const card = (by, more) => svg("rect", { class: `s${more}`, x: r1(x0 + by), y: r1(y0 + by), width: r1(x1 - x0), height: r1(y1 - y0), rx: radius });
  const behind = b.kind === "fold" ? [card(2 * M.shadow, " c"), card(M.shadow, " c")] : [];
  return svg("g", { id: b.id, class: `fx_box fx_${b.kind}` }, ...behind, card(0, ""));
}
const textLine = (style, x, y, size, ...inner) => svg("text", { class: style, x: r1(x), y: r1(y), "font-size": size, "xml:space": "preserve" }, ...inner);
function boxLabel(b, [x0, y0]) {
  const size = M.labels[b.kind];
  const [x, top] = [x0 + M.insets[b.kind], y0 + M.tops[b.kind]];
  const count = b.count > 1 ? svg("tspan", { class: "n", dx: 8 }, `× ${b.count}`) : "";
  const strip = (wide, y, high) => svg("rect", { x: r1(x - 2), y: r1(y - 0.8 * high), width: r1(wide + 4), height: r1(high) });
  const g = svg("g", { class: `fx_label fx_label_${b.kind}`, "data-box": b.id });
  g.append(strip(textWidth(b.label + (b.count > 1 ? `   × ${b.count}` : ""), size, true), top, size), textLine("t", x, top, size, b.label, count));
  if (b.note) {
    const note = M.notes[b.kind] || size;
    const below = top + (b.kind === "panel" ? 20 : 13);
    const parts = b.parts.length ? b.parts : [[b.note, false]];
    g.append(strip(textWidth(b.note, note, b.kind === "panel"), below, note));
    g.append(textLine("d", x, below, note, ...parts.map(([t, hot]) => svg("tspan", { class: hot ? "h" : "d" }, t))));
  }
  return g;
}
const canvas = document.createElement("canvas").getContext("2d");
function textWidth(text, size, bold) {
  canvas.font = `${bold ? "bold " : ""}${size}px ${M.font}`;
  return canvas.measureText(text).width;
}
function outline(form, x, y, w, h) {
  if (form === "circle") return svg("circle", { class: "s", cx: r1(x), cy: r1(y), r: r1(w / 2) });
  const [left, right, top, bottom] = [x - w / 2, x + w / 2, y - h / 2, y + h / 2];
  const lean = M.slant * w;
  if (form === "invtrapezium") return polygon([[left, top], [right, top], [right - lean, bottom], [left + lean, bottom]], "s");
  if (form === "trapezium") return polygon([[left + lean, top], [right - lean, top], [right, bottom], [left, bottom]], "s");
  return svg("rect", { class: "s", x: r1(left), y: r1(top), width: r1(w), height: r1(h), rx: 9 });
}
const polygon = (corners, style) => svg("polygon", { class: style, points: corners.map(([a, b]) => `${r1(a)},${r1(b)}`).join(" ") });
function words(title, lines, form, tagged, x, y, shift) {
  if (form === "circle") return [textLine("t m", x, y + 4.4, 13, title)];
  const step = form === "box" ? 13.5 : 12;
  const first = y - (step * lines.length) / 2 + 4.2;
  return [
    textLine("t m", x + shift, first, M.title, title),
    ...lines.map((line, i) => textLine(`${tagged && i === lines.length - 1 ? "g" : "d"} m`, x, first + step * (i + 1), M.text, line)),
  ];
}
function nodeShape(n, x, y) {
  const role = n.role ? ` fx_role_${n.role.toLowerCase()}` : "";
  const style = `fx fx_${n.style}${role}${n.matched ? " fx_matched" : ""}${n.grad ? " fx_grad" : ""}`;
  return svg("g", { id: n.id, class: style }, svg("title", {}, n.tooltip || ""), outline(n.form, x, y, n.w, n.h), ...words(n.title, n.lines || [], n.form, n.tagged, x, y, 0));
}
// A closed module is a node with the sign that opens it; a fold keeps its cards.
function closedShape(b, x, y) {
  const { w, h, title, lines, hot } = b.closed;
  const style = b.kind === "site" ? "site fx_label_site" : hot ? "trainable" : b.params ? "frozen" : "op";
  const g = svg("g", { id: b.id, class: `fx fx_closed fx_${style}` }, svg("title", {}, `${b.path}\nclosed: Enter or double-click opens it`));
  if (b.kind === "fold") {
    const card = (by) => svg("rect", { class: "s c", x: r1(x - w / 2 + by), y: r1(y - h / 2 + by), width: r1(w), height: r1(h), rx: 9 });
    g.append(svg("g", { class: "fx_fold" }, card(2 * M.shadow), card(M.shadow)));
  }
  g.append(outline("box", x, y, w, h), ...words(title, lines, "box", false, x, y, 7));
  const wide = textWidth(title, M.title, true);
  g.append(chevron(x + 7 - wide / 2 - 9, y - (13.5 * lines.length) / 2, true, b.id));
  return g;
}
function chevron(x, y, shut, id) {
  const d = shut ? `M${r1(x - 2)},${r1(y - 4)}l4.5,4l-4.5,4` : `M${r1(x - 4)},${r1(y - 2)}l4,4.5l4,-4.5`;
  return svg("g", { class: "chevron", "data-toggle": id }, svg("rect", { x: r1(x - 9), y: r1(y - 10), width: 20, height: 20 }), svg("path", { d }));
}
function edgeShape(e, i, route) {
  const p = route.points;
  const style = `fx_edge fx_${e.style}${e.dashed ? " fx_skip" : ""}${e.grad ? " fx_grad" : ""}`;
  const curve = `M${r1(p[0][0])},${r1(p[0][1])}C${p.slice(1).map(([x, y]) => `${r1(x)},${r1(y)}`).join(" ")}`;
  const g = svg("g", { id: `e${i}`, class: style, "data-from": e.u, "data-to": e.v }, svg("path", { d: curve }));
  if (route.tip) {
    const [sx, sy] = p[p.length - 1];
    const [dx, dy] = [route.tip[0] - sx, route.tip[1] - sy];
    const long = Math.hypot(dx, dy) || 1;
    const [nx, ny] = [(-dy / long) * 2.3, (dx / long) * 2.3];
    g.append(polygon([route.tip, [sx + nx, sy + ny], [sx - nx, sy - ny]], ""));
  }
  if (e.label && route.label) g.append(textLine("h m", route.label[0], route.label[1] + 3.5, 10, e.label));
  return g;
}

// ---- what the rewrite did ----
const CHANGES = { added: "added", removed: "removed", frozen: "frozen", trainable: "trains", partly: "partly trains", changed: "changed" };
const SIGNS = { added: "+", removed: "−", changed: "≠" };
function changesOf(id) {
  const inside = nodes.has(id) ? [nodes.get(id)] : allInside(id);
  const counts = new Map();
  for (const n of inside) if (n.change) counts.set(n.change, (counts.get(n.change) || 0) + 1);
  return counts;
}
function badge(id, x, y) {
  const counts = changesOf(id);
  if (!counts.size) return [];
  const order = ["added", "removed", "changed"].filter((c) => counts.has(c)).concat([...counts.keys()].filter((c) => !SIGNS[c]));
  const said = order.map((c) => (nodes.has(id) ? SIGNS[c] || CHANGES[c] : SIGNS[c] ? `${SIGNS[c]}${counts.get(c)}` : `${counts.get(c)} ${CHANGES[c] || c}`)).join(" · ");
  const { w, h } = nodes.has(id) ? nodes.get(id) : boxes.get(id).closed;
  const [first] = order;
  const wide = textWidth(said, 9, true) + 10;
  const left = Math.min(x + w / 2 - wide + 6, x + w / 2 - 4);
  const top = y - h / 2 - 7;
  return [svg("g", { class: `badge badge_${first}`, "data-of": id }, svg("rect", { x: r1(left), y: r1(top), width: r1(wide), height: 14, rx: 7 }), textLine("m", left + wide / 2, top + 10.2, 9, said))];
}
