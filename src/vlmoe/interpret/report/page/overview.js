// The first page: what the findings say in words, key figures, what the run is, and the words used.

const WORDS = [
  ["Token", "One piece of the input: a word or part of a word, or a patch (a small square) of an image."],
  ["Expert, router", "A sparse layer holds several small networks, its experts. A router decides which of them serve a token."],
  ["Gate", "The weight, from 0 to 1, with which the output of a chosen expert is added."],
  ["Share", "The part of a router's tokens that have an expert as their first choice. Even share: 1 divided by the number of experts. What an expert takes means first choices throughout."],
  ["Factor, value", "Something known about a token, such as its colour, and what it is, such as “red”."],
  ["Position, hidden", "The number of a patch in its image, row by row from 0. Hidden tokens are covered, and the model has to predict them."],
  ["Purity", "Of the tokens an expert takes, the part that has a value."],
  ["Coverage", "Of the tokens that have a value, the part that an expert takes."],
  ["Lift", "How many times as often an expert takes a value as it would without a preference. 1: no preference."],
  ["Bits", "How much the number of the expert tells about a factor. Chance is what shuffled tokens give, so only what stands above it counts."],
  ["Loss, nats", "How wrong the model is about what it has to predict; 0.69 nats is one doubling of uncertainty (one bit)."],
  ["Ablation", "Taking an expert away and measuring how the loss changes. Reroute: its tokens go to the next best experts. Silence: its part of the output is taken away."],
  ["[low, high]", "An interval that holds the true value in 95 of 100 such measurements."],
];

function overviewView(main, run) {
  const body = el("div", { class: "sides" },
    panel(run.words.map((part) => [
      el("h3", {}, part.title),
      el("ul", { class: "points" }, part.points.map((point) => el("li", {}, sentence(point)))),
    ])),
    el("div", {}, panel(el("h3", {}, "Use at a glance"), [...groups(run)].map(([modality, sites]) => [modality && el("h4", {}, modalityTitle(modality)), glance(run, sites)]),
      el("p", { class: "small quiet", style: "margin: .6rem 0 0" }, "Rows: layers, columns: experts; the stronger the colour, the more tokens.")),
    panel(el("h3", {}, "This run"), aboutList(run)), legendPanel()));
  main.append(
    heading(run.title, "What the experts of this model do, in short. Each link leads to the place that shows it."),
    tiles(run), body);
}
const heading = (title, lead) => [el("h2", { tabindex: "-1" }, title), lead && el("p", { class: "lead" }, lead)].filter(Boolean)
  .reduce((box, node) => (box.append(node), box), document.createDocumentFragment());

// Many experts: a picture alone, as wide as there is room.
function glance(run, sites) {
  if (Math.max(...sites.map((site) => site.experts)) <= 16) return useMap(run, sites, "all", { bare: true, dense: true });
  const top = mostUse(run), widest = Math.max(...sites.map((site) => site.experts));
  const picture = pixels(sites.map((site) => Array.from({ length: widest }, (_, e) => (e < site.experts ? (run.use[site.name].share[e] * site.experts) / top : null))),
    "Use of experts by layer: opens the heat map with numbers");
  picture.style.height = `${Math.min(22, Math.max(2, 0.45 * sites.length))}rem`;
  return el("a", { class: "glance", href: address("use") }, picture);
}

const sentence = (point) => point.map((part) =>
  typeof part === "string" ? part : el("a", { href: address(...part.to) }, part.text));

const aboutList = (run) => el("dl", { class: "facts" },
  Object.entries(run.about).map(([key, value]) => [el("dt", {}, plain(key)), el("dd", {}, typeof value === "number" ? aboutNumber(value) : String(value))]));
const aboutNumber = (x) => (Number.isInteger(x) ? count(x) : number(x, 4));

function legendPanel() {
  return el("section", { class: "panel" }, el("h3", {}, "Words used here"),
    el("details", {}, el("summary", {}, "Token, lift, bits, nats …"),
      el("dl", {}, WORDS.map(([word, text]) => [el("dt", {}, el("strong", {}, word)), el("dd", { class: "quiet" }, text)]))));
}

function tiles(run) {
  const experts = run.sites.reduce((sum, site) => sum + site.experts, 0);
  const peaks = run.sites.map((site) => peak(run, site));
  const idle = run.sites.reduce((sum, site) => sum + run.use[site.name].share.filter((x) => x === 0).length, 0);
  const told = run.sites.flatMap((site) => Object.entries(run.information[site.name] || {})
    .filter(([, row]) => known(row.share) && row.bits > row.chance_high && row.tokens >= 0.1 * run.use[site.name].tokens) // known of many
    .map(([factor, row]) => ({ share: row.share, factor, site }))).sort((a, b) => b.share - a.share)[0];
  const tested = run.sites.flatMap((site) => run.experts[site.name].map((expert, e) => ({ site, e, loss: expert.ablation?.loss })))
    .filter((t) => known(t.loss?.delta)).sort((a, b) => b.loss.delta - a.loss.delta)[0];
  const figures = [
    [count(experts), `experts, behind ${plural(run.sites.length, "router")}`],
    [times(Math.max(...peaks)), "an even share is what the busiest expert takes"],
    [count(idle), idle === 1 ? "expert took no token" : "experts took no token"],
    told && [percent(told.share), `of the bits of “${plain(told.factor)}” are told by the expert at ${siteName(told.site)}, chance taken off`],
    tested && [delta(tested.loss), `nats ${interval(tested.loss)}: largest change of the loss, without ${expertName(run, tested.site.name, tested.e)}`],
  ].filter(Boolean);
  return el("ul", { class: "tiles" }, figures.map(([value, text]) => el("li", {}, el("b", {}, value), el("span", {}, text))));
}
function peak(run, site) {
  const use = run.use[site.name];
  return known(use.max_over_mean) ? use.max_over_mean : Math.max(...use.share) * site.experts;
}
