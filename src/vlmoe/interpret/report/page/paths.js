// From layer to layer: which expert's tokens go on to which, as a flow.

const COLUMNS = 6, LINKS = 160; // layers at a time, and links at most, in one drawing

function pathsView(main, run) {
  main.append(heading("Paths through the layers",
    "Each bar is an expert, as tall as the tokens it serves first; each band is the tokens that go from one expert to another. Point at a bar or move to it with Tab to follow it."));
  const kinds = Object.keys(run.paths || {}).filter((kind) => (run.paths[kind].links || []).length);
  if (!kinds.length) { main.append(note("There are no paths: this model has one layer with experts for each modality, or none of its tokens pass two.")); return; }
  const kind = kinds.includes(here.args[0]) ? here.args[0] : kinds[0];
  const { layers, links } = run.paths[kind];
  const last = Math.max(0, layers.length - COLUMNS);
  const first = Math.min(last, Math.max(0, Number.parseInt(here.args[1], 10) || 0));
  const shown = layers.slice(first, first + COLUMNS);
  const row = el("div", { class: "row" }, kinds.length > 1 && segments("Tokens", kinds.map((k) => [k, { vision: "patches", text: "text" }[k] || k]), kind, (k) => show("paths", k)));
  if (last > 0) {
    const move = (text, by, key) => el("a", { class: "button", "data-key": key, href: first + by < 0 || first + by > last ? null : address("paths", kind, first + by), "aria-disabled": first + by < 0 || first + by > last ? "true" : null }, text);
    row.append(move("◀ Earlier layer", -1, "paths-back"), el("strong", {}, `Layers ${siteOf(run, shown[0]).layer} to ${siteOf(run, shown.at(-1)).layer}`), move("Later layer ▶", 1, "paths-on"));
    keys.left = () => first > 0 && show("paths", kind, first - 1);
    keys.right = () => first < last && show("paths", kind, first + 1);
  }
  main.append(row, panel(flow(run, shown, links), el("p", { class: "readout", id: "flow-readout", "aria-live": "polite" }, "Nothing is pointed at.")),
    panel(el("h3", {}, "Paths taken more often than chance"), pathTable(run, shown, links)));
}

function flow(run, layers, links) {
  const between = links.filter((l) => layers.indexOf(l.to[0]) === layers.indexOf(l.from[0]) + 1 && layers.includes(l.from[0]));
  const nodes = flowNodes(run, layers, between);
  const width = Math.max(room(), 200 * (layers.length - 1)), height = nodes.height, bar = 18;
  const x = (column) => 46 + (column / Math.max(1, layers.length - 1)) * (width - 92 - bar);
  const used = new Map(); // where the next band leaves or enters a bar
  const take = (key, size) => { const at = used.get(key) || 0; used.set(key, at + size); return at; };
  const sorted = [...between].sort((a, b) => a.from[1] - b.from[1] || a.to[1] - b.to[1]);
  const limit = [...between].sort((a, b) => b.count - a.count)[LINKS]?.count ?? 0;
  const parts = sorted.map((link) => {
    const a = nodes.at(link.from), b = nodes.at(link.to), thick = link.count * nodes.scale;
    const y1 = a.y + take(`out${link.from}`, thick) + thick / 2, y2 = b.y + take(`in${link.to}`, thick) + thick / 2;
    if (link.count <= limit) return null;
    const x1 = x(a.column) + bar, x2 = x(b.column), middle = (x1 + x2) / 2;
    return { link, node: svg("path", { d: `M${x1},${y1.toFixed(1)}C${middle},${y1.toFixed(1)} ${middle},${y2.toFixed(1)} ${x2},${y2.toFixed(1)}`, stroke: colourOf(link.from[1]), "stroke-width": Math.max(1, thick).toFixed(1), "data-tip": linkWords(run, link, nodes.total) }) };
  }).filter(Boolean);
  const boxes = nodes.list.map((n) => {
    const what = `${capital(expertName(run, n.site, n.expert))}: serves ${plural(n.count, "token")} first (${percent(n.count / nodes.total)})`;
    return { n, node: svg("a", { class: "node", href: address("expert", n.site, n.expert), "aria-label": what, "data-tip": what },
      svg("rect", { x: x(n.column), y: n.y, width: bar, height: Math.max(1, n.height), fill: colourOf(n.expert), stroke: "var(--ink)", "stroke-opacity": 0.35 }),
      (n.height > 9 || nodes.space > 6) && svg("text", { x: n.column === layers.length - 1 ? x(n.column) + bar + 5 : x(n.column) - 5, y: n.y + n.height / 2 + 4, "text-anchor": n.column === layers.length - 1 ? "start" : "end" }, String(n.expert))) };
  });
  const picture = svg("svg", { class: "flow", viewBox: `0 0 ${width} ${height}`, width, height, style: "max-width: none", role: "group", "aria-label": "Flow of tokens between experts of successive layers" },
    layers.map((site, i) => svg("text", { class: "quiet-text", x: x(i) + bar / 2, y: 14, "text-anchor": i === 0 ? "start" : i === layers.length - 1 ? "end" : "middle" }, siteName(siteOf(run, site)))),
    parts.map((p) => p.node), boxes.map((b) => b.node));
  follow(run, picture, parts, boxes, nodes.total);
  return el("div", {}, scroll(roving(picture, "a")), limit > 0 && el("p", { class: "small quiet" }, `The ${parts.length} strongest of ${count(between.length)} bands are drawn.`));
}

// Places of the bars: {list, at(end), scale (pixels a token), total (tokens of the widest layer), height}.
function flowNodes(run, layers, links) {
  const counts = new Map();
  for (const side of ["from", "to"]) {
    const sums = new Map();
    for (const link of links) sums.set(String(link[side]), (sums.get(String(link[side])) || 0) + link.count);
    for (const [key, n] of sums) counts.set(key, Math.max(counts.get(key) || 0, n));
  }
  const widest = Math.max(...layers.map((site) => siteOf(run, site).experts));
  const total = Math.max(...layers.map((site) => [...counts].reduce((sum, [key, n]) => sum + (key.startsWith(`${site},`) ? n : 0), 0)), 1);
  const space = widest > 24 ? 2 : 9, scale = (widest > 24 ? 560 : 340) / total;
  const list = [];
  layers.forEach((site, column) => {
    let y = 26;
    for (let expert = 0; expert < siteOf(run, site).experts; expert++) {
      const n = counts.get(`${site},${expert}`) || 0;
      if (!n) continue;
      list.push({ site, expert, column, y, height: n * scale, count: n });
      y += n * scale + space;
    }
  });
  const byKey = new Map(list.map((n) => [`${n.site},${n.expert}`, n]));
  const height = Math.max(...list.map((n) => n.y + n.height)) + 10;
  return { list, space, at: (end) => byKey.get(String(end)), scale, total, height };
}

const linkWords = (run, link, total) => `${capital(expertName(run, ...link.from))} → ${expertName(run, ...link.to)}: ${plural(link.count, "token")}, ${percent(link.count / total)} of those shown, ${times(link.lift)} as many as if the layers chose independently`;

// Pointing at a bar or a band shows what belongs to it and fades the rest.
function follow(run, picture, parts, boxes, total) {
  const same = (a, site, expert) => a[0] === site && a[1] === expert;
  const say = (text) => { document.getElementById("flow-readout").textContent = text; };
  const hold = (on) => {
    picture.classList.toggle("held", on.size > 0);
    for (const { node } of [...parts, ...boxes]) node.classList.toggle("on", on.has(node));
  };
  const free = () => hold(new Set());
  for (const { link, node } of parts) {
    node.addEventListener("pointerenter", () => {
      hold(new Set([node, ...boxes.filter(({ n }) => same(link.from, n.site, n.expert) || same(link.to, n.site, n.expert)).map((b) => b.node)]));
      say(linkWords(run, link, total));
    });
    node.addEventListener("pointerleave", free);
  }
  for (const { n, node } of boxes) {
    const enter = () => {
      const mine = parts.filter(({ link }) => same(link.from, n.site, n.expert) || same(link.to, n.site, n.expert));
      const ends = mine.flatMap(({ link }) => [link.from, link.to]);
      hold(new Set([node, ...mine.map((p) => p.node), ...boxes.filter((b) => ends.some((end) => same(end, b.n.site, b.n.expert))).map((b) => b.node)]));
      say(node.dataset.tip);
    };
    node.addEventListener("pointerenter", enter);
    node.addEventListener("focus", enter);
    node.addEventListener("pointerleave", free);
    node.addEventListener("blur", free);
  }
}

function pathTable(run, layers, links) {
  const rows = links.filter((l) => layers.includes(l.from[0]) && layers.includes(l.to[0]) && l.lift > 1)
    .sort((a, b) => b.count * Math.log2(b.lift) - a.count * Math.log2(a.lift)).slice(0, 10);
  if (!rows.length) return el("p", { class: "quiet" }, "None.");
  return dataTable(["From", "To", right("Tokens"), right("Lift", "How many times as many as if the layers chose independently")],
    rows.map((l) => [expertLink(run, ...l.from), expertLink(run, ...l.to), right(count(l.count)), right(times(l.lift))]), "Strong paths");
}
