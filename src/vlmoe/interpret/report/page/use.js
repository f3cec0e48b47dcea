// Heat maps of use by layer and modality, a table of balance, and what the modalities share.

function useView(main, run) {
  const kinds = [...new Set(run.sites.flatMap((site) => Object.keys(run.use[site.name].by_kind || {})))];
  const chosen = kinds.includes(here.args[0]) ? here.args[0] : "all";
  main.append(heading("Use of the experts",
    "One row a router, one column an expert. Each cell: the share of tokens that have the expert as their first choice, in times of an even share (1.0× is even). Choose a cell to see the expert."));
  if (kinds.length > 1) {
    main.append(el("div", { class: "row" }, el("span", {}, "Tokens of "), segments("Tokens of",
      [["all", "all inputs"], ...kinds.map((kind) => [kind, kindName(kind)])], chosen, (kind) => show("use", kind))));
  }
  const top = mostUse(run, chosen);
  for (const [modality, sites] of groups(run)) {
    main.append(panel(el("h3", {}, modalityTitle(modality)), useMap(run, sites, chosen, { top })));
  }
  main.append(panel(el("h3", {}, "Balance in numbers"), folded(run.sites.length, balanceTable(run))));
}
const kindName = (kind) => ({ pair: "pairs", image: "images alone", text: "texts alone" })[kind] || kind;
const modalityTitle = (modality) => ({ vision: "Images (vision routers)", text: "Text (text routers)", "": "Routers of all tokens" })[modality] || capital(modality);

const sharesOf = (run, site, kind) => (kind === "all" ? run.use[site.name].share : (run.use[site.name].by_kind || {})[kind]) || [];
// The end of the scale of heat, in times of an even share: whole, at least 2.
const mostUse = (run, kind = "all") =>
  Math.max(2, ...run.sites.flatMap((site) => sharesOf(run, site, kind).map((share) => Math.ceil(share * site.experts - 1e-6))));

// options: top (end of the scale), dense (small cells without numbers), bare (no legend).
function useMap(run, sites, kind = "all", options = {}) {
  const shares = (site) => sharesOf(run, site, kind);
  const shown = sites.filter((site) => shares(site).some((x) => x > 0));
  if (!shown.length) return el("p", { class: "quiet" }, "No router chose an expert for tokens of this kind.");
  const top = options.top || mostUse(run, kind);
  const rows = shown.map((site) => ({
    label: siteLabel(site),
    cells: shares(site).map((share, expert) => {
      const ratio = share * site.experts;
      return {
        t: ratio / top, text: ratio.toFixed(1), href: address("expert", site.name, expert),
        tip: `${capital(siteName(site))}, expert ${expert}: first choice of ${percent(share)} of tokens, ${times(ratio)} an even share`,
      };
    }),
  }));
  const widest = Math.max(...shown.map((site) => site.experts));
  return el("div", {}, heatMap(rows, Array.from({ length: widest }, (_, e) => e), "Use of experts, in times of an even share",
    { corner: "expert", wide: widest >= 6, dense: options.dense }),
    !options.bare && ramp([["0", 0], ["1×", 1 / top], [`${top}×`, 1]], "First choices, in times of an even share (1×)"));
}
const siteLabel = (site) => `layer ${site.layer}`;

function balanceTable(run) {
  const rows = run.sites.map((site) => {
    const use = run.use[site.name];
    return [
      capital(siteName(site)), right(count(use.tokens)), right(`${site.k} of ${site.experts}`), right(times(peak(run, site))),
      right(count(use.share.filter((x) => x === 0).length)),
      right(known(use.entropy) ? `${number(use.entropy)} of ${number(Math.log(site.experts))} nats` : UNKNOWN),
      right(percent(use.dropped)),
    ];
  });
  return dataTable(["Router", right("Tokens seen"), right("Experts a token uses"),
    right("Busiest expert", "In times of an even share"), right("Idle experts"),
    right("Doubt of the router", "Mean entropy of its distribution over experts, of the most it could be"),
    right("Choices dropped", "Because the expert was full")], rows, "Balance of each router");
}

function sharingView(main, run) {
  main.append(heading("Images and text in the same experts",
    "Both modalities may choose these experts. Overlap is the part of their use that is common: 100% means both use the experts alike, 0% that they never meet."));
  const found = run.sites.filter((site) => run.sharing[site.name]);
  const top = Math.max(...found.flatMap((site) => [...run.sharing[site.name].vision, ...run.sharing[site.name].text])) || 1;
  const rows = found.flatMap((site) => [["images", "vision"], ["text", "text"]].map(([name, modality]) => ({
    label: `${siteName(site)}: ${name}`,
    cells: run.sharing[site.name][modality].map((share, expert) => ({
      t: share / top, text: percent(share), href: address("expert", site.name, expert),
      tip: `${capital(siteName(site))}, expert ${expert}: first choice of ${percent(share)} of ${name}`,
    })),
  })));
  const widest = Math.max(...found.map((site) => site.experts));
  main.append(panel(el("h3", {}, "Overlap"), folded(found.length, dataTable(["Router", "Overlap of images and text"], found.map((site) =>
    [capital(siteName(site)), meter(run.sharing[site.name].overlap, percent(run.sharing[site.name].overlap))]), "Overlap by router"))),
  panel(el("h3", {}, "Who chooses whom"), heatMap(rows, Array.from({ length: widest }, (_, e) => e), "Share of each modality's first choices", { corner: "expert", wide: widest >= 6 }),
    ramp([["0%", 0], [percent(top), 1]], "Share of the modality's tokens that have it as first choice")));
}
