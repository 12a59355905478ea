// Graphviz in a worker: DOT text -> positions, each kept once it is known.
const LIMIT = 45000; // milliseconds a layout may take
const WORKER = `
let engine;
onmessage = async ({ data }) => {
  try {
    engine = engine || (await Viz.instance());
    const text = data.dot ? engine.renderString(data.dot, { format: "json0" }) : "";
    postMessage({ id: data.id, text });
  } catch (error) {
    postMessage({ id: data.id, error: String((error && error.message) || error) });
  }
};`;
const known = new Map(); // DOT text -> layout; the newest last
let worker = null;
let ticket = 0;
const waiting = new Map();
function theWorker() {
  if (worker) return worker;
  const url = URL.createObjectURL(new Blob([$("engine").textContent, WORKER], { type: "text/javascript" }));
  worker = new Worker(url);
  URL.revokeObjectURL(url);
  worker.onmessage = ({ data }) => settle(data.id, data);
  worker.onerror = (event) => {
    event.preventDefault();
    drop(event.message || "the worker stopped");
  };
  return worker;
}
function settle(id, data) {
  const call = waiting.get(id);
  waiting.delete(id);
  if (!call) return;
  clearTimeout(call.timer);
  if (data.error) call.reject(new Error(data.error));
  else call.resolve(data.text);
}
function drop(reason) {
  if (worker) worker.terminate();
  worker = null;
  for (const id of [...waiting.keys()]) settle(id, { error: reason });
}
function ask(dot) {
  return new Promise((resolve, reject) => {
    ticket += 1;
    const timer = setTimeout(() => drop(`no layout within ${LIMIT / 1000} s: close some modules first`), LIMIT);
    waiting.set(ticket, { resolve, reject, timer });
    theWorker().postMessage({ id: ticket, dot });
  });
}
async function layoutOf(view) {
  const dot = dotText(view);
  if (known.has(dot)) return known.get(dot);
  const found = readLayout(JSON.parse(await ask(dot)));
  known.set(dot, found);
  if (known.size > 100) known.delete(known.keys().next().value);
  return found;
}
// Graphviz's y points up; a drawing to the right is laid out upside down and read as it is.
function readLayout(data) {
  const numbers = (text) => text.split(",").map(Number);
  const [, , width, height] = numbers(data.bb);
  const flip = (pos) => {
    const [x, y] = numbers(pos);
    return [x, LR ? y : height - y];
  };
  const found = { width, height, nodes: new Map(), boxes: new Map(), edges: new Map() };
  for (const o of data.objects || []) {
    if (o.name.startsWith("cluster_") && o.bb) {
      const [x0, y0, x1, y1] = numbers(o.bb);
      found.boxes.set(o.name.slice(8), LR ? [x0, y0, x1, y1] : [x0, height - y1, x1, height - y0]);
    } else if (o.pos) found.nodes.set(o.name, flip(o.pos));
  }
  for (const e of data.edges || []) {
    if (!e.pos || !e.id) continue;
    const route = { points: [], tip: null, label: e.lp ? flip(e.lp) : null };
    for (const part of e.pos.split(";")[0].split(" ")) {
      if (part.startsWith("e,")) route.tip = flip(part.slice(2));
      else if (part && !part.startsWith("s,")) route.points.push(flip(part));
    }
    found.edges.set(Number(e.id.slice(1)), route);
  }
  return found;
}
