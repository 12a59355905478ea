// The search: words, fields and patterns -> which nodes they find; and the filters.
const WEIGHTS = new Set(["trainable", "partly"]);
const ROLES = new Set(["lora_A", "lora_B", "diagonal", "magnitude", "delta", "rows"]);
const entriesOf = (n) => (n.site && DATA.sites[n.site]) || [];
const idle = (n) => n.style === "idle" || n.style === "unused" ||
  (ROLES.has(n.role) && entriesOf(n).some((e) => e.effect && !/^(live|partial)/.test(e.effect)));
const CHIPS = [
  ["trainable", "Trainable", "Parameters with requires_grad=True", (n) => WEIGHTS.has(n.state)],
  ["matched", "Matched", "What the LoRA config selects, and its adapters", (n) => Boolean(n.matched || n.role)],
  ["idle", "Inert", "Adapters that learn nothing: bypassed, never called, cut or dead", idle],
];
const passes = (n) => !state.chips.size || CHIPS.some(([id, , , test]) => state.chips.has(id) && test(n));
const texts = (n) => [n.title, named(n.path || ""), n.key, n.type || ""];
const FIELDS = {
  name: (n) => [n.title, named(n.path || ""), n.key],
  op: (n) => (n.kind === "op" || n.kind === "circle" ? [n.type || "", n.title, ...(n.members || [])] : []),
  type: (n) => [n.type || ""],
  dtype: (n) => [(n.out || "").split(" ")[0], ...(n.weights || []).map((i) => DATA.parameters[i].dtype || "")],
  shape: (n) => [n.out || "", ...(n.weights || []).map((i) => DATA.parameters[i].shape || "")],
  adapter: (n) => [n.adapter || "", ...entriesOf(n).map((e) => e.adapter)],
  verdict: (n) => entriesOf(n).flatMap((e) => [e.plan, e.effect || ""]),
  role: (n) => [n.role || ""],
  source: (n) => [n.source || ""],
  change: (n) => [n.change || ""],
};
const EXACT = {
  // Of what has parameters: theirs; of the rest: its output's.
  grad: (n) => [String(n.state ? WEIGHTS.has(n.state) : Boolean(n.grad))],
  rank: (n) => entriesOf(n).map((e) => String(e.rank ?? "")),
  alpha: (n) => entriesOf(n).map((e) => String(e.alpha ?? "")),
  scaling: (n) => entriesOf(n).map((e) => String(e.scaling ?? "")),
  is: (n) => CHIPS.filter(([, , , test]) => test(n)).map(([id]) => id).concat(n.state || []),
};
// Returns a test of nodes, or null for an empty search; throws what is wrong with a pattern.
function compiled(text) {
  const terms = [];
  // A pattern may hold blanks and colons, a quoted word as well.
  for (const m of text.matchAll(/(-)?(?:\/((?:\\.|[^/\\])+)\/|(?:([a-z]+):)?(?:"([^"]*)"|(\S+)))/gi)) {
    const [, not, pattern, field, quoted, word] = m;
    const test = pattern !== undefined ? byPattern(pattern) : byWord((field || "").toLowerCase(), (quoted ?? word).toLowerCase(), m[0]);
    terms.push(not ? (n) => !test(n) : test);
  }
  return terms.length ? (n) => terms.every((t) => t(n)) : null;
}
function byPattern(pattern) {
  const regex = new RegExp(pattern, "i");
  return (n) => texts(n).some((t) => regex.test(t));
}
function byWord(field, word, whole) {
  if (EXACT[field]) return (n) => EXACT[field](n).some((t) => t.toLowerCase() === word);
  if (FIELDS[field]) return (n) => FIELDS[field](n).some((t) => t.toLowerCase().includes(word));
  const all = field ? whole.toLowerCase() : word; // a colon in a name
  return (n) => texts(n).some((t) => t.toLowerCase().includes(all));
}
let hits = [];
let fault = "";
function search() {
  fault = "";
  hits = [];
  try {
    const test = compiled(state.query.trim());
    if (test) hits = DATA.nodes.filter((n) => isShown(n.id) && test(n)).map((n) => n.id);
  } catch (error) {
    fault = plain(error.message);
  }
}
