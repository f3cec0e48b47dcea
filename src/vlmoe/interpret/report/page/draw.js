// Heat maps, meters, intervals and line charts, each from plain numbers.

// rows: [{label, group, cells: [{t, text, tip, href, muted}]}]; a cell may be null. One tab stop, arrow keys inside.
function heatMap(rows, columns, caption, options = {}) {
  const widest = Math.max(...rows.map((row) => row.cells.length));
  const dense = options.dense ?? widest > 16;
  const label = (name, i) => (widest <= 16 || i % 8 === 0 ? String(name) : "");
  const table = el("table", { class: `heat${dense ? " dense" : ""}${options.wide ? " wide" : ""}` },
    el("caption", { class: "hush" }, caption),
    el("thead", {}, el("tr", {}, el("th", {}, options.corner || ""),
      columns.slice(0, widest).map((name, i) => el("th", { scope: "col" }, label(name, i))))),
    el("tbody", {}, rows.map((row) => el("tr", { class: row.current ? "current" : null }, el("th", { scope: "row" }, row.label),
      row.cells.map((cell) => el("td", {}, cell && heatCell(cell)))))));
  return scroll(roving(table, "a", widest));
}
function heatCell(cell) {
  const attributes = {
    class: cell.muted ? "cell muted" : "cell", "data-tip": cell.tip, "aria-label": cell.tip,
    "data-key": cell.href,
    style: cell.muted ? null : `background: ${heat(cell.t)}; color: ${onHeat(cell.t)}`,
  };
  return cell.href ? el("a", { ...attributes, href: cell.href }, cell.text) : el("span", attributes, cell.text);
}

const meter = (share, text) =>
  el("span", { class: "nowrap" }, el("span", { class: "meter", "aria-hidden": "true" },
    el("i", { style: `width: ${100 * Math.min(1, Math.max(0, share || 0))}%` })), text);

// Rows of changes with their intervals around zero, on one scale: [{label, delta, low, high, low_all, high_all, tip}].
// The thin interval, where there is one, holds together with those of all other rows.
function intervals(rows, unit) {
  const ends = rows.flatMap((r) => [r.low, r.high, r.low_all, r.high_all]).filter(known);
  const low = Math.min(0, ...ends), high = Math.max(0, ...ends);
  const at = (v) => `${(100 * (v - low)) / (high - low || 1)}%`;
  const mark = (row) => {
    const colour = row.low > 0 ? "var(--worse)" : row.high < 0 ? "var(--better)" : "var(--quiet)";
    return el("div", { class: "whisker", "aria-hidden": "true", vars: { "--mark": colour } }, el("s", { style: `left: ${at(0)}` }),
      known(row.low_all) && el("u", { style: `left: ${at(row.low_all)}; width: calc(${at(row.high_all)} - ${at(row.low_all)})` }),
      el("i", { style: `left: ${at(row.low)}; width: calc(${at(row.high)} - ${at(row.low)})` }), el("b", { style: `left: ${at(row.delta)}` }));
  };
  return scroll(el("table", { class: "whiskers" }, el("caption", { class: "hush" }, `Change of the loss in ${unit}, with intervals`),
    el("tbody", {}, rows.map((row) => el("tr", { "data-tip": row.tip }, el("th", { scope: "row" }, row.label),
      el("td", { class: "wide" }, mark(row)), el("td", { class: "n" }, delta(row), " ", el("span", { class: "quiet" }, interval(row))))))));
}
const shorten = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

// Lines over steps: series [{name, values, colour, dash}]. Returns the chart; its `at(index)` moves the cursor.
function lineChart(series, steps, options = {}) {
  const width = 320, height = 120, left = 34, bottom = 18, top = 6, right = 6;
  const all = series.flatMap((s) => s.values.filter(known));
  const high = Math.max(options.atLeast ?? 0, ...all), low = Math.min(0, ...all);
  const x = (i) => left + (i / Math.max(1, steps.length - 1)) * (width - left - right);
  const y = (v) => top + (1 - (v - low) / (high - low || 1)) * (height - top - bottom);
  const path = (values) => {
    let pen = "M", out = "";
    values.forEach((v, i) => {
      if (!known(v)) { pen = "M"; return; }
      out += `${pen}${x(i).toFixed(1)},${y(v).toFixed(1)}`;
      pen = "L";
    });
    return out;
  };
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, x1: x(0), x2: x(0) });
  const ticks = [low, high];
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": options.about },
    ticks.map((v) => [
      svg("line", { class: "axis", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
      svg("text", { class: "quiet-text", x: left - 4, y: y(v) + 4, "text-anchor": "end" }, number(v, 2)),
    ]),
    known(options.mark) && svg("line", { class: "zero", x1: left, x2: width - right, y1: y(options.mark), y2: y(options.mark) }),
    series.map((s) => svg("path", { class: "line", d: path(s.values), stroke: s.colour, "stroke-dasharray": s.dash })),
    svg("text", { class: "quiet-text", x: left, y: height - 4 }, `step ${count(steps[0])}`),
    svg("text", { class: "quiet-text", x: width - right, y: height - 4, "text-anchor": "end" }, count(steps[steps.length - 1])),
    cursor);
  chart.at = (index) => {
    cursor.setAttribute("x1", x(index));
    cursor.setAttribute("x2", x(index));
  };
  return chart;
}

// A canvas of one pixel a number, stretched by its style: grid[row][column] from 0 to 1, or a colour, or null.
function pixels(grid, about) {
  const canvas = el("canvas", { width: grid[0]?.length || 1, height: grid.length || 1, role: "img", "aria-label": about });
  const pen = canvas.getContext("2d");
  grid.forEach((row, r) => row.forEach((cell, c) => {
    if (cell === null) return;
    pen.fillStyle = typeof cell === "string" ? cell : heat(cell);
    pen.fillRect(c, r, 1, 1);
  }));
  return canvas;
}

// A long table is closed at first.
const folded = (rows, table) => (rows > 16 ? el("details", {}, el("summary", {}, `Show ${rows} rows`), table) : table);
// head: texts or {content, n, tip, label}; cells: contents or {content, n, tip, plot}. n: a number, set to the right.
// On a narrow screen a row becomes a list, where each value stands after the label of its column.
function dataTable(head, rows, caption) {
  const columns = head.map((h) => (h && h.content !== undefined ? h : { content: h }));
  const cells = (row) => row.map((cell, i) => {
    const { content, n, tip, plot } = cell && cell.content !== undefined ? cell : { content: cell };
    const label = columns[i].label ?? (typeof columns[i].content === "string" ? columns[i].content : null);
    return el(i === 0 ? "th" : "td", { class: [n && "n", plot && "plot"].filter(Boolean).join(" ") || null, scope: i === 0 ? "row" : null, "data-tip": tip, "data-label": label || null }, content);
  });
  return scroll(el("table", { class: "data" }, caption && el("caption", { class: "hush" }, caption),
    el("thead", {}, el("tr", {}, columns.map((h) => el("th", { scope: "col", class: h.n ? "n" : null, "data-tip": h.tip }, h.content)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, cells(row))))));
}
const right = (content, tip, label) => ({ content, n: true, tip, label });
const plot = (content) => ({ content, plot: true });
