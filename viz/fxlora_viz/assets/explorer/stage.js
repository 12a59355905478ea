// The stage: the picture that is shown, moved and zoomed, with what is selected and found marked.
const stage = $("stage");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let shown = null; // { root, sheet, under, overlay, width, height, still, rects, boxRects, edges }
let cam = { x: 0, y: 0, k: 1 };
let untouched = true; // the reader has not moved the picture: it is fitted again when it changes
const size = () => ({ w: stage.clientWidth || 800, h: stage.clientHeight || 600 });

// Makes an SVG, ours or the still one, into a picture to work with.
function adopt(root, still) {
  const [, , width, height] = root.getAttribute("viewBox").split(" ").map(Number);
  for (const style of root.querySelectorAll("style")) style.remove(); // the page has one for all
  const sheet = root.querySelector(":scope > g");
  root.removeAttribute("width");
  root.removeAttribute("height");
  root.removeAttribute("role"); // its parts are worked with: it is more than one image
  const labels = [...sheet.querySelectorAll(":scope > .fx_label")];
  const drawn = [...sheet.querySelectorAll(":scope > .fx_box")];
  const found = { root, sheet, width, height, still, rects: new Map(), boxRects: new Map(), edges: [...sheet.querySelectorAll(":scope > .fx_edge")] };
  drawn.forEach((g, i) => {
    const box = boxes.get(g.id);
    const frame = geometry(g.lastElementChild);
    found.boxRects.set(g.id, frame);
    labels[i].setAttribute("data-box", g.id);
    if (box.kind === "panel") return;
    // The name moves into the room on its right, the sign that closes the box into that on its left.
    const [inset, top] = [M.insets[box.kind], M.tops[box.kind]];
    labels[i].setAttribute("transform", "translate(6 0)");
    labels[i].prepend(chevron(frame.x + inset - 8.5, frame.y + top - 0.35 * M.labels[box.kind], false, g.id));
  });
  for (const g of sheet.querySelectorAll(":scope > .fx")) {
    const own = g.querySelector(":scope > .s");
    if (own) found.rects.set(g.id, geometry(own));
  }
  // What is found glows from behind, what is selected is framed in front.
  found.under = svg("g", { class: "overlay", "aria-hidden": "true" });
  found.overlay = svg("g", { class: "overlay", "aria-hidden": "true" });
  sheet.insertBefore(found.under, sheet.querySelector(":scope > .fx"));
  sheet.append(found.overlay);
  return found;
}
// The bounds of a shape from its attributes: it need not be in the page.
function geometry(shape) {
  const v = (name) => Number(shape.getAttribute(name));
  if (shape.tagName === "circle") return { x: v("cx") - v("r"), y: v("cy") - v("r"), w: 2 * v("r"), h: 2 * v("r") };
  if (shape.tagName === "polygon") {
    const points = shape.getAttribute("points").split(" ").map((p) => p.split(",").map(Number));
    const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
    const [x, y] = [Math.min(...xs), Math.min(...ys)];
    return { x, y, w: Math.max(...xs) - x, h: Math.max(...ys) - y };
  }
  return { x: v("x"), y: v("y"), w: v("width"), h: v("height") };
}
const rectOf = (id) => shown && (shown.rects.get(id) || shown.boxRects.get(id));
function show(next, anchor) {
  const before = anchor && rectOf(anchor.from) && toScreen(rectOf(anchor.from));
  const old = shown;
  if (old) old.root.remove();
  shown = next;
  $("still").replaceChildren(next.root);
  const after = before && rectOf(anchor.to);
  if (after && !untouched) {
    cam.x = after.x + PAD - before.x / cam.k;
    cam.y = after.y + PAD - before.y / cam.k;
    place();
  } else fitWidth();
  mark();
  if (old && anchor) glide(old, next);
}
const toScreen = (r) => ({ x: (r.x + PAD - cam.x) * cam.k, y: (r.y + PAD - cam.y) * cam.k, w: r.w * cam.k, h: r.h * cam.k });
// What is in both pictures moves from its old place to its new one, so that the eye can follow.
function glide(old, next) {
  if (calm.matches || next.rects.size > 250) return;
  const how = { duration: 220, easing: "cubic-bezier(.2,.7,.2,1)" };
  for (const [id, r] of next.rects) {
    const from = old.rects.get(id);
    const g = next.root.getElementById(id);
    if (from) g.animate([{ transform: `translate(${from.x - r.x}px,${from.y - r.y}px)` }, { transform: "none" }], how);
    else g.animate([{ opacity: 0 }, { opacity: 1 }], how);
  }
  for (const g of next.sheet.querySelectorAll(":scope > .fx_edge, :scope > .fx_box, :scope > .fx_label")) g.animate([{ opacity: 0 }, { opacity: 1 }], how);
}

// ---- the camera ----
let planned = 0;
function place() {
  if (!planned) planned = requestAnimationFrame(placeNow);
}
function placeNow() {
  planned = 0;
  if (!shown) return;
  const { w, h } = size();
  const [wide, high] = [w / cam.k, h / cam.k];
  // Some of the picture always stays in sight.
  cam.x = Math.min(Math.max(cam.x, 60 / cam.k - wide), shown.width - 60 / cam.k);
  cam.y = Math.min(Math.max(cam.y, 60 / cam.k - high), shown.height - 60 / cam.k);
  shown.root.setAttribute("viewBox", `${cam.x} ${cam.y} ${wide} ${high}`);
}
// The panels in the middle, as far as the legend below them stays whole.
function centred(wide) {
  const frames = [...shown.boxRects].filter(([id]) => boxes.get(id).kind === "panel").map(([, r]) => r);
  const middle = PAD + (Math.min(...frames.map((r) => r.x)) + Math.max(...frames.map((r) => r.x + r.w))) / 2;
  const slack = wide - shown.width;
  return slack <= 0 ? -slack / 2 : Math.max(-slack, Math.min(0, middle - wide / 2));
}
function fitWidth() {
  const { w, h } = size();
  const k = Math.min(1.1, w / shown.width);
  const high = h / k;
  cam = { k, x: centred(w / k), y: shown.height > high ? 0 : (shown.height - high) / 2 };
  untouched = true;
  placeNow();
}
function fitAll() {
  const { w, h } = size();
  const k = Math.min(1.6, (w - 8) / shown.width, (h - 8) / shown.height);
  cam = { k, x: centred(w / k), y: (shown.height - h / k) / 2 };
  untouched = false;
  placeNow();
}
function zoom(factor, at) {
  const { w, h } = size();
  const [px, py] = at || [w / 2, h / 2];
  const k = Math.min(6, Math.max(0.04, cam.k * factor));
  cam = { k, x: cam.x + px / cam.k - px / k, y: cam.y + py / cam.k - py / k };
  untouched = false;
  place();
}
function pan(dx, dy) {
  cam = { ...cam, x: cam.x - dx / cam.k, y: cam.y - dy / cam.k };
  untouched = false;
  place();
}
function inSight(id) {
  const r = rectOf(id);
  if (!r) return false;
  const { w, h } = size();
  const s = toScreen(r);
  return s.x + s.w > 0 && s.y + s.h > 0 && s.x < w && s.y < h;
}
// Brings something into sight, large enough to read, and no nearer than it takes.
function reveal(id, readable) {
  const r = rectOf(id);
  if (!r) return;
  const { w, h } = size();
  const [cx, cy] = [r.x + PAD + r.w / 2, r.y + PAD + r.h / 2];
  const k = readable && cam.k < 0.5 ? 0.9 : cam.k;
  const s = toScreen(r);
  const seen = k === cam.k && s.x >= 16 && s.y >= 16 && s.x + Math.min(s.w, w - 40) <= w - 16 && s.y + Math.min(s.h, h - 40) <= h - 16;
  if (seen) return;
  cam = { k, x: cx - w / 2 / k, y: (r.h * k > h ? r.y + PAD - 20 / k : cy - h / 2 / k) };
  untouched = false;
  place();
}
new ResizeObserver(() => (shown && untouched ? fitWidth() : place())).observe(stage);

// ---- marks ----
function mark() {
  if (!shown) return;
  const found = new Map(); // what is drawn -> whether any node in it is found
  for (const id of hits) found.set(standIn(id), true);
  const dimmed = state.chips.size > 0 || (hits.length > 0 && state.query);
  for (const id of shown.rects.keys()) {
    const g = shown.root.getElementById(id);
    const inside = nodes.has(id) ? [nodes.get(id)] : allInside(id);
    const passed = inside.some(passes) && (!state.query.trim() || !hits.length || found.has(id));
    const same = state.mode === "diff" && !changesOf(id).size;
    g.classList.toggle("dim", Boolean(dimmed && !passed));
    g.classList.toggle("same", same && !dimmed);
    g.classList.toggle("chosen", id === (state.selected && standIn(state.selected)));
  }
  const chosen = state.selected && standIn(state.selected);
  for (const g of shown.edges) {
    const near = chosen && (g.dataset.from === chosen || g.dataset.to === chosen);
    g.classList.toggle("near", Boolean(near));
    const ends = [g.dataset.from, g.dataset.to].map((id) => shown.root.getElementById(id));
    g.classList.toggle("dim", ends.some((e) => e && e.classList.contains("dim")) && !near);
  }
  shown.overlay.replaceChildren();
  shown.under.replaceChildren();
  for (const id of found.keys()) halo(id, "hit", 4);
  const twin = chosen && twinOf(chosen) && standIn(twinOf(chosen));
  if (twin && rectOf(twin)) halo(twin, "twin", 5);
  if (chosen) halo(chosen, "ring", 5);
}
function halo(id, style, by) {
  const r = rectOf(id);
  if (r) (style === "hit" ? shown.under : shown.overlay).append(svg("rect", { class: style, x: r1(r.x - by), y: r1(r.y - by), width: r1(r.w + 2 * by), height: r1(r.h + 2 * by), rx: shown.boxRects.has(id) ? 14 : 11 }));
}

// ---- pointer ----
const fingers = new Map();
let pressed = null;
let moved = false;
const inStage = (e) => {
  const r = stage.getBoundingClientRect();
  return [e.clientX - r.left, e.clientY - r.top];
};
function thing(target) {
  const toggle = target.closest("[data-toggle]");
  if (toggle) return { id: toggle.dataset.toggle, toggles: true };
  const label = target.closest("[data-box]");
  if (label) return { id: label.dataset.box, box: true };
  const g = target.closest("g.fx, g.fx_box");
  if (!g || !(nodes.has(g.id) || boxes.has(g.id))) return null;
  return { id: g.id, frame: g.classList.contains("fx_box"), closed: g.classList.contains("fx_closed") };
}
stage.addEventListener("pointerdown", (e) => {
  if (e.button > 1) return;
  fingers.set(e.pointerId, inStage(e));
  pressed = inStage(e);
  moved = false;
});
stage.addEventListener("pointermove", (e) => {
  const last = fingers.get(e.pointerId);
  if (!last) return;
  const now = inStage(e);
  if (fingers.size === 2) {
    const [other] = [...fingers].filter(([id]) => id !== e.pointerId).map(([, p]) => p);
    const spread = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
    zoom(spread(now) / spread(last), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
    pan((now[0] - last[0]) / 2, (now[1] - last[1]) / 2);
    moved = true;
  } else if (moved || Math.hypot(now[0] - pressed[0], now[1] - pressed[1]) > 4) {
    if (!moved) stage.setPointerCapture(e.pointerId);
    stage.classList.add("dragging");
    moved = true;
    pan(now[0] - last[0], now[1] - last[1]);
  }
  fingers.set(e.pointerId, now);
});
for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
  stage.addEventListener(type, (e) => {
    fingers.delete(e.pointerId);
    if (!fingers.size) stage.classList.remove("dragging");
  });
}
stage.addEventListener("click", (e) => {
  if (moved) return;
  const hit = thing(e.target);
  if (!hit) return select("");
  if (hit.toggles) return toggle(hit.id);
  if (hit.frame && boxes.get(hit.id).kind === "panel") return select("");
  select(hit.id, { still: true });
});
stage.addEventListener("dblclick", (e) => {
  const hit = thing(e.target);
  if (hit && !hit.toggles && boxes.has(hit.id) && boxes.get(hit.id).kind !== "panel" && (hit.closed || hit.box)) toggle(hit.id);
});
stage.addEventListener("wheel", (e) => {
  e.preventDefault();
  const unit = e.deltaMode === 1 ? 16 : e.deltaMode === 2 ? 400 : 1;
  if (e.shiftKey || e.altKey) return pan(-(e.deltaX + (e.shiftKey ? e.deltaY : 0)) * unit, e.altKey ? -e.deltaY * unit : 0);
  zoom(Math.exp(-Math.max(-160, Math.min(160, e.deltaY * unit)) * (e.ctrlKey ? 0.01 : 0.0022)), inStage(e));
}, { passive: false });

// ---- from node to node ----
const DIRECTIONS = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowRight: [1, 0], ArrowLeft: [-1, 0] };
function neighbour(key) {
  const [dx, dy] = DIRECTIONS[key];
  const from = state.selected && rectOf(standIn(state.selected));
  if (!from) return first();
  const me = standIn(state.selected);
  const along = LR ? dx : dy;
  const [cx, cy] = [from.x + from.w / 2, from.y + from.h / 2];
  const linked = new Set();
  if (along) for (const g of shown.edges) {
    const [a, b] = along > 0 ? [g.dataset.from, g.dataset.to] : [g.dataset.to, g.dataset.from];
    if (a === me) linked.add(b);
  }
  let best = "";
  let least = Infinity;
  for (const [id, r] of shown.rects) {
    if (id === me) continue;
    const [vx, vy] = [r.x + r.w / 2 - cx, r.y + r.h / 2 - cy];
    const ahead = vx * dx + vy * dy;
    const aside = Math.abs(vx * dy) + Math.abs(vy * dx);
    const touching = linked.has(id);
    if (ahead < 4 && !touching) continue;
    // An edge counts for more than nearness; beside, the same row counts for more than the next.
    const cost = (touching ? 0 : along && linked.size ? 1e6 : 0) + Math.max(ahead, 0) + (along ? 1.5 : 4) * aside;
    if (cost < least) [least, best] = [cost, id];
  }
  return best;
}
const first = () => {
  const order = [...shown.rects].sort(([, a], [, b]) => (LR ? a.x - b.x || a.y - b.y : a.y - b.y || a.x - b.x));
  return order.length ? order[0][0] : "";
};
