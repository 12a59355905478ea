// What the page is about: the data, indexed by id, and how to build elements from it.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG_NS = "http://www.w3.org/2000/svg";
const PANELS = DATA.panels;
const LAST = PANELS[PANELS.length - 1];
const TWO = PANELS.length > 1;
const LR = DATA.direction === "LR";
for (const n of DATA.nodes) n.title = n.title || ""; // an empty value is not written
const nodes = new Map(DATA.nodes.map((n) => [n.id, n]));
const boxes = new Map(DATA.boxes.map((b) => [b.id, b]));
const boxesOf = new Map(); // key -> the boxes of all panels that have it
const nodesIn = new Map(DATA.boxes.map((b) => [b.id, []]));
const boxesIn = new Map(DATA.boxes.map((b) => [b.id, []]));
const readers = new Map(); // parameter -> the nodes that read it
const outOf = new Map();
const into = new Map();
const add = (map, key, value) => (map.has(key) ? map.get(key).push(value) : map.set(key, [value]));
for (const b of DATA.boxes) {
  add(boxesOf, b.key, b);
  if (b.parent) boxesIn.get(b.parent).push(b);
}
for (const n of DATA.nodes) {
  nodesIn.get(n.box).push(n);
  for (const i of n.weights || []) add(readers, i, n.id);
}
for (const e of DATA.edges) {
  add(outOf, e[0], e[1]);
  add(into, e[1], e[0]);
}
const FOLDABLE = [...new Set(DATA.boxes.filter((b) => b.kind !== "panel").map((b) => b.key))];
const parentOf = (id) => (nodes.has(id) ? nodes.get(id).box : (boxes.get(id) || {}).parent) || "";
const panelOf = (id) => (nodes.get(id) || boxes.get(id)).panel;
function ancestors(id) {
  const found = [];
  for (let at = parentOf(id); at; at = parentOf(at)) found.push(boxes.get(at));
  return found; // from the inside out
}
// How many boxes stand around a box of this key: what "depth" counts.
const level = new Map(FOLDABLE.map((k) => [k, ancestors(boxesOf.get(k)[0].id).length]));
const DEEPEST = Math.max(0, ...level.values());
function allInside(box) {
  const found = [];
  const todo = [box];
  while (todo.length) {
    const at = todo.pop();
    found.push(...nodesIn.get(at));
    todo.push(...boxesIn.get(at).map((b) => b.id));
  }
  return found;
}
const twinOf = (id) => {
  if (nodes.has(id)) return nodes.get(id).twin || "";
  const b = boxes.get(id);
  const twin = b && boxesOf.get(b.key).find((o) => o.panel !== b.panel);
  return twin ? twin.id : "";
};

// Names are data: they only ever become text nodes and attribute values.
function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}
function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG_NS, tag), attributes, children);
}
function fill(element, attributes, children) {
  for (const [k, v] of Object.entries(attributes || {})) {
    if (v === undefined || v === null || v === false) continue;
    if (k.startsWith("on")) element.addEventListener(k.slice(2), v);
    else element.setAttribute(k, v === true ? "" : plain(v));
  }
  element.append(...children.filter((c) => c !== null && c !== undefined && c !== "").map((c) => (c instanceof Node ? c : plain(c))));
  return element;
}
// What XML forbids and what would turn the text beside it around becomes a space.
const ODD = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const plain = (text) => String(text).replace(ODD, " ");
const short = (text, limit) => (text.length <= limit ? text : `${text.slice(0, limit / 2)}…${text.slice(-limit / 2)}`);
function quantity(n) {
  if (n < 10000) return String(n);
  for (const [unit, size, digits] of [["K", 1e3, 1], ["M", 1e6, 1], ["B", 1e9, 2], ["T", 1e12, 2]]) {
    if (Number((n / size).toFixed(digits)) < 1000) return `${(n / size).toFixed(digits)} ${unit}`;
  }
  return n.toPrecision(3);
}
const counted = (n) => `${n.toLocaleString("en")}${n >= 10000 ? ` (${quantity(n)})` : ""}`;
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
