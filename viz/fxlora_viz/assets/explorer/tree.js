// The modules as a tree for keyboard and screen reader; open here is open in the picture.
const tree = $("tree");
let rows = []; // ids in the order of the tree
const kindsOf = (id) => {
  const inside = nodes.has(id) ? [nodes.get(id)] : allInside(id);
  if (inside.some(idle)) return "idle";
  if (inside.some((n) => WEIGHTS.has(n.state))) return "trainable";
  return inside.some((n) => n.params) ? "frozen" : inside.every((n) => n.kind === "input" || n.kind === "output") ? "io" : "op";
};
const paramsOf = (id) => (nodes.has(id) ? nodes.get(id).params : boxes.get(id).params) || 0;
const titleOf = (id) => {
  if (nodes.has(id)) return nodes.get(id).title;
  const b = boxes.get(id);
  return b.label + (b.count > 1 ? ` × ${b.count}` : "");
};
function drawTree() {
  const focused = document.activeElement && tree.contains(document.activeElement) && document.activeElement.dataset.id;
  const found = [];
  const walk = (id, depth, index, of) => {
    found.push(item(id, depth, index, of));
    if (!boxes.has(id) || isClosed(boxes.get(id))) return;
    const seen = new Set();
    const children = [];
    for (const n of allInOrder(id)) {
      const child = childOf(n, id);
      if (!seen.has(child)) seen.add(child), children.push(child);
    }
    children.forEach((c, i) => walk(c, depth + 1, i + 1, children.length));
  };
  const roots = DATA.boxes.filter((b) => b.kind === "panel" && shownPanels().includes(b.panel));
  roots.forEach((b, i) => walk(b.id, 1, i + 1, roots.length));
  rows = found.map((li) => li.dataset.id);
  tree.replaceChildren(...found);
  markTree();
  if (focused) focusRow(rows.includes(focused) ? focused : standIn(focused));
}
const inOrder = new Map();
function allInOrder(box) {
  if (!inOrder.has(box)) {
    const inside = new Set(allInside(box));
    inOrder.set(box, DATA.nodes.filter((n) => inside.has(n)));
  }
  return inOrder.get(box);
}
function childOf(n, box) {
  let at = n.id;
  while (parentOf(at) !== box) at = parentOf(at);
  return at;
}
function item(id, depth, index, of) {
  const box = boxes.get(id);
  const params = paramsOf(id);
  const kind = kindsOf(id);
  const li = el("li", {
    role: "treeitem", "data-id": id, tabindex: -1, "aria-level": depth, "aria-posinset": index, "aria-setsize": of, "aria-selected": "false",
    "aria-expanded": box ? String(!isClosed(box)) : null, class: box ? `box ${box.kind}` : "leaf", title: short(named((nodes.get(id) || box).path || ""), 300),
  });
  li.style.setProperty("--depth", depth - 1);
  li.append(
    el("span", { class: "twist", "aria-hidden": "true" }),
    el("span", { class: `swatch ${kind} ${nodes.has(id) ? nodes.get(id).form : ""}`, "aria-hidden": "true" }),
    el("span", { class: "what" }, short(box ? box.label : titleOf(id), 90)),
  );
  if (box && box.count > 1) li.append(el("span", { class: "times" }, `× ${box.count}`));
  if (params && !(box && box.kind === "panel")) li.append(el("span", { class: "count" }, quantity(params)));
  if (kind === "trainable" || kind === "idle") li.append(el("span", { class: "unseen" }, kind === "idle" ? ", inert" : ", trainable"));
  return li;
}
function markTree() {
  const chosen = state.selected && (rows.includes(state.selected) ? state.selected : standIn(state.selected));
  let stop = false;
  const found = new Set(hits.map((id) => standIn(id)));
  for (const li of tree.children) {
    const on = li.dataset.id === chosen;
    li.setAttribute("aria-selected", String(on));
    li.classList.toggle("found", found.has(li.dataset.id));
    li.tabIndex = on ? 0 : -1;
    stop = stop || on;
    if (on) li.scrollIntoView({ block: "nearest" });
  }
  if (!stop && tree.firstElementChild) tree.firstElementChild.tabIndex = 0;
}
function focusRow(id) {
  const at = rows.indexOf(id);
  if (at < 0) return;
  for (const li of tree.children) li.tabIndex = -1;
  tree.children[at].tabIndex = 0;
  tree.children[at].focus();
}
tree.addEventListener("click", (e) => {
  const li = e.target.closest("li");
  if (!li) return;
  const id = li.dataset.id;
  if (e.target.closest(".twist") && boxes.has(id) && boxes.get(id).kind !== "panel") return toggle(id);
  if (boxes.has(id) && boxes.get(id).kind === "panel") return focusRow(id);
  select(id);
  focusRow(id);
});
tree.addEventListener("dblclick", (e) => {
  const li = e.target.closest("li.box:not(.panel)");
  if (li && !e.target.closest(".twist")) toggle(li.dataset.id);
});
let typed = "";
let typedAt = 0;
tree.addEventListener("keydown", (e) => {
  const li = e.target.closest("li");
  if (!li || e.ctrlKey || e.metaKey || e.altKey) return;
  const id = li.dataset.id;
  const at = rows.indexOf(id);
  const box = boxes.get(id);
  const folds = box && box.kind !== "panel";
  const go = (i) => focusRow(rows[Math.max(0, Math.min(rows.length - 1, i))]);
  const keys = {
    ArrowDown: () => go(at + 1),
    ArrowUp: () => go(at - 1),
    Home: () => go(0),
    End: () => go(rows.length - 1),
    ArrowRight: () => (folds && isClosed(box) ? toggle(id) : box ? go(at + 1) : null),
    ArrowLeft: () => (folds && !isClosed(box) ? toggle(id) : parentOf(id) && focusRow(parentOf(id))),
    Enter: () => (folds ? (select(id), toggle(id)) : nodes.has(id) && select(id)),
    " ": () => (folds || nodes.has(id)) && select(id),
    "*": () => openBoxes([...tree.children].filter((o) => parentOf(o.dataset.id) === parentOf(id)).map((o) => o.dataset.id)),
  };
  if (keys[e.key]) keys[e.key]();
  else if (e.key.length === 1 && /[\p{L}\p{N}_.]/u.test(e.key) && !PAGE_KEYS.has(e.key)) typeAhead(e.key, at);
  else return;
  e.preventDefault();
  e.stopPropagation();
});
function typeAhead(letter, at) {
  const now = performance.now();
  typed = now - typedAt < 700 ? typed + letter : letter;
  typedAt = now;
  for (let i = typed.length > 1 ? 0 : 1; i <= rows.length; i++) {
    const id = rows[(at + i) % rows.length];
    if (titleOf(id).toLowerCase().startsWith(typed.toLowerCase())) return focusRow(id);
  }
}
