// Puts the view of the address on the page, and keeps focus and place where the reader left them.

const VIEWS = {
  overview: ["Overview", overviewView],
  compare: ["A and B", compareView, () => report.runs.length > 1],
  use: ["Use", useView],
  samples: ["Samples", samplesView, (run) => run.samples.length > 0],
  expert: ["Experts", expertView],
  information: ["Information", informationView],
  agreement: ["Causes", agreementView],
  paths: ["Paths", pathsView],
  sharing: ["Sharing", sharingView, (run) => Object.keys(run.sharing).length > 0],
  history: ["Training", historyView, (run) => run.history !== null],
};
const keys = { left: null, right: null }; // what the arrow keys do in this view
let last = null; // the view on the page

const show = (view, ...args) => { location.hash = address(view, ...args); };

// Runs a change of the page, then gives the focus back to the element that took its place.
function keepFocus(act) {
  const key = document.activeElement?.dataset?.key;
  act();
  if (!key || document.activeElement?.dataset?.key === key) return;
  const again = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (again && !again.disabled) again.focus({ preventScroll: true });
}

function render() {
  readAddress();
  const run = theRun();
  if (!VIEWS[here.view] || VIEWS[here.view][2]?.(run) === false) Object.assign(here, { view: "overview", args: [] });
  const main = document.getElementById("main"), now = `${here.run}/${here.view}`;
  keys.left = keys.right = null;
  document.getElementById("tip").hidden = true;
  keepFocus(() => {
    main.replaceChildren();
    VIEWS[here.view][1](main, run);
    frame(run);
  });
  document.title = `${VIEWS[here.view][0]} · ${run.title} · routing report`;
  if (last !== null && last !== now) {
    scrollTo(0, 0);
    main.querySelector("h2")?.focus({ preventScroll: true });
  }
  last = now;
}

function frame(run) {
  document.getElementById("run-title").replaceChildren(...(report.runs.length > 1 ? [tag(here.run), " "] : []), run.title);
  document.getElementById("tabs").replaceChildren(...Object.entries(VIEWS).filter(([, v]) => v[2]?.(run) !== false).map(([view, [title]]) =>
    el("a", { href: address(view), "aria-current": view === here.view ? "page" : null, "data-key": `tab-${view}` }, title)));
  const tools = document.getElementById("tools");
  const large = document.documentElement.dataset.type === "large";
  tools.replaceChildren(
    report.runs.length > 1 ? segments("Run shown", report.runs.map((r, i) => [i, [i ? "B" : "A", el("span", { class: "long" }, `: ${shorten(r.title, 22)}`)]]), here.run,
      (i) => { here.run = i; show(here.view === "expert" ? "expert" : here.view, ...(here.view === "compare" ? [] : here.args)); }) : "",
    el("button", { type: "button", "aria-pressed": String(large), "data-key": "large", on: { click: () => {
      document.documentElement.dataset.type = large ? "" : "large";
      keepFocus(() => frame(theRun()));
    } } }, "Larger text"));
  document.querySelector("#tabs [aria-current]")?.scrollIntoView?.({ block: "nearest", inline: "nearest" });
}

function arrowKeys(event) {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest?.("input, select, textarea")) return;
  const act = { ArrowLeft: keys.left, ArrowRight: keys.right }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

async function start() {
  const loading = document.getElementById("loading");
  loading.hidden = false;
  try {
    Object.assign(report, await readData());
  } catch (error) {
    loading.textContent = `The report's data cannot be read: ${error.message}`;
    return;
  }
  const skip = document.getElementById("skip");
  skip.addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); });
  tips();
  render();
  addEventListener("hashchange", render);
  document.addEventListener("keydown", arrowKeys);
  dark.addEventListener("change", render);
  let width = innerWidth, pause = null; // drawings are made for the width there is
  addEventListener("resize", () => {
    clearTimeout(pause);
    pause = setTimeout(() => { if (innerWidth !== width) { width = innerWidth; render(); } }, 150);
  });
}
start();
