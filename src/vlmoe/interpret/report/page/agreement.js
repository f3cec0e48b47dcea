// Where what an expert takes and what breaks without it agree, and where they do not.

function agreementView(main, run) {
  main.append(heading("Does routing show the cause?",
    "An expert may take a kind of token often (high lift) without being needed for it, and the other way round. Here preference and effect stand side by side."));
  const sites = run.sites.filter((site) => run.experts[site.name].some((expert) => expert.ablation));
  if (!sites.length) { main.append(note("No expert was taken away in this report, so there are no effects to compare preferences with.")); return; }
  const chosen = sites.find((site) => site.name === here.args[0]) || sites[0];
  const found = run.agreement[chosen.name] || {};
  main.append(panel(el("h3", {}, "All routers"), folded(sites.length, agreementTable(run, sites))),
    el("div", { class: "row" }, sitePicker(run, chosen.name, (name) => show("agreement", name), sites)),
    el("div", { class: chosen.experts > 12 ? null : "columns" },
      panel(el("h3", {}, `Preference and effect, ${siteName(chosen)}`), scatter(run, chosen)),
      panel(el("h3", {}, "What each expert is needed for"), effectMap(run, chosen))),
    el("div", { class: "columns" },
      oddTable(run, chosen, "Looks specialised, but not shown to be needed", "The expert prefers these tokens, yet taking it away was not shown to hurt them, or not more than others.", found.looks_specialised_but_is_not),
      el("div", {},
        found.causes && oddTable(run, chosen, "Confirmed causes", "Taking the expert away makes the loss of these tokens worse, and worse than that of others, by intervals that hold together with all others.", found.causes),
        oddTable(run, chosen, "Needed, but does not look it", "Of the causes, those of tokens that the expert does not prefer.", found.cause_without_lift))));
}

const agreementTable = (run, sites) => dataTable(
  ["Router", right("Rank correlation", "Spearman's, between lift and change of the loss, with its 95% interval: 1 same order, 0 nothing in common"), right("Pairs compared", "Of an expert and a value"),
    right("Confirmed causes"), right("Looks specialised, not shown to be"), right("Needed, does not look it")],
  sites.map((site) => {
    const found = run.agreement[site.name] || {}, size = (list) => right(list ? count(list.length) : UNKNOWN);
    const range = found.interval?.every(known) ? ` [${found.interval.map((x) => minus(x.toFixed(2))).join(", ")}]` : "";
    return [el("a", { href: address("agreement", site.name) }, capital(siteName(site))), right(known(found.spearman) ? minus(found.spearman.toFixed(2)) + range : UNKNOWN), right(count(found.pairs)),
      size(found.causes), size(found.looks_specialised_but_is_not), size(found.cause_without_lift)];
  }), "Agreement by router");

const LONG = 12; // rows that are shown at first
function oddTable(run, site, title, about, rows) {
  if (!rows?.length) return panel(el("h3", {}, title), el("p", { class: "small quiet" }, about), el("p", {}, "None found."));
  const table = (list) => dataTable(["Expert", "Factor and value", right("Lift"), right("Change of the loss, nats", "With the interval that holds together with all others")], list.map((row) => [
    expertLink(run, site.name, row.expert, `expert ${row.expert}`), [row.modality && row.modality !== site.modality && el("span", { class: "quiet" }, `${row.modality} `), `${plain(row.factor)}: ${row.value}`, alsoOf(row)], right(times(row.lift)), right(`${delta(row)} ${interval(row)}`)]), title);
  return panel(el("h3", {}, title), el("p", { class: "small quiet" }, about), table(rows.slice(0, LONG)),
    rows.length > LONG && el("details", {}, el("summary", {}, `${rows.length - LONG} more`), table(rows.slice(LONG))));
}

// Pairs of an expert and a value that have both a lift and a measured effect.
function pairsOf(run, site) {
  return run.experts[site.name].flatMap((expert, e) => (expert.ablation?.by_factor || []).flatMap((effect) => {
    const value = (expert.values || []).find((v) => v.factor === effect.factor && v.value === effect.value && (!site.modality || (effect.modality ?? site.modality) === site.modality));
    return value && value.lift > 0 && known(effect.delta) ? [{ ...effect, lift: value.lift, expert: e }] : [];
  }));
}

function scatter(run, site) {
  const pairs = pairsOf(run, site);
  if (!pairs.length) return el("p", { class: "quiet" }, "No pair of expert and value has both a lift and a measured effect.");
  const width = Math.min(760, room(site.experts > 12 ? 1 : 2)), height = Math.round(Math.min(360, 0.7 * width)), left = 58, bottom = 40, top = 10, right = 12;
  const logs = pairs.map((p) => Math.log2(p.lift));
  const x0 = Math.min(0, ...logs), x1 = Math.max(1, ...logs);
  const y0 = Math.min(0, ...pairs.map((p) => p.delta)), y1 = Math.max(1e-9, ...pairs.map((p) => p.delta));
  const x = (lift) => left + ((Math.log2(lift) - x0) / (x1 - x0)) * (width - left - right);
  const y = (delta) => top + (1 - (delta - y0) / (y1 - y0)) * (height - top - bottom);
  const every = Math.ceil((x1 - x0) / (width / 75)); // doublings between ticks
  const ticks = [];
  for (let p = every * Math.ceil(x0 / every); p <= x1; p += every) ticks.push(2 ** p);
  const box = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `Lift and change of the loss of ${pairs.length} pairs of an expert and a value` },
    ticks.map((lift) => [svg("line", { class: "axis", x1: x(lift), x2: x(lift), y1: top, y2: height - bottom }),
      svg("text", { class: "quiet-text", x: x(lift), y: height - bottom + 16, "text-anchor": "middle" }, `${number(lift)}×`)]),
    svg("line", { class: "zero", x1: left, x2: width - right, y1: y(0), y2: y(0) }),
    [y1, 0, ...(y(y0) - y(0) > 14 ? [y0] : [])].map((v) => svg("text", { class: "quiet-text", x: left - 6, y: y(v) + 4, "text-anchor": "end" }, signed(Number(v.toPrecision(2))))),
    svg("text", { class: "quiet-text", x: (left + width) / 2, y: height - 5, "text-anchor": "middle" }, "lift: how many times as often as without a preference"),
    svg("text", { class: "quiet-text", x: -height / 2 + bottom / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, "change of the loss, nats"),
    pairs.sort((a, b) => a.expert - b.expert).map((p) => {
      const sure = p.low > 0 || p.high < 0;
      const what = `Expert ${p.expert}, ${valueName(p)}: lift ${times(p.lift)}, ${change(p)}`;
      return svg("a", { href: address("expert", site.name, p.expert), "data-tip": what, "aria-label": what },
        svg("circle", { cx: x(p.lift), cy: y(p.delta), r: 5, fill: sure ? (p.low > 0 ? "var(--worse)" : "var(--better)") : "var(--panel)", "fill-opacity": 0.8, stroke: sure ? "none" : "var(--quiet)" }));
    }));
  return el("div", {}, roving(box, "a"), el("p", { class: "small quiet" }, "Each dot is one expert and one value. Filled: the 95% interval of the change leaves zero out; hollow: it does not. Dots to the lower right look specialised and do not seem needed."));
}

// Values in rows, experts in columns: the change of the loss of tokens with the value, without the expert.
function effectMap(run, site) {
  const values = new Map();
  run.experts[site.name].forEach((expert, e) => (expert.ablation?.by_factor || []).forEach((row) => {
    if (!known(row.delta)) return;
    const key = `${row.modality && row.modality !== site.modality ? `${row.modality} · ` : ""}${plain(row.factor)}: ${row.value}`;
    const entry = values.get(key) || { cells: new Map(), most: 0 };
    entry.cells.set(e, row);
    entry.most = Math.max(entry.most, row.low > 0 ? row.delta : 0);
    values.set(key, entry);
  }));
  const order = [...values].sort((a, b) => b[1].most - a[1].most).slice(0, 14);
  if (!order.length) return el("p", { class: "quiet" }, "No change by value was measured.");
  const top = Math.max(1e-9, ...order.map(([, entry]) => entry.most));
  const digits = Math.max(0, decimals({ delta: top }) - 1), zero = (0).toFixed(digits);
  const say = (x) => (Number(x.toFixed(digits)) === 0 ? zero : minus(x.toFixed(digits)));
  const experts = Array.from({ length: site.experts }, (_, e) => e);
  const rows = order.map(([key, entry]) => ({
    label: shorten(key, 34),
    cells: experts.map((e) => {
      const row = entry.cells.get(e);
      return row ? { t: row.delta / top, text: say(row.delta), muted: !(row.low > 0), href: address("expert", site.name, e),
        tip: `Without expert ${e}, ${key}: ${change(row)}` } : null;
    }),
  }));
  return el("div", {}, heatMap(rows, experts, "Change of the loss by value and expert", { corner: "expert", wide: site.experts > 12 }),
    ramp([["0", 0], [`${signed(Number(top.toPrecision(2)))} nats`, 1]], "Change of the loss without the expert. Striped: its 95% interval includes zero, or it is lower. Empty: not among the expert's largest."));
}
