"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};
const bytes = (n) => {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(n) < 1000) return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(1)} TB`;
};
const table = (head, rows, onClick) => {
  const numeric = head.map((_, i) => rows.length > 0 && rows.every((row) => typeof row[i] === "number"));
  const cell = (tag, value, i) => make(tag, { className: numeric[i] ? "number" : "" }, typeof value === "number" ? value.toLocaleString("en") : value);
  const body = rows.map((row, r) => {
    const line = make("tr", {}, ...row.map((value, i) => cell("td", value, i)));
    if (onClick) {
      Object.assign(line, { className: "link", tabIndex: 0, onclick: () => onClick(r) });
      line.onkeydown = (event) => { if (event.key === "Enter") onClick(r); };
    }
    return line;
  });
  return make("table", {}, make("thead", {}, make("tr", {}, ...head.map((h, i) => cell("th", h, i)))), make("tbody", {}, ...body));
};

// ------------------------------------------------------------ summary, passes, precision

const found = data.inspection;
for (const [label, value] of data.cards) $("cards").append(make("div", { className: "card" }, make("b", {}, value), make("span", {}, label)));
$("regions").append(table(["region", "captured", "compiled", "of these inserted"], found.regions.map((r) => [r.phase, r.captured, r.compiled, r.inserted])));
const names = (title, entries, none) => $("names").append(
  Object.keys(entries).length ? table([title, "why"], Object.entries(entries)) : make("p", { className: "hint" }, none));
names("no gradient", found.no_gradient, "Every trainable parameter gets a gradient.");
names("gradient escapes", found.escaping, "No gradient leaves the step.");
$("pass-table").append(table(["pass", "inserted", "removed", "seconds", "what it does", "declined"],
  found.passes.map((p) => [p.name, p.inserted, p.removed, p.seconds, data.summaries[p.name] || "", p.declined.join("; ")]),
  (row) => { filters.pass.value = found.passes[row].name; show(); $("graph").scrollIntoView(); }));
$("colours").append(table(["rule", "dtype", "operations"], found.precision.map((p) => [p.colour, p.dtype, p.count])));
$("float32").append(table(["in float32", "operations", "why"], found.float32.map((f) => [f.op, f.count, f.reason])));

// ------------------------------------------------------------ graph

const nodes = data.nodes;
const index = new Map(nodes.flatMap((node, i) => [[node.name, i], [node.node, i]]));
const lines = nodes.map((node, i) => {
  const [text, note] = node.line.split("  # ");
  const line = make("div", { className: node.made_by ? "inserted" : "", onclick: () => choose(i) }, text);
  if (note) line.append(make("span", { className: "note" }, `  # ${note}`));
  return line;
});
$("lines").append(...lines);
const filters = { pass: $("filter-pass"), phase: $("filter-phase"), dtype: $("filter-dtype") };
const options = (select, all, values) => select.append(...[["", all], ...values.map((v) => [v, v])].map(([value, text]) => make("option", { value }, text)));
const present = (key) => [...new Set(nodes.map((node) => node[key]).filter(Boolean))];
options(filters.pass, "all nodes", ["any pass", ...present("made_by")]);
options(filters.phase, "all phases", present("phase"));
options(filters.dtype, "all dtypes", present("dtype"));

const pattern = (input) => {
  input.classList.remove("wrong");
  try { return new RegExp(input.value, "i"); } catch { input.classList.add("wrong"); return /(?:)/; }
};
function show() {
  const wanted = pattern($("search"));
  let count = 0;
  nodes.forEach((node, i) => {
    const byPass = !filters.pass.value || (filters.pass.value === "any pass" ? node.made_by !== "" : node.made_by === filters.pass.value);
    const visible = byPass && (!filters.phase.value || node.phase === filters.phase.value)
      && (!filters.dtype.value || node.dtype === filters.dtype.value) && wanted.test(node.line);
    lines[i].hidden = !visible;
    count += Number(visible);
  });
  $("count").textContent = `${count} of ${nodes.length}`;
}
$("search").addEventListener("input", show);
for (const select of Object.values(filters)) select.addEventListener("change", show);
show();

let chosen = -1;
function choose(i) {
  if (chosen >= 0) lines[chosen].classList.remove("chosen");
  chosen = i;
  const node = nodes[i];
  lines[i].classList.add("chosen");
  const link = (name) => make("a", { onclick: () => jump(name) }, name);
  const list = make("dl");
  const add = (term, ...value) => { if (value.length && value[0] !== "") list.append(make("dt", {}, term), make("dd", {}, ...value)); };
  add("node", make("code", {}, node.line.split("  # ")[0]));
  add("made by", node.explained.made_by + (node.reason ? `: ${node.reason}` : ""));
  add("phase", node.phase);
  add("dtype", node.explained.why_dtype);
  add("module", node.module);
  add("where", node.where);
  add("reads", ...node.inputs.map(link));
  add("read by", ...nodes.filter((other) => other.inputs.includes(node.name)).map((other) => link(other.name)));
  $("detail").replaceChildren(list);
}
function jump(name) {
  const i = index.get(name);
  if (i === undefined) return;
  if (lines[i].hidden) {
    $("search").value = "";
    for (const select of Object.values(filters)) select.value = "";
    show();
  }
  choose(i);
  $("graph").scrollIntoView();
  $("lines").scrollTop = lines[i].offsetTop - $("lines").offsetTop - $("lines").clientHeight / 2;
}

// ------------------------------------------------------------ diff

options($("diff-point"), "all passes", data.diffs.map((d) => d.point));
function showDiff() {
  const point = $("diff-point").value;
  const diff = point ? data.diffs.find((d) => d.point === point) : data.whole;
  const wanted = pattern($("diff-search"));
  const kept = diff.changes.filter(([, text]) => wanted.test(text));
  $("changes").replaceChildren(...kept.map(([kind, text]) => make("div", { className: kind === "+" ? "plus" : "minus" }, `${kind} ${text}`)));
  $("diff-count").textContent = `${kept.filter(([k]) => k === "+").length} added, ${kept.filter(([k]) => k === "-").length} removed`;
}
$("diff-point").addEventListener("change", showDiff);
$("diff-search").addEventListener("input", showDiff);
showDiff();

// ------------------------------------------------------------ memory

const memory = data.memory;
const short = (name) => (name.length > 60 ? `${name.slice(0, 57)}...` : name);  // a fused kernel names all it does
function layout(extra) {
  const style = getComputedStyle(document.body);
  const line = getComputedStyle($("memory")).borderTopColor, dim = getComputedStyle($("memory-hint")).color;
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style.color, size: 12 }, hovermode: "closest",
    margin: { l: 80, r: 20, t: 64, b: 40 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: dim, activecolor: style.color }, ...extra,
    xaxis: { gridcolor: line, zeroline: false, ...extra.xaxis }, yaxis: { gridcolor: line, zeroline: false, ...extra.yaxis } };
}
function draw() {
  const config = { responsive: true, displaylogo: false, scrollZoom: true, displayModeBar: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const x = memory.moments.map((_, i) => i);
  const areas = memory.roles.map((role, r) => ({
    type: "scatter", mode: "lines", name: role.name, stackgroup: "all", x, y: role.bytes, line: { width: 0, shape: "hv" },
    fillcolor: role.colour,
    customdata: memory.moments.map((m, i) => [short(m.name), m.phase, bytes(role.bytes[i]), bytes(memory.totals[i])]),
    hovertemplate: "%{customdata[0]} (%{customdata[1]})<br>" + role.name + " %{customdata[2]} of %{customdata[3]}<extra></extra>",
  }));
  const peak = { type: "line", x0: memory.peak.index, x1: memory.peak.index, y0: 0, y1: 1, yref: "paper", line: { dash: "dot", width: 1.5 } };
  const title = { text: `peak ${bytes(memory.peak.bytes)} in ${memory.peak.phase}`, font: { size: 13 }, x: 0.01, y: 0.99 };
  Plotly.react("timeline", areas, layout({ shapes: [peak], title, xaxis: { title: { text: "moment" }, range: [0, x.length] }, yaxis: { title: { text: "bytes alive" }, tickformat: "~s", ticksuffix: "B" } }), config);

  const roles = memory.roles.map((role) => role.name);
  const bars = roles.map((role, r) => {
    const own = memory.tensors.map((t, row) => [t, row]).filter(([t]) => t.role === role);
    return { type: "bar", orientation: "h", name: role, y: own.map(([, row]) => row), base: own.map(([t]) => Math.max(t.birth, 0)),
      x: own.map(([t]) => Math.min(t.death, x.length) - Math.max(t.birth, 0) + 1), marker: { color: memory.roles[r].colour },
      customdata: own.map(([t]) => [t.name, `${t.dtype}[${t.shape}]`, bytes(t.bytes), t.where || "no line of yours", t.node]),
      hovertemplate: "%{customdata[0]}<br>%{customdata[1]}, %{customdata[2]}<br>%{customdata[3]}<extra>" + role + "</extra>" };
  });
  Plotly.react("lifetimes", bars, layout({ barmode: "overlay", bargap: 0.15, showlegend: false,
    title: { text: "lifetimes of the tensors that take most (bytes times life): click one for its node", font: { size: 13 }, x: 0.01, y: 0.99 },
    xaxis: { title: { text: "moment" }, range: [0, x.length] },
    yaxis: { autorange: "reversed", showticklabels: false, title: { text: "in order of birth" }, showgrid: false } }), config);
}
if (memory) {
  $("memory-hint").textContent = memory.note;
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const other = { timeline: "lifetimes", lifetimes: "timeline" };
  for (const id of Object.keys(other)) {
    $(id).on("plotly_relayout", (event) => {
      const range = event["xaxis.range[0]"] !== undefined ? [event["xaxis.range[0]"], event["xaxis.range[1]"]] : null;
      const target = $(other[id]).layout.xaxis;
      if (range && (target.range[0] !== range[0] || target.range[1] !== range[1])) Plotly.relayout(other[id], { "xaxis.range": range });
      if (event["xaxis.autorange"] && !target.autorange) Plotly.relayout(other[id], { "xaxis.autorange": true });
    });
  }
  $("lifetimes").on("plotly_click", (event) => jump(event.points[0].customdata[4]));
  $("timeline").on("plotly_click", (event) => jump(memory.moments[event.points[0].pointNumber].node));
  $("peak").append(table(["alive at the peak", "role", "type", "size", "your line"],
    memory.live.map((t) => [t.name, t.role, `${t.dtype}[${t.shape}]`, bytes(t.bytes), t.where]), (row) => jump(memory.live[row].node)));
} else {
  $("memory").hidden = true;
}
document.documentElement.dataset.ready = "yes";
