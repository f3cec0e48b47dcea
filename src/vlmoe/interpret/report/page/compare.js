// Two runs side by side: A and B.

const tag = (run) => el("span", { class: run ? "tag b" : "tag" }, run ? "B" : "A");

function compareView(main) {
  const [a, b] = report.runs;
  main.append(heading("Two runs side by side", "A and B, layer by layer. Experts have no common order between runs trained apart: expert 3 of A need not be like expert 3 of B."));
  main.append(panel(el("h3", {}, "In short"), el("ul", { class: "points" }, report.compared.map((point) => el("li", {}, sentence(point)))), aboutBoth(a, b)));
  const sites = a.sites.filter((site) => siteOf(b, site.name));
  if (!sites.length) { main.append(note("No router has the same name in both.")); return; }
  main.append(panel(el("h3", {}, "Balance and specialisation"), folded(sites.length, bothTable(a, b, sites))));
  if (report.drift) main.append(driftPanel(a, report.drift));
  const all = [...groups(a)];
  for (const [modality, members] of all) {
    const others = b.sites.filter((site) => site.modality === modality).sort((x, y) => x.layer - y.layer);
    const top = Math.max(2, Math.ceil(Math.max(...[[a, members], [b, others]].flatMap(([run, list]) => list.map((site) => peak(run, site))))));
    main.append(panel(el("h3", {}, `Use: ${modalityTitle(modality)}`), el("div", { class: "columns" },
      el("div", {}, el("h4", {}, tag(0), " ", a.title), inRun(0, () => useMap(a, members, "all", { top }))),
      el("div", {}, el("h4", {}, tag(1), " ", b.title), others.length ? inRun(1, () => useMap(b, others, "all", { top })) : el("p", { class: "quiet" }, "No such routers.")))));
  }
  const information = bothInformation(a, b, sites);
  if (information) main.append(information);
  const samples = bothSamples(a, b);
  if (samples) main.append(samples);
  const history = bothHistory(a, b, sites);
  if (history) main.append(history);
}
// Links made inside belong to that run.
function inRun(run, make) {
  const before = here.run;
  here.run = run;
  try { return make(); } finally { here.run = before; }
}

function aboutBoth(a, b) {
  const names = [...new Set([...Object.keys(a.about), ...Object.keys(b.about)])];
  const say = (x) => (x === undefined ? "–" : typeof x === "number" ? aboutNumber(x) : String(x));
  return dataTable(["", { content: [tag(0), " ", a.title], label: "A" }, { content: [tag(1), " ", b.title], label: "B" }],
    names.map((name) => {
      const same = say(a.about[name]) === say(b.about[name]);
      const cell = (x) => (same ? say(x) : el("strong", {}, say(x)));
      return [plain(name), cell(a.about[name]), cell(b.about[name])];
    }), "What the two runs are; what differs is bold");
}

function bothTable(a, b, sites) {
  const best = (run, site) => Object.entries(run.information[site.name] || {}).filter(([, r]) => known(r.share) && r.bits > r.chance_high).sort((x, y) => y[1].share - x[1].share)[0];
  const told = (row) => (row ? `${plain(row[0])} ${percent(row[1].share)}` : "none above chance");
  const worst = (run, site) => run.experts[site.name].map((e) => e.ablation?.loss).filter((l) => known(l?.delta)).sort((x, y) => y.delta - x.delta)[0];
  const both = (f) => [right(f(a)), right(f(b))];
  const pair = (name, tip) => [right([tag(0), ` ${name}`], tip, `A ${name}`), right([tag(1), ` ${name}`], tip, `B ${name}`)];
  return dataTable(["Router", ...pair("busiest", "Busiest expert, in times of an even share"), ...pair("idle"), ...pair("told most", "The factor whose bits the expert tells most of, chance taken off"), ...pair("largest harm, nats", "Change of the loss without the expert that is missed most")],
    sites.map((site) => [capital(siteName(site)), ...both((run) => times(peak(run, siteOf(run, site.name)))),
      ...both((run) => count(run.use[site.name].share.filter((x) => x === 0).length)), ...both((run) => told(best(run, site))),
      ...both((run) => { const w = worst(run, site); return w ? `${delta(w)} ${interval(w)}` : UNKNOWN; })]), "The two runs by router");
}

function driftPanel(a, drift) {
  const rows = Object.entries(drift).filter(([site, row]) => siteOf(a, site) && known(row?.changed));
  if (!rows.length) return null;
  return panel(el("h3", {}, "The same tokens, other experts"),
    el("p", { class: "small quiet" }, "Share of tokens whose first expert has another number in B; and after the experts of B are renumbered to fit A as well as they can."),
    dataTable(["Router", "Other number", "Other expert, after the best renumbering", right("Tokens")], rows.map(([site, row]) =>
      [capital(siteName(siteOf(a, site))), meter(row.changed, percent(row.changed)), meter(row.matched, percent(row.matched)), right(count(row.tokens))]), "Drift"));
}

function bothInformation(a, b, sites) {
  const rows = sites.flatMap((site) => Object.entries(a.information[site.name] || {}).flatMap(([factor, row]) => {
    const other = b.information[site.name]?.[factor];
    return other && known(row.share) && known(other.share) ? [{ site, factor, a: above(row), b: above(other), gap: Math.abs(above(row) - above(other)) }] : [];
  })).sort((x, y) => y.gap - x.gap).slice(0, 16);
  if (!rows.length) return null;
  const dumbbell = (row) => svg("svg", { viewBox: "0 0 200 16", width: 200, "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 6, x2: 194, y1: 8, y2: 8 }),
    svg("line", { x1: 6 + 188 * clip(row.a), x2: 6 + 188 * clip(row.b), y1: 8, y2: 8, stroke: "var(--quiet)", "stroke-width": 2 }),
    svg("circle", { cx: 6 + 188 * clip(row.a), cy: 8, r: 5, fill: "var(--a)" }),
    svg("rect", { x: 1.5 + 188 * clip(row.b), y: 3.5, width: 9, height: 9, fill: "var(--b)" }));
  return panel(el("h3", {}, "What the experts tell, largest differences first"),
    el("p", { class: "small quiet" }, "Share of the factor's bits, chance taken off, from 0% to 100%. Circle: A, square: B."),
    dataTable(["Router and factor", "", right(tag(0), null, "A"), right(tag(1), null, "B")], rows.map((row) => [`${capital(siteName(row.site))}: ${plain(row.factor)}`, plot(dumbbell(row)), right(row.a ? percent(row.a) : "chance"), right(row.b ? percent(row.b) : "chance")]), "Information in A and B"));
}
const above = (row) => (row.bits > row.chance_high ? row.share : 0); // a share that chance explains is none
const clip = (x) => Math.min(1, Math.max(0, x));

// A sample that both runs were shown, at the same layer.
function bothSamples(a, b) {
  const common = a.samples.map((sample, i) => [i, b.samples.findIndex((s) => s.key === sample.key)]).filter(([, j]) => j >= 0);
  if (!common.length) return null;
  const layers = layersOf(a).filter((layer) => layersOf(b).includes(layer));
  const state = { sample: 0, layer: layers[0] };
  const body = el("div", {});
  const draw = () => keepFocus(() => {
    const sides = [[a, common[state.sample][0]], [b, common[state.sample][1]]].map(([run, index], i) => inRun(i, () => {
      const sample = run.samples[index];
      const vision = sample.image && sample.grid && decisions(run, sample, state.layer, "vision"), text = sample.tokens && decisions(run, sample, state.layer, "text");
      return el("div", {}, el("h4", {}, tag(i), " ", run.title),
        sample.image && sample.grid && patchMap(run, sample, state.layer), vision ? legendOf(run, vision, "patch") : null,
        sample.tokens && tokenRow(run, sample, state.layer), text ? legendOf(run, text, "token") : null, !vision && !text && nobody("sample", state.layer));
    }));
    body.replaceChildren(el("div", { class: "row" },
      el("label", { for: "both-sample" }, "Sample"), el("select", { id: "both-sample", "data-key": "both-sample", on: { change: (event) => { state.sample = Number(event.target.value); draw(); } } },
        common.map(([i], n) => el("option", { value: n, selected: n === state.sample }, `${i + 1} · ${sampleKind(a.samples[i])}`))),
      stepper(state, layers, draw)), el("div", { class: "columns" }, sides));
  });
  draw();
  return panel(el("h3", {}, "The same sample in both"), body);
}

function bothHistory(a, b, sites) {
  const shown = sites.filter((site) => [a, b].every((run) => run.history?.sites[site.name]?.max_load?.some(known)));
  if (!shown.length) return null;
  const steps = a.history.steps.length >= b.history.steps.length ? a.history.steps : b.history.steps;
  return panel(el("h3", {}, "Busiest expert over training"),
    el("p", { class: "small quiet" }, tag(0), " solid, ", tag(1), " dashed; in times of an even share, 1 is even."),
    el("div", { class: "multiples" }, shown.map((site) => {
      const chart = lineChart([a, b].map((run, i) => ({ values: resample(run.history, site.name, steps), colour: i ? "var(--b)" : "var(--a)", dash: i ? "5 4" : null })), steps,
        { mark: 1, about: `${capital(siteName(site))}: busiest expert of A and B over training` });
      chart.querySelector(".cursor").remove();
      return el("div", {}, el("h4", {}, capital(siteName(site))), chart);
    })));
}
// A run's values at the steps of another: those of its last step up to each.
function resample(history, site, steps) {
  const values = history.sites[site].max_load;
  let at = -1;
  return steps.map((step) => {
    while (at + 1 < history.steps.length && history.steps[at + 1] <= step) at += 1;
    return step > history.steps[history.steps.length - 1] || at < 0 ? null : values[at];
  });
}
