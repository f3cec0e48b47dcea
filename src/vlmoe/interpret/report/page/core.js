"use strict";
// Elements, numbers in words, the address of what is shown, names and colours of experts.
// Texts of the data become text nodes, never markup.

// ---------------------------------------------------------------------------------------------------------- elements
function el(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}
function svg(tag, attributes = {}, ...children) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}
// Attributes: "on" holds listeners, "vars" CSS variables; null and false leave an attribute out.
function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name !== "vars") node.setAttribute(name, value === true ? "" : value);
  }
  for (const [key, v] of Object.entries(attributes.vars || {})) node.style.setProperty(key, v);
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}
const panel = (...children) => el("section", { class: "panel" }, ...children);
const note = (text) => el("p", { class: "note" }, text);
const scroll = (...children) => el("div", { class: "scroll" }, ...children);

// ----------------------------------------------------------------------------------------------------------- numbers
const known = (x) => typeof x === "number" && Number.isFinite(x);
const UNKNOWN = "not known";
const minus = (text) => text.replace("-", "\u2212");
const count = (x) => (known(x) ? x.toLocaleString("en") : UNKNOWN);
const plural = (n, one, more = one + "s") => `${count(n)} ${n === 1 ? one : more}`;
const percent = (x) => (known(x) ? minus(`${(100 * x).toFixed(x === 0 || Math.abs(x) >= 0.1 ? 0 : 1)}%`) : UNKNOWN);
const number = (x, digits = 3) => (known(x) ? minus(String(Number(x.toPrecision(digits)))) : UNKNOWN);
const times = (x) => (known(x) ? `${x.toFixed(x < 10 ? 1 : 0)}×` : UNKNOWN);
const signed = (x) => (known(x) ? (x > 0 ? "+" : "") + number(x) : UNKNOWN);
// A change and its interval, all with the decimals that show three digits of the largest of them.
function decimals(row) {
  const most = Math.max(...[row.delta, row.low, row.high].filter(known).map(Math.abs), 0);
  return most > 0 ? Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(most)))) : 2;
}
const fixed = (x, digits) => (known(x) ? (x >= 0 ? "+" : "") + minus(x.toFixed(digits)) : UNKNOWN);
const delta = (row) => fixed(row.delta, decimals(row));
const interval = (row) => (known(row.low) ? `[${fixed(row.low, decimals(row))}, ${fixed(row.high, decimals(row))}]` : "");
const change = (row) => `${delta(row)} nats ${interval(row)}`;
const plain = (name) => String(name).replaceAll("_", " ");
const valueName = (row) => `${plain(row.factor)} “${row.value}”`;

// ------------------------------------------------------------------------------------------------------------ the data
const report = { runs: [], drift: null, compared: [] };

async function readData() {
  const node = document.getElementById("data");
  if (node.dataset.encoding !== "gzip") return JSON.parse(node.textContent);
  if (!("DecompressionStream" in window)) throw new Error("This browser is too old to unpack the report's data.");
  const bytes = Uint8Array.from(atob(node.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// --------------------------------------------------------------------------------------------------------- the address
// #view/argument/argument, in a comparison #b/view/… for the second run.
const here = { run: 0, view: "overview", args: [] };

function readAddress() {
  const parts = location.hash.slice(1).split("/").filter(Boolean).map((part) => {
    try { return decodeURIComponent(part); } catch { return part; }
  });
  here.run = parts[0] === "b" && report.runs.length > 1 ? 1 : 0;
  if (parts[0] === "b") parts.shift();
  here.view = parts[0] || "overview";
  here.args = parts.slice(1);
}
function address(view, ...args) {
  const parts = [view, ...args].map((part) => encodeURIComponent(part));
  return "#" + (here.run === 1 ? "b/" : "") + parts.join("/");
}
// A step within a view changes the address without a new entry in the browser's history.
function stepTo(view, ...args) {
  here.args = args.map(String);
  history.replaceState(null, "", address(view, ...args));
}
const theRun = () => report.runs[here.run];
const siteOf = (run, name) => run.sites.find((site) => site.name === name);
const siteName = (site) => `layer ${site.layer}${site.modality ? " · " + site.modality : ""}`;
const expertName = (run, site, expert) => `${siteName(siteOf(run, site))}, expert ${expert}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const expertLink = (run, site, expert, text = expertName(run, site, expert)) =>
  el("a", { href: address("expert", site, expert) }, text);
// The run's sites in groups by modality, each in order of layers.
function groups(run) {
  const found = new Map();
  for (const site of run.sites) found.set(site.modality, [...(found.get(site.modality) || []), site]);
  for (const sites of found.values()) sites.sort((a, b) => a.layer - b.layer);
  return found;
}

// ------------------------------------------------------------------------------------------------------------- colours
const dark = matchMedia("(prefers-color-scheme: dark)");
// Okabe and Ito's colours that differ for the colour-blind, and what is legible on them.
const EIGHT = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#A6A6A6"];
const LEGIBLE = ["#000", "#000", "#000", "#000", "#fff", "#000", "#000", "#000"];
const colourOf = (expert) => EIGHT[expert % 8];
const patternOf = (expert) => `p${Math.floor(expert / 8) % 8}`;
const coloursOf = (expert) => ({ "--c": colourOf(expert), "--on": LEGIBLE[expert % 8] });
const chip = (expert) =>
  el("span", { class: `chip ${patternOf(expert)}`, vars: coloursOf(expert), "aria-hidden": "true" }, el("b", {}, String(expert)));

// Heat from 0 to 1: lightness is linear in t (perceptually even), the hue runs from yellow to blue.
function heat(t) {
  const at = Math.min(1, Math.max(0, known(t) ? t : 0));
  return dark.matches
    ? `oklch(${0.27 + 0.65 * at} ${0.035 + 0.1 * at} ${265 - 165 * at})`
    : `oklch(${0.965 - 0.6 * at} ${0.02 + 0.11 * at} ${100 + 165 * at})`;
}
const onHeat = (t) => ((t > 0.58) === dark.matches ? "#141821" : "#ffffff");

// A legend of heat: ticks is [[text, t from 0 to 1], …] from left to right.
function ramp(ticks, about) {
  const stops = Array.from({ length: 11 }, (_, i) => heat(i / 10)).join(", ");
  const place = (t) => (t === 0 ? "left: 0" : t === 1 ? "right: 0" : `left: ${100 * t}%; transform: translateX(-50%)`);
  return el("div", { class: "ramp" }, el("span", {}, about), el("i", { style: `background: linear-gradient(to right, ${stops})` }),
    el("div", {}, ticks.map(([text, t]) => el("span", { style: place(t) }, text))));
}

// Pixels there are for a drawing in a panel, when panels stand in so many columns.
function room(columns = 1) {
  const main = document.getElementById("main"), rem = Number.parseFloat(getComputedStyle(document.documentElement).fontSize);
  const inside = main.clientWidth - 2.5 * rem;
  const each = columns > 1 && inside > 54 * rem ? (inside - 1.25 * rem) / 2 : inside;
  return Math.max(260, Math.round(each - 2.6 * rem));
}

// ------------------------------------------------------------------------------------------------------------ keyboard
// One tab stop for a group of links or buttons; arrow keys move within it. columns: a number (a grid) or 1 (a list).
function roving(box, selector, columns = 1) {
  const items = () => [...box.querySelectorAll(selector)];
  const enter = (item) => {
    for (const other of items()) other.tabIndex = other === item ? 0 : -1;
  };
  const list = items();
  enter(list.find((item) => item.hasAttribute("aria-current") || item.getAttribute("aria-checked") === "true") || list[0]);
  box.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (item) enter(item);
  });
  box.addEventListener("keydown", (event) => {
    const all = items(), at = all.indexOf(event.target.closest(selector));
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : at + move;
    if (at < 0 || Number.isNaN(to) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (all[to]) all[to].focus();
  });
  return box;
}
// A choice of one of several: options is [[value, text], …].
function segments(label, options, value, choose) {
  const box = el("div", { class: "segments", role: "radiogroup", "aria-label": label },
    options.map(([key, text]) => el("button", {
      type: "button", role: "radio", "aria-checked": String(key === value), "data-key": `${label}-${key}`,
      on: { click: () => choose(key) },
    }, text)));
  return roving(box, "button");
}
// The choice of a layer's router among the run's, as a list to open.
function sitePicker(run, value, choose, sites = run.sites) {
  const id = "site-picker";
  return el("span", { class: "nowrap" }, el("label", { for: id }, "Router "),
    el("select", { id, "data-key": id, on: { change: (event) => choose(event.target.value) } },
      sites.map((site) => el("option", { value: site.name, selected: site.name === value }, siteName(site)))));
}

// ------------------------------------------------------------------------------------------------------------- the tip
// Elements with data-tip show it while the pointer or the focus is on them.
function tips() {
  const box = document.getElementById("tip");
  const show = (target) => {
    box.textContent = target.dataset.tip;
    box.hidden = false;
    const at = target.getBoundingClientRect(), size = box.getBoundingClientRect();
    const left = Math.min(innerWidth - size.width - 8, Math.max(8, at.left + at.width / 2 - size.width / 2));
    const above = at.top - size.height - 8;
    box.style.left = `${left}px`;
    box.style.top = `${above > 4 ? above : Math.min(at.bottom + 8, innerHeight - size.height - 4)}px`;
  };
  const hide = () => { box.hidden = true; };
  const over = (event) => {
    const target = event.target.closest?.("[data-tip]");
    if (target) show(target); else hide();
  };
  document.addEventListener("pointerover", over);
  document.addEventListener("focusin", over);
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}
