// Balance while training: one panel a router, all at the step of one slider.

const MEASURES = {
  max_load: ["busiest expert", (x) => `busiest expert takes ${times(x)} an even share`],
  entropy: ["doubt of the router", (x) => `mean entropy ${number(x)} nats`],
  churn: ["changed choices", (x) => `${percent(x)} of a fixed batch's choices changed since the step before`],
  dropped: ["dropped choices", (x) => `${percent(x)} of choices dropped`],
};

function historyView(main, run) {
  const history = run.history;
  main.append(heading("Balance over training", "Upper strip: one row an expert, from left to right the steps of training; the stronger the colour, the larger its share. Below: the measure you choose. All choices of a training batch count here, not only the first. Move the slider to read a step."));
  if (!history || !history.steps.length) { main.append(note("This model came without a record of its training.")); return; }
  const sites = run.sites.filter((site) => history.sites[site.name]);
  const measures = Object.keys(MEASURES).filter((m) => sites.some((site) => history.sites[site.name][m]?.some(known)));
  const measure = measures.includes(here.args[0]) ? here.args[0] : measures[0];
  const panels = sites.map((site) => historyPanel(site, history, measure));
  const label = el("output", { for: "step" });
  const slider = el("input", { type: "range", id: "step", "data-key": "step", min: 0, max: history.steps.length - 1, value: history.steps.length - 1, style: "flex: 1" });
  const move = () => {
    const at = Number(slider.value);
    label.textContent = `step ${count(history.steps[at])}`;
    for (const p of panels) p.at(at);
  };
  slider.addEventListener("input", move);
  main.append(
    el("div", { class: "panel stick" }, el("div", { class: "row", style: "margin: 0" },
      measures.length > 0 && segments("Measure", measures.map((m) => [m, MEASURES[m][0]]), measure, (m) => show("history", m)),
      el("label", { for: "step" }, "Step"), slider, el("strong", { class: "nowrap" }, label))),
    el("div", { class: "multiples" }, panels.map((p) => p.node)),
    el("div", { style: "margin-top: 1rem" }, ramp([["0: idle", 0], ["1× even", 1 / 3], ["3× or more", 1]], "Strips: share of an expert, in times of an even share")));
  move();
}

function historyPanel(site, history, measure) {
  const found = history.sites[site.name], steps = history.steps;
  const shares = found.share || [];
  const grid = Array.from({ length: site.experts }, (_, e) => steps.map((_, i) => (known(shares[i]?.[e]) ? (shares[i][e] * site.experts) / 3 : null)));
  const cursor = el("i", { "aria-hidden": "true" });
  const values = found[measure] || [];
  const chart = values.some(known) && lineChart([{ values, colour: "var(--accent)" }], steps,
    { mark: measure === "max_load" ? 1 : null, about: `${capital(siteName(site))}, ${MEASURES[measure][0]} over training` });
  const readout = el("p", { class: "small", style: "margin: .4rem 0 0" });
  return {
    node: panel(el("h3", {}, capital(siteName(site))), shares.length > 0 && el("div", { class: "over" }, site.experts <= 8 && el("div", { class: "numbers", "aria-hidden": "true" }, grid.map((_, e) => el("span", {}, String(e)))),
      pixels(grid, `Share of each of ${site.experts} experts over training`), cursor), chart, readout),
    at: (index) => {
      cursor.style.left = `${(100 * (index + 0.5)) / steps.length}%`;
      if (chart) chart.at(index);
      const now = shares[index] || [], top = now.indexOf(Math.max(...now));
      readout.replaceChildren(capital(known(values[index]) ? MEASURES[measure][1](values[index]) : "not measured at this step"),
        now.length ? `; most goes to expert ${top} (${percent(now[top])}).` : ".");
    },
  };
}
