// How much the number of the expert tells about each known factor, beside what chance gives.

function informationView(main, run) {
  main.append(heading("What the expert tells about a token",
    "If you know which expert took a token, how much do you know about the token? Measured in bits, with the bits that chance gives taken off: what is told when whole samples exchange their labels, since the tokens of one sample are alike. Shuffling single tokens, shown beside it, makes chance look smaller than it is. 100%: the expert tells all there is to know about the factor."));
  const sites = run.sites.filter((site) => Object.keys(run.information[site.name] || {}).length);
  if (!sites.length) { main.append(note("Nothing is known about the tokens of this data, so there is nothing to compare the experts with.")); return; }
  const chosen = sites.find((site) => site.name === here.args[0]) || sites[0];
  const maps = [...groups(run)].map(([modality, members]) => [modality, members.filter((site) => sites.includes(site))]).filter(([, shown]) => shown.length);
  const few = maps.every(([, shown]) => factorsOf(run, shown).length <= 7);
  main.append(el("div", { class: few ? "columns" : null }, maps.map(([modality, shown]) => panel(el("h3", {}, modalityTitle(modality)), informationMap(run, shown, chosen)))));
  main.append(panel(el("div", { class: "row spread" }, el("h3", { style: "margin: 0" }, capital(siteName(chosen))),
    sitePicker(run, chosen.name, (name) => show("information", name), sites)),
    informationBars(run.information[chosen.name])));
}

// Findings of earlier versions know chance by token alone.
const chanceOf = (row) => row.sample_chance ?? row.chance;
const chanceHigh = (row) => Math.max(row.chance_high, row.sample_chance_high ?? 0);

const factorsOf = (run, sites) => [...new Set(sites.flatMap((site) => Object.keys(run.information[site.name] || {})))].sort();

function informationMap(run, sites, chosen) {
  const factors = factorsOf(run, sites);
  const rows = sites.map((site) => ({
    label: siteLabel(site), current: site === chosen,
    cells: factors.map((factor) => {
      const row = run.information[site.name][factor];
      if (!row || !known(row.share)) return null;
      const above = row.bits > chanceHigh(row);
      return {
        t: row.share, text: above ? percent(row.share) : "chance", muted: !above, href: address("information", site.name),
        tip: `${capital(siteName(site))}, ${plain(factor)}: ${number(row.bits)} bits of ${number(row.factor_bits)}; chance gives ${number(chanceOf(row))}, at most ${number(chanceHigh(row))}${above ? "" : " (not above chance)"}`,
      };
    }),
  }));
  return el("div", {}, heatMap(rows, factors.map(plain), "Share of each factor's bits, chance taken off", { dense: false, wide: true }),
    ramp([["0%", 0], ["100%", 1]], "Share of a factor's bits, chance taken off. Striped: not above chance."));
}

function informationBars(rows) {
  const most = Math.max(...Object.values(rows).map((row) => Math.max(row.factor_bits || 0, row.bits || 0)));
  const wide = (bits) => `${(100 * Math.max(0, bits)) / most}%`;
  const bar = (row) => el("div", { class: "bits", "data-tip": `${number(row.bits)} bits found, ${number(row.factor_bits)} there are, ${number(chanceOf(row))} by chance (97.5% of exchanges: below ${number(chanceHigh(row))})` },
    el("i", { class: "all", style: `width: ${wide(row.factor_bits)}` }), el("i", { class: "found", style: `width: ${wide(row.bits)}` }),
    el("i", { class: "chance", style: `width: ${wide(chanceHigh(row))}` }));
  const order = Object.entries(rows).sort((a, b) => (b[1].share ?? -1) - (a[1].share ?? -1));
  return el("div", {}, el("p", { class: "small quiet" }, el("span", { class: "key all" }), " bits there are to know  ", el("span", { class: "key found" }), " bits the expert tells  ",
    el("span", { class: "key chance" }), " what chance reaches"),
  dataTable(["Factor", { content: "", label: "" }, right("Told, bits", "Bits that the expert tells"), right("By chance, bits", "Whole samples' labels exchanged: mean, and what 97.5% stay below"), right("By token, bits", "Single tokens' labels shuffled: mean, and what 97.5% stay below"), right("There are, bits", "Bits in the factor"), right("Share", "Told, less chance, of what there is"), right("Tokens")],
    order.map(([factor, row]) => [plain(factor), plot(bar(row)), right(number(row.bits)), right(`${number(chanceOf(row), 2)} (below ${number(row.sample_chance_high ?? row.chance_high, 2)})`), right(`${number(row.chance, 2)} (below ${number(row.chance_high, 2)})`),
      right(number(row.factor_bits)), right(row.bits > chanceHigh(row) ? percent(row.share) : "chance"), right(count(row.tokens))]), "Bits by factor"));
}
