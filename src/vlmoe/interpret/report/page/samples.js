// The samples browser: pick a sample, step through its layers.

function samplesView(main, run) {
  main.append(heading("Samples, layer by layer",
    "Every patch and every word, coloured and numbered by the expert that serves it."));
  if (!run.samples.length) { main.append(note("This report holds no samples.")); return; }
  const layers = layersOf(run);
  const state = {
    sample: Math.min(run.samples.length - 1, Math.max(0, Number.parseInt(here.args[0], 10) || 0)),
    layer: layers.includes(Number(here.args[1])) && here.args[1] !== undefined ? Number(here.args[1]) : null,
  };
  if (state.layer === null) state.layer = layers.find((layer) => routed(run, run.samples[state.sample], layer)) ?? layers[0];
  const picker = samplePicker(run, state, (index) => { state.sample = index; draw(); });
  const stage = el("div", { id: "stage" });
  const draw = () => keepFocus(() => {
    stepTo("samples", state.sample, state.layer);
    for (const [i, button] of [...picker.children].entries()) button.setAttribute("aria-pressed", String(i === state.sample));
    stage.replaceChildren(...stageParts(run, state, layers, draw));
  });
  main.append(picker, stage);
  draw();
  picker.children[state.sample].scrollIntoView?.({ block: "nearest", inline: "center" });
  keys.left = () => stepLayer(state, layers, -1, draw);
  keys.right = () => stepLayer(state, layers, 1, draw);
}
const routed = (run, sample, layer) => decisions(run, sample, layer, "vision") || decisions(run, sample, layer, "text");

function stepLayer(state, layers, by, draw) {
  const to = layers[layers.indexOf(state.layer) + by];
  if (to === undefined) return;
  state.layer = to;
  draw();
}

function samplePicker(run, state, choose) {
  const box = el("div", { class: "picker", role: "group", "aria-label": "Samples" }, run.samples.map((sample, i) =>
    el("button", { type: "button", "aria-pressed": String(i === state.sample), "aria-label": `Sample ${i + 1}: ${sampleKind(sample)}, ${textOf(sample, 8)}`,
      on: { click: () => choose(i) } },
    sample.image ? el("img", { src: sample.image, alt: "", loading: "lazy" }) : el("span", { class: "words", "aria-hidden": "true" }, textOf(sample, 14)),
    el("span", {}, `${i + 1} · ${sampleKind(sample)}`))));
  return roving(box, "button");
}
// The beginning of a sample's text, put together again.
function textOf(sample, most) {
  const tokens = (sample.tokens || []).slice(0, most);
  if (tokens.some((token) => SPACE.test(token))) return tokens.join("").replace(/[\u2581\u0120]/g, " ").trim();
  return tokens.join(" ").replaceAll(" ##", "");
}
const wordOf = (token) => token.replace(/^##|[\u2581\u0120]/g, "");
const sampleKind = (sample) => (sample.image && sample.tokens ? "image + text" : sample.image ? "image" : "text");

function stageParts(run, state, layers, draw) {
  const sample = run.samples[state.sample];
  const readout = el("p", { class: "readout", "aria-live": "polite" }, "Point at a patch or a word, or move to it with Tab and the arrow keys. Choose it to keep it here.");
  const pick = (button, what, route, site) => {
    for (const other of document.querySelectorAll(".picked")) other.classList.remove("picked");
    button.classList.add("picked");
    readout.replaceChildren(what, ". ", ...(route || []).flatMap((e, i) => [i ? ", " : "", expertLink(run, site.name, e, `Open expert ${e}`)]));
  };
  const image = sample.image && sample.grid ? imagePart(run, sample, state, pick) : null;
  const text = sample.tokens ? textPart(run, sample, state, pick) : null;
  const strip = image && layers.length > 1 ? layerStrip(run, sample, state, layers, draw) : null;
  return [
    el("div", { class: "panel" },
      el("div", { class: "row spread" }, stepper(state, layers, draw), options(run, draw)),
      el("div", { class: image ? "stage" : "stage alone" }, image, el("div", {}, text, readout, strip))),
    el("p", { class: "small quiet" }, `Sample ${state.sample + 1} of ${run.samples.length}, `, el("code", {}, sample.key), ". Keys: ",
      el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " step through the layers; within patches, words and samples the arrow keys move there."),
  ];
}

function stepper(state, layers, draw) {
  const at = layers.indexOf(state.layer);
  const button = (text, by, key) => el("button", { type: "button", "data-key": key, disabled: layers[at + by] === undefined,
    on: { click: () => stepLayer(state, layers, by, draw) } }, text);
  return el("div", { class: "row", style: "margin: 0" },
    button("◀ Previous layer", -1, "layer-back"),
    el("strong", { class: "first", id: "layer-now", "aria-live": "polite" }, `Layer ${state.layer} `, el("span", { class: "quiet small" }, `(${at + 1} of ${layers.length} with experts)`)),
    button("Next layer ▶", 1, "layer-on"),
    layers.length > 2 && el("input", { type: "range", min: 0, max: layers.length - 1, value: at, "aria-label": "Layer", "data-key": "layer-range",
      on: { input: (event) => { state.layer = layers[Number(event.target.value)]; draw(); } } }));
}

function options(run, draw) {
  const most = Math.max(...run.sites.map((site) => site.k));
  const rank = most > 1 && el("span", { class: "nowrap" }, el("label", { for: "rank" }, "Colour by "),
    el("select", { id: "rank", "data-key": "rank", on: { change: (event) => { look.rank = Number(event.target.value); draw(); } } },
      Array.from({ length: most }, (_, i) => el("option", { value: i, selected: i === look.rank }, `choice ${i + 1}`))));
  const cover = el("span", { class: "nowrap" }, el("label", { for: "cover" }, "Strength "),
    el("input", { type: "range", id: "cover", min: 0, max: 1, step: 0.05, value: look.cover, style: "min-width: 5rem; width: 6rem; vertical-align: middle",
      on: { input: (event) => {
        look.cover = Number(event.target.value);
        for (const map of document.querySelectorAll(".map")) map.style.setProperty("--cover", look.cover);
      } } }));
  return el("div", { class: "row", style: "margin: 0" }, rank, cover);
}

function imagePart(run, sample, state, pick) {
  const found = decisions(run, sample, state.layer, "vision");
  return el("div", {}, patchMap(run, sample, state.layer, pick),
    found?.whole.map(({ route, gate }) => el("p", { class: "whole small" }, `Token of the whole image: ${routeInWords(route, gate)}.`)),
    found ? [el("h4", {}, `Image: ${siteName(found.site)}`), legendOf(run, found, "patch")] : nobody("image", state.layer),
    (sample.hidden_patches || []).length > 0 && el("p", { class: "small quiet", style: "margin-top: .5rem" },
      el("span", { class: "swatch covered", "aria-hidden": "true" }), ` ${plural(sample.hidden_patches.length, "patch", "patches")} hidden from the model, which has to predict them.`));
}
function textPart(run, sample, state, pick) {
  const found = decisions(run, sample, state.layer, "text");
  return [el("h4", { style: "margin-top: 0" }, found ? `Text: ${siteName(found.site)}` : "Text"), tokenRow(run, sample, state.layer, pick),
    found ? legendOf(run, found, "token") : nobody("text", state.layer),
    (sample.hidden || []).length > 0 && el("p", { class: "small quiet", style: "margin-top: .5rem" },
      `${plural(sample.hidden.length, "token")} in a dashed frame: hidden from the model, which has to predict ${sample.hidden.length === 1 ? "it" : "them"}.`)];
}
const nobody = (what, layer) =>
  el("p", { class: "note small" }, `At layer ${layer} no router decides for this ${what}: it goes through a dense layer.`);

function layerStrip(run, sample, state, layers, draw) {
  const shown = layers.filter((layer) => decisions(run, sample, layer, "vision"));
  if (shown.length < 2) return null;
  const box = el("div", { class: "strip", role: "group", "aria-label": "Layers" }, shown.map((layer) =>
    el("button", { type: "button", "aria-pressed": String(layer === state.layer), "data-key": `strip-${layer}`,
      on: { click: () => { state.layer = layer; draw(); } } }, smallMap(run, sample, layer), `layer ${layer}`)));
  return [el("h4", {}, "All layers"), roving(box, "button")];
}
