"use strict";
// Shows what is known of an element of the drawing. Every text of the model goes in by textContent or append.
const data = JSON.parse(document.getElementById("data").textContent);
const map = document.getElementById("map"), panel = document.getElementById("panel");
const search = document.getElementById("search"), hits = document.getElementById("hits");
const strings = data.strings.map((packed) => {
  if (typeof packed === "string") return packed;
  const [pattern, ...numbers] = packed;
  return data.patterns[pattern].split("\t").map((piece, i) => (i ? numbers[i - 1] + piece : piece)).join("");
});
const text = (i) => strings[i];
const LISTS = ["frames", "kernels"];
const given = (field, value) => (field === "state" ? value[0] : LISTS.includes(field) ? value.map(text) : text(value));
const ops = data.ops.map((row, id) => {
  const [layer, traits, users] = row.slice(-3);
  const op = { id, layer, users, inputs: [], sites: [] };
  data.own.forEach((field, k) => { op[field] = text(row[k]); });
  data.shared.forEach((field, k) => { op[field] = given(field, data.traits[traits][k]); });
  return op;
});
ops.forEach((op) => op.users.forEach((user) => ops[user].inputs.push(op.id)));
data.sites.forEach((site) => ops[site.op].sites.push(site));
ops.forEach((op) => op.sites.sort((a, b) => a.name.includes(".write_") - b.name.includes(".write_")));

function make(tag, content, className) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const part of [].concat(content ?? [])) element.append(part);
  return element;
}

// ---- the side panel ----

function section(title, ...content) {
  return content.length ? [make("h4", title), ...content] : [];
}

function links(ids) {
  const row = make("div", [], "links");
  for (const id of ids) {
    const button = make("button", ops[id].name);
    button.onclick = () => select(id, true);
    row.append(button);
  }
  return row;
}

function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) if (value) list.append(make("dt", name), make("dd", value));
  return list;
}

function applied(one) {
  const what = one.ops.join(" + ");
  return make("p", `${what}: by the ${one.lowering}${one.fusion ? ", " + one.fusion : ""}${one.why ? " (" + one.why + ")" : ""}`);
}

function showOp(id) {
  const op = ops[id];
  const parts = [make("h3", op.sites.length ? op.sites.map((s) => s.name).join(", ") : op.name)];
  parts.push(make("p", op.sites.length ? `station at ${op.name}` : op.state ? "parameter or buffer" : `${op.origin} ${op.kind}`, "kind"));
  const said = { steer: "spliced in to steer", capture: "spliced in to capture" }[op.acts];
  parts.push(facts([
    ["operator", op.op], ["dtype", op.dtype || (op.sites[0] || {}).dtype], ["shape", op.shape || (op.sites[0] || {}).shape],
    ["module", op.module], ["layer", op.layer === null ? "" : String(op.layer)], ["pass", said || (op.origin === "removed" ? "removed by a template" : "")],
  ]));
  const edits = op.sites.flatMap((s) => s.applied);
  parts.push(...section("Steered and captured", ...edits.map(applied)));
  parts.push(...section("Canonical", make("pre", op.line)));
  parts.push(...section("FX", make("pre", op.source)));
  if (op.frames.length) parts.push(...section("Stack trace, innermost last", ...op.frames.map((frame) => make("pre", frame.replace(/( in \S+): /, "$1\n    ")))));
  if (op.kernels.length) parts.push(...section("Kernels", kernelLinks(op.kernels)));
  if (op.inputs.length) parts.push(...section("Inputs", links(op.inputs)));
  if (op.users.length) parts.push(...section("Users", links(op.users)));
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
}

function kernelLinks(names) {
  const row = make("div", [], "links");
  for (const name of names) {
    const button = make("button", name);
    button.onclick = () => selectKernel(name);
    row.append(button);
  }
  return row;
}

function lines(ids) {
  const list = make("div", [], "ops");
  for (const id of ids) {
    const button = make("button", ops[id].line || ops[id].name);
    button.onclick = () => select(id, true);
    list.append(button);
  }
  return list;
}

function showBox(number) {
  const [label, note, ids] = data.boxes[number];
  panel.replaceChildren(make("h3", label), make("p", note, "kind"), ...section(`${ids.length} ops`, lines(ids)));
  panel.scrollTop = 0;
}

function selectKernel(name) {
  const ids = ops.filter((op) => op.kernels.includes(name)).map((op) => op.id);
  clear();
  for (const id of ids) marksOf(id).forEach((mark) => mark.classList.add("same"));
  panel.replaceChildren(make("h3", name), make("p", "kernel", "kind"), ...section(`made of ${ids.length} ops`, lines(ids)));
  const first = ids.map(marksOf).find((marks) => marks.length);
  if (first) reveal(first[0]);
}

// ---- selection ----

const marksOf = (id) => [...map.querySelectorAll(`[data-i="${id}"]`)];

function clear() {
  for (const mark of map.querySelectorAll(".picked, .same")) mark.classList.remove("picked", "same");
}

function reveal(mark) {
  for (let at = mark.closest("details"); at; at = at.parentElement.closest("details")) at.open = true;
  mark.scrollIntoView({ block: "center", inline: "nearest" });
}

function select(id, jump, mark) {
  clear();
  const marks = marksOf(id);
  marks.forEach((each) => each.classList.add("picked"));
  showOp(id);
  const chosen = mark || marks.find((each) => each.classList.contains("station")) || marks[0];
  if (jump && chosen) {
    reveal(chosen);
    chosen.focus({ preventScroll: true });
  }
}

function act(target) {
  const mark = target.closest("[data-i], [data-b], [data-k]");
  if (!mark) return false;
  if (mark.dataset.i !== undefined) select(Number(mark.dataset.i), false, mark);
  else if (mark.dataset.k !== undefined) selectKernel(mark.dataset.k);
  else {
    clear();
    mark.classList.add("picked");
    showBox(Number(mark.dataset.b));
  }
  return true;
}

for (const each of map.querySelectorAll(".op")) {
  const op = ops[Number(each.dataset.i)];
  each.setAttribute("role", "button");
  each.setAttribute("tabindex", "-1");
  each.setAttribute("aria-label", op.name);
  const title = document.createElementNS(each.namespaceURI, "title");
  title.textContent = `${op.name}: ${op.op}${op.shape}`;
  each.prepend(title);
}

map.addEventListener("click", (event) => act(event.target));
map.addEventListener("keydown", (event) => {
  if (event.target.closest("summary")) return;
  if ((event.key === "Enter" || event.key === " ") && act(event.target)) event.preventDefault();
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const marks = [...map.querySelectorAll("details[open] [data-i], details[open] [data-b]")];
  const next = marks[marks.indexOf(event.target.closest("[data-i], [data-b]")) + step];
  if (next) {
    event.preventDefault();
    next.focus();
    act(next);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "Escape") {
    if (hits.childElementCount) fill([]);
    else clear();
  }
});

// ---- search ----

const entries = [];
data.sites.forEach((site) => entries.push({ name: site.name, note: `station at ${ops[site.op].name}`, go: () => select(site.op, true) }));
ops.forEach((op) => entries.push({ name: op.name, note: op.state ? op.module : `${op.op} ${op.module}`, go: () => select(op.id, true) }));
const firstOf = new Map();
ops.forEach((op) => { if (op.module && !op.state && !firstOf.has(op.module)) firstOf.set(op.module, op.id); });
firstOf.forEach((id, module) => entries.push({ name: module, note: "module", go: () => select(id, true) }));
new Set(ops.flatMap((op) => op.kernels)).forEach((name) => entries.push({ name, note: "kernel", go: () => selectKernel(name) }));
entries.forEach((entry) => { entry.key = entry.name.toLowerCase(); });

let found = [], at = 0;

function fill(list) {
  found = list;
  at = 0;
  hits.replaceChildren(...list.map((entry, i) => {
    const item = make("li", [entry.name, make("small", entry.note)]);
    item.setAttribute("role", "option");
    item.id = `hit${i}`;
    item.onmousedown = (event) => { event.preventDefault(); go(i); };
    return item;
  }));
  search.setAttribute("aria-expanded", String(list.length > 0));
  mark();
}

function mark() {
  [...hits.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
  if (found.length) search.setAttribute("aria-activedescendant", `hit${at}`);
  else search.removeAttribute("aria-activedescendant");
  hits.children[at]?.scrollIntoView({ block: "nearest" });
}

function go(i) {
  const entry = found[i];
  if (!entry) return;
  fill([]);
  entry.go();
}

function matches(word) {
  const rank = (key) => (key === word ? 0 : key.startsWith(word) ? 1 : 2);
  return entries.filter((entry) => entry.key.includes(word)).sort((a, b) => rank(a.key) - rank(b.key)).slice(0, 40);
}

search.addEventListener("input", () => {
  const word = search.value.trim().toLowerCase();
  fill(word ? matches(word) : []);
});
search.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && found.length) {
    event.preventDefault();
    at = (at + step + found.length) % found.length;
    mark();
  } else if (event.key === "Enter") go(at);
});
search.addEventListener("blur", () => fill([]));

// ---- legend and layers ----

document.getElementById("legend").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-kind]");
  if (!button) return;
  const shown = button.getAttribute("aria-pressed") === "true";
  button.setAttribute("aria-pressed", String(!shown));
  map.classList.toggle(`hide-${button.dataset.kind}`, shown);
});
const setAll = (open) => map.querySelectorAll("details").forEach((each) => { each.open = open; });
document.getElementById("open").onclick = () => setAll(true);
document.getElementById("close").onclick = () => setAll(false);
