// An expert's page: its share, what it takes, what breaks without it, where its tokens come from and go.

function expertView(main, run) {
  const site = siteOf(run, here.args[0]) || run.sites[0];
  const index = Math.min(site.experts - 1, Math.max(0, Number.parseInt(here.args[1], 10) || 0));
  const expert = run.experts[site.name][index];
  const link = (to, text, key) => {
    const off = to < 0 || to >= site.experts;
    return el("a", { class: "button", href: off ? null : address("expert", site.name, to), "aria-disabled": off ? "true" : null, "data-key": key }, text);
  };
  main.append(el("div", { class: "row spread" },
    heading(`${capital(siteName(site))} · expert ${index}`),
    el("div", { class: "row", style: "margin: 0" },
      el("span", { class: "first" }, sitePicker(run, site.name, (name) => show("expert", name, Math.min(index, siteOf(run, name).experts - 1)))),
      link(index - 1, "◀ Previous", "expert-back"), link(index + 1, "Next ▶", "expert-on"))));
  main.append(expertChips(run, site, index));
  main.append(el("p", { class: "lead", style: "color: inherit" }, expertInWords(run, site, index, expert)));
  const left = el("div", {}, takesPanel(expert), tokensPanel(run, site, expert));
  const right = el("div", {}, breaksPanel(site, expert), pathsPanel(run, site, index));
  main.append(el("div", { class: "columns" }, left, right));
  keys.left = () => index > 0 && show("expert", site.name, index - 1);
  keys.right = () => index < site.experts - 1 && show("expert", site.name, index + 1);
}

function expertChips(run, site, index) {
  return roving(el("nav", { class: "chips", "aria-label": `Experts of ${siteName(site)}` }, run.experts[site.name].map((expert, e) =>
    el("a", { href: address("expert", site.name, e), "aria-current": e === index ? "page" : null, "aria-label": `Expert ${e}`, "data-key": `chip-${e}`,
      "data-tip": `Expert ${e}: first choice of ${percent(expert.share)} of tokens` }, chip(e)))), "a");
}

function expertInWords(run, site, index, expert) {
  const parts = [`It is the first choice of ${percent(expert.share)} of the tokens, ${times(expert.share * site.experts)} an even share. `];
  const best = (expert.values || [])[0];
  if (best) {
    parts.push(`It favours ${valueName(best)}: that is ${percent(best.purity)} of what it takes, ${times(best.lift)} as much as without a preference. `);
  }
  const loss = expert.ablation?.loss;
  if (known(loss?.delta)) {
    const sure = loss.low > 0 ? "rises" : loss.high < 0 ? "falls" : "does not change measurably";
    parts.push(`Without it the loss ${sure}: ${change(loss)}.`);
  }
  return parts;
}

function takesPanel(expert) {
  const values = expert.values || [];
  const rows = values.map((row) => [
    [el("span", { class: "quiet" }, plain(row.factor), " "), row.value, alsoOf(row)], meter(row.purity, percent(row.purity)), meter(row.coverage, percent(row.coverage)),
    right(times(row.lift)), right(count(row.tokens)),
  ]);
  return panel(el("h3", {}, "What it takes"), values.length
    ? dataTable(["Factor and value", head("Purity", "Of what it takes, the part that has this value"), head("Coverage", "Of the tokens that have this value, the part it takes"),
      { content: "Lift", n: true, tip: "How many times as often as without a preference" }, { content: "Tokens", n: true }], rows, "What the expert takes")
    : el("p", { class: "quiet" }, "Nothing is known of the tokens it takes: the data has no factors, or it took none."));
}
const head = (content, tip) => ({ content, tip });

// Other values that are the very same tokens.
const alsoOf = (row) => row.also?.length > 0 && el("small", { class: "quiet", "data-tip": `The same tokens: ${row.also.map(plain).join(", ")}` }, ` = ${row.also.map(plain).slice(0, 2).join(", ")}${row.also.length > 2 ? " …" : ""}`);

function tokensPanel(run, site, expert) {
  const words = expert.top_tokens || [], patches = (expert.top_patches || []).filter((p) => run.samples[p.sample]?.image);
  if (!words.length && !patches.length) return null;
  return panel(
    patches.length > 0 && [el("h3", {}, "Patches it takes with the largest gates"),
      el("p", { class: "small quiet" }, "Framed: the patch. Around it: what is beside it in the image. Choose one to see the whole sample."),
      el("ul", { class: "crops" }, patches.map((patch) => el("li", {}, el("a", {
        href: address("samples", patch.sample, site.layer), "aria-label": `Patch ${patch.position} of sample ${patch.sample + 1}, gate ${number(patch.gate)}`,
      }, crop(run.samples[patch.sample], patch.position), `gate ${number(patch.gate)}`))))],
    words.length > 0 && [el("h3", { style: patches.length ? "margin-top: 1.2rem" : null }, "Tokens it takes most"),
      el("ul", { class: "words-list" }, words.map((word) => el("li", { "data-tip": `“${word.text}”: taken ${plural(word.count, "time")}, ${times(word.lift)} as often as without a preference` },
        wordOf(word.text).trim() || "\u2423", el("small", {}, plural(word.count, "time"), known(word.lift) ? ` · lift ${times(word.lift)}` : ""))))]);
}

function breaksPanel(site, expert) {
  const test = expert.ablation;
  if (!test) {
    return panel(el("h3", {}, "What breaks without it"), el("p", { class: "quiet" }, "It was not taken away in this report, so what it is needed for is not known."));
  }
  const how = test.mode === "silence" ? "its part of the output is taken away" : "its tokens go to the next best experts";
  const effects = (test.by_factor || []).filter((r) => known(r.delta));
  const name = (r) => `${r.modality && r.modality !== site.modality ? `${r.modality} · ` : ""}${plain(r.factor)}: ${r.value}`;
  const row = (r, label) => ({
    ...r, label: r.cause ? [label, " ", el("span", { class: "cause" }, "cause")] : label,
    tip: [`${label}: ${change(r)}`, known(r.low_all) && `with all other rows together: [${signed(r.low_all)}, ${signed(r.high_all)}]`,
      known(r.tokens) && `${plural(r.tokens, "token")}${known(r.samples) ? ` in ${plural(r.samples, "sample")}` : ""}`, r.also?.length && `the same tokens: ${r.also.map(plain).join(", ")}`].filter(Boolean).join("\n"),
  });
  const rows = [...(known(test.loss?.delta) ? [row(test.loss, "all tokens")] : []), ...effects.map((r) => row(r, name(r)))];
  const joint = effects.some((r) => known(r.low_all));
  return panel(el("h3", {}, "What breaks without it"),
    el("p", { class: "small quiet" }, `Change of the loss in nats when ${how}. Thick: 95% interval${joint ? "; thin: the interval that holds together with those of all rows and experts" : ""}. Right of zero: worse without it. Grey: the 95% interval includes zero.`,
      joint && [" ", el("span", { class: "cause" }, "cause"), " : worse, and worse than for other tokens, by the thin interval."]),
    rows.length ? intervals(rows, "nats") : el("p", { class: "quiet" }, "No change was measured."),
    known(test.score?.delta) && el("p", { class: "small", style: "margin-top: .8rem" }, `The task's score changes by ${delta(test.score)} ${interval(test.score)} (a score of 1 is perfect).`));
}

function pathsPanel(run, site, index) {
  const links = Object.values(run.paths || {}).flatMap((path) => path.links || []);
  const is = (end) => end[0] === site.name && end[1] === index;
  const best = (list) => list.sort((a, b) => b.count - a.count).slice(0, 5);
  const from = best(links.filter((l) => is(l.to))), to = best(links.filter((l) => is(l.from)));
  if (!from.length && !to.length) return null;
  const list = (title, rows, end) => rows.length > 0 && [el("h4", {}, title), dataTable(
    ["Expert", { content: "Tokens", n: true }, { content: "Lift", n: true, tip: "How many times as many as if layers chose independently" }],
    rows.map((l) => [expertLink(run, l[end][0], l[end][1]), right(count(l.count)), right(times(l.lift))]), title)];
  return panel(el("h3", {}, "Before and after it"), list("Its tokens come from", from, "from"), list("Its tokens go on to", to, "to"));
}
