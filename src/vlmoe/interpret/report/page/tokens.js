// A sample's tokens at one layer: an image with its patches over it, a text with its words, each by expert.

const look = { rank: 0, cover: 0.55 }; // which choice is coloured (0: the first), how strongly it covers the image

const layersOf = (run) => [...new Set(run.sites.map((site) => site.layer))].sort((a, b) => a - b);
const siteAt = (run, layer, modality) =>
  run.sites.find((site) => site.layer === layer && (site.modality === modality || site.modality === ""));

// What a layer's router decided for the sample's tokens: {site, routes, gates, whole}, or null where none decides.
// whole: [{route, gate}] of tokens that stand before the patches: for the whole image, or marks around it.
function decisions(run, sample, layer, modality) {
  const site = siteAt(run, layer, modality);
  let routes = site && sample.routes[site.name]?.[modality];
  if (!routes || !routes.length) return null;
  let gates = sample.gates?.[site.name]?.[modality] || [];
  const extra = modality === "vision" && sample.grid ? Math.max(0, routes.length - sample.grid[0] * sample.grid[1]) : 0;
  const whole = routes.slice(0, extra).map((route, i) => ({ route, gate: gates[i] }));
  routes = routes.slice(extra);
  gates = gates.slice(extra);
  return { site, routes, gates, whole };
}
const hiddenIn = (sample, modality) => new Set(modality === "vision" ? sample.hidden_patches || [] : sample.hidden || []);

function routeInWords(route, gate) {
  if (!route || !route.length) return "no expert (dropped, or not routed)";
  const rest = route.slice(1).map((e) => `expert ${e}`).join(", ");
  return `expert ${route[0]}${known(gate) ? ` with gate ${number(gate)}` : ""}${rest ? `, then ${rest}` : ""}`;
}

// pick(what, route, site): called when a patch is chosen.
function patchMap(run, sample, layer, pick) {
  const [rows, columns] = sample.grid;
  const found = decisions(run, sample, layer, "vision");
  const hidden = hiddenIn(sample, "vision");
  const map = el("div", {
    class: `map${columns > 14 ? " fine" : ""}`, role: "group", "aria-label": `Patches of the image, ${rows} rows of ${columns}`,
    vars: { "--shape": `${columns} / ${rows}`, "--cover": look.cover },
    style: `grid-template: repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`,
  }, el("img", { src: sample.image, alt: `Sample ${sample.key}` }));
  if (!found) return map;
  for (let p = 0; p < rows * columns; p++) {
    const route = found.routes[p] || [], expert = route[look.rank];
    const place = `Patch in row ${Math.floor(p / columns) + 1}, column ${(p % columns) + 1}`;
    map.append(tokenButton("patch", expert, hidden.has(p), place, route, found.gates[p], found.site, pick,
      `patch-${p}`, expert === undefined ? null : el("b", {}, String(expert))));
  }
  return roving(map, "button", columns);
}

const SPACE = /^[ \u2581\u0120]/;

function tokenRow(run, sample, layer, pick) {
  const found = decisions(run, sample, layer, "text");
  const hidden = hiddenIn(sample, "text");
  const row = el("div", { class: "tokens", role: "group", "aria-label": "Text, token by token" });
  const spaced = sample.tokens.some((text) => SPACE.test(text)); // this tokenizer keeps the space before a word
  sample.tokens.forEach((text, position) => {
    const route = found?.routes[position] || [], expert = route[look.rank];
    const glued = text.startsWith("##") || (spaced && position > 0 && !SPACE.test(text));
    const shown = text.replace(/^##/, "").replace(/[\u2581\u0120]/g, " ").replace(/[\n\u010a]/g, "\u23ce");
    const button = tokenButton("token", expert, hidden.has(position), `“${shown.trim() || shown}”`, route, found?.gates[position],
      found?.site, pick, `token-${position}`, [shown.trim() || "\u2423", expert !== undefined && el("b", {}, String(expert))]);
    if (glued) button.classList.add("glued");
    row.append(button, glued ? "" : " ");
  });
  return sample.tokens.length ? roving(row, "button") : row;
}

function tokenButton(kind, expert, hidden, name, route, gate, site, pick, key, content) {
  const what = `${name}${hidden ? " (hidden from the model)" : ""}: ${routeInWords(route, gate)}`;
  const none = expert === undefined;
  return el("button", {
    type: "button", class: [kind, none ? "none" : patternOf(expert), hidden && "covered"].filter(Boolean).join(" "),
    vars: none ? {} : coloursOf(expert), "data-tip": what, "aria-label": what, "data-key": key,
    on: { click: (event) => pick?.(event.currentTarget, what, route, site) },
  }, content);
}

// The experts that serve the sample here, most tokens first, with the number of tokens of each.
function legendOf(run, found, what) {
  const counts = new Map();
  for (const route of found.routes) {
    if (route[look.rank] !== undefined) counts.set(route[look.rank], (counts.get(route[look.rank]) || 0) + 1);
  }
  const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  return el("ul", { class: "legend", "aria-label": "Experts in this sample" }, order.map(([expert, n]) => el("li", {},
    el("a", { href: address("expert", found.site.name, expert) }, chip(expert), el("span", {}, `expert ${expert}: ${plural(n, what, what === "patch" ? "patches" : undefined)}`)))));
}

// A small image of the colours alone, for stepping through many layers.
function smallMap(run, sample, layer) {
  const found = decisions(run, sample, layer, "vision");
  if (!found) return null;
  const [rows, columns] = sample.grid;
  const grid = Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => {
    const expert = found.routes[r * columns + c]?.[look.rank];
    return expert === undefined ? null : colourOf(expert);
  }));
  return pixels(grid, `Experts by patch at layer ${layer}`);
}

// ---------------------------------------------------------------------------------------------------------- crops
const images = new Map(); // source -> promise of the loaded image
function loaded(source) {
  if (!images.has(source)) {
    images.set(source, new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = reject;
      image.src = source;
    }));
  }
  return images.get(source);
}
// A patch with half a patch of what is around it; the patch itself is framed. Position -1: the whole image.
function crop(sample, position) {
  const canvas = el("canvas", { width: 96, height: 96, "aria-hidden": "true" });
  loaded(sample.image).then((image) => {
    const pen = canvas.getContext("2d");
    const [rows, columns] = sample.grid;
    const w = image.naturalWidth / columns, h = image.naturalHeight / rows;
    pen.imageSmoothingEnabled = w > 48;
    if (position < 0) { pen.drawImage(image, 0, 0, 96, 96); return; }
    const x = (position % columns) * w, y = Math.floor(position / columns) * h;
    pen.drawImage(image, x - w / 2, y - h / 2, 2 * w, 2 * h, 0, 0, 96, 96);
    pen.fillStyle = "rgb(128 128 128 / 45%)";
    for (const box of [[0, 0, 96, 24], [0, 72, 96, 24], [0, 24, 24, 48], [72, 24, 24, 48]]) pen.fillRect(...box);
    pen.strokeStyle = "#fff";
    pen.lineWidth = 2;
    pen.strokeRect(24, 24, 48, 48);
  }).catch(() => {});
  return canvas;
}
