"use strict";

// Elements and small drawing helpers -------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== "") element.textContent = text;
  return element;
}

const known = (value) => value !== null && Number.isFinite(value);

function brief(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return rounded(value, { maximumFractionDigits: digits });
}

// Rounds as Python does, so that the page agrees with the terminal.
const rounded = (value, digits) => value.toLocaleString("en", { ...digits, roundingMode: "halfEven" });

function fixed(value, digits) {
  return rounded(value, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const hundredths = (value) => (known(value) ? fixed(value, 2) : "–");
const percent = (value) => (known(value) ? `${fixed(100 * value, 1)}%` : "–");

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${seconds < 10 ? seconds.toFixed(1) : whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) out.push(k * step || 0);
  return out;
}

// A frame with axes; returns the svg and the two scales.
function frame({ width, height, x, y, xName = "", yName = "", xFormat = brief, label }) {
  const left = 48, right = 14, top = 12, bottom = xName ? 40 : 24;
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const scale = (range, from, to) => (v) =>
    from + ((v - range[0]) / (range[1] - range[0] || 1)) * (to - from);
  const sx = scale(x, left, width - right);
  const sy = scale(y, height - bottom, top);
  for (const v of ticks(y[0], y[1], height > 250 ? 6 : 4)) {
    svg.append(makeSvg("line", { x1: left, x2: width - right, y1: sy(v), y2: sy(v), class: "grid" }));
    svg.append(makeSvg("text", { x: left - 8, y: sy(v) + 4, "text-anchor": "end" }, brief(v)));
  }
  for (const v of ticks(x[0], x[1], width > 500 ? 8 : 5)) {
    svg.append(makeSvg("text", { x: sx(v), y: height - bottom + 17, "text-anchor": "middle" }, xFormat(v)));
  }
  const axis = { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" };
  svg.append(makeSvg("line", axis));
  const middle = (left + width - right) / 2;
  if (xName) svg.append(makeSvg("text", { x: middle, y: height - 4, "text-anchor": "middle" }, xName));
  if (yName) svg.append(makeSvg("text", {
    transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle",
  }, yName));
  return { svg, sx, sy, left, right: width - right };
}

// One metric over steps, with a tip under the pointer ---------------------------------

function lineChart(name, series) {
  const width = 340, height = 180;
  const points = series.flatMap((line) => line.points).filter(([, v]) => known(v));
  if (points.length === 0) return null;
  const steps = points.map(([step]) => step), values = points.map(([, v]) => v);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const slack = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  if (low >= 0 && low < (high - low) * 0.7) low = 0; else low -= slack;
  high += slack;
  const x = [Math.min(...steps), Math.max(...steps)];
  const { svg, sx, sy } = frame({ width, height, x, y: [low, high], label: name });
  for (const { points: line, color, dashed } of series) {
    const shown = line.filter(([, v]) => known(v));
    const path = shown.map(([s, v], i) => `${i ? "L" : "M"}${sx(s).toFixed(1)} ${sy(v).toFixed(1)}`);
    svg.append(makeSvg("path", {
      d: path.join(""), fill: "none", stroke: `var(${color})`, "stroke-width": 1.8,
      "stroke-linejoin": "round", ...(dashed ? { "stroke-dasharray": "5 3" } : {}),
    }));
    if (shown.length < 3) {
      for (const [s, v] of shown) {
        svg.append(makeSvg("circle", { cx: sx(s), cy: sy(v), r: 3, fill: `var(${color})` }));
      }
    }
  }
  const chart = make("div", { class: "chart" }, make("h3", {}, name), svg);
  const tip = make("div", { class: "tip", hidden: "" });
  chart.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const near = points.reduce((a, b) => (Math.abs(sx(b[0]) - at) < Math.abs(sx(a[0]) - at) ? b : a));
    tip.textContent = `${near[0]}: ${brief(near[1])}`;
    tip.style.left = `${(sx(near[0]) / width) * 100}%`;
    const top = box.top - chart.getBoundingClientRect().top;
    tip.style.top = `${top + (sy(near[1]) / height) * box.height}px`;
    tip.hidden = false;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  return chart;
}

// Achievements against plan rate --------------------------------------------------------

const guideOf = (mode) => /^(prompted|scripted)-/.exec(mode)?.[1] ?? "";

function frequencyChart(results, armColor) {
  const width = 760, height = 380;
  const shown = results.filter((r) => known(r.achievements.mean));
  const ends = shown.flatMap((r) => [r.achievements.low, r.achievements.mean, r.achievements.high]);
  const highest = Math.max(1, ...ends.filter(known)) * 1.12;
  const { svg, sx, sy, left, right } = frame({
    width, height, x: [-0.02, 1.04], y: [0, highest], label: "achievements against plan rate",
    xName: "share of turns with a plan", yName: "achievements",
    xFormat: (v) => `${Math.round(100 * v)}%`,
  });
  const labels = [];
  let curves = 0; // labels of one arm go below its points, of the next above
  for (const arm of new Set(shown.map((r) => r.arm))) {
    const color = `var(${armColor(arm)})`;
    const of = shown.filter((r) => r.arm === arm);
    if (of.length === 1) {
      labels.push(drawLevel(svg, of[0], color, { sy, left, right }));
      continue;
    }
    const placed = of.filter((r) => known(r.plan_rate.mean));
    placed.sort((a, b) => a.plan_rate.mean - b.plan_rate.mean);
    for (const [guide, dashes] of [["", "none"], ["prompted", "2 4"], ["scripted", "8 4"]]) {
      const path = placed.filter((r) => guideOf(r.mode) === guide)
        .map((r, i) => `${i ? "L" : "M"}${sx(r.plan_rate.mean)} ${sy(r.achievements.mean)}`);
      svg.append(makeSvg("path", { d: path.join(""), fill: "none", stroke: color, "stroke-opacity": 0.45,
        "stroke-width": 2, "stroke-dasharray": dashes }));
    }
    const below = curves++ % 2 === 0;
    for (const r of placed) labels.push(drawPoint(svg, r, color, { sx, sy, below }));
  }
  drawLabels(svg, labels);
  return svg;
}

// Labels go away from their points until they are clear of those drawn before.
function drawLabels(svg, labels) {
  const drawn = [];
  for (const { x, y, below, color, name, anchor = "middle" } of labels) {
    const width = 7 * name.length;
    const middle = anchor === "end" ? x - width / 2 : x;
    let at = y;
    const covers = (other) => Math.abs(other.at - at) < 12
      && Math.abs(other.middle - middle) < (other.width + width) / 2;
    while (drawn.some(covers)) at += below ? 13 : -13;
    drawn.push({ middle, at, width });
    svg.append(makeSvg("text", { x, y: at, "text-anchor": anchor, class: "label",
      style: `fill:${color}` }, name));
  }
}

// Returns where its label is to stand.
function drawLevel(svg, result, color, { sy, left, right }) {
  const { mean, low, high } = result.achievements;
  if (known(low)) {
    svg.append(makeSvg("rect", { x: left, width: right - left, y: sy(high),
      height: Math.max(1, sy(low) - sy(high)), fill: color, "fill-opacity": 0.15 }));
  }
  svg.append(makeSvg("line", { x1: left, x2: right, y1: sy(mean), y2: sy(mean), stroke: color,
    "stroke-dasharray": "6 4", "stroke-width": 1.5 }));
  const name = `${result.arm} ${result.mode}`;
  return { x: right, y: sy(mean) - 7, below: false, color, name, anchor: "end" };
}

// Returns where its label is to stand.
function drawPoint(svg, result, color, { sx, sy, below }) {
  const { achievements: a, plan_rate: p } = result;
  const x = sx(p.mean), y = sy(a.mean);
  const bar = (x1, y1, x2, y2) => svg.append(makeSvg("line", { x1, y1, x2, y2, stroke: color,
    "stroke-width": 1.5 }));
  if (known(a.low)) {
    bar(x, sy(a.low), x, sy(a.high));
    bar(x - 4, sy(a.low), x + 4, sy(a.low));
    bar(x - 4, sy(a.high), x + 4, sy(a.high));
  }
  if (known(p.low)) bar(sx(p.low), y, sx(p.high), y);
  const mark = result.mode === "dynamic"
    ? makeSvg("path", { d: `M${x} ${y - 9}l9 9l-9 9l-9-9z`, fill: color })
    : makeSvg("circle", { cx: x, cy: y, r: 5, stroke: color, "stroke-width": 2,
      fill: guideOf(result.mode) ? "var(--card)" : color });
  mark.append(makeSvg("title", {}, `${result.arm} ${result.mode}: ${brief(a.mean)} achievements`));
  svg.append(mark);
  const end = known(a.low) ? (below ? sy(a.low) : sy(a.high)) : y;
  return { x, y: below ? end + 16 : end - 8, below, color, name: result.mode };
}
