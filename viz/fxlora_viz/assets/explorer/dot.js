// A view -> what of it is visible, with edges lifted to closed modules, and its DOT text.
const STRONG = { quiet: 0, idle: 1, kept: 2, added: 3 };
function visible(mode, closed) {
  const panels = shownPanels(mode);
  // A diff is the last panel, and what the rewrite took away in the place it had.
  const gone = mode === "diff" ? DATA.nodes.filter((n) => n.change === "removed") : [];
  const homes = new Map(gone.map((n) => [n.id, homeInLast(n)]));
  const at = (id) => {
    if (!homes.has(id)) return standIn(id, closed);
    const home = homes.get(id);
    const stand = standIn(home, closed);
    return stand === home && !(boxes.get(home).kind !== "panel" && closed.has(boxes.get(home).key)) ? id : stand;
  };
  const drawn = new Map(); // id -> the box it is drawn in
  for (const n of [...DATA.nodes.filter((o) => panels.includes(o.panel)), ...gone]) {
    const id = at(n.id);
    if (!drawn.has(id)) drawn.set(id, homes.get(id) || parentOf(id));
  }
  const open = DATA.boxes.filter((b) => panels.includes(b.panel) && standIn(b.id, closed) === b.id && !(b.kind !== "panel" && closed.has(b.key)));
  const here = (id) => {
    if (panels.includes(panelOf(id)) || homes.has(id)) return at(id);
    const twin = mode === "diff" && nodes.get(id).twin;
    return twin ? at(twin) : "";
  };
  const edges = new Map();
  DATA.edges.forEach(([u, v, style, dashed, grad, label, weight, minlen, far]) => {
    // Of the panel that a diff leaves out, only what was taken away is drawn.
    if (!panels.includes(panelOf(u)) && !homes.has(u) && !homes.has(v)) return;
    const [a, b] = [here(u), here(v)];
    if (!a || !b || a === b || far) return;
    const found = edges.get(`${a} ${b}`);
    const lifted = a !== u || b !== v;
    if (found && (lifted || found.lifted)) {
      found.dashed = found.dashed && Boolean(dashed);
      found.grad = found.grad || Boolean(grad);
      if (STRONG[style] > STRONG[found.style]) found.style = style;
      if (found.label !== label) found.label = "";
      found.weight = Math.max(found.weight, weight);
      found.minlen = Math.max(found.minlen, minlen);
    } else {
      const key = found ? `${a} ${b} ${edges.size}` : `${a} ${b}`;
      edges.set(key, { u: a, v: b, style, dashed: Boolean(dashed), grad: Boolean(grad), label, weight, minlen, lifted });
    }
  });
  const found = { mode, panels, drawn, open, edges: [...edges.values()] };
  found.rows = rowsOf(found, here);
  found.orders = DATA.orders.map((o) => o.map(here)).filter((o) => o.every((id, i) => isDrawn(drawn, id) && o.indexOf(id) === i && nodes.has(id)));
  return found;
}
const isDrawn = (map, id) => Boolean(id) && map.has(id);
function homeInLast(n) {
  for (const b of ancestors(n.id)) {
    const twin = boxesOf.get(b.key).find((o) => o.panel === LAST);
    if (twin) return twin.id;
  }
  return DATA.boxes.find((b) => b.panel === LAST).id;
}
// Rows that no edge contradicts, after lifting: two rows join unless one is reached from the other.
function rowsOf(view, here) {
  const row = new Map([...view.drawn.keys()].map((id) => [id, id]));
  const members = new Map([...view.drawn.keys()].map((id) => [id, [id]]));
  const next = new Map([...view.drawn.keys()].map((id) => [id, new Set()]));
  for (const e of view.edges) if ((nodes.get(e.u) || {}).role !== "rows") next.get(e.u).add(e.v);
  const reaches = (from, to) => {
    const seen = new Set([from]);
    const todo = [from];
    while (todo.length) {
      for (const id of members.get(todo.pop())) {
        for (const v of next.get(id)) {
          const r = row.get(v);
          if (r === to) return true;
          if (!seen.has(r)) seen.add(r), todo.push(r);
        }
      }
    }
    return false;
  };
  const wanted = DATA.rows.map((r) => [...new Set(r.map(here).filter((id) => isDrawn(view.drawn, id)))]);
  if (view.panels.length > 1) {
    // Closed boxes of the two panels stand side by side, as everything else does.
    for (const key of FOLDABLE) wanted.push(boxesOf.get(key).map((b) => b.id).filter((id) => view.drawn.has(id)));
  }
  for (const group of wanted) {
    for (const id of group.slice(1)) {
      const [a, b] = [row.get(group[0]), row.get(id)];
      if (a === b || reaches(a, b) || reaches(b, a)) continue;
      for (const m of members.get(b)) row.set(m, a), members.get(a).push(m);
      members.delete(b);
    }
  }
  return [...members.values()].filter((g) => g.length > 1);
}
function dotText(view) {
  const lines = [DATA.head];
  const inBox = new Map(view.open.map((b) => [b.id, []]));
  for (const [id, home] of view.drawn) inBox.get(home).push(id);
  const todo = view.open.filter((b) => !b.parent).reverse().map((b) => [b, true]);
  const isOpen = new Set(view.open.map((b) => b.id));
  while (todo.length) {
    const [b, opening] = todo.pop();
    if (!opening) {
      lines.push("}");
      continue;
    }
    if (b.kind === "panel") {
      for (const o of view.orders) {
        if (panelOf(o[0]) === b.panel) lines.push(`${o.map((id) => `"${id}"`).join(" -> ")} [style="invis"];`);
      }
    }
    lines.push(`subgraph "cluster_${b.id}" {`, b.dot);
    for (const id of inBox.get(b.id)) lines.push(`"${id}" [${nodes.has(id) ? nodes.get(id).dot : boxes.get(id).closed.dot}];`);
    todo.push([b, false]);
    for (const c of [...boxesIn.get(b.id)].reverse()) if (isOpen.has(c.id)) todo.push([c, true]);
  }
  view.edges.forEach((e, i) => {
    const more = (e.minlen > 1 ? ` minlen="${e.minlen}"` : "") + (e.label ? ` label="${quoted(` ${e.label}`)}"` : "");
    lines.push(`"${e.u}" -> "${e.v}" [id="e${i}" weight="${e.weight}"${more}];`);
  });
  for (const r of view.rows) lines.push(`{rank=same; ${r.map((id) => `"${id}"`).join("; ")}}`);
  lines.push("}");
  return lines.join("\n");
}
const quoted = (text) => plain(text).replace(/\\/g, "\\\\").replace(/"/g, '\\"').replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
